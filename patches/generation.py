"""Bindings on the model itself: `generate` makes a paged cache and frees it, and each forward pass is planned first.

Bound to the instance, around whatever was bound there before: `generate`, `forward`, `prepare_inputs_for_generation`,
`_prepare_cache_for_generation` (where transformers decides about the cache), `_expand_inputs_for_generation` (the
only place that sees a prompt after it was repeated for beams and before anything is computed) and
`_valid_auto_compile_criteria` (where it decides whether to compile).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from transformers import PreTrainedModel

from ..config import PagedConfig
from ..kv.cache import PagedCache
from ..kv.manager import CacheManager
from . import attention, compiled, graphs, linear, state, stopping, turns
from .log import PatchLog

if TYPE_CHECKING:
    from .checks import ModelFacts

logger = logging.getLogger("torch_pagedkv")

#: arguments of a forward pass that do not change what is in the cache for the same token ids
_HARMLESS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "labels",
    "input_ids",
}
#: arguments that make a decoder attend to an encoder, too: that has no place in a paged cache
_CROSS = {"encoder_hidden_states", "encoder_outputs", "cross_attention_states"}


@dataclass(eq=False)
class Call:
    """One running `generate()`."""

    explicit: dict[str, Any]  # what the user passed
    input_ids: Tensor | None = None
    caches: list[PagedCache] = field(default_factory=list)  # made here, to be freed here


@dataclass
class Driver:
    """What the bound methods of one model share."""

    config: PagedConfig
    max_prompt: int | None
    has_prefixes: bool
    dtypes: tuple[torch.dtype, torch.dtype]  # of the parameters and of keys and values, when it was patched
    before: dict[str, Any]  # name -> what the instance had under it, or None: its class's
    weights: int | None = None  # fingerprint of the parameters behind the cached prefixes
    recorded: graphs.Graphs = field(default_factory=graphs.Graphs)
    _local: threading.local = field(default_factory=threading.local)

    @property
    def calls(self) -> list[Call]:
        """The running `generate()` calls of this thread, the innermost last."""
        return vars(self._local).setdefault("calls", [])

    def __reduce__(self) -> tuple[Any, ...]:
        return Driver, (self.config, self.max_prompt, self.has_prefixes, self.dtypes, self.before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Driver:
        before = copy.deepcopy(self.before, memo)
        twin = Driver(self.config, self.max_prompt, self.has_prefixes, self.dtypes, before)
        memo[id(self)] = twin
        return twin


def driver_of(model: PreTrainedModel) -> Driver:
    """The driver of a patched model."""
    return vars(model)["_pagedkv_driver"]


def manager_of(model: PreTrainedModel) -> CacheManager:
    """The cache manager of a patched model."""
    return vars(model)["paged_cache"]


def _call_before(model: PreTrainedModel, name: str, *args: Any, **kwargs: Any) -> Any:
    """The method as it was before the patch."""
    before = driver_of(model).before[name]
    if before is not None:
        return before(*args, **kwargs)
    return getattr(type(model), name)(model, *args, **kwargs)


# ---- generate --------------------------------------------------------------------------------------------------------


def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    driver, manager = driver_of(self), manager_of(self)
    with turns.turn(manager):
        call = Call(_explicit(self, args, kwargs))
        driver.calls.append(call)
        try:
            result = _call_before(self, "generate", *args, **kwargs)
            _finish(call, getattr(result, "past_key_values", None), failed=False)
            return result
        except BaseException:
            with contextlib.suppress(Exception):  # an interrupt may have torn the bookkeeping
                _finish(call, None, failed=True)
            manager.check()
            raise
        finally:
            driver.calls.pop()


def _explicit(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(model).generate).parameters)[1:]
    return dict(zip(names, args)) | kwargs


def _finish(call: Call, returned: Any, *, failed: bool) -> None:
    for cache in call.caches:
        if cache is not returned or failed:
            cache.release(commit=not failed)
        else:  # the caller goes on with it; what is computed can be found by others already
            with cache.manager.lock:
                cache.commit()


def _expand_inputs_for_generation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    expand = driver_of(self).before["_expand_inputs_for_generation"]
    if expand is None:  # a static method in some versions of transformers
        cls = type(self)
        expand = inspect.getattr_static(cls, "_expand_inputs_for_generation").__get__(self, cls)
    input_ids, model_kwargs = expand(*args, **kwargs)
    calls = driver_of(self).calls
    if calls:
        calls[-1].input_ids = input_ids
    return input_ids, model_kwargs


def _prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    driver = driver_of(self)
    given = model_kwargs.get("past_key_values")
    mask = model_kwargs.get("attention_mask")
    if given is None and driver.calls and _wants_pages(self, driver.calls[-1], generation_config):
        _start_cache(self, driver.calls[-1], generation_config, model_kwargs, generation_mode, max_cache_length)
        return None
    result = _call_before(
        self,
        "_prepare_cache_for_generation",
        generation_config,
        model_kwargs,
        generation_mode,
        batch_size,
        max_cache_length,
    )
    if isinstance(given, PagedCache):
        _check_owner(self, given)
        if mask is not None:
            given.expect(mask, mask.shape[0], max(mask.shape[1], given.columns))
        elif given.columns:
            given.expect(None, given.batch_size, given.columns)
        given.trusted = True
        given.defers_stop = bool(driver.calls) and stopping.defer(self, driver.calls[-1].explicit)
        if not _ids_decide(driver.calls[-1] if driver.calls else None, model_kwargs):
            given.stop_sharing()
    return result


@contextlib.contextmanager
def _continuous_batching_context_manager(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """transformers' continuous batching (`generate_batch`) has a paged cache of its own and takes the attention
    functions it knows."""
    with (
        turns.turn(manager_of(self)),
        attention.stock_names(self),
        _call_before(self, "continuous_batching_context_manager", *args, **kwargs) as batching,
    ):
        yield batching


def _valid_auto_compile_criteria(self: PreTrainedModel, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """Whether generate() compiles decoding by itself. It does so for every cache of a fixed size; ours has no such
    sign of the user's wish, and nobody shall wait for a compiler unasked, so it takes a `compile_config`."""
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, PagedCache):
        return _call_before(self, "_valid_auto_compile_criteria", model_kwargs, generation_config)
    cache.is_compileable = generation_config.compile_config is not None
    try:
        return _call_before(self, "_valid_auto_compile_criteria", model_kwargs, generation_config)
    finally:
        cache.is_compileable = False


