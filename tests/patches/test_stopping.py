"""The end of generation found out a step late: nobody can tell, but for the waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation import utils as generation_utils
from transformers.generation.streamers import BaseStreamer

import torch_pagedkv
from torch_pagedkv.patches import stopping


class _Event:
    """The host does everything in order: it never waits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    monkeypatch.setattr(torch, "Event", _Event)
    monkeypatch.setattr(stopping, "_DEVICES", {"cpu", "cuda"})


@pytest.fixture
def pair(late: None) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    stock, patched = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"), block_size=8)
    yield stock, patched
    assert patched.paged_cache.stats()["used"] == 0
    patched.paged_cache.blocks.check()


def steps(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of each forward pass that is planned from now on."""
    seen: list[int] = []
    plan = torch_pagedkv.PagedCache.plan
    monkeypatch.setattr(
        torch_pagedkv.PagedCache, "plan", lambda self, b, q, **k: (seen.append(q), plan(self, b, q, **k))[1]
    )
    return seen


def end_after(model: PreTrainedModel, inputs: dict[str, torch.Tensor], n: int) -> list[int]:
    """Tokens of which each row generates its first as its n-th one or earlier."""
    rows = tiny.generate(model, inputs)
    ends = {int(row[n - 1]) for row in rows}
    assert any(int(token) in ends for token in rows[0])
    return sorted(ends)


@pytest.mark.parametrize("lengths", [(9,), (5, 19, 11)])
@pytest.mark.parametrize("n", [1, 2, 3, 11, 24])
def test_tokens_scores_and_cache_are_the_stock_ones(
    pair: tuple[PreTrainedModel, PreTrainedModel], lengths: tuple[int, ...], n: int
) -> None:
    inputs = tiny.batch(lengths)
    options = {
        "eos_token_id": end_after(pair[0], inputs, n),
        "max_new_tokens": 24,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    want, got = (model.generate(**inputs, **options) for model in pair)
    assert torch.equal(got.sequences, want.sequences)
    for g, w in zip((*got.scores, *got.logits), (*want.scores, *want.logits), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    # and it goes on from there
    more = [torch.cat([one.sequences, one.sequences[:, -3:]], 1) for one in (got, want)]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[0])], 1)[:, : more[0].shape[1]]
    turns = [
        model.generate(
            more[0], attention_mask=mask, past_key_values=one.past_key_values, max_new_tokens=5, do_sample=False
        )
        for model, one in zip(pair, (want, got))
    ]
    assert torch.equal(*turns)
    del got, want


def test_one_step_too_many_and_no_more(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, seen = tiny.batch((9,)), steps(pair[1], monkeypatch)
    ends = end_after(pair[0], inputs, 6)
    count = tiny.generate(pair[0], inputs, eos_token_id=ends).shape[1]
    assert tiny.generate(pair[1], inputs, eos_token_id=ends).shape[1] == count < 24
    assert len(seen) == count + 1
    seen.clear()
    tiny.generate(pair[1], inputs, max_new_tokens=7)  # the end is known beforehand
    assert len(seen) == 7


def test_streamers_get_each_token_once(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.put_tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.put_tokens += value.flatten().tolist()

        def end(self) -> None:
            self.put_tokens.append(-1)

    inputs = tiny.batch((9,))
    for options in ({"eos_token_id": end_after(pair[0], inputs, 6)}, {"max_new_tokens": 5}, {"max_new_tokens": 1}):
        streamers = Streamer(), Streamer()
        for model, streamer in zip(pair, streamers):
            tiny.generate(model, inputs, streamer=streamer, **options)
        assert streamers[0].put_tokens == streamers[1].put_tokens


class _Criterion(StoppingCriteria):
    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return torch.full((input_ids.shape[0],), self.calls == 4)


class _Processor(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores


@pytest.mark.parametrize("who", ["criterion", "processor", "allowed tokens", "hook"])
def test_who_looks_on_sees_no_step_too_many(pair: tuple[PreTrainedModel, PreTrainedModel], who: str) -> None:
    inputs, calls = tiny.batch((9, 4)), []
    for model in pair:
        options: dict[str, Any] = {"eos_token_id": end_after(pair[0], inputs, 6)}
        counter, hook, seen = None, None, [0]

        def note(*args: Any, seen: list[int] = seen) -> None:
            seen[0] += 1

        if who == "criterion":
            counter = _Criterion()
            options = {"stopping_criteria": [counter]}
        elif who == "processor":
            counter = _Processor()
            options["logits_processor"] = LogitsProcessorList([counter])
        elif who == "allowed tokens":
            options["prefix_allowed_tokens_fn"] = lambda *args, note=note: (note(), list(range(96)))[1]
        else:
            hook = model.model.layers[1].register_forward_hook(note)
        tokens = tiny.generate(model, inputs, **options)
        calls.append((seen[0] if counter is None else counter.calls, tokens.tolist()))
        if hook is not None:
            hook.remove()
    assert calls[0] == calls[1] and calls[0][0] > 0


def test_no_block_is_claimed_for_the_step_too_many(late: None) -> None:
    """Two rows whose last token fills the cache."""
    stock = tiny.make("llama")
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, num_blocks=4, prefix_caching=False)
    inputs = tiny.batch((14, 14))
    rows = tiny.generate(stock, inputs)
    ends = sorted({int(row[2]) for row in rows})
    assert not any(int(token) in ends for row in rows for token in row[:2])
    want = tiny.generate(stock, inputs, eos_token_id=ends, max_new_tokens=4)
    assert want.shape[1] == 3
    assert torch.equal(tiny.generate(model, inputs, eos_token_id=ends, max_new_tokens=4), want)


def test_other_caches_are_asked_as_before(late: None) -> None:
    cache = DynamicCache()
    check = generation_utils.DeferredStopCheck
    assert check is stopping.DeferredCheck
    for kind in ("cpu", "mps", "cuda"):
        for returned in (True, False):
            ours, theirs = (
                one.is_supported(torch.device(kind), cache, returned, False) for one in (check, check.__base__)
            )
            assert ours == theirs == (kind == "mps")


@pytest.mark.gpu
def test_random_numbers_of_the_step_too_many_are_given_back() -> None:
    stock, model = tiny.make("llama").cuda(), torch_pagedkv.patch(tiny.make("llama").cuda(), num_blocks=64)
    inputs = {name: x.cuda() for name, x in tiny.batch((9, 5)).items()}
    results = []
    for one in (stock, model):
        torch.manual_seed(5)
        rows = [tiny.generate(one, inputs, do_sample=True, eos_token_id=list(range(2, 96, 4))) for _ in range(3)]
        results.append([*map(torch.Tensor.tolist, rows), torch.cuda.default_generators[0].get_offset()])
    assert results[0] == results[1]
    assert any(len(rows[0]) < 24 for rows in results[0][:-1])
