"""Attention modules outside of transformers' attention interface (Bloom, Falcon, MPT): a recipe each.

A recipe is a forward for the instance: its projections and heads are the module's own, keys and values go to the paged
cache, and `paged_attention` reads them there, with ALiBi slopes where the family has them. Without a paged step the
stock forward runs. These models build their own masks and biases, which a paged step does not read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kv.cache import PagedLayer, active_layer
from .attention import attend


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """float32 [num_heads]: 2^(-8 i / n) for the largest power of two n <= num_heads, then every second of 2 n's.

    Source: Press et al., arXiv:2108.12409; the order is Bloom's and Falcon's.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power) + 1, 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def mpt_slopes(num_heads: int, bias_max: float, device: torch.device) -> Tensor:
    """float32 [num_heads]: 2^(-bias_max i / n) for the smallest power of two n >= num_heads, odd ones first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-bias_max * i / power) for i in range(1, power + 1)]
    if power != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _bloom(self: Any, kv: PagedLayer, cache: Any, hidden_states: Tensor, residual: Tensor, **_: Any) -> Any:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    kv, _ = cache.update(key, value, self.layer_idx)
    out = attend(kv, query, scaling=self.inv_norm_factor, alibi_slopes=_slopes(self, "num_heads", alibi_slopes))
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
    slopes = None
    if alibi is None:
        assert position_embeddings is not None
        rotate = type(self).forward.__globals__["apply_rotary_pos_emb"]
        query, key = rotate(query, key, *position_embeddings)
    else:  # Falcon adds the bias before it scales
        slopes = _slopes(self, "num_heads", lambda n, device: alibi_slopes(n, device) * self.inv_norm_factor)
    kv, _ = cache.update(key, value, self.layer_idx)
    out = attend(kv, query, scaling=self.inv_norm_factor, alibi_slopes=slopes)
    return self.dense(out.flatten(2)), None


def _mpt(self: Any, kv: PagedLayer, cache: Any, hidden_states: Tensor, position_bias: Tensor, **_: Any) -> Any:
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (x.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    kv, _ = cache.update(key, value, self.layer_idx)
    # the model builds its bias with this default, whatever its config says
    slopes = _slopes(self, "n_heads", lambda n, device: mpt_slopes(n, 8, device))
    out = attend(kv, query, scaling=self.softmax_scale, alibi_slopes=slopes)
    return self.out_proj(out.flatten(2)), None


def _slopes(module: nn.Module, heads: str, make: Callable[[int, torch.device], Tensor]) -> Tensor:
    """The module's slopes on its device, made once."""
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    slopes = vars(module).get("_pagedkv_slopes")
    if slopes is None or slopes.device != device:
        slopes = vars(module)["_pagedkv_slopes"] = make(getattr(module, heads), device)
    return slopes


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
        forward: called as (module, layer, cache, **arguments of the stock forward by name).
        cache_argument: name under which the stock forward is given the cache.
        positional: names of the stock forward's leading arguments.
        counts_columns: its position bias counts pads between tokens.
        dense_after: the length from which the stock forward has to run, given the module; None: never.
        refuses: why a module of the class cannot be patched, or "".
    """

    forward: Callable[..., Any]
    cache_argument: str
    positional: tuple[str, ...]
    counts_columns: bool = False
    dense_after: Callable[[Any], int | None] = lambda module: None
    refuses: Callable[[Any], str] = lambda module: ""


#: class name -> recipe
RECIPES: dict[str, Recipe] = {
    "BloomAttention": Recipe(
        _bloom,
        "layer_past",
        ("hidden_states", "residual", "alibi", "attention_mask", "layer_past"),
        refuses=lambda m: "pretraining_tp > 1 with slow_but_exact" if m.pretraining_tp > 1 and m.slow_but_exact else "",
    ),
    "FalconAttention": Recipe(
        _falcon,
        "layer_past",
        ("hidden_states", "alibi", "attention_mask", "position_ids", "layer_past"),
        dense_after=_falcon_alibi_limit,
    ),
    "MptAttention": Recipe(
        _mpt, "past_key_values", ("hidden_states", "position_bias", "past_key_values"), counts_columns=True
    ),
}


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Bound to each attention module of a family: its recipe in a paged step, else its class's forward."""
    recipe = RECIPES[type(self).__name__]
    named = dict(zip(recipe.positional, args))
    cache = named.get(recipe.cache_argument, kwargs.get(recipe.cache_argument))
    kv = active_layer(cache, self.layer_idx)
    if kv is None:
        return type(self).forward(self, *args, **kwargs)
    named |= kwargs
    named.pop(recipe.cache_argument)
    return recipe.forward(self, kv, cache, **named)
