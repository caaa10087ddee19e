"""Gated activations and bias + activation, in float32, rounded once.

    silu_and_mul(gate, up) = silu(gate) * up         gelu_and_mul(gate, up) = gelu(gate) * up
    bias_act(x, bias, activation) = activation(x + bias)

Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import define, reference

_ops = torch.ops.torch_pagedkv

#: the activations of `bias_act`, by name
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@define("silu_and_mul(Tensor gate, Tensor up) -> Tensor")
def _(gate, up):
    return gate.new_empty(gate.shape)


@define('gelu_and_mul(Tensor gate, Tensor up, str approximate="none") -> Tensor')
def _(gate, up, approximate="none"):
    return gate.new_empty(gate.shape)


@define("bias_act(Tensor x, Tensor? bias, str activation) -> Tensor")
def _(x, bias, activation):
    return x.new_empty(x.shape)


# ------------------------------------------------------------------------------------------------ references


@reference("silu_and_mul")
def silu_and_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The contract in plain PyTorch and float64."""
    return (F.silu(gate.double()) * up.double()).to(gate.dtype)


@reference("gelu_and_mul")
def gelu_and_mul_reference(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """The contract in plain PyTorch and float64."""
    return (F.gelu(gate.double(), approximate=approximate) * up.double()).to(gate.dtype)


@reference("bias_act")
def bias_act_reference(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The contract in plain PyTorch and float64."""
    y = x.double()
    return ACTIVATIONS[activation](y if bias is None else y + bias.double()).to(x.dtype)


# ------------------------------------------------------------------------------------------------ public functions


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    if gate.shape[-1] % 2:
        raise ValueError(f"gate: got a packed last dimension of {gate.shape[-1]}, needs an even one")
    a, b = gate.chunk(2, -1)
    return a, b


def silu_and_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [..., N], one shape and dtype (float32, float16, bfloat16), unit stride in the last dimension;
            or `gate` alone as [..., 2 N], gate and up packed side by side (the output of a fused projection).

    Returns:
        a contiguous tensor [..., N].
    """
    return _ops.silu_and_mul(*_halves(gate, up))


def gelu_and_mul(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """gelu(gate) * up; arguments as in `silu_and_mul`, approximate is "none" (erf) or "tanh"."""
    return _ops.gelu_and_mul(*_halves(gate, up), approximate)


def bias_act(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(x + bias).

    Args:
        x: [..., N], float32, float16 or bfloat16. bias: [N] in x's dtype, or None. activation: a key of ACTIVATIONS.
    """
    return _ops.bias_act(x, bias, activation)
