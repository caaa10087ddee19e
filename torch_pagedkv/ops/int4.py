"""Linear layers with 4-bit weights: repacking, dequantising, and the fused product.

A weight is q [N, K], whole numbers 0..15, in groups of `group_size` neighbouring inputs that share for each output

    a scale and a zero       w = scale * (q - zero)         GPTQ, AWQ; zero is 8 where none are given (symmetric)
    a scale and an offset    w = scale * q + offset         GGUF's Q4_1 and the like

    int4_linear:  y = activation(x W^T + bias) + residual,  float32 sums, rounded once

Groups are runs of inputs: the last one may be short, and any assignment of inputs to groups (GPTQ's act-order) becomes
runs by a permutation of the inputs, `perm`, with -1 where a run is padded to a multiple of 32.

The packed form is one for all devices (csrc/int4.h describes it): `.to()` and files move it as it is. Scales, zeros and
offsets stay as they are, [groups, N].

The floor is the bytes of the weights over the memory's bandwidth at few rows, the multiply-adds at many.

Source: Frantar et al., GPTQ, arXiv:2210.17323; Lin et al., AWQ, arXiv:2306.00978; for the kernels Frantar et al.,
MARLIN, arXiv:2408.11743.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference
from .activation import ACTIVATIONS

_ops = torch.ops.torch_pagedkv

#: outputs of a block of the packed form; K is padded to it too
BLOCK = 32
#: input 8 j + i of a word is in bits 4 NIBBLES[i] ... + 3
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
#: the activations of `int4_linear`
INT4_ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh")


def _blocks(n):
    return (n + BLOCK - 1) // BLOCK


@define("int4_repack(Tensor q) -> Tensor")
def _(q):
    n, k = q.shape
    return q.new_empty((_blocks(n), 4 * _blocks(k), BLOCK), dtype=torch.int32)


@define(
    "int4_dequantize(Tensor packed, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, int group_size, "
    "SymInt in_features, ScalarType dtype) -> Tensor"
)
def _(packed, scales, zeros, offsets, perm, group_size, in_features, dtype):
    return scales.new_empty((scales.shape[1], in_features), dtype=dtype)


@define(
    "int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, Tensor? bias, "
    'Tensor? residual, int group_size, SymInt in_features, str activation="none") -> Tensor'
)
def _(x, packed, scales, zeros, offsets, perm, bias, residual, group_size, in_features, activation="none"):
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


# ------------------------------------------------------------------------------------------------ references


@reference("int4_repack")
def int4_repack_reference(q: Tensor) -> Tensor:
    """The packed form from its description."""
    n, k = q.shape
    padded = torch.full((_blocks(n) * BLOCK, _blocks(k) * BLOCK), 8, dtype=torch.int64, device=q.device)
    padded[:n, :k] = q
    # [blocks, outputs, words, inputs] -> a word for each (block, word, output)
    parts = ((padded ^ 8) & 15).view(_blocks(n), BLOCK, 4 * _blocks(k), 8).transpose(1, 2)
    words = (parts << torch.tensor([4 * i for i in NIBBLES], device=q.device)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """Int64 [n, k] of 0..15."""
    shifts = torch.tensor([4 * i for i in NIBBLES], device=packed.device)
    parts = (packed.long()[..., None] >> shifts & 15) ^ 8
    return parts.transpose(1, 2).reshape(BLOCK * packed.shape[0], 8 * packed.shape[1])[:n, :k]


def _weights(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, group_size: int, k: int
) -> Tensor:
    """Float64 [N, K], inputs in the order of the packed form."""
    q = _unpack(packed, scales.shape[1], k)
    group = torch.arange(k, device=q.device) // group_size

    def spread(t: Tensor) -> Tensor:
        return t[group].T

    if offsets is not None:
        return spread(scales).double() * q + spread(offsets).double()
    return spread(scales).double() * (q - (8 if zeros is None else spread(zeros).long()))


@reference("int4_dequantize")
def int4_dequantize_reference(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    perm: Tensor | None,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    w = _weights(packed, scales, zeros, offsets, group_size, in_features if perm is None else perm.shape[0])
    if perm is not None:
        ordered = w.new_zeros(w.shape[0], in_features)
        ordered[:, perm[perm >= 0].long()] = w[:, perm >= 0]
        w = ordered
    return w.float().to(dtype)


@reference("int4_linear")
def int4_linear_reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    wide = x.double()
    if perm is not None:
        wide = wide[..., perm.clamp(min=0).long()] * (perm >= 0)
    y = wide @ _weights(packed, scales, zeros, offsets, group_size, wide.shape[-1]).T
    y = ACTIVATIONS[activation](y if bias is None else y + bias.double())
    return (y if residual is None else y + residual.double()).to(x.dtype)


# ------------------------------------------------------------------------------------------------ public functions


def int4_repack(q: Tensor) -> Tensor:
    """Pack 4-bit weights. `int4_dequantize` is the exact inverse.

    Args:
        q: [N, K], uint8, 0..15, for outputs N and inputs K (in the order of `perm`, where there is one).

    Returns:
        int32 [ceil(N / 32), 4 ceil(K / 32), 32], contiguous, the same on every device.

    Raises:
        ValueError: an entry above 15. (Not checked while tracing: the entry modulo 16 is packed then.)
    """
    if not torch.compiler.is_compiling() and q.dtype == torch.uint8 and q.numel() and int(q.max()) > 15:
        raise ValueError(f"int4_repack: q: got {int(q.max())}, needs 0..15")
    return _ops.int4_repack(q)


def _one_group(group_size: int, perm: Tensor | None, inputs: int) -> int:
    if group_size != -1:
        return group_size
    return max(1, inputs if perm is None else perm.shape[0])


def int4_dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    offsets: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weights as numbers.

    Args:
        packed, scales, zeros, offsets, perm, group_size: as in `int4_linear`.
        in_features: inputs of the layer; with `perm`, those that it points to.
        dtype: float32, float16 or bfloat16. The weight is rounded to float32 (exact for 16-bit scales without
            offsets), then to the dtype.

    Returns:
        a contiguous tensor [N, in_features]. With `perm` in the original order, and 0 where no entry points.
    """
    group_size = _one_group(group_size, perm, in_features)
    return _ops.int4_dequantize(packed, scales, zeros, offsets, perm, group_size, in_features, dtype)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    offsets: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    group_size: int,
    in_features: int,
    activation: str = "none",
) -> Tensor:
    """activation(x W^T + bias) + residual for a packed 4-bit W.

    Products of x with the whole numbers q - 8 (or q - zero) are summed in float32 over inputs of one group, and then
    scaled. Rows of one x do not depend on each other, and equal calls give equal bits.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, finite, any strides (copied unless unit in the last
            dimension).
        packed: int32 [ceil(N / 32), 4 ceil(K / 32), 32] of `int4_repack`; K is in_features, or the length of `perm`.
        scales: [ceil(K / group_size), N], float32, float16 or bfloat16.
        zeros: uint8, scales' shape, 0..16; without zeros and offsets every zero is 8. (GPTQ's first format stores them
            less one: add it before.)
        offsets: scales' shape and dtype, in place of zeros.
        perm: int32 [K], the input of x that each input of W takes, -1 for padding (0 is taken); or None. A CPU refuses
            other entries, a GPU takes them as -1.
        bias: [N] in x's dtype. residual: [..., N] in x's dtype, any strides.
        group_size: a multiple of 32, or K or more (-1) for one group. The last group may be short.
        in_features: of the layer. (The packed form knows it up to padding only: this tells a wrong x.)
        activation: one of INT4_ACTIVATIONS.

    Returns:
        a contiguous tensor [..., N] in x's dtype.

    Raises:
        RuntimeError: a shape, dtype, device or layout that does not fit, by the argument's name.
    """
    group_size = _one_group(group_size, perm, in_features)
    return _ops.int4_linear(
        x, packed, scales, zeros, offsets, perm, bias, residual, group_size, in_features, activation
    )
