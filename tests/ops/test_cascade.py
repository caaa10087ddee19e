"""Attention over shared prefixes: the result of plain attention, as accurate; groups at random; bad arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, same_bits
from ops.samples import Cascade, cascade
from ops.samples_small import QUANTIZED
from ops.test_attention import check

from torch_pagedkv import ops
from torch_pagedkv.ops.attention import BLOCK_SIZES, HEAD_DIMS

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
#: few rows a KV head (the decode kernel takes the prefixes) and many (the prefill kernel does, in pieces)
FEW = (((3, 48), (2, 16)), (9, 1, 5, 30, 2, 7))
MANY = (((13, 400), (3, 160)), [1 + 17 * i % 50 for i in range(17)])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_head_dims(device: str, d: int, dtype: torch.dtype) -> None:
    for problem in (cascade(device, *FEW, d=d, dtype=dtype), cascade(device, *MANY, d=d, dtype=dtype, heads=6)):
        check(problem.plain, problem.run())


@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes_and_cache_dtypes(device: str, block_size: int, cache_dtype: torch.dtype | None) -> None:
    options: dict[str, Any] = {"block_size": block_size, "cache_dtype": cache_dtype}
    for dtype in FLOATS:
        few = cascade(device, ((3, 256), (2, 128)), (9, 1, 5, 30, 2, 7), dtype=dtype, **options)
        many = cascade(device, ((13, 384),), [1 + 17 * i % 50 for i in range(14)], dtype=dtype, **options)
        for problem in (few, many):
            # small logits: what float32 rounds off large ones is a matter of luck, in PyTorch, too
            problem = problem.replace(scale=0.03)
            check(problem.plain, problem.run())


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (9, 3), (7, 1), (20, 1), (71, 1)])
def test_grouped_heads(device: str, heads: int, kv_heads: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = cascade(device, *FEW, heads=heads, kv_heads=kv_heads, dtype=dtype)
        check(problem.plain, problem.run())


@pytest.mark.parametrize(
    "options",
    [
        {"alibi": True},
        {"softcap": 3.0},
        {"sinks": True},
        {"sliding_window": 1},
        {"sliding_window": 60},  # longer than the sequences of the second group alone
        {"sliding_window": 5000},
        {"sinks": True, "sliding_window": 500, "alibi": True, "softcap": 20.0},
        {"scale": 0.7},
        {"scale": -0.3},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_features(device: str, options: dict[str, Any]) -> None:
    changes = {"scale": options["scale"]} if "scale" in options else {}
    options = {k: v for k, v in options.items() if k != "scale"}
    for groups, own in (FEW, MANY):
        for dtype in FLOATS:
            problem = cascade(device, groups, own, dtype=dtype, heads=6, **options).replace(**changes)
            check(problem.plain, problem.run())
        problem = cascade(device, groups, own, dtype=torch.float16, cache_dtype=torch.int8, **options)
        problem = problem.replace(**changes)
        check(problem.plain, problem.run())


@pytest.mark.parametrize("dtype", FLOATS)
def test_long(device: str, dtype: torch.dtype) -> None:
    """Thousands of shared keys, rows in several tiles."""
    problem = cascade(device, ((70, 3200), (2, 1008)), [3 + 7 * i % 40 for i in range(72)], dtype=dtype, d=32)
    check(problem.plain, problem.run())


@relaxed
@given(
    groups=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=4),
    loose=st.integers(0, 3),
    own=st.integers(0, 1 << 20),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1), (9, 3)]),
    d=st.integers(1, 32).map(lambda n: 8 * n),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(FLOATS),
    cache_dtype=st.sampled_from([None, *QUANTIZED]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    sliding_window=st.sampled_from([0, 0, 1, 100, 1000]),
    softcap=st.sampled_from([0.0, 0.0, 30.0]),
)
def test_any_groups(
    device: str, groups: list[tuple[int, int]], loose: int, own: int, heads: tuple[int, int], **options: Any
) -> None:
    """Groups of any size, empty ones among them, prefixes of none to many blocks, sequences without a key."""
    size = options["block_size"]
    groups = [(n, min(tokens, 320 // size) * size) for n, tokens in groups]
    rest = [own * (i + 1) % 61 for i in range(sum(n for n, _ in groups) + loose)] or [0]
    problem = cascade(device, groups, rest, heads=heads[0], kv_heads=heads[1], **options)
    check(problem.plain, problem.run())


def test_no_group_is_plain_attention(device: str) -> None:
    """No groups, groups of nobody and prefixes shorter than a block: the bits of `paged_attention`."""
    for dtype in FLOATS:
        problem = cascade(device, *FEW, dtype=dtype)
        none = problem.group_start[:0]
        wanted = problem.plain.run()
        for changes in (
            {"group_start": none, "group_len": none, "prefix_lens": none, "max_group_len": 0},
            {"prefix_lens": torch.zeros_like(problem.prefix_lens)},
            {"prefix_lens": torch.full_like(problem.prefix_lens, 15)},
        ):
            got = problem.replace(**changes).run()
            assert same_bits(got[0], wanted[0])
            torch.testing.assert_close(got[1], wanted[1], rtol=1e-6, atol=1e-6)


def test_prefix_ends_where_it_can(device: str) -> None:
    """More than is shared in whole blocks, or than the shortest sequence has, is left to the rest."""
    problem = cascade(device, *FEW, dtype=torch.bfloat16)
    wanted = problem.run()
    more = problem.replace(prefix_lens=problem.prefix_lens + 15)
    assert all(map(same_bits, more.run(), wanted))
    equal = cascade(device, ((4, 64),), (0, 0, 0, 0))  # sequences of nothing but the prefix
    check(equal.plain, equal.run())


def test_nothing_to_see(device: str) -> None:
    """Empty sequences, in a group or not, and no sequence at all: 0 and -inf."""
    problem = cascade(device, ((2, 0),), (0, 0, 5, 0), sinks=True)
    out, lse = problem.run()
    assert not out[[0, 1, 3]].any()
    assert lse[[0, 1, 3]].eq(-math.inf).all()
    check(problem.plain, (out, lse))
    p = problem.plain
    empty = problem.replace(query=p.query[:0], block_tables=p.block_tables[:0], seq_lens=p.seq_lens[:0])
    empty = empty.replace(**dict.fromkeys(("group_start", "group_len", "prefix_lens"), p.seq_lens[:0]))
    assert [x.shape for x in empty.run()] == [(0, 4, 64), (0, 4)]


def test_strides(device: str) -> None:
    """A query that is a slice of a fused projection, wherever it lies, and interleaved caches: the same bits."""
    for dtype in FLOATS:
        for groups, own in (FEW, MANY):
            problem = cascade(device, groups, own, dtype=dtype)
            p = problem.plain
            both = torch.stack([p.key_cache, p.value_cache], 1)
            wanted = problem.run()
            for shift in (0, 2, 1):
                wide = torch.cat([p.query, p.query.flip(0)], 1).flatten(1)
                query = torch.nn.functional.pad(wide, (shift, 3))[:, shift : shift + 4 * 64].unflatten(1, (4, 64))
                strided = problem.replace(query=query, key_cache=both[:, 0], value_cache=both[:, 1])
                assert all(map(same_bits, strided.run(), wanted))


def test_repeats_to_the_bit(device: str) -> None:
    for groups, own in (FEW, MANY):
        for dtype in FLOATS:
            problem = cascade(device, groups, own, dtype=dtype)
            wanted = problem.run()
            for _ in range(20):
                assert all(map(same_bits, problem.run(), wanted))


def test_public_function(device: str) -> None:
    """Everything is passed on; the defaults are those documented."""
    problem = cascade(device, *FEW, sinks=True, alibi=True, softcap=9.0, sliding_window=999, cache_dtype=torch.int8)
    args, p = problem.args(), problem.plain
    options = {"alibi_slopes": p.alibi_slopes, "sinks": p.sinks, "softcap": 9.0, "sliding_window": 999}
    options |= {"k_scale": p.k_scale, "v_scale": p.v_scale, "max_group_len": 3}
    got = ops.paged_attention_cascade(*args[:8], **options, return_lse=True)
    assert all(map(same_bits, got, problem.run()))
    assert same_bits(ops.paged_attention_cascade(*args[:8], **options), got[0])


@pytest.mark.gpu
def test_one_graph_for_all_lengths() -> None:
    """A captured call, replayed with other lengths, groups and prefixes, none among them."""
    for heads in (4, 64):  # of 2 KV heads: the decode and the prefill kernel take the prefix
        problem = cascade(
            "cuda", ((6, 320), (2, 128)), (9, 1, 5, 30, 2, 7, 40, 3, 20), dtype=torch.bfloat16, heads=heads
        )
        p = problem.plain
        problem.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = problem.run()
        lens, prefixes, counts = p.seq_lens.clone(), problem.prefix_lens.clone(), problem.group_len.clone()
        for shorter, shared, members in ((0, 320, 6), (0, 0, 6), (0, 160, 4), (1, 320, 2), (25, 320, 6), (0, 320, 0)):
            p.seq_lens.copy_((lens - shorter).clamp(min=0))
            problem.prefix_lens.copy_(prefixes.clamp(max=shared))
            problem.group_len.copy_(counts.clamp(max=members))
            graph.replay()
            torch.cuda.synchronize()
            check(p, out)


# ---- bad arguments ---------------------------------------------------------------------------------------------------


BAD: list[tuple[str, Callable[[Cascade], Any]]] = [
    ("query", lambda c: c.plain.query[:-1]),
    ("query", lambda c: c.plain.query.double()),
    ("query", lambda c: c.plain.query[:, :3]),
    ("key_cache", lambda c: c.plain.key_cache.int()),
    ("block_tables", lambda c: c.plain.block_tables.long()),
    ("seq_lens", lambda c: c.plain.seq_lens[:2]),
    ("group_start", lambda c: c.group_start.long()),
    ("group_start", lambda c: c.group_start[:, None]),
    ("group_len", lambda c: c.group_len[:1]),
    ("group_len", lambda c: c.group_len.float()),
    ("prefix_lens", lambda c: c.prefix_lens.repeat_interleave(2)[::2]),
    ("prefix_lens", lambda c: c.prefix_lens[:1]),
    ("max_group_len", lambda c: -1),
    ("alibi_slopes", lambda c: torch.ones(3, device=c.plain.query.device)),
    ("sinks", lambda c: torch.ones(4, device=c.plain.query.device).double()),
    ("sliding_window", lambda c: -1),
    ("softcap", lambda c: -1.0),
    ("k_scale", lambda c: torch.ones(c.plain.key_cache.shape[:3], device=c.plain.query.device)),
]


@pytest.mark.parametrize("argument, change", [pytest.param(a, c, id=f"{i}-{a}") for i, (a, c) in enumerate(BAD)])
def test_bad_argument(device: str, argument: str, change: Callable[[Cascade], Any]) -> None:
    problem = cascade(device, *FEW)
    with pytest.raises(RuntimeError, match=rf"paged_attention_cascade: {argument}: got .*needs "):
        problem.replace(**{argument: change(problem)}).run()


@pytest.mark.parametrize(
    "argument, values, message",
    [
        ("seq_lens", [57, 49, 53, 46, -1, 7], "seq_lens"),
        ("seq_lens", [57, 49, 53, 46, 4000, 7], "seq_lens"),
        ("group_start", [0, 5], "group_start"),
        ("group_start", [-1, 3], "group_start"),
        ("group_start", [0, 2], r"group_start: got row 2 in groups 0 and 1"),
        ("group_start", [0, 2**31 - 1], "group_start"),
        ("group_len", [4, 2], "group_len"),
        ("group_len", [3, -2], "group_len"),
        ("prefix_lens", [48, 32], r"prefix_lens: got 32 for group 1, but rows 3 and 4 differ"),
    ],
)
def test_bad_value_on_the_cpu(argument: str, values: list[int], message: str) -> None:
    """Where values can be looked at, they are, before anything is computed."""
    problem = cascade("cpu", ((3, 48), (2, 16)), (9, 1, 5, 30, 30, 7))
    with pytest.raises(RuntimeError, match=rf"paged_attention_cascade: {message}.*needs "):
        problem.replace(**{argument: torch.tensor(values, dtype=torch.int32)}).run()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "starts, counts",
    [([0, 5], [3, 2]), ([-1, 3], [3, 2]), ([0, 2**31 - 1], [3, 2]), ([0, 3], [4, 2]), ([0, 3], [3, -2])],
)
def test_bad_group_on_cuda_shares_nothing(starts: list[int], counts: list[int]) -> None:
    """What reaches out of the batch, or beyond `max_group_len`, is ignored: values are not looked at on the host."""
    problem = cascade("cuda", *FEW)
    start, length = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (starts, counts))
    check(problem.plain, problem.replace(group_start=start, group_len=length).run())
