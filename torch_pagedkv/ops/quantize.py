"""What stands around a product of 8-bit numbers: rows of activations to int8 or float8 with a scale each, and sums of
products to numbers again. The product itself is torch's (`_int_mm`, `_scaled_mm`); for the few rows of decoding, whose
cost is reading the weights, there is one with the way back in it.

    quantize_per_token:  v = rotated(x * factor);  scale = amax(|v|) / 127 (int8) or / 448 (float8_e4m3fn);
                         q = round_to_nearest_even(v / scale)
    dequantize_sums:     y = sums * row_scale * column_scale + bias
    scaled_linear:       y = dequantize_sums(x W^T)

`factor`, one for each input, is SmoothQuant's: what makes outlying inputs smaller while the weight's columns grow. The
rotation is Hadamard's matrix over its root on each block of inputs: an outlier is spread over its block, and the
product with a weight whose rows were rotated too stays the same. Steps of a + b, a - b in float32, near neighbours
first.
A row of zeros has scale 0 and stores 0, and so does a row whose scale is subnormal (its inverse would be infinite).

The floor of each is what it reads and writes over the memory's bandwidth.

Source: Xiao et al., SmoothQuant, arXiv:2211.10438; Dettmers et al., LLM.int8(), arXiv:2208.07339;
Ashkboos et al., QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference
from .cache import quantize_rows

_ops = torch.ops.torch_pagedkv


@define("quantize_per_token(Tensor x, Tensor? factor, int rotation, ScalarType dtype) -> (Tensor, Tensor)")
def _(x, factor, rotation, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@define("dequantize_sums(Tensor sums, Tensor row_scale, Tensor column_scale, Tensor? bias, ScalarType dtype) -> Tensor")
def _(sums, row_scale, column_scale, bias, dtype):
    return sums.new_empty(sums.shape, dtype=dtype)


@define(
    "scaled_linear(Tensor x, Tensor row_scale, Tensor weight, Tensor column_scale, Tensor? bias, ScalarType dtype) "
    "-> Tensor"
)
def _(x, row_scale, weight, column_scale, bias, dtype):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def rotated(x: Tensor, block: int) -> Tensor:
    """Float32 x [..., K] with each block of inputs multiplied by Hadamard's matrix over its root; 0: x. It is its own
    inverse, up to roundings."""
    if block == 0:
        return x
    v = x.unflatten(-1, (-1, block))
    h = 1
    while h < block:
        pairs = v.unflatten(-1, (-1, 2, h))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        v = torch.stack((a + b, a - b), -2).flatten(-3)
        h *= 2
    return (v * torch.tensor(block**-0.5, dtype=torch.float32)).flatten(-2)


@reference("quantize_per_token")
def quantize_per_token_reference(
    x: Tensor, factor: Tensor | None, rotation: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The contract in plain PyTorch."""
    x = x.float() if factor is None else x.float() * factor
    return quantize_rows(rotated(x, rotation), dtype)


@reference("dequantize_sums")
def dequantize_sums_reference(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = sums.double() * row_scale.double()[..., None] * column_scale.double()
    return (y if bias is None else y + bias.double()).to(dtype)


@reference("scaled_linear")
def scaled_linear_reference(
    x: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    return dequantize_sums_reference(x.double() @ weight.double().T, row_scale, column_scale, bias, dtype)


def quantize_per_token(
    x: Tensor, factor: Tensor | None = None, *, rotation: int = 0, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of x in 8 bits, each with a scale.

    Args:
        x: [..., K], float32, float16 or bfloat16, K >= 1, any strides (copied unless unit in the last dimension).
        factor: [K] float32, multiplied first; None: 1.
        rotation: inputs of a block that are rotated among themselves: 8, 16, 32 or 64, which divides K; 0: none.
        dtype: int8 or float8_e4m3fn.

    Returns:
        q [..., K] in that dtype and scale [...] float32, both contiguous: v ~ q * scale. A row with a NaN has
        scale NaN.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, by the argument's name.
    """
    return _ops.quantize_per_token(x, factor, rotation, dtype)


def dequantize_sums(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """Sums of products of 8-bit numbers as numbers.

    Args:
        sums: [..., N], int32 or float32, contiguous.
        row_scale: [...] float32, contiguous. column_scale: [N] float32.
        bias: [N] in `dtype`, or None.
        dtype: float32, float16 or bfloat16; rounded to once.

    Returns:
        a contiguous tensor [..., N].

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, by the argument's name.
    """
    return _ops.dequantize_sums(sums, row_scale, column_scale, bias, dtype)


def scaled_linear(
    x: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    column_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """The product of 8-bit numbers as numbers, for few rows: right for any number of them, but made for up to 8.

    Sums of int8 products are exact, so the result has the bits of `dequantize_sums` of any other exact sums. Those of
    float8 are float32.

    Args:
        x: [..., K], int8 or float8_e4m3fn, contiguous. weight: [N, K] in x's dtype, unit stride in K, any row stride.
        row_scale: [...] float32, contiguous. column_scale: [N] float32.
        bias: [N] in `dtype`, or None.
        dtype: float32, float16 or bfloat16; rounded to once.

    Returns:
        a contiguous tensor [..., N].

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, by the argument's name.
    """
    return _ops.scaled_linear(x, row_scale, weight, column_scale, bias, dtype)
