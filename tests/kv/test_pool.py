"""The pool's tensors: sizes, growth, moving blocks, and running out of memory without a leak."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_pagedkv.kv import pool as pool_module
from torch_pagedkv.kv.blocks import BlockManager
from torch_pagedkv.kv.pool import KVPool, LayerSpec, PoolMemoryError, blocks_in_memory, bytes_per_block

SPECS = (LayerSpec(2, 16), LayerSpec(1, 64), LayerSpec(3, 8))
STORAGE = {None: torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def make(device: str = "cpu", **options: Any) -> KVPool:
    """A small pool of three unequal layers."""
    defaults: dict[str, Any] = {"block_size": 8, "dtype": torch.bfloat16, "device": device}
    return KVPool(SPECS, **{**defaults, **options})


def fill(pool: KVPool) -> list[Tensor]:
    """Random bytes everywhere (NaNs among them); returns a copy."""
    for tensor in pool.tensors:
        tensor.view(torch.uint8).random_(0, 256)
    return [raw(tensor).clone() for tensor in pool.tensors]


def raw(tensor: Tensor) -> Tensor:
    """The bytes, so that NaNs compare equal."""
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("cache_dtype", STORAGE)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_tensors(device: str, cache_dtype: str | None, block_size: int) -> None:
    pool = make(device, block_size=block_size, cache_dtype=cache_dtype, num_blocks=5)
    assert pool.num_blocks == pool.max_blocks == 5
    for caches in (pool.key_caches, pool.value_caches):
        assert [tuple(t.shape) for t in caches] == [(5, block_size, s.num_kv_heads, s.head_dim) for s in SPECS]
        assert {t.dtype for t in caches} == {STORAGE[cache_dtype]} == {pool.storage_dtype}
    for scales in (pool.key_scales, pool.value_scales):
        shapes = [(5, block_size, s.num_kv_heads) for s in SPECS] if cache_dtype else []
        assert [tuple(t.shape) for t in scales] == shapes and all(t.dtype == torch.float32 for t in scales)
    assert all(t.storage_offset() == 0 and t.is_contiguous() and t.device == pool.device for t in pool.tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in pool.tensors)
    assert len({t.data_ptr() for t in pool.tensors}) == len(pool.tensors)
    assert pool.nbytes == sum(t.nbytes for t in pool.tensors) == 5 * pool.bytes_per_block


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "expected"),
    [
        (torch.float32, None, 2 * 16 * 8 * 128 * 4 * 32),
        (torch.bfloat16, None, 2 * 16 * 8 * 128 * 2 * 32),
        (torch.float16, "int8", 2 * 16 * 8 * (128 + 4) * 32),
        (torch.float32, "fp8", 2 * 16 * 8 * (128 + 4) * 32),
    ],
)
def test_bytes_per_block_of_an_8b_model(dtype: torch.dtype, cache_dtype: str | None, expected: int) -> None:
    assert bytes_per_block([LayerSpec(8, 128)] * 32, 16, dtype, cache_dtype) == expected


def test_a_pool_may_be_made_in_inference_mode_and_written_outside() -> None:
    with torch.inference_mode():
        pool = make()
        pool.grow(pool.num_blocks + 1)
    assert not any(t.is_inference() for t in pool.tensors)
    fill(pool)


def test_unwritten_cpu_memory_costs_nothing() -> None:
    """A pool of 4 GiB takes next to no memory before it is written."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    specs = [LayerSpec(8, 128)] * 8
    before = resident()
    pool = KVPool(specs, block_size=16, dtype=torch.float32, device="cpu", num_blocks=4096)
    assert pool.nbytes == 4 << 30
    assert resident() - before < 64 << 20


