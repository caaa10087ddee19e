"""`Joint`: packed layers with the same inputs as one product."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fixed import FixedLinear, cast


class Joint:
    """The weights of several layers of one kind with the same inputs as one: y = [x W0^T + b0, x W1^T + b1, ...].

    Each layer's buffers become views of its part, so that there is one copy of the numbers, and what is written into
    them in place holds for both.

    Attributes:
        parts: the layers.
        buffers: name -> tensor or None, as one layer of all outputs would have them.
        run, in_features: as theirs.
    """

    def __init__(self, parts: Sequence[FixedLinear]) -> None:
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
        self.kind = type(first)
        self.run, self.in_features = first.run, first.in_features
        for name in self.kind.of_inputs:
            self.buffers[name] = first._buffers[name]
        with torch.inference_mode(False):  # they may be written to outside of it
            for name, dim in _joined(self.kind).items():
                tensors = [t for part in self.parts if (t := part._buffers[name]) is not None]
                self.buffers[name] = None
                if tensors:
                    whole = self.buffers[name] = _concatenated(tensors, dim)
                    for part, view in zip(self.parts, whole.split([t.shape[dim] for t in tensors], dim)):
                        part._buffers[name] = view
        for part in self.parts:
            for name in self.kind.of_inputs:
                part._buffers[name] = first._buffers[name]
        self._names = [name for name in self.kind.parts if name in self.buffers]
        self._watch()
        return ""

    def _watch(self) -> None:
        # an optional tensor comes or goes with the others, but for a bias
        self._watched = [
            (part, name, part._buffers[name])
            for part in self.parts
            for name in self.buffers
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
        names = list(self.buffers)
        self.buffers.clear()
        for part in self.parts:
            if isinstance(part, self.kind):
                for name in names:
                    tensor = part._buffers[name]
                    if tensor is not None:
                        part._buffers[name] = tensor.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def obstacle(parts: Sequence[nn.Module]) -> str:
        """Why these cannot be joined, or ""."""
        first, *others = parts
        if not isinstance(first, FixedLinear) or not first.of_outputs:
            return f"{type(first).__name__} cannot be joined"
        if len({id(part) for part in parts}) != len(parts):
            return f"they are not different {first.bits} layers"
        main = first.parts[0]
        for part in others:
            if type(part) is not type(first):
                return f"not all are {first.bits}"
            if part._buffers[main].device != first._buffers[main].device:  # type: ignore[union-attr]
                return "they are on different devices"
            inputs = [(each.in_features, each.run, each._buffers[main].shape[1:]) for each in (part, first)]  # type: ignore[union-attr]
            if inputs[0] != inputs[1]:
                return "they differ in inputs or groups"
            for name in _joined(type(first)):
                dtypes = [None if t is None else t.dtype for t in (part._buffers[name], first._buffers[name])]
                if dtypes[0] != dtypes[1]:
                    return f"they differ in {name}"
            for name, reason in first.of_inputs.items():
                a, b = part._buffers[name], first._buffers[name]
                if a is not b and (a is None or b is None or not torch.equal(a, b)):
                    return reason
        if any(part.out_features % first.multiple for part in parts[:-1]):  # type: ignore[operator]
            return f"their outputs are not multiples of {first.multiple}"
        return ""

    def operands(self) -> tuple[Any, ...]:
        """What the layers' op takes of the weight, and the bias."""
        return (*(self.buffers[name] for name in self._names), self.buffers["bias"])

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] of all parts, without a gradient."""
        *weight, bias = self.operands()
        x, bias = cast(x, bias)
        return self.kind.product(x, tuple(weight), bias, self.run, self.in_features)


def _joined(kind: type[FixedLinear]) -> dict[str, int]:
    """The buffers that hold something for each output -> the dimension of the outputs."""
    return {**kind.of_outputs, "bias": 0}


def _concatenated(tensors: Sequence[Tensor], dim: int) -> Tensor:
    if tensors[0].dtype == torch.float8_e4m3fn:  # what torch.cat has no kernel for everywhere
        return torch.cat([t.view(torch.uint8) for t in tensors], dim).view(torch.float8_e4m3fn)
    return torch.cat(list(tensors), dim)
