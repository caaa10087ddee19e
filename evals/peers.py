"""Other projects' kernels beside ours in `bench`, where they can be loaded: PyTorch's own beyond plain operators
(cuDNN's attention, FlexAttention, variable lengths), FlashAttention-3 (vLLM's build of it), FlashInfer with XQA, and
vLLM's norms, activations, rotary embedding, cache writes, Marlin and Machete.

Each is given the same tensors, or its own form of them made beforehand, and its first result is compared before it is
timed: a wrong one is an error. Nothing here is needed to run the benchmark. vLLM's kernels are found if its libraries
are loaded, by `--load` or by vllm being installed; FlashInfer's if it is installed, and of its modules those that are
built: the others it would compile first, for minutes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: largest relative error of a peer's result (norms), in 16 bits
TOLERANCE = 2e-2
PACKAGES = ("flashinfer-python", "vllm")
#: Head sizes for which every build of FA3 has kernels. For one that it lacks it does not raise but ends the process.
FA3_HEADS = (64, 128)


@dataclass
class Peer:
    """A kernel of somebody else: `prepare` runs once for each set of inputs, outside of the timing; `call` is timed;
    `exact`, if given, is what its result (or what `result` finds) is compared with, once."""

    call: Callable[[Any], Any]
    prepare: Callable[[Any], None] = lambda a: None
    exact: Callable[[Any], Tensor] | None = None
    result: Callable[[Any], Tensor] | None = None

    def __call__(self, a: Any) -> Any:
        return self.call(a)

    def check(self, a: Any) -> None:
        """Raises RuntimeError if the result on these inputs is wrong."""
        if self.exact is None:
            return
        want = self.exact(a).double()
        got = self(a)
        got = self.result(a) if self.result else got[0] if isinstance(got, (tuple, list)) else got
        got = got.double().reshape(want.shape)
        error = float((got - want).norm() / want.norm())
        if not error <= TOLERANCE:
            raise RuntimeError(f"wrong by {error:.1e}")


def load_vllm() -> None:
    """Registers vLLM's operators if it is installed."""
    for module in ("_C_stable_libtorch", "_C", "vllm_flash_attn._vllm_fa3_C"):
        try:
            importlib.import_module(f"vllm.{module}")
        except Exception:  # not installed, or for another torch
            continue


def versions() -> dict[str, str]:
    """Of the packages that peers come from; vLLM's libraries alone have none."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "flashinfer-python" not in found and flashinfer() is not None:
        found["flashinfer-python"] = str(flashinfer().__version__)
    return found


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
def modules_built() -> frozenset[str]:
    """The names of FlashInfer's modules that need no compiling."""
    if flashinfer() is None:
        return frozenset()
    env = importlib.import_module("flashinfer.jit.env")
    folders = [getattr(env, name, None) for name in ("FLASHINFER_AOT_DIR", "FLASHINFER_JIT_DIR")]
    return frozenset(file.stem for folder in folders if folder for file in Path(folder).glob("*/*.so"))


def is_built(*parts: str, lacking: str = "\0") -> bool:
    """Whether FlashInfer has a module whose name contains these, and not `lacking`."""
    return any(all(part in name for part in parts) and lacking not in name for name in modules_built())


