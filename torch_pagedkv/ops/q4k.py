"""Linear layers over GGUF's Q4_K weights: repacking, dequantising, and the fused product.

A row is super-blocks of 256 inputs in 144 bytes, each 8 groups of 32 inputs:

    bytes 0, 2      d and dmin, float16
    bytes 4 .. 15   the scale s and the minimum m of each group, 6 bits each
    bytes 16 ..     q: four times 32 bytes, with group 2 j in their lower nibbles and 2 j + 1 in the upper

    w = d s q - dmin m

s and m of groups 0 .. 3 are the lower 6 bits of bytes j and j + 4 of the 12. Groups 4 .. 7 have the lower 4 bits in
byte j + 4, s below and m above, and the upper 2 in those of bytes j - 4 and j.

`int4_linear` could hold these numbers too, d s and dmin m being exact in float32, for 6 bits a weight. Keeping s and m
apart, a byte each, and d and dmin makes 4.625 (4.5 in the file): few rows cost what is read. q lies in the layout of
`int4_repack`, so the kernels are int4's, with other scales.

Source: ggml's block_q4_K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference
from .activation import ACTIVATIONS
from .int4 import BLOCK, _blocks, _unpack, int4_repack_reference

_ops = torch.ops.torch_pagedkv

#: inputs and bytes of a super-block
SUPER, BYTES = 256, 144

Q4K = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@define("q4k_repack(Tensor blocks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def _(blocks):
    n, supers = blocks.shape[0], blocks.shape[1] // BYTES
    groups = supers * (SUPER // BLOCK)
    subs = [blocks.new_empty((groups, n)) for _ in range(2)]
    numbers = [blocks.new_empty((supers, n), dtype=torch.float16) for _ in range(2)]
    return blocks.new_empty((_blocks(n), 4 * groups, BLOCK), dtype=torch.int32), *subs, *numbers


@define("q4k_dequantize(Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, ScalarType dtype) -> Tensor")
def _(packed, scales, mins, d, dmin, dtype):
    return d.new_empty((d.shape[1], SUPER * d.shape[0]), dtype=dtype)


@define(
    "q4k_linear(Tensor x, Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, Tensor? bias, "
    'Tensor? residual, str activation="none") -> Tensor'
)
def _(x, packed, scales, mins, d, dmin, bias, residual, activation="none"):
    return x.new_empty((*x.shape[:-1], d.shape[1]))


# ------------------------------------------------------------------------------------------------ references


@reference("q4k_repack")
def q4k_repack_reference(blocks: Tensor) -> Q4K:
    """The packed form from its description."""
    n, supers = blocks.shape[0], blocks.shape[1] // BYTES
    parts = blocks.reshape(n, supers, BYTES)
    d, dmin = parts[..., :4].contiguous().view(torch.float16).permute(2, 1, 0).contiguous()
    low, middle, high = parts[..., 4:16].view(n, supers, 3, 4).unbind(2)
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), -1)
    mins = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), -1)
    nibbles = parts[..., 16:].reshape(n, supers, 4, 1, BLOCK)
    q = torch.cat((nibbles & 15, nibbles >> 4), 3).reshape(n, SUPER * supers)
    packed = int4_repack_reference(q)
    scales, mins = (t.reshape(n, 8 * supers).T.contiguous() for t in (scales, mins))
    return packed, scales, mins, d, dmin


def _weights(packed: Tensor, scales: Tensor, mins: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """Float64 [N, K]."""
    q = _unpack(packed, d.shape[1], SUPER * d.shape[0])

    def spread(numbers: Tensor, sub: Tensor) -> Tensor:
        products = numbers.double().repeat_interleave(SUPER // BLOCK, 0) * sub
        return products.repeat_interleave(BLOCK, 0).T

    return spread(d, scales) * q - spread(dmin, mins)


@reference("q4k_dequantize")
def q4k_dequantize_reference(
    packed: Tensor, scales: Tensor, mins: Tensor, d: Tensor, dmin: Tensor, dtype: torch.dtype
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    return _weights(packed, scales, mins, d, dmin).float().to(dtype)


@reference("q4k_linear")
def q4k_linear_reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    mins: Tensor,
    d: Tensor,
    dmin: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "none",
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = x.double() @ _weights(packed, scales, mins, d, dmin).T
    y = ACTIVATIONS[activation](y if bias is None else y + bias.double())
    return (y if residual is None else y + residual.double()).to(x.dtype)


# ------------------------------------------------------------------------------------------------ public functions


def q4k_repack(blocks: Tensor) -> Q4K:
    """The bytes of a Q4_K tensor in the form of the kernels, which is the same on every device.

    Args:
        blocks: uint8 [N, 144 K / 256], as in the file: N outputs and K inputs.

    Returns:
        packed int32 [ceil(N / 32), K / 8, 32] as of `int4_repack`; scales and mins, uint8 [K / 32, N] of 0..63; d and
        dmin, float16 [K / 256, N].

    Raises:
        RuntimeError: rows are not whole super-blocks, or not bytes.
    """
    return _ops.q4k_repack(blocks)


def q4k_dequantize(
    packed: Tensor, scales: Tensor, mins: Tensor, d: Tensor, dmin: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """The weights as numbers.

    Args:
        packed, scales, mins, d, dmin: of `q4k_repack`.
        dtype: float32, float16 or bfloat16. The weight is rounded to float32 once, then to the dtype: ggml's numbers,
            bit for bit.

    Returns:
        a contiguous tensor [N, K].
    """
    return _ops.q4k_dequantize(packed, scales, mins, d, dmin, dtype)


def q4k_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    mins: Tensor,
    d: Tensor,
    dmin: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """activation(x W^T + bias) + residual for a Q4_K W.

    Products of x with the whole numbers q - 8 are summed in float32 over inputs of one group, and then scaled. Rows of
    one x do not depend on each other, and equal calls give equal bits.

    Args:
        x: [..., K], float32, float16 or bfloat16, finite, any strides (copied unless unit in the last dimension).
        packed, scales, mins, d, dmin: of `q4k_repack`.
        bias: [N] in x's dtype. residual: [..., N] in x's dtype, any strides.
        activation: one of INT4_ACTIVATIONS.

    Returns:
        a contiguous tensor [..., N] in x's dtype.

    Raises:
        RuntimeError: a shape, dtype, device or layout that does not fit, by the argument's name.
    """
    return _ops.q4k_linear(x, packed, scales, mins, d, dmin, bias, residual, activation)
