"""`Int4Linear`: an `nn.Linear` whose weight is packed 4-bit numbers, run by `ops.int4_linear`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.int4 import BLOCK
from .fixed import FixedLinear, cast
from .formats import Int4Weight, unpacked


class Int4Linear(FixedLinear):
    """y = x W^T + bias for a packed 4-bit W (`Int4Weight`).

    Attributes:
        packed, scales, zeros, offsets, perm: of `ops.int4_linear`; group_size there is `run`.
        g_idx: int32 [K], the group of each input, where inputs are not in order of their groups.
    """

    parts = ("packed", "scales", "zeros", "offsets", "perm", "g_idx")
    op = "int4_linear"
    bits = "4-bit"

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    perm: Tensor | None
    g_idx: Tensor | None

    def take(self, weight: Int4Weight) -> tuple[Any, ...]:
        form = weight.packed()
        self.run = form.run
        return tuple(getattr(form, name) for name in self.parts)

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

    @classmethod
    def product(cls, x: Tensor, operands: Any, bias: Tensor | None, run: int, inputs: int) -> Tensor:
        packed, scales, zeros, offsets, perm = operands
        return ops.int4_linear(x, packed, scales, zeros, offsets, perm, bias, group_size=run, in_features=inputs)

    @classmethod
    def numbers(cls, operands: Any, run: int, inputs: int, dtype: torch.dtype) -> Tensor:
        return ops.int4_dequantize(*operands, group_size=run, in_features=inputs, dtype=dtype)

    def logical(self) -> Int4Weight:
        """The weight as numbers."""
        return unpacked(
            *self.operands(),
            self.g_idx,
            run=self.run,
            group_size=self.group_size,
            in_features=self.in_features,
        )

    def activated(self, input: Tensor, activation: str) -> Tensor:
        """activation(forward(input)) in one kernel, without a gradient; `activation` is one of `INT4_ACTIVATIONS`."""
        x, bias = cast(input, self.bias)
        return ops.int4_linear(
            x, *self.operands(), bias, group_size=self.run, in_features=self.in_features, activation=activation
        )

    def traits(self) -> list[str]:
        kind = "offsets" if self.offsets is not None else "symmetric" if self.zeros is None else "zeros"
        return [kind, "act-order"] if self.g_idx is not None else [kind]


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
        *weight, bias = self.operands()
        x, bias = cast(x, bias)
        return Int4Linear.product(x, weight, bias, self.run, self.in_features)


#: the buffers of an Int4Linear that hold something for each output -> the dimension of the outputs
_JOINED = {"packed": 0, "scales": 1, "zeros": 1, "offsets": 1, "bias": 0}
