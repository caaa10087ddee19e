"""Linear layers whose weight is held in a packed form: the base of those with forms of their own, GGUF's Q4_K and
8 bits. (`linear.Int4Linear` is the one for 4 bits.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in the form of a subclass of `PackedLinear`.

    Attributes:
        layer: that subclass.
        tensors: by its `parts`.
        group_size: inputs that share a scale.
        in_features: K. out_features: N.
    """

    layer: type[PackedLinear]
    tensors: tuple[Tensor, ...]
    group_size: int
    in_features: int
    out_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.out_features, self.in_features

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K], a new tensor."""
        return self.layer.numbers(self.tensors, self.group_size, self.in_features, dtype)


class PackedLinear(nn.Linear):
    """y = x W^T + bias for a W that is fixed and packed. The base of the classes below.

    Everything is a buffer: `state_dict`, `.to()`, `copy.deepcopy`, pickling and `torch.compile(fullgraph=True)` work as
    for any module. Changing the module's dtype changes `bias` and what `weight` returns; the floating parts stay as
    they are, so the numbers that the weight stands for never change. The input may require a gradient, the weight has
    none.

    Attributes:
        in_features, out_features: K and N.
        group_size: inputs that share a scale.
        bias: [N] or None.
        like: empty, in the dtype and on the device that the weight is seen in.
        source: where the weight is from, for people ("GGUF Q4_K").
    """

    #: the buffers that make the weight, in the order of `product`
    parts: ClassVar[tuple[str, ...]] = ()
    #: the op that runs it, and its bits, for people
    op: ClassVar[str] = ""
    bits: ClassVar[str] = ""

    in_features: int
    out_features: int
    group_size: int
    source: str
    like: Tensor
    bias: Any  # [N] or None: a buffer, where nn.Linear has a parameter

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None, source: str = ""
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
    def adopt(cls, module: nn.Module, weight: PackedWeight, dtype: torch.dtype, source: str = "") -> PackedLinear:
        """Turn a linear layer into one of this class, in place: whoever refers to it or hooked it keeps it. Its bias
        stays, its weight goes."""
        bias: Tensor | None = module._parameters.pop("bias", None)
        if bias is None:
            bias = module._buffers.pop("bias", None)
        module._parameters.pop("weight", None)
        module.__class__ = cls
        assert isinstance(module, PackedLinear)
        module.hold(weight, bias, dtype, source)
        return module

    def hold(self, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype, source: str) -> None:
        """Take over a weight; nothing of the module's may have these names yet."""
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        self.source = source
        for name, tensor in zip(self.parts, weight.tensors, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.tensors[0].device), persistent=False)

    @staticmethod
    def product(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None, group: int, inputs: int) -> Tensor:
        """x W^T + bias."""
        raise NotImplementedError

    @staticmethod
    def numbers(parts: tuple[Tensor, ...], group: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """W as a new tensor [N, K]."""
        raise NotImplementedError

    def held(self) -> tuple[Tensor, ...]:
        """The buffers that make the weight."""
        return tuple(getattr(self, name) for name in self.parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K], a new tensor."""
        return self.numbers(self.held(), self.group_size, self.in_features, dtype)

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
        x, device = input, input.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithGradient.apply(x, type(self), self.group_size, self.in_features, bias, *self.held())
        return self.product(x, self.held(), bias, self.group_size, self.in_features)

    def requires_grad_(self, requires_grad: bool = True) -> PackedLinear:
        """Raises RuntimeError when a gradient is asked for: there is no parameter to have it."""
        if requires_grad:
            raise RuntimeError(f"requires_grad_: {self._fixed()}")
        return self

    def reset_parameters(self) -> None:
        """Raises RuntimeError: there is nothing random here."""
        raise RuntimeError(f"reset_parameters: {self._fixed()}")

    def _fixed(self) -> str:
        return (
            f"the weight of a {type(self).__name__} is {self.bits} and fixed: only its input has a gradient. "
            "Train adapters (LoRA) beside it"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # A cast takes floating tensors only: as whole numbers they move, and are not rounded.
        kept = {name: tensor for name in self.parts if (tensor := self._buffers[name]) is not None}
        kept = {name: tensor for name, tensor in kept.items() if tensor.is_floating_point()}
        for name, tensor in kept.items():
            self._buffers[name] = tensor.view(_BITS[tensor.element_size()])
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in kept.items():
                moved = self._buffers[name]
                if moved is not None and moved.dtype != tensor.dtype:
                    self._buffers[name] = moved.view(tensor.dtype)
        return self

    def extra_repr(self) -> str:
        source = f", {self.source}" if self.source else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.bits}, group_size={self.group_size}{source}"
        )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _WithGradient(torch.autograd.Function):
    """The product of a layer with the gradient of its input, as if no activation had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: type[PackedLinear], group: int, inputs: int, bias: Any, *parts: Any) -> Any:
        ctx.layer, ctx.group, ctx.inputs = layer, group, inputs
        ctx.save_for_backward(*parts)
        return layer.product(x, parts, bias, group, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w = ctx.layer.numbers(ctx.saved_tensors, ctx.group, ctx.inputs, grad.dtype)
        return (grad @ w, None, None, None, None, *(None for _ in ctx.saved_tensors))


class Q4KLinear(PackedLinear):
    """GGUF's Q4_K on `ops.q4k_linear`: 4 bits in groups of 32, with scales and minima of 6 bits.

    Attributes:
        packed, scales, mins, d, dmin: of `ops.q4k_linear`.
    """

    parts = ("packed", "scales", "mins", "d", "dmin")
    op = "q4k_linear"
    bits = "4-bit"

    @staticmethod
    def product(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None, group: int, inputs: int) -> Tensor:
        packed, scales, mins, d, dmin = parts
        return ops.q4k_linear(x, packed, scales, mins, d, dmin, bias)

    @staticmethod
    def numbers(parts: tuple[Tensor, ...], group: int, inputs: int, dtype: torch.dtype) -> Tensor:
        packed, scales, mins, d, dmin = parts
        return ops.q4k_dequantize(packed, scales, mins, d, dmin, dtype=dtype)

    @classmethod
    def pack(cls, blocks: Tensor) -> PackedWeight:
        """From the bytes of a file, uint8 [N, 144 K / 256]."""
        n, k = blocks.shape[0], blocks.shape[1] // ops.q4k.BYTES * ops.q4k.SUPER
        return PackedWeight(cls, ops.q4k_repack(blocks), ops.int4.BLOCK, k, n)


class Int8Linear(PackedLinear):
    """8-bit weights, each group of inputs with a scale, on `ops.int8_linear`; activations are not rounded.

    Attributes:
        packed, scales: of `ops.int8_linear`.
    """

    parts = ("packed", "scales")
    op = "int8_linear"
    bits = "8-bit"

    @staticmethod
    def product(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None, group: int, inputs: int) -> Tensor:
        packed, scales = parts
        return ops.int8_linear(x, packed, scales, bias, group_size=group, in_features=inputs)

    @staticmethod
    def numbers(parts: tuple[Tensor, ...], group: int, inputs: int, dtype: torch.dtype) -> Tensor:
        packed, scales = parts
        return ops.int8_dequantize(packed, scales, group_size=group, in_features=inputs, dtype=dtype)

    @classmethod
    def pack(cls, q: Tensor, scales: Tensor, group_size: int) -> PackedWeight:
        """From int8 q [N, K] and floating scales [ceil(K / group_size), N]."""
        return PackedWeight(cls, (ops.int8_repack(q), scales), group_size, q.shape[1], q.shape[0])


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The packed layers of a model (without those of 4 bits that are `Int4Linear`) with their names."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module
