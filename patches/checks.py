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
from ..quant.eight import unrounded
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
    "output_attentions",
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
        attention: qualified name -> attention module.
        forms: of their classes.
        specs: shape of the keys and values of each layer of the cache.
        dtype, device: of the keys and values.
        rules: where pages cannot be attended in.
        stock: name of the model's attention implementation.
        dense_reasons: name of an attention module -> why it gets dense keys and values.
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
    dense_reasons: dict[str, str]
    max_prompt: int | None
    has_prefixes: bool


def text_config(model: PreTrainedModel) -> object:
    """The config of the decoder that generates text (the model's own, unless it is a composite one)."""
    return model.config.get_text_config(decoder=True)


def setting(config: object, name: str) -> Any:
    """A field of a config, None if it has none. Where it differs from layer to layer: that of the first layer where it
    is set."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # newer transformers do not say which layer's
        return next((v for layer in config.per_layer_config if (v := getattr(layer, name, None))), None)  # type: ignore[attr-defined]


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
    kept = _shared_with_other_layers(tree)
    if any(read not in given and read not in branch and read not in kept for read in reads):
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


def _shared_with_other_layers(tree: ast.FunctionDef) -> list[ast.AST]:
    """Nodes that are put aside as they are, `shared[...] = key, value`, for layers without their own keys (Gemma)."""
    return [
        element
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and all(isinstance(target, ast.Subscript) for target in node.targets)
        for element in (node.value.elts if isinstance(node.value, ast.Tuple) else [node.value])
    ]


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


class _Recorder(DynamicCache):
    """A stock cache that notes which module wrote which of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.ran: dict[str, None] = {}  # names, in the order of their first call
        self.writers: dict[int, str] = {}

    def enter(self, name: str, *_: Any) -> None:
        self.running.append(name)
        self.ran[name] = None

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.running:
            self.writers[layer_idx] = self.running[-1]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def num_embeddings(model: PreTrainedModel) -> int:
    """Rows of the (first) input embedding: all token ids are below."""
    embedding = model.get_input_embeddings()
    while isinstance(embedding, nn.ModuleList):
        embedding = embedding[0]
    weight = getattr(embedding, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else int(text_config(model).vocab_size)  # type: ignore[attr-defined]


def probe(model: PreTrainedModel, candidates: dict[str, nn.Module]) -> tuple[_Recorder, bool]:
    """Runs a few tokens through the model with a stock cache: its shapes are those of the model's attention, whatever
    sharding or quantisation did to the projections. Random state and training mode are left as they were.

    Raises:
        UnsupportedModelError: the model does not use the cache as it is.

    Returns:
        The cache, which knows what the candidates wrote, and whether `position_ids` left out mean 0, 1, 2 ...
    """
    name = type(model).__name__
    cache = _Recorder()
    vocabulary = num_embeddings(model)  # special tokens, which a model may treat otherwise, stand at its ends
    ids = ((torch.arange(_PROBE_TOKENS, device=model.device) + vocabulary // 2) % vocabulary)[None]
    devices = [model.device] if model.device.type == "cuda" else []
    hooks = [
        hook
        for name, module in candidates.items()
        for hook in (
            module.register_forward_pre_hook(functools.partial(cache.enter, name)),
            module.register_forward_hook(cache.leave, always_call=True),
        )
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), match.evaluating(model), unrounded(model):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} does not run on a stock cache ({type(error).__name__}: {error})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if cache.writers and out.past_key_values is not cache:
        raise UnsupportedModelError(f"{name} puts the cache that it is given into one of its own")
    # the same tokens and, in a second row, another last one: it must change nothing before itself
    ids = torch.cat([ids, ids])
    ids[1, -1] = ids[0, 0]
    given = {"input_ids": ids, "past_key_values": DynamicCache(), "use_cache": True}
    if _accepts(model, "position_ids"):
        given["position_ids"] = torch.arange(_PROBE_TOKENS, device=model.device).repeat(2, 1)
    with torch.no_grad(), torch.random.fork_rng(devices), match.evaluating(model), unrounded(model):
        counted = model(**given).logits.nan_to_num()  # broken weights are no sign of anything here
    limit = max(1e-3, 8 * torch.finfo(counted.dtype).eps)
    if match.relative_error(counted[1, :-1], counted[0, :-1]) > limit:
        raise UnsupportedModelError(f"{name} attends in both directions")
    return cache, match.relative_error(counted[:1], out.logits.nan_to_num()) <= limit


def examine(model: PreTrainedModel, config: PagedConfig) -> ModelFacts:
    """Everything `patch` needs to know about attention and cache.

    Raises:
        UnsupportedModelError: the model's attention cannot run on a paged cache; the message says why.
    """
    name = type(model).__name__
    settings = text_config(model)
    for field, meaning in _FOREIGN_FIELDS.items():
        if setting(settings, field):
            raise UnsupportedModelError(f"{name} has {meaning} (config.{field})")
    if setting(settings, "is_causal") is False or setting(settings, "use_bidirectional_attention") is True:
        raise UnsupportedModelError(f"{name} attends in both directions")

    layer_types = setting(settings, "layer_types") or []
    foreign = sorted(set(layer_types) - _KNOWN_LAYER_TYPES)
    if foreign:
        raise UnsupportedModelError(f"{name} has layers of type {', '.join(foreign)}")
    candidates = _candidates(model)
    cache, default_positions = probe(model, candidates)
    attention, layers = _attention_modules(model, candidates, cache)
    specs, dtype = _shapes(model, layers, cache)
    dense = dict(_dense_modules(model, settings, attention, layer_types))
    recipes = [families.RECIPES.get(type(module).__name__) for module in attention.values()]
    recipe = recipes[0]
    windows = "sliding_attention" in layer_types or bool(setting(settings, "sliding_window"))
    module = next(iter(attention.values()))
    rules = PagingRules(
        dense_layers=frozenset(layer for layer, path in enumerate(layers) if path in dense),
        gaps_dense=windows or (recipe is not None and recipe.counts_columns),
        dense_after=recipe.dense_after(module) if recipe is not None else None,
        real_masks=recipe is not None,
        pads_shift_positions=not (recipe is not None and recipe.relative) and not _hands_on_positions(model),
        own_positions=not default_positions,
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


def _hands_on_positions(model: PreTrainedModel) -> bool:
    """Whether `generate()` tells the model the positions of its tokens, pads left out."""
    if not _accepts(model, "position_ids"):
        return False
    ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    mask, positions = (torch.tensor([row], device=model.device) for row in ([0, 1, 1], [0, 0, 1]))
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": DynamicCache(), "use_cache": True}
    try:
        handed = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given).get("position_ids")
    except Exception:  # it wants more than every model does: then it decides otherwise, too
        return False
    return isinstance(handed, Tensor) and torch.equal(handed.reshape(-1, 3)[-1:], positions)


def _candidates(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules whose forward says that they update a cache."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in families.RECIPES or attention_form(type(module)) is not None
    }


def _attention_modules(
    model: PreTrainedModel, candidates: dict[str, nn.Module], cache: _Recorder
) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules that attend in the cache, and the one that writes each of its layers. What did not run does not count
    (cross-attention without an encoder).

    Raises:
        UnsupportedModelError: there are none, or one of them cannot run on pages.
    """
    found: dict[str, nn.Module] = {}
    kind = type(model).__name__
    for name in cache.ran:
        module = candidates[name]
        form, recipe = attention_form(type(module)), families.RECIPES.get(type(module).__name__)
        why = recipe.refuses(module) if recipe is not None else form.obstacle if form is not None else None
        if why:
            raise UnsupportedModelError(f"{kind}: {name} ({type(module).__name__}): {why}")
        found[name] = module
    if not found or not cache.writers:
        raise UnsupportedModelError(
            f"{kind} has no attention that updates a key-value cache: a state-space model, or one from before "
            "transformers' caches"
        )
    missing = sorted(set(range(len(cache.layers))) - cache.writers.keys())
    if missing:
        raise UnsupportedModelError(
            f"{kind}: layers {', '.join(map(str, missing))} of its cache keep no keys and values: a hybrid model, or "
            "one with cross-attention"
        )
    return found, [cache.writers[layer] for layer in range(len(cache.layers))]


def _shapes(
    model: PreTrainedModel, writers: list[str], cache: DynamicCache
) -> tuple[tuple[LayerSpec, ...], torch.dtype]:
    name = type(model).__name__
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    specs = []
    for path, (key, value) in zip(writers, layers, strict=True):
        if key.shape[:3] != value.shape[:3] or key.shape[3] < value.shape[3]:
            raise UnsupportedModelError(
                f"{name}: {path} has keys of {key.shape[1]} x {key.shape[3]}, values of {value.shape[1]} x "
                f"{value.shape[3]} (heads x head_dim); they need as many heads, and values that are no larger"
            )
        try:
            specs.append(LayerSpec(key.shape[1], key.shape[3], value.shape[3] if key.shape != value.shape else None))
        except ValueError as error:
            raise UnsupportedModelError(f"{name}: {path}: {error}") from None
    return tuple(specs), layers[0][0].dtype


def _dense_modules(
    model: PreTrainedModel, settings: object, attention: dict[str, nn.Module], layer_types: list[str]
) -> Iterator[tuple[str, str]]:
    """Modules whose visible keys stand in the mask alone.

    Raises:
        UnsupportedModelError: or not even there.
    """
    everywhere = not layer_types and bool(setting(settings, "sliding_window"))
    for path, module in attention.items():
        layer = getattr(module, "layer_idx", None)
        known = isinstance(layer, int) and layer < len(layer_types)
        kind = layer_types[layer] if known else "full_attention"  # type: ignore[index]
        form = attention_form(type(module))
        if kind == "chunked_attention":
            yield path, "chunked attention is known from the mask alone"
        elif (kind == "sliding_attention" or everywhere) and form and "sliding_window" not in form.keywords:
            kinds: list[Any] = [type(part) for part in model.modules()]
            if not any(map(_masks_by_window, kinds)):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: its sliding window is neither in the mask nor in the attention: only "
                    "transformers' own cache drops what is outside"
                )
            yield path, "its sliding window is known from the mask alone"


@functools.cache
def _masks_by_window(cls: Any) -> bool:
    """True for a model whose forward makes a mask with a sliding window."""
    tree = match.function_tree(cls.forward) if issubclass(cls, PreTrainedModel) else None
    return tree is not None and any(
        isinstance(node, ast.Name) and (node.id == "create_masks_for_generate" or "sliding_window" in node.id)
        for node in ast.walk(tree)
    )


def _rope_type(settings: object) -> str | None:
    """The kind of rotary scaling, None without rotary embedding; per-layer-type parameters must agree on "default"."""
    rope = setting(settings, "rope_parameters")
    if not isinstance(rope, dict):
        return None
    kinds = {
        r.get("rope_type", "default") for r in ([rope] if "rope_type" in rope else rope.values()) if isinstance(r, dict)
    }
    return next((kind for kind in sorted(kinds) if kind != "default"), "default")


def _max_prompt(model: PreTrainedModel, settings: object) -> int | None:
    """The model's number of positions, if it is a limit: learned positions, or rotary ones without scaling."""
    limit = next(
        (v for n in ("max_position_embeddings", "n_positions", "max_seq_len") if (v := setting(settings, n))),
        None,
    )
    if not isinstance(limit, int):
        return None
    learned = any(isinstance(m, nn.Embedding) and m.num_embeddings in (limit, limit + 2) for m in model.modules())
    uses_alibi = bool(setting(settings, "alibi"))
    return (
        limit
        if learned or (_rope_type(settings) == "default" and not uses_alibi) or hasattr(settings, "max_seq_len")
        else None
    )
