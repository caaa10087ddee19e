"""Attention modules outside of transformers' attention interface, or not quite inside: a recipe each.

A recipe is a forward for the instance: its projections and heads are the module's own, keys and values go to the paged
cache, and `paged_attention` reads them there, with ALiBi slopes where the family has them. Where the module computes
attention in a method of its own, `_attn(query, key, value, mask)`, only that is replaced. Without a paged step the
stock code runs. These models build their own masks and biases, which a paged step does not read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kv.cache import PagedLayer, active_layer
from . import match
from .attention import attend
from .log import PatchLog


def alibi_slopes(num_heads: int) -> Tensor:
    """float32 [num_heads]: 2^(-8 i / n) for the largest power of two n <= num_heads, then every second of 2 n's.

    Source: Press et al., arXiv:2108.12409; the order is Bloom's and Falcon's.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power) + 1, 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def mpt_slopes(num_heads: int, bias_max: float) -> Tensor:
    """float32 [num_heads]: 2^(-bias_max i / n) for the smallest power of two n >= num_heads, odd ones first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-bias_max * i / power) for i in range(1, power + 1)]
    if power != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return torch.tensor(slopes, dtype=torch.float32)


def _bloom(self: Any, kv: PagedLayer, cache: Any, hidden_states: Tensor, residual: Tensor, **_: Any) -> Any:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    kv, _ = cache.update(key, value, self.layer_idx)
    out = attend(kv, query, scaling=self.inv_norm_factor, alibi_slopes=_slopes(self))
    return self.dense(out.flatten(2)) + residual, None


def _falcon(
    self: Any,
    kv: PagedLayer,
    cache: Any,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> Any:
    query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    if alibi is None:
        assert position_embeddings is not None
        rotate = type(self).forward.__globals__["apply_rotary_pos_emb"]
        query, key = rotate(query, key, *position_embeddings)
    kv, _ = cache.update(key, value, self.layer_idx)
    out = attend(kv, query, scaling=self.inv_norm_factor, alibi_slopes=None if alibi is None else _slopes(self))
    return self.dense(out.flatten(2)), None


def _mpt(self: Any, kv: PagedLayer, cache: Any, hidden_states: Tensor, position_bias: Tensor, **_: Any) -> Any:
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (x.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    kv, _ = cache.update(key, value, self.layer_idx)
    out = attend(kv, query, scaling=self.softmax_scale, alibi_slopes=_slopes(self))
    return self.out_proj(out.flatten(2)), None


def _bert(
    self: Any, kv: PagedLayer, cache: Any, hidden_states: Tensor, sinusoidal_pos: Tensor | None = None, **_: Any
) -> Any:
    shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
    query, key, value = (
        project(hidden_states).view(shape).transpose(1, 2) for project in (self.query, self.key, self.value)
    )
    if sinusoidal_pos is not None and self.rotary_value:
        query, key, value = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key, value)
    elif sinusoidal_pos is not None:
        query, key = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key)
    kv, _ = cache.update(key, value, self.layer_idx)
    return attend(kv, query, scaling=self.attention_head_size**-0.5).flatten(2), None


def _bart(
    self: Any, kv: PagedLayer, cache: Any, hidden_states: Tensor, attn_prompt: Tensor | None = None, **_: Any
) -> Any:
    if attn_prompt is not None:
        raise NotImplementedError("attn_prompt: keys that every query sees have no place in a paged cache")
    shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
    query, key, value = (
        project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    kv, _ = cache.update(key, value, self.layer_idx)
    return self.out_proj(attend(kv, query, scaling=self.scaling).flatten(2)), None


def _jetmoe(
    self: Any,
    kv: PagedLayer,
    cache: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Any:
    query, router_logits, topology = self.experts.map(hidden_states)
    key, value = self.kv_proj(hidden_states).chunk(2, dim=-1)
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (x.view(shape).transpose(1, 2) for x in (query, key, value))
    rotate = type(self).forward.__globals__["apply_rotary_pos_emb"]
    query, key = rotate(query, key, *position_embeddings)
    kv, _ = cache.update(key, value, self.layer_idx)
    # a key's queries, one of each expert, stand apart here: [experts, Hkv] -> [Hkv, experts] and back
    query = query.unflatten(1, (self.top_k, -1)).transpose(1, 2).flatten(1, 2)
    out = attend(kv, query, scaling=self.scaling).unflatten(2, (-1, self.top_k)).transpose(2, 3).flatten(3)
    return self.experts.reduce(out, topology).view(*hidden_states.shape[:-1], -1), None, router_logits


def _diffllama(
    self: Any,
    kv: PagedLayer,
    cache: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Any:
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (
        project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    rotate = type(self).forward.__globals__["apply_rotary_pos_emb"]
    query, key = rotate(query, key, *position_embeddings)
    kv, _ = cache.update(key, value, self.layer_idx)
    # either half of the value heads is read by all queries: those of the lower keys, those of the upper ones
    half = key.shape[1] // 2
    halves = slice(half), slice(half, None)

    def read(values: slice) -> Tensor:
        parts = zip(query.chunk(2, 1), halves)
        return torch.cat([attend(_heads(kv, keys, values), q, scaling=self.scaling) for q, keys in parts], 2)

    first, second = torch.cat([read(values) for values in halves], -1).chunk(2, 2)
    first_weight, second_weight = (
        torch.exp(torch.sum(q * k, dim=-1, dtype=torch.float32)).to(query.dtype)
        for q, k in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
    )
    out = first - (first_weight - second_weight + self.lambda_init) * second
    return self.o_proj(((1 - self.lambda_init) * self.groupnorm(out)).flatten(2)), None


def _heads(kv: PagedLayer, keys: slice, values: slice) -> PagedLayer:
    """Some key heads with some value heads. The op reads the caches as they lie; scales it wants dense."""
    return kv._replace(
        key_cache=kv.key_cache[:, :, keys],
        value_cache=kv.value_cache[:, :, values],
        k_scale=None if kv.k_scale is None else kv.k_scale[:, :, keys].contiguous(),
        v_scale=None if kv.v_scale is None else kv.v_scale[:, :, values].contiguous(),
    )


def _inner(self: Any, query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Bound as `_attn`: [B, H, Q, D] -> ([B, H, Q, D], weights or None)."""
    if not isinstance(key, PagedLayer):
        return type(self)._attn(self, query, key, value, *args, **kwargs)
    bound: Bound = self._pagedkv_family
    query = query.to(_weight(self).dtype)  # some keep it in float32 behind the rotary embedding
    out = attend(key, query, scaling=bound.scaling, sliding_window=bound.window)
    return out.transpose(1, 2), None