def _wants_pages(model: PreTrainedModel, call: Call, generation_config: Any) -> bool:
    """Whether this call shall run on the paged cache: nobody asked for another one, and nothing is trained."""
    if generation_config.use_cache is False or model.training or not model._supports_default_dynamic_cache():
        return False
    # a model's own generation_config may ask for a static cache by default (Gemma 2): that is no wish of the caller's
    asked = call.explicit.get("generation_config")
    name = call.explicit.get("cache_implementation", getattr(asked, "cache_implementation", None))
    return name is None and not call.explicit.keys() & _CROSS


def _ids_decide(call: Call | None, model_kwargs: dict[str, Any]) -> bool:
    """Whether the keys and values follow from the token ids alone."""
    explicit = {} if call is None else call.explicit
    extra = {k for k, v in model_kwargs.items() if v is not None} - _HARMLESS
    return not extra and explicit.get("position_ids") is None


def _start_cache(
    model: PreTrainedModel,
    call: Call,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    max_cache_length: int,
) -> None:
    driver, manager = driver_of(model), manager_of(model)
    ids, embeds = call.input_ids, model_kwargs.get("inputs_embeds")
    first = embeds if embeds is not None else ids
    assert first is not None
    batch, columns = first.shape[:2]
    mask = model_kwargs.get("attention_mask")
    longest = columns if mask is None else int(mask.sum(1).max())
    if driver.max_prompt is not None and longest > driver.max_prompt:
        raise ValueError(
            f"the prompt has {longest} tokens, the model {driver.max_prompt} positions; shorten it, or patch with "
            "long_prompts='allow'"
        )
    _follow_model(model)
    manager.check_fits(longest, max_cache_length + 1 - columns)
    decided = embeds is None and _ids_decide(call, model_kwargs) and not generation_config.token_healing
    match = decided and driver.config.prefix_caching and driver.has_prefixes
    # Chunks and drafts are fed whole, and outputs of every position may be looked at: nothing is left out then.
    skip = (
        match
        and generation_config.prefill_chunk_size is None
        and not generation_config.output_hidden_states
        and not generation_config.output_attentions
        and "assisted" not in str(getattr(generation_mode, "value", generation_mode))
        and call.explicit.get("custom_generate") is None
    )
    if match:
        fingerprint = state.fingerprint(model)
        if driver.weights not in (None, fingerprint):
            manager.reset_prefixes()
        driver.weights = fingerprint
    cache = PagedCache(manager, expected_tokens=min(max_cache_length + 1, columns + 4096))
    salt = state.salted(model, driver.config.salt) if match else None
    call.caches.append(cache)
    cache.start(ids if decided else None, mask, batch=batch, columns=columns, salt=salt, match=match, skip=skip)
    cache.trusted = True
    cache.defers_stop = stopping.defer(model, call.explicit)
    model_kwargs["past_key_values"] = cache


