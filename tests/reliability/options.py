"""What `generate()` can be asked for, as data: named sets of options, and who cannot take which.

A value that has to be made for the call (a processor with state, an assistant, embeddings of the model's) is a `Made`.
The key "inputs" replaces the ragged batch of prompts.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import tiny
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

import torch_pagedkv

#: rotary embedding and GQA; learned positions; ALiBi; softcap and alternating windows; a window; sinks and experts
FAMILIES = ("llama", "gpt2", "bloom", "gemma2", "mistral", "gpt_oss")
EOS = list(range(2, tiny.VOCABULARY, 7))  # one token of seven ends a sequence: rows finish apart
BASE = {"max_new_tokens": 9, "do_sample": False}


@dataclass
class Setting:
    """One call: the model it is for, its prompts, and what its callbacks saw."""

    family: str
    model: hf.PreTrainedModel
    inputs: dict[str, Tensor]
    seen: list[Any] = field(default_factory=list)

    @property
    def patched(self) -> bool:
        return hasattr(self.model, "paged_cache")

    def assistant(self, *, patched: bool = False, **settings: Any) -> hf.PreTrainedModel:
        """A model of the family that is right most of the time, with settings of its own generation config."""
        model = tiny.make(self.family)
        with torch.no_grad():
            weight = model.get_output_embeddings().weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.3 * weight.std())
        model.generation_config.update(**settings)
        return torch_pagedkv.patch(model, block_size=8) if patched and self.patched else model


@dataclass(frozen=True)
class Made:
    """A value made for each call."""

    by: Callable[[Setting], Any]


def resolve(options: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The options with everything made that is to be made."""
    return {name: value.by(setting) if isinstance(value, Made) else value for name, value in options.items()}


def tokenizer(pairs: int = 32, first: int = 0) -> hf.PreTrainedTokenizerFast:
    """Pad, begin, 62 letters and digits, and `pairs` pairs of neighbours: 64 + `pairs` tokens."""
    letters = string.ascii_letters + string.digits
    tokens = ["<pad>", "<s>", *letters]
    merges = list(pairwise(letters))[first : first + pairs]
    tokens += [a + b for a, b in merges]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="<s>", padding_side="left"
    )


# ---- inputs ----------------------------------------------------------------------------------------------------------


def masked(*rows: str) -> dict[str, Tensor]:
    """Random prompts under a mask written out."""
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    ids = torch.randint(2, tiny.VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(9))
    return {"input_ids": ids, "attention_mask": mask}


def single(length: int = 14, repeats: int = 1) -> dict[str, Tensor]:
    """One prompt without pads, which repeats itself if asked to: prompt lookup finds drafts there."""
    ids = tiny.batch((length,), seed=6)["input_ids"].repeat(1, repeats)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _embeds(with_ids: bool) -> Made:
    def make(setting: Setting) -> dict[str, Tensor]:
        ids = setting.inputs["input_ids"]
        with torch.no_grad():
            embeds = setting.model.get_input_embeddings()(ids).clone()
        mask = {"attention_mask": setting.inputs["attention_mask"]}
        return mask | {"inputs_embeds": embeds} | ({"input_ids": ids} if with_ids else {})

    return Made(make)


