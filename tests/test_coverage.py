"""A few diverse classes of the coverage table, measured by the same code, and that the measurement can fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_pagedkv
from torch_pagedkv import PagedCache
from torch_pagedkv.evals import coverage, shrink
from torch_pagedkv.patches import attention, layer, match

#: class -> what it stands for; all are in every supported version of transformers
PAGED = {
    "Qwen3MoeForCausalLM": "experts, qk-norm",
    "GptOssForCausalLM": "sinks, alternating windows",
    "Gemma4ForCausalLM": "layers that share keys and values, head sizes that differ",
    "HrmTextForCausalLM": "one module writes several layers of the cache",
    "MiMoV2FlashForCausalLM": "values smaller than keys",
    "BartForCausalLM": "a decoder with cross-attention that does not run",
    "RobertaForCausalLM": "positions of its own",
    "Kosmos2TextForCausalLM": "positions that count pads",
    "GPTNeoForCausalLM": "a recipe: local layers",
    "GPTJForCausalLM": "a recipe: rotary embedding outside of the usual function",
    "JetMoeForCausalLM": "a recipe: query heads of one key stand apart",
    "DiffLlamaForCausalLM": "a recipe: two softmaxes",
}
REFUSED = {
    "MambaForCausalLM": "state-space",
    "DeepseekV3ForCausalLM": "multi-head latent attention",
    "Lfm2ForCausalLM": "layers of type conv",
    "MllamaForCausalLM": "cross-attention",
    "BlipTextLMHeadModel": "puts the cache that it is given into one of its own",
    "XLMWithLMHeadModel": "attends in both directions",
}


@pytest.mark.parametrize("name", PAGED)
def test_paged_and_equal(name: str) -> None:
    row = coverage.measure(name, switches=False)
    assert (row["result"], row["reason"]) == (coverage.PAGED, "")
    assert row["layers"][0] == row["layers"][1] > 0


def test_switches_the_other_way_round() -> None:
    row = coverage.measure("Qwen2ForCausalLM")
    assert row["result"] == row["switched"] == coverage.PAGED
    config = shrink.make("Qwen2ForCausalLM", switched=True).config
    assert config.use_sliding_window and config.tie_word_embeddings


@pytest.mark.parametrize("name", ["MiMoV2FlashForCausalLM", "DiffLlamaForCausalLM", "Gemma4ForCausalLM"])
@torch.no_grad()
def test_uncommon_shapes_in_a_quantised_cache(name: str) -> None:
    """Padded values, narrowed heads, shared layers: int8 stays near, and beams give their blocks back."""
    model, inputs = shrink.make(name), coverage.batch(coverage.LENGTHS, seed=3)
    want = model(**inputs, use_cache=True).logits
    mask = inputs["attention_mask"].bool()
    torch_pagedkv.patch(model, block_size=coverage.BLOCK_SIZE, kv_cache_dtype="int8")
    got = model(**inputs, past_key_values=torch_pagedkv.PagedCache(model), use_cache=True)
    assert match.relative_error(got.logits[mask], want[mask]) < 0.05
    del got
    model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    assert model.paged_cache.stats()["used"] == 0


def test_partly_paged() -> None:
    row = coverage.measure("Llama4ForCausalLM", switches=False)
    assert row["result"] == coverage.PAGED and row["layers"] == [1, 4]
    assert "chunked attention" in row["reason"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    row = coverage.measure(name, switches=False)
    assert row["result"] == coverage.REFUSED and REFUSED[name] in row["reason"]


def test_not_built() -> None:
    row = coverage.measure("CsmDepthDecoderForCausalLM", switches=False)
    assert row["result"] == coverage.NOT_BUILT and row["reason"]


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 7},
        {"scaling": 0.26},
        {"softcap": 50.0},
        {"sinks": torch.zeros(4)},
    ],
    ids=str,
)
def test_wrong_attention_is_found(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The window of a Mistral is 8 tokens, its scale 1 / 4."""
    attend = attention.attend

    def wrong(kv: Any, query: torch.Tensor, **options: Any) -> torch.Tensor:
        return attend(kv, query, **options | change)

    monkeypatch.setattr(attention, "attend", wrong)
    monkeypatch.setattr(layer, "apply", lambda *_: None)  # it calls the kernel itself
    row = coverage.measure("MistralForCausalLM", switches=False)
    assert row["result"] == coverage.WRONG and "own cache: single, generate" in row["reason"]


def test_wrong_report_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that gathers pages although the report says that it reads them."""
    plan = PagedCache.plan
    monkeypatch.setattr(PagedCache, "plan", lambda *args, **options: plan(*args, **(options | {"dense": True})))
    row = coverage.measure("LlamaForCausalLM", switches=False)
    assert row["result"] == coverage.WRONG and "layers run paged_attention" in row["reason"]


class FakeWorker:
    """Answers what the class's name says."""

    made = 0

    def __init__(self, threads: int) -> None:
        FakeWorker.made += 1
        self.alive = True

    def measure(self, name: str, timeout: float) -> dict[str, Any]:
        self.alive = name != "Dies"
        return {"class": name, "result": coverage.WRONG if name == "Dies" else coverage.PAGED, "reason": "a | b"}

    def stop(self) -> None:
        self.alive = False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    FakeWorker.made = 0
    monkeypatch.setattr(coverage, "Worker", FakeWorker)
    monkeypatch.setattr(shrink, "classes", lambda: ["Good", "Dies", "Good2"])
    yield


def test_command_line(fake: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "coverage.json"
    assert coverage.main(["--out", str(out)]) == 1, "something is WRONG"
    assert FakeWorker.made == 2, "a worker that died is replaced"
    result = json.loads(out.read_text())
    assert result["counts"] == {"paged and equal": 2, "WRONG": 1} | dict.fromkeys(
        (coverage.STOCK, coverage.REFUSED, coverage.NOT_BUILT), 0
    )
    assert "Dies   WRONG" in capsys.readouterr().out
    assert "| Dies | WRONG | a \\| b |" in out.with_suffix(".md").read_text()
    assert coverage.main(["--only", "Good.*", "--json"]) == 0
    assert [row["class"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["Good", "Good2"]
    assert coverage.main(["--only", "Nothing"]) == 2


@pytest.mark.slow
def test_worker_survives_a_hang_and_a_crash() -> None:
    """Real processes: one class in too little time, then one in a new worker."""
    worker = coverage.Worker(1)
    row = worker.measure("LlamaForCausalLM", timeout=0.01)
    assert row["result"] == coverage.NOT_BUILT and "no result after" in row["reason"]
    assert not worker.alive
    worker = coverage.Worker(1)
    worker.process.kill()
    assert "the process" in worker.measure("LlamaForCausalLM", timeout=60)["reason"]
    assert [row["result"] for row in coverage.survey(["LlamaForCausalLM"])] == [coverage.PAGED]


def test_classes_are_those_of_transformers() -> None:
    names = shrink.classes()
    assert {"LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration", "Mistral4ForCausalLM"} < set(names)
    assert len(names) > 150 and not any(name.startswith("Auto") for name in names)


def test_small_models_keep_their_kinds_of_layers() -> None:
    config = shrink.make("GptOssForCausalLM").config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"} and config.sliding_window == shrink.WINDOW
    with pytest.raises(shrink.NotBuiltError, match=r"timm|transformers"):
        shrink.make("Gemma3nForConditionalGeneration")
