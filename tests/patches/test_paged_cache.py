"""`PagedCache` under direct forward calls: pads anywhere, masks of any kind, and what a `transformers.Cache` can do."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

import torch_pagedkv
from torch_pagedkv.kv.cache import PagedCache, PagedLayer, active_layer
from torch_pagedkv.kv.manager import CacheFullError, CacheManager, PagingRules
from torch_pagedkv.kv.pool import LayerSpec


@pytest.fixture(params=["llama", "mistral", "mpt"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """Full attention, a sliding window and ALiBi over columns: they differ in what a gap between tokens means."""
    stock, patched = tiny.make(request.param), torch_pagedkv.patch(tiny.make(request.param), block_size=8)
    with torch.no_grad():
        yield stock, patched
    # without a gc.collect(): dropping a cache frees it at once
    assert patched.paged_cache.stats()["used"] == 0
    patched.paged_cache.blocks.check()


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(2, tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def run_chunks(model: PreTrainedModel, cache: Cache, mask: Tensor, widths: list[int]) -> Tensor:
    """Logits of a sequence of forward passes over a mask's columns, only where there are tokens."""
    ids, start, logits = ids_of(*mask.shape), 0, []
    for width in widths:
        end = start + width
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits
        logits.append(out[mask[:, start:end].bool()])
        start = end
    return torch.cat(logits)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert (got - want).norm() <= 1e-5 * want.norm()


MASKS = {
    "no pads": ["1111111111111111111111", "1111111111111111111111"],
    "left": ["1111111111111111111111", "0000000111111111111111"],
    "right, then more": ["1111110000001111111111", "1111111111111111111111"],
    "holes": ["1011101110111011101111", "1111111111011111110111"],
    "a row that starts late": ["0000000000000000000011", "1111111111111111111111"],
    "left and right": ["0001111100011111000111", "1111111111111111111111"],
}


