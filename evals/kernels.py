"""How fast is each operator? Time, rate, error and peers on the shapes of real models.

    torch-pagedkv bench [--only decode] [--device cpu] [--json FILE] [--compare OLD.json] [--plot FILE.html]

us       median time of one call. CUDA: a CUDA graph of at least 2 ms of calls, replayed; the sets of inputs are
         rotated, over 256 MiB or 400 sets, whichever is less (the smallest ops find their inputs in the L2 cache, as
         they do in a model). CPU: wall clock, the sets rotated over 64 MiB.
rate     bytes that must be moved, or floating-point operations (the causal half, the window), by time; "of limit"
         compares it with a copy of one large tensor, one large matrix product, or copies to and from pinned memory,
         measured on this machine in this run. Decoding mostly reads, which can be faster than a copy.
error    largest difference from the float64 reference by its largest entry; for ops that move or pick, the share of
         entries that differ. A row whose error is above its bound is printed as WRONG and makes the exit code 1.
peers    other kernels on the same inputs (PyTorch's, and those of other packages that are there), with their time by
         ours ("2.0x": ours takes half as long), the fastest first.

With --compare a row that takes longer than it did by more than measurements scatter is marked SLOWER, and named again
at the end. --plot draws the rooflines of evals/roofline.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torch_pagedkv.cli import positive

from . import command, machine, render, timing
from . import peers as others
from .problems import (
    KV_DTYPES,
    MODELS,
    PAGE,
    Env,
    Problem,
    Tensors,
    cascade,
    copy,
    eight,
    flash,
    from_eight,
    gated,
    gather,
    gguf,
    int4,
    merge,
    norm,
    paged,
    projection,
    rotary,
    sampling,
    swap,
    swap_both_ways,
    to_eight,
    write,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MIB = 1 << 20
ROTATED = {"cuda": 256 * MIB, "cpu": 64 * MIB}  # more than the last cache
MAX_SETS = {"cuda": 400, "cpu": 32}
SECONDS = {"cuda": 0.05, "cpu": 0.2}  # of measuring for each time
SLACK = {"cuda": (1.05, 0.5), "cpu": (1.25, 1.0)}  # slower is what takes more than so many times as long and so many us
FAMILIES = {  # section of the table -> its ops
    "attention": ("paged_attention", "paged_attention_cascade", "flash_attention", "merge_attention_states"),
    "cache": ("reshape_and_cache", "gather_cache", "copy_blocks", "swap_blocks"),
    "norm": ("rms_norm", "add_rms_norm", "layer_norm"),
    "linear": ("linear",),
    "int4": ("int4_linear",),
    "gguf": ("q4k_linear", "int8_linear"),
    "8-bit product": ("quantize_per_token", "dequantize_sums", "scaled_linear"),
    "rotary": ("rotary_embedding", "rotary_and_cache"),
    "activation": ("silu_and_mul", "gelu_and_mul", "bias_act"),
    "sampling": ("sample", "argmax"),
}


# ---- the table of cases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row: an op on the sizes of a model. `quick` rows are those of --quick."""

    op: str
    model: str
    build: Callable[..., Problem]
    sizes: dict[str, Any]
    devices: tuple[str, ...]
    quick: bool = False

    @property
    def shape(self) -> str:
        """The row's name beside the op's."""
        said = [
            name.replace("_", " ") + ("" if value is True else f" {value}")
            for name, value in self.sizes.items()
            if value is not False and name not in ("op", "flex")
        ]
        return ", ".join([self.model, *said])

    @property
    def phase(self) -> str:
        """For --only: decode or prefill, where the sizes say it."""
        if self.build in (paged, flash):
            return "prefill" if self.sizes.get("query", 1) > 1 or self.build is flash else "decode"
        rows = self.sizes.get("tokens", self.sizes.get("rows"))
        return "" if rows is None else "decode" if rows <= 64 else "prefill"


GPU, CPU, BOTH = ("cuda",), ("cpu",), ("cuda", "cpu")
NAMED = L3, L2, QWEN, QWEN3, GEMMA, SMOL, MISTRAL = list(MODELS)[:7]

