"""What `patch` finds out about a model before it changes anything, and the models it refuses.

Nothing is looked up by model name. Whether attention can run on pages is read from the attention's own forward (does it
hand what `update()` returns to the attention interface, untouched?), and the shapes of the cache from a forward pass
over a few tokens with a stock cache.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from ..config import PagedConfig
from ..kv.manager import PagingRules
from ..kv.pool import CACHE_DTYPES, MODEL_DTYPES, LayerSpec
from . import families, match

#: what attention functions may be given by keyword; anything else could change the result
_KNOWN_KEYWORDS = {
    "dropout",
    "scaling",
    "sliding_window",
    "softcap",
    "s_aux",
    "is_causal",
    "position_ids",
    "attention_mask",
}
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_PROBE_TOKENS = 4
#: config fields that stand for another kind of attention -> what it is
_FOREIGN_FIELDS = {
    "kv_lora_rank": "multi-head latent attention (it caches a compressed state, not keys and values)",
    "linear_num_value_heads": "linear attention",
    "ssm_cfg": "a state-space model",
    "state_size": "a state-space model",
    "mamba_d_state": "state-space layers",
    "add_cross_attention": "cross-attention",
}


class UnsupportedModelError(ValueError):
    """The model cannot be patched; it is as it was. The message names the reason."""


@dataclass(frozen=True)
class AttentionForm:
    """How an attention class uses the cache, from its forward's syntax tree.

    Attributes:
        keywords: names given to the attention function by keyword.
        obstacle: why it cannot run on pages, or None.
    """

    keywords: frozenset[str]
    obstacle: str | None


@dataclass(frozen=True)
class ModelFacts:
    """What `examine` found.

    Attributes:
        attention: qualified name -> attention module, one for each layer of the cache.
        forms: of their classes.
        specs: shape of each layer's keys and values.
        dtype, device: of the keys and values.
        rules: where pages cannot be attended in.
        stock: name of the model's attention implementation.
        dense_reasons: layer -> why it gets dense keys and values.
        max_prompt: positions of the model, if a prompt must not be longer.
        has_prefixes: a token's keys and values depend on the tokens before it alone.
    """

    attention: dict[str, nn.Module]
    forms: frozenset[AttentionForm]
    specs: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device
    rules: PagingRules
    stock: str
    dense_reasons: dict[int, str]
    max_prompt: int | None
    has_prefixes: bool


def text_config(model: PreTrainedModel) -> object:
    """The config of the decoder that generates text (the model's own, unless it is a composite one)."""
    return model.config.get_text_config(decoder=True)


def is_update(node: ast.AST) -> bool:
    """True for a call `<cache>.update(...)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"


def attention_form(cls: type) -> AttentionForm | None:
    """The form of an attention class, or None if its forward updates no cache."""
    return _form_of(cls.forward)  # type: ignore[attr-defined]


@functools.cache
def _form_of(forward: Callable[..., Any]) -> AttentionForm | None:
    tree = match.function_tree(forward)
    if tree is None or not any(is_update(node) for node in ast.walk(tree)):
        return None
    updates = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and is_update(n.value)]
    if len(updates) != 1 or not isinstance(updates[0].targets[0], ast.Tuple):
        return AttentionForm(frozenset(), "it does not call update() once, for keys and values")
    names = [element.id for element in updates[0].targets[0].elts if isinstance(element, ast.Name)]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _is_interface(n)]
    if not calls or len(names) != 2:
        return AttentionForm(frozenset(), "its attention does not go through the attention interface")
    keywords = frozenset(k.arg for call in calls for k in call.keywords if k.arg is not None)
    reads = [n for n in _after(tree, updates[0]) if isinstance(n, ast.Name) and n.id in names]
    given = [a for call in calls for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Name)]
    branch = _eager_only(tree)
    if any(read not in given and read not in branch for read in reads):
        return AttentionForm(keywords, "it changes or keeps keys and values after update()")
    unknown = sorted(keywords - _KNOWN_KEYWORDS)
    if unknown:
        return AttentionForm(keywords, f"it gives the attention function {', '.join(unknown)}")
    return AttentionForm(keywords, None)


def _is_interface(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("attention_interface", "attn_interface")


def _after(tree: ast.FunctionDef, statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes that stand behind a statement in the source."""
    end = (statement.end_lineno or 0, statement.end_col_offset or 0)
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and (node.lineno, node.col_offset) >= end:
            yield node


def _eager_only(tree: ast.FunctionDef) -> list[ast.AST]:
    """Nodes that run only under the implementation named "eager", which a patched model does not have (GPT-2)."""
    return [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If)
        and any(isinstance(n, ast.Name) and n.id == "using_eager" for n in ast.walk(branch.test))
        for statement in branch.body
        for node in ast.walk(statement)
    ]