@pytest.mark.parametrize("widths", [[22], [12, 10], [12, *[1] * 10], [5, 1, 9, 7], [1] * 22], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_any_mask_in_any_chunks(pair: tuple[PreTrainedModel, PreTrainedModel], name: str, widths: list[int]) -> None:
    mask = torch.tensor([[int(c) for c in row] for row in MASKS[name]])
    want = run_chunks(pair[0], DynamicCache(), mask, widths)
    cache = PagedCache(pair[1])
    assert_close(run_chunks(pair[1], cache, mask, widths), want)
    assert cache.get_seq_length() == 22


def test_tokens_hidden_later(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """A mask that hides what was stored: the step is dense, and later ones that show it again are not."""
    ids = ids_of(2, 20)
    full, part = torch.ones(2, 20, dtype=torch.long), torch.ones(2, 20, dtype=torch.long)
    part[0, 3:9] = 0
    results = []
    for model, cache in ((pair[0], DynamicCache()), (pair[1], PagedCache(pair[1]))):
        logits = [model(ids[:, :12], past_key_values=cache, use_cache=True).logits]
        for end, mask in ((13, part), (14, full), (20, part)):
            start = cache.get_seq_length()
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        results.append(torch.cat(logits, 1))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("pair", ["llama", "mistral"], indirect=True)
def test_masks_of_the_callers_own(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """A 4-D mask: the caller decides about every pair of tokens."""
    ids, mask = ids_of(1, 10), torch.ones(10, 10).tril().bool()[None, None]
    mask[..., 6:, 2:4] = False
    results = []
    for model, cache in ((pair[0], DynamicCache()), (pair[1], PagedCache(pair[1]))):
        first = model(ids[:, :7], attention_mask=mask[..., :7, :7], past_key_values=cache, use_cache=True).logits
        second = model(ids[:, 7:], attention_mask=mask[..., 7:, :], past_key_values=cache, use_cache=True).logits
        results.append(torch.cat([first, second], 1))
    assert_close(results[1], results[0])


def test_errors_of_masks(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, ids = pair[1], ids_of(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    cache = PagedCache(model)
    model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match=r"needs \[2, 8\]: 6 columns in the cache and 2 new ones"):
        model(ids[:, 6:], attention_mask=mask[:, 6:], past_key_values=cache)
    with pytest.raises(ValueError, match="shows a column that was a pad"):
        model(ids[:, 6:], past_key_values=cache)
    with pytest.raises(ValueError, match="the batch has 1 rows, the PagedCache 2"):
        model(ids[:1, 6:], attention_mask=torch.ones(1, 8), past_key_values=filled(model, ids))
    # the errors left it as it was
    logits = model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
    assert logits.shape[:2] == (2, 2) and cache.get_seq_length() == 8


def filled(model: PreTrainedModel, ids: Tensor) -> PagedCache:
    """A cache that holds six columns of `ids`."""
    cache = PagedCache(model)
    model(ids[:, :6], past_key_values=cache)
    return cache


def continue_both(
    pair: tuple[PreTrainedModel, PreTrainedModel], change: Callable[[Cache], Any], rows: int = 2
) -> tuple[Tensor, Tensor]:
    """Fill both caches, change them, go on for three steps; logits of both."""
    results = []
    for model, cache in ((pair[0], DynamicCache()), (pair[1], PagedCache(pair[1]))):
        ids = ids_of(2, 21)
        model(ids, past_key_values=cache, use_cache=True)
        change(cache)
        steps = [model(ids_of(rows, 1, seed=step), past_key_values=cache, use_cache=True).logits for step in range(3)]
        results.append(torch.cat(steps, 1))
    return results[0], results[1]


@pytest.mark.parametrize("tokens", [0, 1, 5, 13])
def test_crop(pair: tuple[PreTrainedModel, PreTrainedModel], tokens: int) -> None:
    if pair[0].config.model_type == "mistral":  # a stock sliding cache may not crop; DynamicCache() is full
        pair[0].config.sliding_window = pair[1].config.sliding_window
    want, got = continue_both(pair, lambda cache: cache.crop(-tokens))
    assert_close(got, want)


def test_reorder_repeat_and_select(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    assert_close(*continue_both(pair, lambda cache: cache.reorder_cache(torch.tensor([1, 1])))[::-1])
    assert_close(*continue_both(pair, lambda cache: cache.batch_repeat_interleave(3), rows=6)[::-1])
    assert_close(*continue_both(pair, lambda cache: cache.batch_select_indices(torch.tensor([1])), rows=1)[::-1])


def test_reset_and_use_again(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    cache, ids = PagedCache(pair[1]), ids_of(2, 9)
    first = pair[1](ids, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0 and pair[1].paged_cache.stats()["used"] == 0
    assert torch.equal(pair[1](ids, past_key_values=cache).logits, first)


def test_copies_share_blocks_until_written(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, ids = pair[1], ids_of(1, 20)
    cache = PagedCache(model)
    model(ids, past_key_values=cache)
    used = model.paged_cache.stats()["used"]
    twin = copy.deepcopy(cache)
    assert model.paged_cache.stats()["used"] == used == 3
    outs = [
        torch.cat([model(ids_of(1, 1, seed=seed + step), past_key_values=c).logits for step in range(3)], 1)
        for seed, c in ((10, cache), (20, twin))
    ]
    assert model.paged_cache.stats()["used"] == used + 1
    for seed, out in zip((10, 20), outs):
        tokens = torch.cat([ids, *(ids_of(1, 1, seed=seed + step) for step in range(3))], 1)
        assert_close(out, pair[0](tokens).logits[:, -3:])


def test_plan_without_forward_is_undone(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, ids = pair[1], ids_of(1, 17)
    cache = PagedCache(model)
    model(ids[:, :16], past_key_values=cache)
    want = model.paged_cache.stats()["used"]
    for _ in range(3):  # looks at the inputs and does nothing with them
        model.prepare_inputs_for_generation(ids[:, 16:], past_key_values=cache, attention_mask=torch.ones(1, 17))
        assert cache.get_seq_length() == 16
    assert model.paged_cache.stats()["used"] == want + 1
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 16:], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 16
    assert_close(model(ids[:, 16:], past_key_values=cache).logits, pair[0](ids).logits[:, -1:])
    assert cache.get_seq_length() == 17


def test_steps_are_dense_only_where_they_must_be(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Named or positional arguments, pads on either side: pages. A gap between tokens: only where distances count."""
    model, dense = pair[1], []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda *_: dense.append(caches[-1].dense))
    left, right, hole = ([[int(c) for c in row], [1] * 4] for row in ("0011", "1100", "1011"))
    caches = []
    for mask in (left, right, hole):
        caches.append(PagedCache(model))
        model(ids_of(2, 4), attention_mask=torch.tensor(mask), past_key_values=caches[-1])
    caches.append(PagedCache(model))
    model(input_ids=ids_of(2, 4), past_key_values=caches[-1])
    model(ids_of(2, 1), past_key_values=caches[-1])
    assert dense == [False, False, True, False, False]

    caches.append(PagedCache(model))
    model(ids_of(2, 4), attention_mask=torch.tensor(right), past_key_values=caches[-1])
    longer = torch.tensor([[*row, 1] for row in right])
    model(ids_of(2, 1), attention_mask=longer, past_key_values=caches[-1])
    assert dense[-1] == (model.config.model_type != "llama")
    hook.remove()


def test_active_layer() -> None:
    model, seen = torch_pagedkv.patch(tiny.make("llama")), []
    cache, ids = PagedCache(model), ids_of(2, 5)
    assert active_layer(cache, 0) is None and active_layer(None, 0) is None and active_layer(DynamicCache(), 0) is None
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(active_layer(cache, 1)))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, attention_mask=torch.ones(2, 1, 5, 10).bool(), past_key_values=cache)
    paged, dense = seen
    assert isinstance(paged, PagedLayer) and dense is None
    assert paged.key_cache.shape[1:] == (16, 2, 16) and paged.step.seq_lens.tolist() == [5, 5]
    assert paged.step.query_start.tolist() == [0, 5] and paged.step.slot_mapping.shape == (10,)


def test_use_outside_of_a_patched_model() -> None:
    model = torch_pagedkv.patch(tiny.make("llama"))
    with pytest.raises(ValueError, match="needs a model patched"):
        PagedCache(tiny.make("llama"))
    with pytest.raises(RuntimeError, match="no step planned"):
        tiny.make("llama")(ids_of(1, 4), past_key_values=PagedCache(model))
    with pytest.raises(RuntimeError, match="no step planned"):
        model.model(ids_of(1, 4), past_key_values=PagedCache(model))
    cache = PagedCache(model)
    model.paged_cache.reset()
    model(ids_of(1, 4), past_key_values=cache)  # it was empty
    model.paged_cache.reset()
    with pytest.raises(RuntimeError, match="was reset or moved"):
        model(ids_of(1, 4), past_key_values=cache)


def test_decode_step_keeps_its_tensors() -> None:
    """Compiled code and CUDA graphs need the decode step at fixed addresses."""
    config = torch_pagedkv.PagedConfig(block_size=8)
    manager = CacheManager(config, [LayerSpec(1, 8)], torch.float32, torch.device("cpu"))
    cache = PagedCache(manager, expected_tokens=100)
    cache.plan(3, 7)
    cache.pending = False
    addresses = set()
    for length in range(8, 100):
        cache.plan(3, 1)
        cache.pending = False
        step = cache.step
        assert step is not None
        addresses.add((step.block_tables.data_ptr(), step.seq_lens.data_ptr(), step.slot_mapping.data_ptr()))
        assert step.seq_lens.tolist() == [length] * 3
        for row, seq in enumerate(cache._seqs):
            assert step.block_tables[row, : len(seq.blocks)].tolist() == seq.blocks
            assert step.slot_mapping[row] == seq.blocks[-1] * 8 + (length - 1) % 8
    assert len(addresses) == 1


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    config = torch_pagedkv.PagedConfig(block_size=8, num_blocks=3)
    manager = CacheManager(config, [LayerSpec(1, 8)], torch.float32, torch.device("cpu"), PagingRules())
    cache = PagedCache(manager)
    cache.plan(2, 8)
    cache.pending = False
    with pytest.raises(CacheFullError, match=r"2 more blocks of 8 tokens are needed, 1 of 3.*num_blocks \(to 4"):
        cache.plan(2, 1)
    assert cache.get_seq_length() == 8 and manager.stats()["used"] == 2
    cache.crop(-1)
    cache.plan(2, 1)
    assert manager.stats()["used"] == 2
    del cache
    gc.collect()
    assert manager.stats()["used"] == 0
    manager.blocks.check()
