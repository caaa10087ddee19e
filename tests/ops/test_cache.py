"""Cache ops: bit copies, quantisation equal to the reference bit for bit, and errors before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, bits, cpu, same_bits
from ops.samples_small import QUANTIZED, Inputs
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES
from torch_pagedkv.ops.cache import quantize_rows

relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
POISON = 2147480000


def check_write(args: tuple[Any, ...]) -> None:
    """reshape_and_cache against its reference, every bit of all caches and scales."""
    want = cpu(args)
    REFERENCES["reshape_and_cache"](*want)
    ops.reshape_and_cache(*args)
    for x, y in zip(args, want):
        assert x is None or same_bits(x, y)


def strided_cache(new: Inputs, layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Any]:
    """A cache in tokens-first ("nhd") or heads-first ("hnd") order, or with unused space between its rows."""
    k, v, k_scale, v_scale = new.cache(*shape, dtype)
    if layout == "hnd":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif layout == "padded":
        k, v = (torch.cat([x, x], -1)[..., : shape[3]] for x in (k, v))
    return [k, v, k_scale, v_scale]


@relaxed
@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 3),
    d=st.sampled_from([8, 40, 64, 120, 256]),
    block_size=st.sampled_from([8, 16, 128]),
    dtype=st.sampled_from(FLOATS),
    cache_dtype=st.sampled_from([None, *QUANTIZED]),
    layout=st.sampled_from(["nhd", "hnd", "padded"]),
    seed=st.integers(0, 99),
)
def test_write(
    device: str,
    tokens: int,
    heads: int,
    d: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    layout: str,
    seed: int,
) -> None:
    """Key and value as slices of a fused projection; some tokens skipped; the rest of the cache keeps its bits."""
    new = Inputs(device, seed)
    k, v, k_scale, v_scale = strided_cache(new, layout, (3, block_size, heads, d), cache_dtype or dtype)
    fused = new.normal(tokens, 4 * heads * d + 3, dtype=dtype)[:, 1:]
    key, value = (fused[:, i * heads * d : (i + 1) * heads * d].view(tokens, heads, d) for i in (1, 2))
    slots = new.permutation(3 * block_size, tokens)
    slots[seed % 3 :: 3] = -1 - seed
    check_write((key, value, k, v, slots, k_scale, v_scale))


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantises_every_value_as_the_reference(device: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """All bf16 / fp16 values in their own order, ties of the rounding, zeros, tiny and huge rows, NaN and infinity."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = every.view(dtype) if dtype != torch.float32 else every.view(torch.bfloat16).float() * 1.0009765625
    every = every[every.isfinite()].sort().values
    rows = every[: every.numel() // 256 * 256].view(-1, 2, 128)
    steps = torch.arange(-254, 258).div(2).view(-1, 2, 128)  # halves: the scale of each row is a power of 2 or close
    limits = torch.tensor([127.0, 448.0, 1.0, 0.5, 127.49, 3e38, 1e-20, 0.0])[:, None, None].expand(-1, 2, 128)
    special = torch.randn(6, 2, 128)
    special[0, 0, 3], special[1, 0, 5], special[2, 1, 0] = torch.nan, torch.inf, -torch.inf
    special[3] = 0
    special[4, :, 1:] = 0
    if cache_dtype == torch.int8:
        special = special[3:]  # int8 has no NaN
    key = torch.cat([rows, *(x.to(dtype) for x in (steps, limits * torch.rand(8, 2, 128), special))])
    tokens = key.shape[0]
    k, v, k_scale, v_scale = Inputs(device).cache(-(-tokens // 128), 128, 2, 128, cache_dtype)
    key, slots = key.to(device), torch.arange(tokens, device=device)
    args = (key, key.flip(-1).contiguous(), k, v, slots, k_scale, v_scale)
    want = cpu(args)
    REFERENCES["reshape_and_cache"](*want)
    ops.reshape_and_cache(*args)
    for got, expected in zip(args[2:4], want[2:4]):
        both_nan = got.cpu().float().isnan() & expected.float().isnan()
        assert torch.equal(bits(got)[~bits(both_nan).bool()], bits(expected)[~bits(both_nan).bool()])
    torch.testing.assert_close(args[5].cpu(), want[5], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(args[6].cpu(), want[6], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
def test_quantisation_error_is_half_a_step(device: str, cache_dtype: torch.dtype) -> None:
    new = Inputs(device)
    k, v, k_scale, v_scale = new.cache(4, 16, 2, 64, cache_dtype)
    key, value = new.normal(64, 2, 64), new.normal(64, 2, 64, scale=100)
    ops.reshape_and_cache(key, value, k, v, torch.arange(64, device=device), k_scale, v_scale)
    for x, cache, scale in ((key, k, k_scale), (value, v, v_scale)):
        assert scale is not None
        scale = scale.view(64, 2, 1)
        error = (cache.float().view(64, 2, 64) * scale - x).abs()
        step = scale if cache_dtype == torch.int8 else torch.maximum(x.abs() / 8, scale * 2**-9)
        assert bool((error <= step * 0.5001).all())


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize(("heads", "d"), [(2, 64), (8, 128), (7, 48)])
def test_many_tokens_on_all_threads(device: str, heads: int, d: int, cache_dtype: torch.dtype) -> None:
    new = Inputs(device)
    k, v, k_scale, v_scale = new.cache(64, 128, heads, d, cache_dtype)
    key, value = (new.normal(8000, heads, d, dtype=torch.bfloat16) for _ in range(2))
    check_write((key, value, k, v, new.permutation(64 * 128, 8000), k_scale, v_scale))


def arguments(device: str) -> dict[str, Any]:
    """A good call of reshape_and_cache."""
    new = Inputs(device)
    k, v, _, _ = new.cache(2, 8, 2, 16, torch.float32)
    slots = new.vector([3, 9, 15], torch.int64)
    named = {"key": new.normal(3, 2, 16), "value": new.normal(3, 2, 16), "key_cache": k, "value_cache": v}
    return named | {"slot_mapping": slots}


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("key", lambda x: x[:, :1], r"key: got shape \[3, 1, 16\], needs \[T, Hkv, D\]"),
        ("key", lambda x: x.double(), "key: got float64, needs float32, float16 or bfloat16"),
        ("value", lambda x: x.half(), "value: got float16, needs key's dtype, float32"),
        ("value", lambda x: x[:2], r"value: got shape \[2, 2, 16\], needs key's shape"),
        ("key", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "key: got stride 2 in the last dimension"),
        ("key_cache", lambda x: x.to(torch.bfloat16), "value_cache: got float32, needs key_cache's dtype"),
        ("key_cache", lambda x: torch.cat([x, x])[2:], "key_cache: got a view at storage offset 512"),
        ("key_cache", lambda x: x[:, :6], "value_cache: got shape"),
        ("slot_mapping", lambda x: x.int(), "slot_mapping: got int32, needs int64"),
        ("slot_mapping", lambda x: x[:2], r"slot_mapping: got shape \[2\]"),
        ("slot_mapping", lambda x: torch.stack([x, x], 1)[:, 0], "slot_mapping: got stride 2"),
    ],
)
def test_write_refuses(device: str, argument: str, change: Any, message: str) -> None:
    named = arguments(device)
    named[argument] = change(named[argument])
    with pytest.raises(RuntimeError, match=f"reshape_and_cache: {message}"):
        ops.reshape_and_cache(**named)


def test_write_refuses_a_slot_outside_before_writing() -> None:
    named = arguments("cpu")
    before = named["key_cache"].clone()
    named["slot_mapping"][2] = 16
    with pytest.raises(RuntimeError, match=r"slot_mapping: got slot 16 for token 2, needs slot < .* = 16"):
        ops.reshape_and_cache(**named)
    assert torch.equal(named["key_cache"], before)


def test_scales_belong_to_quantised_caches(device: str) -> None:
    named = arguments(device)
    scale = torch.zeros(2, 8, 2, device=device)
    with pytest.raises(RuntimeError, match="k_scale: got a tensor, needs None"):
        ops.reshape_and_cache(**named, k_scale=scale, v_scale=scale)
    named |= {key: named[key].to(torch.int8) for key in ("key_cache", "value_cache")}
    with pytest.raises(RuntimeError, match="v_scale: got None, needs float32"):
        ops.reshape_and_cache(**named, k_scale=scale)


# ---- copy_blocks, swap_blocks ----------------------------------------------------------------------------------------


def pools(new: Inputs) -> list[Tensor]:
    """Tensors of several dtypes and block sizes, 7 blocks each."""
    scales = new.normal(7, 8, 2)
    fp8 = new.normal(7, 8, 2, 16).to(torch.float8_e4m3fn)
    odd = new.normal(7, 3).to(torch.int8)
    return [new.normal(7, 8, 2, 16), new.normal(7, 8, 2, 16, dtype=torch.bfloat16), fp8, scales, odd, new.normal(7)]


@relaxed
@given(order=st.permutations(range(7)), pairs=st.integers(0, 3), itself=st.booleans())
def test_copy_blocks(device: str, order: list[int], pairs: int, itself: bool) -> None:
    """One source may serve several destinations; a block may be copied onto itself."""
    caches = pools(Inputs(device))
    mapping = [[order[6 - i // 2], order[i]] for i in range(pairs)] + [[order[3], order[3]]] * itself
    want = cpu(caches)
    REFERENCES["copy_blocks"](want, torch.tensor(mapping, dtype=torch.int64).view(-1, 2))
    ops.copy_blocks(caches, torch.tensor(mapping, dtype=torch.int64, device=device).view(-1, 2))
    assert all(map(same_bits, caches, want))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([[0, 7]], "destination block 7, needs 0 <= block < 7"),
        ([[-1, 2]], "source block -1"),
        ([[0, 2], [1, 2]], "destination block 2 twice"),
        ([[0, 2], [2, 3]], "block 2 as a destination and as another's source"),
    ],
)
def test_copy_blocks_refuses(mapping: list[list[int]], message: str) -> None:
    caches = pools(Inputs("cpu"))
    before = cpu(caches)
    with pytest.raises(RuntimeError, match=f"copy_blocks: block_mapping: got {message}"):
        ops.copy_blocks(caches, torch.tensor([[5, 6], *mapping]))
    assert all(map(same_bits, caches, before))


def test_copy_blocks_refuses_views(device: str) -> None:
    x = torch.zeros(4, 8, device=device)
    mapping = torch.tensor([[0, 1]], device=device)
    with pytest.raises(RuntimeError, match="caches: got a strided view"):
        ops.copy_blocks([x[:, ::2]], mapping)
    with pytest.raises(RuntimeError, match="caches: got a view at storage offset"):
        ops.copy_blocks([x[1:]], mapping)
    with pytest.raises(RuntimeError, match=r"block_mapping: got shape \[2\]"):
        ops.copy_blocks([x], mapping[0])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("cpu", "cpu"),
        *(pytest.param(a, b, marks=pytest.mark.gpu) for a, b in [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_swap_blocks(source: str, target: str, dtype: torch.dtype) -> None:
    src, dst = Inputs(source, 0).normal(5, 8, 2, 16).to(dtype), Inputs(target, 1).normal(9, 8, 2, 16).to(dtype)
    if "cuda" in (source, target):
        src, dst = (x.pin_memory() if x.device.type == "cpu" else x for x in (src, dst))
    mapping = torch.tensor([[4, 0], [0, 8], [1, 3], [4, 2]])
    want, before = cpu(dst), cpu(src)
    REFERENCES["swap_blocks"](before, want, mapping)
    ops.swap_blocks(src, dst, mapping)
    if "cuda" in (source, target):
        torch.cuda.synchronize()  # a copy to pinned memory is asynchronous
    assert same_bits(dst, want)
    assert same_bits(src, before)


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [199, 201, 2500])
def test_swaps_both_ways_at_once(pairs: int) -> None:
    """As many pairs as one launch takes, and more; out of the GPU and into it on two streams, from a graph too."""
    new = Inputs("cpu")
    host = [new.normal(2 * pairs, 8, 2, 16).pin_memory() for _ in range(2)]
    device = [new.normal(2 * pairs, 8, 2, 16).cuda() for _ in range(2)]
    mappings = [torch.stack([new.permutation(2 * pairs, pairs) for _ in range(2)], 1) for _ in range(2)]
    want_out, want_back = cpu(host[0]), cpu(device[1])
    REFERENCES["swap_blocks"](cpu(device[0]), want_out, mappings[0])
    REFERENCES["swap_blocks"](cpu(host[1]), want_back, mappings[1])
    start, side = cpu(host[0]), torch.cuda.Stream()
    start_back = device[1].clone()

    def swap() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ops.swap_blocks(device[0], host[0], mappings[0])
        ops.swap_blocks(host[1], device[1], mappings[1])
        torch.cuda.current_stream().wait_stream(side)

    swap()
    torch.cuda.synchronize()
    assert same_bits(host[0], want_out) and same_bits(device[1], want_back)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        swap()
    for _ in range(3):
        host[0].copy_(start)
        device[1].copy_(start_back)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(host[0], want_out) and same_bits(device[1], want_back)


def test_swap_blocks_refuses(device: str) -> None:
    src, dst = torch.zeros(3, 4, device=device), torch.zeros(5, 4, device=device)
    for mapping, message in [
        (torch.tensor([[3, 0]]), "block_mapping: got source block 3, needs 0 <= block < 3"),
        (torch.tensor([[0, -1]]), "block_mapping: got destination block -1"),
        (torch.tensor([[0, 1]], dtype=torch.int32), "block_mapping: got int32"),
        (torch.tensor([0, 1]), "block_mapping: got shape"),
    ]:
        with pytest.raises(RuntimeError, match=f"swap_blocks: {message}"):
            ops.swap_blocks(src, dst, mapping)
    for other, message in [
        (dst.half(), "dst: got float16, needs src's dtype"),
        (torch.zeros(5, 3, device=device), "dst: got shape"),
        (dst.t().contiguous().t(), "dst: got a strided view"),
    ]:
        with pytest.raises(RuntimeError, match=f"swap_blocks: {message}"):
            ops.swap_blocks(src, other, torch.tensor([[0, 1]]))


# ---- gather_cache ----------------------------------------------------------------------------------------------------


@relaxed
@given(
    lens=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    gap=st.integers(0, 5),
    block_size=st.sampled_from([8, 16]),
    heads=st.integers(1, 3),
    d=st.sampled_from([8, 40, 64]),
    dtypes=st.sampled_from([(a, b) for a in (*FLOATS, *QUANTIZED) for b in FLOATS]),
    layout=st.sampled_from(["nhd", "hnd", "padded"]),
    seed=st.integers(0, 99),
)
def test_gather(
    device: str,
    lens: list[int],
    gap: int,
    block_size: int,
    heads: int,
    d: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: str,
    seed: int,
) -> None:
    """Against the reference, with sequences out of order, gaps, NaN past each length and wild ids past each table."""
    new = Inputs(device, seed)
    needed = [-(-n // block_size) for n in lens]
    blocks = new.permutation(sum(needed) + 1, sum(needed)).tolist()
    k, v, k_scale, v_scale = strided_cache(new, layout, (sum(needed) + 1, block_size, heads, d), dtypes[0])
    tables = torch.full((len(lens), max(needed, default=0) + 2), POISON, dtype=torch.int32)
    for s, count in enumerate(needed):
        tables[s, :count] = torch.tensor(blocks[:count])
        if lens[s] % block_size:
            for x in (k, v) if k_scale is None else (k_scale, v_scale):
                x[blocks[count - 1], lens[s] % block_size :] = torch.nan
        del blocks[:count]
    order = new.permutation(len(lens), len(lens)).tolist()
    starts, total = [0] * len(lens), gap
    for s in order:
        starts[s], total = total, total + lens[s] + gap
    args = (
        *(k, v, tables.to(device)),
        *(new.vector(x, torch.int32) for x in (lens, starts)),
        total,
    )
    got = ops.gather_cache(*args, dtype=dtypes[1], k_scale=k_scale, v_scale=v_scale)
    want = REFERENCES["gather_cache"](*cpu(args), dtypes[1], cpu(k_scale), cpu(v_scale))
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
def test_gather_decodes_every_byte(device: str, cache_dtype: torch.dtype) -> None:
    cache = torch.arange(256, dtype=torch.uint8).view(cache_dtype).view(1, 8, 2, 16).to(device)
    scale = torch.linspace(0.25, 4, 16).view(1, 8, 2).to(device)
    table, lens, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0]], [8], [0]))
    args = (cache, cache, table, lens, starts, 8)
    for dtype in FLOATS:
        got, _ = ops.gather_cache(*args, dtype=dtype, k_scale=scale, v_scale=scale)
        want, _ = REFERENCES["gather_cache"](*cpu(args), dtype, cpu(scale), cpu(scale))
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_gather_returns_what_was_written(device: str) -> None:
    new = Inputs(device)
    k, v, _, _ = new.cache(8, 16, 2, 64, torch.bfloat16)
    key, value = new.normal(100, 2, 64, dtype=torch.bfloat16), new.normal(100, 2, 64, dtype=torch.bfloat16)
    table = new.permutation(8, 7).int()
    position = torch.arange(100, device=device)
    ops.reshape_and_cache(key, value, k, v, table.long()[position // 16] * 16 + position % 16)
    got = ops.gather_cache(k, v, table[None], *(new.vector([n], torch.int32) for n in (100, 0)), 100)
    assert same_bits(got[0], key)
    assert same_bits(got[1], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": [-1, 3]}, r"seq_lens: got -1 for sequence 0, needs 0 <= length <= .* = 16"),
        ({"seq_lens": [9, 17]}, "seq_lens: got 17 for sequence 1"),
        ({"out_start": [0, 12]}, r"out_start: got 12 for sequence 1 of 5 tokens, needs .* total_tokens = 16"),
        ({"out_start": [-1, 10]}, "out_start: got -1 for sequence 0"),
        ({"out_start": [0, 8]}, "out_start: got sequences 0 and 1 in the same output rows"),
        ({"block_tables": [[0, 3], [2, 0]]}, "block_tables: got block 3 in sequence 0, needs 0 <= block < .* = 3"),
        ({"block_tables": [[0, 1], [-1, 0]]}, "block_tables: got block -1 in sequence 1"),
    ],
)
def test_gather_refuses_values(change: dict[str, Any], message: str) -> None:
    new = Inputs("cpu")
    k, v, _, _ = new.cache(3, 8, 2, 16, torch.float32)
    values: dict[str, Any] = {"block_tables": [[0, 1], [2, 0]], "seq_lens": [9, 5], "out_start": [0, 10]} | change
    with pytest.raises(RuntimeError, match=f"gather_cache: {message}"):
        ops.gather_cache(k, v, **{key: new.vector(x, torch.int32) for key, x in values.items()}, total_tokens=16)


def test_gather_refuses_arguments(device: str) -> None:
    new = Inputs(device)
    k, v, k_scale, v_scale = new.cache(3, 8, 2, 16, torch.int8)
    args = (k, v, new.vector([[0]], torch.int32), new.vector([4], torch.int32), new.vector([0], torch.int32))
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    with pytest.raises(RuntimeError, match="gather_cache: dtype: got int8, needs float32, float16 or bfloat16"):
        ops.gather_cache(*args, 4, **scales)
    with pytest.raises(RuntimeError, match="k_scale: got None"):
        ops.gather_cache(*args, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="total_tokens: got -1"):
        ops.gather_cache(*args, -1, dtype=torch.float32, **scales)
    with pytest.raises(RuntimeError, match="block_tables: got int64"):
        ops.gather_cache(k, v, args[2].long(), *args[3:], 4, dtype=torch.float32, **scales)


def test_reference_quantises_to_the_nearest_step() -> None:
    """The reference itself, against the definition in float64."""
    x = torch.randn(50, 64)
    for dtype, top in ((torch.int8, 127), (torch.float8_e4m3fn, 448)):
        stored, scale = quantize_rows(x, dtype)
        torch.testing.assert_close(scale.double(), x.abs().amax(-1).double() / top, rtol=1e-7, atol=0)
        every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
        every = every[every.isfinite() & (every != -128)]
        y = x.double() / scale.double()[:, None]
        best = (y[..., None] - every).abs().amin(-1)
        assert bool(((y - stored.double()).abs() <= best + 1e-4).all())
