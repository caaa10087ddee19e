"""`CacheManager`: the pool and the block allocator of one patched model, kept between calls.

It is what `model.paged_cache` is. The tensors are made at first use, grown when more blocks are needed and replaced
when the model moves to another device or dtype.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import PagedConfig
from .blocks import BlockManager, OutOfBlocks, SequenceBlocks
from .pool import KVPool, LayerSpec, bytes_per_block
from .shared import Group, find_groups
from .step import DecodeSteps, PagedStep

#: Where decoding is faster for attending to shared prefixes once, by measurement: device -> tokens that a group of rows
#: shares at least, and bytes of one layer's keys and values that a step reads fewer. (An H200 has most of what plain
#: attention reads again in its L2 cache; a CPU has it in its own.)
_WORTH_SHARING = {"cuda": (256, 256 << 20), "cpu": (256, 3 << 19)}


class _Held:
    """The sequences and the decode step of one cache, and the pool that they are of."""

    def __init__(self, seqs: list[SequenceBlocks], steps: list[PagedStep], epoch: int) -> None:
        self.seqs, self.steps, self.epoch = seqs, steps, epoch


class CacheFullError(RuntimeError):
    """The KV cache cannot hold what was asked for. Nothing was taken; the model stays usable."""


@dataclass(frozen=True)
class PagingRules:
    """When a model's layers cannot attend in the paged cache and get dense keys, values and a mask instead.

    Attributes:
        dense_layers: layers whose visible keys are known from the mask alone (chunked attention, for example).
        gaps_dense: distances count in columns of the padded batch (sliding window, ALiBi of MPT), so a row with a gap
            between its tokens cannot be stored without it.
        dense_after: sequences longer than this are attended densely; None: never.
        real_masks: the model builds and touches its mask even if nothing reads it.
        pads_shift_positions: a token's position counts the pads in front of it: such rows are not shared as prefixes.
        own_positions: without `position_ids` the model counts otherwise than 0, 1, 2 ... (RoBERTa from its padding id):
            what a forward pass without them computes is not shared.
    """

    dense_layers: frozenset[int] = frozenset()
    gaps_dense: bool = False
    dense_after: int | None = None
    real_masks: bool = False
    pads_shift_positions: bool = False
    own_positions: bool = False


class CacheManager:
    """Pool and allocator of one model. Its methods lock; the lock may be held around several calls.

    Args:
        config: sizes and dtype of the cache.
        specs: shape of each layer's keys and values.
        dtype, device: of the model's keys and values now.
        rules: where the paged cache cannot be attended in.
    """

    def __init__(
        self,
        config: PagedConfig,
        specs: Sequence[LayerSpec],
        dtype: torch.dtype,
        device: torch.device,
        rules: PagingRules | None = None,
    ) -> None:
        self.config = config
        self.specs = tuple(specs)
        self.rules = rules or PagingRules()
        self.dtype = dtype
        self.device = device
        self.lock = threading.RLock()  # of allocator and pool; no other lock is waited for under it
        self.turn = threading.RLock()  # one generate() at a time, however long
        self.epoch = 0  # of the pool: caches made before it was replaced are of no use
        self._pool: KVPool | None = None
        self._blocks: BlockManager | None = None
        self.decode_steps = DecodeSteps()
        self.shared_steps = 0  # decode steps that attended to a shared prefix once
        # Filled by finalizers, which run at any point of any thread, the middle of an allocation included: what they
        # leave here is freed by the next call that holds the lock.
        self._dropped: collections.deque[_Held] = collections.deque()
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()  # of caches alive

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheManager:
        """A copied model starts with an empty cache of its own."""
        return CacheManager(self.config, self.specs, self.dtype, self.device, self.rules)

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheManager, (self.config, self.specs, self.dtype, self.device, self.rules)

    def __repr__(self) -> str:
        if self._blocks is None:
            return f"CacheManager({len(self.specs)} layers, not allocated yet)"
        s = self._blocks.stats()
        return f"CacheManager({s.num_blocks} blocks of {self.block_size}: {s.used} used, {s.cached} cached)"

    # ---- the parts ---------------------------------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.config.block_size

    @property
    def pool(self) -> KVPool:
        """The tensors, made at first use.

        Raises:
            PoolMemoryError: they do not fit.
        """
        if self._pool is None:
            self._make()
        assert self._pool is not None
        return self._pool

    @property
    def blocks(self) -> BlockManager:
        """The allocator, made with the pool; hold `lock` while using it."""
        if self._blocks is None:
            self._make()
        assert self._blocks is not None
        return self._blocks

    def _make(self) -> None:
        config = self.config
        by_memory = config.num_blocks is None and self.device.type == "cuda"
        with self.lock:
            if self._pool is not None:  # another thread was first
                return
            pool = KVPool(
                self.specs,
                block_size=config.block_size,
                dtype=self.dtype,
                device=self.device,
                cache_dtype=config.kv_cache_dtype,
                num_blocks=config.num_blocks,
                memory_fraction=config.memory_fraction if by_memory else None,
                max_blocks=config.max_blocks,
            )
            self._pool, self._blocks = pool, BlockManager(pool.num_blocks, config.block_size)

    def follow(self, dtype: torch.dtype, device: torch.device) -> None:
        """Replaces the pool if the model moved.

        Raises:
            RuntimeError: a live cache holds keys and values on the old device or in the old dtype.
        """
        if dtype == self.dtype and device == self.device:
            return
        with self.lock:
            self.drain()
            if self._blocks is not None and self._blocks.stats().sequences:
                raise RuntimeError(
                    f"the model moved from {self.dtype} on {self.device} to {dtype} on {device} while caches made "
                    "before are alive: drop them (past_key_values) or call model.paged_cache.reset()"
                )
            self.dtype, self.device = dtype, device
            self.discard()

    def discard(self) -> None:
        """Drops tensors and allocator; caches alive become unusable. They are made again at next use."""
        with self.lock:
            self._pool = self._blocks = None
            self.decode_steps = DecodeSteps()
            self._dropped.clear()
            self.epoch += 1

    def reset(self) -> None:
        """Gives all memory back and forgets all prefixes; a `PagedCache` alive raises when it is used again."""
        self.discard()

    def reset_prefixes(self) -> None:
        """Forgets all prefixes, for example because the weights changed; sequences alive go on."""
        with self.lock:
            if self._blocks is not None:
                self._blocks.reset_prefix_cache()

    # ---- shared prefixes ---------------------------------------------------------------------------------------------

    @property
    def can_share_reads(self) -> bool:
        """Whether decode steps shall look for rows that begin with the same blocks."""
        wanted = False if self.config.batch_invariant else self.config.cascade
        # the op attends to float32 queries plainly on CUDA
        return wanted is True or (wanted == "auto" and not (self.device.type == "cuda" and self.dtype.itemsize > 2))

    def shareable(self, seqs: Sequence[SequenceBlocks], tokens: Sequence[int]) -> list[Group]:
        """Groups of neighbouring rows, of so many tokens, whose common prefix is worth attending to once."""
        least = enough = 1
        if self.config.cascade == "auto":
            least, enough = _WORTH_SHARING["cpu" if self.device.type == "cpu" else "cuda"]
        size = bytes_per_block(self.specs, self.block_size, self.dtype, self.config.kv_cache_dtype) // len(self.specs)
        lengths = [len(seq.blocks) for seq in seqs]
        if (sum(lengths) - max(lengths)) * size < enough:  # all that could be shared is too little
            return []
        groups = find_groups([seq.blocks for seq in seqs], tokens, self.block_size)
        groups = [group for group in groups if group.blocks * self.block_size >= least]
        return groups if sum(group.saved for group in groups) * size >= enough else []

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def watch(self, owner: object, seqs: list[SequenceBlocks], steps: list[PagedStep]) -> weakref.finalize:
        """Frees a cache's sequences and takes its decode step back after the cache is gone. Both lists may change
        meanwhile."""
        held = _Held(seqs, steps, self.epoch)
        self._held.add(held)
        # a function without lines of Python, between which an interrupt would lose the blocks
        finalizer = weakref.finalize(owner, self._dropped.append, held)
        finalizer.atexit = False
        return finalizer

    def drain(self) -> None:
        """Frees what finalizers left. The caller holds the lock."""
        while self._dropped:
            held = self._dropped.popleft()
            if held.epoch == self.epoch:
                self.free(held.seqs)
                for step in held.steps:
                    self.decode_steps.give_back(step)

    def free(self, seqs: Sequence[SequenceBlocks]) -> None:
        """Frees sequences of the present pool. The caller holds the lock."""
        for seq in seqs:
            self.blocks.free(seq)

    def append(self, requests: Sequence[tuple[SequenceBlocks, int]]) -> bool:
        """Slots for n more tokens of each sequence, all or none; grows the pool and copies shared blocks as needed.

        Returns:
            True if a block was replaced by a copy: tables made before are stale.

        Raises:
            CacheFullError: too few blocks, and the pool may not grow. PoolMemoryError: it cannot.
        """
        try:
            while True:
                try:
                    pairs = self.blocks.append_many(requests)
                except OutOfBlocks as error:
                    self._grow(error)
                else:
                    break
            if pairs:
                self.pool.copy_blocks(pairs)
        except BaseException as error:
            if not isinstance(error, Exception):  # interrupted: a table may list a block that was not copied
                self.discard()
            raise
        return bool(pairs)

    def _grow(self, error: OutOfBlocks) -> None:
        pool = self.pool
        wanted = pool.num_blocks + error.needed - error.available
        if not pool.can_grow(wanted):
            raise CacheFullError(
                f"the KV cache is full: {error.needed} more blocks of {self.block_size} tokens are needed, "
                f"{error.available} of {pool.num_blocks} are available. Raise {self._size_option()} (to {wanted} "
                "blocks at least), generate fewer tokens or use a smaller batch"
            ) from None
        self.blocks.grow(pool.grow(wanted))

    def _size_option(self) -> str:
        config = self.config
        if config.max_blocks is not None:
            return "max_blocks"
        return "num_blocks" if config.num_blocks is not None or self.device.type != "cuda" else "memory_fraction"

    def check_fits(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuses a single sequence that could never fit.

        Raises:
            CacheFullError: it needs more blocks than the cache may have.
        """
        limit = self.pool.max_blocks
        # the last token generated is never written
        needed = -(-(prompt_tokens + max(new_tokens, 1) - 1) // self.block_size)
        if limit is not None and needed > limit:
            raise CacheFullError(
                f"{self._size_option()}: a prompt of {prompt_tokens} tokens and {new_tokens} new ones need {needed} "
                f"blocks of {self.block_size} tokens, the KV cache has {limit}. Raise it to {needed} at least, or "
                "lower max_new_tokens"
            )

    def check(self) -> None:
        """Verifies the allocator's invariants, which an interrupt may have torn: sequences that no cache holds are
        freed, and if the caches alive are torn themselves, it starts over with an empty cache."""
        with self.lock:
            blocks = self._blocks
            if blocks is None:
                return
            try:
                self.drain()
                held = [one.seqs for one in self._held if one.epoch == self.epoch]
                alive = [seq for seqs in held for seq in seqs if not seq.is_freed]
                if blocks.stats().sequences != len(alive):
                    blocks.recover(alive)
                blocks.check()
            except (AssertionError, ValueError, KeyError):
                self.discard()

    # ---- what users read ---------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counts of the cache: sizes in blocks (``num_blocks`` = ``used`` + ``cached`` + ``free``), hits in calls and
        tokens, memory in bytes. `kv.blocks.CacheStats` explains each; before the first use only sizes are given."""
        if self.lock.acquire(blocking=False):  # a monitor shall not wait for a generate() in another thread
            try:
                self.drain()
            finally:
                self.lock.release()
        blocks = self._blocks
        counts = dataclasses.asdict(_EMPTY if blocks is None else blocks.stats())
        if blocks is None:
            counts = dict.fromkeys(counts, 0)
        size = bytes_per_block(self.specs, self.block_size, self.dtype, self.config.kv_cache_dtype)
        return {
            "block_size": self.block_size,
            **counts,
            "bytes_per_block": size,
            "bytes_total": counts["num_blocks"] * size,
            "bytes_used": counts["used"] * size,
            "shared_steps": self.shared_steps,
            "dtype": self.config.kv_cache_dtype or str(self.dtype).removeprefix("torch."),
        }


_EMPTY = BlockManager(1, 1).stats()
