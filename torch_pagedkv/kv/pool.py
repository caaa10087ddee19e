"""The tensors of the paged KV cache: keys, values and scales of every layer, on the device and in pinned host memory.

`KVPool` knows sizes and memory; which block belongs to whom is `torch_pagedkv.kv.blocks`'s business. Block `b` means
the same tokens in every layer, so one block id costs `bytes_per_block` over all layers.

Memory is not initialised. Every reader masks positions that were never written (0 * NaN would be NaN, so masking means
not reading, not multiplying by zero). On the CPU this makes pages appear only when they are written: `torch.empty` of
1 GiB takes 0.1 ms and no memory, `torch.zeros` 350 ms and the whole GiB at once. A large `num_blocks` is therefore
cheap there until it is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo import mark_static_address, maybe_mark_dynamic

from ..ops.cache import copy_blocks, swap_blocks

BLOCK_SIZES = (8, 16, 32, 64, 128)
MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: names of the quantised caches -> what is stored (beside float32 scales, one a token and head)
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)  # of the CUDA kernels: bfloat16 and cp.async; fp8 conversions are emulated below 8.9
_START_TOKENS = 1024  # size of a pool that may grow
_CUDA_GRANULE = 2 << 20  # the caching allocator rounds large tensors up to this many bytes
_CUDA_RESERVE = 64 << 20  # what the driver counts as free is not allocatable to the last byte
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class PoolMemoryError(MemoryError):
    """The KV cache does not fit into memory; nothing stays allocated and an existing pool is unchanged."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Shape of one layer's cache.

    Attributes:
        num_kv_heads: heads of K and V, >= 1 (the local ones under tensor parallelism).
        head_dim: elements a head, a multiple of 8, at most 256.
        value_dim: elements of a value, if fewer than of a key: the rest is stored as zeros.
    """

    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads must be >= 1, got {self.num_kv_heads}")
        if not 0 < self.head_dim <= _MAX_HEAD_DIM or self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8 from 8 to {_MAX_HEAD_DIM}, got {self.head_dim}")
        if self.value_dim is not None and not 0 < self.value_dim < self.head_dim:
            raise ValueError(f"value_dim must be None or below head_dim ({self.head_dim}), got {self.value_dim}")


def _storage_dtype(dtype: torch.dtype, cache_dtype: str | None) -> torch.dtype:
    """What a cache for a model of `dtype` stores."""
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, MODEL_DTYPES))}, got {dtype}")
    if cache_dtype is None:
        return dtype
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype must be None (the model's) or one of {list(CACHE_DTYPES)}, got {cache_dtype!r}")
    return CACHE_DTYPES[cache_dtype]


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES} (a power of two), got {block_size}")


def _check_device(device: torch.device, capability: tuple[int, int] | None, storage: torch.dtype) -> None:
    """Refuses a device without kernels for a cache of dtype `storage`; `capability` is that of a CUDA device."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"a {storage} KV cache needs a cpu or cuda device, got {str(device)!r}")
    if capability is not None and capability < _MIN_CAPABILITY:
        have, need = ("{}.{}".format(*version) for version in (capability, _MIN_CAPABILITY))
        raise ValueError(f"{device} (compute capability {have}) lacks a {storage} KV cache: it needs {need} or newer")


def bytes_per_block(
    specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype, cache_dtype: str | None = None
) -> int:
    """Bytes of one block id over all layers: K, V and, for a quantised cache, their scales.

    Args:
        specs: one entry a layer.
        block_size: tokens a block.
        dtype: the model's dtype.
        cache_dtype: None, "int8" or "fp8".

    Raises:
        ValueError: an argument is out of range.
    """
    _check_block_size(block_size)
    storage = _storage_dtype(dtype, cache_dtype)
    scale = 0 if cache_dtype is None else torch.float32.itemsize
    return 2 * block_size * sum(spec.num_kv_heads * (spec.head_dim * storage.itemsize + scale) for spec in specs)


def blocks_in_memory(free_bytes: int, fraction: float, block_bytes: int, num_tensors: int) -> int:
    """Blocks in `fraction` of `free_bytes`, leaving room for the CUDA allocator to round up each of `num_tensors`."""
    usable = min(int(free_bytes * fraction), free_bytes - _CUDA_RESERVE)
    return max(0, usable - num_tensors * _CUDA_GRANULE) // block_bytes