@cache
def _workspace(use: str) -> Tensor:
    return torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Causal attention over pages, with `query` new tokens for each sequence."""

    heads: int
    kv_heads: int
    head_dim: int
    page: int
    lengths: list[int]
    query: int
    dtype: torch.dtype
    window: int
    softcap: float
    mma_sync: bool = False  # beside kernels without instructions of Hopper

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    def starts(self) -> Tensor:
        """int32 [batch + 1] of the queries."""
        return torch.arange(self.batch + 1, dtype=torch.int32, device="cuda") * self.query


Peers = dict[str, Callable[[Any], Any]]


def attention(at: Attention, ours: Callable[[Any], Any], flex: bool) -> Peers:
    """For inputs with query, k, v, tables, lens, mask and, dense, [2] of [B, Hkv, L, D]. Each is compared with our own
    result, which the row compares with the exact one."""
    if at.mma_sync:
        theirs = _sdpa(at, "FlashAttention-2", SDPBackend.FLASH_ATTENTION)
    else:
        theirs = _sdpa(at, "cudnn", SDPBackend.CUDNN_ATTENTION) | _fa3(at)
    theirs |= _varlen(at) | (_flex(at) if flex else {}) | _flashinfer(at)
    return {name: Peer(peer.call, peer.prepare, ours) for name, peer in theirs.items()}


def _sdpa(at: Attention, name: str, backend: SDPBackend) -> dict[str, Peer]:
    """PyTorch's attention by one of its kernels."""
    if not at.uniform or at.query not in (1, at.longest) or at.window or at.softcap:
        return {}

    def call(a: Any) -> Tensor:
        q, (k, v) = a.query.view(at.batch, at.query, at.heads, at.head_dim).transpose(1, 2), a.dense
        with sdpa_kernel(backend):
            grouped = at.heads != at.kv_heads
            out = F.scaled_dot_product_attention(q, k, v, is_causal=at.query > 1, enable_gqa=grouped)
        return out.transpose(1, 2)

    return {f"sdpa, {name}, dense KV": Peer(call)}


def _varlen(at: Attention) -> dict[str, Peer]:
    """PyTorch's attention over packed sequences, FlashAttention-2 inside."""
    if at.softcap or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return {}
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen).parameters else {}

    def pack(a: Any) -> None:
        a.packed_starts = at.starts(), torch.tensor([0, *at.lengths]).cumsum(0).int().cuda()
        a.packed = [torch.cat([x[s, :, :n].transpose(0, 1) for s, n in enumerate(at.lengths)]) for x in a.dense]

    def call(a: Any) -> Any:
        window = (at.window - 1 if at.window else -1, 0)
        return varlen(a.query, *a.packed, *a.packed_starts, at.query, at.longest, window_size=window, **grouped)

    return {"varlen, packed KV": Peer(call, pack)}


@cache
def _flex_compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(at: Attention) -> dict[str, Peer]:
    from torch.nn.attention.flex_attention import create_block_mask

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return at.softcap * torch.tanh(score / at.softcap)

    def mask(a: Any) -> None:
        lens = a.lens

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = lens[b] - at.query + q - k
            return (distance >= 0) & (distance < at.window) if at.window else distance >= 0

        needed = at.query > 1 or at.window or not at.uniform
        a.blocks = create_block_mask(visible, at.batch, None, at.query, at.longest) if needed else None

    def call(a: Any) -> Tensor:
        q = a.query.view(at.batch, at.query, at.heads, at.head_dim).transpose(1, 2)
        score = cap if at.softcap else None
        grouped = at.heads != at.kv_heads
        return _flex_compiled()(q, *a.dense, score, a.blocks, enable_gqa=grouped).transpose(1, 2)

    return {"FlexAttention, dense KV": Peer(call, mask)}


def _fa3(at: Attention) -> dict[str, Peer]:
    """vLLM's build of FlashAttention-3; in decoding also with its plan made beforehand, as there for a whole step."""
    if not has_op("_vllm_fa3_C", "fwd") or at.head_dim not in FA3_HEADS or at.dtype != torch.bfloat16:
        return {}
    window = (at.window - 1 if at.window else -1, 0 if at.window else -1)

    def starts(a: Any) -> None:
        a.starts, a.plan = at.starts(), None

    def plan(a: Any) -> None:
        starts(a)
        sizes = (at.batch, at.query, at.longest, at.heads, at.kv_heads, at.head_dim, at.head_dim, at.dtype)
        rest = (None, at.page, 0, True, *window, at.softcap > 0, 0, None, 0)
        a.plan = torch.ops._vllm_fa3_C.get_scheduler_metadata(*sizes, a.lens, a.starts, None, None, None, *rest)

    def call(a: Any) -> Tensor:
        before = (None, a.starts, None, None, None, a.lens, at.query, at.longest, a.tables)
        after = (at.scale, True, *window, at.softcap, True, a.plan, 0, None, 0, None, 1, 0, None)
        return torch.ops._vllm_fa3_C.fwd(a.query, a.k, a.v, None, None, None, *before, *[None] * 8, *after)[0]

    planned = {"FA3, paged, planned": Peer(call, plan)} if at.query == 1 else {}
    return {"FA3, paged": Peer(call, starts), **planned}


