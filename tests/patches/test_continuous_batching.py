"""transformers' own continuous batching on a patched model."""

from __future__ import annotations

import pytest
import tiny
import torch

import torch_pagedkv


@pytest.mark.slow
def test_generate_batch_runs_as_in_the_stock_model() -> None:
    stock, model = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"))
    prompts = [tiny.batch((n,), seed=n)["input_ids"][0].tolist() for n in (5, 19, 11)]
    answers = []
    for each in (stock, model):
        each.generation_config.max_new_tokens = 8
        each.generation_config.do_sample = False
        each.generation_config.eos_token_id = -1
        outputs = each.generate_batch(prompts)
        assert len(outputs) == 3
        answers.append(sorted((tuple(one.prompt_ids), tuple(one.generated_tokens)) for one in outputs.values()))
    assert answers[0] == answers[1] and all(len(new) == 8 for _, new in answers[0])
    assert model.config._attn_implementation == "paged_kv"
    inputs = tiny.batch()
    assert torch.equal(tiny.generate(model, inputs), tiny.generate(tiny.make("llama"), inputs))
