"""A real model answers through the paged cache as it does without: SmolLM2-135M-Instruct, real prompts."""

from __future__ import annotations

from typing import Any

import pytest

from torch_pagedkv.evals import accuracy, models

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def folder() -> str:
    """The model's folder, fetched if it is not here yet."""
    try:
        return models.fetch(MODEL)
    except models.ModelUnavailable as problem:
        pytest.skip(f"{MODEL} cannot be fetched: {problem}")


def measure(folder: str, device: str, *options: str) -> dict[str, Any]:
    """The result of the accuracy measurement."""
    return accuracy.run(accuracy.parser().parse_args(["--model", folder, "--device", device, *options]))


def test_same_tokens(folder: str, device: str) -> None:
    """Greedy (the committed result: 28 prompts, 200 tokens), ragged left-padded batches; the same with a prefix hit;
    beams with several returns."""
    result = measure(folder, device, "--checks", "tokens", "--prompts", "12", "--new-tokens", "96")
    assert result["failures"] == []
    greedy, found, beams = result["tokens"]["runs"].values()
    assert greedy["rows"] == found["rows"] == 12 and beams["rows"] == 24
    assert greedy["tokens"] == found["tokens"] == 96
    lengths = result["tokens"]["prompt_tokens"]
    assert min(lengths) < 64 and max(lengths) > 512
    # most whole blocks of the prompts; not all, since a pool on the CPU reuses old prefixes' blocks before it grows
    assert found["hit_tokens"] > sum((n - 1) // 16 * 16 for n in lengths) / 2
    assert beams["score_error"] < 1e-4


def test_logits(folder: str, device: str) -> None:
    """bf16 (and fp16 on the GPU): at most twice stock's own error, in the prefill and in decoding."""
    result = measure(folder, device, "--checks", "logits")
    assert result["failures"] == []
    assert {run["dtype"] for run in result["logits"]["runs"]} == ({"bf16"} if device == "cpu" else {"bf16", "fp16"})


def test_quantised_cache(folder: str, device: str) -> None:
    """An int8 or fp8 cache errs as the format does."""
    result = measure(folder, device, "--checks", "kv")
    assert result["failures"] == []
    assert "int8" in [run["format"] for run in result["kv"]["runs"]]