#: op, model, builder, devices, then sizes; the first row of each op and device is in --quick
TABLE: list[tuple[str, str, Callable[..., Problem], tuple[str, ...], list[dict[str, Any]]]] = [
    ("paged_attention", L3, paged, GPU, [  # decode
        {"batch": 32, "context": 2048, "flex": True},
        *[{"batch": b, "context": n} for b, n in (
            (1, 1024), (1, 8192), (1, 32768), (1, 131072), (32, 8192), (128, 1024), (128, 4096)
        )],
        {"batch": 64, "context": 2048, "lognormal": True},
        *[{"batch": b, "context": n, "page": 64} for b, n in ((1, 8192), (32, 2048), (32, 8192))],
        *[{"batch": 32, "context": n, "kv": kv} for kv in KV_DTYPES for n in (2048, 4096, 8192)],
        {"batch": 64, "context": 2048, "lognormal": True, "kv": "int8"},
        *[{"batch": b, "context": n, "batch_invariant": True} for b, n in (
            (1, 1024), (1, 8192), (1, 32768), (32, 2048), (32, 8192), (128, 1024)
        )],
        {"batch": 64, "context": 2048, "lognormal": True, "batch_invariant": True},
    ]),
    ("paged_attention", L2, paged, GPU, [
        *[{"batch": 32, "context": n} for n in (128, 512, 2048)], {"batch": 32, "context": 2048, "kv": "int8"},
    ]),
    *[("paged_attention", m, paged, GPU, [
        {"batch": 1, "context": 8192}, {"batch": 32, "context": 2048},
    ]) for m in (QWEN, QWEN3, GEMMA)],
    ("paged_attention", GEMMA, paged, GPU, [{"batch": 32, "context": 2048, "kv": "int8"}]),
    ("paged_attention", SMOL, paged, BOTH, [
        {"batch": 8, "context": 512}, {"batch": 1, "context": 512}, {"batch": 1, "context": 512, "query": 512},
        {"batch": 8, "context": 512, "lognormal": True}, {"batch": 8, "context": 512, "kv": "int8"},
    ]),
    ("paged_attention", SMOL, paged, GPU, [{"batch": 64, "context": 4096}]),
    ("paged_attention", MISTRAL, paged, GPU, [
        {"batch": b, "context": 8192, "window": 4096} for b in (1, 32)
    ]),
    *[("paged_attention", m, paged, GPU, [{"batch": 32, "context": 2048}]) for m in list(MODELS)[7:]],
    ("paged_attention", L3, paged, GPU, [  # prefill
        *[{"batch": 1, "context": n, "query": n} for n in (512, 2048, 8192, 32768)],
        {"batch": 8, "context": 1024, "query": 1024},
        {"batch": 1, "context": 16384 + 512, "query": 512, "flex": True},
        {"batch": 1, "context": 8192, "query": 8192, "page": 64},
        {"batch": 1, "context": 8192, "query": 8192, "softcap": 50.0, "flex": True},
    ]),
    ("paged_attention", L3, paged, GPU, [  # prefill as on GPUs before Hopper
        *[{"batch": 1, "context": n, "query": n, "mma_sync": True} for n in (512, 2048, 8192, 32768)],
        {"batch": 8, "context": 1024, "query": 1024, "mma_sync": True},
        {"batch": 1, "context": 16384 + 512, "query": 512, "mma_sync": True},
        {"batch": 1, "context": 8192, "query": 8192, "page": 64, "mma_sync": True},
        {"batch": 1, "context": 8192, "query": 8192, "softcap": 50.0, "flex": True, "mma_sync": True},
    ]),
    *[("paged_attention", m, paged, GPU, [{"batch": 1, "context": 8192, "query": 8192, "mma_sync": True}])
      for m in (L2, QWEN, GEMMA, SMOL)],
    ("paged_attention", MISTRAL, paged, GPU, [
        {"batch": 1, "context": 8192, "query": 8192, "window": 4096, "mma_sync": True},
    ]),
    *[("paged_attention", m, paged, GPU, [
        {"batch": 1, "context": 2048, "query": 2048}, {"batch": 1, "context": 8192, "query": 8192},
    ]) for m in (L2, QWEN, QWEN3, GEMMA, SMOL)],
    ("paged_attention", MISTRAL, paged, GPU, [
        {"batch": 1, "context": 8192, "query": 8192, "window": 4096, "flex": True},
    ]),
    ("paged_attention", GEMMA, paged, GPU, [
        {"batch": 1, "context": 8192, "query": 8192, "window": 4096, "softcap": 50.0},
    ]),
    ("paged_attention", L3, paged, CPU, [
        {"batch": 1, "context": 1024}, {"batch": 4, "context": 1024, "batch_invariant": True},
        {"batch": 4, "context": 1024}, {"batch": 1, "context": 256, "query": 256},
    ]),
    *[("paged_attention", m, paged, CPU, [{"batch": 1, "context": 1024}]) for m in (L2, QWEN, QWEN3, GEMMA)],
    ("paged_attention", MISTRAL, paged, CPU, [{"batch": 1, "context": 1024, "window": 512}]),
    *[("paged_attention", m, paged, CPU, [{"batch": 1, "context": 256, "query": 256}]) for m in (QWEN, GEMMA)],
    ("paged_attention_cascade", L3, cascade, GPU, [
        {"batch": 64, "shared": 8192, "own": 256}, {"batch": 16, "shared": 4096, "own": 256},
    ]),
    ("paged_attention_cascade", SMOL, cascade, CPU, [{"batch": 8, "shared": 512, "own": 64}]),
    ("flash_attention", L3, flash, GPU, [{"batch": 1, "length": n} for n in (2048, 8192)]),
    ("flash_attention", SMOL, flash, BOTH, [{"batch": 4, "length": 256}]),
    ("merge_attention_states", L3, merge, BOTH, [{"tokens": n} for n in (32, 1024)]),
    *[(op, model, build, devices, [{size: n, **more} for n in sizes])
      for op, build, size, more in (
          ("reshape_and_cache", write, "tokens", {}),
          ("reshape_and_cache", write, "tokens", {"kv": "int8"}),
          ("reshape_and_cache", write, "tokens", {"kv": "fp8"}),
          ("rms_norm", norm, "rows", {"op": "rms_norm"}),
          ("add_rms_norm", norm, "rows", {"op": "add_rms_norm"}),
          ("layer_norm", norm, "rows", {"op": "layer_norm"}),
          ("rotary_embedding", rotary, "tokens", {}),
          ("rotary_and_cache", rotary, "tokens", {"kv": "same"}),
          ("rotary_and_cache", rotary, "tokens", {"kv": "int8"}),
          ("silu_and_mul", gated, "tokens", {"op": "silu_and_mul"}),
          ("gelu_and_mul", gated, "tokens", {"op": "gelu_and_mul"}),
          ("bias_act", gated, "tokens", {"op": "bias_act"}),
      )
      for model, devices, sizes in ((L3, GPU, (4096, 1, 32)), (SMOL, BOTH, (8, 512)), (L3, CPU, (8, 512)))],
    *[(op, L3, build, GPU, [{size: 16384, **more}])  # of 64 MiB and more, where 4096 tokens are less
      for op, build, size, more in (
          ("reshape_and_cache", write, "tokens", {}),
          ("reshape_and_cache", write, "tokens", {"kv": "int8"}),
          ("reshape_and_cache", write, "tokens", {"kv": "fp8"}),
          ("layer_norm", norm, "rows", {"op": "layer_norm"}),
          ("rotary_and_cache", rotary, "tokens", {"kv": "int8"}),
          ("quantize_per_token", to_eight, "tokens", {"stored": "int8"}),
          ("quantize_per_token", to_eight, "tokens", {"stored": "fp8"}),
      )],
    *[(op, model, build, GPU, [{size: n, **more} for n in (32, 4096)])  # of a batch's decoding step, of a prompt
      for op, build, size, more in (
          ("reshape_and_cache", write, "tokens", {}),
          ("rms_norm", norm, "rows", {"op": "rms_norm"}),
          ("add_rms_norm", norm, "rows", {"op": "add_rms_norm"}),
          ("rotary_embedding", rotary, "tokens", {}),
          ("rotary_and_cache", rotary, "tokens", {"kv": "same"}),
          ("silu_and_mul", gated, "tokens", {"op": "silu_and_mul"}),
      )
      for model in (L2, QWEN, QWEN3, GEMMA, SMOL)],
    ("gelu_and_mul", GEMMA, gated, GPU, [{"tokens": n, "op": "gelu_and_mul"} for n in (32, 4096)]),
    *[("linear", model, projection, devices, [{"rows": n} for n in (1, 8)])
      for model, devices in ((SMOL, BOTH), (L3, BOTH))],
    *[("int4_linear", model, int4, devices, [
        {"layer": layer, "rows": n, "group": group} for layer in layers for n in rows
      ]) for model, devices, layers, rows, group in (
          (L3, BOTH, ("q",), (1, 8, 64), 128),
          (L3, GPU, ("qkv", "gate", "down", "gate+up"), (1, 8, 16, 32, 64, 256, 1024), 128),
          (SMOL, BOTH, ("q", "k", "gate", "down"), (1, 8, 64, 512), 64),
      )],
    *[(op, model, gguf, BOTH, [{"layer": layer, "rows": n, "kind": kind} for n in (1, 8, 64)])
      for op, kind in (("q4k_linear", "Q4_K"), ("int8_linear", "Q8_0"))
      for model, layer in ((L3, "q"), (SMOL, "down"))],
    *[("int8_linear", L3, gguf, GPU, [
        {"layer": layer, "rows": n, "kind": "Q8_0"} for n in (1, 8, 16, 32, 64, 256, 1024)
      ])
      for layer in ("qkv", "down", "gate+up")],
    *[("scaled_linear", L3, eight, GPU, [{"layer": layer, "rows": n, "stored": s} for n in (1, 8) for s in KV_DTYPES])
      for layer in ("q", "down", "gate+up")],
    ("scaled_linear", SMOL, eight, BOTH, [{"layer": "down", "rows": n, "stored": "int8"} for n in (1, 8)]),
    *[("quantize_per_token", model, to_eight, devices, [{"tokens": n, "stored": s} for n in sizes for s in KV_DTYPES])
      for model, devices, sizes in ((L3, GPU, (1, 4096)), (SMOL, BOTH, (8, 512)))],
    *[("dequantize_sums", model, from_eight, devices, [{"tokens": n} for n in sizes])
      for model, devices, sizes in ((L3, GPU, (1, 4096)), (SMOL, BOTH, (8, 512)))],
    *[("gather_cache", L3, gather, GPU, [{"batch": 8, "context": 4096, "kv": kv}]) for kv in ("same", "int8", "fp8")],
    ("gather_cache", SMOL, gather, BOTH, [{"batch": 4, "context": 512}]),
    ("copy_blocks", L3, copy, GPU, [{"layers": 32, "pairs": n} for n in (16, 1, 64)]),
    ("copy_blocks", SMOL, copy, BOTH, [{"layers": 30, "pairs": 4}]),
    ("swap_blocks", L3, swap, GPU, [
        {"pairs": 256, "to_host": to, "adjacent": adjacent} for to in (True, False) for adjacent in (False, True)
    ]),
    ("swap_blocks", L3, swap_both_ways, GPU, [
        {"pairs": 1024} | more
        for more in ({}, {"computing": True}, {"adjacent": True}, {"computing": True, "adjacent": True})
    ]),
    ("swap_blocks", SMOL, swap, BOTH, [{"pairs": 64, "to_host": True}]),
    *[("argmax" if mode == "argmax" else "sample", model, sampling, devices, [{"rows": n, "mode": mode} for n in sizes])
      for mode in ("argmax", "temperature", "top-k, top-p", "min-p")
      for model, devices, sizes in ((L3, GPU, (1, 32, 256)), (QWEN, GPU, (1, 64)), (SMOL, BOTH, (1, 8)))],
]  # fmt: skip


