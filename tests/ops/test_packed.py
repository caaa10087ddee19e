"""The other packed weights, `q4k_*` and `int8_*`: layouts and numbers bit for bit, products with PyTorch's own error as
the yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, same_bits
from ops.int4_problems import PLAIN
from ops.samples_small import Inputs
from torch import Tensor

from torch_pagedkv import ops

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass
class Weight:
    """A weight [n, k] as arguments of its family's ops."""

    n: int
    k: int
    parts: tuple[Tensor, ...]
    linear: Callable[..., Tensor]  # (x, *parts, bias, residual, activation=)
    dequantize: Callable[..., Tensor]  # (*parts, dtype=)

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return self.linear(x, *self.parts, **options)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(*self.parts, dtype=dtype)


def q4k(new: Inputs, n: int, size: int, seed: int = 0) -> Weight:
    """n outputs, `size` super-blocks."""
    return Weight(n, 256 * size, new.q4k(n, size), ops.q4k_linear, ops.q4k_dequantize)


def int8(new: Inputs, n: int, size: int, seed: int = 0) -> Weight:
    """n outputs, some 100 `size` inputs, in groups of any length."""
    k, group = 100 * size + seed % 64, (32, 64, 96, 128, 160, -1)[seed % 6]
    parts = new.int8(n, k, k if group == -1 else group, FLOATS[seed % 3])
    options = {"group_size": group, "in_features": k}
    return Weight(n, k, parts, partial(ops.int8_linear, **options), partial(ops.int8_dequantize, **options))


FAMILIES = {"q4k": q4k, "int8": int8}
families = pytest.mark.parametrize("family", FAMILIES)


