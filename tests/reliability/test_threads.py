"""Several threads, one patched model or two: right results, no leak, no deadlock."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import options as table
import pytest
import tiny
import torch
import transformers as hf
from helpers import assert_nothing_leaks
from torch import Tensor

import torch_pagedkv
from torch_pagedkv.patches import generation

LIMIT = 120  # seconds: a deadlock fails, it does not hang


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Threads change places a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """All jobs at once, each in its thread, started behind a barrier."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait(LIMIT)
        return job()

    pool = ThreadPoolExecutor(len(jobs))
    try:
        return [future.result(LIMIT) for future in [pool.submit(run, job) for job in jobs]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


MODES: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}, table.OPTIONS["prompt lookup"]]


def generate(model: Any, seed: int, mode: dict[str, Any]) -> Tensor:
    settings = table.BASE | tiny.batch((9, 23), seed=seed) | mode
    return model.generate(**(settings | settings.pop("inputs", {})))


def test_threads_in_all_modes_on_two_models() -> None:
    stocks = [tiny.make(name) for name in ("llama", "gpt2")]
    models = [torch_pagedkv.patch(tiny.make(name), block_size=8) for name in ("llama", "gpt2")]
    jobs = [(i, seed, mode) for i in (0, 1) for seed in (1, 2) for mode in MODES]
    want = [generate(stocks[i], seed, mode) for i, seed, mode in jobs]
    polls: list[dict[str, Any]] = []
    done = threading.Event()

    def poll() -> None:
        while not done.wait(0.001):
            polls.extend(model.paged_cache.stats() for model in models)

    monitor = threading.Thread(target=poll)
    monitor.start()
    try:
        for _ in range(2):
            got = together(*(lambda job=job: generate(models[job[0]], *job[1:]) for job in jobs))
            assert all(map(torch.equal, got, want))
    finally:
        done.set()
        monitor.join(LIMIT)
    assert polls and all(s["used"] + s["cached"] + s["free"] == s["num_blocks"] or s["used"] for s in polls)
    for model in models:
        assert_nothing_leaks(model)


def test_errors_in_some_threads() -> None:
    stock, model = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"), block_size=8)
    want = [generate(stock, seed, {}) for seed in range(6)]

    def fail(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        raise KeyError("mine")

    def job(seed: int) -> Tensor | None:
        if seed % 2:
            with pytest.raises(KeyError):
                generate(model, seed, {"stopping_criteria": [fail]})
            return None
        return generate(model, seed, {})

    got = together(*(lambda seed=seed: job(seed) for seed in range(6)))
    assert all(g is None or torch.equal(g, w) for g, w in zip(got, want))
    assert_nothing_leaks(model)


def test_loops_of_the_users_own_in_threads() -> None:
    """Without generate(), nobody orders the forward passes of different caches; the pool grows under way."""
    stock, model = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"), block_size=8)

    def loop(seed: int, cache: Any, one: Any) -> Tensor:
        step = tokens = tiny.batch((17,), seed=seed)["input_ids"]
        with torch.no_grad():
            for _ in range(30):
                step = one(step, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, step], 1)
        return tokens

    want = [loop(seed, hf.DynamicCache(), stock) for seed in range(6)]
    for _ in range(2):
        model.paged_cache.reset()
        jobs = (lambda seed=seed: loop(seed, torch_pagedkv.PagedCache(model), model) for seed in range(6))
        assert all(map(torch.equal, together(*jobs), want))
    assert_nothing_leaks(model)


def test_each_is_the_others_assistant() -> None:
    """Two threads that need the same two models in opposite order."""
    main, assistant = tiny.make("llama"), table.Setting("llama", tiny.make("llama"), {}).assistant()
    want = [generate(model, 3, table.single(20)) for model in (main, assistant)]
    for model in (main, assistant):
        torch_pagedkv.patch(model, block_size=8)
    for _ in range(3):
        got = together(
            lambda: generate(main, 3, {**table.single(20), "assistant_model": assistant}),
            lambda: generate(assistant, 3, {**table.single(20), "assistant_model": main}),
            lambda: generate(main, 3, table.single(20)),
        )
        assert all(map(torch.equal, got, [*want, want[0]]))
    for model in (main, assistant):
        assert_nothing_leaks(model)


def test_processors_that_wait_for_each_other() -> None:
    """The same, made certain: both threads are in the middle of their generate() when they ask for the other's."""
    models = [torch_pagedkv.patch(tiny.make(name), block_size=8) for name in ("llama", "qwen2")]
    stocks = [tiny.make(name) for name in ("llama", "qwen2")]
    want = [generate(stock, 1, {}) for stock in stocks]
    both = threading.Barrier(2)

    class Ask(hf.LogitsProcessor):
        def __init__(self, i: int) -> None:
            self.i, self.met = i, False

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if not self.met:
                both.wait(LIMIT)
                self.met = True
            assert torch.equal(generate(models[self.i], 1, {}), want[self.i])
            return scores

    got = together(
        lambda: generate(models[0], 1, {"logits_processor": [Ask(1)]}),
        lambda: generate(models[1], 1, {"logits_processor": [Ask(0)]}),
    )
    assert all(map(torch.equal, got, want))
    for model in models:
        assert_nothing_leaks(model)
        assert not generation.driver_of(model).calls


def test_caches_dropped_by_other_threads() -> None:
    """Conversations made in one thread, continued in a second, dropped in a third while a fourth generates."""
    stock, model = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"), block_size=8)
    options = {"return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False}
    want = generate(stock, 5, {})
    for _ in range(3):
        held = together(*(lambda s=s: model.generate(**tiny.batch((9,), seed=s), **options) for s in range(4)))
        ids, cache = held[0].sequences, held[0].past_key_values
        expected = stock.generate(ids, max_new_tokens=6, do_sample=False)
        got = together(
            partial(model.generate, ids, past_key_values=cache, max_new_tokens=6, do_sample=False),
            held.clear,
            lambda: generate(model, 5, {}),
        )
        assert torch.equal(got[0], expected) and torch.equal(got[2], want)
        del cache
        assert_nothing_leaks(model)


def test_text_iterator_streamers_in_threads() -> None:
    """The usual server: generate() in a thread for each client, text read here from all of them in turn."""
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8)
    stock, texts = tiny.make("llama"), []
    streamers = [hf.TextIteratorStreamer(table.tokenizer(), timeout=LIMIT) for _ in range(3)]  # type: ignore
    threads = [
        threading.Thread(target=generate, args=(model, 2, {**table.single(9 + i), "streamer": streamer}))
        for i, streamer in enumerate(streamers)
    ]
    for thread in threads:
        thread.start()
    texts = ["".join(streamer) for streamer in reversed(streamers)][::-1]
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    for i, text in enumerate(texts):
        assert text == table.tokenizer().decode(generate(stock, 2, table.single(9 + i))[0])
    assert_nothing_leaks(model)
