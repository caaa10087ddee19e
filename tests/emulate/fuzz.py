"""Random problems for the attention kernels, against the references in float64.

    TORCH_PAGEDKV_LIB=$(python tests/emulate/build.py) python tests/emulate/fuzz.py --cases 500 --seed 7

Made for the emulated device, where wrong entries of the block table and negative lengths are masked as on a GPU; each
failure prints the problem and its seed. Whatever a kernel must not read holds NaN, or a block id far outside.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from torch_pagedkv import ops  # noqa: E402
from torch_pagedkv.ops import REFERENCES  # noqa: E402

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
HEAD_DIMS = (8, 32, 40, 64, 80, 96, 112, 120, 128, 192, 200, 256)
NO_BLOCK = 2147480000
Problem = dict[str, Any]  # keyword arguments of ops.paged_attention


def ints(values: list[int]) -> Tensor:
    """An int32 vector."""
    return torch.tensor(values, dtype=torch.int32)


def as_bytes(x: Tensor) -> Tensor:
    """The same memory as a type that every operator takes (float8 lacks most)."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory: heads before tokens, or rows 8 elements apart."""
    blocks, block_size, heads, d = x.shape
    if layout == "heads first":
        y = torch.empty(blocks, heads, block_size, d, dtype=x.dtype).transpose(1, 2)
    elif layout == "gaps":
        y = torch.empty(blocks, block_size, heads, d + 8, dtype=x.dtype)[..., :d]
    else:
        return x
    as_bytes(y).copy_(as_bytes(x))
    return y


def paged(rng: random.Random, dtype: torch.dtype, cache: torch.dtype, d: int) -> Problem:
    """A ragged batch: empty and negative lengths, rows of nobody, GQA, any block size, layout and mask."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    group, kv_heads = rng.choice([1, 2, 3, 4, 5, 7, 8, 16]), rng.choice([1, 2, 3])
    block_size, sequences = rng.choice([8, 16, 32, 64, 128]), rng.choice([1, 2, 3, 5])
    longest, most_rows = rng.choice([20, 100, 300]), rng.choice([1, 1, 1, 4, 20, 70])
    lens = [rng.choice([0, rng.randint(1, longest), rng.randint(1, longest), longest]) for _ in range(sequences)]
    rows = [rng.choice([rng.randint(0, most_rows), most_rows]) for _ in range(sequences)]
    if rng.random() < 0.1:
        lens[0] = -3
    starts, tokens = [], 0
    for count in rows:
        starts.append(tokens + rng.choice([0, 0, 1, 2]))
        tokens = starts[-1] + count
    tokens = max(1, tokens + rng.choice([0, 1]))

    used = [-(-max(0, length) // block_size) for length in lens]
    blocks, width = sum(used) + 3, max(1, *used) + rng.choice([0, 1, 3])
    order = torch.randperm(blocks, generator=generator).tolist()
    tables = torch.full((sequences, width), rng.choice([NO_BLOCK, -7]), dtype=torch.int32)
    free = torch.ones(blocks, block_size, dtype=torch.bool)
    for s, length in enumerate(lens):
        for i in range(used[s]):
            tables[s, i] = order.pop()
            free[tables[s, i], : length - i * block_size] = False
    k, v, scales = normal(blocks, block_size, kv_heads, d), normal(blocks, block_size, kv_heads, d), {}
    if cache in QUANTIZED:
        k, v = ((x * (60 if cache != torch.int8 else 40)).clamp(-128, 127).to(cache) for x in (k, v))
        k_scale, v_scale = (uniform(*k.shape[:3]) * 2 ** rng.uniform(-9, high) + 1e-5 for high in (-5, -3))
        k_scale[free], v_scale[free] = math.nan, math.nan
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        if cache != torch.int8:
            as_bytes(k)[free], as_bytes(v)[free] = 0x7F, 0x7F
    else:
        k, v = k.to(dtype), v.to(dtype)
        k[free], v[free] = math.nan, math.nan
    layout = rng.choice(["plain", "heads first", "gaps"])
    query = torch.full((tokens, group * kv_heads, d + rng.choice([0, 1, 8])), math.nan, dtype=dtype)[..., :d]
    query.copy_(normal(*query.shape) * rng.choice([1, 1, 3]))
    version, splits = rng.choice([(None, 0), (None, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 5), (2, 40)])
    heads = group * kv_heads
    return {
        "query": query,
        "key_cache": strided(k, layout),
        "value_cache": strided(v, layout),
        "block_tables": tables,
        "seq_lens": ints(lens),
        "query_start": ints(starts),
        "query_len": ints(rows),
        "max_query_len": max(rows),
        "scale": rng.choice([d**-0.5, d**-0.5, -0.1]),
        "causal": rng.random() < 0.7,
        "alibi_slopes": uniform(heads) * 0.2 if rng.random() < 0.3 else None,
        "sliding_window": rng.choice([0, 0, 1, 17, 100]),
        "softcap": rng.choice([0.0, 0.0, 5.0]),
        "sinks": normal(heads) if rng.random() < 0.3 else None,
        **scales,
        "return_lse": True,
        "version": version,
        "num_splits": splits,
    }


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output in float64 and lse by the reference."""
    arguments = {k: v for k, v in problem.items() if k not in ("version", "num_splits")}
    return REFERENCES["paged_attention"](**{**arguments, "query": problem["query"].double()})


