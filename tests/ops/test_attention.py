"""Attention against float64, at most twice PyTorch's own error; exact where the arithmetic allows it; bad arguments."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, assert_as_accurate, same_bits
from ops.samples import PAGED, POISON_BLOCK, Dense, Paged, dense, paged
from ops.samples_small import QUANTIZED, Inputs
from torch import Tensor
from torch._dynamo.utils import counters

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES
from torch_pagedkv.ops.attention import BLOCK_SIZES, HEAD_DIMS

relaxed = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
VERSIONS = [("paged_attention", ()), ("paged_attention_v1", ()), ("paged_attention_v2", (3,))]


def assert_accurate(got: Tensor, stock: Tensor, exact: Tensor, terms: float = 0.0, summed: float = 0.0) -> None:
    """As `assert_as_accurate`; in float32, where both differ from float64 by a few roundings, the largest error may be
    4 of them at the largest entry, as it is a matter of luck, and their root mean square one.

    `terms`: size of the terms that were summed, for results near 0 that PyTorch may hit exactly by luck; `summed`: the
    same for the largest error alone, where terms of both signs cancel.
    """
    if got.dtype != torch.float32:
        return assert_as_accurate(got, stock, exact)
    assert got.shape == exact.shape
    error, stock_error = ((x.double() - exact.double()).abs() for x in (got, stock))
    if exact.numel():
        step = torch.finfo(torch.float32).eps * exact.double().abs().max().clamp_min(terms)
        largest = torch.finfo(torch.float32).eps * exact.double().abs().max().clamp_min(max(terms, summed))
        assert error.max() <= torch.maximum(2 * stock_error.max(), 4 * largest)
        assert error.square().mean().sqrt() <= torch.maximum(2 * stock_error.square().mean().sqrt(), step)


def check(problem: Paged | Dense, *results: tuple[Tensor, Tensor]) -> None:
    """Outputs and lse are as accurate as PyTorch's, and finite wherever something is seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's small steps lose far more to waiting for threads than they gain
    (exact, exact_lse), (stock, stock_lse) = problem.exact(), problem.stock()
    summed = float(problem.terms().max()) if exact.numel() and problem.query.dtype == torch.float32 else 0.0
    torch.set_num_threads(threads)
    seen = ~exact_lse.isinf()
    for out, lse in results:
        assert out.dtype == problem.query.dtype
        assert lse.dtype == torch.float32
        assert_accurate(out, stock, exact, summed=summed)
        assert torch.equal(~lse.isinf(), seen)
        assert_accurate(lse[seen], stock_lse[seen], exact_lse[seen], terms=1.0)  # the largest exponential
        assert not out[~seen].any()


def check_all(problem: Paged) -> None:
    """Each version of paged attention on one problem."""
    check(problem, *(problem.run(op, *extra) for op, extra in VERSIONS))


def check_dense(problem: Dense) -> None:
    """flash_attention on one problem."""
    check(problem, problem.run())


# ---- against the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_head_dims(device: str, d: int, dtype: torch.dtype) -> None:
    """Decode and prefill of every head size."""
    check_all(paged(device, d=d, dtype=dtype))
    check_all(paged(device, (150, 33), (30, 33), d=d, dtype=dtype))


@pytest.mark.parametrize("d", [8, 16, 24, 40, 56, 72, 88, 104, 136, 160, 200, 216, 248])
def test_other_head_dims(device: str, d: int) -> None:
    """Any multiple of 8."""
    for dtype in FLOATS:
        check_all(paged(device, (40, 9), d=d, dtype=dtype))
        check_all(paged(device, (40, 9), (20, 9), d=d, dtype=dtype))