@dataclass
class Bound:
    """What a recipe found out about one module, once: a compiled forward pass shall find numbers."""

    arguments: tuple[str, ...]  # names of the stock forward's arguments, `self` left out
    scaling: float | None
    window: int | None
    slopes: Tensor | None
    projection: str  # name of a child that has the module's dtype and device, quantised or not


def _weight(module: Any) -> Tensor:
    """A tensor of the module's dtype and device."""
    weight = match.weight_like(module.get_submodule(module._pagedkv_family.projection))
    assert weight is not None
    return weight


def _slopes(module: Any) -> Tensor:
    """The module's slopes on its device."""
    bound: Bound = module._pagedkv_family
    device = _weight(module).device
    assert bound.slopes is not None
    if bound.slopes.device != device:
        bound.slopes = bound.slopes.to(device)
    return bound.slopes


def _falcon_alibi_limit(module: Any) -> int | None:
    """Falcon rounds slope * position to bfloat16, which is exact up to position 256 if the slopes are powers of two.
    Beyond, the rounded biases are what the model was trained with, so its own forward runs."""
    if not getattr(module.config, "alibi", False):
        return None
    return 256 if math.log2(module.num_heads).is_integer() and module.num_heads <= 8 else 0


@dataclass(frozen=True)
class Recipe:
    """How one attention class runs on pages.

    Attributes:
        forward: called as (module, layer, cache, **arguments of the stock forward by name). None: the stock forward
            runs, and only its `_attn` is replaced, with this `scaling` and `window`.
        cache_argument: name under which the stock forward is given the cache.
        counts_columns: its position bias or window counts pads between tokens.
        slopes: ALiBi's, float32 [heads], given the module.
        relative: positions enter as differences alone.
        dense_after: the length from which the stock forward has to run, given the module; None: never.
        refuses: why a module of the class cannot be patched, or "".
    """

    forward: Callable[..., Any] | None
    cache_argument: str = "past_key_values"
    scaling: Callable[[Any], float] | None = None
    window: Callable[[Any], int | None] = lambda module: None
    slopes: Callable[[Any], Tensor | None] = lambda module: None
    counts_columns: bool = False
    relative: bool = False
    dense_after: Callable[[Any], int | None] = lambda module: None
    refuses: Callable[[Any], str] = lambda module: ""