def largest(x: Tensor) -> float:
    """The largest finite magnitude, 0 without one."""
    return float(x.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0


def compare(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], values: float, quantized: bool = False
) -> tuple[float, float]:
    """Errors of output and lse in units of what is allowed.

    Outputs are averages of values: the weights, the result and the values of a quantised cache are rounded, each time
    by half a unit in the last place of the largest value at most. Float32 and lse: the roundings of sums.
    """
    out, lse = got
    assert not out.isnan().any(), "NaN in the output"
    assert torch.equal(lse.isinf(), want[1].isinf()), "lse: other rows are empty"
    seen = ~lse.isinf()
    error, lse_error = largest(out.double() - want[0].double()), largest(lse[seen].double() - want[1][seen].double())
    units = 24.0 if out.dtype == torch.float32 else 1.5 if quantized else 1.0
    allowed = units * torch.finfo(out.dtype).eps * values, 5e-6 * max(1.0, largest(want[1][seen]))
    return error / max(allowed[0], 1e-30), lse_error / allowed[1]


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Bit for bit equal."""
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def check_paged(rng: random.Random) -> tuple[float, float]:
    """One random problem against the reference; a second run gives the same bits."""
    dtype = rng.choice(FLOATS)
    cache = rng.choice([dtype, *QUANTIZED])
    problem = paged(rng, dtype, cache, rng.choice(HEAD_DIMS))
    got = ops.paged_attention(**problem)
    values = problem["value_cache"].double()
    if cache in QUANTIZED:
        values = values * problem["v_scale"].double()[..., None]
    errors = compare(got, expected(problem), largest(values), cache in QUANTIZED)
    assert same(got, ops.paged_attention(**problem)), "a second run gives other bits"
    if max(errors) > 1:
        text = {k: (tuple(v.shape) if isinstance(v, Tensor) and v.dim() != 1 else v) for k, v in problem.items()}
        raise AssertionError(f"{errors} of the allowed: {text}")
    return errors


def check_dense(rng: random.Random) -> tuple[float, float]:
    """`flash_attention` in any dtype, ragged; then with sequences that reach over both ends of K and V, as if cut."""
    dtype, d = rng.choice(FLOATS), rng.choice(HEAD_DIMS)
    kv_heads, group, sequences = rng.choice([1, 2]), rng.choice([1, 3, 4]), rng.choice([1, 2, 3])
    rows = [rng.randint(0, 40) for _ in range(sequences)]
    lens = [rng.choice([0, rng.randint(1, 200)]) for _ in range(sequences)]
    heads, total = group * kv_heads, max(1, sum(lens))
    torch.manual_seed(rng.randrange(1 << 30))
    query = torch.randn(max(1, sum(rows)), heads, d).to(dtype)
    key, value = torch.randn(2, total, kv_heads, d + 8).to(dtype)[..., :d]
    starts = [sum(lens[:s]) for s in range(sequences)]
    fixed = [max(rows), max(lens), d**-0.5]
    options: dict[str, Any] = {
        "causal": rng.random() < 0.7,
        "alibi_slopes": torch.rand(heads) if rng.random() < 0.3 else None,
        "sliding_window": rng.choice([0, 0, 5, 30]),
        "softcap": rng.choice([0.0, 4.0]),
        "sinks": torch.randn(heads) if rng.random() < 0.5 else None,
        "return_lse": True,
    }
    query_start = ints([sum(rows[:s]) for s in range(sequences)])
    args = [query, key, value, query_start, ints(rows), ints(starts), ints(lens), *fixed]
    op, reference = torch.ops.torch_pagedkv.flash_attention, REFERENCES["flash_attention"]
    want = reference(query.double(), *args[1:], **options)
    errors = compare(op(*args, **options), want, largest(value))
    assert max(errors) <= 1, f"{errors} of the allowed: {dtype} {d} {heads} {kv_heads} {rows} {lens} {options}"

    # Without causal edge and window, rows that do not exist are like keys that are not there.
    options |= {"causal": False, "sliding_window": 0, "alibi_slopes": None}
    reach = [(rng.choice([start, start - 50, start + 50]), length + 60) for start, length in zip(starts, lens)]
    reach[0] = rng.choice([reach[0], (-(2**31), 60), (2**31 - 1, 60)])
    # (max_key_len is cut to the rows of K, so a sequence is no longer than that)
    cut = [(max(0, start), max(0, min(total, start + min(length, total)) - max(0, start))) for start, length in reach]
    fixed[1] = max(length for _, length in reach)
    over, within = ([ints(list(x)) for x in zip(*pairs)] for pairs in (reach, cut))
    got = op(*args[:5], *over, *fixed, **options)
    want = reference(query.double(), *args[1:5], *within, *fixed, **options)
    errors = compare(got, want, largest(value))
    assert max(errors) <= 1, f"{errors} of the allowed, outside: {dtype} {d} {heads} {rows} {reach} of {total}"
    return errors


def check_tile_edges(rng: random.Random) -> tuple[float, float]:
    """Sequences of every length in a stretch longer than a tile of keys: all edges meet all places in a tile."""
    rows, lens = rng.choice([3, 41]), list(range(60, 130))
    dtype, count = rng.choice(FLOATS[:2]), len(lens)
    torch.manual_seed(rng.randrange(1 << 30))
    query, (key, value) = torch.randn(rows * count, 1, 32).to(dtype), torch.randn(2, sum(lens), 1, 32).to(dtype)
    starts = [sum(lens[:s]) for s in range(count)]
    args = (key, value, ints([rows * s for s in range(count)]), ints([rows] * count), ints(starts), ints(lens))
    worst = (0.0, 0.0)
    for causal, window in ((True, 0), (True, 33), (True, 70), (False, 0), (False, 33)):
        options = {"causal": causal, "sliding_window": window, "return_lse": True}
        got = torch.ops.torch_pagedkv.flash_attention(query, *args, rows, max(lens), 1.0, **options)
        want = REFERENCES["flash_attention"](query.double(), *args, rows, max(lens), 1.0, **options)
        errors = compare(got, want, largest(value))
        assert max(errors) <= 1, f"{errors} of the allowed: {dtype} {rows} {options}"
        worst = max(worst[0], errors[0]), max(worst[1], errors[1])
    return worst


def check_merge(rng: random.Random) -> tuple[float, float]:
    """`merge_attention_states` where one side or both are empty and hold anything."""
    dtype, d = rng.choice(FLOATS), rng.choice([7, 8, 40, 128])
    torch.manual_seed(rng.randrange(1 << 30))
    a, b = torch.randn(2, 5, 3, d).to(dtype)
    lse_a, lse_b = torch.randn(2, 5, 3) * 3
    lse_a[[0, 2]], lse_b[[1, 2]] = -math.inf, -math.inf
    a[[0, 2]], b[1], b[2] = math.nan, math.nan, math.inf
    merge, reference = ops.merge_attention_states, REFERENCES["merge_attention_states"]
    got = merge(a, lse_a, b, lse_b)
    errors = compare(got, reference(a.double(), lse_a, b.double(), lse_b), largest(a))
    assert max(errors) <= 1, f"{errors} of the allowed: {dtype} {d}"
    assert same(got, merge(a.transpose(0, 1).contiguous().transpose(0, 1), lse_a, b, lse_b)), "strides matter"
    return errors


def check_invariance(rng: random.Random) -> tuple[float, float]:
    """Bits do not depend on the batch, the table's width or what lies left of the window; bad block ids are masked."""
    dtype, cache = rng.choice([torch.float16, torch.float32]), rng.choice([None, torch.int8])
    blocks, size, kv_heads, heads, d, lens = 64, 16, 2, 8, 64, [300, 77, 190]
    torch.manual_seed(rng.randrange(1 << 30))
    k, v = torch.randn(2, blocks, size, kv_heads, d).to(dtype)
    scales: dict[str, Any] = {}
    if cache is not None:
        k, v = torch.randint(-128, 128, (2, *k.shape)).to(cache)
        scales = dict(zip(("k_scale", "v_scale"), torch.rand(2, *k.shape[:3]) * 0.01))
    query = torch.randn(3, heads, d).to(dtype)
    tables = torch.randperm(blocks)[:60].view(3, 20).to(torch.int32)
    rows, one = ints([0, 1, 2]), ints([1, 1, 1])

    def run(tables: Tensor, k: Tensor = k, v: Tensor = v, **options: Any) -> tuple[Tensor, Tensor]:
        options = {"max_query_len": 1, "version": 2, "return_lse": True, **scales, **options}
        return ops.paged_attention(query, k, v, tables, ints(lens), rows, one, **options)

    n = rng.choice([1, 2, 3, 7])
    got = run(tables, num_splits=n)
    for s, length in enumerate(lens):
        alone = ops.paged_attention(
            query[s : s + 1], k, v, tables[s : s + 1], ints([length]), ints([0]), ints([1]),
            max_query_len=1, version=2, num_splits=n, return_lse=True, **scales,
        )  # fmt: skip
        assert same(alone, (got[0][s : s + 1], got[1][s : s + 1])), f"bits depend on the batch: {n} splits"
    assert same(got, run(torch.cat([tables, torch.full((3, 50), 99, dtype=torch.int32)], 1), num_splits=n)), "width"

    n = rng.choice([0, 1, 3])
    got = run(tables, num_splits=n, sliding_window=40)
    poisoned, k2, v2 = tables.clone(), k.clone(), v.clone()
    for s, length in enumerate(lens):
        poisoned[s, : (length - 40) // size] = -1
        for position in range(length - 40 if cache is None else 0):
            k2[tables[s, position // size], position % size] = math.nan
            v2[tables[s, position // size], position % size] = math.nan
    assert same(got, run(poisoned, k2, v2, num_splits=n, sliding_window=40)), "read left of the window"

    bad = tables.clone()
    bad[0, 3], bad[1], bad[2, 0] = NO_BLOCK, -5, blocks
    version = rng.choice([1, 2])
    out, lse = run(bad, version=version, num_splits=n if version == 2 else 0, sinks=torch.randn(heads))
    assert (out[1] == 0).all() and lse[1].isinf().all() and not out.isnan().any(), "a sequence without any block"
    out, lse = run(bad, version=version, num_splits=n if version == 2 else 0)
    rest = torch.cat([tables[0, :3], tables[0, 4:]])[None]  # one query over all keys: their places do not matter
    want = REFERENCES["paged_attention"](
        query[:1].double(), k, v, rest, ints([lens[0] - size]), ints([0]), ints([1]), 1, d**-0.5,
        return_lse=True, **scales,
    )  # fmt: skip
    values = largest(v if cache is None else v * scales["v_scale"][..., None])
    errors = compare((out[:1], lse[:1]), want, values, cache is not None)
    assert max(errors) <= 1, f"{errors} of the allowed, a bad block id inside of the length: {dtype} {cache} {n} splits"
    return errors


def check_prefill_without_blocks(rng: random.Random) -> tuple[float, float]:
    """Many rows a sequence, none of whose blocks exist: outputs 0, lse -inf."""
    dtype, rows = rng.choice(FLOATS), rng.randint(20, 80)
    k = torch.randn(4, 16, 2, 64).to(dtype)
    out, lse = ops.paged_attention(
        torch.randn(rows, 8, 64).to(dtype), k, k, torch.full((1, 8), NO_BLOCK, dtype=torch.int32), ints([100]),
        ints([0]), ints([rows]), max_query_len=rows, sinks=torch.randn(8), return_lse=True,
    )  # fmt: skip
    assert (out == 0).all() and lse.isinf().all()
    return 0.0, 0.0


def check_lengths(rng: random.Random) -> tuple[float, float]:
    """Lengths past the table, rows outside of the query and empty tensors do nothing; none of them is read."""
    dtype, version = rng.choice(FLOATS), rng.choice([None, 1, 2])
    query, k = torch.randn(3, 8, 64).to(dtype), torch.randn(9, 16, 2, 64).to(dtype)
    tables, rows, one = torch.arange(9, dtype=torch.int32).view(3, 3), ints([0, 1, 2]), ints([1, 1, 1])

    def run(query: Tensor, k: Tensor, tables: Tensor, lens: Tensor, start: Tensor, count: Tensor, most: int) -> Any:
        options: dict[str, Any] = {"max_query_len": most, "version": version, "return_lse": True}
        return ops.paged_attention(query, k, k, tables, lens, start, count, **options)

    out, _ = run(query, k, tables, ints([100000, 48, 2**31 - 1]), ints([0, -5, 2]), ints([1, 9, 2**31 - 1]), 500)
    assert not out[0].isnan().any()
    none = ints([])
    for got in (
        run(query, k, tables[:0], none, none, none, 1),
        run(query, k, tables[:, :0], ints([5, 5, 5]), rows, one, 1),
        run(query, k[:0], tables, ints([5, 5, 5]), rows, one, 1),
    ):
        assert (got[0] == 0).all() and got[1].isinf().all()
    assert run(query[:0], k, tables, one, rows, one, 1)[0].shape[0] == 0
    return 0.0, 0.0


def check_many_sequences(rng: random.Random) -> tuple[float, float]:
    """More sequences than a CTA has threads, equal or not; some are empty, some rows belong to nobody."""
    dtype, count, version = rng.choice(FLOATS), rng.choice([40, 128, 129, 300]), rng.choice([None, None, 2])
    blocks, size, kv_heads, heads, d = 64, 8, rng.choice([1, 2]), 4, 32
    torch.manual_seed(rng.randrange(1 << 30))
    equal = rng.randint(1, 500) if rng.random() < 0.4 else 0
    lens = [equal or rng.choice([0, rng.randint(1, 64), rng.randint(1, 500)]) for _ in range(count)]
    tables = torch.randint(0, blocks, (count, -(-max(lens) // size) + 1)).to(torch.int32)
    k, v = torch.randn(2, blocks, size, kv_heads, d).to(dtype)
    query, gap = torch.randn(count + 1, heads, d).to(dtype), rng.choice([0, 0, count // 2])
    starts = [s + (s >= gap > 0) for s in range(count)]
    problem: Problem = {
        "query": query if gap else query[:count],
        "key_cache": k,
        "value_cache": v,
        "block_tables": tables,
        "seq_lens": ints(lens),
        "query_start": ints(starts),
        "query_len": ints([1] * count),
        "max_query_len": 1,
        "scale": d**-0.5,
        "return_lse": True,
        "version": version,
        "num_splits": rng.choice([0, 3]) if version == 2 else 0,
    }
    got = ops.paged_attention(**problem)
    errors = compare(got, expected(problem), largest(v))
    assert max(errors) <= 1, f"{errors} of the allowed: {dtype} {version} {kv_heads} {lens}"
    return errors


CHECKS: list[tuple[Callable[[random.Random], tuple[float, float]], int]] = [  # how often, of 20
    (check_paged, 11),
    (check_dense, 3),
    (check_tile_edges, 1),
    (check_merge, 1),
    (check_invariance, 1),
    (check_prefill_without_blocks, 1),
    (check_lengths, 1),
    (check_many_sequences, 1),
]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random problems for the attention kernels of the emulated device.")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next ones count up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checks = [check for check, count in CHECKS for _ in range(count)]
    worst: dict[str, list[float]] = {}
    began = time.monotonic()
    for seed in range(options.seed, options.seed + options.cases):
        check = checks[seed % len(checks)]
        try:
            errors = check(random.Random(seed))
        except (AssertionError, RuntimeError) as error:
            print(f"seed {seed}, {check.__name__}: FAILED: {error}")
            return 1
        entry = worst.setdefault(check.__name__, [0, 0.0, 0.0])
        worst[check.__name__] = [entry[0] + 1, max(entry[1], errors[0]), max(entry[2], errors[1])]
    for name, (count, of_out, of_lse) in worst.items():
        print(f"{name:30} {count:5.0f} cases, of the allowed: output {of_out:.3f}, lse {of_lse:.3f}")
    print(f"{options.cases} cases, {time.monotonic() - began:.0f} s: all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
