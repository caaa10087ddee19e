"""Quantised variants of one model, one after the other."""

from __future__ import annotations

import argparse

import pytest
import tiny
import torch

from torch_pagedkv.quant.fixed import fixed_layers

pytest.importorskip("lm_eval")

from torch_pagedkv.evals import lm_run, models, variants


def test_each_variant_is_made_of_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose weights were rounded does not come back: the next one is made of a model loaded anew."""
    loaded = []

    def load(name: str, device: str, dtype: str) -> tuple[torch.nn.Module, None]:
        loaded.append(tiny.make("llama"))
        return loaded[-1], None

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(lm_run, "make_lm", lambda model, *more: model)
    monkeypatch.setattr(lm_run, "check_path", lambda made: {"paged": 1, "dense": 0})
    holder = lm_run.Holder(argparse.Namespace(model="tiny"), "cpu")
    expected = {
        "paged": (1, None),
        "int4": (1, "4-bit"),
        "int8": (2, "8-bit"),
        "fp8": (3, "float8"),
        "kv-int8": (4, None),
    }
    for name, (loads, bits) in expected.items():
        model = holder.get(variants.variant(name, "fp32"))[0]
        assert len(loaded) == loads, name
        assert {layer.bits for _, layer in fixed_layers(model)} == ({bits} if bits else set())
    holder.close()