def _flashinfer(at: Attention) -> dict[str, Peer]:
    if flashinfer() is None or at.window or at.softcap or at.dtype != torch.bfloat16:
        return {}
    pages = [-(-n // at.page) for n in at.lengths]
    first = torch.tensor([0, *pages]).cumsum(0).int()
    last = torch.tensor([(n - 1) % at.page + 1 for n in at.lengths], dtype=torch.int32, device="cuda")
    kinds = {"q_data_type": at.dtype, "kv_data_type": at.dtype, "o_data_type": at.dtype, "sm_scale": at.scale}
    sizes = (at.heads, at.kv_heads, at.head_dim, at.page)

    def planned(kind: str) -> Peer:
        def plan(a: Any) -> None:
            ids = torch.cat([a.tables[i, :n] for i, n in enumerate(pages)]).int()
            space = _workspace("FlashInfer")
            if at.query == 1:
                wrapper = flashinfer().BatchDecodeWithPagedKVCacheWrapper(
                    space, "NHD", use_tensor_cores=kind != "cuda", backend="auto" if kind == "cuda" else kind
                )
                wrapper.plan(first, ids, last, *sizes, **kinds)
            else:
                wrapper = flashinfer().BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=kind)
                wrapper.plan(at.starts(), first.cuda(), ids, last, *sizes, causal=True, **kinds)
            a.wrappers = {**getattr(a, "wrappers", {}), kind: (wrapper, torch.empty_like(a.query))}

        def call(a: Any) -> Any:
            wrapper, out = a.wrappers[kind]
            return wrapper.run(a.query, (a.k, a.v), out=out)

        return Peer(call, plan)

    def xqa_inputs(a: Any) -> None:
        a.xqa = a.lens.to(torch.uint32), torch.empty_like(a.query)

    def xqa(a: Any) -> Any:
        lens, out = a.xqa
        run, space = flashinfer().decode.xqa_batch_decode_with_kv_cache, _workspace("XQA")
        return run(a.query, (a.k, a.v), space, a.tables, lens, at.longest, bmm1_scale=at.scale, out=out)

    head = f"head_dim_qk_{at.head_dim}"
    plain = ("dtype_q_bf16", head, "use_swa_False", "use_logits_cap_False")
    found = {}
    if at.query > 1 and not at.mma_sync:
        if is_built("batch_prefill", *plain, "sm90"):
            found["FlashInfer"] = planned("fa3")
        return found
    if is_built("batch_prefill", *plain, lacking="sm90"):  # its tensor cores' decode is that kernel
        found["FlashInfer"] = planned("fa2")
    if at.query > 1:
        return found
    if is_built("batch_decode", *plain):
        found["FlashInfer, CUDA cores"] = planned("cuda")
    group = f"head_group_ratio_{at.heads // at.kv_heads}_"
    if is_built("xqa_input_bf16", f"page_size_{at.page}_", f"head_dim_{at.head_dim}_", group, "sliding_window_False"):
        found["XQA"] = Peer(xqa, xqa_inputs)
    return found


def cascade(
    heads: int, kv_heads: int, head_dim: int, block: int, batch: int, shared: int, own: int, dtype: torch.dtype
) -> Peers:
    """For inputs with query, k, v, tables, lens, start and rows: decoding, `shared` tokens of all and `own` of each."""
    names = {torch.bfloat16: "bf16", torch.float16: "f16"}
    plain = f"dtype_q_{names[dtype]}_dtype_kv_{names[dtype]}", f"head_dim_qk_{head_dim}_", "logits_cap_False"
    if not is_built("batch_prefill", *plain) or not is_built("cascade"):
        return {}
    prefix, rest = shared // block, -(-own // block)

    def prepare(a: Any) -> None:
        a.cascade = flashinfer().MultiLevelCascadeAttentionWrapper(2, _workspace("cascade"), "NHD")
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


# ---- vLLM's small kernels --------------------------------------------------------------------------------------------


def _vllm(name: str, device: torch.device, namespace: str = "_C") -> Any:
    """An operator of vLLM, or None."""
    return getattr(getattr(torch.ops, namespace), name) if device.type == "cuda" and has_op(namespace, name) else None


def norm(op: str, eps: float, device: torch.device) -> Peers:
    """For inputs with x, residual and weight: rms_norm, and add_rms_norm, which it does in place."""
    run = _vllm({"rms_norm": "rms_norm", "add_rms_norm": "fused_add_rms_norm"}.get(op, ""), device)
    if run is None:
        return {}

    def prepare(a: Any) -> None:
        a.vllm = [torch.empty_like(a.x)] if op == "rms_norm" else [a.x.clone(), a.residual.clone()]

    def call(a: Any) -> Any:
        if op == "rms_norm":
            run(a.vllm[0], a.x, a.weight, eps)
        else:
            run(*a.vllm, a.weight, eps)

    def exact(a: Any) -> Tensor:
        x = a.x if op == "rms_norm" else a.x + a.residual
        return F.rms_norm(x.float(), x.shape[-1:], a.weight.float(), eps)

    return {"vLLM": Peer(call, prepare, exact, lambda a: a.vllm[0])}


def gated(op: str, device: torch.device) -> Peers:
    """For inputs with both, [T, 2 N]: gate, then up."""
    run = _vllm({"silu_and_mul": "silu_and_mul", "gelu_and_mul": "gelu_tanh_and_mul"}.get(op, ""), device)
    if run is None:
        return {}

    def prepare(a: Any) -> None:
        a.vllm = torch.empty_like(a.up, memory_format=torch.contiguous_format)

    def exact(a: Any) -> Tensor:
        gate, up = a.gate.float(), a.up.float()
        return (F.silu(gate) if op == "silu_and_mul" else F.gelu(gate, approximate="tanh")) * up

    return {"vLLM": Peer(lambda a: run(a.vllm, a.both), prepare, exact, lambda a: a.vllm)}


def rotary(head_dim: int, device: torch.device) -> Peers:
    """For inputs with query [T, Hq, D] and key, turned in place, and cos, sin [T, D / 2]."""
    run = _vllm("rotary_embedding", device)
    if run is None:
        return {}

    def prepare(a: Any) -> None:
        a.table = torch.cat([a.cos, a.sin], -1)
        a.positions = torch.arange(a.cos.shape[0], device=device)

    def exact(a: Any) -> Tensor:
        x, y = a.query.float().chunk(2, -1)
        cos, sin = a.cos.float()[:, None], a.sin.float()[:, None]
        return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)

    def call(a: Any) -> None:
        run(a.positions, a.query.flatten(1), a.key.flatten(1), head_dim, a.table, True)

    return {"vLLM": Peer(call, prepare, exact, lambda a: a.query)}


