"""Layers in packed forms of their own (GGUF's) as modules, as in `fixed_linears`."""

from __future__ import annotations

import fixed_linears
import torch
from ops.samples_small import Inputs

from torch_pagedkv.quant.packed import Int8Linear, Q4KLinear


def _bias(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(48).to(dtype)


class TestQ4K(fixed_linears.Layers):
    def layer(self, dtype: torch.dtype = torch.float32, bias: bool = True) -> Q4KLinear:
        weight = Q4KLinear.pack(Inputs("cpu").q4k_blocks(48, 1))
        return Q4KLinear(weight, _bias(dtype) if bias else None, dtype, "GGUF Q4_K")


class TestInt8(fixed_linears.Layers):
    def layer(self, dtype: torch.dtype = torch.float32, bias: bool = True) -> Int8Linear:
        torch.manual_seed(1)
        q = torch.randint(-128, 128, (48, 77), dtype=torch.int8)
        weight = Int8Linear.pack(q, torch.rand(3, 48).half() * 0.01, 32)
        return Int8Linear(weight, _bias(dtype) if bias else None, dtype, "GGUF Q8_0")