# ---- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", STORAGE)
def test_grow_keeps_contents_and_doubles(device: str, cache_dtype: str | None) -> None:
    pool = make(device, cache_dtype=cache_dtype, num_blocks=3, max_blocks=20)
    before = fill(pool)
    lists = (pool.key_caches, pool.value_caches, pool.key_scales, pool.value_scales)
    assert pool.grow(3) == 3 and pool.grow(1) == 3
    assert pool.grow(4) == 6
    for tensor, old in zip(pool.tensors, before, strict=True):
        assert len(tensor) == 6 and torch.equal(raw(tensor[:3]), old)
        assert tensor.storage_offset() == 0 and tensor.is_contiguous()
    assert all(a is b for a, b in zip(lists, (pool.key_caches, pool.value_caches, pool.key_scales, pool.value_scales)))
    assert pool.grow(13) == 13
    assert pool.grow(14) == 20
    with pytest.raises(PoolMemoryError, match="limit of 20"):
        pool.grow(21)
    assert pool.num_blocks == 20 and not pool.can_grow(21) and pool.can_grow(20)
    for tensor, old in zip(pool.tensors, before, strict=True):
        assert torch.equal(raw(tensor[:3]), old)


def test_default_size_grows_without_limit_and_a_given_one_not_at_all() -> None:
    pool = make(block_size=16)
    assert pool.num_blocks == 64 and pool.max_blocks is None and pool.can_grow(1 << 40)
    assert make(block_size=16, max_blocks=5).num_blocks == 5
    fixed = make(num_blocks=4)
    assert fixed.max_blocks == 4
    with pytest.raises(PoolMemoryError, match="limit of 4"):
        fixed.grow(5)


def test_grow_releases_the_old_tensors() -> None:
    pool = make(num_blocks=2, max_blocks=8)
    old = [weakref.ref(tensor) for tensor in pool.tensors]
    pool.grow(3)
    assert not any(ref() is not None for ref in old)


class Exhausted:
    """Stands in for `torch.empty`: fails as an allocator does once its budget is spent, and tracks what lives."""

    def __init__(self, budget: int, message: str) -> None:
        self.budget, self.message = budget, message
        self.made: list[weakref.ref[Tensor]] = []
        self.empty = torch.empty

    def __call__(self, shape: tuple[int, ...], **options: Any) -> Tensor:
        tensor = self.empty(shape, **options)
        self.budget -= tensor.nbytes
        if self.budget < 0:
            raise RuntimeError(self.message)
        self.made.append(weakref.ref(tensor))
        return tensor

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.made)


CPU_MESSAGE = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


@pytest.mark.parametrize(
    ("options", "option"), [({"num_blocks": 9}, "num_blocks"), ({}, "max_blocks"), ({"max_blocks": 9}, "max_blocks")]
)
def test_out_of_memory_names_the_option_and_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], option: str
) -> None:
    allocator = Exhausted(9 * 8 * (16 * 2 + 64) * 2, CPU_MESSAGE)
    monkeypatch.setattr(torch, "empty", allocator)
    with pytest.raises(PoolMemoryError, match=f"lower {option}") as caught:
        make(**options)
    assert 0 < len(allocator.made) < 6 or not options  # the default size fails at its first tensor
    assert "can't allocate memory" in str(caught.value)
    assert allocator.alive() == 0


def test_another_error_of_the_allocator_is_not_called_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", Exhausted(0, "CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make(num_blocks=1)