def cases(device: str, quick: bool, only: Sequence[str]) -> list[Case]:
    """The rows for a device whose "op phase shape" contains one of `only` (all without), in the order of FAMILIES."""
    found: list[Case] = []
    for op, model, build, devices, all_sizes in TABLE:
        for sizes in all_sizes:
            if device in devices:
                first = not any(c.op == op for c in found)
                found.append(Case(op, model, build, sizes, devices, quick=first))
    order = [op for family in FAMILIES.values() for op in family]
    found.sort(key=lambda c: order.index(c.op))
    return [
        c
        for c in found
        if (c.quick or not quick)
        and (not only or any(x.lower() in f"{c.op} {c.phase} {c.shape}".lower() for x in only))
    ]


# ---- measuring -------------------------------------------------------------------------------------------------------


Timer = Callable[..., tuple[float, str]]  # (call, sets, seconds): us, how


def difference(got: Tensors, exact: Tensors, equal: bool) -> float:
    """The error of a row, as the module's docstring defines it."""
    worst = 0.0
    for g, e in zip(got, exact, strict=True):
        if g.shape != e.shape:
            return math.inf
        if not g.numel():
            continue
        if equal:
            error = float((g.cpu() != e.cpu()).double().mean())
        else:
            e = e.double().cpu()
            error = float((g.double().cpu() - e).abs().max() / e.abs().max().clamp_min(1e-30))
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def measure(case: Case, env: Env, limit: dict[str, float], seconds: float, peers: bool) -> dict[str, Any]:
    """One row of the result; an op that raises gives a row with its message."""
    row: dict[str, Any] = {"op": case.op, "shape": case.shape}
    began = time.perf_counter()
    kind = env.device.type
    torch.manual_seed(0)
    try:
        problem = case.build(env, MODELS[case.model], **case.sizes)
        count = max(1, min(MAX_SETS[kind], math.ceil(ROTATED[kind] / problem.moved)))
        sets = [problem.make() for _ in range(count)]
        exact = problem.truth(sets[0])
        error = difference(problem.result(sets[0], problem.call(sets[0])), exact, problem.bound == 0)
        del exact
        timer: Timer = partial(timing.cuda, graphed=problem.graphed) if kind == "cuda" else timing.cpu
        us, how = timer(problem.call, sets, seconds)
        unit, work = ("TFLOP/s", problem.flops / 1e6) if problem.computes else ("GB/s", problem.moved / 1e3)
        row |= {"us": us, "timed": how, "rate": work / us, "unit": unit, "sets": count}
        row |= {"bytes": problem.moved, "flops": problem.flops, "of_limit": work / us / limit[problem.limit or unit]}
        row |= {"error": error, "bound": problem.bound, "wrong": not error <= problem.bound}
        chosen = problem.peers if peers else {}
        row["peers"] = {name: beside(peer, sets, partial(timer, seconds=seconds)) for name, peer in chosen.items()}
    except (RuntimeError, NotImplementedError) as problem_of_ours:
        row |= {"failed": brief(problem_of_ours), "wrong": True}
    row["took_s"] = round(time.perf_counter() - began, 3)
    return row