class KVPool:
    """Keys and values of all layers in blocks.

    The size is given by `num_blocks`, or by `memory_fraction` on CUDA; without either the pool starts at 1024 tokens
    and `grow` doubles it when asked. With a given size it is fixed, unless `max_blocks` is larger.

    Args:
        specs: one entry a layer; they may differ.
        block_size: tokens a block: 8, 16, 32, 64 or 128.
        dtype: the model's: float32, float16 or bfloat16.
        device: cpu or cuda.
        cache_dtype: None stores `dtype`; "int8" or "fp8" (e4m3) store a quantised cache with scales.
        num_blocks: size in blocks, >= 1.
        memory_fraction: size as a share in (0, 1] of the CUDA memory that is free now.
        max_blocks: limit of `grow`.
        num_host_blocks: size of the host tier; its (pinned) memory is allocated by the first `swap_out`.

    Attributes:
        key_caches, value_caches: a tensor for each layer, [num_blocks, block_size, num_kv_heads, head_dim] of
            `storage_dtype`. Each is whole (storage offset 0, contiguous), and `grow` replaces it.
        key_scales, value_scales: float32 [num_blocks, block_size, num_kv_heads] for each layer; empty lists if not
            quantised. Stored value * scale = value.
        num_blocks: blocks of the device tier.
        max_blocks: the most that `grow` gives; None: no limit but memory.

    Raises:
        ValueError: an argument is out of range, or the device has no kernels for such a cache.
        PoolMemoryError: it does not fit.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        cache_dtype: str | None = None,
        num_blocks: int | None = None,
        memory_fraction: float | None = None,
        max_blocks: int | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        if not specs:
            raise ValueError("a KV pool needs at least one layer")
        self.specs = tuple(specs)
        self.block_size = block_size
        self.dtype = dtype
        self.storage_dtype = _storage_dtype(dtype, cache_dtype)
        self.is_quantized = cache_dtype is not None
        self._bytes_per_block = bytes_per_block(specs, block_size, dtype, cache_dtype)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        is_cuda = self.device.type == "cuda"
        _check_device(
            self.device, torch.cuda.get_device_capability(self.device) if is_cuda else None, self.storage_dtype
        )
        if num_host_blocks < 0:
            raise ValueError(f"num_host_blocks must be >= 0, got {num_host_blocks}")
        self.num_host_blocks = num_host_blocks
        self._host: list[Tensor] = []
        self._option = "num_blocks"  # what to lower when it does not fit

        fixed = num_blocks is not None or memory_fraction is not None
        if num_blocks is not None and memory_fraction is not None:
            raise ValueError("give num_blocks or memory_fraction, not both")
        if memory_fraction is not None:
            self._option = "memory_fraction"
            num_blocks = self._blocks_of_fraction(memory_fraction)
        elif num_blocks is None:
            self._option = "max_blocks"
            start = max(1, _START_TOKENS // block_size)
            num_blocks = start if max_blocks is None else min(start, max_blocks)
        if num_blocks < 1:
            name = "num_blocks" if fixed else "max_blocks"
            raise ValueError(f"{name} must be >= 1, got {num_blocks}")
        if max_blocks is not None and max_blocks < num_blocks:
            raise ValueError(f"max_blocks ({max_blocks}) must be >= num_blocks ({num_blocks})")
        self.max_blocks = num_blocks if fixed and max_blocks is None else max_blocks

        tensors = self._for_compiler(self._allocate(num_blocks, self.device, self._option))
        layers = len(self.specs)
        self.key_caches, self.value_caches = tensors[:layers], tensors[layers : 2 * layers]
        self.key_scales, self.value_scales = tensors[2 * layers : 3 * layers], tensors[3 * layers :]
        self.num_blocks = num_blocks
        self.moves = 0  # how often `grow` replaced the tensors

    # ---- size --------------------------------------------------------------------------------------------------------

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, scales included."""
        return self._bytes_per_block

    @property
    def nbytes(self) -> int:
        """Bytes of the device tier. On the CPU only pages that were written take memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host tier; 0 before the first `swap_out`."""
        return sum(tensor.nbytes for tensor in self._host)

    @property
    def tensors(self) -> list[Tensor]:
        """All device tensors: keys, values, key scales, value scales."""
        return self.key_caches + self.value_caches + self.key_scales + self.value_scales

    def can_grow(self, min_blocks: int) -> bool:
        """Whether `max_blocks` allows `min_blocks` blocks."""
        return self.max_blocks is None or min_blocks <= self.max_blocks

    def grow(self, min_blocks: int) -> int:
        """Makes room for at least `min_blocks` blocks: doubles, as far as `max_blocks` and memory allow.

        Contents are kept and the tensors are replaced: drop other references to the old ones. Layers move one by one,
        so that the peak is about the new size and one layer of the old. Growing block by block costs O(1) copies a
        block.

        Returns:
            The new `num_blocks` (the old one if it is enough), for `BlockManager.grow`.

        Raises:
            PoolMemoryError: `min_blocks` is over `max_blocks` or does not fit into memory; the pool is unchanged.
        """
        if min_blocks <= self.num_blocks:
            return self.num_blocks
        if not self.can_grow(min_blocks):
            raise PoolMemoryError(
                f"the KV cache needs {min_blocks} blocks, more than its limit of {self.max_blocks}: "
                "raise num_blocks, max_blocks or memory_fraction"
            )
        target = max(min_blocks, 2 * self.num_blocks)
        if self.max_blocks is not None:
            target = min(target, self.max_blocks)
        try:
            new = self._allocate(target, self.device, "max_blocks")
        except PoolMemoryError:
            if target == min_blocks:
                raise
            target = min_blocks
            new = self._allocate(target, self.device, "max_blocks")
        self._for_compiler(new)
        # Interrupted in here, some tensors are longer than num_blocks, which is harmless: it is set last.
        replacements = iter(new)
        for tensors in (self.key_caches, self.value_caches, self.key_scales, self.value_scales):
            for i, replacement in zip(range(len(tensors)), replacements):
                replacement[: self.num_blocks].copy_(tensors[i][: self.num_blocks])
                tensors[i] = replacement
        self.num_blocks, self.moves = target, self.moves + 1
        return target

    # ---- moving blocks -----------------------------------------------------------------------------------------------

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) in every layer, scales included; enqueued on the current stream.

        Args:
            pairs: as returned by `BlockManager.append_many`; no destination may be listed twice or be a source.
        """
        if not pairs:
            return
        mapping = torch.tensor(pairs, dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda")
        copy_blocks(self.tensors, mapping.to(self.device, non_blocking=True))

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (device, host) to the host tier, which the first call allocates; in stream order.

        Raises:
            ValueError: `num_host_blocks` is 0.
            PoolMemoryError: the host tier does not fit into memory.
        """
        if not pairs:
            return
        if not self.num_host_blocks:
            raise ValueError("swapping needs num_host_blocks >= 1")
        if not self._host:
            self._host = self._allocate(self.num_host_blocks, torch.device("cpu"), "num_host_blocks")
        mapping = torch.tensor(pairs, dtype=torch.int64, device="cpu")
        for source, target in zip(self.tensors, self._host):
            swap_blocks(source, target, mapping)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (host, device) back; in order of the current stream.

        Raises:
            ValueError: nothing was swapped out yet.
        """
        if not pairs:
            return
        if not self._host:
            raise ValueError("swap_in before any swap_out")
        mapping = torch.tensor(pairs, dtype=torch.int64, device="cpu")
        for source, target in zip(self._host, self.tensors):
            swap_blocks(source, target, mapping)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _shapes(self, num_blocks: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, in the order of `tensors`."""
        rows = [(num_blocks, self.block_size, spec.num_kv_heads) for spec in self.specs]
        caches = [((*row, spec.head_dim), self.storage_dtype) for row, spec in zip(rows, self.specs)]
        scales = [(row, torch.float32) for row in rows] if self.is_quantized else []
        return [*caches, *caches, *scales, *scales]

    def _blocks_of_fraction(self, fraction: float) -> int:
        if not 0 < fraction <= 1:
            raise ValueError(f"memory_fraction must be in (0, 1], got {fraction}")
        if self.device.type != "cuda":
            raise ValueError(
                "memory_fraction is for CUDA; on the CPU give num_blocks or max_blocks, or let the pool grow"
            )
        torch.cuda.empty_cache()  # what torch holds unused counts as free
        free, _ = torch.cuda.mem_get_info(self.device)
        num_blocks = blocks_in_memory(free, fraction, self.bytes_per_block, len(self._shapes(1)))
        if num_blocks < 1:
            raise PoolMemoryError(
                f"memory_fraction={fraction} of {_gib(free)} free on {self.device} holds no KV block of "
                f"{_gib(self.bytes_per_block)}: raise memory_fraction or lower block_size"
            )
        return num_blocks

    def _for_compiler(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tells torch.compile which tensors may be replaced by longer ones, and that CUDA graphs need not copy them."""
        for tensor in tensors:
            if self.max_blocks is None or tensor.shape[0] < self.max_blocks:
                maybe_mark_dynamic(tensor, 0)
            if self.device.type == "cuda":
                mark_static_address(tensor)
        return tensors

    def _allocate(self, num_blocks: int, device: torch.device, option: str) -> list[Tensor]:
        """Uninitialised tensors for `num_blocks`, or a `PoolMemoryError` that names `option`."""
        size = num_blocks * self.bytes_per_block
        reason = None
        if device.type == "cpu":
            # Unwritten pages are free, so the system would grant more than there is and kill the process later.
            physical = _physical_memory()
            if physical is not None and size > physical:
                reason = f"the machine has {_gib(physical)}"
        tensors: list[Tensor] = []
        if reason is None:
            pin = device.type == "cpu" and self.device.type == "cuda"
            try:
                # Not inference tensors, even if made inside inference_mode(): they are written outside of it, too.
                with torch.inference_mode(False):
                    for shape, dtype in self._shapes(num_blocks):
                        tensors.append(torch.empty(shape, dtype=dtype, device=device, pin_memory=pin))
                return tensors
            except RuntimeError as error:
                tensors.clear()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                if not any(text in str(error).lower() for text in _OUT_OF_MEMORY):
                    raise
                reason = str(error)
        where = "pinned host memory" if device != self.device else str(device)
        raise PoolMemoryError(
            f"a KV cache of {num_blocks} blocks ({_gib(size)}) does not fit on {where}: lower {option} ({reason})"
        )


def _gib(size: int) -> str:
    """A size in bytes for people."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.2f} {unit}"
    return f"{size} bytes"


def _physical_memory() -> int | None:
    """Bytes of main memory, if the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