def test_growth_out_of_memory_tries_less_and_else_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(num_blocks=4, max_blocks=100)
    before, tensors = fill(pool), pool.tensors
    allocator = Exhausted(4 * pool.bytes_per_block, CPU_MESSAGE)
    monkeypatch.setattr(torch, "empty", allocator)
    with pytest.raises(PoolMemoryError, match="lower max_blocks"):
        pool.grow(6)
    assert allocator.alive() == 0 and pool.num_blocks == 4
    assert all(a is b for a, b in zip(pool.tensors, tensors, strict=True))
    assert all(torch.equal(raw(tensor), old) for tensor, old in zip(pool.tensors, before, strict=True))

    # Room for five blocks, after the first tensor of the doubled size was tried.
    allocator.budget = 5 * pool.bytes_per_block
    refused = iter([True])

    def empty(shape: tuple[int, ...], **options: Any) -> Tensor:
        if shape[0] == 8 and next(refused, False):
            raise RuntimeError(CPU_MESSAGE)
        return allocator(shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    assert pool.grow(5) == 5


def test_more_than_the_machine_has_is_refused_before_the_system_kills_the_process() -> None:
    physical = pool_module._physical_memory()
    assert physical is not None and physical > 1 << 28
    per_block = bytes_per_block(SPECS, 8, torch.bfloat16)
    with pytest.raises(PoolMemoryError, match=r"lower num_blocks \(the machine has"):
        make(num_blocks=physical // per_block + 1)


# ---- moving blocks, by the real ops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", STORAGE)
def test_copy_blocks(device: str, cache_dtype: str | None) -> None:
    pool = make(device, cache_dtype=cache_dtype, num_blocks=6)
    expected = fill(pool)
    pool.copy_blocks([])
    pool.copy_blocks([(0, 3), (0, 5), (4, 1)])
    for tensor, old in zip(pool.tensors, expected, strict=True):
        for source, target in ((0, 3), (0, 5), (4, 1)):
            old[target] = old[source]
        assert torch.equal(raw(tensor), old)


@pytest.mark.parametrize("cache_dtype", STORAGE)
def test_swap_round_trip(device: str, cache_dtype: str | None) -> None:
    pool = make(device, cache_dtype=cache_dtype, num_blocks=6, num_host_blocks=3)
    with pytest.raises(ValueError, match="before any swap_out"):
        pool.swap_in([(0, 0)])
    before = fill(pool)
    pool.swap_out([])
    assert pool.host_nbytes == 0
    pool.swap_out([(5, 0), (2, 2)])
    assert pool.host_nbytes == 3 * pool.bytes_per_block
    assert all(t.is_pinned() == (device == "cuda") and t.device.type == "cpu" for t in pool._host)
    other = fill(pool)
    pool.swap_in([(0, 1), (2, 4)])
    for tensor, first, second in zip(pool.tensors, before, other, strict=True):
        second[1], second[4] = first[5], first[2]
        assert torch.equal(raw(tensor), second)


def test_swapping_needs_a_host_tier() -> None:
    with pytest.raises(ValueError, match="num_host_blocks"):
        make(num_blocks=2).swap_out([(0, 0)])


def test_host_tier_out_of_memory_names_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(num_blocks=2, num_host_blocks=4)
    allocator = Exhausted(3 * pool.bytes_per_block, CPU_MESSAGE)
    monkeypatch.setattr(torch, "empty", allocator)
    with pytest.raises(PoolMemoryError, match="lower num_host_blocks"):
        pool.swap_out([(0, 0)])
    assert allocator.alive() == 0 and pool.host_nbytes == 0


def test_pool_and_manager_together(device: str) -> None:
    """Fork, diverge, crop, swap and grow: what a sequence wrote is what it reads."""
    pool = make(device, num_blocks=8, max_blocks=16, num_host_blocks=4)
    manager = BlockManager(pool.num_blocks, pool.block_size, pool.num_host_blocks)
    fill(pool)

    def write(seq: Any, value: float, n: int) -> None:
        pool.copy_blocks(manager.append_tokens(seq, n))
        slots = torch.tensor(manager.slot_mapping(seq, seq.num_tokens - n, seq.num_tokens), device=device)
        for cache in pool.key_caches + pool.value_caches:
            cache.flatten(0, 1)[slots] = value

    def expect(seq: Any, *runs: tuple[float, int]) -> None:
        slots = torch.tensor(manager.slot_mapping(seq, 0, seq.num_tokens), device=device)
        want = torch.tensor([value for value, n in runs for _ in range(n)], device=device)
        for cache in pool.key_caches + pool.value_caches:
            rows = cache.flatten(0, 1)[slots].flatten(1).float()
            assert torch.equal(rows, want[:, None].expand_as(rows))

    a = manager.new_sequence()
    write(a, 1.0, 12)
    b = manager.fork(a)
    write(b, 2.0, 10)
    write(a, 3.0, 3)
    manager.commit(b, [1] * 12 + [2] * 10)
    manager.truncate(b, 14)
    write(b, 4.0, 1)
    expect(a, (1.0, 12), (3.0, 3))
    expect(b, (1.0, 12), (2.0, 2), (4.0, 1))
    again = manager.new_sequence()
    assert manager.match_prefix(again, [1] * 12 + [2] * 10) == 16
    expect(again, (1.0, 12), (2.0, 4))
    pool.swap_out(manager.swap_out(a))
    manager.grow(pool.grow(9))
    write(again, 5.0, 40)
    pool.swap_in(manager.swap_in(a))
    expect(a, (1.0, 12), (3.0, 3))
    expect(b, (1.0, 12), (2.0, 2), (4.0, 1))
    expect(again, (1.0, 12), (2.0, 4), (5.0, 40))
    manager.check()
    assert pool.num_blocks == manager.num_blocks == 16


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"block_size": size}, "block_size") for size in (0, 4, 24, 256, -16)),
        ({"dtype": torch.float64}, "dtype"),
        ({"dtype": torch.int8}, "dtype"),
        ({"cache_dtype": "int4"}, "cache_dtype"),
        ({"device": "meta"}, "cpu or cuda"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"max_blocks": 0}, "max_blocks"),
        ({"num_blocks": 4, "max_blocks": 3}, "max_blocks"),
        ({"memory_fraction": 0.0}, "memory_fraction"),
        ({"memory_fraction": -0.5}, "memory_fraction"),
        ({"memory_fraction": 1.01}, "memory_fraction"),
        ({"memory_fraction": float("nan")}, "memory_fraction"),
        ({"memory_fraction": 0.5}, "CUDA"),
        ({"memory_fraction": 0.5, "num_blocks": 4}, "not both"),
        ({"num_host_blocks": -1}, "num_host_blocks"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(("heads", "head_dim"), [(0, 64), (-1, 64), (1, 0), (1, 12), (1, 264), (1, -8)])
def test_wrong_layer(heads: int, head_dim: int) -> None:
    with pytest.raises(ValueError, match="num_kv_heads" if heads < 1 else "head_dim"):
        LayerSpec(heads, head_dim)


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="layer"):
        KVPool([], block_size=8, dtype=torch.float32, device="cpu")


