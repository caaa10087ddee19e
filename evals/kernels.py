"""How fast is each operator? Time, rate, error and peers on the shapes of real models.

python -m torch_pagedkv.evals.kernels [--only decode] [--device cpu] [--json FILE] [--compare OLD.json]

us       median time of one call. CUDA: a graph of one call a set of inputs, replayed; the sets are rotated, over
         256 MiB or 400 sets, whichever is less (the smallest ops find their inputs in the L2 cache, as they do in
         a model). CPU: wall clock, the sets rotated over 64 MiB.
rate     bytes that must be moved, or floating-point operations (the causal half), by time; "of limit" compares it
         with a copy of one large tensor, or one large matrix product, measured on this machine in this run.
error    largest difference from the float64 reference by its largest entry; for ops that move or pick, the share of
         entries that differ. A row whose error is above its bound is printed as WRONG and makes the exit code 1.
peers    the same in plain PyTorch, with its time by ours ("2.0x": ours takes half as long).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from torch_pagedkv import ops
from torch_pagedkv.cli import positive

from . import command, machine, render
from . import peers as others

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
BLOCK = 16  # tokens of a cache block
MIB = 1 << 20
ROTATED = {"cuda": 256 * MIB, "cpu": 64 * MIB}  # more than the last cache
MAX_SETS = {"cuda": 400, "cpu": 32}
FAMILIES = {  # section of the table -> its ops
    "attention": ("paged_attention", "paged_attention_cascade", "flash_attention", "merge_attention_states"),
    "cache": ("reshape_and_cache", "gather_cache", "copy_blocks", "swap_blocks"),
    "norm": ("rms_norm", "add_rms_norm", "layer_norm"),
    "linear": ("linear",),
    "int4": ("int4_linear",),
    "gguf": ("q4k_linear", "int8_linear"),
    "8-bit product": ("quantize_per_token", "dequantize_sums"),
    "rotary": ("rotary_embedding", "rotary_and_cache"),
    "activation": ("silu_and_mul", "gelu_and_mul", "bias_act"),
    "sampling": ("sample", "argmax"),
}


@dataclass(frozen=True)
class Model:
    """The sizes of one model that the ops see."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int


MODELS = {
    "Llama-3-8B": Model(32, 8, 128, 4096, 14336, 128256),
    "Llama-2-7B": Model(32, 32, 128, 4096, 11008, 32000),
    "Qwen2-7B": Model(28, 4, 128, 3584, 18944, 152064),
    "Gemma-2-9B": Model(16, 8, 256, 3584, 14336, 256000),
    "SmolLM2-135M": Model(9, 3, 64, 576, 1536, 49152),
}

Inputs = SimpleNamespace  # one set of inputs, by name
Tensors = Sequence[Tensor]


@dataclass
class Problem:
    """What is measured in one row."""

    make: Callable[[], Inputs]
    call: Callable[[Inputs], Any]
    truth: Callable[[Inputs], Tensors]  # from inputs as they are before the call
    result: Callable[[Inputs, Any], Tensors]  # from inputs and output after it
    moved: float  # bytes read and written
    bound: float  # of the error; 0: every entry must be equal
    flops: float = 0.0  # given: the rate is of these
    limited: bool = True  # whether the limit of the rate is this machine's copy or product
    peers: dict[str, Callable[[Inputs], Any]] = field(default_factory=dict)