def _follow_model(model: PreTrainedModel) -> None:
    """Moves the pool and the fused weights after the model, if it moved. Keys and values may be of another dtype than
    the parameters."""
    linear.refresh(model)
    parameters, states = driver_of(model).dtypes
    manager_of(model).follow(states if model.dtype == parameters else model.dtype, model.device)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _check_owner(model: PreTrainedModel, cache: PagedCache) -> None:
    if cache.manager is not manager_of(model):
        raise ValueError("past_key_values: this PagedCache was made for another model")


def _prepare_inputs_for_generation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    inputs = _call_before(self, "prepare_inputs_for_generation", *args, **kwargs)
    cache = inputs.get("past_key_values")
    if cache is None and isinstance(kwargs.get("past_key_values"), PagedCache):
        # Phi-3 drops its cache where the rotary frequencies change: everything is computed again
        cache = inputs["past_key_values"] = kwargs["past_key_values"]
        cache.stop_sharing()
        cache.restart()
    if isinstance(cache, PagedCache):
        whole = args[0] if args else kwargs.get("input_ids")
        _plan(self, cache, inputs, whole_ids=whole, trusted=cache.trusted and bool(driver_of(self).calls))
    return inputs


def _plan(
    model: PreTrainedModel, cache: PagedCache, inputs: dict[str, Any], *, whole_ids: Tensor | None, trusted: bool
) -> None:
    """Plans the forward pass that `inputs` are the arguments of."""
    _check_owner(model, cache)
    ids, embeds, mask = inputs.get("input_ids"), inputs.get("inputs_embeds"), inputs.get("attention_mask")
    first = ids if ids is not None else embeds
    if first is None:
        raise ValueError("a forward pass needs input_ids or inputs_embeds")
    crossed = sorted(name for name in _CROSS if inputs.get(name) is not None)
    if crossed:
        raise ValueError(f"{crossed[0]}: cross-attention cannot run on a PagedCache; leave past_key_values out")
    batch, queries = first.shape[:2]
    # an argument that is not of every language model (token types, pixels) may change the mask that the model makes
    foreign = {name for name, value in inputs.items() if value is not None} - _HARMLESS - {"inputs_embeds"}
    recorded = _is_recorded(model, embeds)
    if recorded and not model.training:
        _warn_recorded()
    dense = model.training or recorded or bool(inputs.get("output_attentions")) or bool(foreign)
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        dense = True  # a mask of the caller's own, over all columns
    elif not trusted:
        cache.undo()
        cache.expect(mask, batch, cache.columns + queries)
    cache.plan(batch, queries, dense=dense)
    if whole_ids is not None and whole_ids.shape[1] == cache.columns + queries:
        cache.note_ids(whole_ids, whole=True)
    else:
        cache.note_ids(ids, whole=False)


def _is_recorded(model: PreTrainedModel, embeds: Tensor | None) -> bool:
    """Whether autograd will record the forward pass: the kernels have no backward, stock attention has."""
    if not torch.is_grad_enabled():
        return False
    return (embeds is not None and embeds.requires_grad) or any(p.requires_grad for p in model.parameters())


@functools.cache
def _warn_recorded() -> None:
    logger.warning(
        "torch_pagedkv: a forward pass over a PagedCache is recorded for gradients, so it runs stock attention over "
        "keys and values gathered from the pages; call the model inside torch.no_grad() for the paged kernels"
    )


