"""Inputs for the attention ops: for opcheck, for compiling, and to compare devices. Those of the other families are in
samples_small.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ops.samples_small import QUANTIZED, Inputs, Sample
from torch import Tensor

from torch_pagedkv.ops import REFERENCES

POISON_BLOCK = 2147480000  # in table entries that must not be read
PAGED = ("paged_attention", "paged_attention_v1", "paged_attention_v2")


@dataclass
class Paged:
    """The arguments of one paged attention call."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    query_len: Tensor
    max_query_len: int
    scale: float
    causal: bool = True
    alibi_slopes: Tensor | None = None
    sliding_window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    return_lse: bool = True

    def args(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def run(self, op: str = "paged_attention", *extra: int) -> tuple[Tensor, Tensor]:
        """Call the kernel."""
        return getattr(torch.ops.torch_pagedkv, op)(*self.args(), *extra)

    def replace(self, **changes: Any) -> Paged:
        """A copy with some arguments changed."""
        return dataclasses.replace(self, **changes)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The float64 result."""
        wide = self.replace(query=self.query.double())
        return REFERENCES["paged_attention"](*wide.args())

    def terms(self) -> Tensor:
        """The float64 result over the values' magnitudes: the size of what is summed, however much cancels."""
        size = self.value_cache.float().abs().to(self.value_cache.dtype)
        return self.replace(value_cache=size).exact()[0]

    def stock(self) -> tuple[Tensor, Tensor]:
        """PyTorch's own result in the query's dtype, float32 lse: gather the blocks, dequantise, attend."""
        out = torch.zeros_like(self.query)
        lse = torch.full(self.query.shape[:2], -math.inf, device=self.query.device)
        block_size = self.key_cache.shape[1]
        for s, (start, rows, length) in enumerate(
            zip(self.query_start.tolist(), self.query_len.tolist(), self.seq_lens.tolist())
        ):
            if rows == 0 or length == 0:
                continue
            blocks = self.block_tables[s, : -(-length // block_size)].long()
            kv = []
            for cache, scales in ((self.key_cache, self.k_scale), (self.value_cache, self.v_scale)):
                x = cache[blocks].to(self.query.dtype)
                if scales is not None:
                    x = x * scales[blocks][..., None].to(self.query.dtype)
                kv.append(x.flatten(0, 1)[:length])
            own = slice(start, start + rows)
            out[own], lse[own] = stock_attention(self, self.query[own], *kv)
        return out, lse


def stock_attention(p: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence [Q, Hq, D], [K, Hkv, D] in its own dtype, as PyTorch users would write it."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (query, *(x.repeat_interleave(group, 1) for x in (key, value))))
    distance = torch.arange(len(key) - len(query), len(key))[:, None] - torch.arange(len(key))
    visible = torch.ones_like(distance, dtype=torch.bool)
    if p.causal:
        visible &= distance >= 0
    if p.sliding_window:
        visible &= (distance if p.causal else distance.abs()) < p.sliding_window
    seen = visible.any(-1)[:, None].to(query.device)
    visible, distance = visible.to(query.device), distance.to(query.device)

    def finish(logits: Tensor) -> Tensor:
        if p.softcap:
            logits = p.softcap * torch.tanh(logits / p.softcap)
        if p.alibi_slopes is not None:
            logits = logits - p.alibi_slopes[:, None, None].to(logits.dtype) * distance
        logits = logits.masked_fill(~visible, -math.inf)
        if p.sinks is not None:
            sinks = p.sinks[:, None, None].expand(-1, len(query), 1).to(logits.dtype)
            logits = torch.cat([logits, sinks], -1)
        return logits

    lse = torch.logsumexp(finish(q.float() @ k.float().transpose(1, 2) * p.scale), -1).T.masked_fill(~seen, -math.inf)
    if not p.softcap and p.alibi_slopes is None and p.sinks is None:
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=p.scale)[0]
    else:
        weights = torch.softmax(finish(q @ k.transpose(1, 2) * p.scale), -1, dtype=torch.float32).to(q.dtype)
        out = weights[..., : len(key)] @ v
    return out.transpose(0, 1).masked_fill(~seen[..., None], 0), lse


def paged(
    device: str,
    seq_lens: Sequence[int] = (70, 1, 37),
    query_lens: Sequence[int] | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    alibi: bool = False,
    sinks: bool = False,
    poison: bool = True,
    gap: int = 0,
    seed: int = 0,
    **options: Any,
) -> Paged:
    """A ragged batch with its blocks scattered over the cache; decode unless `query_lens` says otherwise.

    `poison` puts NaN in every slot and an impossible block id in every table entry that belongs to no sequence; `gap`
    leaves that many rows of the query before each sequence to nobody.
    """
    new = Inputs(device, seed)
    query_lens = [1] * len(seq_lens) if query_lens is None else list(query_lens)
    cache_dtype = cache_dtype or dtype
    counts = [-(-n // block_size) for n in seq_lens]
    blocks = sum(counts) + 2
    width = max(counts) + 2
    k, v, k_scale, v_scale = new.cache(blocks, block_size, kv_heads, d, cache_dtype)
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = k_scale * 0.03, v_scale * 0.03
    order = iter(new.permutation(blocks, sum(counts)).tolist())
    table = [[next(order) for _ in range(n)] + [POISON_BLOCK if poison else 0] * (width - n) for n in counts]
    if poison:
        used = torch.zeros(blocks, block_size, dtype=torch.bool)
        for row, length in zip(table, seq_lens):
            for i in range(length):
                used[row[i // block_size], i % block_size] = True
        used = used.to(device)
        for x in (k, v, k_scale, v_scale):
            if x is not None and x.dtype == torch.float8_e4m3fn:
                x.view(torch.uint8)[~used] = 0x7F  # its NaN
            elif x is not None and x.dtype != torch.int8:
                x[~used] = math.nan
    starts, rows = [], 0
    for n in query_lens:
        starts.append(rows + gap)
        rows += gap + n
    return Paged(
        query=new.normal(rows, heads, d, dtype=dtype),
        key_cache=k,
        value_cache=v,
        block_tables=torch.tensor(table, dtype=torch.int32, device=device).reshape(len(seq_lens), -1),
        seq_lens=new.vector(list(seq_lens), torch.int32),
        query_start=new.vector(starts, torch.int32),
        query_len=new.vector(query_lens, torch.int32),
        max_query_len=max(query_lens, default=0),
        scale=d**-0.5,
        alibi_slopes=new.normal(heads).abs() * 0.1 if alibi else None,
        sinks=new.normal(heads) if sinks else None,
        k_scale=k_scale,
        v_scale=v_scale,
        **options,
    )


@dataclass
class Cascade:
    """A decode step in which groups of sequences share their first blocks: the plain problem, and the groups."""

    plain: Paged
    group_start: Tensor
    group_len: Tensor
    prefix_lens: Tensor
    max_group_len: int

    def args(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        p = self.plain
        paged = (p.query, p.key_cache, p.value_cache, p.block_tables, p.seq_lens)
        features = (p.alibi_slopes, p.sliding_window, p.softcap, p.sinks, p.k_scale, p.v_scale, p.return_lse)
        return *paged, self.group_start, self.group_len, self.prefix_lens, self.max_group_len, p.scale, *features

    def run(self) -> tuple[Tensor, Tensor]:
        """Call the kernel."""
        return torch.ops.torch_pagedkv.paged_attention_cascade(*self.args())

    def replace(self, **changes: Any) -> Cascade:
        """A copy with some arguments changed, of the groups or of the plain problem."""
        own = {f.name for f in dataclasses.fields(self)}
        plain = self.plain.replace(**{name: x for name, x in changes.items() if name not in own})
        return dataclasses.replace(self, plain=plain, **{name: x for name, x in changes.items() if name in own})


def cascade(device: str, groups: Sequence[tuple[int, int]], own: Sequence[int], **options: Any) -> Cascade:
    """Groups of so many sequences that share so many tokens, then sequences that share nothing.

    `own`: the tokens of each sequence beside those. In blocks that nobody reads any more, as the first member's serve
    all, there is NaN unless `poison` is False.
    """
    members = [(g, tokens) for g, (n, tokens) in enumerate(groups) for _ in range(n)]
    shared = [tokens for _, tokens in members] + [0] * (len(own) - len(members))
    p = paged(device, [a + b for a, b in zip(shared, own)], **options)
    size = p.key_cache.shape[1]
    starts = [sum(n for n, _ in groups[:g]) for g in range(len(groups))]
    for s, (g, tokens) in enumerate(members):
        blocks = p.block_tables[s, : tokens // size]
        if s != starts[g]:
            for x in (p.key_cache, p.value_cache, p.k_scale, p.v_scale):
                if x is not None and x.is_floating_point() and x.element_size() > 1 and options.get("poison", True):
                    x[blocks.long()] = math.nan
            p.block_tables[s, : len(blocks)] = p.block_tables[starts[g], : len(blocks)].clone()
    ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in zip(*groups)] or [p.seq_lens[:0]] * 2
    group_start = torch.tensor(starts, dtype=torch.int32, device=device)
    return Cascade(p, group_start, ints[0], ints[1], max((n for n, _ in groups), default=0))


@dataclass
class Dense:
    """The arguments of one flash_attention call."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_start: Tensor
    query_len: Tensor
    key_start: Tensor
    key_len: Tensor
    max_query_len: int
    max_key_len: int
    scale: float
    causal: bool = True
    alibi_slopes: Tensor | None = None
    sliding_window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    return_lse: bool = True

    def args(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def run(self) -> tuple[Tensor, Tensor]:
        """Call the kernel."""
        return torch.ops.torch_pagedkv.flash_attention(*self.args())

    def replace(self, **changes: Any) -> Dense:
        """A copy with some arguments changed."""
        return dataclasses.replace(self, **changes)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The float64 result."""
        return REFERENCES["flash_attention"](*self.replace(query=self.query.double()).args())

    def terms(self) -> Tensor:
        """The float64 result over the values' magnitudes: the size of what is summed, however much cancels."""
        return self.replace(value=self.value.abs()).exact()[0]

    def stock(self) -> tuple[Tensor, Tensor]:
        """PyTorch's own result in the query's dtype, float32 lse."""
        out = torch.zeros_like(self.query)
        lse = torch.full(self.query.shape[:2], -math.inf, device=self.query.device)
        places = zip(*(x.tolist() for x in (self.query_start, self.query_len, self.key_start, self.key_len)))
        for q0, rows, k0, length in places:
            if rows and length:
                own, keys = slice(q0, q0 + rows), slice(k0, k0 + length)
                out[own], lse[own] = stock_attention(self, self.query[own], self.key[keys], self.value[keys])
        return out, lse


def dense(
    device: str,
    key_lens: Sequence[int] = (40, 3),
    query_lens: Sequence[int] | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 64,
    dtype: torch.dtype = torch.float32,
    alibi: bool = False,
    sinks: bool = False,
    seed: int = 0,
    **options: Any,
) -> Dense:
    """A packed ragged batch; as many queries as keys unless `query_lens` says otherwise."""
    new = Inputs(device, seed)
    query_lens = list(key_lens if query_lens is None else query_lens)
    key_starts, query_starts = ([sum(lens[:i]) for i in range(len(lens))] for lens in (key_lens, query_lens))
    return Dense(
        query=new.normal(sum(query_lens), heads, d, dtype=dtype),
        key=new.normal(sum(key_lens), kv_heads, d, dtype=dtype),
        value=new.normal(sum(key_lens), kv_heads, d, dtype=dtype),
        query_start=new.vector(query_starts, torch.int32),
        query_len=new.vector(query_lens, torch.int32),
        key_start=new.vector(key_starts, torch.int32),
        key_len=new.vector(list(key_lens), torch.int32),
        max_query_len=max(query_lens, default=0),
        max_key_len=max(key_lens, default=0),
        scale=d**-0.5,
        alibi_slopes=new.normal(heads).abs() * 0.1 if alibi else None,
        sinks=new.normal(heads) if sinks else None,
        **options,
    )


def samples(device: str) -> Iterator[Sample]:
    """Yield (op name, args, kwargs) for `torch.ops.torch_pagedkv`, fresh tensors each time."""
    plain: dict[str, Any] = {"seq_lens": (21, 0, 9), "d": 32, "block_size": 8, "poison": False}
    for op in PAGED:
        extra: dict[str, Any] = {"num_splits": 2} if op == "paged_attention_v2" else {}
        if op == "paged_attention":
            yield op, paged(device, **plain).args(), {"batch_invariant": True}
        for dtype in (torch.float32, torch.bfloat16):
            yield op, paged(device, dtype=dtype, **plain).args(), extra
        prefill = paged(device, query_lens=(12, 0, 9), sliding_window=7, alibi=True, sinks=True, softcap=8.0, **plain)
        yield op, prefill.replace(return_lse=False).args(), extra
        for cache_dtype in QUANTIZED:
            yield op, paged(device, dtype=torch.float16, cache_dtype=cache_dtype, **plain).args(), extra
    for dtype, cache_dtype in ((torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.int8)):
        problem = cascade(
            device,
            ((3, 32), (2, 8)),
            (9, 1, 5, 30, 2, 7),
            d=32,
            block_size=8,
            dtype=dtype,
            cache_dtype=cache_dtype,
            poison=False,
        )
        yield "paged_attention_cascade", problem.args(), {}
    features = problem.replace(sliding_window=60, softcap=8.0, return_lse=False)
    yield "paged_attention_cascade", features.args(), {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield "flash_attention", dense(device, d=32, dtype=dtype).args(), {}
        new = Inputs(device)
        a, b = new.normal(3, 4, 16, dtype=dtype), new.normal(3, 4, 16, dtype=dtype)
        yield "merge_attention_states", (a, new.normal(3, 4), b, new.normal(3, 4)), {}
    window = dense(device, (40, 3), (9, 5), d=32, causal=False, sliding_window=6, sinks=True)
    yield "flash_attention", window.replace(return_lse=False).args(), {}
