"""Run every op on small inputs that reach each branch of the kernels, and compare with the references.

Made to run under NVIDIA's checkers, so it is a script, not a test module:

    compute-sanitizer --tool memcheck  --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py --only paged_attention
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/gpu/sanitize.py

It prints a line for each op and exits with 1 if one is wrong. `--device cpu` runs the CPU kernels, or the CUDA kernels
on the emulated device (tests/emulate) when TORCH_PAGEDKV_LIB says so. Each tensor gets an allocation of its own, so
that a read past its end is seen. Cache slots that no sequence owns hold NaN, unused table entries a block id far
outside.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from ops.samples import cascade  # noqa: E402
from ops.samples_small import INT4_KINDS, QUANTIZED, Inputs, Sample  # noqa: E402
from ops.samples_small import samples as small_samples  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

from torch_pagedkv import _native  # noqa: E402
from torch_pagedkv.ops import REFERENCES, SCHEMAS  # noqa: E402

HEAD_DIMS = (32, 64, 80, 128, 192, 256)  # one for each instantiation; 80 leaves a tail
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NO_BLOCK = 2147480000

# (query lengths, KV lengths): a cached prefix, an empty query, all new, more queries than keys, no keys
PREFILL = [70, 0, 5, 33, 9], [150, 20, 5, 20, -3]
DECODE = [1, 1, 0, 1, 1], [150, 1, 9, 33, 0]

FEATURES: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"sliding_window": 17, "sinks": True},
    {"sliding_window": 70, "causal": False},
    {"alibi_slopes": True},
    {"softcap": 5.0, "alibi_slopes": True, "sliding_window": 40, "sinks": True},
]


class Attention:
    """Arguments for the attention ops, poisoned wherever a kernel must not look."""

    def __init__(self, device: str) -> None:
        self.new = Inputs(device)
        # the CPU kernels refuse negative lengths
        self.shortest = 0 if device == "cpu" and _native.libraries["cpu"].target != "emulated CUDA" else -3

    def queries(self, lens: list[int], heads: int, d: int, dtype: torch.dtype, pad: int) -> tuple[Tensor, Tensor]:
        """Query rows, `pad` elements apart, with one that nobody owns between sequences; and the starts."""
        starts = [1 + sum(lens[:s]) + s for s in range(len(lens))]
        query = self.new.normal(sum(lens) + len(lens) + 1, heads, d + pad, dtype=dtype)[..., :d]
        return query, self.new.vector(starts, torch.int32)

    def features(self, heads: int, **kwargs: Any) -> dict[str, Any]:
        """Keyword arguments, with tensors where there was True."""
        if kwargs.pop("alibi_slopes", False):
            kwargs["alibi_slopes"] = self.new.normal(heads, scale=0.1).abs()
        if kwargs.pop("sinks", False):
            kwargs["sinks"] = self.new.normal(heads)
        return {**kwargs, "return_lse": True}

    def paged(
        self,
        lens: tuple[list[int], list[int]],
        d: int,
        dtype: torch.dtype,
        cache: torch.dtype,
        block_size: int = 16,
        heads: tuple[int, int] = (4, 2),
        pad: int = 0,
        **features: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `paged_attention`."""
        new, q_lens, k_lens = self.new, lens[0], [max(self.shortest, k) for k in lens[1]]
        q_heads, kv_heads = heads
        query, starts = self.queries(q_lens, q_heads, d, dtype, pad)
        counts = [-(-max(0, k) // block_size) for k in k_lens]
        blocks, width = sum(counts) + 1, max(counts) + 1
        order = new.permutation(blocks, blocks).cpu()
        tables = torch.full((len(counts), width), NO_BLOCK, dtype=torch.int32)
        free = torch.ones(blocks, block_size, dtype=torch.bool)  # slots that no sequence owns
        for s, count in enumerate(counts):
            tables[s, :count] = order[sum(counts[:s]) :][:count]
            for i in range(max(0, k_lens[s])):
                free[tables[s, i // block_size], i % block_size] = False
        k, v, k_scale, v_scale = new.cache(blocks, block_size, kv_heads, d, cache)
        free = free.to(query.device)
        for x in (k, v) if k_scale is None or v_scale is None else (k_scale, v_scale):
            x[free] = float("nan")
        if k_scale is not None and v_scale is not None:
            k_scale *= 0.05
            v_scale *= 0.05
        vector = [new.vector(x, torch.int32) for x in (k_lens, q_lens)]
        kwargs = {**self.features(q_heads, **features), "k_scale": k_scale, "v_scale": v_scale}
        args = (query, k, v, tables.to(query.device), vector[0], starts, vector[1], max(q_lens), d**-0.5)
        return args, kwargs

    def dense(
        self,
        lens: tuple[list[int], list[int]],
        d: int,
        dtype: torch.dtype,
        heads: tuple[int, int] = (4, 2),
        pad: int = 0,
        **features: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `flash_attention`; the rows of K and V are strided."""
        new, q_lens, k_lens = self.new, lens[0], [max(self.shortest, k) for k in lens[1]]
        query, starts = self.queries(q_lens, heads[0], d, dtype, pad)
        k_starts = [3 + sum(max(0, k) + 3 for k in k_lens[:s]) for s in range(len(k_lens))]
        total = 3 + sum(max(0, k) + 3 for k in k_lens)
        free = torch.ones(total, dtype=torch.bool)
        for start, k_len in zip(k_starts, k_lens):
            free[start : start + max(0, k_len)] = False
        kv = new.normal(2, total, heads[1], d + 8, dtype=dtype)[..., :d]
        kv[:, free.to(kv.device)] = float("nan")
        ints = [new.vector(x, torch.int32) for x in (q_lens, k_starts, k_lens)]
        args = (query, kv[0], kv[1], starts, *ints, max(q_lens), max(k_lens), d**-0.5)
        return args, self.features(heads[0], **features)


def attention_samples(device: str) -> Iterator[Sample]:
    """Every head_dim bucket, dtype, cache and kernel; then block sizes, groups, misaligned queries and features."""
    make = Attention(device)
    for d, dtype in itertools.product(HEAD_DIMS, FLOATS):
        for cache in (dtype, *QUANTIZED):
            yield "paged_attention", *make.paged(PREFILL, d, dtype, cache)
            args, kwargs = make.paged(DECODE, d, dtype, cache)
            yield "paged_attention", args, kwargs
            yield "paged_attention_v1", args, kwargs
            for splits in (0, 3):
                yield "paged_attention_v2", args, {**kwargs, "num_splits": splits}
        yield "flash_attention", *make.dense(PREFILL, d, dtype)
    for dtype, block_size in itertools.product(FLOATS, (8, 32, 64, 128)):
        for lens in (PREFILL, DECODE):
            yield "paged_attention", *make.paged(lens, 64, dtype, dtype, block_size)
    for dtype, heads in itertools.product(FLOATS, ((7, 1), (3, 3), (20, 1))):
        for lens in (PREFILL, DECODE):
            yield "paged_attention", *make.paged(lens, 128, dtype, dtype, heads=heads, pad=3)
        yield "flash_attention", *make.dense(PREFILL, 128, dtype, heads=heads, pad=3)
    for dtype, features in itertools.product(FLOATS, FEATURES):
        for lens, cache in itertools.product((PREFILL, DECODE), (dtype, torch.int8)):
            args, kwargs = make.paged(lens, 64, dtype, cache, **features)
            yield "paged_attention", args, kwargs
            yield "paged_attention_v2", args, {**kwargs, "num_splits": 2}
        yield "flash_attention", *make.dense(PREFILL, 64, dtype, **features)
    for dtype, d in ((torch.float16, 64), (torch.bfloat16, 128)):  # enough rows for 192 at a time
        for features in ({}, FEATURES[-1]):
            yield "paged_attention", *make.paged(([96, 5], [200, 9]), d, dtype, dtype, heads=(140, 70), **features)
    for dtype, d in itertools.product(FLOATS, (64, 256)):
        for groups in (((3, 48), (2, 16)), ((34, 160), (1, 16))):  # by the decode kernel, by the prefill kernel
            own = [1 + 17 * s % 50 for s in range(sum(n for n, _ in groups) + 1)]
            for features in ({}, {"sliding_window": 60, "sinks": True, "alibi": True}, {"cache_dtype": torch.int8}):
                yield "paged_attention_cascade", cascade(device, groups, own, d=d, dtype=dtype, **features).args(), {}
    for dtype, d in itertools.product(FLOATS, (24, 128)):
        a, b = (make.new.normal(9, 3, d, dtype=dtype) for _ in range(2))
        lse_a, lse_b = (make.new.normal(9, 3) for _ in range(2))
        lse_a[:3], lse_b[2:5] = -torch.inf, -torch.inf
        a[:3] = torch.nan  # an empty side may hold anything
        yield "merge_attention_states", (a, lse_a, b, lse_b), {}


def samples(device: str) -> Iterator[Sample]:
    """Yield (op name, args, kwargs), fresh tensors each time."""
    yield from small_samples(device)
    new = Inputs(device, 1)
    for n, dtype in itertools.product((8, 1023, 20000), FLOATS):  # rows in a warp, in a CTA, in several passes
        x, residual, weight = (new.normal(3, n, dtype=dtype) for _ in range(3))
        yield "rms_norm", (x, weight[0], 1e-6), {"weight_offset": 1.0}
        yield "add_rms_norm", (x, residual, weight[0], 1e-6), {}
        yield "layer_norm", (x, weight[0], weight[1], 1e-5), {}
        yield "silu_and_mul", (x, residual), {}
        yield "gelu_and_mul", (x, residual), {}
        yield "bias_act", (x, weight[0], "silu"), {}
        yield "argmax", (x,), {}
        ids = new.vector([1, 2, 3], torch.int64)
        options = {
            "temperature": new.vector([0.7, 1.0, 0.0], torch.float32),
            "top_p": new.vector([0.9] * 3, torch.float32),
        }
        yield "sample", (x, ids, ids), options
    for rows, dtype, kind in itertools.product((1, 16, 17, 70), FLOATS, INT4_KINDS):  # each tile, K split over CTAs
        w = new.int4(160, 1288, 64, kind, torch.float16, ordered=rows != 17)
        x, bias, residual = (new.normal(*s, dtype=dtype) for s in ((rows, 1288), (160,), (rows, 160)))
        yield "int4_linear", (x, w.packed, *w.numbers, w.perm, bias, residual, w.group_size, 1288, "silu"), {}
    if device == "cuda":  # as many weights as it takes for the CTAs of a cluster to share a tile
        w, x = new.int4(4096, 2048, 128, "zeros", torch.float16), new.normal(40, 2048, dtype=torch.float16)
        yield "int4_linear", (x, w.packed, *w.numbers, None, None, None, 128, 2048, "none"), {}
    for rows, dtype in itertools.product((1, 7, 16, 17, 70), FLOATS):
        bias, residual = (new.normal(*s, dtype=dtype) for s in ((150,), (rows, 150)))
        x = new.normal(rows, 1544, dtype=dtype)
        yield "q4k_linear", (x[:, 8:], *new.q4k(150, 6), bias, residual, "silu"), {}
        yield "int8_linear", (x[:, 1:], *new.int8(150, 1543, 32, torch.float16), bias, residual, 32, 1543, "gelu"), {}
        yield "int8_linear", (x, *new.int8(150, 1544, 1600, torch.float32), None, None, 1600, 1544), {}
    for rows, dtype in itertools.product((20, 40, 70, 300), FLOATS[1:]):  # tiles of 32, 64, 128 and 256 rows
        x, bias, residual = (new.normal(*s, dtype=dtype) for s in ((rows, 1536), (272,), (rows, 272)))
        yield "q4k_linear", (x, *new.q4k(272, 6), bias, residual, "silu"), {}
        yield "int8_linear", (x, *new.int8(272, 1536, 32, torch.float16), bias, None, 32, 1536), {}
        yield "int8_linear", (x[:, :1504], *new.int8(272, 1504, 96, dtype), None, residual, 96, 1504), {}
    for n, dtype, stored in itertools.product((24, 4099, 9024), FLOATS, QUANTIZED):
        x, factor = new.normal(5, n + 1, dtype=dtype), new.normal(n).abs()
        yield "quantize_per_token", (x[:, 1:], factor, 0, stored), {}
        rotation = {24: 8, 4099: 0, 9024: 64}[n]
        yield "quantize_per_token", (new.normal(2, 3, n, dtype=dtype), None, rotation, stored), {}
        sums = new.normal(3, n, scale=1e4)
        args = (new.normal(3).abs(), factor, new.normal(n, dtype=dtype), dtype)
        yield "dequantize_sums", (sums if stored == torch.int8 else sums.int(), *args), {}
        q, w = (new.normal(rows, 16 * (n // 16) + n % 2, scale=20).to(stored) for rows in (11, 45))
        scales, bias = (new.normal(11).abs(), new.normal(45).abs()), new.normal(45, dtype=dtype)
        yield "scaled_linear", (q, scales[0], w, scales[1], bias, dtype), {}
    if device == "cuda":  # thread block clusters, which the emulated device has none of
        for (rows, n, k), scales in itertools.product(((300, 480, 512), (130, 48, 2080)), FLOATS[1:]):
            w, x = new.int4(n, k, 64, "zeros", scales), new.normal(rows, k, dtype=torch.bfloat16)
            residual = new.normal(rows, n, dtype=torch.bfloat16)
            yield "int4_linear", (x, w.packed, *w.numbers, None, None, residual, w.group_size, k), {}
    if device == "cuda":  # the host tier
        mapping = torch.tensor([[0, 4], [2, 1]])
        yield "swap_blocks", (torch.randn(3, 8, 4).pin_memory(), new.normal(5, 8, 4), mapping), {}
        yield "swap_blocks", (new.normal(3, 8, 4), torch.randn(5, 8, 4).pin_memory(), mapping), {}
    yield from attention_samples(device)


def to_cpu(tree: Any) -> Any:
    """Copies of all tensors on the CPU, outside of pinned memory."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), tree)


def excess(got: Tensor, want: Tensor) -> float:
    """The largest error in units of what is allowed; infinite where shape, dtype, NaN or infinities differ.

    Allowed are two units in the last place of the largest entry for 16-bit floats, 2e-5 of it for float32, one step of
    a quantised value, and nothing for integers.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    x, y = got.double(), want.double()
    error = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs().nan_to_num(nan=torch.inf))
    if want.dtype == torch.int8:
        allowed = torch.ones_like(y)
    elif want.dtype == torch.float8_e4m3fn:
        allowed = (y.abs() / 8).clamp(min=2.0**-9).nan_to_num(nan=0.0)
    elif want.is_floating_point():
        largest = float(torch.where(y.isfinite(), y.abs(), 0.0).max()) if y.numel() else 0.0
        ulps = 2e-5 if want.dtype == torch.float32 else 2 * torch.finfo(want.dtype).eps
        allowed = torch.full_like(y, ulps * largest)
    else:
        allowed = torch.zeros_like(y)
    return float((error / allowed).nan_to_num(nan=0.0, posinf=torch.inf).max()) if y.numel() else 0.0


def check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Run one sample; return the worst `excess` over results and arguments, which the op may have changed."""
    want_args = to_cpu((args, kwargs))
    want = REFERENCES[name](*want_args[0], **want_args[1])
    got = getattr(torch.ops.torch_pagedkv, name)(*args, **kwargs)
    pairs = zip(pytree.tree_leaves(to_cpu([got, args, kwargs])), pytree.tree_leaves([want, *want_args]))
    return max(excess(x, y) for x, y in pairs if isinstance(y, Tensor))


def stored_by_tma(name: str, args: tuple[Any, ...]) -> bool:
    """Whether TMA may write this sample's result: cuBLAS, or the int4 kernel of many rows."""
    return name.endswith("_linear") and args[0].shape[0] > 64


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run every op on small inputs and compare with the references.")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="OP", help="only these ops (repeats)")
    parser.add_argument("--no-tma", action="store_true", help="leave out samples whose results TMA may write")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, int]]] = {}
    began = time.monotonic()
    for i, (name, args, kwargs) in enumerate(samples(options.device)):
        if (options.only and name not in options.only) or (options.no_tma and stored_by_tma(name, args)):
            continue
        try:
            results.setdefault(name, []).append((check(name, args, kwargs), i))
        except Exception:
            shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            print(f"{name}: sample {i}, tensors of {shapes}", flush=True)
            raise
    wrong = [name for name in options.only or SCHEMAS if name not in results]
    for name in wrong:
        print(f"{name:24} MISSING: no sample ran")
    for name, errors in results.items():
        failed = [i for error, i in errors if not error <= 1]
        wrong += [name] * bool(failed)
        verdict = f"WRONG in samples {failed[:20]}" if failed else "ok"
        print(f"{name:24} {len(errors):4} samples  worst error {max(errors)[0]:6.3f} of the allowed  {verdict}")
    verdict = f"FAILED: {', '.join(wrong)}" if wrong else "all right"
    print(f"{len(results)} ops, {time.monotonic() - began:.0f} s: {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
