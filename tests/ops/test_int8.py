"""`int8_*`: the layout and the numbers of 8-bit weights bit for bit, products as in `packed_products`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops import packed_products
from ops.accuracy import FLOATS, same_bits
from ops.packed_products import Weight, relaxed
from ops.samples_small import Inputs
from torch import Tensor

from torch_pagedkv import ops


@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 32), (33, 40), (70, 129)])
def test_layout(device: str, n: int, k: int) -> None:
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


@relaxed
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    group=st.sampled_from([32, 64, 96, 128, 1 << 20]),
    scales=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_dequantize_bit_for_bit(device, n, k, group, scales, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    s = torch.randn(-(-k // group), n, generator=generator).to(scales)
    packed = ops.int8_repack(q.to(device))
    got = ops.int8_dequantize(packed, s.to(device), group_size=group, in_features=k, dtype=dtype)
    want = (s.double()[torch.arange(k) // group].T * q).float().to(dtype)
    assert same_bits(got.cpu(), want)


class TestProducts(packed_products.Products):
    long, scales = 40, (1,)

    def weight(self, new: Inputs, n: int, size: int, seed: int = 0) -> Weight:
        """Some 100 `size` inputs, in groups of any length."""
        k, group = 100 * size + seed % 64, (32, 64, 96, 128, 160, -1)[seed % 6]
        parts = new.int8(n, k, k if group == -1 else group, FLOATS[seed % 3])
        options = {"group_size": group, "in_features": k}
        return Weight(n, k, parts, partial(ops.int8_linear, **options), partial(ops.int8_dequantize, **options))

    def simple(self, w: Weight, new: Inputs) -> None:
        q = torch.randint(-3, 4, (w.n, w.k), dtype=torch.int8, device=new.device)
        w.parts = ops.int8_repack(q), torch.full_like(w.parts[1], 0.5)

    def no_inputs(self, new: Inputs, bias: Tensor) -> Tensor:
        packed = ops.int8_repack(torch.empty(40, 0, dtype=torch.int8, device=bias.device))
        return ops.int8_linear(new.normal(3, 0), packed, new.normal(0, 40), bias, group_size=32, in_features=0)


# ---- errors ----------------------------------------------------------------------------------------------------------


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
def test_refuses(device: str, change: dict[str, Any], message: str) -> None:
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
    with pytest.raises(RuntimeError, match="int8_repack: q: got uint8, needs int8"):
        ops.int8_repack(torch.zeros(2, 3, dtype=torch.uint8, device=device))
    parts = new.int8(4, 64, 32, torch.float16)
    with pytest.raises(RuntimeError, match="int8_dequantize: packed: got shape"):
        ops.int8_dequantize(*parts, group_size=64, in_features=97, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="int8_dequantize: in_features: got -3"):
        ops.int8_dequantize(*parts, group_size=32, in_features=-3, dtype=torch.float32)
