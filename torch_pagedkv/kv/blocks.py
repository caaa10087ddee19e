"""Who owns which block of the paged KV cache: plain Python, no tensors.

A *block* holds the keys and values of `block_size` consecutive tokens. `BlockManager` hands out block ids and every
block is in exactly one state:

| state  | references | in the prefix index | kept in                                                                |
|--------|------------|---------------------|------------------------------------------------------------------------|
| free   | 0          | no                  | the free list; last in, first out, so that warm memory is reused first |
| cached | 0          | yes                 | the LRU list: found by a prompt with the same prefix, or evicted       |
| used   | >= 1       | maybe               | the table of each sequence that references it                          |

**Prefix index.** A full block is known by `digest = blake2b-128(parent digest, its token ids)`; the chain starts from
the salt, so equal digests mean equal salt and equal tokens from position 0 on. A cryptographic digest was chosen over a
key of (parent, tuple of ids): it costs 0.7 us instead of 0.2 us a block of 16 tokens (1.4 ms against 0.4 ms for a
prompt of 32,768), but takes 16 bytes instead of a tuple of ids, needs no parent to stay in the index, and unlike
Python's `hash` nobody can construct a collision that would show one user another one's cache. The idea of blocks,
tables and copy-on-write is PagedAttention's (Kwon et al., 2023, arXiv:2309.06180).

**Writing.** A position may be written only if its block has one reference and is not in the prefix index. Blocks enter
the index only when full, so ordinary appends never meet one; after `fork` or `truncate` the tail may be shared or
registered, and the next append replaces it by a copy (copy-on-write) that the caller must carry out.

**Copies.** Methods that return `(source, destination)` pairs have already changed the tables: the caller must run (or
enqueue in stream order) the copies before anything is written to those blocks and before the next call to the manager,
which may give a source away. Within one result no destination is also a source, so the copies may run in parallel.

**Errors.** `OutOfBlocks` is raised before anything changes. After a `KeyboardInterrupt` inside a call, `recover` mends
the books. Nothing here is thread-safe: the caller locks.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, islice

Salt = str | bytes | int | None
"""What the KV of a prefix depends on besides its token ids, for example the name of an adapter."""

_DIGEST_BYTES = 16


class OutOfBlocks(RuntimeError):
    """Too few blocks for a request; nothing was changed.

    Attributes:
        needed: blocks that the request takes from the tier.
        available: blocks that could be taken now (free, or cached and not referenced).
        tier: `"device"` or `"host"`.
    """

    def __init__(self, needed: int, available: int, tier: str = "device") -> None:
        super().__init__(f"out of {tier} KV blocks: {needed} needed, {available} available")
        self.needed = needed
        self.available = available
        self.tier = tier


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """The block table of one sequence. Made and changed only by its `BlockManager`; callers read it.

    Attributes:
        blocks: device block ids in order; token `p` lives in `blocks[p // block_size]` at offset `p %
            block_size`.
        num_tokens: tokens that have a slot.
        digests: prefix digest of each leading full block that was committed or matched.
        host_blocks: host block ids in order while the sequence is swapped out; `blocks` is empty then.
        cacheable: False while it holds tokens of before a `BlockManager.reset_prefix_cache`: `BlockManager.commit` then
            registers nothing.
        root: digest of the salt, where the chain starts.
        is_freed: True after `BlockManager.free`; every other use is an error.
    """

    root: bytes
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    digests: list[bytes] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    cacheable: bool = True
    is_freed: bool = False

    @property
    def num_committed_blocks(self) -> int:
        """Leading full blocks that `BlockManager.commit` need not look at again."""
        return len(self.digests)

    @property
    def is_swapped(self) -> bool:
        """Whether the content lies in the host tier."""
        return bool(self.host_blocks)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot of a `BlockManager`. Sizes are in blocks, the rest counts since the manager was made.

    Attributes:
        num_blocks: size of the device tier = used + cached + free.
        used: blocks referenced by at least one sequence.
        cached: unreferenced blocks whose content can still be found by prefix.
        free: blocks without content.
        peak_used: largest `used` so far.
        sequences: live sequences, swapped ones included.
        queries: calls of `BlockManager.match_prefix`.
        hits: those that found at least one block.
        query_tokens: tokens asked for in those calls.
        hit_tokens: tokens found.
        evictions: cached blocks whose content was given up for a new one.
        cow_copies: blocks copied because they were shared or registered when written.
        host_blocks: size of the host tier.
        host_used: host blocks in use.
    """

    num_blocks: int
    used: int
    cached: int
    free: int
    peak_used: int
    sequences: int
    queries: int
    hits: int
    query_tokens: int
    hit_tokens: int
    evictions: int
    cow_copies: int
    host_blocks: int
    host_used: int


