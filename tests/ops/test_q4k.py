"""`q4k_*`: the layout of GGUF's super-blocks, numbers bit for bit (of its bytes: tests/quant/test_gguf.py), products as
in `packed_products`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import packed_products
from ops.packed_products import Weight
from ops.samples_small import Inputs
from torch import Tensor

from torch_pagedkv import ops


def test_layout(device: str) -> None:
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


class TestProducts(packed_products.Products):
    long, scales = 16, (1, 2)

    def weight(self, new: Inputs, n: int, size: int, seed: int = 0) -> Weight:
        """`size` super-blocks."""
        return Weight(n, 256 * size, new.q4k(n, size), ops.q4k_linear, ops.q4k_dequantize)

    def simple(self, w: Weight, new: Inputs) -> None:
        for part, value in zip(w.parts[1:], (2, 6, 0.5, 0.5), strict=True):
            part.fill_(value)

    def no_inputs(self, new: Inputs, bias: Tensor) -> Tensor:
        parts = ops.q4k_repack(torch.empty(40, 0, dtype=torch.uint8, device=bias.device))
        return ops.q4k_linear(new.normal(3, 0), *parts, bias)


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
def test_refuses(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    names = ("packed", "scales", "mins", "d", "dmin")
    args: dict[str, Any] = {"x": new.normal(3, 512), **dict(zip(names, new.q4k(40, 2), strict=True))}
    for name, edit in change.items():
        value = edit(args.get(name))
        args[name] = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(RuntimeError, match=f"q4k_linear: ({message})"):
        ops.q4k_linear(**args)


def test_repack_and_dequantize_refuse(device: str) -> None:
    new = Inputs(device)
    with pytest.raises(RuntimeError, match="q4k_repack: blocks: got 143 bytes in a row, needs a multiple of 144"):
        ops.q4k_repack(torch.zeros(2, 143, dtype=torch.uint8, device=device))
    with pytest.raises(RuntimeError, match="q4k_repack: blocks: got int8, needs uint8"):
        ops.q4k_repack(torch.zeros(2, 144, dtype=torch.int8, device=device))
    with pytest.raises(RuntimeError, match="q4k_dequantize: dtype: got int32"):
        ops.q4k_dequantize(*new.q4k(4, 1), dtype=torch.int32)
