"""`generate()` in all its modes: the stock result, and no block left behind."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, TextStreamer

import torch_pagedkv
from torch_pagedkv.kv.manager import CacheFullError


@pytest.fixture
def pair() -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """A stock model and its patched twin; afterwards no block is in use and the allocator is consistent."""
    stock, patched = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"), block_size=8)
    yield stock, patched
    assert_nothing_leaks(patched)


def assert_nothing_leaks(model: PreTrainedModel) -> None:
    if model.paged_cache.stats()["used"]:
        gc.collect()  # a traceback holds caches in a cycle
    stats = model.paged_cache.stats()
    assert (stats["used"], stats["sequences"]) == (0, 0)
    model.paged_cache.check()
    model.paged_cache.blocks.check()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "two samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "beams with penalty": {"num_beams": 2, "repetition_penalty": 1.3, "length_penalty": 0.5},
    "chunked prefill": {"prefill_chunk_size": 4},
    "long chunks": {"prefill_chunk_size": 16, "num_beams": 2},
    "end of sequence": {"eos_token_id": list(range(2, 96, 3))},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "guidance": {"guidance_scale": 1.5},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("mode", MODES)
def test_mode_equals_stock(pair: tuple[PreTrainedModel, PreTrainedModel], mode: str) -> None:
    inputs, results = tiny.batch(), []
    for model in (*pair, pair[1]):  # the patched one twice: the second time its prompts are cached
        torch.manual_seed(3)
        results.append(tiny.generate(model, inputs, **MODES[mode]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert (pair[1].paged_cache.stats()["hits"] > 0) == (mode not in ("no cache", "static cache"))


@pytest.mark.parametrize("draft", ["prompt lookup", "assistant", "patched assistant"])
def test_drafts_equal_stock(pair: tuple[PreTrainedModel, PreTrainedModel], draft: str) -> None:
    ids = tiny.batch((6,))["input_ids"].repeat(1, 4)  # repeats itself, so that drafts are found
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = tiny.generate(pair[0], inputs, max_new_tokens=40)
    if draft == "prompt lookup":
        options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    else:
        assistant = tiny.make("llama")
        with torch.no_grad():  # right most of the time, not always
            assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.2)
        if draft == "patched assistant":
            torch_pagedkv.patch(assistant, block_size=8)
        options = {"assistant_model": assistant}
    for _ in range(2):
        assert torch.equal(tiny.generate(pair[1], inputs, max_new_tokens=40, **options), want)
    if draft == "patched assistant":
        assert_nothing_leaks(assistant)


def test_all_ones_mask_and_none(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ids = tiny.batch((13, 13))["input_ids"]
    want = pair[0].generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(pair[1].generate(ids, max_new_tokens=20, do_sample=False), want)
    assert torch.equal(
        pair[1].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False), want
    )


def test_shared_prefix_is_computed_once(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Blocks of 8: of a common beginning of 30 tokens 24 are found, in another call and in a row of another length."""
    system = tiny.batch((30,), seed=5)["input_ids"][0]
    tails = [tiny.batch((n,), seed=n)["input_ids"][0] for n in (4, 7)]
    columns: list[int] = []
    pair[1].register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for number, tail in enumerate(tails):
        inputs = {"input_ids": torch.cat([system, tail])[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        columns.clear()
        assert torch.equal(tiny.generate(pair[1], inputs), tiny.generate(pair[0], inputs))
        assert columns[0] == inputs["input_ids"].shape[1] - (24 if number else 0)
    stats = pair[1].paged_cache.stats()
    assert (stats["hits"], stats["hit_tokens"]) == (1, 24)

    rows = [torch.cat([system, tail]) for tail in tails]
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    pads = torch.tensor([[width - len(row)] for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(width) >= pads).long()}
    columns.clear()
    assert torch.equal(tiny.generate(pair[1], inputs), tiny.generate(pair[0], inputs))
    assert columns[0] <= width - 24


def test_prefix_is_not_found_under_other_conditions() -> None:
    inputs = tiny.batch((40,))
    model = torch_pagedkv.patch(tiny.make("llama"), prefix_caching=False)
    for _ in range(2):
        tiny.generate(model, inputs)
    assert model.paged_cache.stats()["cached"] == 0
    torch_pagedkv.unpatch(model)

    torch_pagedkv.patch(model)
    tiny.generate(model, inputs)
    tiny.generate(model, inputs, position_ids=torch.arange(40)[None] + 3)
    assert model.paged_cache.stats()["hits"] == 0
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    want = tiny.generate(copy.deepcopy(torch_pagedkv.unpatch(copy.deepcopy(model))), inputs)
    assert torch.equal(tiny.generate(model, inputs), want), "prefixes of the old weights must not be used"
    assert model.paged_cache.stats()["hits"] == 0


def test_hidden_states_of_a_cached_prompt_are_complete(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    inputs = tiny.batch((40,))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    want = pair[0].generate(**inputs, **options).hidden_states
    for _ in range(2):
        got = pair[1].generate(**inputs, **options).hidden_states
        for g, w in zip(got, want):
            torch.testing.assert_close(g[-1], w[-1], rtol=1e-5, atol=1e-5)


def test_chat_over_turns(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """A returned cache goes on with the whole conversation; without it the answer's blocks are found as a prefix."""
    want, ids = [], tiny.batch((9,))["input_ids"]
    questions = [tiny.batch((5,), seed=n)["input_ids"] for n in range(3)]
    for question in questions:
        ids = pair[0].generate(torch.cat([ids, question], 1), max_new_tokens=12, do_sample=False)
        want.append(ids)
    cache, ids = None, tiny.batch((9,))["input_ids"]
    for question, expected in zip(questions, want):
        output = pair[1].generate(
            torch.cat([ids, question], 1),
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
        )
        cache, ids = output.past_key_values, output.sequences
        assert torch.equal(ids, expected)
        assert isinstance(cache, torch_pagedkv.PagedCache) and cache.get_seq_length() == ids.shape[1] - 1
    before = pair[1].paged_cache.stats()
    assert before["used"] > 0
    del cache, output
    ids = pair[1].generate(torch.cat([ids, questions[0]], 1), max_new_tokens=4, do_sample=False)
    found = pair[1].paged_cache.stats()["hit_tokens"] - before["hit_tokens"]
    assert found >= 8 * ((want[-1].shape[1] - 1) // 8) - 8


def test_padded_chat_over_turns(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """The second turn pads rows in the middle of the conversation."""
    inputs = tiny.batch((4, 9))
    more = tiny.batch((6, 2), seed=8)
    results = []
    for model in pair:
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        first = model.generate(**inputs, **options)
        answer = first.sequences
        ids = torch.cat([answer, more["input_ids"]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long), more["attention_mask"]], 1)
        second = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **options)
        results.append(second.sequences)
    assert torch.equal(results[0], results[1])


def test_caches_of_the_caller(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    inputs = tiny.batch()
    want = tiny.generate(pair[0], inputs)
    dynamic = DynamicCache(config=pair[1].config)
    assert torch.equal(tiny.generate(pair[1], inputs, past_key_values=dynamic), want)
    assert dynamic.get_seq_length() > 0 and pair[1].paged_cache.stats()["peak_used"] == 0
    own = torch_pagedkv.PagedCache(pair[1])
    assert torch.equal(tiny.generate(pair[1], inputs, past_key_values=own), want)
    assert own.get_seq_length() > 0


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_quantised_cache_stays_close(kv_cache_dtype: str) -> None:
    """Errors of logits relative to their norm: int8 keeps 8 bits of each element, fp8 4 (3 stored)."""
    model, inputs = tiny.make("llama"), tiny.batch()
    # mild weights: the error of the cache should show, not a chaotic model's amplification of it
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.25)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = torch.stack(model.generate(**inputs, **options).logits)
    torch_pagedkv.patch(model, kv_cache_dtype=kv_cache_dtype)
    for _ in range(2):
        got = torch.stack(model.generate(**inputs, **options).logits)
        error = float((got - want).norm() / want.norm())
        assert 0 < error < {"int8": 0.01, "fp8": 0.05}[kv_cache_dtype]
    # num_beams copies blocks with their scales
    assert tiny.generate(model, inputs, num_beams=3).shape == (3, 24)
    assert_nothing_leaks(model)
    assert model.paged_cache.stats()["bytes_per_block"] < 2 * 16 * 2 * 2 * 16 * 4 / 2


class Interrupt(LogitsProcessor):
    """Raises in the middle of generation, like Ctrl-C."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left, self.error = after, error

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return scores


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")], ids=lambda e: type(e).__name__)
def test_interrupt_leaks_nothing(
    pair: tuple[PreTrainedModel, PreTrainedModel], after: int, error: BaseException
) -> None:
    inputs = tiny.batch()
    want = tiny.generate(pair[0], inputs)
    with pytest.raises(type(error)):
        tiny.generate(pair[1], inputs, logits_processor=LogitsProcessorList([Interrupt(after, error)]))
    assert_nothing_leaks(pair[1])
    assert torch.equal(tiny.generate(pair[1], inputs), want)


def test_failed_forward_is_not_cached(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Blocks of a prompt whose prefill died in the second layer are not in the prefix index."""
    inputs = tiny.batch((40,))
    want = tiny.generate(pair[0], inputs)

    def fail(*_: object) -> None:
        raise MemoryError("in the middle")

    hook = pair[1].model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        tiny.generate(pair[1], inputs)
    hook.remove()
    assert pair[1].paged_cache.stats()["cached"] == 0
    assert torch.equal(tiny.generate(pair[1], inputs), want)


def test_interrupt_anywhere_in_the_allocator(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """An interrupt between two statements of the bookkeeping can tear it; the model is usable all the same."""
    inputs = tiny.batch()
    want = tiny.generate(pair[0], inputs)
    tiny.generate(pair[1], inputs)
    blocks = pair[1].paged_cache.blocks
    take, count = blocks._take, 0

    def torn() -> int:
        nonlocal count
        count += 1
        block = take()
        if count == 3:
            raise KeyboardInterrupt
        return block

    blocks._take = torn  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pair[1], tiny.batch(seed=77))
    blocks.__dict__.pop("_take", None)
    assert torch.equal(tiny.generate(pair[1], inputs), want)


def test_two_models_do_not_mix() -> None:
    models = [torch_pagedkv.patch(tiny.make(name)) for name in ("llama", "qwen2")]
    stocks = [tiny.make(name) for name in ("llama", "qwen2")]
    inputs = tiny.batch()
    for _ in range(2):
        for patched, stock in zip(models, stocks):
            assert torch.equal(tiny.generate(patched, inputs), tiny.generate(stock, inputs))
    cache = torch_pagedkv.PagedCache(models[0])
    with pytest.raises(ValueError, match="made for another model"):
        models[1](**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="made for another model"):
        models[1].generate(**inputs, past_key_values=cache)


def test_embeddings_instead_of_ids(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    inputs = tiny.batch((12, 7))
    with torch.no_grad():
        embeds = pair[0].get_input_embeddings()(inputs["input_ids"])
    options = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "max_new_tokens": 12}
    want = pair[0].generate(**options, do_sample=False)
    assert torch.equal(pair[1].generate(**options, do_sample=False), want)
    assert pair[1].paged_cache.stats()["queries"] == 0


def test_streamer_scores_and_callbacks(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    inputs = tiny.batch((12,))
    put: list[int] = []

    class Streamer(TextStreamer):
        def __init__(self) -> None: ...
        def put(self, value: torch.Tensor) -> None:
            put.extend(value.flatten().tolist())

        def end(self) -> None:
            put.append(-1)

    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    want = pair[0].generate(**inputs, **options)
    got = pair[1].generate(**inputs, **options, streamer=Streamer())
    assert put == [*want.sequences[0].tolist(), -1]
    for g, w in zip(got.scores, want.scores):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    del got


def test_attention_weights_come_from_the_stock_function() -> None:
    inputs, results = tiny.batch(), []
    for patched in (False, True):
        model = tiny.make("llama", attn_implementation="eager")
        if patched:
            torch_pagedkv.patch(model)
        output = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_attentions=True
        )
        results.append(output)
    assert torch.equal(results[0].sequences, results[1].sequences)
    rows = inputs["attention_mask"].bool()
    for step, (got, want) in enumerate(zip(results[1].attentions, results[0].attentions)):
        for g, w in zip(got, want):
            if step == 0:  # what a pad attends to is anything
                g, w = g.transpose(1, 2)[rows], w.transpose(1, 2)[rows]
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_too_small_a_cache_says_so_before_work() -> None:
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, num_blocks=4)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(CacheFullError, match=r"num_blocks: a prompt of 20 tokens and 24 new.* need 6 blocks of 8.*4"):
        tiny.generate(model, tiny.batch((20,)))
    with pytest.raises(CacheFullError, match=r"full.*Raise num_blocks"):
        tiny.generate(model, tiny.batch((20, 17)), max_new_tokens=4)
    assert not calls
    assert tiny.generate(model, tiny.batch((20,)), max_new_tokens=13).shape == (1, 13)  # exactly 4 blocks
    assert_nothing_leaks(model)


def test_cache_fills_up_in_the_middle() -> None:
    """Two rows that fit at first: the error names the option, and the model goes on."""
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, num_blocks=5)
    with pytest.raises(CacheFullError, match="num_blocks"):
        tiny.generate(model, tiny.batch((14, 14)), max_new_tokens=20)
    assert_nothing_leaks(model)
    assert tiny.generate(model, tiny.batch((14,)), max_new_tokens=20).shape == (1, 20)


def test_prompt_longer_than_the_positions() -> None:
    inputs = tiny.batch((65,))
    for family, options in (("llama", {"max_position_embeddings": 64}), ("gpt2", {"n_positions": 64})):
        model = torch_pagedkv.patch(tiny.make(family, **options))
        with pytest.raises(ValueError, match="65 tokens, the model 64 positions"):
            tiny.generate(model, inputs)
        assert model.paged_cache.stats()["num_blocks"] == 0, "nothing was made"
    stock = tiny.make("llama", max_position_embeddings=64)
    model = torch_pagedkv.patch(tiny.make("llama", max_position_embeddings=64), long_prompts="allow")
    assert torch.equal(tiny.generate(model, inputs), tiny.generate(stock, inputs))


def test_model_moved_to_another_dtype(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    inputs = tiny.batch()
    tiny.generate(pair[1], inputs)
    output = pair[1].generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    pair[1].to(torch.float64).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"moved from torch\.float32.*bfloat16"):
        tiny.generate(pair[1], inputs)
    del output
    gc.collect()
    tiny.generate(pair[1], inputs)
    assert pair[1].paged_cache.stats()["dtype"] == "bfloat16"
    assert pair[1].paged_cache.stats()["hits"] == 0


def test_autocast(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Keys and values arrive in bfloat16 at a float32 cache."""
    inputs = tiny.batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.generate(pair[1], inputs).shape == (3, 24)


def test_inference_mode(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    inputs = tiny.batch()
    want = tiny.generate(pair[0], inputs)
    with torch.inference_mode():
        assert torch.equal(tiny.generate(pair[1], inputs), want)
    assert torch.equal(tiny.generate(pair[1], inputs), want)


def test_generate_inside_generate(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """A logits processor that asks the same model."""
    inputs, answers = tiny.batch((9,)), []

    class Nested(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            answers.append(pair[1].generate(input_ids, max_new_tokens=2, do_sample=False)[:, -2:])
            return scores

    want = tiny.generate(pair[0], inputs, max_new_tokens=6)
    got = tiny.generate(pair[1], inputs, max_new_tokens=6, logits_processor=LogitsProcessorList([Nested()]))
    assert torch.equal(got, want)
    assert [int(answer[0, 0]) for answer in answers] == want[0].tolist()


def test_threads_take_turns(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    batches = [tiny.batch(seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda inputs: tiny.generate(pair[1], inputs), batches))
    for inputs, result in zip(batches, results):
        assert torch.equal(result, tiny.generate(pair[0], inputs))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_random_calls_share_prefixes(family: str) -> None:
    """Random ragged batches cut from a few texts, in random modes, in a pool so small that prefixes are evicted."""
    stock = tiny.make(family)
    patched = torch_pagedkv.patch(tiny.make(family), block_size=8, num_blocks=64)
    generator = random.Random(7)
    texts = [tiny.batch((60,), seed=seed)["input_ids"][0] for seed in range(6)]
    modes: list[dict[str, Any]] = [
        {},
        {"num_beams": 2},
        {"prefill_chunk_size": 7},
        {"num_beams": 2, "num_return_sequences": 2},
    ]
    for _ in range(25):
        rows = [generator.choice(texts)[: generator.randint(1, 60)] for _ in range(generator.randint(1, 3))]
        width = max(map(len, rows))
        pads = torch.tensor([[width - len(row)] for row in rows])
        ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(width) >= pads).long()}
        options = generator.choice(modes) | {"max_new_tokens": generator.randint(1, 12)}
        assert torch.equal(tiny.generate(patched, inputs, **options), tiny.generate(stock, inputs, **options)), options
        assert_nothing_leaks(patched)
    stats = patched.paged_cache.stats()
    assert stats["hits"] > 10 and stats["evictions"] > 0
