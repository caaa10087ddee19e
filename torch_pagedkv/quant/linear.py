"""`Int4Linear`: an `nn.Linear` whose weight is packed 4-bit numbers, run by `ops.int4_linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .formats import Int4Weight, unpacked

_FIXED = (
    "the weight of an Int4Linear is 4-bit and fixed: only its input has a gradient. Train adapters (LoRA) beside it"
)


class Int4Linear(nn.Linear):
    """y = x W^T + bias for a packed 4-bit W.

    Everything is a buffer: `state_dict`, `.to()`, `copy.deepcopy`, pickling and `torch.compile(fullgraph=True)` work as
    for any module. Changing the module's dtype changes `bias` and what `weight` returns; scales stay as they are, so
    the numbers that the weight stands for never change. The input may require a gradient, the weight has none.

    Attributes:
        in_features, out_features: K and N.
        group_size: inputs that share a scale.
        packed, scales, zeros, offsets, perm: of `ops.int4_linear`; group_size there is `run`.
        g_idx: int32 [K], the group of each input, where inputs are not in order of their groups.
        bias: [N] or None.
        like: empty, in the dtype and on the device that the weight is seen in.
        source: where the weight is from, for people ("AWQ", "RTN").
    """

    in_features: int
    out_features: int
    group_size: int
    run: int
    source: str
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    perm: Tensor | None
    g_idx: Tensor | None
    like: Tensor
    bias: Any  # [N] or None: a buffer, where nn.Linear has a parameter

    def __init__(
        self, weight: Int4Weight, bias: Tensor | None = None, dtype: torch.dtype | None = None, source: str = ""
    ) -> None:
        """
        Args:
            weight: the numbers.
            bias: [N].
            dtype: that `weight` is seen in; default: torch's.
        """
        nn.Module.__init__(self)
        self.hold(weight, bias, dtype or torch.get_default_dtype(), source)

    @classmethod
    def adopt(cls, module: nn.Module, weight: Int4Weight, dtype: torch.dtype, source: str = "") -> Int4Linear:
        """Turn a linear layer into an Int4Linear, in place: whoever refers to it or hooked it keeps it. Its bias stays,
        its weight goes."""
        bias: Tensor | None = module._parameters.pop("bias", None)
        if bias is None:
            bias = module._buffers.pop("bias", None)
        module._parameters.pop("weight", None)
        module.__class__ = cls
        assert isinstance(module, Int4Linear)
        module.hold(weight, bias, dtype, source)
        return module

    def hold(self, weight: Int4Weight, bias: Tensor | None, dtype: torch.dtype, source: str) -> None:
        """Take over a weight; nothing of the module's may have these names yet."""
        self.out_features, self.in_features = weight.q.shape
        self.group_size = weight.group_size
        form = weight.packed()
        self.run = form.run
        self.source = source
        for name in ("packed", "scales", "zeros", "offsets", "perm", "g_idx"):
            self.register_buffer(name, getattr(form, name))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.q.device), persistent=False)

    def logical(self) -> Int4Weight:
        """The weight as numbers."""
        return unpacked(
            self.packed,
            self.scales,
            self.zeros,
            self.offsets,
            self.perm,
            self.g_idx,
            run=self.run,
            group_size=self.group_size,
            in_features=self.in_features,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K], a new tensor."""
        return ops.int4_dequantize(
            self.packed,
            self.scales,
            self.zeros,
            self.offsets,
            self.perm,
            group_size=self.run,
            in_features=self.in_features,
            dtype=dtype,
        )

    # nn.Module looks properties up as it does methods; there is no parameter of this name
    @property
    def weight(self) -> Tensor:
        """The weight as an ordinary [N, K] tensor, made anew each time: for looking at, not for running."""
        return self.dequantize(self.like.dtype)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(f"weight: {_FIXED}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in any module, but for a weight: AttributeError."""
        if name == "weight":
            raise AttributeError(f"weight: {_FIXED}")
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype (under autocast: in autocast's)."""
        x, device = input, input.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        weight = (self.packed, self.scales, self.zeros, self.offsets, self.perm)
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithGradient.apply(x, *weight, bias, self.run, self.in_features)
        return _linear(x, *weight, bias, self.run, self.in_features)

    def requires_grad_(self, requires_grad: bool = True) -> Int4Linear:
        """Raises RuntimeError when a gradient is asked for: there is no parameter to have it."""
        if requires_grad:
            raise RuntimeError(f"requires_grad_: {_FIXED}")
        return self

    def reset_parameters(self) -> None:
        """Raises RuntimeError: there is nothing random here."""
        raise RuntimeError(f"reset_parameters: {_FIXED}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        # A cast takes floating tensors only: as whole numbers scales move, and are not rounded.
        kept = {name: self._buffers[name] for name in ("scales", "offsets")}
        for name, tensor in kept.items():
            if tensor is not None:
                self._buffers[name] = tensor.view(_BITS[tensor.element_size()])
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in kept.items():
                moved = self._buffers[name]
                if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                    self._buffers[name] = moved.view(tensor.dtype)
        return self

    def extra_repr(self) -> str:
        kind = "offsets" if self.offsets is not None else "symmetric" if self.zeros is None else "zeros"
        order = ", act-order" if self.g_idx is not None else ""
        source = f", {self.source}" if self.source else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"4 bits, group_size={self.group_size}, {kind}{order}{source}"
        )


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    run: int,
    inputs: int,
) -> Tensor:
    return ops.int4_linear(x, packed, scales, zeros, offsets, perm, bias, group_size=run, in_features=inputs)


class _WithGradient(torch.autograd.Function):
    """`ops.int4_linear` with the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        *weight, _, ctx.run, ctx.inputs = args
        ctx.save_for_backward(*weight)
        return _linear(x, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w = ops.int4_dequantize(*ctx.saved_tensors, group_size=ctx.run, in_features=ctx.inputs, dtype=grad.dtype)
        return (grad @ w, *(None for _ in range(8)))
