"""Tiny random models of whole families: every causal-LM class that transformers offers, its config made small.

Nothing is written by hand for a model: a class's default config is walked and its fields are made small by what they
are called (`SIZES`), lists with an entry for each layer are thinned so that every kind of layer stays, and what a few
configs want otherwise stands in `EXCEPTIONS`. Weights are random and large enough that a wrong key, mask, scale or
position changes the logits: no norm is 1, no bias is 0.
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
HIDDEN = 64
LAYERS = 4
HEADS = 4
HEAD_DIM = 16
WINDOW = 8  # shorter than every prompt, so that it matters
POSITIONS = 256
MAX_PARAMETERS = 20_000_000  # a config that is not small after all is refused before its weights are made

#: what a field is made, given its default and the config's defaults
Size = int | Callable[[Any, dict[str, Any]], Any]


class NotBuiltError(Exception):
    """transformers itself cannot build this class from a small config; the message says why."""


def _kv_heads(default: Any, fields: dict[str, Any]) -> int:
    """Grouped stays grouped, one stays one, all stay all."""
    heads = next((v for n in ("num_attention_heads", "n_heads", "n_head") if (v := fields.get(n))), None)
    return 1 if default == 1 else HEADS if default == heads else HEADS // 2


def _head_dim(default: Any, fields: dict[str, Any]) -> int:
    """Twice the usual one where it is not hidden size / heads."""
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return HEAD_DIM if not (hidden and heads) or default * heads == hidden else 2 * HEAD_DIM


def _rotary_head_dim(default: Any, fields: dict[str, Any]) -> Any:
    """Models with a compressed cache call the rotary part head_dim."""
    if "qk_rope_head_dim" in fields:
        return HEAD_DIM if fields["qk_rope_head_dim"] == default else 2 * HEAD_DIM
    return _head_dim(default, fields)


def _eos(default: Any, fields: dict[str, Any]) -> Any:
    return [2] if isinstance(default, list) else 2


#: pattern of a whole field name -> its size; the first that matches counts, and only fields that are numbers (or lists
#: of token ids) are touched
SIZES: tuple[tuple[str, Size], ...] = (
    ("pad_token_id", 0),
    ("bos_token_id", 1),
    ("eos_token_id", _eos),
    (r".*_token_(id|index)|pad_index|unk_index|mask_index", 3),
    (r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (
        r"(attention_)?hidden_size(_global)?|d_model|n_embd|emb(ed)?_dim|dim_model|embedding_size|word_embed_proj_dim",
        HIDDEN,
    ),
    (r"lru_width|embedding_dim|dim_model_base|input_embedding_size|output_embedding_size|router_hidden_size", HIDDEN),
    (r"hidden_size_per_layer_input|moe_latent_size|altup_dim|laurel_rank|adapter_rank", HEAD_DIM),
    (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|n_inner|d_inner|dff|dim_ff|mlp_dim|feed_forward_size", 96),
    (r"((num_hidden|num_(en|de)coder|n|num|encoder|decoder|mtp)_)?layers?", LAYERS),
    (r"(num_|n_|conf_num_)?(encoder_|decoder_|swa_num_)?(attention_)?heads?|n_heads?|index_n_heads", HEADS),
    (r"(num_(global_)?|swa_num_|n_)?(key_value|kv)_heads|kv_n_heads|num_query_groups", _kv_heads),
    ("head_dim", _rotary_head_dim),
    ("global_head_dim", 4 * HEAD_DIM),
    (r"(swa_head_dim|d_head|kv_channels|attention_head_(dim|size)|dim_head|d_kv)", _head_dim),
    (r"(qk_(nope_|rope_)|v_|index_|indexer_)head_dim|rotary_dim", HEAD_DIM),
    (r"(q|kv|o)_lora_rank", 2 * HEAD_DIM),
    (r"(original_)?max_(position_embeddings|seq_len|target_positions|source_positions)|n_positions|n_ctx", POSITIONS),
    (r"model_max_length|context_length", POSITIONS),
    (r"(sliding_|attention_)?window(_size)?|sliding_window_size|attention_chunk_size|local_attention", WINDOW),
    (r"(n_|num_|moe_num_)(routed_|local_)?experts|num_blocks_per_expert", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"(n|moe_num|num)_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r"num_kv_shared_layers", lambda default, fields: min(default, 2)),
    (r"(linear_)?num_(key|value)_heads|linear_num_(key_|value_)?heads", HEADS),
    (r"linear_(key_|value_)?head_dim", HEAD_DIM),
    (r"mamba_d_state|ssm_state_size|state_size", HEAD_DIM),
    (r"mamba_(n_|num_)heads|n_mamba_heads", 2 * HEADS),
    (r"mamba_d_head|mamba_head_?dim", HEAD_DIM),
    (r"image_size|crop_size", 32),
    (r"(max_)?patch_(size|length)", 16),
)
_SIZES = [(re.compile(pattern), size) for pattern, size in SIZES]

_KINDS = ("full_attention", "sliding_attention")

#: switches of attention, norms and layer order, which a class is built with the other way round, too
SWITCHES = re.compile(
    "(attention|qkv|mlp|use|use_qkv|attention_out)_bias|no_bias|use_sliding_window|qk_layernorm|(use_)?qk_norm|qk_ln|alibi|"
    "multi_query|new_decoder_architecture|parallel_attn|use_parallel_residual|scale_attn_(by_inverse_layer_idx|weights)|"
    "rope_interleave|attn_temperature_tuning|use_post_norm|attention_k_eq_v|learned_pos_emb|rotary_value|gating|"
    "apply_residual_connection_post_layernorm|do_layer_norm_before|add_(swa|full)_attention_sink_bias|use_attention_gate|"
    "reorder_and_upcast_attn|scale_embedding|rescale_embeddings|tie_word_embeddings"
)
#: the same, for numbers that are None by default
SWITCHED_ON = {
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
    "clip_qkv": 0.5,
    "logit_scale": 0.5,
    "softmax_scale": 0.3,
}

#: class -> fields of its config (a dot leads into a part of it) that the rules above do not get right
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # the default leaves out what the model needs
    "Dots3NoteForCausalLM": {"per_layer_config": {2: {"kv_lora_rank": HIDDEN}, 3: {"kv_lora_rank": HIDDEN}}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "HunYuanDenseV1ForCausalLM": {"head_dim": HEAD_DIM},
    "HunYuanMoEV1ForCausalLM": {"head_dim": HEAD_DIM},
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]} for kind in _KINDS
        },
        "layer_types": list(_KINDS) * 2,
    },
    # the default has none of what makes the family
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "MllamaForCausalLM": {"cross_attention_layers": [1]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "MinistralForCausalLM": {"head_dim": HEAD_DIM},
    "NemotronForCausalLM": {"num_key_value_heads": HEADS // 2, "head_dim": HEAD_DIM},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 2 * HEAD_DIM,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": VOCABULARY,
        "hc_lowrank": HEAD_DIM,
    },
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4}},
    # one codebook is a language model over its codes
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    # sizes that must agree with each other
    "BambaForCausalLM": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": VOCABULARY, "num_hidden_layers": LAYERS},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 2 * HIDDEN, "mamba_n_heads": 8, "mamba_d_head": 16},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "HrmTextForCausalLM": {"num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 2, "L_bp_cycles": [1]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16},
    "ReformerModelWithLMHead": {
        "axial_pos_embds_dim": (HIDDEN // 2, HIDDEN // 2),
        "axial_pos_shape": (16, 16),
        "is_decoder": True,
    },
    "XLNetLMHeadModel": {"d_head": HEAD_DIM},
    "Zamba2ForCausalLM": {
        "attention_hidden_size": 2 * HIDDEN,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 2 * HEAD_DIM,
        "mamba_headdim": HEAD_DIM,
    },
    "ZambaForCausalLM": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "xLSTMForCausalLM": {"qk_dim_factor": 1.0},
}


#: classes that do not run on token ids alone -> why
NOT_ALONE = {
    "CsmDepthDecoderForCausalLM": "it continues the hidden states of another model (backbone_last_hidden_state)",
    "Gemma4AssistantForCausalLM": "it reads the keys and values of another model (shared_kv_states)",
    "Gemma4UnifiedAssistantForCausalLM": "it reads the keys and values of another model (shared_kv_states)",
}

#: language models that are not public by themselves -> their module
UNEXPORTED = {
    "Kosmos2TextForCausalLM": "kosmos2.modeling_kosmos2",
    "Kosmos2_5TextForCausalLM": "kosmos2_5.modeling_kosmos2_5",
}


def find(name: str) -> type[PreTrainedModel]:
    """The class of a name."""
    module = UNEXPORTED.get(name)
    return getattr(transformers if module is None else importlib.import_module(f"transformers.models.{module}"), name)


def classes() -> list[str]:
    """Names of the causal language models of the installed transformers: its auto class's mapping, and every public
    class that says it is one."""
    names = set(UNEXPORTED)
    names |= {name for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _as_tuple(entry)}
    public = re.compile(r"(?!Auto|TF|Flax)\w+(ForCausalLM|LMHeadModel)")
    return sorted(names | {name for name in dir(transformers) if public.fullmatch(name)})


def _as_tuple(entry: Any) -> tuple[str, ...]:
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def small_config(cls: type[PreTrainedModel], *, switched: bool = False) -> PreTrainedConfig:
    """The class's default config, made small, with `switched` every one of its switches the other way round.

    Raises:
        NotBuiltError: the config class does not take the small values.
    """
    exceptions = EXCEPTIONS.get(cls.__name__, {})
    try:
        config = _shrink(cls.config_class, _defaults(cls.config_class, exceptions), exceptions, switched)
    except Exception as error:
        raise NotBuiltError(f"config: {first_line(error)}") from error
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True  # encoders that can be decoders
    return config


def _defaults(cls: Any, exceptions: dict[str, Any]) -> PreTrainedConfig:
    try:
        return cls()
    except Exception:
        return cls(**{name: value for name, value in exceptions.items() if "." not in name})


def _shrink(cls: Any, default: PreTrainedConfig, exceptions: dict[str, Any], switched: bool) -> PreTrainedConfig:
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    kept = _kept_layers(fields)
    layers = _layers(fields)
    for name, value in fields.items():
        if name in exceptions:
            continue
        if isinstance(value, PreTrainedConfig):
            inner = {n.removeprefix(f"{name}."): v for n, v in exceptions.items() if n.startswith(f"{name}.")}
            small[name] = _shrink(type(value), value, inner, switched)
        elif switched and isinstance(value, bool) and SWITCHES.fullmatch(name):
            small[name] = not value
        elif switched and value is None and name in SWITCHED_ON:
            small[name] = SWITCHED_ON[name]
        elif isinstance(value, (list, tuple)) and kept and len(value) == layers and name != "eos_token_id":
            small[name] = type(value)(_size(name, value[layer], fields) for layer in kept)
        else:
            made = _size(name, value, fields)
            if made is not value:
                small[name] = made
    small |= {name: value for name, value in exceptions.items() if "." not in name}
    per_layer = _per_layer(default, fields, small, kept)
    if per_layer and "per_layer_config" not in exceptions:
        small["per_layer_config"] = per_layer
    return cls(**small)


def _per_layer(
    default: PreTrainedConfig, fields: dict[str, Any], small: dict[str, Any], kept: list[int]
) -> dict[int, dict[str, Any]]:
    """What single layers have otherwise (newer transformers), in the proportion of the default config."""
    spec = vars(default).get("_heterogeneity_spec")
    if spec is None:
        return {}
    made = {}
    for place, layer in enumerate(kept):
        overrides = spec.per_layer_overrides.get(layer)
        if overrides:
            made[place] = {n: max(1, small.get(n, fields[n]) * v // fields[n]) for n, v in overrides.items()}
    return made


def _size(name: str, value: Any, fields: dict[str, Any]) -> Any:
    """The small value of one field, or the very value given."""
    numeric = isinstance(value, int) and not isinstance(value, bool)
    if not numeric and not (name == "eos_token_id" and isinstance(value, list)):
        return value
    for pattern, size in _SIZES:
        if pattern.fullmatch(name):
            return size(value, fields) if callable(size) else size
    return value


def _layers(fields: dict[str, Any]) -> int | None:
    return next((n for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if (n := fields.get(k))), None)


def _kept_layers(fields: dict[str, Any]) -> list[int]:
    """Which layers of the default config stay: of every combination of what the per-layer lists say the first one, then
    the next ones until there are LAYERS; in their order."""
    layers = _layers(fields)
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == layers]
    if not layers or not lists:
        return []
    kinds = [tuple(map(repr, entry)) for entry in zip(*lists)]
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())[:LAYERS]
    chosen += [layer for layer in range(layers) if layer not in chosen][: LAYERS - len(chosen)]
    return sorted(chosen)


def make(name: str, *, switched: bool = False) -> PreTrainedModel:
    """A tiny random model of a class, on the CPU, in float32 and evaluation mode; the same weights every time.

    Args:
        switched: with the switches of its config the other way round.

    Raises:
        NotBuiltError: transformers cannot build it.
    """
    if name in NOT_ALONE:
        raise NotBuiltError(NOT_ALONE[name])
    cls = find(name)
    config = small_config(cls, switched=switched)
    # its sdpa leaves the softcap out in older versions of transformers: that is not what the model computes
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
    except Exception as error:
        raise NotBuiltError(first_line(error)) from error
    if count > MAX_PARAMETERS:
        raise NotBuiltError(f"its small config still has {count / 1e6:.0f} million parameters")
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        model = cls(config).eval()
    except Exception as error:
        raise NotBuiltError(first_line(error)) from error
    randomize(model, seed=zlib.crc32(name.encode()))
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    if model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 1
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Gives every parameter values that matter, in place: matrices of gain 1.5 by their fan-in, embeddings of unit
    size, vectors called bias around 0, other vectors (norms' weights) between 1/2 and 3/2."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameter.copy_(_values(name, parameter, id(parameter) in embeddings, generator))


def _values(name: str, parameter: Tensor, embedding: bool, generator: torch.Generator) -> Tensor:
    shape = parameter.shape
    if parameter.dim() < 2:
        if name.endswith("bias"):
            return 0.2 * torch.randn(shape, generator=generator)
        return 0.5 + torch.rand(shape, generator=generator)
    scale = 1.0 if embedding else 1.5 * min(shape[-1], shape[-2]) ** -0.5
    return scale * torch.randn(shape, generator=generator)


def first_line(error: BaseException) -> str:
    """Kind and message of an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__
