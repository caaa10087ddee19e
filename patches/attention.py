"""Attention on pages, through transformers' attention and mask interfaces.

Two names are registered, for the two stock implementations that a patched model falls back to, and the patched model's
config says one of them. In a paged step `PagedCache.update` has returned a `PagedLayer` in place of keys and values,
and `paged_attention` reads the pages; in every other case (no paged cache, a dense step, training) the stock function
runs with the stock mask.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..kv.cache import PagedLayer
from .log import PatchLog

if TYPE_CHECKING:
    from .checks import ModelFacts

#: name in the patched config -> the stock implementation it falls back to
STOCK = {"paged_kv": "sdpa", "paged_kv_plain": "eager"}
_MISSING = object()


def attend(
    kv: PagedLayer,
    query: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of a step's queries over one layer's pages.

    Args:
        kv: what `PagedCache.update` returned.
        query: [B, Hq, Q, D].
        scaling: of the logits, default 1 / sqrt(D). The other arguments are those of `ops.paged_attention`.

    Returns:
        [B, Q, Hq, D] (D: of the values), in the query's dtype; rows of pads are 0.
    """
    rows = query.transpose(1, 2).flatten(0, 1)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if kv.k_scale is None and rows.dtype != kv.key_cache.dtype:  # under autocast
        rows = rows.to(kv.key_cache.dtype)
    step, shared = kv.step, kv.shared
    paged = rows, kv.key_cache, kv.value_cache, step.block_tables, step.seq_lens
    features: dict[str, Any] = {
        "scale": scaling,
        "alibi_slopes": alibi_slopes,
        "sliding_window": sliding_window or 0,
        "softcap": softcap or 0.0,
        "sinks": None if sinks is None else sinks.float(),
        "k_scale": kv.k_scale,
        "v_scale": kv.v_scale,
    }
    if shared is not None and shared.serves(sliding_window):
        groups = shared.group_start, shared.group_len, shared.prefix_lens
        out = ops.paged_attention_cascade(*paged, *groups, max_group_len=shared.max_group_len, **features)
    else:
        queries = step.query_start, step.query_len
        features["batch_invariant"] = kv.batch_invariant
        out = ops.paged_attention(*paged, *queries, max_query_len=query.shape[2], **features)
    assert isinstance(out, Tensor)
    out = out[..., : kv.value_dim].to(query.dtype)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _attention(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor | PagedLayer,
    value: Tensor | PagedLayer,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention interface: query [B, Hq, Q, D] -> ([B, Q, Hq, D], weights or None)."""
    if not isinstance(key, PagedLayer):
        function = _stock_function(stock, module)
        return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout:
        raise RuntimeError(f"attention dropout ({dropout}) over a paged KV cache: call model.eval() first")
    out = attend(
        key,
        query,
        scaling=scaling,
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return out, None


def _stock_function(stock: str, module: nn.Module) -> Callable[..., Any]:
    """What the model would have called: an interface's function, or the eager one of the module's own file."""
    if stock != "eager":
        return ALL_ATTENTION_FUNCTIONS[stock]
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(f"{type(module).__name__} has no eager_attention_forward in its file")


def _mask(stock: str, *args: Any, **kwargs: Any) -> Any:
    """The mask interface: None where a `PagedCache` says that the step needs none, else the stock mask."""
    kv_length = kwargs["kv_length"] if "kv_length" in kwargs else args[2]
    if isinstance(kv_length, int) and kv_length == 0:
        if kwargs.get("use_vmap"):
            raise NotImplementedError(
                "the model overlays a pattern of its own on the causal mask, which a paged step cannot follow: pass "
                "past_key_values=DynamicCache()"
            )
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)


for _name, _stock in STOCK.items():
    AttentionInterface.register(_name, partial(_attention, _stock))
    AttentionMaskInterface.register(_name, partial(_mask, _stock))


def stock_name(name: str | None) -> str:
    """The stock implementation behind a name in a config: an unpickled model's still says ours."""
    return STOCK.get(name or "eager", name or "eager")


@contextlib.contextmanager
def stock_names(model: PreTrainedModel) -> Iterator[None]:
    """For a while the configs of a patched model name the stock attention, which code that knows no other asks for."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(vars(m).get("config"), PreTrainedConfig)}
    names = [
        (vars(c), name) for c in configs.values() if (name := vars(c).get("_attn_implementation_internal")) in STOCK
    ]
    for namespace, name in names:
        namespace["_attn_implementation_internal"] = STOCK[name]
    try:
        yield
    finally:
        for namespace, name in names:
            namespace["_attn_implementation_internal"] = name


def _carry_over(copied: PreTrainedConfig, original: PreTrainedConfig, snapshot: dict[str, Any]) -> None:
    """What the user changed in the patched model's config since it was copied, into the original one."""
    now = vars(copied)
    for name in now.keys() | snapshot.keys():
        new, old = now.get(name, _MISSING), snapshot.get(name, _MISSING)
        if isinstance(new, PreTrainedConfig) or new is old or new == old:
            continue
        if new is _MISSING:
            vars(original).pop(name, None)
        else:
            vars(original)[name] = new


def apply(model: PreTrainedModel, facts: ModelFacts, log: PatchLog) -> None:
    """Give the model a config of its own that names the paged attention, or bind the recipes of its family."""
    from . import families

    if any(type(module).__name__ in families.RECIPES for module in facts.attention.values()):
        for name, module in facts.attention.items():
            families.bind(module, log)
            if facts.rules.dense_after == 0:
                log.kept(name, "attention", f"{facts.stock} over gathered pages: its position bias is rounded")
            else:
                log.runs(name, "attention", "paged_attention")
        return

    memo: dict[int, Any] = {}
    copied = copy.deepcopy(model.config, memo)
    originals: dict[int, tuple[PreTrainedConfig, PreTrainedConfig]] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            if id(config) not in memo:  # not a part of the model's config: a copy of it that a submodule made
                copy.deepcopy(config, memo)
            originals[id(config)] = (config, memo[id(config)])
    stock = stock_name(facts.stock)
    # sdpa has no softcap: some versions of transformers raise, others leave it out
    plain = stock == "eager" or any("softcap" in form.keywords for form in facts.forms)
    name = next(key for key, value in STOCK.items() if value == ("eager" if plain else "sdpa"))
    decoder = type(copied).get_text_config(copied, decoder=True)
    for original, new in originals.values():
        if new is decoder or type(new) is type(decoder):
            vars(new)["_attn_implementation_internal"] = name
        log.on_undo(partial(_carry_over, new, original, dict(vars(new))))
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            log.set_attribute(module, "config", originals[id(config)][1])
    for path in facts.attention:
        if path in facts.dense_reasons:
            log.kept(path, "attention", f"{STOCK[name]} over gathered pages: {facts.dense_reasons[path]}")
        else:
            log.runs(path, "attention", "paged_attention")
