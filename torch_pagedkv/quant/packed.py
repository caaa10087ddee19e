"""Linear layers in packed forms that no checkpoint format here has: GGUF's Q4_K, and 8 bits. (4 bits otherwise:
`linear.Int4Linear`.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from .fixed import FixedLinear


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


class PackedLinear(FixedLinear):
    """A layer whose weight is a `PackedWeight`: the tensors that its op takes. The base of the classes below."""

    def take(self, weight: PackedWeight) -> tuple[Any, ...]:
        return weight.tensors


class Q4KLinear(PackedLinear):
    """GGUF's Q4_K on `ops.q4k_linear`: 4 bits in groups of 32, with scales and minima of 6 bits.

    Attributes:
        packed, scales, mins, d, dmin: of `ops.q4k_linear`.
    """

    parts = ("packed", "scales", "mins", "d", "dmin")
    of_outputs: ClassVar = {"packed": 0, "scales": 1, "mins": 1, "d": 1, "dmin": 1}
    multiple = ops.int4.BLOCK
    op = "q4k_linear"
    bits = "4-bit"

    @classmethod
    def product(cls, x: Tensor, operands: Any, bias: Tensor | None, run: int, inputs: int) -> Tensor:
        packed, scales, mins, d, dmin = operands
        return ops.q4k_linear(x, packed, scales, mins, d, dmin, bias)

    @classmethod
    def numbers(cls, operands: Any, run: int, inputs: int, dtype: torch.dtype) -> Tensor:
        packed, scales, mins, d, dmin = operands
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
    of_outputs: ClassVar = {"packed": 0, "scales": 1}
    multiple = ops.int4.BLOCK
    op = "int8_linear"
    bits = "8-bit"

    packed: Tensor
    scales: Tensor

    @classmethod
    def product(cls, x: Tensor, operands: Any, bias: Tensor | None, run: int, inputs: int) -> Tensor:
        packed, scales = operands
        return ops.int8_linear(x, packed, scales, bias, group_size=run, in_features=inputs)

    @classmethod
    def numbers(cls, operands: Any, run: int, inputs: int, dtype: torch.dtype) -> Tensor:
        packed, scales = operands
        return ops.int8_dequantize(packed, scales, group_size=run, in_features=inputs, dtype=dtype)

    @classmethod
    def pack(cls, q: Tensor, scales: Tensor, group_size: int) -> PackedWeight:
        """From int8 q [N, K] and floating scales [ceil(K / group_size), N]."""
        return PackedWeight(cls, (ops.int8_repack(q), scales), group_size, q.shape[1], q.shape[0])
