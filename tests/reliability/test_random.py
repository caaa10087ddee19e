"""Random calls: families, lengths, pads on either side or anywhere, options, and what earlier calls left cached."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from helpers import assert_nothing_leaks, assert_same, call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from options import FAMILIES, OPTIONS
from torch import Tensor

import torch_pagedkv

#: options that go with any batch of prompts
_ANY_BATCH = [name for name, case in OPTIONS.items() if not {"inputs", "custom_generate", "position_ids"} & case.keys()]
#: a window that ends before the last token of a row leaves a pad nothing to look at: what it gives is anything
_RIGHT_PADS = [family for family in FAMILIES if family not in ("gemma2", "mistral", "gpt_oss")]


@functools.cache
def twins(family: str, block_size: int, bounded: bool) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    """Stock and patched; `bounded`: in so few blocks that prefixes are evicted."""
    eager = {} if family == "bloom" else {"attn_implementation": "eager"}
    options = {"block_size": block_size, "num_blocks": 640 // block_size if bounded else None}
    return tiny.make(family, **eager), torch_pagedkv.patch(tiny.make(family, **eager), **options)


@st.composite
def prompts(draw: Any, family: str) -> dict[str, Tensor]:
    """Rows cut from three texts, so that they begin alike; a mask over them."""
    lengths = draw(st.lists(st.integers(1, 34), min_size=1, max_size=4))
    width = max(lengths)
    kinds = ["left", "left", "holes", *(["right"] if family in _RIGHT_PADS else [])]
    rows, masks = [], []
    kind = draw(st.sampled_from(kinds))
    for length in lengths:
        text = tiny.batch((34,), seed=draw(st.integers(0, 2)))["input_ids"][0]
        pads = torch.zeros(width - length, dtype=torch.long)
        ones = torch.ones(length, dtype=torch.long)
        if kind == "right":
            rows.append(torch.cat([text[:length], pads]))
            masks.append(torch.cat([ones, pads]))
        else:
            if kind == "holes":
                ones = torch.tensor([*draw(st.lists(st.integers(0, 1), min_size=length - 1, max_size=length - 1)), 1])
            rows.append(torch.cat([pads, text[:length]]))
            masks.append(torch.cat([pads, ones]))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


@st.composite
def scenarios(draw: Any) -> tuple[str, int, bool, list[tuple[str, dict[str, Tensor]]]]:
    """A model, and calls of it, one after the other."""
    family = draw(st.sampled_from(FAMILIES))
    calls = st.tuples(st.sampled_from(_ANY_BATCH), prompts(family))
    block_size = draw(st.sampled_from([8, 16, 32]))
    return family, block_size, draw(st.booleans()), draw(st.lists(calls, min_size=1, max_size=3))


def check(scenario: tuple[str, int, bool, list[tuple[str, dict[str, Tensor]]]]) -> None:
    family, block_size, bounded, calls = scenario
    stock, patched = twins(family, block_size, bounded)
    for name, inputs in calls:
        options = OPTIONS[name] | {"max_length": None} | ({"max_new_tokens": 6} if name != "one token" else {})
        want = call(family, stock, options, inputs)
        got = call(family, patched, options, inputs)
        assert_same(got, want, inputs["attention_mask"])
        assert_nothing_leaks(patched)


_SETTINGS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **_SETTINGS)  # type: ignore[arg-type]
@given(scenarios())
def test_random_calls(scenario: Any) -> None:
    check(scenario)


@pytest.mark.slow
@settings(max_examples=400, **_SETTINGS)  # type: ignore[arg-type]
@given(scenarios())
def test_many_random_calls(scenario: Any) -> None:
    check(scenario)


_PAGED_LOOPS = ("llama", "gpt2", "bloom", "mistral")


@st.composite
def chunked(draw: Any) -> tuple[str, Tensor, list[int]]:
    """A mask of any kind, and the widths of the forward passes that it is fed in."""
    batch, columns = draw(st.integers(1, 3)), draw(st.integers(2, 30))
    bits = st.lists(st.integers(0, 1), min_size=columns, max_size=columns)
    mask = torch.tensor([draw(bits) for _ in range(batch)])
    cuts = sorted(draw(st.sets(st.integers(1, columns - 1), max_size=6)))
    widths = [b - a for a, b in zip([0, *cuts], [*cuts, columns])]
    return draw(st.sampled_from(_PAGED_LOOPS)), mask, widths


@settings(max_examples=40, **_SETTINGS)  # type: ignore[arg-type]
@given(chunked())
@torch.no_grad()
def test_random_masks_in_random_chunks(case: tuple[str, Tensor, list[int]]) -> None:
    """Forward passes of the user's own; logits where there are tokens."""
    family, mask, widths = case
    stock, patched = twins(family, 8, False)
    ids = torch.randint(2, tiny.VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(mask.numel()))
    results = []
    for model, cache in ((stock, hf.DynamicCache()), (patched, torch_pagedkv.PagedCache(patched))):
        start, logits = 0, []
        for width in widths:
            end = start + width
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits
            logits.append(out[mask[:, start:end].bool()])
            start = end
        results.append(torch.cat(logits))
    want, got = results
    assert (got - want).norm() <= 1e-5 * want.norm() + 1e-30
    del cache
    assert_nothing_leaks(patched)
