"""Every option of `generate()` that a decoder-only model takes: the stock result, and nothing left behind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import options as table
import pytest
import tiny
import torch
import transformers as hf
from helpers import assert_nothing_leaks, assert_same, call, greedy, twins
from options import EXCLUDED_FIELDS, FAMILIES, NOT_IN_STOCK, OPTIONS, REFUSED, UNPAGED


def every_pair(names: Any) -> Iterator[Any]:
    """(option, family): each option with one family in turn is fast, with the others slow."""
    for i, name in enumerate(names):
        for j, family in enumerate(FAMILIES):
            if family in NOT_IN_STOCK.get(name, ()):
                continue
            marks = () if i % len(FAMILIES) == j else pytest.mark.slow
            yield pytest.param(name, family, marks=marks)


@pytest.mark.parametrize(("name", "family"), list(every_pair(OPTIONS)))
def test_option(name: str, family: str) -> None:
    """Cold, then with the prompt's blocks cached; then a plain call shows that no wrong prefix of it was left."""
    stock, patched = twins(family)
    patched.paged_cache.reset()
    options = OPTIONS[name]
    want = call(family, stock, options)
    assert not want.error
    inputs = options.get("inputs", tiny.batch())
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    for _ in range(2):
        assert_same(call(family, patched, options), want, mask)
        assert_nothing_leaks(patched)
    assert (patched.paged_cache.stats()["num_blocks"] > 0) == (name not in UNPAGED)
    if isinstance(inputs, dict) and inputs:
        assert_same(call(family, patched, {"inputs": inputs}), call(family, stock, {"inputs": inputs}))
    assert_nothing_leaks(patched)


@pytest.mark.parametrize(("name", "family"), list(every_pair(REFUSED)))
def test_option_that_stock_refuses(name: str, family: str) -> None:
    stock, patched = twins(family)
    want = call(family, stock, REFUSED[name])
    assert want.error
    assert_same(call(family, patched, REFUSED[name]), want)
    assert_nothing_leaks(patched)
    assert torch.equal(patched.generate(**tiny.batch(), max_new_tokens=12, do_sample=False), greedy(family))


def test_no_option_is_forgotten() -> None:
    """A field that a new transformers adds to GenerationConfig fails here until it has a case or a reason."""
    used = set(table.BASE).union(*OPTIONS.values(), *REFUSED.values())
    fields = set(vars(hf.GenerationConfig()))
    assert not fields - used - set(EXCLUDED_FIELDS), "neither in the table nor excluded"
    assert not used & set(EXCLUDED_FIELDS), "excluded, and in the table"
    parameters = set(inspect.signature(hf.GenerationMixin.generate).parameters) - {"self", "kwargs"}
    negative = {"negative_prompt_ids", "negative_prompt_attention_mask", "inputs"}  # in the table's inputs
    assert not parameters - used - negative