def check_model(model: object, config: PagedConfig) -> PreTrainedModel:
    """Refuses what is no causal language model of transformers on one device in one floating dtype.

    Raises:
        TypeError: not a model of transformers.
        UnsupportedModelError: it cannot be patched.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, needs a causal language model of transformers")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only models can be patched")
    if not isinstance(model, GenerationMixin) or not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} is not a causal language model: it has no generate() or no language head")
    devices = sorted({str(p.device) for p in model.parameters()})
    if "meta" in devices:
        raise UnsupportedModelError(f"{name} has parameters on the meta device: load its weights first")
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"{name} has parameters on {', '.join(devices) or 'no device'}; it needs to be on one"
        )
    if torch.device(devices[0]).type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"{name} is on {devices[0]}; there are kernels for cpu and cuda")
    if model.dtype not in MODEL_DTYPES:
        raise UnsupportedModelError(f"{name} is {model.dtype}; supported are float32, float16 and bfloat16")
    _check_cache_dtype(config, torch.device(devices[0]))
    return model


def _check_cache_dtype(config: PagedConfig, device: torch.device) -> None:
    if config.kv_cache_dtype is None:
        return
    try:
        torch.empty(1, device=device).to(CACHE_DTYPES[config.kv_cache_dtype])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"kv_cache_dtype: {config.kv_cache_dtype!r} is not available on {device}: {error}") from error


def probe(model: PreTrainedModel) -> DynamicCache:
    """Runs a few tokens through the model with a stock cache: its shapes are those of the model's attention, whatever
    sharding or quantisation did to the projections. Random state and training mode are left as they were."""
    cache = DynamicCache()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(_PROBE_TOKENS, device=model.device) % vocabulary)[None]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def examine(model: PreTrainedModel, config: PagedConfig) -> ModelFacts:
    """Everything `patch` needs to know about attention and cache.

    Raises:
        UnsupportedModelError: the model's attention cannot run on a paged cache; the message says why.
    """
    name = type(model).__name__
    settings = text_config(model)
    for field, meaning in _FOREIGN_FIELDS.items():
        if getattr(settings, field, None):
            raise UnsupportedModelError(f"{name} has {meaning} (config.{field})")
    if getattr(settings, "is_causal", True) is False or getattr(settings, "use_bidirectional_attention", False) is True:
        raise UnsupportedModelError(f"{name} attends in both directions")

    attention = _attention_modules(model)
    layer_types = getattr(settings, "layer_types", None) or []
    foreign = sorted(set(layer_types) - _KNOWN_LAYER_TYPES)
    if foreign:
        raise UnsupportedModelError(f"{name} has layers of type {', '.join(foreign)}")
    specs, dtype = _shapes(model, attention)
    dense = dict(_dense_layers(settings, attention, layer_types))
    recipes = [families.RECIPES.get(type(module).__name__) for module in attention.values()]
    recipe = recipes[0]
    windows = "sliding_attention" in layer_types or bool(getattr(settings, "sliding_window", None))
    module = next(iter(attention.values()))
    rules = PagingRules(
        dense_layers=frozenset(dense),
        gaps_dense=windows or (recipe is not None and recipe.counts_columns),
        dense_after=recipe.dense_after(module) if recipe is not None else None,
        real_masks=recipe is not None,
        pads_shift_positions=recipe is None and not _accepts(model, "position_ids"),
    )
    return ModelFacts(
        attention=attention,
        forms=frozenset(form for module in attention.values() if (form := attention_form(type(module)))),
        specs=specs,
        dtype=dtype,
        device=model.device,
        rules=rules,
        stock=settings._attn_implementation or "eager",  # type: ignore[attr-defined]
        dense_reasons=dense,
        max_prompt=_max_prompt(model, settings) if config.long_prompts == "error" else None,
        has_prefixes=_rope_type(settings) not in ("dynamic", "longrope"),
    )


def _accepts(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that update the cache, in order of their layer.

    Raises:
        UnsupportedModelError: there are none, or one of them cannot run on pages.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        form = attention_form(type(module)) if isinstance(getattr(module, "layer_idx", None), int) else None
        recipe = families.RECIPES.get(type(module).__name__)
        if form is None and recipe is None:
            continue
        if recipe is None and form is not None and form.obstacle is not None:
            raise UnsupportedModelError(f"{type(model).__name__}: {name} ({type(module).__name__}): {form.obstacle}")
        if recipe is not None and (why := recipe.refuses(module)):
            raise UnsupportedModelError(f"{type(model).__name__}: {name} ({type(module).__name__}): {why}")
        found[name] = module
    layers = [_layer(module) for module in found.values()]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention with a layer_idx that updates a key-value cache: a state-space "
            "model, or one from before transformers' caches"
        )
    if sorted(layers) != list(range(len(layers))):
        raise UnsupportedModelError(f"{type(model).__name__}: the attention layers are numbered {sorted(layers)}")
    return dict(sorted(found.items(), key=lambda item: _layer(item[1])))


def _layer(module: nn.Module) -> int:
    return int(vars(module)["layer_idx"])


def _shapes(model: PreTrainedModel, attention: dict[str, nn.Module]) -> tuple[tuple[LayerSpec, ...], torch.dtype]:
    name = type(model).__name__
    cache = probe(model)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if len(layers) != len(attention) or any(not isinstance(key, Tensor) for key, _ in layers):
        raise UnsupportedModelError(
            f"{name} has {len(attention)} attention layers with a cache, {len(layers)} wrote keys and values"
        )
    specs = []
    for (path, _), (key, value) in zip(attention.items(), layers):
        if key.shape != value.shape:
            raise UnsupportedModelError(
                f"{name}: {path} has keys of {key.shape[1]} x {key.shape[3]}, values of {value.shape[1]} x "
                f"{value.shape[3]} (heads x head_dim); they need to be alike"
            )
        try:
            specs.append(LayerSpec(key.shape[1], key.shape[3]))
        except ValueError as error:
            raise UnsupportedModelError(f"{name}: {path}: {error}") from None
    return tuple(specs), layers[0][0].dtype


def _dense_layers(
    settings: object, attention: dict[str, nn.Module], layer_types: list[str]
) -> Iterator[tuple[int, str]]:
    """Layers whose visible keys stand in the mask alone."""
    everywhere = not layer_types and bool(getattr(settings, "sliding_window", None))
    for layer, module in enumerate(attention.values()):
        kind = layer_types[layer] if layer < len(layer_types) else "full_attention"
        form = attention_form(type(module))
        if kind == "chunked_attention":
            yield layer, "chunked attention is known from the mask alone"
        elif (kind == "sliding_attention" or everywhere) and form and "sliding_window" not in form.keywords:
            yield layer, "its sliding window is known from the mask alone"


def _rope_type(settings: object) -> str | None:
    """The kind of rotary scaling, None without rotary embedding; per-layer-type parameters must agree on "default"."""
    rope = getattr(settings, "rope_parameters", None)
    if not isinstance(rope, dict):
        return None
    kinds = {
        r.get("rope_type", "default") for r in ([rope] if "rope_type" in rope else rope.values()) if isinstance(r, dict)
    }
    return next((kind for kind in sorted(kinds) if kind != "default"), "default")


def _max_prompt(model: PreTrainedModel, settings: object) -> int | None:
    """The model's number of positions, if it is a limit: learned positions, or rotary ones without scaling."""
    limit = next(
        (v for n in ("max_position_embeddings", "n_positions", "max_seq_len") if (v := getattr(settings, n, None))),
        None,
    )
    if not isinstance(limit, int):
        return None
    learned = any(isinstance(m, nn.Embedding) and m.num_embeddings in (limit, limit + 2) for m in model.modules())
    uses_alibi = bool(getattr(settings, "alibi", False))
    return (
        limit
        if learned or (_rope_type(settings) == "default" and not uses_alibi) or hasattr(settings, "max_seq_len")
        else None
    )