class HostTier:
    """Block ids in host memory. Each is owned by one swapped-out sequence; nothing is shared or cached here."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_host_blocks must be >= 0, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """Takes `n` blocks, or raises `OutOfBlocks`."""
        if n > len(self._free):
            raise OutOfBlocks(n, len(self._free), "host")
        return [self._free.pop() for _ in range(n)]

    def give(self, blocks: list[int]) -> None:
        """Returns blocks to the free list."""
        self._free.extend(reversed(blocks))

    def keep_only(self, blocks: set[int]) -> None:
        """Frees all but `blocks`."""
        self._free = [block for block in range(self.num_blocks - 1, -1, -1) if block not in blocks]


class BlockManager:
    """Allocator, reference counts, prefix index and LRU of a paged KV cache. See the module for the model.

    Args:
        num_blocks: blocks of the device tier, >= 1.
        block_size: tokens a block, >= 1.
        num_host_blocks: blocks of the host tier; 0 turns swapping off.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be >= 1, got {num_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {block_size}")
        self.block_size = block_size
        self.host = HostTier(num_host_blocks)
        self._pack = struct.Struct(f"<{block_size}q").pack
        self._free: list[int] = []
        self._refs: list[int] = []
        self._digest_of: list[bytes | None] = []  # of registered blocks
        self._index: dict[bytes, int] = {}
        # OrderedDict and not an intrusive linked list over arrays: 44 against 59 ns an operation.
        self._lru: OrderedDict[int, None] = OrderedDict()  # cached blocks, least recently used first
        self._sequences: dict[int, SequenceBlocks] = {}  # by id(); a lost one shows in stats()
        self._peak_used = self._queries = self._hits = self._query_tokens = self._hit_tokens = 0
        self._evictions = self._cow_copies = 0
        self.grow(num_blocks)

    # ---- size and state ----------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks of the device tier."""
        return len(self._refs)

    @property
    def num_available(self) -> int:
        """Blocks that an append can take: free ones and cached ones."""
        return len(self._free) + len(self._lru)

    def grow(self, new_num_blocks: int) -> None:
        """Extends the device tier to `new_num_blocks` blocks; ids stay valid.

        Raises:
            ValueError: fewer blocks than now.
        """
        old = self.num_blocks
        if new_num_blocks < old:
            raise ValueError(f"cannot shrink from {old} to {new_num_blocks} blocks")
        self._digest_of.extend([None] * (new_num_blocks - old))
        self._refs.extend([0] * (new_num_blocks - old))
        self._free[:0] = range(new_num_blocks - 1, old - 1, -1)  # below the old ones: touched memory is reused first

    def stats(self) -> CacheStats:
        """A snapshot of sizes and counters."""
        return CacheStats(
            num_blocks=self.num_blocks,
            used=self.num_blocks - self.num_available,
            cached=len(self._lru),
            free=len(self._free),
            peak_used=self._peak_used,
            sequences=len(self._sequences),
            queries=self._queries,
            hits=self._hits,
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
            evictions=self._evictions,
            cow_copies=self._cow_copies,
            host_blocks=self.host.num_blocks,
            host_used=self.host.num_blocks - self.host.num_free,
        )

    # ---- life of a sequence ------------------------------------------------------------------------------------------

    def new_sequence(self, salt: Salt = None) -> SequenceBlocks:
        """A sequence without tokens. Sequences share cached prefixes only under the same `salt`."""
        return self._track(SequenceBlocks(self._root(salt)))

    def fork(self, seq: SequenceBlocks) -> SequenceBlocks:
        """A second sequence with the same tokens in the same blocks. Takes no block, so it cannot run out.

        Raises:
            ValueError: `seq` is freed, foreign or swapped out.
        """
        self._resident(seq)
        refs = self._refs
        for block in seq.blocks:
            refs[block] += 1
        twin = SequenceBlocks(seq.root, seq.blocks.copy(), seq.num_tokens, seq.digests.copy(), [], seq.cacheable)
        return self._track(twin)

    def reorder(self, seqs: Sequence[SequenceBlocks], index: Sequence[int]) -> list[SequenceBlocks]:
        """Beam search: the returned list's entry `i` continues `seqs[index[i]]`; parents without a successor are
        freed.

        The first successor of a parent is the parent object itself (O(1)), later ones are forks. Takes no block.

        Raises:
            ValueError: an index is out of range, or a sequence is listed twice, freed, foreign or swapped out.
        """
        for seq in seqs:
            self._resident(seq)
        if len({id(seq) for seq in seqs}) != len(seqs):
            raise ValueError("reorder: a sequence is listed twice")
        if any(not 0 <= i < len(seqs) for i in index):
            raise ValueError(f"reorder: indices must lie in [0, {len(seqs)}), got {list(index)}")
        moved: set[int] = set()
        result = []
        for i in index:
            result.append(self.fork(seqs[i]) if i in moved else seqs[i])
            moved.add(i)
        for i, seq in enumerate(seqs):
            if i not in moved:
                self.free(seq)
        return result

    def truncate(self, seq: SequenceBlocks, num_tokens: int) -> None:
        """Crops `seq` to its first `num_tokens` tokens and drops the blocks behind them.

        Raises:
            ValueError: `num_tokens` is negative or more than the sequence has, or `seq` is freed, foreign or
                swapped out.
        """
        self._resident(seq)
        if not 0 <= num_tokens <= seq.num_tokens:
            raise ValueError(f"cannot truncate a sequence of {seq.num_tokens} tokens to {num_tokens}")
        keep = -(-num_tokens // self.block_size)
        self._release(seq.blocks[keep:])
        del seq.blocks[keep:]
        del seq.digests[num_tokens // self.block_size :]
        seq.num_tokens = num_tokens
        seq.cacheable = seq.cacheable or not num_tokens

    def free(self, seq: SequenceBlocks) -> None:
        """Ends `seq` and drops its references. Registered blocks stay findable until evicted. Freeing twice is
        harmless.

        Raises:
            ValueError: `seq` belongs to another manager.
        """
        if seq.is_freed:
            return
        self._alive(seq)
        seq.is_freed = True
        del self._sequences[id(seq)]
        self._release(seq.blocks)
        self.host.give(seq.host_blocks)
        seq.blocks, seq.host_blocks, seq.digests = [], [], []
        seq.num_tokens = 0

    # ---- prefix cache ------------------------------------------------------------------------------------------------

    def lookup_prefix(self, token_ids: Sequence[int], salt: Salt = None, max_tokens: int | None = None) -> int:
        """How many leading tokens are cached now (a multiple of `block_size`). Takes and counts nothing."""
        return len(self._find(token_ids, self._root(salt), max_tokens)[0]) * self.block_size

    def match_prefix(self, seq: SequenceBlocks, token_ids: Sequence[int], max_tokens: int | None = None) -> int:
        """Starts the empty `seq` with the longest cached prefix of `token_ids`.

        Only full blocks match. Pass `max_tokens=len(token_ids) - 1` to leave at least one token to compute.

        Returns:
            Tokens matched, now `seq.num_tokens`; `seq.blocks` holds references to their blocks.

        Raises:
            ValueError: `seq` has tokens, or is freed, foreign or swapped out; `max_tokens` is negative.
        """
        self._resident(seq)
        if seq.num_tokens:
            raise ValueError(f"match_prefix needs an empty sequence, this one has {seq.num_tokens} tokens")
        blocks, digests = self._find(token_ids, seq.root, max_tokens)
        for block in blocks:
            self._acquire(block)
        seq.blocks, seq.digests = blocks, digests
        seq.num_tokens = len(blocks) * self.block_size
        self._queries += 1
        self._hits += bool(blocks)
        self._query_tokens += len(token_ids) if max_tokens is None else min(len(token_ids), max_tokens)
        self._hit_tokens += seq.num_tokens
        self._note_peak()
        return seq.num_tokens

    def commit(
        self,
        seq: SequenceBlocks,
        token_ids: Sequence[int],
        upto: int | None = None,
        *,
        start: int = 0,
        dedupe: bool = False,
    ) -> list[tuple[int, int, int]]:
        """Registers the full blocks among the first `upto` tokens in the prefix index.

        Call it once the keys and values of those tokens are written, or enqueued in stream order. Blocks committed
        before are skipped, so a call costs O(newly full blocks). Where the same content is registered already, that
        block stays the registered one.

        Args:
            seq: the sequence.
            token_ids: its token ids from position `start` on; longer than needed is fine.
            upto: tokens whose KV exists; default: all that `token_ids` covers, at most `seq.num_tokens`.
            start: position of `token_ids[0]`, at most `seq.num_committed_blocks * block_size`.
            dedupe: switch `seq` to the blocks already registered and drop its own duplicates; tables built from
                `seq.blocks` before are stale then.

        Returns:
            The duplicates met: `(index in seq.blocks, own block, registered block)`.

        Raises:
            ValueError: `upto` exceeds the tokens of `seq` or of `token_ids`, `start` leaves a gap, the ids
                contradict those under which a block was registered, or `seq` is freed, foreign or swapped out.
                Nothing is changed.
        """
        self._resident(seq)
        size, done, end = self.block_size, len(seq.digests), start + len(token_ids)
        if upto is None:
            upto = min(seq.num_tokens, end)
        if not 0 <= start <= done * size:
            raise ValueError(f"token_ids start at {start}, the first token to commit is {done * size}")
        if not 0 <= upto <= min(seq.num_tokens, end):
            raise ValueError(f"cannot commit {upto} tokens: {seq.num_tokens} in the sequence, ids up to {end}")
        full = upto // size
        if full <= done or not seq.cacheable:
            return []
        parent = seq.digests[-1] if done else seq.root
        digests = list(islice(self._chain(token_ids, parent, done * size - start), full - done))
        for block, digest in zip(seq.blocks[done:full], digests, strict=True):
            if self._digest_of[block] not in (None, digest):
                raise ValueError(f"block {block} was registered with other tokens than those given")
        duplicates = []
        for i, digest in enumerate(digests, done):
            block = seq.blocks[i]
            registered = self._index.setdefault(digest, block)
            if registered == block:
                self._digest_of[block] = digest
            else:
                duplicates.append((i, block, registered))
        seq.digests += digests
        if dedupe and duplicates:
            for i, _, registered in duplicates:
                self._acquire(registered)
                seq.blocks[i] = registered
            self._release([block for _, block, _ in duplicates])
            self._note_peak()
        return duplicates

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content, for example because the weights changed.

        Sequences alive now keep their blocks but never register them: their KV is of before the reset.
        """
        for block in self._index.values():
            self._digest_of[block] = None
        self._index.clear()
        self._free.extend(reversed(self._lru))
        self._lru.clear()
        for seq in self._sequences.values():
            seq.cacheable = not seq.num_tokens
            seq.digests = []

    # ---- slots -------------------------------------------------------------------------------------------------------

    def can_append(self, requests: Sequence[tuple[SequenceBlocks, int]]) -> bool:
        """Whether `append_many` of the same requests would find its blocks."""
        return self._demand(requests)[0] <= self.num_available

    def append_tokens(self, seq: SequenceBlocks, n: int) -> list[tuple[int, int]]:
        """`append_many` for one sequence."""
        return self.append_many(((seq, n),))

    def append_many(self, requests: Sequence[tuple[SequenceBlocks, int]]) -> list[tuple[int, int]]:
        """Gives each sequence slots for `n` more tokens: all of them, or none.

        A tail block that is partly filled and shared is replaced by a copy; if it is not shared but registered, too, as
        long as blocks are available, else its registration is given up, so that a sequence that fits the pool never
        fails.

        Args:
            requests: pairs (sequence, `n` >= 0), each sequence once.

        Returns:
            Copy-on-write pairs (source, destination), to be copied before the new slots are written.

        Raises:
            OutOfBlocks: too few blocks; nothing was changed.
            ValueError: `n` is negative, or a sequence is listed twice, freed, foreign or swapped out; nothing was
                changed.
        """
        needed, optional = self._demand(requests)
        available = self.num_available
        if needed > available:
            raise OutOfBlocks(needed, available)
        if not needed and not optional:  # the common case of decoding: the tail has room
            for seq, n in requests:
                seq.num_tokens += n
            return []
        spare = available - needed
        size, refs = self.block_size, self._refs
        pairs: list[tuple[int, int]] = []
        for seq, n in requests:
            blocks = seq.blocks
            if n and seq.num_tokens % size:
                tail = blocks[-1]
                if refs[tail] > 1:
                    refs[tail] -= 1
                    blocks[-1] = self._take()
                    pairs.append((tail, blocks[-1]))
                elif self._digest_of[tail] is not None:
                    if spare:
                        spare -= 1
                        blocks[-1] = self._take()
                        pairs.append((tail, blocks[-1]))
                        # Youngest in the LRU list now, and this call takes no more than what was available before it:
                        # the source is not taken as a destination.
                        self._release([tail])
                    else:
                        self._unregister(tail)
            seq.num_tokens += n
            for _ in range(-(-seq.num_tokens // size) - len(blocks)):
                blocks.append(self._take())
        self._note_peak()
        self._cow_copies += len(pairs)
        return pairs

    def slot_mapping(self, seq: SequenceBlocks, start: int, stop: int) -> list[int]:
        """Flat slots `block * block_size + offset` of the positions `[start, stop)`.

        Raises:
            ValueError: the range is not within the tokens of `seq`, or `seq` is freed, foreign or swapped out.
        """
        self._resident(seq)
        if not 0 <= start <= stop <= seq.num_tokens:
            raise ValueError(f"positions [{start}, {stop}) are not within the sequence's {seq.num_tokens} tokens")
        if start == stop:
            return []
        size = self.block_size
        first = start // size
        slots: list[int] = []
        for block in seq.blocks[first : -(-stop // size)]:
            slots.extend(range(block * size, block * size + size))
        return slots[start - first * size : stop - first * size]

    # ---- host tier ---------------------------------------------------------------------------------------------------

    def swap_out(self, seq: SequenceBlocks) -> list[tuple[int, int]]:
        """Moves `seq` to the host tier and drops its device references (registered blocks stay cached meanwhile).

        Returns:
            Pairs (device block, host block) to copy.

        Raises:
            OutOfBlocks: the host tier has too few blocks; nothing was changed.
            ValueError: `seq` is freed, foreign or swapped out already.
        """
        self._resident(seq)
        seq.host_blocks = self.host.take(len(seq.blocks))
        pairs = list(zip(seq.blocks, seq.host_blocks, strict=True))
        self._release(seq.blocks)
        seq.blocks = []
        return pairs

    def swap_in(self, seq: SequenceBlocks) -> list[tuple[int, int]]:
        """Brings `seq` back. Blocks whose content is still (or again) in the prefix index are shared instead of
        copied.

        Returns:
            Pairs (host block, device block) to copy.

        Raises:
            OutOfBlocks: the device has too few blocks; nothing was changed.
            ValueError: `seq` is freed or foreign.
        """
        self._alive(seq)
        if not seq.host_blocks:
            return []
        found = [self._index.get(digest) for digest in seq.digests]
        found += [None] * (len(seq.host_blocks) - len(found))
        needed = found.count(None)
        available = self.num_available - sum(block is not None and not self._refs[block] for block in found)
        if needed > available:
            raise OutOfBlocks(needed, available)
        for block in found:
            if block is not None:
                self._acquire(block)
        pairs = []
        for host_block, block in zip(seq.host_blocks, found, strict=True):
            if block is None:
                block = self._take()
                pairs.append((host_block, block))
            seq.blocks.append(block)
        self.host.give(seq.host_blocks)
        seq.host_blocks = []
        self._note_peak()
        return pairs

    # ---- invariants and repair ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Verifies every invariant in O(blocks + table entries); for tests and debugging.

        Raises:
            AssertionError: with what is wrong.
        """
        counted = [0] * self.num_blocks
        for block in chain.from_iterable(seq.blocks for seq in self._sequences.values()):
            counted[block] += 1
        _expect(counted == self._refs, "reference counts differ from table entries")
        used = {block for block, count in enumerate(counted) if count}
        free, cached = set(self._free), set(self._lru)
        _expect(len(free) == len(self._free), "a block is in the free list twice")
        _expect(not (free & cached or free & used or cached & used), "a block is in two states")
        _expect(free | cached | used == set(range(self.num_blocks)), "free + cached + used is not all")
        registered = {block: digest for block, digest in enumerate(self._digest_of) if digest is not None}
        _expect({block: digest for digest, block in self._index.items()} == registered, "index and blocks disagree")
        _expect(len(self._index) == len(registered), "a block is in the index twice")
        _expect(not free & registered.keys(), "a free block is registered")
        _expect(cached <= registered.keys(), "an unreferenced block is cached but not registered")
        _expect(len(used) <= self._peak_used <= self.num_blocks, "peak_used is wrong")
        hosted: list[int] = []
        for key, seq in self._sequences.items():
            _expect(key == id(seq) and not seq.is_freed, "a freed sequence is still listed")
            _expect(not (seq.blocks and seq.host_blocks), "a sequence is in both tiers")
            table = seq.host_blocks or seq.blocks
            _expect(len(table) == -(-seq.num_tokens // self.block_size), "table length does not fit the tokens")
            _expect(len(set(table)) == len(table), "a table lists a block twice")
            _expect(len(seq.digests) <= seq.num_tokens // self.block_size, "more digests than full blocks")
            for block, digest in zip(seq.blocks, seq.digests, strict=False):
                _expect(self._digest_of[block] in (None, digest), "a block is registered under a foreign digest")
            hosted += seq.host_blocks
        hosted += self.host._free
        _expect(sorted(hosted) == list(range(self.host.num_blocks)), "host blocks lost or owned twice")

    def recover(self, keep: Sequence[SequenceBlocks] = ()) -> None:
        """Restores the invariants after a call was cut short from outside, as by `KeyboardInterrupt`. O(blocks).

        Drops (as freed) every sequence but `keep`, and derives references, free list and LRU list anew from their
        tables. The prefix index stays: a block leaves it before it can be written.

        Args:
            keep: sequences that took no part in the interrupted call.

        Raises:
            ValueError: one of `keep` is freed or foreign; nothing was changed.
        """
        for seq in keep:
            self._alive(seq)
        kept = {id(seq): seq for seq in keep}
        for key, seq in self._sequences.items():
            if key not in kept:
                seq.blocks, seq.host_blocks, seq.digests = [], [], []
                seq.num_tokens = 0
                seq.is_freed = True
        self._sequences = kept
        everything = range(self.num_blocks)
        self._refs = [0] * self.num_blocks
        for block in chain.from_iterable(seq.blocks for seq in keep):
            self._refs[block] += 1
        self._digest_of = [None] * self.num_blocks
        for digest, block in self._index.items():
            self._digest_of[block] = digest
        cached = [block for block in everything if self._digest_of[block] is not None and not self._refs[block]]
        age = {block: i for i, block in enumerate(self._lru)}  # those that just lost their references are the youngest
        self._lru = OrderedDict.fromkeys(sorted(cached, key=lambda block: age.get(block, len(age))))
        self._free = [b for b in reversed(everything) if self._digest_of[b] is None and not self._refs[b]]
        self.host.keep_only({block for seq in keep for block in seq.host_blocks})
        self._note_peak()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _track(self, seq: SequenceBlocks) -> SequenceBlocks:
        self._sequences[id(seq)] = seq
        return seq

    def _alive(self, seq: SequenceBlocks) -> None:
        if id(seq) not in self._sequences:
            raise ValueError(
                "the sequence was freed" if seq.is_freed else "the sequence belongs to another BlockManager"
            )

    def _resident(self, seq: SequenceBlocks) -> None:
        self._alive(seq)
        if seq.host_blocks:
            raise ValueError("the sequence is swapped out: swap_in() first")

    def _demand(self, requests: Sequence[tuple[SequenceBlocks, int]]) -> tuple[int, int]:
        """Blocks that `append_many` must take, and those that it would like to, to keep cropped tails cached."""
        size, refs, sequences = self.block_size, self._refs, self._sequences
        needed = optional = 0
        left: dict[int, int] = {}  # references that earlier requests of this batch give up by copying
        for seq, n in requests:
            if id(seq) not in sequences or seq.host_blocks:
                self._resident(seq)  # raises
            if n < 0:
                raise ValueError(f"cannot append {n} tokens")
            blocks = seq.blocks
            needed += -(-(seq.num_tokens + n) // size) - len(blocks)
            if n and seq.num_tokens % size:
                tail = blocks[-1]
                if refs[tail] - left.get(tail, 0) > 1:
                    left[tail] = left.get(tail, 0) + 1
                    needed += 1
                elif self._digest_of[tail] is not None:
                    optional += 1
        if len(requests) > 1 and len({id(seq) for seq, _ in requests}) != len(requests):
            raise ValueError("append_many: a sequence is listed twice")
        return needed, optional

    def _take(self) -> int:
        """A block with one reference: a free one, else the least recently used cached one. The caller has checked."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._lru.popitem(last=False)
            self._unregister(block)
            self._evictions += 1
        self._refs[block] = 1
        return block

    def _acquire(self, block: int) -> None:
        """One more reference to a registered block."""
        if not self._refs[block]:
            del self._lru[block]
        self._refs[block] += 1

    def _release(self, blocks: list[int]) -> None:
        """One reference less for each block of a table, deepest first: a chain is evicted from its end."""
        refs = self._refs
        for block in reversed(blocks):
            refs[block] -= 1
            if not refs[block]:
                if self._digest_of[block] is None:
                    self._free.append(block)
                else:
                    self._lru[block] = None

    def _unregister(self, block: int) -> None:
        digest = self._digest_of[block]
        assert digest is not None
        del self._index[digest]
        self._digest_of[block] = None

    def _note_peak(self) -> None:
        self._peak_used = max(self._peak_used, self.num_blocks - self.num_available)

    def _root(self, salt: Salt) -> bytes:
        if not isinstance(salt, (str, bytes, int, type(None))):
            raise ValueError(f"salt must be str, bytes, int or None, got {type(salt).__name__}")
        # repr tells 1 from "1" from b"1"; the block size keeps chains that are cut differently apart.
        name = f"{self.block_size}:{salt!r}".encode("utf-8", "surrogatepass")
        return blake2b(name, digest_size=_DIGEST_BYTES).digest()

    def _chain(self, token_ids: Sequence[int], parent: bytes, offset: int) -> Iterator[bytes]:
        """Digests of the full blocks of `token_ids[offset:]`, made one at a time: a miss hashes nothing behind it."""
        size, pack = self.block_size, self._pack
        for i in range(offset, len(token_ids) - size + 1, size):
            parent = blake2b(parent + pack(*token_ids[i : i + size]), digest_size=_DIGEST_BYTES).digest()
            yield parent

    def _find(self, token_ids: Sequence[int], root: bytes, max_tokens: int | None) -> tuple[list[int], list[bytes]]:
        """The longest registered chain: its blocks and digests."""
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must be >= 0, got {max_tokens}")
        limit = None if max_tokens is None else max_tokens // self.block_size
        blocks: list[int] = []
        digests: list[bytes] = []
        for digest in islice(self._chain(token_ids, root, 0), limit):
            block = self._index.get(digest)
            if block is None:
                break
            blocks.append(block)
            digests.append(digest)
        return blocks, digests


def _expect(condition: bool, message: str) -> None:
    """An assertion that `python -O` keeps."""
    if not condition:
        raise AssertionError(message)
