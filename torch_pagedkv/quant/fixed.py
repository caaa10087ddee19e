"""`FixedLinear`: what all linear layers with a packed, unchanging weight have in common as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

Operands = tuple[Tensor | None, ...]
Layer = TypeVar("Layer", bound="FixedLinear")


def cast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """An input and a bias as a layer's product takes them: under autocast in autocast's dtype, the bias in x's."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, bias.to(x.dtype) if bias is not None and bias.dtype != x.dtype else bias


class FixedLinear(nn.Linear):
    """y = x W^T + bias for a W that is fixed and packed. The base of `Int4Linear`, `PackedLinear` and others.

    Everything is a buffer: `state_dict`, `.to()`, `copy.deepcopy`, pickling and `torch.compile(fullgraph=True)` work as
    for any module. Changing the module's dtype changes `bias` and what `weight` returns; the floating parts stay as
    they are, so the numbers that the weight stands for never change. The input may require a gradient, the weight has
    none.

    A subclass says what its buffers are (`parts`, `take`) and what is done with them (`product`, `numbers`).

    Attributes:
        in_features, out_features: K and N.
        group_size: inputs that share a scale. run: the same as the op takes it.
        bias: [N] or None.
        rounds: False while activations are not to be rounded (`eight.unrounded`).
        like: empty, in the dtype and on the device that the weight is seen in.
        source: where the weight is from, for people ("GGUF Q4_K").
    """

    #: the buffers that make the weight
    parts: ClassVar[tuple[str, ...]] = ()
    #: those that hold something for each output -> the dimension of the outputs, and those that several layers of one
    #: input must have in common -> what is to be said if they do not: for `joint.Joint`, which others cannot be in
    of_outputs: ClassVar[dict[str, int]] = {}
    of_inputs: ClassVar[dict[str, str]] = {}
    #: what the outputs of a part of it must be a multiple of
    multiple: ClassVar[int] = 1
    #: the op that runs it, and its bits, for people
    op: ClassVar[str] = ""
    bits: ClassVar[str] = ""

    in_features: int
    out_features: int
    group_size: int
    run: int
    source: str
    rounds: bool = True
    like: Tensor
    bias: Any  # [N] or None: a buffer, where nn.Linear has a parameter

    def __init__(
        self, weight: Any, bias: Tensor | None = None, dtype: torch.dtype | None = None, source: str = ""
    ) -> None:
        """
        Args:
            weight: the numbers, in this class's form.
            bias: [N].
            dtype: that `weight` is seen in; default: torch's.
        """
        nn.Module.__init__(self)
        self.hold(weight, bias, dtype or torch.get_default_dtype(), source)

    @classmethod
    def adopt(cls: type[Layer], module: nn.Module, weight: Any, dtype: torch.dtype, source: str = "") -> Layer:
        """Turn a linear layer into one of this class, in place: whoever refers to it or hooked it keeps it. Its bias
        stays, its weight goes."""
        bias: Tensor | None = module._parameters.pop("bias", None)
        if bias is None:
            bias = module._buffers.pop("bias", None)
        module._parameters.pop("weight", None)
        module.__class__ = cls
        assert isinstance(module, cls)
        module.hold(weight, bias, dtype, source)
        return module

    def hold(self, weight: Any, bias: Tensor | None, dtype: torch.dtype, source: str) -> None:
        """Take over a weight; nothing of the module's may have these names yet."""
        self.out_features, self.in_features = weight.shape
        self.group_size = self.run = weight.group_size
        self.source = source
        first, *others = self.take(weight)
        for name, tensor in zip(self.parts, (first, *others), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=first.device), persistent=False)

    def take(self, weight: Any) -> tuple[Any, ...]:
        """The buffers of a weight, in the order of `parts`; the first one is never None."""
        raise NotImplementedError

    def operands(self) -> Operands:
        """What `product` and `numbers` take. (Parts of a `Joint` that are not contiguous are copied.)"""
        tensors = [self._buffers[name] for name in self.parts]
        return tuple(None if t is None else t.contiguous() for t in tensors)

    @classmethod
    def product(cls, x: Tensor, operands: Operands, bias: Tensor | None, run: int, inputs: int) -> Tensor:
        """x W^T + bias."""
        raise NotImplementedError

    @classmethod
    def numbers(cls, operands: Operands, run: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """W as a new tensor [N, K]."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K], a new tensor."""
        return self.numbers(self.operands(), self.run, self.in_features, dtype)

    # nn.Module looks properties up as it does methods; there is no parameter of this name
    @property
    def weight(self) -> Tensor:
        """The weight as an ordinary [N, K] tensor, made anew each time: for looking at, not for running."""
        return self.dequantize(self.like.dtype)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(f"weight: {self._fixed()}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in any module, but for a weight: AttributeError."""
        if name == "weight":
            raise AttributeError(f"weight: {self._fixed()}")
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype (under autocast: in autocast's)."""
        x, bias = cast(input, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithGradient.apply(x, type(self), self.run, self.in_features, bias, *self.operands())
        return self.product(x, self.operands(), bias, self.run, self.in_features)

    def requires_grad_(self: Layer, requires_grad: bool = True) -> Layer:
        """Raises RuntimeError when a gradient is asked for: there is no parameter to have it."""
        if requires_grad:
            raise RuntimeError(f"requires_grad_: {self._fixed()}")
        return self

    def reset_parameters(self) -> None:
        """Raises RuntimeError: there is nothing random here."""
        raise RuntimeError(f"reset_parameters: {self._fixed()}")

    def _fixed(self) -> str:
        return (
            f"the weight of this {type(self).__name__} is {self.bits} and fixed: only its input has a gradient. "
            "Train adapters (LoRA) beside it"
        )

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        # A cast takes floating tensors only: as whole numbers they move, and are not rounded.
        kept = {name: tensor for name in self.parts if (tensor := self._buffers[name]) is not None}
        kept = {name: tensor for name, tensor in kept.items() if tensor.is_floating_point()}
        for name, tensor in kept.items():
            self._buffers[name] = tensor.view(_WHOLE[tensor.element_size()])
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in kept.items():
                moved = self._buffers[name]
                if moved is not None and moved.dtype != tensor.dtype:
                    self._buffers[name] = moved.view(tensor.dtype)
        return self

    def extra_repr(self) -> str:
        described = [f"{self.bits}, group_size={self.group_size}", *self.traits(), *filter(None, [self.source])]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + ", ".join(described)
        )

    def traits(self) -> list[str]:
        """What else is to be said of the weight."""
        return []


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _WithGradient(torch.autograd.Function):
    """The product of a layer with the gradient of its input, as if no activation had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: type[FixedLinear], run: int, inputs: int, bias: Any, *parts: Any) -> Any:
        ctx.layer, ctx.run, ctx.inputs = layer, run, inputs
        ctx.save_for_backward(*parts)
        return layer.product(x, parts, bias, run, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w = ctx.layer.numbers(ctx.saved_tensors, ctx.run, ctx.inputs, grad.dtype)
        return (grad @ w, None, None, None, None, *(None for _ in ctx.saved_tensors))


def fixed_layers(model: nn.Module) -> list[tuple[str, FixedLinear]]:
    """The layers with packed weights of a model, in whatever form, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FixedLinear)]


@torch.no_grad()
def to_linear(module: FixedLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    """Turn such a layer into a plain `nn.Linear` with the weight that it stood for, in place."""
    weight, bias = module.dequantize(dtype or module.like.dtype), module.bias
    for name in list(module._buffers):
        del module._buffers[name]
    module.__class__ = nn.Linear  # type: ignore[assignment]
    module.weight = nn.Parameter(weight)
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(weight.dtype)))
    return module
