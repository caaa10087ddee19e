"""RMSNorm (with the residual add fused) and LayerNorm, one pass over each row.

    rms_norm:      y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
    add_rms_norm:  h = x + residual (rounded to x's dtype, as the model would);  y = rms_norm(h);  returns (y, h)
    layer_norm:    y = (x - mean) / sqrt(var + eps) * weight + bias      (biased variance)

All arithmetic is float32. Models differ in two details, given as arguments so that a patched model rounds as its stock
one: Gemma multiplies by 1 + weight (weight_offset=1), Llama rounds the normalised row to x's dtype before it multiplies
by the weight (round_before_weight=True).

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467; Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference

_ops = torch.ops.torch_pagedkv


@define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset=0.0, bool round_before_weight=False) -> Tensor"
)
def _(x, weight, eps, weight_offset=0.0, round_before_weight=False):
    return x.new_empty(x.shape)


@define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset=0.0, "
    "bool round_before_weight=False) -> (Tensor, Tensor)"
)
def _(x, residual, weight, eps, weight_offset=0.0, round_before_weight=False):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


# ------------------------------------------------------------------------------------------------ references


@reference("rms_norm")
def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0, round_before_weight: bool = False
) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = x.double()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if round_before_weight:
        y = y.to(x.dtype).double()
    return (y if weight is None else y * (weight.double() + weight_offset)).to(x.dtype)


@reference("add_rms_norm")
def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """The contract in plain PyTorch and float64."""
    h = x + residual
    return rms_norm_reference(h, weight, eps, weight_offset, round_before_weight), h


@reference("layer_norm")
def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = x.double()
    y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, correction=0, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------------ public functions


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, weight_offset: float = 0.0, round_before_weight: bool = False
) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., N], float32, float16 or bfloat16. weight: [N], x's dtype or float32, or None.

    Returns:
        a contiguous tensor of x's shape and dtype.
    """
    return _ops.rms_norm(x, weight, eps, weight_offset, round_before_weight)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm in one pass: (norm(x + residual), x + residual). Neither input is changed.

    Args:
        x, residual: [..., N], one shape and dtype. weight: [N], x's dtype or float32, or None.
    """
    return _ops.add_rms_norm(x, residual, weight, eps, weight_offset, round_before_weight)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: [..., N], float32, float16 or bfloat16. weight, bias: [N], x's dtype or float32, or None.
    """
    return _ops.layer_norm(x, weight, bias, eps)