#: class name -> recipe
RECIPES: dict[str, Recipe] = {
    "BloomAttention": Recipe(
        _bloom,
        "layer_past",
        slopes=lambda m: alibi_slopes(m.num_heads),
        relative=True,
        refuses=lambda m: "pretraining_tp > 1 with slow_but_exact" if m.pretraining_tp > 1 and m.slow_but_exact else "",
    ),
    "FalconAttention": Recipe(
        _falcon,
        "layer_past",
        # Falcon adds the bias before it scales
        slopes=lambda m: alibi_slopes(m.num_heads) * m.inv_norm_factor,
        dense_after=_falcon_alibi_limit,
    ),
    # the model builds its bias with this default, whatever its config says
    "MptAttention": Recipe(_mpt, slopes=lambda m: mpt_slopes(m.n_heads, 8), counts_columns=True, relative=True),
    "JetMoeAttention": Recipe(_jetmoe),
    "DiffLlamaAttention": Recipe(_diffllama),
    "CodeGenAttention": Recipe(None, scaling=lambda m: 1 / float(m.scale_attn)),
    "GPTJAttention": Recipe(None, scaling=lambda m: 1 / float(m.scale_attn)),
    "GPTNeoXJapaneseAttention": Recipe(None, scaling=lambda m: 1 / float(m.norm_factor)),
    "GPTNeoSelfAttention": Recipe(
        None,
        scaling=lambda m: 1.0,
        window=lambda m: m.config.window_size if m.attention_type == "local" else None,
        counts_columns=True,
    ),
} | {
    f"{family}SelfAttention": Recipe(_bert) for family in ("BigBird", "BlipText", "MegatronBert", "RemBert", "RoFormer")
}
RECIPES |= {f"{family}Attention": Recipe(_bart) for family in ("Mvp", "TrOCR", "XGLM")}


def bind(module: nn.Module, log: PatchLog) -> None:
    """Let a module of a family run on pages."""
    recipe = RECIPES[type(module).__name__]
    cls: Any = type(module)
    arguments = tuple(inspect.signature(cls.forward).parameters)[1:]
    slopes = recipe.slopes(module)
    children = module.named_modules()
    name, weight = next((name, w) for name, child in children if (w := match.weight_like(child)) is not None)
    bound = Bound(
        arguments=arguments,
        scaling=None if recipe.scaling is None else recipe.scaling(module),
        window=recipe.window(module),
        slopes=None if slopes is None else slopes.to(weight.device),
        projection=name,
    )
    log.set_attribute(module, "_pagedkv_family", bound)
    if recipe.forward is None:
        log.bind(module, "_attn", _inner)
    else:
        log.bind(module, "forward", forward)


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Bound to each attention module of a family: its recipe in a paged step, else its class's forward."""
    recipe = RECIPES[type(self).__name__]
    assert recipe.forward is not None
    named = dict(zip(self._pagedkv_family.arguments, args))
    cache = named.get(recipe.cache_argument, kwargs.get(recipe.cache_argument))
    kv = active_layer(cache, self.layer_idx)
    if kv is None:
        return type(self).forward(self, *args, **kwargs)
    named |= kwargs
    named.pop(recipe.cache_argument)
    return recipe.forward(self, kv, cache, **named)
