"""Linear layers with 8-bit weights and floating activations: repacking, dequantising, and the fused product.

A weight is q [N, K], whole numbers -128..127, in groups of `group_size` neighbouring inputs that share a scale for each
output: w = scale * q. GGUF's Q8_0 is this with groups of 32 and float16 scales.

    int8_linear:  y = activation(x W^T + bias) + residual,  float32 sums, rounded once

The packed form is one for all devices (csrc/int4.h describes it); the kernels are those of `int4_linear`, with words of
four inputs. The floor is the bytes of the weights over the memory's bandwidth at few rows, the multiply-adds at many.

Source: ggml's block_q8_0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference
from .activation import ACTIVATIONS
from .int4 import BLOCK, _blocks, _one_group

_ops = torch.ops.torch_pagedkv

#: inputs of a word
_WORD = 4


@define("int8_repack(Tensor q) -> Tensor")
def _(q):
    n, k = q.shape
    return q.new_empty((_blocks(n), BLOCK // _WORD * _blocks(k), BLOCK), dtype=torch.int32)


@define("int8_dequantize(Tensor packed, Tensor scales, int group_size, SymInt in_features, ScalarType dtype) -> Tensor")
def _(packed, scales, group_size, in_features, dtype):
    return scales.new_empty((scales.shape[1], in_features), dtype=dtype)


@define(
    "int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, Tensor? residual, int group_size, "
    'SymInt in_features, str activation="none") -> Tensor'
)
def _(x, packed, scales, bias, residual, group_size, in_features, activation="none"):
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


# ------------------------------------------------------------------------------------------------ references


@reference("int8_repack")
def int8_repack_reference(q: Tensor) -> Tensor:
    """The packed form from its description."""
    n, k = q.shape
    padded = torch.zeros((_blocks(n) * BLOCK, _blocks(k) * BLOCK), dtype=torch.int64, device=q.device)
    padded[:n, :k] = q
    # [blocks, outputs, words, inputs] -> a word for each (block, word, output)
    parts = (padded & 255).view(_blocks(n), BLOCK, BLOCK // _WORD * _blocks(k), _WORD).transpose(1, 2)
    words = (parts << torch.arange(0, 32, 8, device=q.device)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _weights(packed: Tensor, scales: Tensor, group_size: int, k: int) -> Tensor:
    """Float64 [N, K]."""
    octets = packed.long()[..., None] >> torch.arange(0, 32, 8, device=packed.device) & 255
    signed = octets - (octets >> 7 << 8)
    q = signed.transpose(1, 2).reshape(BLOCK * packed.shape[0], _WORD * packed.shape[1])[: scales.shape[1], :k]
    return scales.double()[torch.arange(k, device=q.device) // group_size].T * q


@reference("int8_dequantize")
def int8_dequantize_reference(
    packed: Tensor, scales: Tensor, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    return _weights(packed, scales, group_size, in_features).float().to(dtype)


@reference("int8_linear")
def int8_linear_reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = x.double() @ _weights(packed, scales, group_size, in_features).T
    y = ACTIVATIONS[activation](y if bias is None else y + bias.double())
    return (y if residual is None else y + residual.double()).to(x.dtype)


# ------------------------------------------------------------------------------------------------ public functions


def int8_repack(q: Tensor) -> Tensor:
    """Pack 8-bit weights. `int8_dequantize` is the exact inverse.

    Args:
        q: int8 [N, K], for outputs N and inputs K.

    Returns:
        int32 [ceil(N / 32), 8 ceil(K / 32), 32], contiguous, the same on every device.
    """
    return _ops.int8_repack(q)


def int8_dequantize(packed: Tensor, scales: Tensor, *, group_size: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weights as numbers.

    Args:
        packed, scales, group_size, in_features: as in `int8_linear`.
        dtype: float32, float16 or bfloat16. The weight is rounded to float32 (exact for 16-bit scales), then to the
            dtype.

    Returns:
        a contiguous tensor [N, in_features].
    """
    return _ops.int8_dequantize(packed, scales, _one_group(group_size, None, in_features), in_features, dtype)


def int8_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    group_size: int,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x W^T + bias) + residual for a packed 8-bit W.

    Products of x with the whole numbers q are summed in float32 over inputs of one group, and then scaled; a GPU with
    more than 16 rows rounds the weights to x's dtype first. Rows of one x do not depend on each other,
    and equal calls give equal bits.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, finite, any strides (copied unless unit in the last
            dimension).
        packed: int32 [ceil(N / 32), 8 ceil(K / 32), 32] of `int8_repack`.
        scales: [ceil(K / group_size), N], float32, float16 or bfloat16.
        bias: [N] in x's dtype. residual: [..., N] in x's dtype, any strides.
        group_size: a multiple of 32, or K or more (-1) for one group. The last group may be short.
        in_features: K.
        activation: one of INT4_ACTIVATIONS.

    Returns:
        a contiguous tensor [..., N] in x's dtype.

    Raises:
        RuntimeError: a shape, dtype, device or layout that does not fit, by the argument's name.
    """
    group_size = _one_group(group_size, None, in_features)
    return _ops.int8_linear(x, packed, scales, bias, residual, group_size, in_features, activation)
