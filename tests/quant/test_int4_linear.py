"""`Int4Linear` as a module, as in `fixed_linears`, for each kind of 4-bit weight."""

from __future__ import annotations

import fixed_linears
import pytest
import torch
import writers

from torch_pagedkv.quant.formats import FORMATS, Scheme, read
from torch_pagedkv.quant.linear import Int4Linear


def _layer(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> Int4Linear:
    n, k = (13, 77) if kind == "odd" else (48, 160)
    numbers = writers.random_layer(n, k, 64, 1, symmetric=kind == "symmetric", act_order=kind == "act_order")
    scheme = Scheme(64, kind == "symmetric", kind == "act_order")
    weight = read(FORMATS["gptq"], writers.gptq(numbers), n, k, scheme)
    torch.manual_seed(0)
    return Int4Linear(weight, torch.randn(n).to(dtype) if bias else None, dtype, "GPTQ")


@pytest.mark.parametrize("kind", ["zeros", "symmetric", "act_order", "odd"])
class TestLayers(fixed_linears.Layers):
    @pytest.fixture(autouse=True)
    def of_kind(self, kind: str) -> None:
        self.kind = kind

    def layer(self, dtype: torch.dtype = torch.float32, bias: bool = True) -> Int4Linear:
        return _layer(self.kind, dtype, bias)


def test_repr() -> None:
    text = repr(_layer("act_order"))
    assert "in_features=160" in text and "group_size=64, zeros, act-order, GPTQ" in text
