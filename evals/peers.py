"""Other projects' kernels beside ours in `bench`, where they can be loaded: FlashAttention-3 (vLLM's build of it),
FlashInfer, Marlin and Machete (vLLM).

Each is given the same tensors, or its own form of them made beforehand, and its first result is compared before it is
timed: a wrong one is an error. Nothing here is needed to run the benchmark. vLLM's kernels are found if its libraries
are loaded, by `--load` or by importing vllm; FlashInfer if it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: largest relative error of a peer's result (norms), in 16 bits
TOLERANCE = 2e-2


@dataclass
class Peer:
    """A kernel of somebody else: `prepare` runs once for each set of inputs, outside of the timing; `call` is timed;
    `exact`, if given, is what its result is compared with, once."""

    call: Callable[[Any], Any]
    prepare: Callable[[Any], None] = lambda a: None
    exact: Callable[[Any], Tensor] | None = None

    def __call__(self, a: Any) -> Any:
        return self.call(a)

    def check(self, a: Any) -> None:
        """Raises RuntimeError if the result on these inputs is wrong."""
        if self.exact is None:
            return
        want = self.exact(a).double()
        got = self(a)
        got = (got[0] if isinstance(got, (tuple, list)) else got).double().view_as(want)
        error = float((got - want).norm() / want.norm())
        if not error <= TOLERANCE:
            raise RuntimeError(f"wrong by {error:.1e}")


def has_op(namespace: str, name: str) -> bool:
    """Whether an operator is registered."""
    return hasattr(getattr(torch.ops, namespace), name)


@cache
def flashinfer() -> Any:
    """The module, or None."""
    try:
        return importlib.import_module("flashinfer")
    except Exception:  # an installation that does not fit this torch fails in any way
        return None


@cache
def _workspace() -> Tensor:
    return torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")


def attention(
    heads: int, kv_heads: int, head_dim: int, block: int, lengths: list[int], query: int, dtype: torch.dtype
) -> dict[str, Peer]:
    """For inputs with query, k, v, tables, lens and, dense, [2] of [B, Hkv, L, D] (equal lengths), all causal and with
    `query` new tokens for each sequence."""
    batch, longest, scale = len(lengths), max(lengths), head_dim**-0.5
    found: dict[str, Peer] = {}

    def exact(a: Any) -> Tensor:
        from torch_pagedkv import ops

        out = ops.paged_attention(a.query, a.k, a.v, a.tables, a.lens, a.start, a.rows, max_query_len=query)
        assert isinstance(out, Tensor)
        return out

    def cudnn(a: Any) -> Tensor:
        q, (k, v) = a.query.view(batch, query, heads, head_dim).transpose(1, 2), a.dense
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=query > 1, enable_gqa=heads != kv_heads)
        return out.transpose(1, 2)

    if len(set(lengths)) == 1 and query in (1, longest):
        found["sdpa, cudnn, dense KV"] = Peer(cudnn, exact=exact)
    if has_op("_vllm_fa3_C", "fwd"):

        def starts(a: Any) -> None:
            a.query_starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * query

        def fa3(a: Any) -> Tensor:
            before = (None, a.query_starts, None, None, None, a.lens, query, longest, a.tables)
            after = (scale, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None)
            return torch.ops._vllm_fa3_C.fwd(a.query, a.k, a.v, None, None, None, *before, *[None] * 8, *after)[0]

        found["FA3, paged"] = Peer(fa3, starts, exact)
    if flashinfer() is not None and head_dim == 128 and dtype == torch.bfloat16:  # others it would compile first
        pages = [-(-n // block) for n in lengths]
        first = torch.tensor([0, *pages]).cumsum(0).int()
        last = torch.tensor([(n - 1) % block + 1 for n in lengths], dtype=torch.int32, device="cuda")
        kinds = {"q_data_type": dtype, "kv_data_type": dtype, "o_data_type": dtype, "sm_scale": scale}

        def planned(kind: str) -> Callable[[Any], None]:
            def prepare(a: Any) -> None:
                ids = torch.cat([a.tables[i, :n] for i, n in enumerate(pages)]).int()
                if query == 1:
                    wrapper = flashinfer().BatchDecodeWithPagedKVCacheWrapper(
                        _workspace(), "NHD", use_tensor_cores=kind != "cuda", backend="auto" if kind == "cuda" else kind
                    )
                    wrapper.plan(first, ids, last, heads, kv_heads, head_dim, block, **kinds)
                else:
                    wrapper = flashinfer().BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend=kind)
                    begins = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * query
                    wrapper.plan(
                        begins, first.cuda(), ids, last, heads, kv_heads, head_dim, block, causal=True, **kinds
                    )
                a.wrappers = {**getattr(a, "wrappers", {}), kind: (wrapper, torch.empty_like(a.query))}

            return prepare

        def run(kind: str) -> Callable[[Any], Any]:
            def call(a: Any) -> Any:
                wrapper, out = a.wrappers[kind]
                return wrapper.run(a.query, (a.k, a.v), out=out)

            return call

        for name, kind in {"FlashInfer": "fa2", "FlashInfer, CUDA cores": "cuda"}.items() if query == 1 else ():
            found[name] = Peer(run(kind), planned(kind), exact)
        if query > 1:
            found["FlashInfer"] = Peer(run("fa3"), planned("fa3"), exact)
    return found


def cascade(
    heads: int, kv_heads: int, head_dim: int, block: int, batch: int, shared: int, own: int, dtype: torch.dtype
) -> dict[str, Peer]:
    """For inputs with query, k, v, tables, lens, start and rows: decoding, `shared` tokens of all and `own` of each.
    FlashInfer compiles its merge at the first use."""
    if flashinfer() is None or head_dim != 128 or dtype != torch.bfloat16:
        return {}
    prefix, rest = shared // block, -(-own // block)

    def prepare(a: Any) -> None:
        a.cascade = flashinfer().MultiLevelCascadeAttentionWrapper(2, _workspace(), "NHD")
        first = torch.tensor([0, batch], dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32)
        pages = torch.tensor([0, prefix], dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32) * rest
        ids = a.tables[0, :prefix].contiguous(), a.tables[:, prefix:].flatten()
        last = (
            torch.full((1,), block, dtype=torch.int32),
            torch.full((batch,), (own - 1) % block + 1, dtype=torch.int32),
        )
        a.cascade.plan(
            *([x.cuda() for x in each] for each in (first, pages, ids, last)),
            heads,
            kv_heads,
            head_dim,
            block,
            sm_scale=head_dim**-0.5,
            q_data_type=dtype,
            kv_data_type=dtype,
        )

    def exact(a: Any) -> Tensor:
        from torch_pagedkv import ops

        out = ops.paged_attention(a.query, a.k, a.v, a.tables, a.lens, a.start, a.rows, max_query_len=1)
        assert isinstance(out, Tensor)
        return out

    return {"FlashInfer, cascade": Peer(lambda a: a.cascade.run(a.query, (a.k, a.v)), prepare, exact)}


#: vLLM's number of the type uint4 with a bias of 8
UINT4B8 = 1125899907892224


def int4(n: int, k: int, group: int, dtype: torch.dtype) -> dict[str, Peer]:
    """For inputs with x [M, K]; the weights are the peer's own, symmetric with scales in x's dtype."""
    found: dict[str, Peer] = {}
    if dtype not in (torch.bfloat16, torch.float16) or k % 128 or n % 128 or group != 128:
        return found

    def draw(a: Any) -> tuple[Tensor, Tensor]:
        """GPTQ's words [K / 8, N] and scales [groups, N]."""
        q = torch.randint(0, 16, (n, k), dtype=torch.int32, device="cuda")
        scales = (torch.rand(k // group, n, device="cuda") * 0.01 + 0.005).to(dtype)
        a.symmetric = ((q - 8).view(n, -1, group) * scales.T[..., None].float()).view(n, k).to(dtype)
        words = torch.zeros(k // 8, n, dtype=torch.int32, device="cuda")
        for i in range(8):
            words |= q.T[i::8] << 4 * i
        return words, scales

    def exact(a: Any) -> Tensor:
        return a.x.float() @ a.symmetric.float().T

    if has_op("_C", "gptq_marlin_repack") and has_op("_C", "marlin_gemm"):

        def marlin_weights(a: Any) -> None:
            words, scales = draw(a)
            none = torch.empty(0, dtype=torch.int32, device="cuda")
            order = [i + 8 * j for i in range(8) for j in range(8)]
            a.marlin = (
                torch.ops._C.gptq_marlin_repack(words, none, k, n, 4, False),
                scales.reshape(-1, 64)[:, order].reshape(-1, n).contiguous(),
                none,
                torch.zeros(torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int32).cuda(),
            )

        def marlin(a: Any) -> Tensor:
            w, s, none, work = a.marlin
            sizes = (a.x.shape[0], n, k)
            rest = (none, none, work, UINT4B8, *sizes, True, False, True, False)
            return torch.ops._C.marlin_gemm(a.x, None, w, None, s, None, None, None, *rest)

        found["Marlin"] = Peer(marlin, marlin_weights, exact)
    if has_op("_C", "machete_prepack_B") and has_op("_C", "machete_mm"):

        def machete_weights(a: Any) -> None:
            words, scales = draw(a)
            a.machete = (torch.ops._C.machete_prepack_B(words.t().contiguous().t(), dtype, UINT4B8, dtype), scales)

        def machete(a: Any) -> Tensor:
            w, s = a.machete
            return torch.ops._C.machete_mm(a.x, w, UINT4B8, None, s, None, group, None, None, None)

        found["Machete"] = Peer(machete, machete_weights, exact)
    return found
