"""Random problems for `int4_linear`, and what its results are held against: shared by the tests of the CPU, of each
instruction set, of a GPU and of the emulated one.

    python tests/ops/int4_problems.py --cases 200 --seed 1
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from ops.accuracy import FLOATS
from ops.samples_small import INT4_KINDS, Inputs, Int4

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def dequantize(w: Int4, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight from its definition, one input at a time and not from the packed form."""
    out = torch.zeros(w.q.shape[0], inputs, device=w.q.device)
    for k in range(w.q.shape[1]):
        to = k if w.perm is None else int(w.perm[k])
        if to < 0:
            continue
        group, q = k // w.group_size, w.q[:, k]
        scale = w.scales[group].double()
        if w.offsets is not None:
            out[:, to] = scale * q + w.offsets[group].double()
        elif w.zeros is not None:
            out[:, to] = scale * (q.int() - w.zeros[group].int())
        else:
            out[:, to] = scale * (q.int() - 8)
    return out.to(dtype)


def linear(x: Tensor, w: Int4, packed: Tensor | None = None, **options: Any) -> Tensor:
    """The op; `packed` where it shall not be packed on the way."""
    packed = w.packed if packed is None else packed
    return ops.int4_linear(x, packed, *w.numbers, w.perm, group_size=w.group_size, in_features=x.shape[-1], **options)


@dataclass
class Problem:
    """The arguments of one call."""

    x: Tensor
    weight: Int4
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"

    def run(self) -> Tensor:
        """Call the kernel."""
        options = {"bias": self.bias, "residual": self.residual, "activation": self.activation}
        return linear(self.x, self.weight, **options)

    def exact(self) -> Tensor:
        """The float64 result."""
        w = self.weight
        wide = [None if t is None else t.double() for t in (self.x, self.bias, self.residual)]
        args = (wide[0], w.packed, *w.numbers, w.perm, *wide[1:], w.group_size, self.x.shape[-1], self.activation)
        return REFERENCES["int4_linear"](*args)

    def stock(self) -> Tensor:
        """PyTorch's own result: the weight dequantised to x's dtype, and every step rounded to it."""
        y = F.linear(self.x, self.dequantized(self.x.dtype), self.bias)
        y = PLAIN[self.activation](y)
        return y if self.residual is None else y + self.residual

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """By the kernel, which other tests compare bit for bit."""
        w = self.weight
        return ops.int4_dequantize(
            w.packed, *w.numbers, w.perm, group_size=w.group_size, in_features=self.x.shape[-1], dtype=dtype
        )

    def excess(self) -> float:
        """The largest error over what is allowed.

        Allowed is 2x PyTorch's own, and at least the last rounding (half a step at the largest entry) and a step of
        float32 at the largest sum of magnitudes, which any order of summation may lose.
        """
        exact, dtype = self.exact(), self.x.dtype
        if not exact.numel():
            return 0.0
        terms = self.x.double().abs() @ self.dequantized(torch.float32).double().abs().T
        rounding = 0.51 * torch.finfo(dtype).eps * float(exact.abs().max())
        summing = torch.finfo(torch.float32).eps * float(terms.max())
        got, own = ((t.double() - exact).abs() for t in (self.run(), self.stock()))
        worst = float((got / max(2 * float(own.max()), rounding + summing)).nan_to_num(nan=torch.inf).max())
        squares = float(got.square().mean().sqrt() / max(2 * float(own.square().mean().sqrt()), rounding + summing))
        return max(worst, squares)


def random_problem(device: str, seed: int) -> Problem:
    """Any shape, group, dtypes, zeros or offsets, order of inputs, strides (NaN beside what may be read), epilogue."""
    pick, new = random.Random(seed), Inputs(device, seed)
    dtype = pick.choice(FLOATS)
    rows = pick.choice([1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 64, 65, 130, 257, 300])
    n = pick.choice([1, 5, 31, 32, 45, 64, 96, 130, 144, 260, 272])
    k = pick.choice([1, 7, 31, 32, 96, 130, 256, 576, 1000, 1288])
    if pick.random() < 0.2:  # more weights, which some kernels are for
        rows, n, k = pick.choice([17, 33, 65, 300]), pick.choice([260, 516]), pick.choice([1000, 1600, 2048])
    group, kind = pick.choice([32, 64, 96, 128, 160, 1 << 20]), pick.choice(INT4_KINDS)
    weight = new.int4(n, k, group, kind, pick.choice(FLOATS), pick.random() < 0.6)
    shape = pick.choice([(rows,), (rows,), (1, rows), (rows, 1), (2, rows)])
    padding, step = pick.choice([0, 0, 3, 8]), pick.choice([1, 1, 1, 2])
    wide = new.normal(*shape, (k + padding) * step, dtype=dtype)
    wide[..., k * step :] = torch.nan
    x = wide[..., : k * step : step]
    if pick.random() < 0.2:
        x = x.transpose(0, -2)
    out = (*x.shape[:-1], n)
    turned = new.normal(*out[::-1], dtype=dtype).permute(*range(len(out))[::-1])
    residual = pick.choice([None, new.normal(*out, dtype=dtype), turned])
    bias = pick.choice([None, new.normal(n, dtype=dtype)])
    return Problem(x, weight, bias, residual, pick.choice([*PLAIN, "none"]))


def check(device: str, seed: int) -> None:
    """Raise AssertionError where a random problem is wrong, or not the same when run again."""
    problem = random_problem(device, seed)
    got = problem.run()
    assert got.is_contiguous() and got.dtype == problem.x.dtype
    assert torch.equal(got, problem.run()), f"problem {seed}: not the same bits again"
    excess = problem.excess()
    assert excess <= 1, f"problem {seed}: {excess:.2f} times the allowed error: {problem}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random problems of int4_linear against float64.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seed, options.seed + options.cases):
        check(options.device, seed)
    from torch_pagedkv._native import libraries

    print(f"{options.cases} cases on {libraries[options.device].target}: all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
