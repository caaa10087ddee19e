"""Decode attention of sequences that begin with the same blocks: `paged_attention_cascade`.

The result is that of `paged_attention` with one query token a sequence. What is said of groups only tells how to get
there: the prefix that a group's sequences share is attended to once for all of them, the rest of each by itself, and
the two are merged by their log-sum-exp. Per step and KV head a prefix of n tokens under r rows is so read once, not r
times, and met by all rows in one matrix product.

A group's prefix is counted in whole blocks and leaves each of its sequences at least one token of its own; what
`prefix_lens` says beyond that is left to the rest. Soft caps, ALiBi and sinks change nothing. A sliding window does:
the rows of a group see different ends of the prefix through it, so a group with a sequence longer than the window is
attended to as if it shared nothing (the window bounds what that costs). And so are float32 queries on CUDA, where the
parts are merged by their LSE, whose rounding float32 would show.

Sources: cascade inference in FlashInfer (Ye et al., 2024), Hydragen (Juravsky et al., 2024, arXiv:2402.05099).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference
from .attention import _outputs, paged_attention_reference

_ops = torch.ops.torch_pagedkv


@define(
    "paged_attention_cascade(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, "
    "Tensor group_start, Tensor group_len, Tensor prefix_lens, SymInt max_group_len, float scale, "
    "Tensor? alibi_slopes=None, int sliding_window=0, float softcap=0.0, Tensor? sinks=None, Tensor? k_scale=None, "
    "Tensor? v_scale=None, bool return_lse=False) -> (Tensor, Tensor)"
)
def _(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    group_start,
    group_len,
    prefix_lens,
    max_group_len,
    scale,
    alibi_slopes=None,
    sliding_window=0,
    softcap=0.0,
    sinks=None,
    k_scale=None,
    v_scale=None,
    return_lse=False,
):
    return _outputs(query, return_lse)


@reference("paged_attention_cascade")
def paged_attention_cascade_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    group_start: Tensor,
    group_len: Tensor,
    prefix_lens: Tensor,
    max_group_len: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`paged_attention`: what is shared changes how the result is computed, not the result."""
    rows = torch.arange(len(seq_lens), dtype=torch.int32, device=seq_lens.device)
    return paged_attention_reference(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        rows,
        torch.ones_like(rows),
        1,
        scale,
        True,
        alibi_slopes,
        sliding_window,
        softcap,
        sinks,
        k_scale,
        v_scale,
        return_lse,
    )


def paged_attention_cascade(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    group_start: Tensor,
    group_len: Tensor,
    prefix_lens: Tensor,
    *,
    max_group_len: int,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode attention over a paged KV cache in which groups of sequences share their first blocks.

    Args:
        query: [S, Hq, D] float32, float16 or bfloat16, unit stride in D; row s is the last token of sequence s.
        key_cache, value_cache, block_tables, seq_lens, k_scale, v_scale: as in `paged_attention`, S sequences.
        group_start, group_len: int32 [G]; group g is the sequences group_start[g] .. + group_len[g]. No sequence is in
            two groups; one that is in none shares nothing.
        prefix_lens: int32 [G], the tokens that a group shares: its rows of `block_tables` begin with the same blocks.
        max_group_len: an upper bound of group_len, known on the host.
        scale: logit scale, default 1 / sqrt(D).
        alibi_slopes, sinks: float32 [Hq] or None.

    Returns:
        out [S, Hq, D] in the query's dtype, and with return_lse also lse, float32 [S, Hq].

    Raises:
        RuntimeError: an argument's shape, dtype, stride or device is not as above; the message names it. On the CPU
            also a group that reaches out of the batch, is longer than `max_group_len`, overlaps another or does not
            begin with the same blocks; CUDA ignores the first two and trusts the caller in the others.
    """
    out, lse = _ops.paged_attention_cascade(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        group_start,
        group_len,
        prefix_lens,
        max_group_len,
        query.shape[-1] ** -0.5 if scale is None else scale,
        alibi_slopes,
        sliding_window,
        softcap,
        sinks,
        k_scale,
        v_scale,
        return_lse,
    )
    return (out, lse) if return_lse else out
