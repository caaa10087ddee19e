"""Prefill attention on a GPU in under a minute: layouts read off, results against float64, times beside PyTorch's.

    python tests/gpu/prefill_check.py                 # all of it
    python tests/gpu/prefill_check.py --only times

Three parts. `layout`: attention whose weights are one-hot and whose values name their key or their column, so that a
wrong layout of a tile or of registers can be read from what comes out. `errors`: ragged batches in all variants,
poisoned wherever a kernel must not look, with the largest and the root mean square error as multiples of those of plain
PyTorch in the same dtype. `times`: TFLOP/s by CUDA graph replay, with SDPA beside where it does the same. Exit status 1
if anything is wrong. `--device cpu` runs the first two on the CPU kernels or the emulated device.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import torch_pagedkv  # noqa: E402, F401

NO_BLOCK = 2147480000
ROWS = 128  # of a work item of the kernels: where to look when rows are wrong
OPS = torch.ops.torch_pagedkv


@dataclass
class Case:
    """One call: `seqs` are (query tokens, keys) each, `options` keyword arguments of the op."""

    name: str
    seqs: list[tuple[int, int]]
    heads: tuple[int, int] = (8, 2)  # query, KV
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page: int = 16
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """The op's arguments, and each sequence's keys and values for the reference."""

    args: tuple[Any, ...]
    keys: list[Tensor]
    values: list[Tensor]
    starts: list[int]


def ints(values: list[int], device: str) -> Tensor:
    """An int32 vector."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def build(case: Case, device: str, seed: int = 0) -> Call:
    """Random inputs. Slots that belong to nobody hold NaN, unused table entries a block id far outside."""
    g = torch.Generator(device).manual_seed(seed)
    (hq, hkv), d = case.heads, case.dim
    starts = [3]  # three rows in front belong to no sequence
    for rows, _ in case.seqs:
        starts.append(starts[-1] + max(rows, 0))
    query = torch.randn(starts[-1], hq, d, generator=g, device=device).to(case.dtype)
    lens = [max(keys, 0) for _, keys in case.seqs]
    keys = [torch.randn(n, hkv, d, generator=g, device=device).to(case.dtype) for n in lens]
    values = [torch.randn(n, hkv, d, generator=g, device=device).to(case.dtype) for n in lens]
    common = [ints(starts[:-1], device), ints([r for r, _ in case.seqs], device)]
    most_rows = max(1, *(r for r, _ in case.seqs))
    scale = d**-0.5
    if case.dense:
        nan = torch.full((1, hkv, d), math.nan, device=device, dtype=case.dtype)
        key, value = torch.cat([*keys, nan]), torch.cat([*values, nan])
        first = ints([sum(lens[:i]) for i in range(len(lens))], device)
        args = (query, key, value, *common, first, ints([n for _, n in case.seqs], device), most_rows, max(lens), scale)
        return Call(args, keys, values, starts)
    page = case.page
    blocks = [-(-n // page) for n in lens]
    total = sum(blocks) + 5
    order = torch.randperm(total, generator=g, device=device)
    cache = [torch.full((total, page, hkv, d), math.nan, device=device, dtype=case.dtype) for _ in range(2)]
    table = torch.full((len(lens), max(blocks) + 2), NO_BLOCK, dtype=torch.int32, device=device)
    used = 0
    for s, n in enumerate(lens):
        mine = order[used : used + blocks[s]]
        used += blocks[s]
        table[s, : blocks[s]] = mine.int()
        at = torch.arange(n, device=device)
        for pool, x in zip(cache, (keys[s], values[s]), strict=True):
            pool[mine[at // page], at % page] = x
    args = (query, *cache, table, ints([n for _, n in case.seqs], device), *common, most_rows, scale)
    return Call(args, keys, values, starts)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One sequence in the precision of its arguments (softmax at least float32): out [Q, Hq, D], lse [Q, Hq]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    logits = (q.transpose(0, 1) @ k.permute(1, 2, 0)).to(wide) * scale
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    rows, keys = q.shape[0], k.shape[0]
    at, key = torch.arange(keys - rows, keys, device=q.device)[:, None], torch.arange(keys, device=q.device)
    if (slopes := options.get("alibi_slopes")) is not None:
        logits = logits + slopes.to(wide)[:, None, None] * (key - at)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    if options.get("causal", True):
        seen &= key <= at
    if window := options.get("sliding_window"):
        seen &= (key > at - window) & (key < at + window)
    logits = logits.masked_fill(~seen, -math.inf)
    if (sinks := options.get("sinks")) is not None:
        logits = torch.cat([logits, sinks.to(wide)[:, None, None].expand(-1, rows, 1)], -1)
    lse = torch.logsumexp(logits, -1)
    nothing = ~seen.any(1)
    weights = torch.softmax(logits, -1)[..., :keys].masked_fill(nothing[:, None], 0)
    out = (weights.to(q.dtype) @ v.transpose(0, 1)).transpose(0, 1)
    return out, lse.masked_fill(nothing, -math.inf).T


def reference(call: Call, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All sequences in `dtype`; 0 and -inf where no key is seen."""
    query = call.args[0]
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float64, device=query.device)
    for s, (rows, keys) in enumerate(case.seqs):
        if rows > 0 and keys > 0:
            own = slice(call.starts[s], call.starts[s] + rows)
            one, sums = attend(
                query[own].to(dtype), call.keys[s].to(dtype), call.values[s].to(dtype), case.dim**-0.5, case.options
            )
            out[own], lse[own] = one, sums.double()
    return out, lse


def run(call: Call, case: Case, return_lse: bool = True) -> tuple[Tensor, Tensor]:
    """The op itself."""
    op = OPS.flash_attention if case.dense else OPS.paged_attention
    out, lse = op(*call.args, return_lse=return_lse, **case.options)
    return out, lse


def spread(values: Tensor, limit: int = 12) -> str:
    """The first of a set of indices, and how many there are."""
    unique = values.unique()
    shown = ", ".join(str(int(x)) for x in unique[:limit])
    return f"{unique.numel()} ({shown}{', ...' if unique.numel() > limit else ''})"


def explain(got: Tensor, exact: Tensor, call: Call, case: Case) -> None:
    """Where wrong elements sit: sequence, rows of the work item, warps, columns."""
    error = (got.double() - exact).abs()
    bad = ~(error <= 0.05 * float(exact.abs().max()))
    print(f"      {int(bad.sum())} of {bad.numel()} elements far off, {int(got.isnan().sum())} NaN")
    group = case.heads[0] // case.heads[1]
    for s, (rows, keys) in enumerate(case.seqs):
        mine = bad[call.starts[s] : call.starts[s] + max(rows, 0)]
        if not mine.any():
            continue
        token, head, column = mine.nonzero(as_tuple=True)
        row = token * group + head % group
        print(
            f"      sequence {s}: {rows} queries, {keys} keys; KV heads {spread(head // group)}, tokens {spread(token)}"
        )
        print(
            f"        items {spread(row // ROWS)}, rows in them {spread(row % ROWS)}, row % 16 {spread(row % 16, 16)}"
        )
        print(
            f"        warps {spread(row % ROWS // 16)}, columns {spread(column)}, column % 16 {spread(column % 16, 16)}"
        )
        t, h = int(token[0]), int(head[0])
        own = call.starts[s] + t
        print(f"        token {t} head {h}: got   {[round(float(x), 3) for x in got[own, h, :10]]}")
        print(f"        {' ' * len(f'token {t} head {h}')}: exact {[round(float(x), 3) for x in exact[own, h, :10]]}")
        return


def layouts(device: str) -> bool:
    """One-hot weights over named values. Row r looks at key (5 r + 3) % 128 of tile 0, 1 or 2."""
    right = True
    rows = 128
    for dtype in (torch.bfloat16, torch.float16):
        for d in (64, 128, 256):
            for tile in range(3):
                # 128 keys in d >= 64 directions: a direction and its opposite for d = 64
                want = (5 * torch.arange(rows, device=device) + 3) % 128
                unit = torch.zeros(128, d, device=device)
                index = torch.arange(128, device=device)
                unit[index, index % d] = torch.where(index < d, 1.0, -1.0)
                keys = torch.cat([unit * (8 if t == tile else 1) for t in range(3)])
                names = torch.cat([index.float() + (0 if t == tile else 500) for t in range(3)])
                query = (unit[want] * 64)[:, None].to(dtype)
                start = ints([0], device)
                for what in ("key", "column"):
                    values = names[:, None].expand(-1, d) if what == "key" else index.new_tensor(range(d)).float()
                    values = values.expand(384, d).to(dtype)[:, None].contiguous()
                    out, _ = OPS.flash_attention(
                        query, keys.to(dtype)[:, None].contiguous(), values, start, ints([rows], device), start,
                        ints([384], device), rows, 384, 1.0, causal=False,
                    )  # fmt: skip
                    wanted = (want.float()[:, None].expand(rows, d) if what == "key" else values[0, 0]).to(dtype)
                    if torch.equal(out[:, 0], wanted.expand(rows, d)):
                        continue
                    right = False
                    wrong = (out[:, 0] != wanted).nonzero()
                    r, c = (int(x) for x in wrong[0])
                    print(
                        f"  layout {dtype} d {d} tile {tile}, {what}s: WRONG, {len(wrong)} elements, at row {r} col {c}"
                    )
                    print(f"      rows {spread(wrong[:, 0])}, columns {spread(wrong[:, 1])}")
                    print(f"      row {r}: got    {[float(x) for x in out[r, 0, :24]]}")
                    print(f"      column {c}: got    {[float(x) for x in out[:24, 0, c]]}")
                    print(f"      column {c}: wanted {[float(x) for x in wanted.expand(rows, d)[:24, c]]}")
    print(f"layouts: {'OK' if right else 'WRONG'}")
    return right


def cases(device: str, quick: bool) -> list[Case]:
    """Every variant; small ones for the emulated device."""
    n = 1 if quick else 4
    many = [(96, 200), (5, 9)], (140, 70)  # heads, so that Hopper's kernel takes 192 rows at a time
    ragged = [(70 * n, 150 * n), (0, 20), (5, 5), (33 * n, 97 * n + 3), (9, -3), (130, 130 + 64 * n)]

    def slopes(heads: int) -> Tensor:
        return torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)

    sinks = torch.linspace(-1, 3, 8, device=device)
    half = torch.float16
    out = [
        Case("one tile", [(64, 64)], (2, 2)),
        Case("one tile, not causal", [(128, 128)], (1, 1), options={"causal": False}),
        Case("two tiles, not causal", [(128, 256)], (1, 1), options={"causal": False}),
        Case("many tiles, not causal", [(128, 1000 * n)], (1, 1), options={"causal": False}),
        Case("causal", [(300 * n, 300 * n)], (4, 1)),
        Case("prefix", [(100, 700 * n)], (4, 1)),
        Case("ragged", ragged),
        Case("ragged, float16", ragged, dtype=half),
        Case("ragged, dense", ragged, dense=True),
        Case("window 40", ragged, options={"sliding_window": 40}),
        Case("window 200, not causal", ragged, options={"sliding_window": 200, "causal": False}),
        Case("window 333, dense", ragged, dense=True, options={"sliding_window": 333}),
        Case("softcap 5", ragged, options={"softcap": 5.0}),
        Case("softcap 0.5", ragged, options={"softcap": 0.5}),
        Case("softcap 50", ragged, options={"softcap": 50.0}),
        Case("alibi", ragged, options={"alibi_slopes": slopes(8)}),
        Case("sinks", ragged, options={"sinks": sinks}),
        Case(
            "all at once",
            ragged,
            options={"sinks": sinks, "alibi_slopes": slopes(8), "softcap": 9.0, "sliding_window": 77},
        ),
        Case("many sequences", [(17 + i % 9, 40 + 3 * i) for i in range(70)], (4, 2)),
        Case("many heads", *many),
        Case("many heads, head_dim 64, float16", *many, dim=64, dtype=half),
        Case("many heads, dense, window", *many, dense=True, options={"sliding_window": 60}),
        Case("many heads, softcap 50", *many, options={"softcap": 50.0}),
    ]
    out += [Case(f"group {g}", ragged, (2 * g, 2), dtype=half if g % 2 else torch.bfloat16) for g in (1, 3, 7, 8, 16)]
    out += [Case(f"page {page}", ragged, page=page) for page in (8, 32, 64, 128)]
    out += [Case(f"head_dim {d}", ragged, dim=d, dtype=half if d % 32 else torch.bfloat16) for d in
            (40, 64, 80, 96, 112, 120, 192, 256)]  # fmt: skip
    out += [Case("head_dim 64, window", ragged, dim=64, options={"sliding_window": 100})]
    out += [Case("head_dim 256, softcap, window", ragged, dim=256, options={"softcap": 50.0, "sliding_window": 100})]
    return out


def errors(device: str, quick: bool) -> bool:
    """Every case against float64, relative to plain PyTorch in the same dtype."""
    right = True
    for case in cases(device, quick):
        call = build(case, device)
        got, lse = run(call, case)
        exact, exact_lse = reference(call, case, torch.float64)
        stock, _ = reference(call, case, case.dtype)
        # PyTorch's largest error may be small by luck; half a step of the dtype is what the last rounding may cost
        floor = 0.51 * torch.finfo(case.dtype).eps * float(exact.abs().max())
        capped = "softcap" in case.options  # without an lse the logits may be rounded more
        plain = run(call, case, return_lse=False)[0] if capped else got
        mine = torch.stack([got.double() - exact, plain.double() - exact])
        theirs = stock.double() - exact
        ratios = [
            float(mine.abs().max()) / max(float(theirs.abs().max()), floor / 2),
            float(mine.square().flatten(1).mean(1).max().sqrt() / theirs.square().mean().sqrt()),
        ]
        known = exact_lse.isfinite()
        lse_error = float((lse.double() - exact_lse)[known].abs().max())
        empty = torch.equal(lse[~known].double(), exact_lse[~known])
        again, again_lse = run(call, case)
        same = torch.equal(got, again) and torch.equal(lse, again_lse)
        same &= not capped or torch.equal(plain, run(call, case, return_lse=False)[0])
        ok = all(r <= 2 for r in ratios) and lse_error < 3e-4 * max(1, float(exact_lse[known].abs().max())) and empty
        ok &= same
        right &= ok
        notes = "" if empty else ", lse of rows without keys"
        notes += "" if same else ", not the same twice"
        print(
            f"{'OK   ' if ok else 'WRONG'} {case.name:32} error max {ratios[0]:.3g} rms {ratios[1]:.3g} of PyTorch's, "
            f"lse {lse_error:.1e}{notes}"
        )
        if not ok and not all(r <= 2 for r in ratios):
            explain(got, exact, call, case)
    return right


def replay_ms(function: Any, target_ms: float = 60.0) -> float:
    """Milliseconds a call, by replay of a CUDA graph of it."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(n: int) -> float:
        begin.record()
        for _ in range(n):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / n

    timed(2)
    once = timed(3)
    return min(timed(max(3, int(target_ms / 3 / once))) for _ in range(3))


def times() -> None:
    """TFLOP/s of named shapes."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    llama = {"heads": (32, 8)}
    table = [
        Case("Llama-3-8B 512", [(512, 512)], **llama),
        Case("Llama-3-8B 2k", [(2048, 2048)], **llama),
        Case("Llama-3-8B 8k", [(8192, 8192)], **llama),
        Case("Llama-3-8B 32k", [(32768, 32768)], **llama),
        Case("Llama-3-8B 8k, page 64", [(8192, 8192)], page=64, **llama),
        Case("Llama-3-8B 8k, dense", [(8192, 8192)], dense=True, **llama),
        Case("Llama-3-8B 8k, not causal", [(8192, 8192)], options={"causal": False}, **llama),
        Case("Llama-3-8B 512 after 16k", [(512, 16896)], **llama),
        Case("Llama-3-8B ragged 16 x 0.5k..4k", [(512 + 229 * i, 512 + 229 * i) for i in range(16)], **llama),
        Case("window 4096 of 16k", [(16384, 16384)], options={"sliding_window": 4096}, **llama),
        Case("softcap 50, 8k", [(8192, 8192)], options={"softcap": 50.0}, **llama),
        Case("MHA (Llama-2-7B) 8k", [(8192, 8192)], (32, 32)),
        Case("group 7 (Qwen2-7B) 8k", [(8192, 8192)], (28, 4)),
        Case("head 64, 8k", [(8192, 8192)], (32, 8), dim=64),
        Case("head 256 (Gemma-2-9B) 8k", [(8192, 8192)], (16, 8), dim=256),
        Case("float16 8k", [(8192, 8192)], dtype=torch.float16, **llama),
    ]
    print(f"{'':34}{'ms':>9}{'TFLOP/s':>9}{'SDPA':>9}")
    for case in table:
        call = build(case, "cuda")
        causal, window = case.options.get("causal", True), case.options.get("sliding_window", 0)
        pairs = 0
        for rows, keys in case.seqs:
            full = [min(p + 1, keys) if causal else keys for p in range(keys - rows, keys)]
            pairs += sum(min(n, window) if window else n for n in full)
        flops = 4 * pairs * case.heads[0] * case.dim
        op = OPS.flash_attention if case.dense else OPS.paged_attention
        ms = replay_ms(lambda op=op, call=call, case=case: op(*call.args, **case.options))
        theirs = ""
        if len(case.seqs) == 1 and case.seqs[0][0] == case.seqs[0][1] and not set(case.options) - {"causal"}:
            q, k, v = (x.transpose(0, 1)[None] for x in (call.args[0][3:], call.keys[0], call.values[0]))
            stock = replay_ms(
                lambda q=q, k=k, v=v, causal=causal: sdpa(
                    q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
            theirs = f"{flops / stock / 1e9:9.0f}"
        print(f"{case.name:34}{ms:9.4f}{flops / ms / 1e9:9.0f}{theirs}", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prefill attention: layouts, errors, times.")
    parser.add_argument("--only", choices=("layout", "errors", "times"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    began = time.monotonic()
    right = True
    if options.only in (None, "layout"):
        right &= layouts(options.device)
    if options.only in (None, "errors"):
        right &= errors(options.device, options.device == "cpu")
    if options.only in (None, "times") and options.device == "cuda":
        times()
    print(f"{time.monotonic() - began:.0f} s: {'all right' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
