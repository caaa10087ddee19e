"""`Int4Linear`: an `nn.Linear` whose weight is packed 4-bit numbers, run by `ops.int4_linear`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.int4 import BLOCK
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
            *self.operands(),
            self.g_idx,
            run=self.run,
            group_size=self.group_size,
            in_features=self.in_features,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K], a new tensor."""
        return ops.int4_dequantize(*self.operands(), group_size=self.run, in_features=self.in_features, dtype=dtype)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """packed, scales, zeros, offsets and perm as the ops take them: those of a part of a `Joint` are copied."""
        zeros, offsets = self.zeros, self.offsets
        return (
            self.packed,
            self.scales.contiguous(),
            None if zeros is None else zeros.contiguous(),
            None if offsets is None else offsets.contiguous(),
            self.perm,
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
        weight = self.operands()
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithGradient.apply(x, *weight, bias, self.run, self.in_features)
        return _linear(x, *weight, bias, self.run, self.in_features)

    def activated(self, input: Tensor, activation: str) -> Tensor:
        """activation(forward(input)) in one kernel, without a gradient; `activation` is one of `INT4_ACTIVATIONS`."""
        device = input.device.type
        x = input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.int4_linear(
            x, *self.operands(), bias, group_size=self.run, in_features=self.in_features, activation=activation
        )

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


class Joint:
    """The weights of several Int4Linear with the same inputs as one: y = [x W0^T + b0, x W1^T + b1, ...].

    Each layer's buffers become views of its part, so that there is one copy of the numbers, and what is written into
    them in place holds for both.

    Attributes:
        parts: the layers.
        buffers: name -> tensor or None, as an Int4Linear of all outputs would have them.
        run, in_features: as theirs.
    """

    def __init__(self, parts: Sequence[Int4Linear]) -> None:
        """
        Raises:
            ValueError: they cannot be joined (`obstacle` says why); nothing has changed.
        """
        self.parts = tuple(parts)
        self.buffers: dict[str, Tensor | None] = {}
        if reason := self.join():
            raise ValueError(f"parts: {reason}")

    @torch.no_grad()
    def join(self) -> str:
        """Joins the layers as they are now, or says why they cannot be (`obstacle`)."""
        self.buffers.clear()
        reason = self.obstacle(self.parts)
        if reason:
            return reason
        first = self.parts[0]
        self.run, self.in_features = first.run, first.in_features
        self.buffers["perm"] = first.perm
        with torch.inference_mode(False):  # they may be written to outside of it
            for name, dim in _JOINED.items():
                tensors = [t for part in self.parts if (t := part._buffers[name]) is not None]
                self.buffers[name] = None
                if tensors:
                    whole = self.buffers[name] = torch.cat(tensors, dim)
                    for part, view in zip(self.parts, whole.split([t.shape[dim] for t in tensors], dim)):
                        part._buffers[name] = view
        for part in self.parts:
            part._buffers["perm"] = first.perm
        self._watch()
        return ""

    def _watch(self) -> None:
        names = (*_JOINED, "perm")
        # an optional tensor comes or goes with the others, but for a bias
        self._watched = [
            (part, name, part._buffers[name])
            for part in self.parts
            for name in names
            if part._buffers[name] is not None or name == "bias"
        ]
        self._places = [(part._buffers, name) for part, name, _ in self._watched]
        self._tensors = [tensor for *_, tensor in self._watched]

    def is_current(self) -> bool:
        """False once a layer's tensors were replaced (`.to()`, for example): then `join` again."""
        if torch.compiler.is_compiling():  # guards are on attributes of modules
            return all(part._buffers.get(name) is tensor for part, name, tensor in self._watched)
        return all(map(operator.is_, [b.get(name) for b, name in self._places], self._tensors))

    def separate(self) -> None:
        """Gives each layer tensors of its own again."""
        self.buffers.clear()
        for part in self.parts:
            if isinstance(part, Int4Linear):
                for name in (*_JOINED, "perm"):
                    tensor = part._buffers[name]
                    if tensor is not None:
                        part._buffers[name] = tensor.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def obstacle(parts: Sequence[nn.Module]) -> str:
        """Why these cannot be joined, or ""."""
        first, *others = parts
        if not isinstance(first, Int4Linear) or len({id(part) for part in parts}) != len(parts):
            return "they are not different 4-bit layers"
        for part in others:
            if not isinstance(part, Int4Linear):
                return "not all are 4-bit"
            if part.packed.device != first.packed.device:
                return "they are on different devices"
            inputs = [(each.in_features, each.run, each.packed.shape[1]) for each in (part, first)]
            if inputs[0] != inputs[1]:
                return "they differ in inputs or groups"
            for name in ("scales", "zeros", "offsets", "bias"):
                dtypes = [None if t is None else t.dtype for t in (part._buffers[name], first._buffers[name])]
                if dtypes[0] != dtypes[1]:
                    return f"they differ in {name}"
            same = part.perm is first.perm
            if part.perm is not None and first.perm is not None:
                same = torch.equal(part.perm, first.perm)
            if not same:
                return "they take their inputs in different orders (act-order)"
        if any(part.out_features % BLOCK for part in parts[:-1]):  # type: ignore[operator]
            return f"their outputs are not multiples of {BLOCK}"
        return ""

    def operands(self) -> tuple[Any, ...]:
        """packed, scales, zeros, offsets, perm and bias as `ops.int4_linear` takes them."""
        whole = self.buffers
        return whole["packed"], whole["scales"], whole["zeros"], whole["offsets"], whole["perm"], whole["bias"]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] of all parts, without a gradient."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        packed, scales, zeros, offsets, perm, bias = self.operands()
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return _linear(x, packed, scales, zeros, offsets, perm, bias, self.run, self.in_features)


#: the buffers of an Int4Linear that hold something for each output -> the dimension of the outputs
_JOINED = {"packed": 0, "scales": 1, "zeros": 1, "offsets": 1, "bias": 0}

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
