"""Tiny random models, one factory a family, and a ragged batch for them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY = 96
PAD = 0

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_OLD = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}


def _llama_like(model: str, **extra: Any) -> Callable[..., hf.PreTrainedModel]:
    def make(**override: Any) -> hf.PreTrainedModel:
        cls = getattr(hf, model)
        return cls(cls.config_class(**(_LLAMA | extra | override)))

    return make


def _old(model: str, **extra: Any) -> Callable[..., hf.PreTrainedModel]:
    def make(**override: Any) -> hf.PreTrainedModel:
        cls = getattr(hf, model)
        return cls(cls.config_class(**(_OLD | extra | override)))

    return make


_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "use_cache": True}
_FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": False}

_FACTORIES: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "llama": _llama_like("LlamaForCausalLM"),
    "mistral": _llama_like("MistralForCausalLM", sliding_window=12),
    "qwen2": _llama_like("Qwen2ForCausalLM"),
    "qwen3": _llama_like("Qwen3ForCausalLM", head_dim=32),
    "phi3": _llama_like("Phi3ForCausalLM"),
    "gemma2": _llama_like(
        "Gemma2ForCausalLM",
        head_dim=32,
        sliding_window=12,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=24,
        attn_implementation="eager",  # older transformers take sdpa, which leaves out the softcap
    ),
    "gemma3": _llama_like("Gemma3ForCausalLM", head_dim=32, sliding_window=12, num_hidden_layers=6),
    "mixtral": _llama_like("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt_oss": _llama_like(
        "GptOssForCausalLM", head_dim=32, sliding_window=12, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt_neox": _llama_like("GPTNeoXForCausalLM", rotary_pct=0.25),
    "gpt2": _old("GPT2LMHeadModel", **_GPT2),
    "falcon_mqa": _old("FalconForCausalLM", **_FALCON, alibi=False, multi_query=True),
    "falcon_gqa": _old("FalconForCausalLM", **_FALCON, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": _old("FalconForCausalLM", **_FALCON, alibi=True, multi_query=False),
    "bloom": _old("BloomForCausalLM", hidden_size=64, n_layer=2, n_head=4),
    "mpt": _old("MptForCausalLM", **_MPT),
}
FAMILIES = tuple(_FACTORIES)


def make(family: str, **override: Any) -> hf.PreTrainedModel:
    """A tiny random model in evaluation mode, float32, the same weights every time.

    The weights are scaled up from transformers' initialisation, else all logits are nearly alike and attention is
    nearly uniform: a wrong mask would not show.
    """
    factory = _FACTORIES[family]
    torch.manual_seed(hash_of(family))
    model = factory(**override).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def hash_of(name: str) -> int:
    """A seed of a name, the same in every process."""
    return sum(ord(c) * (i + 1) for i, c in enumerate(name))


def batch(lengths: tuple[int, ...] = (5, 19, 11), seed: int = 1, side: str = "left") -> dict[str, Tensor]:
    """A padded batch of random prompts: input_ids and attention_mask, [rows, longest]."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), columns), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        pads = slice(0, columns - length) if side == "left" else slice(length, columns)
        ids[row, pads], mask[row, pads] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: hf.PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Greedy unless said otherwise; the generated part only."""
    settings = {"max_new_tokens": 24, "do_sample": False} | options
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