# ---- layouts and numbers (GGUF's bytes: tests/quant/test_gguf.py) ----------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 32), (33, 40), (70, 129)])
def test_int8_layout(device: str, n: int, k: int) -> None:
    """Every byte where the description of the layout has it, zeros behind."""
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    packed = ops.int8_repack(q.to(device)).cpu()
    assert packed.dtype == torch.int32
    assert packed.shape == (-(-n // 32), 8 * -(-k // 32), 32)
    octets = packed.view(torch.int8).view(*packed.shape, 4).tolist()
    for output in range(packed.shape[0] * 32):
        for k_in in range(packed.shape[1] * 4):
            number = octets[output // 32][k_in // 4][output % 32][k_in % 4]
            assert number == (int(q[output, k_in]) if output < n and k_in < k else 0)


def test_q4k_layout(device: str) -> None:
    """One super-block with a number of its own in each place."""
    block = torch.zeros(144, dtype=torch.uint8)
    block[:4] = torch.tensor([2.0, 0.5], dtype=torch.float16).view(torch.uint8)
    scales, mins = list(range(3, 64, 8)), list(range(60, 0, -8))
    for j in range(4):
        block[4 + j] = scales[j] | scales[j + 4] >> 4 << 6
        block[8 + j] = mins[j] | mins[j + 4] >> 4 << 6
        block[12 + j] = scales[j + 4] & 15 | (mins[j + 4] & 15) << 4
    q = torch.randint(0, 16, (256,))
    for i in range(256):
        block[16 + i // 64 * 32 + i % 32] |= int(q[i]) << (4 if i % 64 >= 32 else 0)
    packed, s, m, d, dmin = ops.q4k_repack(block[None].to(device))
    assert s.flatten().tolist() == scales and m.flatten().tolist() == mins
    assert d.item() == 2 and dmin.item() == 0.5
    assert torch.equal(packed.cpu(), ops.int4_repack(q.to(torch.uint8)[None]))
    want = torch.tensor([2.0 * scales[i // 32] * int(q[i]) - 0.5 * mins[i // 32] for i in range(256)])
    assert torch.equal(ops.q4k_dequantize(packed, s, m, d, dmin, dtype=torch.float32).cpu()[0], want)


@relaxed
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    group=st.sampled_from([32, 64, 96, 128, 1 << 20]),
    scales=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_int8_dequantize_bit_for_bit(device, n, k, group, scales, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    s = torch.randn(-(-k // group), n, generator=generator).to(scales)
    packed = ops.int8_repack(q.to(device))
    got = ops.int8_dequantize(packed, s.to(device), group_size=group, in_features=k, dtype=dtype)
    want = (s.double()[torch.arange(k) // group].T * q).float().to(dtype)
    assert same_bits(got.cpu(), want)


# ---- products --------------------------------------------------------------------------------------------------------


@families
@relaxed
@given(
    seed=st.integers(0, 1000),
    rows=st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 65, 130, 257]),
    n=st.sampled_from([1, 5, 31, 32, 45, 64, 96, 130, 260]),
    size=st.integers(1, 5),
    dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from([*PLAIN]),
    parts=st.sampled_from(["", "bias", "residual", "both"]),
    view=st.sampled_from(["whole", "padded", "every other", "turned"]),
)
def test_any_problem(device, family, seed, rows, n, size, dtype, activation, parts, view) -> None:
    """At most twice PyTorch's own error, or one rounding; NaN beside what may be read; equal bits when called again."""
    new = Inputs(device, seed)
    w = FAMILIES[family](new, n, size, seed)
    step = 2 if view == "every other" else 1
    wide = new.normal(2, rows, (w.k + 3) * step, dtype=dtype)
    wide[..., w.k * step :] = torch.nan
    x = wide[..., : w.k * step : step]
    x = x.transpose(0, 1) if view == "turned" else x.contiguous() if view == "whole" else x
    bias = new.normal(n, dtype=dtype) if parts in ("bias", "both") else None
    residual = new.normal(n, *x.shape[:-1], dtype=dtype).permute(1, 2, 0) if parts in ("residual", "both") else None
    got = w(x, bias=bias, residual=residual, activation=activation)
    assert got.is_contiguous() and got.dtype == dtype and got.shape == (*x.shape[:-1], n)
    assert same_bits(got, w(x, bias=bias, residual=residual, activation=activation))

    def product(x: Tensor, weight: Tensor, *added: Tensor | None) -> Tensor:
        y = PLAIN[activation](F.linear(x, weight, added[0]))
        return y if added[1] is None else y + added[1]

    added = [None if t is None else t.double() for t in (bias, residual)]
    exact = product(x.double(), w.numbers(torch.float32).double(), *added)
    stock = product(x, w.numbers(dtype), bias, residual)
    terms = x.double().abs() @ w.numbers(torch.float32).double().abs().T
    rounding = 0.51 * torch.finfo(dtype).eps * float(exact.abs().max())
    floor = rounding + torch.finfo(torch.float32).eps * float(terms.max())
    mine, own = ((t.double() - exact).abs() for t in (got, stock))
    assert float(mine.max()) <= max(2 * float(own.max()), floor)
    assert float(mine.square().mean().sqrt()) <= max(2 * float(own.square().mean().sqrt()), floor)


@families
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_many_inputs(device: str, family: str, dtype: torch.dtype, rows: int) -> None:
    """No worse than PyTorch's own at the length of a real layer: 2x, and no floor."""
    new = Inputs(device)
    w = FAMILIES[family](new, 128, 16 if family == "q4k" else 40)
    x = new.normal(rows, w.k, dtype=dtype)
    exact = x.double() @ w.numbers(torch.float32).double().T
    stock = F.linear(x, w.numbers(dtype))
    got, own = ((t.double() - exact).square().mean().sqrt() for t in (w(x), stock))
    assert float(got) <= 2 * float(own)


@families
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact_where_sums_are(device: str, family: str, dtype: torch.dtype) -> None:
    """Whole numbers and scales that are powers of two have exact sums in any order, so every bit is known."""
    new = Inputs(device)
    for rows in (1, 2, 3, 5, 17, 40):
        w = FAMILIES[family](new, 75, 2)
        if family == "q4k":
            w.parts[1].fill_(2)
            w.parts[2].fill_(6)
            w.parts[3].fill_(0.5)
            w.parts[4].fill_(0.5)
        else:
            q = torch.randint(-3, 4, (75, w.k), dtype=torch.int8, device=device)
            w.parts = ops.int8_repack(q), torch.full_like(w.parts[1], 0.5)
        x = (torch.rand(rows, w.k, generator=new.generator) < 0.02).float().to(device, dtype)
        want = x.double() @ w.numbers(torch.float32).double().T
        assert float(want.abs().max()) < 128
        assert torch.equal(w(x).double(), want), rows


@families
def test_one_group_off_by_one_shows(device: str, family: str) -> None:
    new = Inputs(device)
    w = FAMILIES[family](new, 40, 2)
    x = torch.ones(3, w.k, device=device)
    before, y = w.numbers(torch.float32), w(x)
    for part in (1, 2) if family == "q4k" else (1,):
        changed = w.parts[part]
        old = changed.clone()
        changed[2, 17] = changed[2, 17] + 1
        places = (before != w.numbers(torch.float32)).nonzero()
        assert places[:, 0].unique().tolist() == [17]
        assert set(places[:, 1].tolist()) <= set(range(64, 96)) and len(places) > 20
        assert (y != w(x)).any(0).nonzero().flatten().tolist() == [17]
        changed.copy_(old)


@families
@pytest.mark.parametrize("rows", [4, 12])
def test_a_row_does_not_depend_on_its_neighbours_values(device: str, family: str, rows: int) -> None:
    new = Inputs(device)
    w = FAMILIES[family](new, 40, 1)
    x = new.normal(rows, w.k)
    other = x.clone()
    other[1:] = torch.nan
    first, second = w(x), w(other)
    assert same_bits(first[0], second[0])
    assert second[1:].isnan().all()


@families
def test_no_rows_no_inputs_no_outputs(device: str, family: str) -> None:
    new = Inputs(device)
    w = FAMILIES[family](new, 40, 1)
    assert w(new.normal(0, w.k)).shape == (0, 40)
    assert w(new.normal(w.k)).shape == (40,)
    nothing, bias = FAMILIES[family](new, 0, 1), new.normal(40)
    assert nothing(new.normal(3, nothing.k)).shape == (3, 0)
    if family == "q4k":
        parts = ops.q4k_repack(torch.empty(40, 0, dtype=torch.uint8, device=device))
        got = ops.q4k_linear(new.normal(3, 0), *parts, bias)
    else:
        packed = ops.int8_repack(torch.empty(40, 0, dtype=torch.int8, device=device))
        got = ops.int8_linear(new.normal(3, 0), packed, new.normal(0, 40), bias, group_size=32, in_features=0)
    assert torch.equal(got, bias.expand(3, 40))


@families
def test_one_graph_for_any_number_of_rows(device: str, family: str) -> None:
    """Traced with symbolic sizes, without a graph break, with the bits of the eager call."""
    new = Inputs(device)
    w, counts = FAMILIES[family](new, 40, 1), torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counts)
    def layer(x: Tensor, residual: Tensor) -> Tensor:
        return w.linear(x * 2, *w.parts, residual=residual, activation="silu") + 1

    for rows in (5, 3, 7, 50):  # 5: no other size, which tracing would take for the same
        x, residual = new.normal(rows, 4, w.k), new.normal(rows, 4, 40)
        want = w(x * 2, residual=residual, activation="silu") + 1
        assert same_bits(layer(x, residual), want)
    assert counts.frame_count == 1


@families
def test_threads_do_not_change_a_bit(family: str) -> None:
    new = Inputs("cpu")
    w = FAMILIES[family](new, 700, 2)
    for rows in (1, 30, 300):
        x = new.normal(rows, w.k, dtype=torch.bfloat16)
        one = w(x)
        torch.set_num_threads(2)
        two = w(x)
        torch.set_num_threads(1)
        assert same_bits(one, two)


# ---- errors ----------------------------------------------------------------------------------------------------------


def _strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x.double()}, "x: got float64, needs float32, float16 or bfloat16"),
        ({"x": lambda x: x[:, :511]}, r"x: got shape \[3, 511\], needs \[..., K\] with K = 512"),
        ({"packed": lambda p: p[:1]}, r"packed: got shape \[1, 64, 32\], needs q4k_repack's"),
        ({"packed": lambda p: p.long()}, "packed: got int64, needs int32"),
        ({"packed": _strided}, "packed: got a strided view"),
        ({"scales": lambda s: s.float()}, "scales: got float32, needs uint8"),
        ({"scales": lambda s: s[:8]}, r"scales: got shape \[8, 40\]"),
        ({"mins": lambda m: m.int()}, "mins: got int32, needs uint8"),
        ({"mins": lambda m: m[:, :3]}, r"mins: got shape \[16, 3\]"),
        ({"d": lambda d: d.float()}, "d: got float32, needs float16"),
        ({"d": _strided}, "d: got a strided view"),
        ({"dmin": lambda d: d[:1]}, r"dmin: got shape \[1, 40\], needs d's shape \(2, 40\)"),
        ({"bias": lambda _: torch.zeros(39)}, r"bias: got shape \[39\]"),
        ({"residual": lambda _: torch.zeros(3, 41)}, r"residual: got shape \[3, 41\], needs the result's shape"),
        ({"activation": lambda _: "relu"}, 'activation: got "relu", needs one of none, silu, gelu, gelu_tanh'),
    ],
)
def test_q4k_refuses(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    names = ("packed", "scales", "mins", "d", "dmin")
    args: dict[str, Any] = {"x": new.normal(3, 512), **dict(zip(names, new.q4k(40, 2), strict=True))}
    for name, edit in change.items():
        value = edit(args.get(name))
        args[name] = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(RuntimeError, match=f"q4k_linear: ({message})"):
        ops.q4k_linear(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x.double()}, "x: got float64, needs float32, float16 or bfloat16"),
        ({"x": lambda x: x[:, :95]}, r"x: got shape \[3, 95\], needs \[..., in_features\] with in_features = 96"),
        ({"packed": lambda p: p[:1]}, r"packed: got shape \[1, 24, 32\], needs int8_repack's \[.*\] \(2, 24, 32\)"),
        ({"packed": lambda p: p.char()}, "packed: got int8, needs int32"),
        ({"scales": lambda s: s.int()}, "scales: got int32, needs float32, float16 or bfloat16"),
        ({"scales": lambda s: s[:1]}, r"scales: got shape \[1, 40\]"),
        ({"scales": lambda s: s.T.contiguous().T}, "scales: got a strided view"),
        ({"group_size": lambda _: 48}, "group_size: got 48, needs a multiple of 32, or K = 96 for one group"),
        ({"group_size": lambda _: 0}, "group_size: got 0"),
        ({"bias": lambda _: torch.zeros(40).half()}, "bias: got float16, needs float32"),
        ({"activation": lambda _: "relu"}, 'activation: got "relu", needs one of none, silu, gelu, gelu_tanh'),
    ],
)
def test_int8_refuses(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    packed, scales = new.int8(40, 96, 64, torch.float32)
    args: dict[str, Any] = {"x": new.normal(3, 96), "packed": packed, "scales": scales}
    args |= {"group_size": 64, "in_features": 96}
    for name, edit in change.items():
        value = edit(args.get(name))
        args[name] = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(RuntimeError, match=f"int8_linear: ({message})"):
        ops.int8_linear(**args)


def test_repack_and_dequantize_refuse(device: str) -> None:
    new = Inputs(device)
    with pytest.raises(RuntimeError, match="q4k_repack: blocks: got 143 bytes in a row, needs a multiple of 144"):
        ops.q4k_repack(torch.zeros(2, 143, dtype=torch.uint8, device=device))
    with pytest.raises(RuntimeError, match="q4k_repack: blocks: got int8, needs uint8"):
        ops.q4k_repack(torch.zeros(2, 144, dtype=torch.int8, device=device))
    with pytest.raises(RuntimeError, match="q4k_dequantize: dtype: got int32"):
        ops.q4k_dequantize(*new.q4k(4, 1), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="int8_repack: q: got uint8, needs int8"):
        ops.int8_repack(torch.zeros(2, 3, dtype=torch.uint8, device=device))
    parts = new.int8(4, 64, 32, torch.float16)
    with pytest.raises(RuntimeError, match="int8_dequantize: packed: got shape"):
        ops.int8_dequantize(*parts, group_size=64, in_features=97, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="int8_dequantize: in_features: got -3"):
        ops.int8_dequantize(*parts, group_size=32, in_features=-3, dtype=torch.float32)