class Env:
    """Where the inputs live, and how they are made."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.eps = torch.finfo(dtype).eps
        self.size = dtype.itemsize

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random numbers in the dtype."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers on the device."""
        return torch.as_tensor(values).to(self.device, dtype)

    def cache(self, blocks: int, model: Model, kv: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """key_cache, value_cache, k_scale, v_scale with random entries."""
        shape = (blocks, BLOCK, model.kv_heads, model.head_dim)
        if kv == "same":
            return self.normal(*shape), self.normal(*shape), None, None
        stored = [(torch.randn(shape, device=self.device) * 40).to(KV_DTYPES[kv]) for _ in range(2)]
        scales = [torch.rand(shape[:3], device=self.device) * 0.05 for _ in range(2)]
        return stored[0], stored[1], scales[0], scales[1]

    def kv_bytes(self, tokens: int, model: Model, kv: str) -> int:
        """Of the keys and values of so many tokens, scales included."""
        size, scale = (self.size, 0) if kv == "same" else (1, 4)
        return tokens * 2 * model.kv_heads * (model.head_dim * size + scale)

    def rounding(self, steps: float, steps_float32: float) -> float:
        """A bound on the error, in steps of the dtype at the largest entry."""
        return self.eps * (steps_float32 if self.dtype == torch.float32 else steps)


def reference(op: str, *args: Any, **kwargs: Any) -> Any:
    """The plain-PyTorch reference of an op."""
    return ops.REFERENCES[op](*args, **kwargs)


def outputs(_: Inputs, out: Any) -> Tensors:
    """What most ops are judged by."""
    return [out] if isinstance(out, Tensor) else list(out)


def plain(cache: Tensor) -> Tensor:
    """A cache in a dtype that can be compared; fp8 as its bits."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


# ---- attention -------------------------------------------------------------------------------------------------------


def sampled_rows(lengths: Sequence[int], rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """(sequence, first row, end) of what is checked in float64: up to 4 sequences, their first, middle, last rows."""
    picked = sorted({0, len(lengths) - 1, lengths.index(max(lengths)), lengths.index(min(lengths))})
    return [
        (s, first, min(first + 32, rows[s]))
        for s in picked
        for first in sorted({0, max(0, rows[s] // 2 - 16), max(0, rows[s] - 32)})
    ]


def paged(
    env: Env, model: Model, batch: int, context: int, query: int = 1, kv: str = "same", ragged: bool = False
) -> Problem:
    """paged_attention: `query` tokens a sequence at the end of `context`; ragged: lengths from 1/8 to 15/8 of it."""
    spread = [1.0] * batch if not ragged else [0.125 + 1.75 * ((7 * s) % batch) / (batch - 1) for s in range(batch)]
    lengths = [max(query, round(context * x)) for x in spread]
    needed = [-(-n // BLOCK) for n in lengths]
    heads, d, longest = model.heads, model.head_dim, max(lengths)
    rows = [query] * batch
    starts = [query * s for s in range(batch)]

    def make() -> Inputs:
        a = Inputs()
        a.query = env.normal(batch * query, heads, d)
        a.k, a.v, a.k_scale, a.v_scale = env.cache(sum(needed) + 1, model, kv)
        order = iter((torch.randperm(sum(needed)) + 1).tolist())
        table = [[*itertools.islice(order, n), *[0] * (max(needed) - n)] for n in needed]
        a.tables, a.lens = env.ints(table), env.ints(lengths)
        a.start, a.rows = env.ints(starts), env.ints(rows)
        if kv == "same":
            position = torch.arange(longest, device=env.device)
            last = a.lens[:, None] - query + torch.arange(query, device=env.device)  # what each row sees
            a.mask = None
            if (ragged or query > 1) and query != context:
                a.mask = (position <= last[..., None])[:, None]
            a.dense = [x[:, :, :longest].contiguous() for x in dense(a)]
        return a

    def dense(a: Inputs) -> list[Tensor]:
        return [c[a.tables.long()].flatten(1, 2).transpose(1, 2) for c in (a.k, a.v)]

    def sdpa(a: Inputs, k: Tensor, v: Tensor) -> Tensor:
        q = a.query.view(batch, query, heads, d).transpose(1, 2)
        causal = query > 1 and a.mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=a.mask, is_causal=causal, enable_gqa=True)

    def call(a: Inputs) -> Any:
        return ops.paged_attention(
            a.query,
            a.k,
            a.v,
            a.tables,
            a.lens,
            a.start,
            a.rows,
            max_query_len=query,
            k_scale=a.k_scale,
            v_scale=a.v_scale,
        )

    def truth(a: Inputs) -> Tensors:
        found = []
        for s, first, end in sampled_rows(lengths, rows):
            q = a.query[starts[s] + first : starts[s] + end].double()
            n = end - first
            length = env.ints([lengths[s] - query + end])
            args = (q, a.k, a.v, a.tables[s : s + 1], length, env.ints([0]), env.ints([n]), n, d**-0.5)
            found.append(reference("paged_attention", *args, k_scale=a.k_scale, v_scale=a.v_scale)[0])
        return found

    def result(_: Inputs, out: Tensor) -> Tensors:
        return [out[starts[s] + first : starts[s] + end] for s, first, end in sampled_rows(lengths, rows)]

    peers: dict[str, Callable[[Inputs], Any]] = {}
    if kv == "same":
        peers["gather + sdpa"] = lambda a: sdpa(a, *(x[:, :, :longest] for x in dense(a)))
        peers["sdpa on dense KV"] = lambda a: sdpa(a, *a.dense)
        if env.device.type == "cuda" and env.size == 2:
            peers |= others.attention(heads, model.kv_heads, d, BLOCK, lengths, query, env.dtype)
    pairs = sum(query * (n - query) + query * (query + 1) // 2 for n in lengths)
    return Problem(
        make,
        call,
        truth,
        result,
        moved=env.kv_bytes(sum(lengths), model, kv) + 2 * batch * query * heads * d * env.size,
        flops=4.0 * pairs * heads * d if query > 1 else 0.0,
        bound=env.rounding(2, 64),
        peers=peers,
    )


def cascade(env: Env, model: Model, batch: int, shared: int, own: int) -> Problem:
    """paged_attention_cascade: decoding where all sequences begin with the same `shared` tokens."""
    heads, d = model.heads, model.head_dim
    prefix, rest = shared // BLOCK, -(-own // BLOCK)
    length = shared + own

    def make() -> Inputs:
        a = Inputs()
        a.query = env.normal(batch, heads, d)
        a.k, a.v, *_ = env.cache(prefix + batch * rest, model, "same")
        order = torch.randperm(prefix + batch * rest)
        tables = torch.cat([order[:prefix].expand(batch, -1), order[prefix:].view(batch, rest)], 1)
        a.tables, a.lens = env.ints(tables), env.ints([length] * batch)
        a.start, a.rows = env.ints(range(batch)), env.ints([1] * batch)
        a.groups = [env.ints([x]) for x in (0, batch, shared)]
        return a

    def separate(a: Inputs) -> None:
        """Each sequence's own copy of the prefix, as without sharing."""
        blocks = a.tables.flatten().long()
        a.own_k, a.own_v = a.k[blocks], a.v[blocks]
        a.own_tables = torch.arange(len(blocks), dtype=torch.int32, device=env.device).view(batch, -1)

    def plain(a: Inputs, k: Tensor, v: Tensor, tables: Tensor) -> Any:
        return ops.paged_attention(a.query, k, v, tables, a.lens, a.start, a.rows, max_query_len=1)

    def shared_blocks(a: Inputs) -> Any:
        return plain(a, a.k, a.v, a.tables)

    peers: dict[str, Callable[[Inputs], Any]] = {
        "paged_attention, nothing shared": others.Peer(
            lambda a: plain(a, a.own_k, a.own_v, a.own_tables), separate, shared_blocks
        ),
        "paged_attention": shared_blocks,
    }
    if env.device.type == "cuda" and env.size == 2:
        peers |= others.cascade(heads, model.kv_heads, d, BLOCK, batch, shared, own, env.dtype)
    checked = sorted({0, batch // 2, batch - 1})

    def truth(a: Inputs) -> Tensors:
        one = env.ints([0]), env.ints([1]), 1, d**-0.5
        return [
            reference("paged_attention", a.query[s : s + 1].double(), a.k, a.v, a.tables[s : s + 1], a.lens[:1], *one)[
                0
            ]
            for s in checked
        ]

    return Problem(
        make,
        call=lambda a: ops.paged_attention_cascade(a.query, a.k, a.v, a.tables, a.lens, *a.groups, max_group_len=batch),
        truth=truth,
        result=lambda _, out: [out[s : s + 1] for s in checked],
        moved=env.kv_bytes(shared + batch * own, model, "same") + 2 * batch * heads * d * env.size,
        bound=env.rounding(2, 64),
        peers=peers,
    )


def flash(env: Env, model: Model, batch: int, length: int) -> Problem:
    """flash_attention, causal, without a cache."""
    heads, d = model.heads, model.head_dim
    checked = sampled_rows([length] * batch, [length] * batch)

    def make() -> Inputs:
        a = Inputs()
        a.query = env.normal(batch, length, heads, d)
        a.k, a.v = (env.normal(batch, length, model.kv_heads, d) for _ in range(2))
        return a

    def truth(a: Inputs) -> Tensors:
        found = []
        for s, first, end in checked:
            n, zero = end - first, env.ints([0])
            args = (a.query[s, first:end].double(), a.k[s].double(), a.v[s].double(), zero, env.ints([n]), zero)
            found.append(reference("flash_attention", *args, env.ints([end]), n, end, d**-0.5)[0])
        return found

    def sdpa(a: Inputs) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (a.query, a.k, a.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return Problem(
        make,
        lambda a: ops.flash_attention(a.query, a.k, a.v),
        truth,
        lambda _, out: [out[s, first:end] for s, first, end in checked],
        moved=2.0 * batch * length * (heads + model.kv_heads) * d * env.size,
        flops=4.0 * batch * heads * d * length * (length + 1) / 2,
        bound=env.rounding(2, 64),
        peers={"sdpa": sdpa},
    )


def merge(env: Env, model: Model, tokens: int) -> Problem:
    """merge_attention_states of two partial results."""
    rows = tokens * model.heads

    def make() -> Inputs:
        a = Inputs()
        a.args = [
            x
            for _ in range(2)
            for x in (
                env.normal(tokens, model.heads, model.head_dim),
                torch.randn(tokens, model.heads, device=env.device) * 3,
            )
        ]
        return a

    return Problem(
        make,
        lambda a: ops.merge_attention_states(*a.args),
        lambda a: reference("merge_attention_states", *(x.double() for x in a.args)),
        outputs,
        moved=rows * (3 * model.head_dim * env.size + 12),
        bound=env.rounding(0.6, 8),
    )


# ---- cache -----------------------------------------------------------------------------------------------------------


def write_inputs(env: Env, model: Model, tokens: int, kv: str) -> Inputs:
    """A fused projection's q, k, v, an empty cache twice as large, and random slots."""
    a = Inputs()
    widths = [n * model.head_dim for n in (model.heads, model.kv_heads, model.kv_heads)]
    parts = env.normal(tokens, sum(widths)).split(widths, -1)
    a.query, a.key, a.value = (x.unflatten(-1, (-1, model.head_dim)) for x in parts)
    blocks = -(-2 * tokens // BLOCK)
    a.k, a.v, a.k_scale, a.v_scale = env.cache(blocks, model, kv)
    a.slots = env.ints(torch.randperm(blocks * BLOCK)[:tokens], torch.int64)
    return a


def caches(a: Inputs, _: Any = None) -> Tensors:
    """What a write is judged by."""
    return [plain(x) for x in (a.k, a.v, a.k_scale, a.v_scale) if x is not None]


def write(env: Env, model: Model, tokens: int, kv: str = "same") -> Problem:
    """reshape_and_cache."""

    def truth(a: Inputs) -> Tensors:
        # on the CPU: PyTorch's CUDA divides by a constant as a product with its reciprocal, which rounds otherwise
        b = Inputs(**{name: None if x is None else x.to("cpu", copy=True) for name, x in vars(a).items()})
        reference("reshape_and_cache", b.key, b.value, b.k, b.v, b.slots, b.k_scale, b.v_scale)
        return caches(b)

    def index_copy(a: Inputs) -> None:
        for x, cache in ((a.key, a.k), (a.value, a.v)):
            cache.flatten(0, 1).index_copy_(0, a.slots, x)

    return Problem(
        partial(write_inputs, env, model, tokens, kv),
        lambda a: ops.reshape_and_cache(a.key, a.value, a.k, a.v, a.slots, a.k_scale, a.v_scale),
        truth,
        caches,
        moved=env.kv_bytes(tokens, model, "same") + env.kv_bytes(tokens, model, kv) + 8 * tokens,
        bound=0.0,
        peers={"index_copy_": index_copy} if kv == "same" else {},
    )


def gather(env: Env, model: Model, batch: int, context: int, kv: str = "same") -> Problem:
    """gather_cache of a batch of equal lengths."""
    needed = -(-context // BLOCK)

    def make() -> Inputs:
        a = Inputs()
        a.k, a.v, a.k_scale, a.v_scale = env.cache(batch * needed, model, kv)
        a.tables = env.ints(torch.randperm(batch * needed).view(batch, needed))
        a.lens, a.start = env.ints([context] * batch), env.ints([context * s for s in range(batch)])
        return a

    def arguments(a: Inputs) -> tuple[Any, ...]:
        return a.k, a.v, a.tables, a.lens, a.start, batch * context

    def index(a: Inputs) -> Any:
        return [c[a.tables.long()].flatten(1, 2)[:, :context] for c in (a.k, a.v)]

    return Problem(
        make,
        lambda a: ops.gather_cache(*arguments(a), dtype=env.dtype, k_scale=a.k_scale, v_scale=a.v_scale),
        lambda a: reference("gather_cache", *arguments(a), env.dtype, a.k_scale, a.v_scale),
        outputs,
        moved=env.kv_bytes(batch * context, model, "same") + env.kv_bytes(batch * context, model, kv),
        bound=0.0,
        peers={"cache[tables]": index} if kv == "same" else {},
    )


def copy(env: Env, model: Model, layers: int, pairs: int) -> Problem:
    """copy_blocks in the K and V caches of all layers."""

    def make() -> Inputs:
        a = Inputs()
        a.caches = [env.normal(2 * pairs, BLOCK, model.kv_heads, model.head_dim) for _ in range(2 * layers)]
        a.mapping = env.ints(torch.randperm(2 * pairs).view(pairs, 2), torch.int64)
        return a

    def truth(a: Inputs) -> Tensors:
        copies = [c.clone() for c in a.caches]
        reference("copy_blocks", copies, a.mapping)
        return copies

    def index(a: Inputs) -> None:
        for c in a.caches:
            c[a.mapping[:, 1]] = c[a.mapping[:, 0]]

    return Problem(
        make,
        lambda a: ops.copy_blocks(a.caches, a.mapping),
        truth,
        lambda a, _: a.caches,
        moved=2.0 * layers * env.kv_bytes(pairs * BLOCK, model, "same"),
        bound=0.0,
        peers={"cache[dst] = cache[src]": index},
    )


def swap(env: Env, model: Model, pairs: int, to_host: bool, adjacent: bool = False) -> Problem:
    """swap_blocks of one cache between the device and pinned host memory (CPU: between two caches)."""

    def make() -> Inputs:
        a = Inputs()
        here = env.normal(2 * pairs, BLOCK, model.kv_heads, model.head_dim)
        there = torch.randn(here.shape).to(env.dtype)
        if env.device.type == "cuda":
            there = there.pin_memory()
        a.src, a.dst = (here, there) if to_host else (there, here)
        orders = [torch.arange(pairs) if adjacent else torch.randperm(2 * pairs)[:pairs] for _ in range(2)]
        a.mapping = torch.stack(orders, 1)
        return a

    def truth(a: Inputs) -> Tensors:
        other = a.dst.clone()
        reference("swap_blocks", a.src, other, a.mapping)
        return [other]

    def arrived(a: Inputs, _: Any) -> Tensors:
        if env.device.type == "cuda":
            torch.cuda.synchronize()  # a copy to pinned memory is asynchronous
        return [a.dst]

    def block_copies(a: Inputs) -> None:
        for source, target in a.mapping.tolist():
            a.dst[target].copy_(a.src[source], non_blocking=True)

    return Problem(
        make,
        lambda a: ops.swap_blocks(a.src, a.dst, a.mapping),
        truth,
        arrived,
        moved=env.kv_bytes(pairs * BLOCK, model, "same") / 2 * (1 if env.device.type == "cuda" else 2),
        bound=0.0,
        limited=env.device.type == "cpu",
        peers={"copy_ of each block": block_copies},
    )


# ---- norm, rotary, activation ----------------------------------------------------------------------------------------


def norm(env: Env, model: Model, rows: int, op: str) -> Problem:
    """rms_norm, add_rms_norm or layer_norm of hidden states."""
    n, eps = model.hidden, 1e-5

    def make() -> Inputs:
        return Inputs(x=env.normal(rows, n), residual=env.normal(rows, n), weight=env.normal(n), bias=env.normal(n))

    def exact_add(a: Inputs) -> Tensors:
        h = a.x + a.residual
        return [reference("rms_norm", h.double(), a.weight.double(), eps), h.double()]

    def stock_add(a: Inputs) -> Any:
        h = a.x + a.residual
        return F.rms_norm(h, (n,), a.weight, eps), h

    call: Callable[[Inputs], Any]
    truth: Callable[[Inputs], Tensors]
    peer: Callable[[Inputs], Any]
    call, truth, peer, tensors = {
        "rms_norm": (
            lambda a: ops.rms_norm(a.x, a.weight, eps),
            lambda a: [reference("rms_norm", a.x.double(), a.weight.double(), eps)],
            lambda a: F.rms_norm(a.x, (n,), a.weight, eps),
            2,
        ),
        "add_rms_norm": (lambda a: ops.add_rms_norm(a.x, a.residual, a.weight, eps), exact_add, stock_add, 4),
        "layer_norm": (
            lambda a: ops.layer_norm(a.x, a.weight, a.bias, eps),
            lambda a: [reference("layer_norm", a.x.double(), a.weight.double(), a.bias.double(), eps)],
            lambda a: F.layer_norm(a.x, (n,), a.weight, a.bias, eps),
            2,
        ),
    }[op]
    name = "add, F.rms_norm" if op == "add_rms_norm" else f"F.{op}"
    moved = (tensors * rows + (2 if op == "layer_norm" else 1)) * n * env.size
    return Problem(make, call, truth, outputs, moved=moved, bound=env.rounding(0.6, 8), peers={name: peer})


def rotary(env: Env, model: Model, tokens: int, kv: str | None = None) -> Problem:
    """rotary_embedding of q and k in place, or (kv given) fused with the write of k and v."""
    half = model.head_dim // 2

    def make() -> Inputs:
        a = write_inputs(env, model, tokens, kv or "same")
        angle = torch.randn(tokens, half, device=env.device)
        a.cos, a.sin = angle.cos().to(env.dtype), angle.sin().to(env.dtype)
        return a

    def call(a: Inputs) -> Any:
        if kv is None:
            return ops.rotary_embedding(a.query, a.key, a.cos, a.sin)
        cache = (a.k, a.v, a.slots)
        return ops.rotary_and_cache(a.query, a.key, a.value, a.cos, a.sin, *cache, k_scale=a.k_scale, v_scale=a.v_scale)

    def truth(a: Inputs) -> Tensors:
        q, k = a.query.double(), a.key.double()
        reference("rotary_embedding", q, k, a.cos, a.sin)
        return [q, k] if kv is None else [q, k, a.value.double()]

    def result(a: Inputs, _: Any) -> Tensors:
        if kv is None:
            return [a.query, a.key]
        stored = []
        for cache, scale in ((a.k, a.k_scale), (a.v, a.v_scale)):
            x = cache.flatten(0, 1)[a.slots].double() if kv == "same" else cache.float().flatten(0, 1)[a.slots].double()
            stored.append(x if scale is None else x * scale.flatten(0, 1)[a.slots].double()[..., None])
        return [a.query, *stored]

    def rotated(a: Inputs, x: Tensor) -> Tensor:
        cos, sin = (torch.cat([t, t], -1)[:, None] for t in (a.cos, a.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def stock(a: Inputs) -> Any:
        q, k = rotated(a, a.query), rotated(a, a.key)
        if kv is None:
            return q, k
        a.k.flatten(0, 1).index_copy_(0, a.slots, k)
        a.v.flatten(0, 1).index_copy_(0, a.slots, a.value)
        return q

    q_bytes, k_bytes = (tokens * h * model.head_dim * env.size for h in (model.heads, model.kv_heads))
    moved = 2 * q_bytes + tokens * model.head_dim * env.size
    moved += 2 * k_bytes if kv is None else 2 * k_bytes + env.kv_bytes(tokens, model, kv) + 8 * tokens
    bound = env.rounding(0.6, 8)
    if kv in KV_DTYPES:  # half a step of the storage at the largest entry, beside the rounding of q and k
        bound += {"int8": 0.5 / 127, "fp8": 2.0**-5}[kv]
    name = "x * cos + rotate_half(x) * sin"
    peers: dict[str, Callable[[Inputs], Any]] = (
        {} if kv in KV_DTYPES else {name if kv is None else f"{name}, index_copy_": stock}
    )
    return Problem(make, call, truth, result, moved=moved, bound=bound, peers=peers)


def projection(env: Env, model: Model, rows: int) -> Problem:
    """A layer's gate projection on few rows, beside F.linear."""

    def make() -> Inputs:
        return Inputs(x=env.normal(rows, model.hidden), weight=env.normal(model.ffn, model.hidden))

    def call(a: Inputs) -> Any:
        return ops.linear(a.x, a.weight)

    def truth(a: Inputs) -> Tensors:
        return [reference("linear", a.x.double(), a.weight.double())]

    peers: dict[str, Callable[[Inputs], Any]] = {"F.linear": lambda a: F.linear(a.x, a.weight)}
    moved = env.size * (model.ffn * model.hidden + rows * (model.hidden + model.ffn))
    return Problem(make, call, truth, outputs, moved=moved, bound=env.rounding(0.6, 8), peers=peers)


LAYERS: dict[str, Callable[[Model], tuple[int, int]]] = {  # name -> outputs, inputs
    "q": lambda m: (m.heads * m.head_dim, m.hidden),
    "k": lambda m: (m.kv_heads * m.head_dim, m.hidden),
    "gate": lambda m: (m.ffn, m.hidden),
    "down": lambda m: (m.hidden, m.ffn),
    "qkv": lambda m: ((m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden),
    "gate+up": lambda m: (2 * m.ffn, m.hidden),
}


def int4(env: Env, model: Model, layer: str, rows: int, group: int) -> Problem:
    """int4_linear with float16 scales and zeros, beside F.linear on the dequantised weight and, on the CPU, PyTorch's
    own 4-bit product, which takes bfloat16 only."""
    n, k = LAYERS[layer](model)
    on_cpu = env.device.type == "cpu"

    def make() -> Inputs:
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=env.device)
        a = Inputs(x=env.normal(rows, k), packed=ops.int4_repack(q))
        a.scales = (torch.rand(k // group, n, device=env.device) * 0.02 + 0.005).half()
        a.zeros = torch.randint(0, 16, (k // group, n), dtype=torch.uint8, device=env.device)
        a.options = {"group_size": group, "in_features": k}
        a.dense = ops.int4_dequantize(a.packed, a.scales, a.zeros, dtype=env.dtype, **a.options)
        a.x16, a.dense16 = a.x.bfloat16(), a.dense.bfloat16()
        if on_cpu:
            a.aten = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
            a.aten_scales = torch.stack([a.scales.float(), a.scales * (8.0 - a.zeros)], -1).bfloat16()
        return a

    def call(a: Inputs) -> Any:
        return ops.int4_linear(a.x, a.packed, a.scales, a.zeros, **a.options)

    def truth(a: Inputs) -> Tensors:
        args = (a.x.double(), a.packed, a.scales, a.zeros, None, None, None, None, group, k)
        return [reference("int4_linear", *args)]

    peers: dict[str, Callable[[Inputs], Any]] = {"F.linear": lambda a: F.linear(a.x, a.dense)}
    if env.dtype != torch.bfloat16:
        peers["F.linear bf16"] = lambda a: F.linear(a.x16, a.dense16)
    if on_cpu:
        peers["aten int4 bf16"] = lambda a: torch.ops.aten._weight_int4pack_mm_for_cpu(
            a.x16, a.aten, group, a.aten_scales
        )
    else:
        peers |= others.int4(n, k, group, env.dtype)
    moved = n * k / 2 + 3 * n * k / group + env.size * rows * (n + k)
    flops = 2.0 * rows * n * k if rows >= 64 else 0.0
    return Problem(make, call, truth, outputs, moved=moved, bound=env.rounding(0.6, 8), flops=flops, peers=peers)


def gguf(env: Env, model: Model, layer: str, rows: int, kind: str) -> Problem:
    """q4k_linear (kind "Q4_K") or int8_linear (kind "Q8_0") beside F.linear on the dequantised weight."""
    n, k = LAYERS[layer](model)
    k = k // 256 * 256
    options = {} if kind == "Q4_K" else {"group_size": 32, "in_features": k}
    op = "q4k" if kind == "Q4_K" else "int8"

    def make() -> Inputs:
        a = Inputs(x=env.normal(rows, k))
        if kind == "Q4_K":
            blocks = torch.randint(0, 256, (n, k // 256, 144), dtype=torch.uint8, device=env.device)
            numbers = torch.rand(n, k // 256, 2, device=env.device) * 0.002 + 0.0005
            blocks[..., :4] = numbers.half().view(torch.uint8).view(n, -1, 4)
            a.parts = ops.q4k_repack(blocks.flatten(1))
        else:
            q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=env.device)
            a.parts = ops.int8_repack(q), (torch.rand(k // 32, n, device=env.device) * 0.002 + 0.0005).half()
        a.dense = getattr(ops, f"{op}_dequantize")(*a.parts, dtype=env.dtype, **options)
        return a

    def truth(a: Inputs) -> Tensors:
        return [reference(f"{op}_linear", a.x.double(), *a.parts, None, None, *options.values())]

    return Problem(
        make,
        lambda a: getattr(ops, f"{op}_linear")(a.x, *a.parts, **options),
        truth,
        outputs,
        moved=n * k * (4.625 if kind == "Q4_K" else 8.5) / 8 + env.size * rows * (n + k),
        bound=env.rounding(0.6, 8),
        flops=2.0 * rows * n * k if rows >= 64 else 0.0,
        peers={"F.linear": lambda a: F.linear(a.x, a.dense)},
    )


def to_eight(env: Env, model: Model, tokens: int, stored: str) -> Problem:
    """quantize_per_token of a layer's input with SmoothQuant's factors, beside the same in PyTorch."""
    k, dtype = model.hidden, KV_DTYPES[stored]

    def make() -> Inputs:
        return Inputs(x=env.normal(tokens, k), factor=env.normal(k).float().abs())

    def plain(a: Inputs) -> Any:
        x = a.x.float() * a.factor
        scale = x.abs().amax(-1, keepdim=True) / (127.0 if stored == "int8" else 448.0)
        x = x / scale
        return (x.round() if stored == "int8" else x).to(dtype), scale

    return Problem(
        make,
        lambda a: ops.quantize_per_token(a.x, a.factor, dtype=dtype),
        # on the CPU, as in `write`
        lambda a: [t.float() for t in reference("quantize_per_token", a.x.cpu(), a.factor.cpu(), 0, dtype)],
        lambda a, result: [t.float() for t in result],
        moved=tokens * (k * (env.size + 1) + 4) + 4 * k,
        bound=0.0,
        peers={"PyTorch": plain},
    )


def from_eight(env: Env, model: Model, tokens: int) -> Problem:
    """dequantize_sums of the sums of torch._int_mm, with a bias, beside the same in PyTorch."""
    n = model.hidden

    def make() -> Inputs:
        a = Inputs(sums=env.ints(torch.randint(-100000, 100000, (tokens, n))), bias=env.normal(n))
        a.row, a.column = env.normal(tokens).float().abs() * 0.01, env.normal(n).float().abs() * 0.01
        return a

    return Problem(
        make,
        lambda a: ops.dequantize_sums(a.sums, a.row, a.column, a.bias, dtype=env.dtype),
        lambda a: [reference("dequantize_sums", a.sums, a.row, a.column, a.bias, torch.float64)],
        outputs,
        moved=tokens * n * (4 + env.size) + 4 * tokens + (4 + env.size) * n,
        bound=env.rounding(0.6, 8),
        peers={"PyTorch": lambda a: (a.sums.float() * a.row[:, None] * a.column + a.bias).to(env.dtype)},
    )


def gated(env: Env, model: Model, tokens: int, op: str) -> Problem:
    """silu_and_mul or gelu_and_mul (tanh) of the halves of a packed projection; bias_act with gelu."""
    n = model.ffn

    def make() -> Inputs:
        gate, up = env.normal(tokens, 2 * n).chunk(2, -1)
        return Inputs(gate=gate, up=up, bias=env.normal(n))

    call: Callable[[Inputs], Any]
    truth: Callable[[Inputs], Tensor]
    peer: Callable[[Inputs], Any]
    call, truth, name, peer, tensors = {
        "silu_and_mul": (
            lambda a: ops.silu_and_mul(a.gate, a.up),
            lambda a: reference("silu_and_mul", a.gate.double(), a.up.double()),
            "F.silu, mul",
            lambda a: F.silu(a.gate) * a.up,
            3,
        ),
        "gelu_and_mul": (
            lambda a: ops.gelu_and_mul(a.gate, a.up, approximate="tanh"),
            lambda a: reference("gelu_and_mul", a.gate.double(), a.up.double(), "tanh"),
            "F.gelu, mul",
            lambda a: F.gelu(a.gate, approximate="tanh") * a.up,
            3,
        ),
        "bias_act": (
            lambda a: ops.bias_act(a.gate, a.bias, "gelu"),
            lambda a: reference("bias_act", a.gate.double(), a.bias.double(), "gelu"),
            "add, F.gelu",
            lambda a: F.gelu(a.gate + a.bias),
            2,
        ),
    }[op]
    moved = tensors * tokens * n * env.size
    return Problem(make, call, lambda a: [truth(a)], outputs, moved, env.rounding(0.6, 8), peers={name: peer})


# ---- sampling --------------------------------------------------------------------------------------------------------


def sampling(env: Env, model: Model, rows: int, mode: str) -> Problem:
    """sample in one of its modes, or argmax. At most 4 rows are checked: the reference sorts each."""
    vocab, checked = model.vocab, min(rows, 4)

    def make() -> Inputs:
        a = Inputs(logits=env.normal(rows, vocab, scale=3.0))
        a.seeds = torch.arange(rows, device=env.device)
        a.offsets = torch.randint(1 << 40, (rows,), device=env.device)
        full = partial(torch.full, (rows,), device=env.device)
        a.options = {}
        if mode != "argmax":
            a.options["temperature"] = full(0.8)
        if "top-k" in mode:
            a.options["top_k"] = full(50, dtype=torch.int32)
        if "top-p" in mode:
            a.options["top_p"] = full(0.9)
        if "min-p" in mode:
            a.options["min_p"] = full(0.05)
        return a

    def call(a: Inputs) -> Tensor:
        return ops.argmax(a.logits) if mode == "argmax" else ops.sample(a.logits, a.seeds, a.offsets, **a.options)

    def truth(a: Inputs) -> Tensors:
        logits, seeds, offsets = (x[:checked].cpu() for x in (a.logits, a.seeds, a.offsets))
        if mode == "argmax":
            return [reference("argmax", logits)]
        options = {name: x[:checked].cpu() for name, x in a.options.items()}
        return [reference("sample", logits, seeds, offsets, **options)]

    def stock(a: Inputs) -> Tensor:
        if mode == "argmax":
            return a.logits.argmax(-1)
        z = a.logits.float() / a.options["temperature"][:, None]
        if "top-k" in mode:
            z = z.masked_fill(z < z.topk(50).values[:, -1:], -math.inf)
        if "top-p" in mode:
            values, index = z.sort(descending=True)
            p = values.softmax(-1)
            z = torch.full_like(z, -math.inf).scatter(1, index, values.masked_fill(p.cumsum(-1) - p >= 0.9, -math.inf))
        p = z.softmax(-1)
        if "min-p" in mode:
            p = p.masked_fill(p < 0.05 * p.amax(-1, keepdim=True), 0)
        return torch.multinomial(p, 1)

    steps = {"top-k": "topk", "top-p": "sort", "min-p": "mask"}
    peer = ", ".join(
        ["argmax"] if mode == "argmax" else [*(steps[x] for x in steps if x in mode), "softmax, multinomial"]
    )
    return Problem(
        make,
        call,
        truth,
        lambda _, out: [out[:checked]],
        moved=rows * vocab * env.size,
        bound=0.0,
        peers={peer: stock},
    )


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
            if value is not False and name != "op"
        ]
        return ", ".join([self.model, *said])


GPU, CPU, BOTH = ("cuda",), ("cpu",), ("cuda", "cpu")
L3, L2, QWEN, GEMMA, SMOL = MODELS

#: op, model, builder, devices, then sizes; the first row of each op and device is in --quick
TABLE: list[tuple[str, str, Callable[..., Problem], tuple[str, ...], list[dict[str, Any]]]] = [
    ("paged_attention", L3, paged, GPU, [
        *[{"batch": b, "context": n} for b, n in (
            (32, 2048), (1, 1024), (1, 8192), (1, 32768), (1, 131072), (32, 8192), (128, 1024), (128, 4096)
        )],
        {"batch": 64, "context": 2048, "ragged": True},
        *[{"batch": 32, "context": 2048, "kv": kv} for kv in KV_DTYPES],
        *[{"batch": 32, "context": 8192, "kv": kv} for kv in KV_DTYPES],
        *[{"batch": 1, "context": n, "query": n} for n in (512, 2048, 8192)],
        {"batch": 1, "context": 8192, "query": 1024},
        {"batch": 8, "context": 1024, "query": 1024},
    ]),
    ("paged_attention", L2, paged, GPU, [{"batch": 32, "context": n} for n in (128, 512, 2048)]),
    ("paged_attention", QWEN, paged, GPU, [
        {"batch": 1, "context": 8192}, {"batch": 32, "context": 2048}, {"batch": 1, "context": 2048, "query": 2048},
    ]),
    ("paged_attention", GEMMA, paged, GPU, [
        {"batch": 32, "context": 2048}, {"batch": 1, "context": 2048, "query": 2048},
    ]),
    ("paged_attention", SMOL, paged, BOTH, [
        {"batch": 8, "context": 512}, {"batch": 1, "context": 512}, {"batch": 1, "context": 512, "query": 512},
        {"batch": 8, "context": 512, "ragged": True}, {"batch": 8, "context": 512, "kv": "int8"},
    ]),
    ("paged_attention", L3, paged, CPU, [
        {"batch": 1, "context": 1024}, {"batch": 4, "context": 1024}, {"batch": 1, "context": 256, "query": 256},
    ]),
    *[("paged_attention", m, paged, CPU, [{"batch": 1, "context": 1024}]) for m in (L2, QWEN, GEMMA)],
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
    *[("quantize_per_token", model, to_eight, devices, [{"tokens": n, "stored": s} for n in sizes for s in KV_DTYPES])
      for model, devices, sizes in ((L3, GPU, (1, 4096)), (SMOL, BOTH, (8, 512)))],
    *[("dequantize_sums", model, from_eight, devices, [{"tokens": n} for n in sizes])
      for model, devices, sizes in ((L3, GPU, (1, 4096)), (SMOL, BOTH, (8, 512)))],
    *[("gather_cache", L3, gather, GPU, [{"batch": 8, "context": 4096, "kv": kv}]) for kv in ("same", "int8")],
    ("gather_cache", SMOL, gather, BOTH, [{"batch": 4, "context": 512}]),
    ("copy_blocks", L3, copy, GPU, [{"layers": 32, "pairs": n} for n in (16, 1)]),
    ("copy_blocks", SMOL, copy, BOTH, [{"layers": 30, "pairs": 4}]),
    ("swap_blocks", L3, swap, GPU, [
        {"pairs": 256, "to_host": to, "adjacent": adjacent} for to in (True, False) for adjacent in (False, True)
    ]),
    ("swap_blocks", SMOL, swap, BOTH, [{"pairs": 64, "to_host": True}]),
    *[("argmax" if mode == "argmax" else "sample", model, sampling, devices, [{"rows": n, "mode": mode} for n in sizes])
      for mode in ("argmax", "temperature", "top-k, top-p", "min-p")
      for model, devices, sizes in ((L3, GPU, (1, 32, 256)), (QWEN, GPU, (1, 64)), (SMOL, BOTH, (1, 8)))],
]  # fmt: skip


def cases(device: str, quick: bool, only: Sequence[str]) -> list[Case]:
    """The rows for a device whose "op shape" contains one of `only` (all without), in the order of FAMILIES."""
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
        if (c.quick or not quick) and (not only or any(x.lower() in f"{c.op} {c.shape}".lower() for x in only))
    ]


# ---- measuring -------------------------------------------------------------------------------------------------------


def time_cuda(
    call: Callable[[Inputs], Any], sets: Sequence[Inputs], seconds: float, graphed: bool = True
) -> tuple[float, str]:
    """(median us of one call, "graph" or, where it cannot be captured, "eager")."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for a in sets[:3]:
            call(a)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    def run() -> None:
        for a in sets:
            call(a)

    how = "eager"
    graph = torch.cuda.CUDAGraph()
    if graphed:
        try:
            with torch.cuda.graph(graph):
                run()
            how, run = "graph", graph.replay
        except RuntimeError:
            torch.cuda.synchronize()

    run()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times), how


def time_cpu(call: Callable[[Inputs], Any], sets: Sequence[Inputs], seconds: float) -> tuple[float, str]:
    """(median us of one call, "wall")."""
    for a in sets[:2]:
        call(a)
    times: list[float] = []
    begin = time.perf_counter()
    for a in itertools.cycle(sets):
        start = time.perf_counter()
        call(a)
        end = time.perf_counter()
        times.append((end - start) * 1e6)
        if len(times) >= 5 and end - begin > seconds:
            return statistics.median(times), "wall"
    raise AssertionError("no inputs")


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


def limits(env: Env) -> dict[str, float]:
    """GB/s of a copy (read and write) and TFLOP/s of a matrix product, measured here and now."""
    cuda = env.device.type == "cuda"
    # A copy node of a graph goes through the copy engine and reaches two thirds of what the same call does outside.
    timer = partial(time_cuda, graphed=False) if cuda else time_cpu
    count, n = (1 << 32, 8192) if cuda else (1 << 26, 1024)
    x = torch.zeros(count, dtype=torch.uint8, device=env.device)
    y = torch.ones_like(x)  # written once, so that its pages are there
    copied, _ = timer(lambda a: a.y.copy_(a.x), [Inputs(x=x, y=y)], 0.3)
    m = env.normal(n, n)
    product, _ = timer(lambda a: a.m @ a.m, [Inputs(m=m)], 0.3)
    return {"GB/s": 2 * count / copied / 1e3, "TFLOP/s": 2 * n**3 / product / 1e6}


def measure(case: Case, env: Env, limit: dict[str, float], seconds: float, peers: bool) -> dict[str, Any]:
    """One row of the result; an op that raises gives a row with its message."""
    row: dict[str, Any] = {"op": case.op, "shape": case.shape}
    kind = env.device.type
    timer = time_cuda if kind == "cuda" else time_cpu
    torch.manual_seed(0)
    try:
        problem = case.build(env, MODELS[case.model], **case.sizes)
        count = max(1, min(MAX_SETS[kind], math.ceil(ROTATED[kind] / problem.moved)))
        sets = [problem.make() for _ in range(count)]
        exact = problem.truth(sets[0])
        error = difference(problem.result(sets[0], problem.call(sets[0])), exact, problem.bound == 0)
        del exact
        us, how = timer(problem.call, sets, seconds)
        unit, work = ("TFLOP/s", problem.flops / 1e6) if problem.flops else ("GB/s", problem.moved / 1e3)
        row |= {"us": us, "timed": how, "rate": work / us, "unit": unit, "sets": count}
        row["of_limit"] = work / us / limit[unit] if problem.limited else None
        row |= {"error": error, "bound": problem.bound, "wrong": not error <= problem.bound}
        row["peers"] = {}
        for name, peer in problem.peers.items() if peers else ():
            try:
                if isinstance(peer, others.Peer):
                    for a in sets:
                        peer.prepare(a)
                    peer.check(sets[0])
                peer_us, peer_how = timer(peer, sets, seconds)
                row["peers"][name] = {"us": peer_us, "timed": peer_how}
            # such as a product of heads that a backend does not take
            except (RuntimeError, TypeError, ValueError, AssertionError) as problem_of_peer:
                row["peers"][name] = {
                    "failed": (str(problem_of_peer) or type(problem_of_peer).__name__).splitlines()[0]
                }
    except (RuntimeError, NotImplementedError) as problem_of_ours:
        row |= {"failed": str(problem_of_ours).splitlines()[0], "wrong": True}
    return row


# ---- showing ---------------------------------------------------------------------------------------------------------


def cells(row: dict[str, Any], before: dict[tuple[str, str], float] | None) -> list[str]:
    """A row of the table as strings."""
    if "failed" in row:
        return [row["op"], row["shape"], "FAILED", *[""] * (3 if before is None else 4), row["failed"]]
    rate = f"{row['rate']:.{max(0, 2 - int(math.log10(max(row['rate'], 1e-9))))}f} {row['unit']}"
    share = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
    error = f"{row['error']:.1e}" if row["error"] else "0"
    beside = []
    for name, peer in row["peers"].items():
        mark = "*" if peer.get("timed") == "eager" else ""
        said = "failed" if "failed" in peer else f"{peer['us']:.1f}{mark} ({peer['us'] / row['us']:.1f}x)"
        beside.append(f"{name} {said}")
    old = (
        []
        if before is None
        else [f"{before[key] / row['us']:.2f}x" if (key := (row["op"], row["shape"])) in before else "-"]
    )
    mark = "*" if row["timed"] == "eager" else ""
    return [
        row["op"],
        row["shape"],
        f"{row['us']:.1f}{mark}",
        rate,
        share,
        *old,
        f"WRONG {error}" if row["wrong"] else error,
        "; ".join(beside),
    ]


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The sections of a result, one a family of ops."""
    before = None
    if "before" in result:
        before = {(row["op"], row["shape"]): row["us"] for row in result["before"]["rows"] if "us" in row}
    compared = [] if before is None else ["faster than before"]
    header = ["op", "shape", "us", "rate", "of limit", *compared, "error", "peers, us (by ours)"]
    found: dict[str, render.Rows] = {}
    for family, members in FAMILIES.items():
        rows = [cells(row, before) for row in result["rows"] if row["op"] in members]
        if rows:
            found[family] = [header, *rows]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 if a row is wrong or failed."""
    description, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="torch-pagedkv bench",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--only", default="", metavar="A,B", help='rows whose "op shape" contains one of these')
    parser.add_argument("--quick", action="store_true", help="one row an op")
    parser.add_argument("--no-peers", action="store_true", help="time our ops alone")
    parser.add_argument("--load", action="append", default=[], metavar="LIB", help="a library with peers' operators")
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring for each time (default: 0.2)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU kernels and of PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="an earlier result, shown beside")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    for library in args.load:
        torch.ops.load_library(library)
    device = torch.device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    todo = cases(device.type, args.quick, [x.strip() for x in args.only.split(",") if x.strip()])
    if not todo:
        parser.error(
            f"no row contains any of {args.only!r}; ops: {', '.join(op for f in FAMILIES.values() for op in f)}"
        )
    before = json.loads(args.compare.read_text()) if args.compare else None
    if before and (before["device"], before["dtype"]) != (device.type, dtype):
        parser.error(f"{args.compare.name} is of {before['device']}, {before['dtype']}, not {device.type}, {dtype}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    env = Env(args.device, DTYPES[dtype])
    result: dict[str, Any] = {
        "eval": "kernels",
        "model": f"operators, {dtype}",
        "device": device.type,
        "dtype": dtype,
        "block_size": BLOCK,
        "models": {name: asdict(model) for name, model in MODELS.items()},
        "machine": machine.describe(device, argv=None if argv is None else ["torch-pagedkv", "bench", *argv]),
        "limits": limits(env),
        "rows": [],
    }
    with torch.inference_mode():
        for case in (bar := tqdm(todo, file=sys.stderr, unit="row", disable=None)):
            bar.set_description(f"{case.op} {case.shape}")
            result["rows"].append(measure(case, env, result["limits"], args.seconds, not args.no_peers))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    shown = result if before is None else {**result, "before": before}
    for section in tables(shown).values():
        print(f"\n{render.text(section)}")
    of = result["limits"]
    print(f"\nlimits: copy {of['GB/s']:.0f} GB/s, matrix product {of['TFLOP/s']:.2f} TFLOP/s; * not in a CUDA graph")
    print(machine.summary(result["machine"]))
    if args.json:
        command.write(args.json, result)
    wrong = [row for row in result["rows"] if row["wrong"]]
    for row in wrong:
        print(f"WRONG: {row['op']} {row['shape']}: {row.get('failed', row.get('error'))}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
