"""A linear layer on few rows: what decoding does, where reading the weights is the whole cost.

    linear(x, weight, bias) = x @ weight^T + bias,  float32 sums, rounded once

The floor is the weights' bytes over the memory's bandwidth. General matrix products are far from it at a few rows: on
a 2-core AVX-512 machine `F.linear` reads weights at 14 GB/s (bfloat16) and 17 GB/s (float32), `tensor.sum()` at 33.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference

_ops = torch.ops.torch_pagedkv


@define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
def _(x, weight, bias=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@reference("linear")
def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, for few rows. Right for any number, but fast for up to 8; use F.linear for many.

    Args:
        x: [..., K], float32, float16 or bfloat16. weight: [N, K] in x's dtype, unit stride in K, any row stride.
        bias: [N] in x's dtype, or None.

    Returns:
        a contiguous tensor [..., N].
    """
    return _ops.linear(x, weight, bias)