def _positions(setting: Setting) -> Tensor:
    """Of every token two more than usual."""
    return (setting.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + 2


def _second_turn(setting: Setting) -> dict[str, Any]:
    """A first answer's cache with a question behind it."""
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    first = setting.model.generate(**setting.inputs, **options)
    question = tiny.batch((6, 6, 6), seed=8)["input_ids"]
    more = torch.ones(3, 5 + 6, dtype=torch.long)
    return {
        "input_ids": torch.cat([first.sequences, question], 1),
        "attention_mask": torch.cat([setting.inputs["attention_mask"], more], 1),
        "past_key_values": first.past_key_values,
    }


def _long_negative(setting: Setting) -> dict[str, Tensor]:
    negative = tiny.batch((4, 9, 7), seed=12)
    return setting.inputs | {
        "negative_prompt_ids": negative["input_ids"],
        "negative_prompt_attention_mask": negative["attention_mask"],
    }


# ---- callbacks -------------------------------------------------------------------------------------------------------


class Favour(hf.LogitsProcessor):
    """Adds to a token that changes with the length."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 5 + input_ids.shape[1] % 40] += 3.0
        return scores


class Enough(hf.StoppingCriteria):
    """Row b has enough after b + 3 tokens."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.arange(len(input_ids)) + 3 <= input_ids.shape[1] - self.prompt


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class Text(hf.TextStreamer):
    """TextStreamer, printing to a list."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__(tokenizer(), skip_prompt=True)  # type: ignore[no-untyped-call]
        self.seen = seen

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.seen.append((text, stream_end))


def _iterator(setting: Setting) -> hf.TextIteratorStreamer:
    streamer = hf.TextIteratorStreamer(tokenizer())  # type: ignore[no-untyped-call]
    setting.seen.append(streamer.text_queue.queue)  # compared as a list when the call is over
    return streamer


def _allowed(row: int, ids: Tensor) -> list[int]:
    return [t for t in range(2, tiny.VOCABULARY) if (t + row + len(ids)) % 3]


def _loop(model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **model_kwargs: Any) -> Tensor:
    """A decoding method of the user's: greedy, written with the model's own helpers."""
    for key in ("stopping_criteria", "streamer", "synced_gpus"):
        model_kwargs.pop(key, None)
    first = True
    while input_ids.shape[1] < generation_config.max_length:
        length = None if first else 1
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=first, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        first = False
    return input_ids


# ---- the options -----------------------------------------------------------------------------------------------------

_SAMPLE = {"do_sample": True, "max_new_tokens": 9}
_ALL = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}
_LOOKUP = {"inputs": single(6, 4), "prompt_lookup_num_tokens": 4, "max_new_tokens": 16}
_DRAFT = {"inputs": single(), "max_new_tokens": 16}
_DICT = {"return_dict_in_generate": True}

OPTIONS: dict[str, dict[str, Any]] = {
    # length and end
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "max_length": {"max_new_tokens": None, "max_length": 26},
    "min_length": {"min_length": 24, "eos_token_id": EOS},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": EOS},
    "eos": {"eos_token_id": EOS, "max_new_tokens": 20},
    "max_time": {"max_time": 1e-9},
    "stop strings": {"stop_strings": ["a", "bc", "Q"], "tokenizer": Made(lambda s: tokenizer()), "max_new_tokens": 20},
    "stopping criteria": {
        "stopping_criteria": Made(
            lambda s: hf.StoppingCriteriaList([Enough(s.inputs["input_ids"].shape[1]), hf.MaxTimeCriteria(3600.0)])
        )
    },
    "stopping criteria that read scores": {
        **_DICT,
        "output_scores": True,
        "stopping_criteria": Made(lambda s: [lambda ids, scores, **_: torch.tensor([len(scores) > 4] * len(ids))]),
    },
    "forced end": {"forced_eos_token_id": [7], "eos_token_id": 7},
    "forced end of beams": {"forced_eos_token_id": 7, "eos_token_id": 7, "num_beams": 2},
    # strategy
    "sampling": {**_SAMPLE},
    "two samples each": {**_SAMPLE, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "beams that end early": {"num_beams": 3, "early_stopping": True, "eos_token_id": EOS},
    "beams that never end early": {"num_beams": 3, "early_stopping": "never", "eos_token_id": EOS},
    "beams of short sequences": {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": EOS},
    "sampled beams": {**_SAMPLE, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS},
    # scores
    "temperature": {**_SAMPLE, "temperature": 0.7},
    "top_k": {**_SAMPLE, "top_k": 7},
    "top_p": {**_SAMPLE, "top_p": 0.8},
    "min_p": {**_SAMPLE, "min_p": 0.1},
    "top_h": {**_SAMPLE, "top_h": 0.5},
    "typical_p": {**_SAMPLE, "typical_p": 0.7},
    "epsilon_cutoff": {**_SAMPLE, "epsilon_cutoff": 0.02},
    "eta_cutoff": {**_SAMPLE, "eta_cutoff": 0.05},
    "all samplers": {**_SAMPLE, "temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1, "max_new_tokens": 16},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[n] for n in range(3, 90, 4)] + [[8, 9]]},
    "sequence_bias": {"sequence_bias": {(n,): 4.0 for n in range(3, 90, 5)} | {(8, 9): -5.0}},
    "suppress_tokens": {"suppress_tokens": list(range(2, 90, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 90, 2))},
    "forced_bos_token_id": {"inputs": masked("1", "1"), "forced_bos_token_id": 11},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (2, 1.5),
        "eos_token_id": EOS[:2],
        "max_new_tokens": 20,
    },
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {**_DICT, "output_scores": True, "renormalize_logits": True, "num_beams": 2},
    "guidance": {"guidance_scale": 1.5},
    "guidance by a negative prompt": {"guidance_scale": 2.0, "inputs": Made(_long_negative)},
    "guidance without a cache": {"guidance_scale": 1.5, "use_cache": False},
    "watermark": {"watermarking_config": Made(lambda s: hf.WatermarkingConfig(bias=3.0, seeding_scheme="selfhash"))},
    "watermark as a dict": {"watermarking_config": {"bias": 2.5, "greenlist_ratio": 0.5}},
    "synthid": {
        **_SAMPLE,
        "watermarking_config": Made(lambda s: hf.SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 5])),
    },
    "logits processor": {"logits_processor": Made(lambda s: hf.LogitsProcessorList([Favour()]))},
    "logits processor of beams": {"logits_processor": Made(lambda s: [Favour()]), "num_beams": 2},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": _allowed},
    "prefix_allowed_tokens_fn of beams": {"prefix_allowed_tokens_fn": _allowed, "num_beams": 2},
    "token_healing": {"token_healing": True, "tokenizer": Made(lambda s: tokenizer())},
    # outputs
    "all outputs": {**_ALL},
    "all outputs of samples": {**_ALL, **_SAMPLE, "top_k": 9},
    "all outputs of beams": {**_ALL, "num_beams": 3, "num_return_sequences": 2},
    "all outputs of chunks": {**_ALL, "prefill_chunk_size": 6},
    "all outputs of drafts": {**_ALL, **_LOOKUP},
    "attentions": {**_DICT, "output_attentions": True},
    "attentions of beams": {**_DICT, "output_attentions": True, "num_beams": 2},
    "attentions of drafts": {**_DICT, "output_attentions": True, **_LOOKUP},
    "scores alone": {**_DICT, "output_scores": True},
    "logits alone": {**_DICT, "output_logits": True, "eos_token_id": EOS},
    # streamers
    "streamer": {"streamer": Made(lambda s: Recorder(s.seen))},
    "text streamer": {"inputs": single(), "streamer": Made(lambda s: Text(s.seen))},
    "text iterator streamer": {"inputs": single(), "streamer": Made(_iterator)},
    "streamer of drafts": {**_LOOKUP, "streamer": Made(lambda s: Recorder(s.seen))},
    # drafts
    "prompt lookup": {**_LOOKUP},
    "prompt lookup of long matches": {**_LOOKUP, "max_matching_ngram_size": 4, "eos_token_id": EOS},
    "prompt lookup, sampled": {**_LOOKUP, "do_sample": True},
    "assistant": {**_DRAFT, "assistant_model": Made(lambda s: s.assistant())},
    "patched assistant": {**_DRAFT, "assistant_model": Made(lambda s: s.assistant(patched=True))},
    "constant drafts": {
        **_DRAFT,
        "assistant_model": Made(
            lambda s: s.assistant(
                patched=True,
                num_assistant_tokens=3,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            )
        ),
    },
    "drafts that stop when unsure": {
        **_DRAFT,
        "assistant_model": Made(
            lambda s: s.assistant(
                patched=True,
                num_assistant_tokens=8,
                num_assistant_tokens_schedule="heuristic_transient",
                assistant_confidence_threshold=0.9,
            )
        ),
    },
    "speculative sampling": {**_DRAFT, "do_sample": True, "assistant_model": Made(lambda s: s.assistant(patched=True))},
    "ensemble": {
        **_DRAFT,
        "assistant_ensemble_weight": 0.5,
        "assistant_model": Made(lambda s: s.assistant(patched=True)),
    },
    "drafts with penalties": {
        **_DRAFT,
        "min_new_tokens": 8,
        "eos_token_id": EOS,
        "repetition_penalty": 1.2,
        "assistant_model": Made(lambda s: s.assistant(patched=True)),
    },
    "early exit": {**_DRAFT, "assistant_early_exit": 1},
    "early exit, sampled": {**_DRAFT, "assistant_early_exit": 1, "do_sample": True},
    "is_assistant": {**_DICT, "is_assistant": True, "output_scores": True},
    # cache
    "no cache": {"use_cache": False},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static"},
    "static cache, wide": {"cache_implementation": "static", "max_cache_len": 64, "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunks of beams": {"prefill_chunk_size": 7, "num_beams": 2},
    "chunks wider than the prompt": {"prefill_chunk_size": 64},
    "the caller's dynamic cache": {
        "past_key_values": Made(lambda s: hf.DynamicCache(config=s.model.config.get_text_config()))
    },
    "the caller's empty cache": {
        "past_key_values": Made(lambda s: torch_pagedkv.PagedCache(s.model) if s.patched else hf.DynamicCache())
    },
    "second turn": {"inputs": Made(_second_turn)},
    "second turn of samples": {"inputs": Made(_second_turn), **_SAMPLE},
    "second turn in chunks": {"inputs": Made(_second_turn), "prefill_chunk_size": 4},
    # prompts
    "one prompt": {"inputs": single()},
    "one token each": {"inputs": masked("1", "1")},
    "no mask": {"inputs": {"input_ids": masked("1" * 12, "1" * 12)["input_ids"]}},
    "pads without a mask": {"inputs": Made(lambda s: {"input_ids": s.inputs["input_ids"]}), "pad_token_id": tiny.PAD},
    "positional ids": {"inputs": Made(lambda s: {"inputs": s.inputs["input_ids"]})},
    "nothing but bos": {"inputs": {}, "bos_token_id": 5},
    "the same prompt thrice": {"inputs": {k: v.repeat(3, 1) for k, v in single(17).items()}},
    # fewer pads than the window: a pad that sees no token at all averages what stands at other pads
    "right pads": {"inputs": tiny.batch((15, 19, 11), side="right")},
    "right pads of beams": {"inputs": tiny.batch((15, 19, 11), side="right"), "num_beams": 2},
    "holes in the mask": {"inputs": masked("0011011110111", "1111110000111", "1111111111111")},
    "a row of one token": {"inputs": masked("0000000000001", "1111111111111")},
    "embeddings": {"inputs": _embeds(with_ids=False)},
    "embeddings and ids": {"inputs": _embeds(with_ids=True)},
    "embeddings of beams": {"inputs": _embeds(with_ids=False), "num_beams": 2},
    "positions": {"position_ids": Made(_positions)},
    "positions of beams": {"position_ids": Made(_positions), "num_beams": 2},
    "all logits kept": {**_DICT, "output_logits": True, "logits_to_keep": 0},
    # the call
    "config object": {"generation_config": Made(lambda s: hf.GenerationConfig(max_new_tokens=7, pad_token_id=0))},
    "config object and options": {
        "generation_config": Made(lambda s: hf.GenerationConfig(num_beams=2, pad_token_id=0, max_new_tokens=3)),
    },
    "custom_generate": {"custom_generate": _loop},
    "synced_gpus": {"synced_gpus": False},
    "continuous_batching_config": {"continuous_batching_config": {}},
    "compile_config": {"compile_config": Made(lambda s: hf.CompileConfig(mode="default")), "disable_compile": True},
}

#: options of which stock transformers says itself that it does not take them: the same error, and nothing leaks
REFUSED: dict[str, dict[str, Any]] = {
    "low_memory": {"num_beams": 2, "low_memory": True},
    "dola_layers": {"dola_layers": "low"},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constraints": {"num_beams": 2, "constraints": ["none"]},
    "force_words_ids": {"num_beams": 2, "force_words_ids": [[5, 6]]},
    "use_mtp": {"use_mtp": True, "inputs": single()},
    "an unknown option": {"no_such_option": 1},
    "an unknown cache": {"cache_implementation": "nothing"},
    "a streamer of beams": {"num_beams": 2, "streamer": Made(lambda s: Recorder(s.seen))},
    "drafts of a batch": {"prompt_lookup_num_tokens": 3},
    "drafts without a cache": {"inputs": single(), "prompt_lookup_num_tokens": 3, "use_cache": False},
    "several greedy answers": {"num_return_sequences": 2},
    "a mask of four dimensions": {"attention_mask": torch.ones(3, 1, 19, 19)},
    "healing without a tokenizer": {"token_healing": True},
    "stop strings without a tokenizer": {"stop_strings": ["a"]},
    "chunks without a cache": {"prefill_chunk_size": 4, "use_cache": False},
    "a cache and the name of one": {
        "cache_implementation": "dynamic",
        "past_key_values": Made(lambda s: torch_pagedkv.PagedCache(s.model) if s.patched else hf.DynamicCache()),
    },
    "no new tokens": {"max_new_tokens": 0},
}

#: option -> families left out, where stock transformers is no measure
NOT_IN_STOCK: dict[str, set[str]] = {
    # these run all layers all the same, and write them to a cache of one layer: IndexError
    "early exit": {"gpt2", "bloom", "gpt_oss"},
    "early exit, sampled": {"gpt2", "bloom", "gpt_oss"},
    # columns are cut from the left by its sliding cache and from the right, by their absolute number, for each draft
    "attentions of drafts": {"gemma2", "mistral", "gpt_oss"},
}

_WINDOWS = {"gemma2", "mistral", "gpt_oss"}
if tuple(map(int, hf.__version__.split(".")[:2])) < (5, 23):  # what newer versions of transformers repaired
    # chunks start at column 0 whatever is in the cache
    NOT_IN_STOCK["second turn in chunks"] = set(FAMILIES)
    # a sliding cache goes back past its window: shapes do not fit, or another prompt is attended to
    NOT_IN_STOCK |= {name: _WINDOWS for name, case in OPTIONS.items() if "assistant_model" in case}
    NOT_IN_STOCK["early exit"] = NOT_IN_STOCK["early exit, sampled"] = {*_WINDOWS, "gpt2", "bloom"}

#: options under which the paged cache is not used: another one was asked for, or none
UNPAGED = {
    "no cache",
    "guidance without a cache",
    "dynamic cache",
    "static cache",
    "static cache, wide",
    "the caller's dynamic cache",
}

#: fields of GenerationConfig that no case sets, and why
EXCLUDED_FIELDS = {
    "_commit_hash": "bookkeeping of the file it was loaded from",
    "_from_model_config": "bookkeeping of the file it was loaded from",
    "transformers_version": "bookkeeping of the file it was loaded from",
    "cache_config": "for the quantized cache, which needs optimum-quanto or hqq",
    "decoder_start_token_id": "encoder-decoder models only",
    "assistant_lookbehind": "set in the tests of assistants with another tokenizer",
    "target_lookbehind": "set in the tests of assistants with another tokenizer",
    "speculation_type": "needs a trained DFlash draft model",
    "num_assistant_tokens": "read from the assistant's own configuration, where the cases set it",
    "num_assistant_tokens_schedule": "read from the assistant's own configuration, where the cases set it",
    "assistant_confidence_threshold": "read from the assistant's own configuration, where the cases set it",
}
