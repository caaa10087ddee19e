"""`Int4Linear`: an `nn.Linear` whose weight is packed 4-bit numbers, run by `ops.int4_linear`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

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
    of_outputs: ClassVar = {"packed": 0, "scales": 1, "zeros": 1, "offsets": 1}
    of_inputs: ClassVar = {"perm": "they take their inputs in different orders (act-order)"}
    multiple = BLOCK
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
