"""What stands around a product of 8-bit numbers: rows of activations to int8 or float8 with a scale each, and sums of
products to numbers again. The product itself is torch's (`_int_mm`, `_scaled_mm`).

    quantize_per_token:  v = x * factor;  scale = amax(|v|) / 127 (int8) or / 448 (float8_e4m3fn);
                         q = round_to_nearest_even(v / scale)
    dequantize_sums:     y = sums * row_scale * column_scale + bias

`factor`, one for each input, is SmoothQuant's: what makes outlying inputs smaller while the weight's columns grow.
A row of zeros has scale 0 and stores 0, and so does a row whose scale is subnormal (its inverse would be infinite).

The floor of both is what they read and write over the memory's bandwidth.

Source: Xiao et al., SmoothQuant, arXiv:2211.10438; Dettmers et al., LLM.int8(), arXiv:2208.07339.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference
from .cache import quantize_rows

_ops = torch.ops.torch_pagedkv


@define("quantize_per_token(Tensor x, Tensor? factor, ScalarType dtype) -> (Tensor, Tensor)")
def _(x, factor, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@define("dequantize_sums(Tensor sums, Tensor row_scale, Tensor column_scale, Tensor? bias, ScalarType dtype) -> Tensor")
def _(sums, row_scale, column_scale, bias, dtype):
    return sums.new_empty(sums.shape, dtype=dtype)


@reference("quantize_per_token")
def quantize_per_token_reference(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The contract in plain PyTorch."""
    return quantize_rows(x if factor is None else x.float() * factor, dtype)


@reference("dequantize_sums")
def dequantize_sums_reference(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = sums.double() * row_scale.double()[..., None] * column_scale.double()
    return (y if bias is None else y + bias.double()).to(dtype)


def quantize_per_token(x: Tensor, factor: Tensor | None = None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of x in 8 bits, each with a scale.

    Args:
        x: [..., K], float32, float16 or bfloat16, K >= 1, any strides (copied unless unit in the last dimension).
        factor: [K] float32, multiplied first; None: 1.
        dtype: int8 or float8_e4m3fn.

    Returns:
        q [..., K] in that dtype and scale [...] float32, both contiguous: x * factor ~ q * scale. A row with a NaN has
        scale NaN.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, by the argument's name.
    """
    return _ops.quantize_per_token(x, factor, dtype)


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