@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes_and_cache_dtypes(device: str, block_size: int, cache_dtype: torch.dtype | None) -> None:
    for dtype in FLOATS:
        options = {"block_size": block_size, "dtype": dtype, "cache_dtype": cache_dtype, "d": 80}
        check_all(paged(device, (300, 128, 5), **options))
        check_all(paged(device, (300, 128, 5), (40, 128, 1), **options))


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_head_dims_of_8_bit_caches(device: str, d: int, cache_dtype: torch.dtype) -> None:
    """Up to 8 rows a KV head and up to 16 of them, keys enough for each warp to have several blocks."""
    for dtype in FLOATS:
        for query_lens, heads in ((None, 2), (None, 14), ((3, 1, 2), 8)):
            check_all(paged(device, (450, 1, 97), query_lens, heads=heads, d=d, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("way", ["rising", "falling", "signs", "zeros"])
def test_8_bit_scales_of_any_size(device: str, way: str, cache_dtype: torch.dtype) -> None:
    """Scales that change along the sequence, so that maxima move late, soon or never; a query whose sum is large."""
    for dtype in (torch.float16, torch.bfloat16):
        p = paged(device, (700, 40), dtype=dtype, d=128, heads=8, cache_dtype=cache_dtype)
        p = p.replace(query=p.query.abs())
        assert p.k_scale is not None and p.v_scale is not None
        for s, length in enumerate(p.seq_lens.tolist()):
            at = torch.arange(length, device=device)
            slots = (p.block_tables[s].long()[at // 16], at % 16)
            rising = torch.logspace(-4, 0.5, length, device=device)[:, None]
            factor = {
                "rising": rising,
                "falling": rising.flip(0),
                "signs": 1.0 - 2.0 * (at % 3 == 1)[:, None],
                "zeros": (at >= length - 3).float()[:, None],
            }[way]
            if way != "zeros":
                p.k_scale[slots] *= factor
            p.v_scale[slots] *= factor
        check_all(p)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (9, 3), (8, 2), (7, 1), (14, 2), (8, 1), (20, 1), (71, 1)])
def test_grouped_heads(device: str, heads: int, kv_heads: int) -> None:
    """GQA groups of 1, 3, 4, 7 and 8, and MQA up to Falcon's 71."""
    for dtype in (torch.float32, torch.bfloat16):
        check_all(paged(device, heads=heads, kv_heads=kv_heads, dtype=dtype))
        check_all(paged(device, query_lens=(20, 1, 5), heads=heads, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"alibi": True},
        {"sliding_window": 1},
        {"sliding_window": 20},
        {"sliding_window": 20, "causal": False},
        {"causal": False},
        {"softcap": 3.0},
        {"softcap": 50.0, "sliding_window": 64},
        {"sinks": True},
        {"sinks": True, "sliding_window": 33, "alibi": True, "softcap": 20.0},
        {"scale": 0.7},
        {"scale": -0.3},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_features(device: str, options: dict[str, Any]) -> None:
    changes = {"scale": options["scale"]} if "scale" in options else {}
    options = {k: v for k, v in options.items() if k != "scale"}
    for dtype in FLOATS:
        for lens in (None, (70, 40, 2)):
            check_all(paged(device, (290, 170, 2), lens, dtype=dtype, heads=6, **options).replace(**changes))
        check_dense(dense(device, (290, 2), (40, 2), dtype=dtype, heads=6, **options).replace(**changes))
    check_all(paged(device, (290, 170, 2), dtype=torch.float16, cache_dtype=torch.int8, **options).replace(**changes))


@pytest.mark.parametrize("softcap", [0.0, 50.0])
@pytest.mark.parametrize("d", [64, 128])
def test_many_heads(device: str, d: int, softcap: float) -> None:
    """More work than a device has processors for. Logits need not be as exact as float32 without an lse."""
    for dtype in (torch.float16, torch.bfloat16):
        p = paged(device, (200, 9), (96, 5), d=d, dtype=dtype, heads=140, kv_heads=70, softcap=softcap)
        check(p, p.run())
        assert_accurate(p.replace(return_lse=False).run()[0], p.stock()[0], p.exact()[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_long(device: str, dtype: torch.dtype) -> None:
    """Thousands of keys, also in fixed and in planned partitions."""
    problem = paged(device, (4000, 17, 1030), dtype=dtype, d=32)
    partitions = (problem.run("paged_attention_v2", splits) for splits in (0, 1, 2, 7, 64))
    check(problem, problem.run(), problem.run("paged_attention_v1"), *partitions)
    check_all(paged(device, (900, 700), (500, 700), dtype=dtype, d=32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_flash(device: str, dtype: torch.dtype) -> None:
    for lens, query_lens in [((40, 3, 300), None), ((1, 200, 64), (1, 20, 64)), ((5, 9), (9, 20)), ((500,), (400,))]:
        for causal in (True, False):
            check_dense(dense(device, lens, query_lens, dtype=dtype, causal=causal))


@relaxed
@given(
    lens=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1), (9, 3)]),
    d=st.integers(1, 32).map(lambda n: 8 * n),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(FLOATS),
    cache_dtype=st.sampled_from([None, *QUANTIZED]),
    causal=st.booleans(),
    alibi=st.booleans(),
    sinks=st.booleans(),
    sliding_window=st.sampled_from([0, 0, 1, 9, 100]),
    softcap=st.sampled_from([0.0, 0.0, 30.0]),
    gap=st.integers(0, 3),
    splits=st.integers(0, 9),
)
def test_any_shape(
    device: str, lens: list[tuple[int, int]], heads: tuple[int, int], splits: int, **options: Any
) -> None:
    """All of the contract at random: empty sequences, no queries, more queries than keys, rows of nobody."""
    seq_lens, query_lens = [n for n, _ in lens], [q for _, q in lens]
    problem = paged(device, seq_lens, query_lens, heads=heads[0], kv_heads=heads[1], **options)
    check(problem, problem.run(), problem.run("paged_attention_v2", splits))


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_hot_weights_copy_the_value(
    device: str, dtype: torch.dtype, cache_dtype: torch.dtype | None, rows: int
) -> None:
    """A softmax that is exactly 1 at one key returns that key's value to the bit, whatever the page and the scale."""
    lens, d = (64, 50), 64
    p = paged(device, lens, (rows, rows), heads=4, d=d, dtype=dtype, cache_dtype=cache_dtype, causal=False)
    identity = torch.eye(d, device=device)
    chosen = torch.arange(p.query.shape[0] * 4, device=device).view(-1, 4) * 7 % 50
    for s, n in enumerate(lens):
        for i in range(n):
            block, slot = int(p.block_tables[s, i // 16]), i % 16
            p.key_cache[block, slot] = (identity[i] * 64).to(p.key_cache.dtype)
            if p.k_scale is not None and p.v_scale is not None:
                p.k_scale[block, slot], p.v_scale[block, slot] = 0.5, 2.0 ** (i % 5 - 2)
    out, lse = p.replace(query=identity[chosen].to(dtype) * 256, scale=1.0).run()
    for s in range(2):
        for row in range(s * rows, (s + 1) * rows):
            for h in range(4):
                i = int(chosen[row, h])
                block, slot = int(p.block_tables[s, i // 16]), i % 16
                value = p.value_cache[block, slot, h // 2].float()
                if p.v_scale is not None:
                    value = value * p.v_scale[block, slot, h // 2]
                assert torch.equal(out[row, h], value.to(dtype))
    assert torch.equal(lse, torch.full_like(lse, 256.0 * 64 * (0.5 if cache_dtype else 1)))


@pytest.mark.parametrize("op, extra", VERSIONS)
@pytest.mark.parametrize("query_lens", [(1, 1, 1), (30, 1, 20)])
def test_pages_may_lie_anywhere(device: str, query_lens: tuple[int, ...], op: str, extra: tuple[int, ...]) -> None:
    """Another order of the blocks, and other entries in the unused ends of the table, change no bit."""
    for cache_dtype in (torch.bfloat16, *QUANTIZED):
        p = paged(device, query_lens=query_lens, dtype=torch.bfloat16, cache_dtype=cache_dtype)
        order = torch.randperm(p.key_cache.shape[0]).to(device)
        table = p.block_tables.clone()
        used = table != POISON_BLOCK
        table[used] = order.argsort()[table[used].long()].int()
        table[~used] = -7
        changes: dict[str, Any] = {"block_tables": table}
        for name in ("key_cache", "value_cache", "k_scale", "v_scale"):
            x = getattr(p, name)
            changes[name] = (
                x if x is None else x.view(torch.int8 if x.element_size() == 1 else x.dtype)[order].view(x.dtype)
            )
        assert all(map(same_bits, p.run(op, *extra), p.replace(**changes).run(op, *extra)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(device: str, dtype: torch.dtype) -> None:
    """A query that is a slice of a fused projection, caches interleaved or with the heads outside: the same bits."""
    for query_lens in ((1, 1, 1), (30, 1, 20)):
        p = paged(device, query_lens=query_lens, dtype=dtype)
        wide = torch.cat([p.query, p.query.flip(0)], 1)[:, :4]
        both = torch.stack([p.key_cache, p.value_cache], 1)
        heads_outside = p.value_cache.transpose(1, 2).contiguous().transpose(1, 2)
        strided = p.replace(query=wide, key_cache=both[:, 0], value_cache=both[:, 1])
        assert all(map(same_bits, p.run(), strided.run()))
        assert all(map(same_bits, p.run(), strided.replace(value_cache=heads_outside).run()))
    f = dense(device, dtype=dtype)
    both = torch.stack([f.key, f.value], 1)
    strided_dense = f.replace(query=torch.cat([f.query, f.query], 1)[:, :4], key=both[:, 0], value=both[:, 1])
    assert all(map(same_bits, f.run(), strided_dense.run()))


@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
def test_unaligned_query(device: str, cache_dtype: torch.dtype | None) -> None:
    """Rows of the query that start at any element: the same bits."""
    for d in (64, 200):
        p = paged(device, dtype=torch.bfloat16, cache_dtype=cache_dtype, d=d)
        for offset in (1, 2):
            wide = torch.zeros(*p.query.shape[:2], d + 3, dtype=p.query.dtype, device=device)[..., offset : offset + d]
            assert all(map(same_bits, p.run(), p.replace(query=wide.copy_(p.query)).run()))


def alone(p: Paged, s: int) -> tuple[Paged, slice]:
    """Sequence s of a batch without the others, and its rows."""
    one, start, rows = slice(s, s + 1), int(p.query_start[s]), int(p.query_len[s])
    problem = p.replace(
        query=p.query[start : start + rows].clone(),
        block_tables=p.block_tables[one, : -(-int(p.seq_lens[s]) // p.key_cache.shape[1])].clone(),
        seq_lens=p.seq_lens[one],
        query_start=torch.zeros_like(p.query_start[one]),
        query_len=p.query_len[one],
        max_query_len=rows,
    )
    return problem, slice(start, start + rows)


@pytest.mark.parametrize("query_lens", [None, (1, 40, 3, 1, 200)])
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
def test_batch_invariant(device: str, cache_dtype: torch.dtype | None, query_lens: tuple[int, ...] | None) -> None:
    """A sequence's bits are the same alone, and among any others; the results are as accurate as without the option."""
    lens = (1030, 70, 3, 2100, 513)
    for dtype in FLOATS:
        for heads, kv_heads in ((4, 2), (2, 2), (20, 1)):
            options = {"heads": heads, "kv_heads": kv_heads, "dtype": dtype, "cache_dtype": cache_dtype, "d": 32}
            p = paged(device, lens, query_lens, **options)
            out, lse = p.run("paged_attention", True)
            check(p, (out, lse))
            for s in range(len(lens)):
                one, rows = alone(p, s)
                assert all(map(same_bits, one.run("paged_attention", True), (out[rows], lse[rows])))
            more = 30  # of the longest sequence beside the others
            index = torch.tensor([3] * more + [4, 2, 1, 0], device=device)
            crowd = p.replace(
                query=torch.cat([p.query, p.query[:1].expand(more, -1, -1)]),
                block_tables=p.block_tables[index],
                seq_lens=p.seq_lens[index],
                query_start=torch.cat(
                    [len(p.query) + torch.arange(more, device=device), p.query_start[index[more:]]]
                ).int(),
                query_len=torch.cat([torch.ones(more, device=device), p.query_len[index[more:]]]).int(),
            )
            crowd_out, crowd_lse = crowd.run("paged_attention", True)
            for s in (0, 1, 2, 4):
                _, rows = alone(p, s)
                assert all(map(same_bits, (crowd_out[rows], crowd_lse[rows]), (out[rows], lse[rows])))


def test_left_padded_batch_is_read_in_place(device: str) -> None:
    """Pad rows belong to nobody and come back as 0 even though the query holds NaN there."""
    lens, width = (20, 7, 1), 20
    packed = paged(device, lens, lens)
    pads = [width - n for n in lens]
    query = torch.full((3 * width, 4, 64), math.nan, device=device)
    start = torch.tensor([b * width + pad for b, pad in enumerate(pads)], dtype=torch.int32, device=device)
    own = [slice(b * width + pad, (b + 1) * width) for b, pad in enumerate(pads)]
    rows = [slice(sum(lens[:b]), sum(lens[: b + 1])) for b in range(3)]
    for b in range(3):
        query[own[b]] = packed.query[rows[b]]
    out, lse = packed.replace(query=query, query_start=start).run()
    wanted, wanted_lse = packed.run()
    for b in range(3):
        assert same_bits(out[own[b]], wanted[rows[b]])
        assert same_bits(lse[own[b]], wanted_lse[rows[b]])
        assert not out[b * width : b * width + pads[b]].any()
        assert lse[b * width : b * width + pads[b]].eq(-math.inf).all()


@pytest.mark.parametrize("op, extra", VERSIONS)
def test_nothing_to_see(device: str, op: str, extra: tuple[int, ...]) -> None:
    """Empty sequences, queries before the first key, no sequence at all: 0 and -inf, also beside sinks."""
    out, lse = paged(device, (0, 3, 0), (2, 8, 0), sinks=True).run(op, *extra)
    assert not out[:7].any()
    assert lse[:7].eq(-math.inf).all()
    assert out[7:].all()
    p = paged(device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    nobody = p.replace(block_tables=p.block_tables[:0], seq_lens=none, query_start=none, query_len=none)
    out, lse = nobody.run(op, *extra)
    assert not out.any()
    assert lse.eq(-math.inf).all()
    out, lse = nobody.replace(query=p.query[:0], return_lse=False).run(op, *extra)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_window_hides_what_left_it(device: str) -> None:
    """NaN in keys that no query sees any more reaches nothing."""
    for query_lens in ((1,), (30,)):
        p = paged(device, (200,), query_lens, sliding_window=20)
        wanted = p.run()
        for i in range(200 - query_lens[0] - 19):
            block = int(p.block_tables[0, i // 16])
            p.key_cache[block, i % 16] = p.value_cache[block, i % 16] = math.nan
        for op, extra in VERSIONS:
            assert all(torch.isfinite(x).all() for x in p.run(op, *extra))
        assert all(map(same_bits, wanted, p.run()))


def test_nan_and_infinity_go_through(device: str) -> None:
    """A NaN in a key of the sequence, or in its query, is not hidden; other sequences are not touched."""
    for dtype in FLOATS:
        for query_lens in ((1, 1, 1), (20, 1, 20)):
            p = paged(device, query_lens=query_lens, dtype=dtype)
            clean = p.run()[0]
            p.key_cache[int(p.block_tables[0, 1]), 3, 1, 5] = math.nan
            out = p.run()[0]
            assert out[query_lens[0] - 1, 2:].isnan().all()
            assert same_bits(out[query_lens[0] :], clean[query_lens[0] :])
            assert same_bits(out[:, :2], clean[:, :2])
    p = paged(device, (30,), dtype=torch.float16, cache_dtype=torch.float8_e4m3fn)
    p.value_cache.view(torch.uint8)[int(p.block_tables[0, 0]), 3, 0, 5] = 0xFF
    assert p.run()[0].isnan().sum() == 2  # one element of the two heads that share the KV head


# ---- consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge(device: str, dtype: torch.dtype) -> None:
    """The states of two halves of the keys merge into the state of all; an empty side is not read."""
    whole = dense(device, (90,), (13,), dtype=dtype, causal=False)
    halves = [
        whole.replace(key_start=torch.full_like(whole.key_start, at), key_len=torch.full_like(whole.key_len, n)).run()
        for at, n in ((0, 37), (37, 53))
    ]
    args = (*halves[0], *halves[1])
    out, lse = ops.merge_attention_states(*args)
    check(whole, (out, lse))
    exact, exact_lse = REFERENCES["merge_attention_states"](*(x.double() for x in args))
    w = [torch.exp(half[1] - exact_lse.float())[..., None] for half in halves]
    stock = (halves[0][0].float() * w[0] + halves[1][0].float() * w[1]).to(dtype)
    assert_accurate(out, stock, exact)
    assert_accurate(lse, torch.logaddexp(args[1], args[3]), exact_lse)

    nothing = torch.full_like(args[0], math.nan), torch.full_like(args[1], -math.inf)
    assert all(map(same_bits, ops.merge_attention_states(*halves[0], *nothing), halves[0]))
    assert all(map(same_bits, ops.merge_attention_states(*nothing, *halves[0]), halves[0]))
    out, lse = ops.merge_attention_states(*nothing, *nothing)
    assert not out.any()
    assert lse.eq(-math.inf).all()


@pytest.mark.parametrize("d", [1, 3, 8, 20, 65, 300])
def test_merge_of_any_width_and_stride(device: str, d: int) -> None:
    new = Inputs(device)
    for dtype in FLOATS:
        a, b = new.normal(4, 5, d, dtype=dtype), new.normal(5, 4, d, dtype=dtype).transpose(0, 1)
        lse_a, lse_b = new.normal(4, 5) * 9, (new.normal(5, 4) * 9).T
        out, lse = ops.merge_attention_states(a, lse_a, b, lse_b)
        exact, exact_lse = REFERENCES["merge_attention_states"](a.double(), lse_a.double(), b.double(), lse_b.double())
        share = torch.sigmoid(lse_a - lse_b)[..., None]
        assert_accurate(out, (a.float() * share + b.float() * (1 - share)).to(dtype), exact)
        assert_accurate(lse, torch.logaddexp(lse_a, lse_b), exact_lse)


def test_threads_change_no_bit_of_v1_and_v2() -> None:
    """The partitions of V2 follow from the lengths, not from the machine."""
    for query_lens in (None, (200, 1, 300)):
        p = paged("cpu", (900, 1200, 300), query_lens, dtype=torch.bfloat16)
        for op in PAGED[1:]:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(p.run(op))
            for result in results[1:]:
                assert all(map(same_bits, results[0], result))


def test_public_functions(device: str) -> None:
    """`paged_attention` and `flash_attention` pass everything on; their defaults are those documented."""
    p = paged(device, sinks=True, alibi=True, softcap=9.0, sliding_window=11, cache_dtype=torch.int8)
    args = p.args()
    options = {"alibi_slopes": p.alibi_slopes, "sinks": p.sinks, "softcap": 9.0, "sliding_window": 11}
    options |= {"k_scale": p.k_scale, "v_scale": p.v_scale, "max_query_len": 1}
    for version, (op, extra) in zip((None, 1, 2), VERSIONS):
        wanted = p.run(op, *extra)
        splits = extra[0] if extra else 0
        got = ops.paged_attention(*args[:7], **options, return_lse=True, version=version, num_splits=splits)
        assert all(map(same_bits, got, wanted))
        assert same_bits(ops.paged_attention(*args[:7], **options, version=version, num_splits=splits), wanted[0])
    with pytest.raises(ValueError, match="version"):
        ops.paged_attention(*args[:7], **options, version=3)
    invariant = ops.paged_attention(*args[:7], **options, return_lse=True, batch_invariant=True)
    assert all(map(same_bits, invariant, p.run("paged_attention", True)))
    with pytest.raises(ValueError, match="batch_invariant"):
        ops.paged_attention(*args[:7], **options, version=2, batch_invariant=True)

    new = Inputs(device)
    q, k, v = new.normal(2, 9, 4, 64), new.normal(2, 12, 2, 64), new.normal(2, 12, 2, 64)
    out, lse = ops.flash_attention(q, k, v, return_lse=True)
    lens = torch.tensor([0, 9, 18], dtype=torch.int32, device=device), torch.tensor([0, 12, 24], dtype=torch.int32)
    packed = ops.flash_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=lens[0],
        cu_seqlens_k=lens[1].to(device),
        max_query_len=9,
        max_key_len=12,
        return_lse=True,
    )
    assert same_bits(out.flatten(0, 1), packed[0])
    assert same_bits(lse.flatten(0, 1), packed[1])
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        ops.flash_attention(q, k, v, cu_seqlens_q=lens[0])
    with pytest.raises(ValueError, match="max_query_len"):
        ops.flash_attention(q[0], k[0], v[0])


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(((1000,), 32, 8, 128, {}), id="alone"),
        pytest.param(((2000,), 9, 3, 64, {}), id="alone-few-heads"),
        pytest.param(((1700,), 40, 1, 64, {}), id="alone-row-tiles"),
        pytest.param(((9001,), 28, 4, 128, {}), id="alone-long"),
        pytest.param(((70001,), 16, 2, 64, {}), id="alone-longer"),
        pytest.param(((9001,), 8, 2, 256, {"sliding_window": 777}), id="alone-window"),
        pytest.param(((512,) * 8, 9, 3, 64, {}), id="few-equal"),
        pytest.param(((640,) * 32, 48, 1, 64, {}), id="equal-row-tiles"),
        pytest.param(((130,) * 33, 32, 32, 64, {"softcap": 20.0}), id="many-equal"),
        pytest.param(((333,) * 33, 32, 32, 128, {"sliding_window": 100}), id="many-equal-window"),
        pytest.param((tuple(1 + 37 * (i % 5) for i in range(80)) + (9000, 0, 4000), 8, 4, 128, {}), id="ragged"),
    ],
)
def test_each_way_to_share_the_work(shape: Any, cache_dtype: torch.dtype | None) -> None:
    """A sequence alone, equal ones, few and many, short beside long: accurate, and the same bits each time."""
    lens, heads, kv_heads, d, options = shape
    kind: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "d": d, "dtype": torch.bfloat16, **options}
    problem = paged("cuda", lens, cache_dtype=cache_dtype, **kind)
    first = problem.run()
    check(problem, first)
    for _ in range(20):
        assert all(map(same_bits, problem.run(), first))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [*HEAD_DIMS, 40, 200])
def test_prefill_kernel_of_older_gpus(monkeypatch: pytest.MonkeyPatch, d: int, dtype: torch.dtype) -> None:
    """PAGEDKV_PREFILL=mma: the mma.sync kernel on every GPU, which Hopper otherwise has another one for."""
    monkeypatch.setenv("PAGEDKV_PREFILL", "mma")
    lens, rows = (1500, 0, 700, 333, 64), (1500, 40, 130, 100, 200)
    for options in (
        {"block_size": 8},
        {"block_size": 64, "heads": 14, "sliding_window": 200, "sinks": True},
        {"causal": False, "kv_heads": 1},
        {"softcap": 20.0, "alibi": True, "heads": 2},
    ):
        kind: dict[str, Any] = {"d": d, "dtype": dtype, "gap": 1, **options}
        problem = paged("cuda", lens, rows, **kind)
        first = problem.run()
        check(problem, first)
        assert all(map(same_bits, problem.run(), first))
    problem = dense("cuda", lens, rows, d=d, dtype=dtype)
    check(problem, problem.run())


@pytest.mark.gpu
def test_prefill_kernel_of_older_gpus_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = paged("cuda", (500,), (500,), d=128, dtype=torch.bfloat16)
    ran = {}
    for wanted in ("mma", ""):
        monkeypatch.setenv("PAGEDKV_PREFILL", wanted)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            problem.run()
            torch.cuda.synchronize()
        ran[wanted] = " ".join(event.name for event in profile.events())
    assert "paged_prefill_kernel" in ran["mma"] and "prefill_sm90_kernel" not in ran["mma"]
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert ("prefill_sm90_kernel" in ran[""]) == hopper and ("paged_prefill_kernel" in ran[""]) != hopper


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_and_streams_share_no_counters(dtype: torch.dtype, prompts: bool) -> None:
    """Graphs replayed with other lengths, at the same time on two streams, and made and dropped: the eager bits."""
    big = paged("cuda", (5000, 900), (1200, 900) if prompts else None, dtype=dtype, kv_heads=1)
    small = paged("cuda", (700, 2000, 30), (600, 300, 30) if prompts else None, dtype=dtype, kv_heads=1, seed=1)
    for op, extra in (("paged_attention", ()), ("paged_attention", (True,)), ("paged_attention_v2", (5,))):
        results = []
        for p in (big, small):
            p.run(op, *extra)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                first = p.run(op, *extra)
                second = p.run(op, *extra)
            results.append((p, graph, [*first, *second]))
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for cut in (0, 333, 1):
            wanted = []
            for p, _, _ in results:
                p.seq_lens.copy_((p.seq_lens - cut).clamp_min(1))
                wanted.append([*p.run(op, *extra)] * 2)
            torch.cuda.synchronize()
            for _ in range(20):
                for stream, (_, graph, _) in zip(streams, results):
                    with torch.cuda.stream(stream):
                        graph.replay()
                big.run(op, *extra)
            torch.cuda.synchronize()
            for (_, _, got), want in zip(results, wanted):
                assert all(map(same_bits, got, want))
        del results, graph
    for _ in range(50):  # what a dropped graph had is given to the next one
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = small.run()
        graph.replay()
        assert all(map(same_bits, got, small.run()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tables_so_wide_that_a_block_of_work_is_longer(dtype: torch.dtype) -> None:
    """2^31 keys a table row, of which few are used: the line of work is counted in longer blocks."""
    for lens in ((2000, 5, 777), (40, 3000, 1)):
        p = paged("cuda", lens, dtype=dtype, block_size=128, poison=False)
        wide = torch.zeros(3, 1 << 23, dtype=torch.int32, device="cuda")
        wide[:, : p.block_tables.shape[1]] = p.block_tables
        p = p.replace(block_tables=wide)
        check(p, *(p.run(op, *extra) for op, extra in VERSIONS[:1]), p.run("paged_attention_v2", 3))


@pytest.mark.slow
def test_compiles_once_for_all_lengths(device: str) -> None:
    """One graph, no break, over several numbers of tokens; the same bits as without."""

    def step(query: Tensor, *rest: Tensor) -> Tensor:
        return torch.relu(ops.paged_attention(query * 2, *rest, max_query_len=128)) + query

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for lens in ((50, 9), (30, 17), (80, 3)):
        args = paged(device, lens, lens).args()[:7]
        with torch.no_grad():
            assert same_bits(compiled(*args), step(*args))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_each_instruction_set(isa: str) -> None:
    """The units that this CPU would not pick, in a process that may not pick better."""
    subset = "test_block_sizes or test_features or test_grouped or (test_other_head_dims and (24 or 104)) or test_merge"
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-q",
        "-x",
        "-k",
        f"cpu and ({subset})",
        "-p",
        "no:cacheprovider",
    ]
    env = {**os.environ, "PAGEDKV_SIMD": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- bad arguments ---------------------------------------------------------------------------------------------------


BAD_PAGED: list[tuple[str, Callable[[Paged], Any]]] = [
    ("query", lambda p: p.query[0]),
    ("query", lambda p: p.query.double()),
    ("query", lambda p: p.query.int()),
    ("query", lambda p: p.query[..., :32]),
    ("query", lambda p: p.query[:, :3]),
    ("query", lambda p: p.query.transpose(1, 2).contiguous().transpose(1, 2)),
    ("key_cache", lambda p: p.key_cache[0]),
    ("key_cache", lambda p: p.key_cache.int()),
    ("key_cache", lambda p: torch.cat([p.key_cache, p.key_cache], -1)[..., ::2]),
    ("key_cache", lambda p: torch.nn.functional.pad(p.key_cache, (0, 4))[..., :64]),
    ("value_cache", lambda p: p.value_cache[:, :8]),
    ("value_cache", lambda p: p.value_cache.half()),
    ("value_cache", lambda p: torch.cat([p.value_cache, p.value_cache], -1)[..., ::2]),
    ("block_tables", lambda p: p.block_tables.long()),
    ("block_tables", lambda p: p.block_tables[..., None]),
    ("block_tables", lambda p: p.block_tables.repeat_interleave(2, 1)[:, ::2]),
    ("seq_lens", lambda p: p.seq_lens[:2]),
    ("seq_lens", lambda p: p.seq_lens.long()),
    ("query_start", lambda p: p.query_start[:2]),
    ("query_start", lambda p: p.query_start.long()),
    ("query_len", lambda p: p.query_len.float()),
    ("query_len", lambda p: p.query_len.repeat_interleave(2)[::2]),
    ("max_query_len", lambda p: -1),
    ("alibi_slopes", lambda p: torch.ones(3, device=p.query.device)),
    ("alibi_slopes", lambda p: torch.ones(4, device=p.query.device, dtype=torch.float16)),
    ("sinks", lambda p: torch.ones(2, 2, device=p.query.device)),
    ("sliding_window", lambda p: -1),
    ("softcap", lambda p: -1.0),
    ("k_scale", lambda p: torch.ones(p.key_cache.shape[:3], device=p.query.device)),
    ("v_scale", lambda p: torch.ones(p.key_cache.shape[:3], device=p.query.device)),
]


@pytest.mark.parametrize("argument, change", [pytest.param(a, c, id=f"{i}-{a}") for i, (a, c) in enumerate(BAD_PAGED)])
def test_bad_argument(device: str, argument: str, change: Callable[[Paged], Any]) -> None:
    """The message names the op and the argument."""
    p = paged(device)
    for op in PAGED:
        with pytest.raises(RuntimeError, match=rf"{op}: {argument}: got .*needs "):
            p.replace(**{argument: change(p)}).run(op)


def test_bad_scales_and_splits(device: str) -> None:
    p = paged(device, cache_dtype=torch.int8)
    assert p.k_scale is not None
    for scales in (None, p.k_scale[:1], p.k_scale.half(), p.k_scale.transpose(0, 1).contiguous().transpose(0, 1)):
        for argument in ("k_scale", "v_scale"):
            with pytest.raises(RuntimeError, match=rf"paged_attention: {argument}: got .*needs "):
                p.replace(**{argument: scales}).run()
    for splits in (-1, 100000):
        with pytest.raises(RuntimeError, match="paged_attention_v2: num_splits: got"):
            p.run("paged_attention_v2", splits)
    p = paged(device, dtype=torch.float16).replace(query=p.query)
    with pytest.raises(RuntimeError, match="paged_attention: key_cache: got float16, needs query's dtype, float32"):
        p.run()
    for block_size, d in ((4, 64), (16, 12), (16, 264)):
        cache = torch.zeros(8, block_size, 2, d, device=device)
        bad = paged(device).replace(key_cache=cache, value_cache=cache)
        with pytest.raises(RuntimeError, match=r"paged_attention: key_cache: got (block_size|head_dim)"):
            bad.run()


BAD_VALUES: list[tuple[str, list[int]]] = [
    ("seq_lens", [70, -1, 37]),
    ("seq_lens", [70, 1, 4000]),
    ("query_len", [1, -1, 1]),
    ("query_len", [1, 2, 1]),  # above max_query_len
    ("query_start", [0, 1, 3]),
    ("query_start", [-1, 1, 2]),
    ("query_start", [0, 2**31 - 1, 2]),
]


@pytest.mark.parametrize("argument, values", BAD_VALUES)
def test_bad_value_on_the_cpu(argument: str, values: list[int]) -> None:
    """Where values can be looked at, they are, before anything is computed."""
    p = paged("cpu")
    for op in PAGED:
        with pytest.raises(RuntimeError, match=rf"{op}: {argument}: got .*needs "):
            p.replace(**{argument: torch.tensor(values, dtype=torch.int32)}).run(op)


@pytest.mark.parametrize("block", [-1, 11, 2**31 - 1])
def test_bad_block_on_the_cpu(block: int) -> None:
    p = paged("cpu", (70, 1, 37))
    p.block_tables[0, 4] = block
    with pytest.raises(RuntimeError, match=rf"block_tables: got block {block} at \[0, 4\], needs 0 <= block < "):
        p.run()


BAD_DENSE: list[tuple[str, Callable[[Dense], Any]]] = [
    ("query", lambda f: f.query[..., :32]),
    ("query", lambda f: f.query[:, :3]),
    ("query", lambda f: f.query.double()),
    ("key", lambda f: f.key[0]),
    ("key", lambda f: f.key.half()),
    ("key", lambda f: torch.cat([f.key, f.key], -1)[..., ::2]),
    ("key", lambda f: torch.nn.functional.pad(f.key, (0, 4))[..., :64]),
    ("value", lambda f: f.value[:-1]),
    ("value", lambda f: f.value.half()),
    ("query_start", lambda f: f.query_start.long()),
    ("query_len", lambda f: f.query_len[:1]),
    ("key_start", lambda f: f.key_start[:1]),
    ("key_len", lambda f: f.key_len.long()),
    ("max_query_len", lambda f: -1),
    ("max_key_len", lambda f: -1),
    ("alibi_slopes", lambda f: torch.ones(3, device=f.query.device)),
    ("sinks", lambda f: torch.ones(4, device=f.query.device).double()),
    ("sliding_window", lambda f: -2),
    ("softcap", lambda f: -0.5),
]


@pytest.mark.parametrize("argument, change", [pytest.param(a, c, id=f"{i}-{a}") for i, (a, c) in enumerate(BAD_DENSE)])
def test_bad_dense_argument(device: str, argument: str, change: Callable[[Dense], Any]) -> None:
    f = dense(device)
    with pytest.raises(RuntimeError, match=rf"flash_attention: {argument}: got .*needs "):
        f.replace(**{argument: change(f)}).run()


@pytest.mark.parametrize(
    "argument, values",
    [
        ("query_len", [40, -3]),
        ("query_len", [41, 3]),
        ("query_start", [0, 41]),
        ("key_len", [-40, 3]),
        ("key_len", [40, 44]),
        ("key_start", [0, 41]),
        ("key_start", [-1, 40]),
    ],
)
def test_bad_dense_value_on_the_cpu(argument: str, values: list[int]) -> None:
    with pytest.raises(RuntimeError, match=rf"flash_attention: {argument}: got .*needs "):
        dense("cpu").replace(**{argument: torch.tensor(values, dtype=torch.int32)}).run()


def test_bad_merge_argument(device: str) -> None:
    new = Inputs(device)
    good = {
        "out_a": new.normal(3, 2, 8),
        "lse_a": new.normal(3, 2),
        "out_b": new.normal(3, 2, 8),
        "lse_b": new.normal(3, 2),
    }
    for argument, bad in [
        ("out_a", good["out_a"][0]),
        ("out_a", good["out_a"].int()),
        ("out_b", good["out_b"][:2]),
        ("out_b", good["out_b"].half()),
        ("lse_a", good["lse_a"].half()),
        ("lse_b", good["lse_b"][..., None]),
    ]:
        with pytest.raises(RuntimeError, match=f"merge_attention_states: {argument}: got .*needs "):
            ops.merge_attention_states(**{**good, argument: bad})
