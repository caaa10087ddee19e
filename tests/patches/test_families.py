"""Every family: patched tokens and logits are the stock ones, on a left-padded ragged batch."""

from __future__ import annotations

import pytest
import tiny
import torch

import torch_pagedkv


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_tokens_equal_stock(family: str) -> None:
    model, inputs = tiny.make(family), tiny.batch()
    greedy = tiny.generate(model, inputs)
    assert len(greedy.unique()) > 3, "degenerate output shows nothing"
    beams = tiny.generate(model, inputs, num_beams=3, max_new_tokens=8)
    torch_pagedkv.patch(model, block_size=8)
    for _ in range(2):  # the second time with the prompts' blocks cached
        assert torch.equal(tiny.generate(model, inputs), greedy)
        assert torch.equal(tiny.generate(model, inputs, num_beams=3, max_new_tokens=8), beams)
    stats = model.paged_cache.stats()
    assert stats["hits"] > 0 and stats["used"] == 0
    model.paged_cache.blocks.check()


def test_attention_runs_on_pages(family: str) -> None:
    model = torch_pagedkv.patch(tiny.make(family))
    rows = [row for row in torch_pagedkv.report(model).rows if row.kind == "attention"]
    assert len(rows) == model.config.num_hidden_layers
    assert {row.op for row in rows} == {"paged_attention"}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_stock(family: str, side: str) -> None:
    """A direct forward and one more token behind it, without generate()."""
    model, inputs = tiny.make(family), tiny.batch(side=side)
    mask = inputs["attention_mask"]
    token = torch.full((len(mask), 1), 7)
    longer = torch.cat([mask, torch.ones_like(token)], 1)

    def run(cache: object) -> list[torch.Tensor]:
        first = model(**inputs, past_key_values=cache, use_cache=True)
        second = model(token, attention_mask=longer, past_key_values=first.past_key_values, use_cache=True)
        assert second.past_key_values.get_seq_length() == longer.shape[1]
        return [first.logits[mask.bool()], second.logits[:, 0]]

    want = run(None)
    torch_pagedkv.patch(model, block_size=8)
    got = run(torch_pagedkv.PagedCache(model))
    for g, w in zip(got, want):
        assert (g - w).norm() <= 1e-5 * w.norm()
    assert model.paged_cache.stats()["used"] == 0, "a dropped cache gives its blocks back"


def test_long_sequences_leave_the_window(family: str) -> None:
    """Prompts and answers well beyond the sliding window and several blocks long."""
    model, inputs = tiny.make(family), tiny.batch((40, 61))
    want = tiny.generate(model, inputs, max_new_tokens=40)
    torch_pagedkv.patch(model, block_size=16)
    assert torch.equal(tiny.generate(model, inputs, max_new_tokens=40), want)


def test_falcon_alibi_beyond_its_rounding() -> None:
    """Falcon rounds its biases to bfloat16: beyond 256 tokens they are not linear, and its own forward runs."""
    model, inputs = tiny.make("falcon_alibi", max_position_embeddings=1024), tiny.batch((250, 270))
    want = tiny.generate(model, inputs)
    torch_pagedkv.patch(model)
    assert torch.equal(tiny.generate(model, inputs), want)

    wide, short = tiny.make("falcon_alibi", num_attention_heads=16, hidden_size=128), tiny.batch()
    want = tiny.generate(wide, short)  # slopes of 16 heads are no powers of two: never linear
    rows = [row for row in torch_pagedkv.report(torch_pagedkv.patch(wide)).rows if row.kind == "attention"]
    assert all(row.op is None and "rounded" in row.reason for row in rows) and len(rows) == 2
    assert torch.equal(tiny.generate(wide, short), want)