def brief(problem: Exception) -> str:
    """An error in a line."""
    line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return line if len(line) <= 160 else f"{line[:157]}..."


def beside(peer: Callable[[Any], Any], sets: Sequence[Any], timer: Timer) -> dict[str, Any]:
    """A peer's time, or why there is none."""
    try:
        if isinstance(peer, others.Peer):
            for a in sets:
                peer.prepare(a)
            peer.check(sets[0])
        us, how = timer(peer, sets)
        return {"us": us, "timed": how}
    except Exception as problem:  # theirs, of any kind: such as a number of heads that a backend does not take
        return {"failed": brief(problem)}


# ---- showing ---------------------------------------------------------------------------------------------------------


def changes(result: dict[str, Any]) -> dict[tuple[str, str], tuple[float, bool]]:
    """(op, shape) -> how much faster than `before`, and whether it is slower by more than measurements scatter, of the
    rows that both results have."""
    old = {(row["op"], row["shape"]): row["us"] for row in result["before"]["rows"] if "us" in row}
    factor, us = SLACK[result["device"]]
    return {
        key: (old[key] / row["us"], row["us"] > old[key] * factor + us)
        for row in result["rows"]
        if "us" in row and (key := (row["op"], row["shape"])) in old
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as strings."""
    if "failed" in row:
        return [row["op"], row["shape"], "FAILED", "", "", "", row["failed"]]
    rate = f"{row['rate']:.{max(0, 2 - int(math.log10(max(row['rate'], 1e-9))))}f} {row['unit']}"
    error = f"{row['error']:.1e}" if row["error"] else "0"
    beside = []
    for name, peer in sorted(row["peers"].items(), key=lambda one: one[1].get("us", math.inf)):  # the fastest first
        mark = "*" if peer.get("timed") == "eager" else ""
        said = "failed" if "failed" in peer else f"{peer['us']:.1f}{mark} ({peer['us'] / row['us']:.1f}x)"
        beside.append(f"{name} {said}")
    return [
        row["op"],
        row["shape"],
        f"{row['us']:.1f}{'*' if row['timed'] == 'eager' else ''}",
        rate,
        "" if row["of_limit"] is None else f"{row['of_limit']:.0%}",
        f"WRONG {error}" if row["wrong"] else error,
        "; ".join(beside),
    ]


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The sections of a result, one a family of ops; beside an earlier result, if it is there as `before`."""
    header = ["op", "shape", "us", "rate", "of limit", "error", "peers, us (by ours)"]
    compared = "before" in result
    changed = changes(result) if compared else {}
    found: dict[str, render.Rows] = {}
    for family, members in FAMILIES.items():
        rows = []
        for row in result["rows"]:
            if row["op"] not in members:
                continue
            line, key = cells(row), (row["op"], row["shape"])
            if compared:
                faster, worse = changed.get(key, (None, False))
                change = "-" if faster is None else f"{faster:.2f}x"
                line.insert(5, f"{change} SLOWER" if worse else change)
            rows.append(line)
        if rows:
            found[family] = [[*header[:5], *(["faster than before"] if compared else []), *header[5:]], *rows]
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, more = (__doc__ or "").partition("\n")
    top = argparse.ArgumentParser(
        prog="torch-pagedkv bench",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 on the CPU")
    add("--only", default="", metavar="A,B", help='rows whose "op phase shape" contains one of these')
    add("--quick", action="store_true", help="one row an op")
    add("--no-peers", action="store_true", help="time our ops alone")
    add("--load", action="append", default=[], metavar="LIB", help="a library with peers' operators")
    add("--seconds", type=float, help="of measuring for each time (default: 0.05 on CUDA, 0.2 on the CPU)")
    add("--threads", type=positive, metavar="N", help="of the CPU kernels and of PyTorch")
    add("--json", type=Path, metavar="FILE", help="write the result")
    add("--compare", type=Path, metavar="OLD", help="an earlier result, shown beside; slower rows are marked")
    add("--plot", type=Path, metavar="FILE", help="write rooflines: FILE as HTML, and as PNG beside it")
    return top


def run(args: argparse.Namespace, todo: Sequence[Case], dtype: str) -> dict[str, Any]:
    """Measures the rows."""
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    env = Env(args.device, DTYPES[dtype])
    result: dict[str, Any] = {
        "eval": "kernels",
        "model": f"operators, {dtype}",
        "device": device.type,
        "dtype": dtype,
        "page": PAGE,
        "models": {name: asdict(model) for name, model in MODELS.items()},
        "machine": machine.describe(device, args.argv),
        "clocks": timing.clocks(device, env.dtype),
        "peers": others.versions() if device.type == "cuda" and not args.no_peers else {},
        "limits": timing.limits(device, env.dtype),
        "rows": [],
    }
    seconds = SECONDS[device.type] if args.seconds is None else args.seconds
    began = time.perf_counter()
    with torch.inference_mode():
        for case in (bar := tqdm(todo, file=sys.stderr, unit="row", disable=None)):
            bar.set_description(f"{case.op} {case.shape}")
            result["rows"].append(measure(case, env, result["limits"], seconds, not args.no_peers))
            if device.type == "cuda" and torch.cuda.memory_reserved() > 16 << 30:
                torch.cuda.empty_cache()
    result["took_s"] = round(time.perf_counter() - began, 1)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 if a row is wrong or failed."""
    top = parser()
    args = command.parse(top, argv)
    if args.plot and args.plot.suffix.lower() not in (".html", ".htm"):
        top.error(f"--plot: got {args.plot.name}, needs a name that ends in .html; the picture lies beside it as .png")
    if args.threads:
        torch.set_num_threads(args.threads)
    kind = torch.device(args.device).type
    dtype = args.dtype or ("bfloat16" if kind == "cuda" else "float32")
    todo = cases(kind, args.quick, [x.strip() for x in args.only.split(",") if x.strip()])
    if not todo:
        top.error(f"no row contains any of {args.only!r}; ops: {', '.join(op for f in FAMILIES.values() for op in f)}")
    before = json.loads(args.compare.read_text()) if args.compare else None
    if before and (before["device"], before["dtype"]) != (kind, dtype):
        top.error(f"{args.compare.name} is of {before['device']}, {before['dtype']}, not {kind}, {dtype}")
    if kind == "cuda" and not args.no_peers:
        others.load_vllm()
    for library in args.load:
        torch.ops.load_library(library)
    result = run(args, todo, dtype)
    shown = result if before is None else {**result, "before": before}
    for section in tables(shown).values():
        print(f"\n{render.text(section)}")
    of = result["limits"]
    print(f"\nlimits: copy {of['GB/s']:.0f} GB/s, matrix product {of['TFLOP/s']:.2f} TFLOP/s; * not in a CUDA graph")
    print(f"{machine.summary(result['machine'])}; {len(todo)} rows in {result['took_s']:.0f} s")
    if args.json:
        command.write(args.json, result)
    if args.plot:
        from . import roofline  # which shows our tables

        for line in roofline.write(result, args.plot):
            print(line, file=sys.stderr)
    for (op, shape), (faster, worse) in changes(shown).items() if before else ():
        if worse:
            print(f"SLOWER: {op} {shape}: {faster:.2f}x of {args.compare.name}'s speed", file=sys.stderr)
    wrong = [row for row in result["rows"] if row["wrong"]]
    for row in wrong:
        print(f"WRONG: {row['op']} {row['shape']}: {row.get('failed', row.get('error'))}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
