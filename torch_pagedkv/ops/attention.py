"""Attention over a paged KV cache (`paged_attention`, V1, V2), over dense tensors (`flash_attention`), and the merge
of partial results.

Shared conventions
    query           [T, Hq, D]; rows packed. Sequence s owns rows query_start[s] .. query_start[s] + query_len[s], so a
                    left-padded batch [B, Q] is read in place: query_start = b * Q + pad, query_len = Q - pad. Rows that
                    no sequence owns come back as 0.
    positions       the last query row of a sequence sits at KV position seq_len - 1 (bottom-right alignment).
    heads           query head h reads KV head h // (Hq // Hkv); Hq is a multiple of Hkv.
    logits          l = scale * q.k;  softcap > 0: l = softcap * tanh(l / softcap);
                    ALiBi: l += slope[h] * (key position - query position);
                    causal: key position <= query position; sliding_window = W > 0: query - key position < W (with
                    causal=False the window has two sides: |query - key position| < W);
                    sinks: one more logit sinks[h] a head, in the denominator only.
    lse             natural log of the sum of exponentials (sink included), float32 [T, Hq]; -inf where nothing is seen.
    empty           no visible key: output 0, never NaN. A negative length counts as 0.
    quantised cache int8 or float8_e4m3fn with float32 scales [num_blocks, block_size, Hkv]: value = stored * scale.

Sources: PagedAttention (Kwon et al., 2023, arXiv:2309.06180); online softmax and split-KV (Dao et al., FlashAttention,
arXiv:2205.14135, FlashAttention-2, arXiv:2307.08691, Flash-Decoding, 2023); ALiBi (Press et al., arXiv:2108.12409);
attention sinks as a learned logit (gpt-oss, 2025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._library import define, reference

HEAD_DIMS = (32, 64, 80, 96, 112, 120, 128, 192, 256)  # tested on every backend; any multiple of 8 up to 256 runs
BLOCK_SIZES = (8, 16, 32, 64, 128)

_ops = torch.ops.torch_pagedkv

_PAGED_ARGS = (
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, Tensor query_start, "
    "Tensor query_len, SymInt max_query_len, float scale, bool causal=True, Tensor? alibi_slopes=None, "
    "int sliding_window=0, float softcap=0.0, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "bool return_lse=False"
)


def _outputs(query: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    rows = query.shape[0] if return_lse else 0
    return query.new_empty(query.shape), query.new_empty((rows, query.shape[1]), dtype=torch.float32)


@define(f"paged_attention({_PAGED_ARGS}, bool batch_invariant=False) -> (Tensor, Tensor)")
@define(f"paged_attention_v1({_PAGED_ARGS}) -> (Tensor, Tensor)")
@define(f"paged_attention_v2({_PAGED_ARGS}, int num_splits=0) -> (Tensor, Tensor)")
def _(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    query_start,
    query_len,
    max_query_len,
    scale,
    causal=True,
    alibi_slopes=None,
    sliding_window=0,
    softcap=0.0,
    sinks=None,
    k_scale=None,
    v_scale=None,
    return_lse=False,
    batch_invariant=False,
    num_splits=0,
):
    return _outputs(query, return_lse)


@define(
    "flash_attention(Tensor query, Tensor key, Tensor value, Tensor query_start, Tensor query_len, Tensor key_start, "
    "Tensor key_len, SymInt max_query_len, SymInt max_key_len, float scale, bool causal=True, "
    "Tensor? alibi_slopes=None, int sliding_window=0, float softcap=0.0, Tensor? sinks=None, bool return_lse=False) "
    "-> (Tensor, Tensor)"
)
def _(
    query,
    key,
    value,
    query_start,
    query_len,
    key_start,
    key_len,
    max_query_len,
    max_key_len,
    scale,
    causal=True,
    alibi_slopes=None,
    sliding_window=0,
    softcap=0.0,
    sinks=None,
    return_lse=False,
):
    return _outputs(query, return_lse)


@define("merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")
def _(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a, memory_format=torch.contiguous_format), lse_a.new_empty(lse_a.shape)


# ------------------------------------------------------------------------------------------------ references


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    sliding_window: int,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence in float64: query [Q, Hq, D], key and value [K, Hkv, D] -> out [Q, Hq, D], lse [Q, Hq]."""
    q_len, heads, _ = query.shape
    k_len, kv_heads, _ = key.shape
    key = key.repeat_interleave(heads // kv_heads, 1)
    value = value.repeat_interleave(heads // kv_heads, 1)
    logits = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    q_pos = torch.arange(k_len - q_len, k_len, device=query.device)[:, None]
    distance = q_pos - torch.arange(k_len, device=query.device)[None]
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.double()[:, None, None] * distance
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if sliding_window > 0:
        visible &= (distance if causal else distance.abs()) < sliding_window
    logits = logits.masked_fill(~visible, -math.inf)
    all_logits = logits
    if sinks is not None:
        all_logits = torch.cat([logits, sinks.double()[:, None, None].expand(heads, q_len, 1)], -1)
    lse = torch.logsumexp(all_logits, -1)  # [Hq, Q]; -inf for an empty row
    weights = torch.exp(logits - torch.where(lse.isinf(), 0.0, lse)[..., None])
    seen = visible.any(-1)  # a row that sees nothing has output 0 and lse -inf, sink or not
    out = torch.einsum("hqk,khd->qhd", weights, value) * seen[:, None, None]
    return out, lse.transpose(0, 1).masked_fill(~seen[:, None], -math.inf)


@reference("paged_attention")
def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    query_len: Tensor,
    max_query_len: int,
    scale: float,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """The contract in plain PyTorch and float64: gather each sequence's blocks, dequantise, attend."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float64, device=query.device)
    block_size = key_cache.shape[1]
    for s in range(seq_lens.shape[0]):
        start, rows, length = int(query_start[s]), int(query_len[s]), int(seq_lens[s])
        if rows <= 0 or length <= 0:
            continue
        blocks = block_tables[s, : -(-length // block_size)].long()

        def dense(cache: Tensor, scales: Tensor | None, blocks: Tensor = blocks, length: int = length) -> Tensor:
            x = cache[blocks].double()
            if scales is not None:
                x = x * scales[blocks].double()[..., None]
            return x.flatten(0, 1)[:length]

        out[start : start + rows], lse[start : start + rows] = _attend(
            query[start : start + rows].double(),
            dense(key_cache, k_scale),
            dense(value_cache, v_scale),
            scale,
            causal,
            alibi_slopes,
            sliding_window,
            softcap,
            sinks,
        )
    return out.to(query.dtype), lse.float() if return_lse else lse.new_empty((0, lse.shape[1]), dtype=torch.float32)


reference("paged_attention_v1")(paged_attention_reference)
reference("paged_attention_v2")(paged_attention_reference)


@reference("flash_attention")
def flash_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    query_len: Tensor,
    key_start: Tensor,
    key_len: Tensor,
    max_query_len: int,
    max_key_len: int,
    scale: float,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The dense contract in plain PyTorch and float64."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float64, device=query.device)
    for s in range(query_start.shape[0]):
        q0, rows, k0, length = (int(t[s]) for t in (query_start, query_len, key_start, key_len))
        if rows <= 0 or length <= 0:
            continue
        out[q0 : q0 + rows], lse[q0 : q0 + rows] = _attend(
            query[q0 : q0 + rows].double(),
            key[k0 : k0 + length].double(),
            value[k0 : k0 + length].double(),
            scale,
            causal,
            alibi_slopes,
            sliding_window,
            softcap,
            sinks,
        )
    return out.to(query.dtype), lse.float() if return_lse else lse.new_empty((0, lse.shape[1]), dtype=torch.float32)


@reference("merge_attention_states")
def merge_attention_states_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean of two partial results by their share of the sum of exponentials, in float64."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    base = torch.where(lse.isinf(), 0.0, lse)
    w_a, w_b = torch.exp(lse_a.double() - base)[..., None], torch.exp(lse_b.double() - base)[..., None]
    # an empty side may hold anything, NaN included: 0 * NaN must not reach the result
    part_a = torch.where(w_a > 0, w_a * out_a.double(), 0.0)
    part_b = torch.where(w_b > 0, w_b * out_b.double(), 0.0)
    return (part_a + part_b).to(out_a.dtype), lse.float()


# ------------------------------------------------------------------------------------------------ public functions


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    query_len: Tensor,
    *,
    max_query_len: int,
    scale: float | None = None,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    version: int | None = None,
    num_splits: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed queries over a paged KV cache. The module's docstring gives the conventions.

    Args:
        query: [T, Hq, D] float32, float16 or bfloat16; unit stride in D.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D]; the query's dtype, int8 or float8_e4m3fn; any strides
            that are multiples of 8 elements, unit stride in D. block_size a power of two from 8 to 128.
        block_tables: int32 [S, max_blocks]; entries past a sequence's length are never read into the result.
        seq_lens: int32 [S], KV length of each sequence, this call's tokens included.
        query_start, query_len: int32 [S], each sequence's rows in `query`.
        max_query_len: an upper bound of query_len, known on the host; 1 means decode.
        scale: logit scale, default 1 / sqrt(D).
        alibi_slopes, sinks: float32 [Hq] or None.
        k_scale, v_scale: float32 [num_blocks, block_size, Hkv], with an int8 or fp8 cache and only then.
        batch_invariant: a sequence's results are the same to the bit whatever else is in the batch: partitions of its
            keys and the choice of kernel depend on its own lengths alone. Takes a workspace for all partitions of the
            longest sequence that the tables can hold, times the sequences; only with version None.
        version: None picks; 1 is one pass over the keys, 2 is split-KV partitions and a combine.
        num_splits: with version 2, a fixed number of partitions; 0 plans them from the lengths, on the device.

    Returns:
        out [T, Hq, D] in the query's dtype, and with return_lse also lse, float32 [T, Hq].

    Raises:
        RuntimeError: an argument's shape, dtype, stride or device is not as above; the message names it.
    """
    args = (
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        query_start,
        query_len,
        max_query_len,
        query.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        alibi_slopes,
        sliding_window,
        softcap,
        sinks,
        k_scale,
        v_scale,
        return_lse,
    )
    if version is not None and batch_invariant:
        raise ValueError(f"batch_invariant: got True with version {version!r}, needs version None")
    if version is None:
        out, lse = _ops.paged_attention(*args, batch_invariant)
    elif version == 1:
        out, lse = _ops.paged_attention_v1(*args)
    elif version == 2:
        out, lse = _ops.paged_attention_v2(*args, num_splits)
    else:
        raise ValueError(f"version: got {version!r}, needs None, 1 or 2")
    return (out, lse) if return_lse else out


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_query_len: int | None = None,
    max_key_len: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention in O(N) memory, for calls without a cache. The module's docstring gives the conventions.

    Args:
        query, key, value: packed [T, Hq, D], [K, Hkv, D], [K, Hkv, D] with cu_seqlens_q and cu_seqlens_k
            (int32 [S + 1], cumulative, starting at 0) and the two maxima; or a batch [B, Q, Hq, D], [B, K, Hkv, D],
            [B, K, Hkv, D] without them.

    Returns:
        out, shaped as `query`; with return_lse also lse, float32 [..., Hq].
    """
    shape = query.shape
    if query.dim() == 4:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q, cu_seqlens_k: got them with a 4-D query, they need a packed 3-D one")
        batch, max_query_len, max_key_len = shape[0], shape[1], key.shape[1]
        index = torch.arange(batch, dtype=torch.int32, device=query.device)
        query_start, query_len = index * max_query_len, torch.full_like(index, max_query_len)
        key_start, key_len = index * max_key_len, torch.full_like(index, max_key_len)
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    else:
        if cu_seqlens_q is None or cu_seqlens_k is None or max_query_len is None or max_key_len is None:
            raise ValueError("a packed query needs cu_seqlens_q, cu_seqlens_k, max_query_len and max_key_len")
        query_start, query_len = cu_seqlens_q[:-1], cu_seqlens_q.diff()
        key_start, key_len = cu_seqlens_k[:-1], cu_seqlens_k.diff()
    out, lse = _ops.flash_attention(
        query,
        key,
        value,
        query_start,
        query_len,
        key_start,
        key_len,
        max_query_len,
        max_key_len,
        shape[-1] ** -0.5 if scale is None else scale,
        causal,
        alibi_slopes,
        sliding_window,
        softcap,
        sinks,
        return_lse,
    )
    out = out.view(shape)
    return (out, lse.view(shape[:-1])) if return_lse else out


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attention results over disjoint key sets.

    Args:
        out_a, out_b: [T, H, D], one dtype. lse_a, lse_b: float32 [T, H], natural log; -inf marks an empty side, whose
            output is then not read.

    Returns:
        out [T, H, D] and lse float32 [T, H] of the union; 0 and -inf where both sides are empty.
    """
    return _ops.merge_attention_states(out_a, lse_a, out_b, lse_b)