def test_an_old_gpu_is_refused_by_name() -> None:
    check, device = pool_module._check_device, torch.device("cuda", 1)
    check(device, (8, 0), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"cuda:1 \(compute capability 7\.5\) lacks a torch.bfloat16 KV cache.*8\.0"):
        check(device, (7, 5), torch.bfloat16)


def test_blocks_in_memory() -> None:
    granule = 2 << 20
    assert blocks_in_memory(100 * granule, 0.5, granule, 10) == 40
    assert blocks_in_memory(100 * granule, 1.0, granule + 1, 10) == 57  # 32 granules are the driver's
    assert blocks_in_memory(granule, 1.0, 1, 10) == blocks_in_memory(33 * granule, 1.0, 1, 1) == 0


# ---- CUDA only -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reserved() -> Iterator[int]:
    """Bytes that torch holds before the test."""
    gc.collect()
    torch.cuda.empty_cache()
    yield torch.cuda.memory_reserved()


@pytest.mark.gpu
def test_memory_fraction(reserved: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    pool = make("cuda", memory_fraction=0.1)
    assert 0.09 * free < pool.nbytes <= torch.cuda.memory_reserved() - reserved <= 0.1 * free
    del pool
    gc.collect()
    full = make("cuda", memory_fraction=1.0)  # must fit
    assert full.nbytes > 0.95 * free
    assert full.max_blocks == full.num_blocks


@pytest.mark.gpu
def test_cuda_out_of_memory_leaks_nothing(reserved: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    per_block = bytes_per_block(SPECS, 8, torch.bfloat16)
    with pytest.raises(PoolMemoryError, match="lower num_blocks"):
        make("cuda", num_blocks=int(1.2 * free) // per_block)
    assert torch.cuda.memory_reserved() <= reserved
    pool = make("cuda", num_blocks=int(0.4 * free) // per_block, max_blocks=1 << 40)
    held = torch.cuda.memory_reserved()
    with pytest.raises(PoolMemoryError, match="lower max_blocks"):
        pool.grow(2 * pool.num_blocks)
    assert torch.cuda.memory_reserved() <= held


@pytest.mark.gpu
def test_block_copies_do_not_wait_for_the_device() -> None:
    pool = make("cuda", num_blocks=4)
    with torch.cuda.device(pool.device):
        torch.cuda.set_sync_debug_mode("error")
        try:
            pool.copy_blocks([(0, 1)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
