"""Quantised variants of one model, one after the other."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import tiny
import torch

from torch_pagedkv.quant.fixed import fixed_layers

pytest.importorskip("lm_eval")

from torch_pagedkv.evals import comparison, lm_run, models, variants


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


def test_table_of_differences() -> None:
    """The baseline's values in the first row, below it what the variants add to them."""

    def run(name: str, value: float, compared: dict[str, float] | None) -> dict[str, Any]:
        entry = {"value": value, "stderr": 0.04, "aggregation": "mean", "higher_is_better": True}
        found = {} if compared is None else {"offline_piqa": {"acc_norm": compared, "acc": compared}}
        metrics = {"acc": entry, "acc_norm": entry}
        return {"task": "piqa", "variant": name, "metrics": {"offline_piqa": metrics}, "comparison": found}

    less = {"stderr": 0.01, "p": 0.04, "different": 3}
    result = {
        "model": "tiny",
        "baseline": "paged",
        "variants": [{"name": "paged"}, {"name": "awq+group_size=64+calibration=x.txt"}],
        "runs": [run("paged", 0.7, None), run("awq+group_size=64+calibration=x.txt", 0.65, less)],
    }
    assert comparison.differences(result) == [
        ["tiny", "piqa: acc_norm"],
        ["paged", "0.7000 ± 0.0400"],
        ["awq+group_size=64, calibrated", "-0.0500 ± 0.0100"],
    ]
