"""What `bench` measures: each operator on the sizes of a model, with its exact result, its bytes and its peers.

A builder takes where to run (`Env`), a `Model` and sizes, and gives a `Problem`; the rows are in `evals/kernels.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.quant.eight import Fp8Linear, W8A8Linear

from . import peers as others

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
PAGE = 16  # tokens of a cache block, where a row says nothing else


@dataclass(frozen=True)
class Model:
    """The sizes of one model that the ops see."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int  # of a mixture of experts: of one of them
    vocab: int


MODELS = {
    "Llama-3-8B": Model(32, 8, 128, 4096, 14336, 128256),
    "Llama-2-7B": Model(32, 32, 128, 4096, 11008, 32000),
    "Qwen2-7B": Model(28, 4, 128, 3584, 18944, 152064),
    "Qwen3-30B-A3B": Model(32, 4, 128, 2048, 768, 151936),
    "Gemma-2-9B": Model(16, 8, 256, 3584, 14336, 256000),
    "SmolLM2-135M": Model(9, 3, 64, 576, 1536, 49152),
    "Mistral-7B": Model(32, 8, 128, 4096, 14336, 32000),
    # other head sizes and groups, for attention alone
    "Phi-2": Model(32, 32, 80, 2560, 10240, 51200),
    "Phi-3-mini": Model(32, 32, 96, 3072, 8192, 32064),
    "MPT-30B": Model(64, 64, 112, 7168, 28672, 50432),
    "H2O-Danube3-4B": Model(32, 8, 120, 3840, 10240, 32000),
    "Nemotron-4-340B": Model(96, 8, 192, 18432, 73728, 256000),
    "GLM-4-9B": Model(32, 2, 128, 4096, 13696, 151552),
    "StarCoder-15B": Model(48, 1, 128, 6144, 24576, 49152),
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
    flops: float = 0.0  # of products and sums in them, where there are such
    computes: bool = False  # the rate is of flops, not of bytes
    limit: str = ""  # of `timing.limits`; without it that of the rate's unit
    graphed: bool = True  # may be timed in a CUDA graph
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

    def cache(
        self, blocks: int, model: Model, kv: str, page: int = PAGE
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """key_cache, value_cache, k_scale, v_scale with random entries."""
        shape = (blocks, page, model.kv_heads, model.head_dim)
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


@contextlib.contextmanager
def mma_sync_prefill() -> Iterator[None]:
    """Prefill attention by the kernel of GPUs before Hopper: calls that are made, or captured in a graph, in here."""
    before = os.environ.get("PAGEDKV_PREFILL")
    os.environ["PAGEDKV_PREFILL"] = "mma"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PAGEDKV_PREFILL"]
        else:
            os.environ["PAGEDKV_PREFILL"] = before


def lognormal_lengths(batch: int, mean: int) -> list[int]:
    """Lengths as requests have them, few of them long; 64 of mean 2048 are 279 to 5960."""
    draw = random.Random(1)
    lengths = [min(8192.0, max(64.0, 1000 * draw.lognormvariate(0, 0.7) // 1)) for _ in range(batch)]
    return [max(64, int(n * mean * batch / sum(lengths))) for n in lengths]


def paged(
    env: Env,
    model: Model,
    batch: int,
    context: int,
    query: int = 1,
    kv: str = "same",
    page: int = PAGE,
    lognormal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    flex: bool = False,
    batch_invariant: bool = False,
    mma_sync: bool = False,
) -> Problem:
    """paged_attention: `query` tokens a sequence at the end of `context`; lognormal: that is the lengths' mean; flex:
    beside FlexAttention, which is compiled for each row; batch_invariant: beside itself without; mma_sync: the prefill
    kernel of GPUs before Hopper, beside others of that kind."""
    lengths = lognormal_lengths(batch, context) if lognormal else [context] * batch
    lengths = [max(query, n) for n in lengths]
    needed = [-(-n // page) for n in lengths]
    heads, d, longest = model.heads, model.head_dim, max(lengths)
    rows = [query] * batch
    starts = [query * s for s in range(batch)]

    def make() -> Inputs:
        a = Inputs()
        a.query = env.normal(batch * query, heads, d)
        a.k, a.v, a.k_scale, a.v_scale = env.cache(sum(needed) + 1, model, kv, page)
        order = iter((torch.randperm(sum(needed)) + 1).tolist())
        table = [[*itertools.islice(order, n), *[0] * (max(needed) - n)] for n in needed]
        a.tables, a.lens = env.ints(table), env.ints(lengths)
        a.start, a.rows = env.ints(starts), env.ints(rows)
        if kv == "same":
            position = torch.arange(longest, device=env.device)
            last = (a.lens[:, None] - query + torch.arange(query, device=env.device))[..., None]  # what each row sees
            a.mask = None
            if lognormal or window or (query > 1 and query != context):
                a.mask = (position <= last)[:, None]
                if window:
                    a.mask &= (last - position < window)[:, None]
            a.dense = [x[:, :, :longest].contiguous() for x in dense(a)]
        return a

    def dense(a: Inputs) -> list[Tensor]:
        return [c[a.tables.long()].flatten(1, 2).transpose(1, 2) for c in (a.k, a.v)]

    def sdpa(a: Inputs, k: Tensor, v: Tensor) -> Tensor:
        q = a.query.view(batch, query, heads, d).transpose(1, 2)
        causal = query > 1 and a.mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=a.mask, is_causal=causal, enable_gqa=True)

    def call(a: Inputs, batch_invariant: bool = batch_invariant) -> Any:
        with mma_sync_prefill() if mma_sync else contextlib.nullcontext():
            return ops.paged_attention(
                a.query,
                a.k,
                a.v,
                a.tables,
                a.lens,
                a.start,
                a.rows,
                max_query_len=query,
                batch_invariant=batch_invariant,
                sliding_window=window,
                softcap=softcap,
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
            options = {"sliding_window": window, "softcap": softcap, "k_scale": a.k_scale, "v_scale": a.v_scale}
            found.append(reference("paged_attention", *args, **options)[0])
        return found

    def result(_: Inputs, out: Tensor) -> Tensors:
        return [out[starts[s] + first : starts[s] + end] for s, first, end in sampled_rows(lengths, rows)]

    peers: dict[str, Callable[[Inputs], Any]] = {}
    if batch_invariant:
        peers["paged_attention"] = partial(call, batch_invariant=False)
    elif kv == "same" and not softcap and not mma_sync:
        peers["gather + sdpa"] = lambda a: sdpa(a, *(x[:, :, :longest] for x in dense(a)))
        peers["sdpa on dense KV"] = lambda a: sdpa(a, *a.dense)
    if kv == "same" and env.device.type == "cuda" and env.size == 2 and not batch_invariant:
        peers |= others.attention(
            others.Attention(heads, model.kv_heads, d, page, lengths, query, env.dtype, window, softcap, mma_sync),
            call,
            flex,
        )
    seen = [min(n, window + query - 1) if window else n for n in lengths]  # keys that are read
    pairs = sum(sum(min(i, window) if window else i for i in range(n - query + 1, n + 1)) for n in lengths)
    return Problem(
        make,
        call,
        truth,
        result,
        moved=env.kv_bytes(sum(seen), model, kv) + 2 * batch * query * heads * d * env.size,
        flops=4.0 * pairs * heads * d,
        computes=query > 1,
        bound=env.rounding(2, 64),
        peers=peers,
    )


def cascade(env: Env, model: Model, batch: int, shared: int, own: int) -> Problem:
    """paged_attention_cascade: decoding where all sequences begin with the same `shared` tokens."""
    heads, d = model.heads, model.head_dim
    prefix, rest = shared // PAGE, -(-own // PAGE)
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
        peers |= others.cascade(heads, model.kv_heads, d, PAGE, batch, shared, own, env.dtype)
    checked = sorted({0, batch // 2, batch - 1})

    def truth(a: Inputs) -> Tensors:
        found = []
        for s in checked:
            args = (a.query[s : s + 1].double(), a.k, a.v, a.tables[s : s + 1], a.lens[:1])
            found.append(reference("paged_attention", *args, env.ints([0]), env.ints([1]), 1, d**-0.5)[0])
        return found

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
        computes=True,
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
        peers=others.merge(env.device),
    )


# ---- cache -----------------------------------------------------------------------------------------------------------


def write_inputs(env: Env, model: Model, tokens: int, kv: str) -> Inputs:
    """A fused projection's q, k, v, an empty cache twice as large, and random slots."""
    a = Inputs()
    widths = [n * model.head_dim for n in (model.heads, model.kv_heads, model.kv_heads)]
    parts = env.normal(tokens, sum(widths)).split(widths, -1)
    a.query, a.key, a.value = (x.unflatten(-1, (-1, model.head_dim)) for x in parts)
    blocks = -(-2 * tokens // PAGE)
    a.k, a.v, a.k_scale, a.v_scale = env.cache(blocks, model, kv)
    a.slots = env.ints(torch.randperm(blocks * PAGE)[:tokens], torch.int64)
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
        peers={"index_copy_": index_copy, **others.write(env.device)} if kv == "same" else {},
    )


def gather(env: Env, model: Model, batch: int, context: int, kv: str = "same") -> Problem:
    """gather_cache of a batch of equal lengths."""
    needed = -(-context // PAGE)

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
        a.caches = [env.normal(2 * pairs, PAGE, model.kv_heads, model.head_dim) for _ in range(2 * layers)]
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
        moved=2.0 * layers * env.kv_bytes(pairs * PAGE, model, "same"),
        bound=0.0,
        peers={"cache[dst] = cache[src]": index},
    )


def swap(env: Env, model: Model, pairs: int, to_host: bool, adjacent: bool = False) -> Problem:
    """swap_blocks of one cache between the device and pinned host memory (CPU: between two caches)."""

    def make() -> Inputs:
        here, there = swapped(env, model, pairs)
        a = Inputs(src=here, dst=there) if to_host else Inputs(src=there, dst=here)
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

    on_gpu = env.device.type == "cuda"
    return Problem(
        make,
        lambda a: ops.swap_blocks(a.src, a.dst, a.mapping),
        truth,
        arrived,
        moved=env.kv_bytes(pairs * PAGE, model, "same") / 2 * (1 if on_gpu else 2),
        bound=0.0,
        limit="PCIe GB/s" if on_gpu else "",
        peers={"copy_ of each block": block_copies, **others.swap(env.device)},
    )


def swapped(env: Env, model: Model, pairs: int) -> tuple[Tensor, Tensor]:
    """A cache on the device and one of its shape in the host's memory."""
    shape = (2 * pairs, PAGE, model.kv_heads, model.head_dim)
    there = torch.empty(shape, dtype=env.dtype, pin_memory=env.device.type == "cuda")
    return env.normal(*shape), there.copy_(env.normal(*shape))


def swap_both_ways(env: Env, model: Model, pairs: int, computing: bool = False, adjacent: bool = False) -> Problem:
    """swap_blocks out of one cache and into another at once, on two streams; computing: while matrix products run on a
    third. On a GPU only."""
    side, third = torch.cuda.Stream(), torch.cuda.Stream()
    m = env.normal(8192, 8192) if computing else env.normal(1)
    product = torch.empty_like(m)

    def make() -> Inputs:
        a = Inputs(out=swapped(env, model, pairs), back=swapped(env, model, pairs))
        orders = [torch.arange(pairs) if adjacent else torch.randperm(2 * pairs)[:pairs] for _ in range(2)]
        a.mapping = torch.stack(orders, 1)
        return a

    def call(a: Inputs) -> None:
        now = torch.cuda.current_stream()
        if computing:  # longer than the swap, and never waited for
            with torch.cuda.stream(third):
                torch.mm(m, m, out=product)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            ops.swap_blocks(a.out[0], a.out[1], a.mapping)
        ops.swap_blocks(a.back[1], a.back[0], a.mapping)
        now.wait_stream(side)

    def truth(a: Inputs) -> Tensors:
        found = []
        for source, target in (a.out, a.back[::-1]):
            found.append(target.clone())
            reference("swap_blocks", source, found[-1], a.mapping)
        return found

    def arrived(a: Inputs, _: Any) -> Tensors:
        torch.cuda.synchronize()
        return [a.out[1], a.back[0]]

    return Problem(
        make,
        call,
        truth,
        arrived,
        moved=env.kv_bytes(pairs * PAGE, model, "same"),
        bound=0.0,
        limit="PCIe GB/s, both ways",
        graphed=not computing,
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
    peers = {name: peer, **others.norm(op, eps, env.device)}
    return Problem(make, call, truth, outputs, moved=moved, bound=env.rounding(0.6, 8), peers=peers)


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
    if kv is None:
        peers |= others.rotary(model.head_dim, env.device)
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
    flops = 2.0 * rows * model.ffn * model.hidden
    return Problem(make, call, truth, outputs, moved=moved, bound=env.rounding(0.6, 8), flops=flops, peers=peers)


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
    return Problem(
        make,
        call,
        truth,
        outputs,
        moved=moved,
        bound=env.rounding(0.6, 8),
        flops=2.0 * rows * n * k,
        computes=rows >= 64,
        peers=peers,
    )


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
        flops=2.0 * rows * n * k,
        computes=rows >= 64,
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


def eight(env: Env, model: Model, layer: str, rows: int, stored: str) -> Problem:
    """scaled_linear beside torch's product of 8-bit numbers with what surrounds it, and F.linear in the dtype."""
    n, k = LAYERS[layer](model)
    dtype = KV_DTYPES[stored]

    def make() -> Inputs:
        a = Inputs(x=env.normal(rows, k, scale=30).to(dtype), w=env.normal(n, k, scale=30).to(dtype))
        a.row, a.column = env.normal(rows).float().abs() * 0.01, env.normal(n).float().abs() * 0.01
        a.one = torch.ones((), dtype=torch.float32, device=env.device)
        a.x16, a.dense = env.normal(rows, k), env.normal(n, k)
        return a

    def torchs(a: Inputs) -> Tensor:
        sums = (W8A8Linear if dtype == torch.int8 else Fp8Linear).multiply(a.x, a.w, a.one)
        return ops.dequantize_sums(sums, a.row, a.column, dtype=env.dtype)

    return Problem(
        make,
        lambda a: ops.scaled_linear(a.x, a.row, a.w, a.column, dtype=env.dtype),
        lambda a: [reference("scaled_linear", a.x, a.row, a.w, a.column, None, torch.float64)],
        outputs,
        moved=n * k + rows * k + env.size * rows * n + 4 * (rows + n),
        bound=env.rounding(0.6, 8),
        peers={"torch's product": torchs, "F.linear": lambda a: F.linear(a.x16, a.dense)},
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
        both = env.normal(tokens, 2 * n)
        gate, up = both.chunk(2, -1)
        return Inputs(both=both, gate=gate, up=up, bias=env.normal(n))

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
    peers = {name: peer, **others.gated(op, env.device)}
    return Problem(make, call, lambda a: [truth(a)], outputs, moved, env.rounding(0.6, 8), peers=peers)


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