def write(device: torch.device) -> Peers:
    """For inputs with key, value, slots and the caches k, v."""
    run = _vllm("reshape_and_cache_flash", device, "_C_cache_ops")
    if run is None:
        return {}

    def prepare(a: Any) -> None:
        a.one = torch.ones(1, device=device)
        a.k.zero_()

    def call(a: Any) -> None:
        run(a.key, a.value, a.k, a.v, a.slots, "auto", a.one, a.one)

    return {"vLLM": Peer(call, prepare, lambda a: a.key, lambda a: a.k.flatten(0, 1)[a.slots])}


def merge(device: torch.device) -> Peers:
    """For inputs with args: out_a, lse_a [T, H], out_b, lse_b."""
    run = _vllm("merge_attn_states", device)
    if run is None:
        return {}

    def prepare(a: Any) -> None:
        out_a, lse_a, _, lse_b = a.args
        a.vllm = torch.empty_like(out_a), lse_a.T.contiguous(), lse_b.T.contiguous()
        a.vllm_lse = torch.empty_like(a.vllm[1])

    def call(a: Any) -> None:
        out, lse_a, lse_b = a.vllm
        run(out, a.vllm_lse, a.args[0], lse_a, a.args[2], lse_b, None)

    def exact(a: Any) -> Tensor:
        share = torch.sigmoid(a.args[1] - a.args[3])[..., None]
        return share * a.args[0] + (1 - share) * a.args[2]

    return {"vLLM": Peer(call, prepare, exact, lambda a: a.vllm[0])}


