"""Writing, copying, swapping and gathering the blocks of a paged KV cache.

A cache is `[num_blocks, block_size, Hkv, D]`; slot = block * block_size + offset in the block. Quantised caches (int8,
float8_e4m3fn) carry float32 scales `[num_blocks, block_size, Hkv]`, one for each token and head:
    scale = amax(|x|) / 127 (int8) or / 448 (fp8);  stored = round_to_nearest_even(x / scale);  x ~ stored * scale.
A row of zeros has scale 0 and stores 0, and so does a row whose scale is subnormal (its inverse would be infinite).

A scale for each token and head costs 4 / D bytes an element and needs no calibration; fp8 at unit scale is known to
ruin models with large key outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference

_ops = torch.ops.torch_pagedkv

#: the largest magnitude that a quantised dtype stores
QUANT_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@define(
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()"
)
def _(key, value, key_cache, value_cache, slot_mapping, k_scale=None, v_scale=None):
    return None


@define("copy_blocks(Tensor(a!)[] caches, Tensor block_mapping) -> ()")
def _(caches, block_mapping):
    return None


@define("swap_blocks(Tensor src, Tensor(a!) dst, Tensor block_mapping) -> ()")
def _(src, dst, block_mapping):
    return None


@define(
    "gather_cache(Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, Tensor out_start, "
    "SymInt total_tokens, ScalarType dtype, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor)"
)
def _(key_cache, value_cache, block_tables, seq_lens, out_start, total_tokens, dtype, k_scale=None, v_scale=None):
    shape = (total_tokens, key_cache.shape[2], key_cache.shape[3])
    return key_cache.new_empty(shape, dtype=dtype), key_cache.new_empty(shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------ references


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise the last dimension of x with a scale for each row: (stored in `dtype`, float32 scale)."""
    x = x.float()
    scale = x.abs().amax(-1) / QUANT_MAX[dtype]
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1.0 / scale, 0.0)
    y = x * inverse[..., None]
    if dtype == torch.int8:
        y = y.round().clamp(-127, 127)
    else:
        y = y.clamp(-448.0, 448.0)
    return y.to(dtype), scale


@reference("reshape_and_cache")
def reshape_and_cache_reference(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """The contract in plain PyTorch; slots out of range are skipped."""
    block_size = key_cache.shape[1]
    keep = (slot_mapping >= 0) & (slot_mapping < key_cache.shape[0] * block_size)
    block, offset = slot_mapping[keep] // block_size, slot_mapping[keep] % block_size
    for x, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        if scale is None:
            cache[block, offset] = x[keep].to(cache.dtype)
        else:
            stored, row_scale = quantize_rows(x[keep], cache.dtype)
            cache.view(torch.uint8)[block, offset] = stored.view(torch.uint8)  # torch cannot index-assign fp8
            scale[block, offset] = row_scale


@reference("copy_blocks")
def copy_blocks_reference(caches: list[Tensor], block_mapping: Tensor) -> None:
    """The contract in plain PyTorch."""
    for cache in caches:
        raw = cache.view(torch.uint8) if cache.element_size() == 1 else cache
        raw[block_mapping[:, 1]] = raw[block_mapping[:, 0]]


@reference("swap_blocks")
def swap_blocks_reference(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    """The contract in plain PyTorch."""
    for a, b in block_mapping.tolist():
        dst[b].copy_(src[a])


@reference("gather_cache")
def gather_cache_reference(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    out_start: Tensor,
    total_tokens: int,
    dtype: torch.dtype,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract in plain PyTorch."""
    block_size = key_cache.shape[1]
    outs = []
    for cache, scale in ((key_cache, k_scale), (value_cache, v_scale)):
        out = torch.zeros((total_tokens, *cache.shape[2:]), dtype=dtype, device=cache.device)
        for s in range(seq_lens.shape[0]):
            length, start = int(seq_lens[s]), int(out_start[s])
            if length <= 0:
                continue
            blocks = block_tables[s, : -(-length // block_size)].long()
            x = cache[blocks].float()
            if scale is not None:
                x = x * scale[blocks][..., None]
            out[start : start + length] = x.flatten(0, 1)[:length].to(dtype)
        outs.append(out)
    return outs[0], outs[1]


# ------------------------------------------------------------------------------------------------ public functions


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write one K and one V row a token into the cache, quantising when the cache is int8 or fp8.

    Args:
        key, value: [T, Hkv, D], float32, float16 or bfloat16, any strides with unit stride in D.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D], whole tensors (storage offset 0: torch 2.11 compiles
            a mutated view at an offset to wrong addresses); key's dtype, int8 or float8_e4m3fn.
        slot_mapping: int64 [T]; -1 (any negative) skips the token. Two tokens of one call must not share a slot.
        k_scale, v_scale: float32 [num_blocks, block_size, Hkv], written; with a quantised cache and only then.
    """
    _ops.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)


def copy_blocks(caches: list[Tensor], block_mapping: Tensor) -> None:
    """Copy whole blocks inside each cache: caches[i][dst] = caches[i][src] for every pair, in one launch.

    Args:
        caches: tensors of any dtype whose dimension 0 is the block and whose blocks are contiguous (keys, values and
            scales of all layers go together). Each has its own block size in bytes; all have the same device.
        block_mapping: int64 [N, 2], (src, dst), on the caches' device. No dst may occur twice or be another's src.
    """
    _ops.copy_blocks(caches, block_mapping)


def swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    """Copy whole blocks from one cache to another, also between host and GPU (the host side pinned, to be async).

    Args:
        src, dst: tensors of one dtype and one block shape (dimension 0 is the block), contiguous blocks.
        block_mapping: int64 [N, 2] on the CPU, (src block, dst block).
    """
    _ops.swap_blocks(src, dst, block_mapping)


def gather_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    out_start: Tensor,
    total_tokens: int,
    *,
    dtype: torch.dtype | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather sequences out of the cache into dense tensors, dequantised.

    Args:
        out_start: int32 [S], the first output row of each sequence (s * max_len gives a padded batch).
        total_tokens: rows of the outputs; those that no sequence covers are 0.
        dtype: of the outputs, default the cache's own; needed for a quantised cache.

    Returns:
        key, value: [total_tokens, Hkv, D].
    """
    return _ops.gather_cache(
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        out_start,
        total_tokens,
        key_cache.dtype if dtype is None else dtype,
        k_scale,
        v_scale,
    )