@torch.compiler.disable
def _arguments(self: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass by name."""
    if not args:
        return kwargs
    named = inspect.signature(type(self).forward).bind_partial(self, *args, **kwargs).arguments
    return {k: v for k, v in named.items() if k not in ("self", "kwargs")} | named.get("kwargs", {})


@torch.compiler.disable
def _plan_forward(
    self: PreTrainedModel, cache: PagedCache | None, inputs: dict[str, Any], is_compiled: bool
) -> Callable[..., Any]:
    """Plans a forward pass on a paged cache, unless it is planned already, and gives the function that runs it."""
    region: compiled.Region = vars(self)["_pagedkv_region"]
    if cache is None:
        if is_compiled:
            compiled.note_lengths(None, inputs)
        return region.function("no paged cache")
    ids = inputs.get("input_ids")
    first = ids if ids is not None else inputs.get("inputs_embeds")
    planned = cache.pending and cache.epoch == cache.manager.epoch
    planned = planned and first is not None and cache.fits(*first.shape[:2])
    if not planned or (not cache.dense and _is_recorded(self, inputs.get("inputs_embeds"))):
        _follow_model(self)
        cache.trusted = False
        if not _direct_ids_decide(cache, inputs):
            cache.stop_sharing()
        _plan(self, cache, inputs, whole_ids=None, trusted=False)
    assert first is not None
    run = region.function("dense" if cache.dense else "decode" if first.shape[1] == 1 else "prefill")
    if is_compiled:
        compiled.note_lengths(cache, inputs)
    elif cache.decode_step is not None:
        driver = driver_of(self)
        call = driver.calls[-1] if driver.calls else None
        if driver.config.cuda_graphs:
            return driver.recorded.runner(self, cache, inputs, call, driver.before["forward"], run)
    return run


def _direct_ids_decide(cache: PagedCache, inputs: dict[str, Any]) -> bool:
    """As `_ids_decide`, for a forward pass that the user calls: default positions are columns then, so a pad in front
    of a token shifts it."""
    mask = inputs.get("attention_mask")
    extra = {k for k, v in inputs.items() if v is not None} - _HARMLESS
    no_pads = mask is None or (mask.dim() == 2 and bool(mask.all()))
    counted = inputs.get("position_ids") is None and not cache.manager.rules.own_positions
    return no_pads and not extra and counted and inputs.get("input_ids") is not None


def _forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # in a graph that begins further out: prepare_inputs_for_generation planned it
        return _run(self, args, kwargs)
    # No function but disabled ones is called here: torch.compile would take it for a region of its own.
    is_compiled = get_eval_frame_callback() not in (None, False)
    inputs = _arguments(self, args, kwargs)
    cache = inputs.get("past_key_values")
    if not isinstance(cache, PagedCache):
        return _plan_forward(self, None, inputs, is_compiled)(self, args, kwargs)
    with cache.manager.lock:  # another thread's plan may grow the pool, which moves it under a forward pass
        result = _plan_forward(self, cache, inputs, is_compiled)(self, args, kwargs)
        cache.pending = False
    return result


def _run(self: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward pass itself: what `torch.compile` compiles, whichever way it was applied to the model."""
    result = _call_before(self, "forward", *args, **kwargs)
    cache = kwargs.get("past_key_values")
    if isinstance(cache, PagedCache):
        cache.rotary_angles.clear()
    return result


_METHODS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "forward": _forward,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_expand_inputs_for_generation": _expand_inputs_for_generation,
    "_valid_auto_compile_criteria": _valid_auto_compile_criteria,
    "continuous_batching_context_manager": _continuous_batching_context_manager,
}


def _with_signature(method: Callable[..., Any], cls: type, name: str) -> Callable[..., Any]:
    """The method with the signature and documentation of the class's own, which transformers inspects."""

    @functools.wraps(getattr(cls, name))
    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return bound


# torch.compile leaves these frames to Python and compiles what they call: the planning above is no part of a graph.
for _code in (_forward.__code__, _with_signature(_forward, PreTrainedModel, "forward").__code__):
    compiled.skip_code(_code)


def apply(model: PreTrainedModel, config: PagedConfig, facts: ModelFacts, log: PatchLog) -> None:
    """Bind the methods, and the manager as `model.paged_cache`."""
    manager = CacheManager(config, facts.specs, facts.dtype, facts.device, facts.rules)
    before = {name: vars(model).get(name) for name in _METHODS}
    driver = Driver(config, facts.max_prompt, facts.has_prefixes, (model.dtype, facts.dtype), before)
    log.set_attribute(model, "_pagedkv_driver", driver)
    log.set_attribute(model, "paged_cache", manager)
    log.set_attribute(model, "_pagedkv_region", compiled.Region(_run))
    compiled.let_wrappers_generate()
    stopping.allow()
    for name, method in _METHODS.items():
        log.bind(model, name, _with_signature(method, type(model), name))
        if name in ("generate", "forward"):
            log.runs(name, "generation", "paged cache")
    if manager.can_share_reads:
        log.runs("decoding", "generation", "paged_attention_cascade where rows share a prefix")
    log.kept("generate_batch", "generation", "transformers' continuous batching, on its own cache and stock attention")
