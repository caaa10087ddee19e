"""Rotary position embedding, in place, alone or fused with the cache write.

For each token t and head, the first R = 2 * cos.shape[1] elements are rotated in pairs, the rest stays (partial):
    interleaved=False (Llama, NeoX): pairs (i, i + R/2);   interleaved=True (GPT-J, Cohere, GLM): pairs (2i, 2i + 1)
    (x1, x2) -> (x1 * cos[t, i] - x2 * sin[t, i],  x2 * cos[t, i] + x1 * sin[t, i])
in float32, rounded once.

Source: Su et al., RoFormer, arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference
from .cache import reshape_and_cache_reference

_ops = torch.ops.torch_pagedkv


@define("rotary_embedding(Tensor(a!) query, Tensor(b!)? key, Tensor cos, Tensor sin, bool interleaved=False) -> ()")
def _(query, key, cos, sin, interleaved=False):
    return None


@define(
    "rotary_and_cache(Tensor(a!) query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(b!) key_cache, "
    "Tensor(c!) value_cache, Tensor slot_mapping, bool interleaved=False, Tensor(d!)? k_scale=None, "
    "Tensor(e!)? v_scale=None) -> ()"
)
def _(query, key, value, cos, sin, key_cache, value_cache, slot_mapping, interleaved=False, k_scale=None, v_scale=None):
    return None


# ------------------------------------------------------------------------------------------------ references


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[1]
    c, s = cos.double()[:, None], sin.double()[:, None]
    y = x.double()
    rot, rest = y[..., : 2 * half], y[..., 2 * half :]
    if interleaved:
        x1, x2 = rot[..., 0::2], rot[..., 1::2]
        rot = torch.stack([x1 * c - x2 * s, x2 * c + x1 * s], -1).flatten(-2)
    else:
        x1, x2 = rot[..., :half], rot[..., half:]
        rot = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
    return torch.cat([rot, rest], -1)


@reference("rotary_embedding")
def rotary_embedding_reference(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> None:
    """The contract in plain PyTorch and float64."""
    for x in (query, key):
        if x is not None:
            x.copy_(_rotate(x, cos, sin, interleaved))


@reference("rotary_and_cache")
def rotary_and_cache_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """The contract in plain PyTorch: the rotated key is rounded to the key's dtype before it is stored."""
    query.copy_(_rotate(query, cos, sin, interleaved))
    rotated = _rotate(key, cos, sin, interleaved).to(key.dtype)
    reshape_and_cache_reference(rotated, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)


# ------------------------------------------------------------------------------------------------ public functions


def rotary_embedding(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> None:
    """Rotate query and key in place.

    Args:
        query: [T, Hq, D], key: [T, Hkv, D] or None; one dtype (float32, float16, bfloat16), any strides, unit in D.
        cos, sin: [T, R / 2], float32 or the query's dtype, unit stride in the last dimension; R <= D.
    """
    _ops.rotary_embedding(query, key, cos, sin, interleaved)


def rotary_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate the query in place, rotate the key and write it with the value into the cache, in one kernel.

    `key` and `value` are only read. A token whose slot is negative has its query rotated and nothing stored.
    Arguments as in `rotary_embedding` and `reshape_and_cache`; the stored key is first rounded to the key's dtype, so
    the cache holds the same bits as the two ops called in turn.
    """
    _ops.rotary_and_cache(
        query, key, value, cos, sin, key_cache, value_cache, slot_mapping, interleaved, k_scale, v_scale
    )