def swap(device: torch.device) -> Peers:
    """For inputs with src, dst and mapping [N, 2] on the host."""
    run = _vllm("swap_blocks", device, "_C_cache_ops")
    if run is None:
        return {}

    def call(a: Any) -> None:
        run(a.src, a.dst, a.src[0].numel() * a.src.element_size(), a.mapping)

    return {"vLLM": Peer(call)}


# ---- 4-bit products --------------------------------------------------------------------------------------------------


#: vLLM's number of the type uint4 with a bias of 8
UINT4B8 = 1125899907892224


def int4(n: int, k: int, group: int, dtype: torch.dtype) -> Peers:
    """For inputs with x [M, K]; the weights are the peer's own, symmetric with scales in x's dtype: drawn for the first
    set of inputs, copied for the others."""
    found: Peers = {}
    if dtype not in (torch.bfloat16, torch.float16) or k % 128 or n % 128 or group != 128:
        return found

    @cache
    def drawn() -> tuple[Tensor, Tensor, Tensor]:
        """GPTQ's words [K / 8, N], scales [groups, N], and the weight that they are."""
        q = torch.randint(0, 16, (n, k), dtype=torch.int32, device="cuda")
        scales = (torch.rand(k // group, n, device="cuda") * 0.01 + 0.005).to(dtype)
        weight = ((q - 8).view(n, -1, group) * scales.T[..., None].float()).view(n, k).to(dtype)
        words = torch.zeros(k // 8, n, dtype=torch.int32, device="cuda")
        for i in range(8):
            words |= q.T[i::8] << 4 * i
        return words, scales, weight

    def exact(a: Any) -> Tensor:
        return a.x.float() @ drawn()[2].float().T

    if has_op("_C", "gptq_marlin_repack") and has_op("_C", "marlin_gemm"):

        @cache
        def marlin_form() -> tuple[Tensor, ...]:
            words, scales, _ = drawn()
            none = torch.empty(0, dtype=torch.int32, device="cuda")
            order = [i + 8 * j for i in range(8) for j in range(8)]
            return (
                torch.ops._C.gptq_marlin_repack(words, none, k, n, 4, False),
                scales.reshape(-1, 64)[:, order].reshape(-1, n).contiguous(),
                none,
                torch.zeros(torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int32).cuda(),
            )

        def marlin_weights(a: Any) -> None:
            a.marlin = [t.clone() for t in marlin_form()]

        def marlin(a: Any) -> Tensor:
            w, s, none, work = a.marlin
            sizes = (a.x.shape[0], n, k)
            rest = (none, none, work, UINT4B8, *sizes, True, False, True, False)
            return torch.ops._C.marlin_gemm(a.x, None, w, None, s, None, None, None, *rest)

        found["Marlin"] = Peer(marlin, marlin_weights, exact)
    if has_op("_C", "machete_prepack_B") and has_op("_C", "machete_mm"):

        @cache
        def machete_form() -> tuple[Tensor, Tensor]:
            words, scales, _ = drawn()
            return torch.ops._C.machete_prepack_B(words.t().contiguous().t(), dtype, UINT4B8, dtype), scales

        def machete_weights(a: Any) -> None:
            a.machete = [t.clone() for t in machete_form()]

        def machete(a: Any) -> Tensor:
            w, s = a.machete
            return torch.ops._C.machete_mm(a.x, w, UINT4B8, None, s, None, group, None, None, None)

        found["Machete"] = Peer(machete, machete_weights, exact)
    return found
