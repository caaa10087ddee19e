"""The block manager against a naive model of the cache's *content*, step by step, and its rules one by one."""

from __future__ import annotations

import contextlib
import copy
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from torch_pagedkv.kv import blocks
from torch_pagedkv.kv.blocks import BlockManager, OutOfBlocks, Salt, SequenceBlocks

# ---- the naive model -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class NaiveSequence:
    """What a sequence must look like: its tokens, and the value that its cache must hold for each."""

    real: SequenceBlocks
    salt: Salt
    tokens: list[int] = field(default_factory=list)
    values: list[object] = field(default_factory=list)


class World:
    """Drives a `BlockManager` and simulates the memory it describes.

    The value of a position is the whole history it depends on (salt, tokens so far, generation of the weights at the
    start of the sequence and at the write), so a wrong share, a missed copy, a stale hit or a block given away early
    is a wrong value.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, block_size, num_host_blocks)
        self.size = block_size
        self.memory: dict[int, list[object]] = {}
        self.host: dict[int, list[object]] = {}
        self.seqs: list[NaiveSequence] = []
        self.generation = 0
        self.clock = 0
        self.prefixes: dict[tuple[Salt, tuple[int, ...]], int] = {}  # registered content -> block
        self.released: dict[int, int] = {}  # block -> clock when its last reference went
        self.mixed: set[int] = set()  # clocks of steps that freed several sequences, whose order among them is open
        self.taken: set[int] = set()  # blocks that got new content in this step
        self.given_up: set[int] = set()  # registered blocks written in place in this step
        self.seen: Counter[str] = Counter()  # how often each interesting case came up

    # -- helpers

    def refs(self) -> Counter[int]:
        return Counter(block for seq in self.seqs for block in seq.real.blocks)

    def available(self) -> int:
        return self.manager.num_blocks - len(self.refs())

    def resident(self) -> list[NaiveSequence]:
        return [seq for seq in self.seqs if not seq.real.is_swapped]

    def pick(self, seqs: list[NaiveSequence], i: int) -> NaiveSequence:
        return seqs[i % len(seqs)]

    def frozen(self) -> object:
        """Everything the manager knows, to show that an error changed nothing."""
        manager = self.manager
        others = ("_pack", "host", "_lru", "_sequences")
        state = {key: value for key, value in vars(manager).items() if key not in others}
        seqs = [(s.blocks, s.num_tokens, s.digests, s.host_blocks, s.cacheable) for s in manager._sequences.values()]
        return copy.deepcopy((state, list(manager._lru), seqs, vars(manager.host)))

    def expect_out_of_blocks(self, call: Callable[[], object], needed: int, available: int) -> None:
        before = self.frozen()
        with pytest.raises(OutOfBlocks) as caught:
            call()
        assert (caught.value.needed, caught.value.available) == (needed, available)
        assert self.frozen() == before
        self.seen["out of blocks"] += 1

    def write(self, seq: NaiveSequence, tokens: list[int]) -> None:
        start = len(seq.tokens)
        born = seq.values[0][2] if seq.values else self.generation  # type: ignore[index]
        for token in tokens:
            seq.tokens.append(token)
            seq.values.append((seq.salt, tuple(seq.tokens), born, self.generation))
        slots = self.manager.slot_mapping(seq.real, start, len(seq.tokens))
        for slot, value in zip(slots, seq.values[start:], strict=True):
            self.memory[slot // self.size][slot % self.size] = value

    def copy_blocks(
        self, source: dict[int, list[object]], target: dict[int, list[object]], pairs: list[tuple[int, int]]
    ) -> None:
        destinations = [dst for _, dst in pairs]
        assert len(set(destinations)) == len(pairs)
        if source is target:
            assert not set(destinations) & {src for src, _ in pairs}
        content = {src: list(source[src]) for src, _ in pairs}
        target.update((dst, list(content[src])) for src, dst in pairs)

    def settle(self, before: Counter[int], evictions: int) -> None:
        """After a step: follows evictions, checks their order, poisons what is free and verifies everything."""
        manager, after, stats = self.manager, self.refs(), self.manager.stats()
        gone = {key: block for key, block in self.prefixes.items() if block in self.taken}
        assert stats.evictions - evictions == len(gone)
        if gone:
            self.seen["eviction"] += 1
            assert stats.free == 0, "evicted although a block was free"
        self.prefixes = {
            key: block for key, block in self.prefixes.items() if block not in self.taken and block not in self.given_up
        }
        self.taken, self.given_up = set(), set()
        for (salt, tokens), block in self.prefixes.items():
            for (gone_salt, gone_tokens), gone_block in gone.items() if block not in before | after else ():
                assert self.released[gone_block] <= self.released[block], "a block used later was evicted first"
                length = len(gone_tokens)
                deeper = salt == gone_salt and len(tokens) > length and tokens[:length] == gone_tokens
                same_time = self.released[gone_block] == self.released[block] not in self.mixed
                assert not (deeper and same_time), "a parent was evicted before its child"
        for block in before.keys() - after.keys():
            self.released[block] = self.clock
        self.clock += 1
        kept = set(self.prefixes.values())
        for block in range(manager.num_blocks):
            if block not in after and block not in kept:
                self.memory[block] = ["poison"] * self.size
        self.verify()

    def verify(self) -> None:
        manager = self.manager
        manager.check()
        after = self.refs()
        stats = manager.stats()
        assert stats.used == len(after)
        assert stats.cached == len(set(self.prefixes.values()) - after.keys())
        assert stats.used + stats.cached + stats.free == stats.num_blocks == manager.num_blocks
        assert stats.sequences == len(self.seqs)
        assert stats.host_used == sum(len(seq.real.host_blocks) for seq in self.seqs)
        assert set(manager._index.values()) == set(self.prefixes.values())
        for seq in self.seqs:
            memory, table = (self.host, seq.real.host_blocks) if seq.real.is_swapped else (self.memory, seq.real.blocks)
            assert seq.real.num_tokens == len(seq.tokens) and len(table) == -(-len(seq.tokens) // self.size)
            flat = [value for block in table for value in memory[block]]
            assert flat[: len(seq.values)] == seq.values

    def step(self, action: Callable[[], object]) -> None:
        before, evictions = self.refs(), self.manager.stats().evictions
        action()
        self.settle(before, evictions)

    # -- actions

    def start(self, salt: Salt, prompt: list[int], max_tokens: int | None) -> None:
        def action() -> None:
            limit = len(prompt) if max_tokens is None else min(max_tokens, len(prompt))
            want = 0
            while want + self.size <= limit and (salt, tuple(prompt[: want + self.size])) in self.prefixes:
                want += self.size
            assert self.manager.lookup_prefix(prompt, salt, max_tokens) == want
            seq = NaiveSequence(self.manager.new_sequence(salt), salt)
            self.seqs.append(seq)
            assert self.manager.match_prefix(seq.real, prompt, max_tokens) == want == seq.real.num_tokens
            seq.tokens = prompt[:want]
            seq.values = [(salt, tuple(prompt[: i + 1]), self.generation, self.generation) for i in range(want)]
            self.seen["hit"] += bool(want)

        self.step(action)

    def append(self, wishes: list[tuple[int, list[int]]]) -> None:
        def action() -> None:
            chosen = {id(seq): (seq, tokens) for i, tokens in wishes for seq in [self.pick(self.resident(), i)]}
            requests = [(seq.real, len(tokens)) for seq, tokens in chosen.values()]
            tables = {id(seq): list(seq.real.blocks) for seq in self.seqs}
            fresh = 0
            # The tables as they would be, with new blocks named by negative numbers.
            for seq, tokens in chosen.values():
                table = tables[id(seq)]
                if tokens and len(seq.tokens) % self.size and sum(table[-1] in other for other in tables.values()) > 1:
                    fresh += 1
                    table[-1] = -fresh
                while len(table) * self.size < len(seq.tokens) + len(tokens):
                    fresh += 1
                    table.append(-fresh)
            available = self.available()
            assert self.manager.can_append(requests) == (fresh <= available)
            if fresh > available:
                self.expect_out_of_blocks(lambda: self.manager.append_many(requests), fresh, available)
                return
            registered, referenced = set(self.prefixes.values()), self.refs()
            partial = [seq.real for seq, tokens in chosen.values() if tokens and len(seq.tokens) % self.size]
            tails = {id(real): real.blocks[-1] for real in partial}
            kept = {id(real): len(real.blocks) - 1 for real in partial}
            pairs = self.manager.append_many(requests)
            self.taken = {block for real, _ in requests for block in real.blocks} - referenced.keys()
            written = {tails[id(real)] for real in partial if real.blocks[kept[id(real)]] == tails[id(real)]}
            self.given_up = written & registered
            dropped = [src for src, _ in pairs if src not in self.refs()]
            assert set(dropped) <= registered
            if self.given_up:
                assert self.available() <= len(dropped), "a registration was given up although a block was available"
            self.copy_blocks(self.memory, self.memory, pairs)
            self.seen["registration given up"] += bool(self.given_up)
            self.seen["copy of a registered block"] += bool(dropped)
            self.seen["copy of a shared block"] += len(pairs) > len(dropped)
            for seq, tokens in chosen.values():
                self.write(seq, tokens)

        self.step(action)

    def fork(self, i: int) -> None:
        def action() -> None:
            seq = self.pick(self.resident(), i)
            self.seqs.append(NaiveSequence(self.manager.fork(seq.real), seq.salt, list(seq.tokens), list(seq.values)))

        self.step(action)

    def reorder(self, index: list[int]) -> None:
        def action() -> None:
            self.mixed.add(self.clock)
            beams = self.resident()[: len(index)]
            order = [i % len(beams) for i in index[: len(beams)]]
            result = self.manager.reorder([seq.real for seq in beams], order)
            self.seqs = [seq for seq in self.seqs if seq not in beams]
            for real, i in zip(result, order, strict=True):
                parent = beams[i]
                self.seqs.append(NaiveSequence(real, parent.salt, list(parent.tokens), list(parent.values)))

        self.step(action)

    def truncate(self, i: int, keep: int) -> None:
        def action() -> None:
            seq = self.pick(self.resident(), i)
            n = keep % (len(seq.tokens) + 1)
            self.manager.truncate(seq.real, n)
            del seq.tokens[n:], seq.values[n:]

        self.step(action)

    def commit(self, i: int, upto: int | None, tail_only: bool, dedupe: bool) -> None:
        def action() -> None:
            seq = self.pick(self.resident(), i)
            n = None if upto is None else upto % (len(seq.tokens) + 1)
            done = seq.real.num_committed_blocks
            start = done * self.size if tail_only else 0
            if n is not None and n < start:
                n = start
            table = list(seq.real.blocks)
            duplicates = self.manager.commit(seq.real, seq.tokens[start:], n, start=start, dedupe=dedupe)
            expected = []
            if seq.real.cacheable:
                for k in range(done, (len(seq.tokens) if n is None else n) // self.size):
                    key = (seq.salt, tuple(seq.tokens[: (k + 1) * self.size]))
                    if self.prefixes.setdefault(key, table[k]) != table[k]:
                        expected.append((k, table[k], self.prefixes[key]))
            assert duplicates == expected
            self.seen["duplicate"] += bool(duplicates)
            if dedupe:
                for k, _, existing in duplicates:
                    table[k] = existing
            assert seq.real.blocks == table

        self.step(action)

    def free(self, i: int) -> None:
        def action() -> None:
            seq = self.pick(self.seqs, i)
            self.manager.free(seq.real)
            self.manager.free(seq.real)
            self.seqs.remove(seq)

        self.step(action)

    def swap_out(self, i: int) -> None:
        def action() -> None:
            seq = self.pick(self.resident(), i)
            room = self.manager.host.num_free
            if len(seq.real.blocks) > room:
                self.expect_out_of_blocks(lambda: self.manager.swap_out(seq.real), len(seq.real.blocks), room)
                return
            self.copy_blocks(self.memory, self.host, self.manager.swap_out(seq.real))

        self.step(action)

    def swap_in(self, i: int) -> None:
        def action() -> None:
            seq = self.pick([seq for seq in self.seqs if seq.real.is_swapped], i)
            full = [tuple(seq.tokens[: (k + 1) * self.size]) for k in range(seq.real.num_committed_blocks)]
            found = {self.prefixes[seq.salt, tokens] for tokens in full if (seq.salt, tokens) in self.prefixes}
            needed = len(seq.real.host_blocks) - len(found)
            available = self.available() - len(found - self.refs().keys())
            if needed > available:
                self.expect_out_of_blocks(lambda: self.manager.swap_in(seq.real), needed, available)
                return
            pairs = self.manager.swap_in(seq.real)
            assert len(pairs) == needed and not seq.real.is_swapped
            self.seen["swapped in without a copy"] += bool(found)
            self.taken = {block for _, block in pairs}
            self.copy_blocks(self.host, self.memory, pairs)

        self.step(action)

    def reset(self) -> None:
        def action() -> None:
            self.manager.reset_prefix_cache()
            self.prefixes.clear()
            self.generation += 1

        self.step(action)

    def grow(self, extra: int) -> None:
        self.step(lambda: self.manager.grow(self.manager.num_blocks + extra))


def new_world(num_blocks: int, block_size: int, num_host_blocks: int) -> World:
    world = World(num_blocks, block_size, num_host_blocks)
    world.memory = {block: ["poison"] * block_size for block in range(num_blocks)}
    world.verify()
    return world


# Few distinct prompts over few tokens, so that prefixes meet often.
SALTS: list[Salt] = [None, "adapter"]


def random_tokens(rng: random.Random, most: int) -> list[int]:
    return [int(rng.random() < 0.15) for _ in range(rng.randint(0, most))]


@pytest.mark.parametrize(("num_blocks", "block_size"), [(24, 4), (12, 8), (40, 2), (7, 1)])
def test_random_walk(num_blocks: int, block_size: int) -> None:
    """10,000 random steps; invariants and the content of every sequence are checked after each."""
    rng = random.Random(num_blocks)
    world = new_world(num_blocks, block_size, num_blocks // 2)

    def number() -> int:
        return rng.randrange(1 << 16)

    def wish() -> tuple[int, list[int]]:
        return number(), random_tokens(rng, 2 * block_size + 1)

    any_resident = world.resident
    actions: list[tuple[float, Callable[[], object], Callable[[], object]]] = [
        (4, lambda: len(world.seqs) < 8, lambda: world.start(
            rng.choice(SALTS), random_tokens(rng, 6 * block_size), rng.choice([None, number() % (6 * block_size)]))),
        (8, any_resident, lambda: world.append([wish() for _ in range(rng.randint(1, 4))])),
        (2, lambda: any_resident() and len(world.seqs) < 8, lambda: world.fork(number())),
        (1, any_resident, lambda: world.reorder([number() for _ in range(rng.randint(1, 4))])),
        (2, any_resident, lambda: world.truncate(number(), number())),
        (5, any_resident, lambda: world.commit(
            number(), rng.choice([None, number()]), rng.random() < 0.5, rng.random() < 0.5)),
        (3, lambda: world.seqs, lambda: world.free(number())),
        (1, any_resident, lambda: world.swap_out(number())),
        (1.5, lambda: any(seq.real.is_swapped for seq in world.seqs), lambda: world.swap_in(number())),
        (0.05, lambda: True, world.reset),
    ]  # fmt: skip
    for step in range(10_000):
        possible = [(weight, action) for weight, condition, action in actions if condition()]
        rng.choices([action for _, action in possible], [weight for weight, _ in possible])[0]()
        if step == 5_000:
            world.grow(3)
    rare = {"registration given up"} if block_size > 1 else set()
    partial = {"copy of a shared block", "copy of a registered block"} if block_size > 1 else set()
    wanted = {"hit", "eviction", "out of blocks", "duplicate", "swapped in without a copy"} | partial | rare
    assert {case for case, count in world.seen.items() if count} >= wanted, world.seen
    while world.seqs:
        world.free(0)
    assert world.manager.stats().used == 0


class BlockMachine(RuleBasedStateMachine):
    """The same world, steered by hypothesis (which shrinks a failure to a few steps)."""

    numbers = st.integers(0, 63)
    ids = st.lists(st.integers(0, 1), max_size=9)

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 4), num_host_blocks=st.integers(0, 6))
    def begin(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.world = new_world(num_blocks, block_size, num_host_blocks)

    def some_resident(self) -> bool:
        return bool(self.world.resident())

    @rule(salt=st.sampled_from(SALTS), prompt=ids, max_tokens=st.none() | st.integers(0, 9))
    def start(self, salt: Salt, prompt: list[int], max_tokens: int | None) -> None:
        self.world.start(salt, prompt, max_tokens)

    @precondition(some_resident)
    @rule(wishes=st.lists(st.tuples(numbers, ids), min_size=1, max_size=3))
    def append(self, wishes: list[tuple[int, list[int]]]) -> None:
        self.world.append(wishes)

    @precondition(some_resident)
    @rule(i=numbers)
    def fork(self, i: int) -> None:
        self.world.fork(i)

    @precondition(some_resident)
    @rule(index=st.lists(numbers, min_size=1, max_size=4))
    def reorder(self, index: list[int]) -> None:
        self.world.reorder(index)

    @precondition(some_resident)
    @rule(i=numbers, keep=numbers)
    def truncate(self, i: int, keep: int) -> None:
        self.world.truncate(i, keep)

    @precondition(some_resident)
    @rule(i=numbers, upto=st.none() | numbers, tail_only=st.booleans(), dedupe=st.booleans())
    def commit(self, i: int, upto: int | None, tail_only: bool, dedupe: bool) -> None:
        self.world.commit(i, upto, tail_only, dedupe)

    @precondition(lambda self: self.world.seqs)
    @rule(i=numbers)
    def free(self, i: int) -> None:
        self.world.free(i)

    @precondition(some_resident)
    @rule(i=numbers)
    def swap_out(self, i: int) -> None:
        self.world.swap_out(i)

    @precondition(lambda self: any(seq.real.is_swapped for seq in self.world.seqs))
    @rule(i=numbers)
    def swap_in(self, i: int) -> None:
        self.world.swap_in(i)

    @rule()
    def reset(self) -> None:
        self.world.reset()

    @rule(extra=st.integers(0, 2))
    def grow(self, extra: int) -> None:
        self.world.grow(extra)


BlockMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBlockMachine = BlockMachine.TestCase


def interrupted(line: int, call: Callable[[], object]) -> bool:
    """Runs `call` with a KeyboardInterrupt before the given line that it executes in blocks.py; False: it has fewer."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != blocks.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except (KeyboardInterrupt, OutOfBlocks):
        pass
    finally:
        sys.settrace(before)
    return left < 0


def cut_short(rng: random.Random) -> bool:
    """One call, cut short at a random line, and recovered from. Whether the call was long enough to be cut."""
    world = new_world(12, 2, 6)
    for _ in range(5):
        world.start(rng.choice(SALTS), random_tokens(rng, 8), None)
        world.append([(len(world.seqs) - 1, random_tokens(rng, 6))])
        world.commit(len(world.seqs) - 1, None, False, False)
        if len(world.seqs) > 1 and rng.random() < 0.4:
            world.free(rng.randrange(8))
        if rng.random() < 0.5:
            world.fork(rng.randrange(8))
            world.truncate(rng.randrange(8), rng.randrange(8))
    manager, half = world.manager, len(world.seqs) // 2
    part, world.seqs = world.seqs[half:], world.seqs[:half]
    reals = [seq.real for seq in part]
    if rng.random() < 0.3 and len(reals[0].blocks) <= 6:
        manager.swap_out(reals[0])
    calls: list[Callable[[], object]] = [
        lambda: manager.append_many([(real, 3) for real in reals]),
        lambda: manager.reorder(reals, [0] * len(reals)),
        lambda: manager.free(reals[-1]),
        lambda: manager.truncate(reals[-1], reals[-1].num_tokens // 2),
        lambda: manager.commit(part[-1].real, part[-1].tokens, dedupe=True),
        lambda: manager.swap_out(reals[-1]),
        lambda: manager.swap_in(reals[0]),
        lambda: manager.match_prefix(manager.new_sequence(), [0] * 6),
        lambda: manager.grow(15),
    ]
    cut = False
    with contextlib.suppress(ValueError):  # refused: swapped out
        cut = interrupted(rng.randrange(60), rng.choice(calls))
    manager.recover([seq.real for seq in world.seqs])
    assert all(real.is_freed for real in reals)
    for real in reals:
        manager.free(real)
    world.prefixes = {key: block for key, block in world.prefixes.items() if block in manager._index.values()}
    world.prefixes |= {
        (seq.salt, tuple(seq.tokens[: (i + 1) * 2])): manager._index[digest]
        for seq, digests in zip(part, chains(part), strict=True)
        for i, digest in enumerate(digests)
        if digest in manager._index
    }
    world.verify()
    for salt, tokens in list(world.prefixes):
        seq = manager.new_sequence(salt)
        found = manager.match_prefix(seq, tokens)
        values = [value for block in seq.blocks for value in world.memory[block]]
        assert [value[:2] for value in values] == [(salt, tokens[: i + 1]) for i in range(found)]  # type: ignore[index]
        manager.free(seq)
    manager.check()
    return cut


def chains(seqs: list[NaiveSequence]) -> list[list[bytes]]:
    """The digests of all full blocks (of two tokens), by another manager."""
    manager = BlockManager(64, 2)
    result = []
    for seq in seqs:
        real = filled(manager, seq.tokens, seq.salt)
        result.append(list(real.digests))
        manager.free(real)
    return result


@pytest.mark.parametrize("seed", range(3))
def test_recover_after_an_interrupt_anywhere(seed: int) -> None:
    """The sequences that took no part and the prefix cache keep their content, the others their blocks return."""
    rng = random.Random(seed)
    assert sum(cut_short(rng) for _ in range(300)) > 100


# ---- the rules, one by one -------------------------------------------------------------------------------------------


def filled(manager: BlockManager, tokens: list[int], salt: Salt = None) -> SequenceBlocks:
    """A committed sequence of these tokens, computed from scratch."""
    seq = manager.new_sequence(salt)
    manager.append_tokens(seq, len(tokens))
    manager.commit(seq, tokens)
    return seq


def test_digest_is_the_documented_one() -> None:
    """Stable across processes and versions: written down here a second time."""
    manager = BlockManager(4, 2)
    seq = filled(manager, [5, -1, 7, 1 << 40, 9], salt="x")
    digest = blake2b(b"2:'x'", digest_size=16).digest()
    for pair in ([5, -1], [7, 1 << 40]):
        digest = blake2b(digest + struct.pack("<2q", *pair), digest_size=16).digest()
    assert seq.num_committed_blocks == 2 and seq.digests[-1] == digest


def test_prefix_is_reused_after_free_and_only_full_blocks_match() -> None:
    manager = BlockManager(8, 4)
    first = filled(manager, list(range(10)))
    blocks = list(first.blocks)
    manager.free(first)
    assert (manager.stats().cached, manager.stats().free) == (2, 6)
    second = manager.new_sequence()
    assert manager.match_prefix(second, list(range(10))) == 8 and second.blocks == blocks[:2]
    third = manager.new_sequence()
    assert manager.match_prefix(third, list(range(8)), max_tokens=7) == 4 and third.blocks == blocks[:1]
    stats = manager.stats()
    assert (stats.queries, stats.hits, stats.query_tokens, stats.hit_tokens) == (2, 2, 17, 12)


@pytest.mark.parametrize("salts", [(None, 0), (1, "1"), ("1", b"1"), ("", None), ("a", "b"), (1, -1), (-1, -2)])
def test_salts_do_not_share(salts: tuple[Salt, Salt]) -> None:
    manager = BlockManager(8, 4)
    filled(manager, [1, 2, 3, 4], salts[0])
    assert manager.lookup_prefix([1, 2, 3, 4], salts[0]) == 4
    assert manager.lookup_prefix([1, 2, 3, 4], salts[1]) == 0


@pytest.mark.parametrize(
    "other", [[-2, 0, 0, 0], [0, -1, 0, 0], [-1, 0, 0, 1 << 32], [-1 + (1 << 32), 0, 0, 0], [0, 0, 0, -1]]
)
def test_similar_ids_do_not_collide(other: list[int]) -> None:
    """Pairs that collide under `hash` (-1, -2) or when ids are cut to 32 bits."""
    manager = BlockManager(8, 4)
    filled(manager, [-1, 0, 0, 0])
    assert manager.lookup_prefix(other) == 0


def test_a_block_matches_only_behind_its_own_prefix() -> None:
    manager = BlockManager(8, 2)
    filled(manager, [1, 1, 2, 2])
    assert manager.lookup_prefix([2, 2]) == 0
    assert manager.lookup_prefix([3, 3, 2, 2]) == 0


def test_chain_is_evicted_from_its_end_and_oldest_chain_first() -> None:
    manager = BlockManager(6, 2)
    old, new = filled(manager, [1] * 6), filled(manager, [2] * 6)
    manager.free(old)
    manager.free(new)
    taker = manager.new_sequence()
    left = []
    for _ in range(6):
        manager.append_tokens(taker, 2)
        left.append((manager.lookup_prefix([1] * 6), manager.lookup_prefix([2] * 6)))
    assert left == [(4, 6), (2, 6), (0, 6), (0, 4), (0, 2), (0, 0)]
    assert manager.stats().evictions == 6


def test_a_hit_makes_a_chain_young_again() -> None:
    manager = BlockManager(4, 2)
    manager.free(filled(manager, [1] * 4))
    manager.free(filled(manager, [2] * 4))
    again = manager.new_sequence()
    manager.match_prefix(again, [1] * 4)
    manager.free(again)
    manager.append_tokens(manager.new_sequence(), 4)
    assert (manager.lookup_prefix([1] * 4), manager.lookup_prefix([2] * 4)) == (4, 0)


def test_free_list_is_last_in_first_out() -> None:
    manager = BlockManager(4, 2)
    a, b = manager.new_sequence(), manager.new_sequence()
    manager.append_tokens(a, 4)
    manager.append_tokens(b, 2)
    assert (a.blocks, b.blocks) == ([0, 1], [2])
    manager.free(a)
    c = manager.new_sequence()
    manager.append_tokens(c, 2)
    assert c.blocks == [0]
    manager.grow(6)
    manager.append_tokens(c, 6)
    assert c.blocks == [0, 1, 3, 4]


def test_fork_copies_on_write_and_the_last_owner_writes_in_place() -> None:
    manager = BlockManager(8, 4)
    a = manager.new_sequence()
    manager.append_tokens(a, 6)
    b, c = manager.fork(a), manager.fork(a)
    assert a.blocks == b.blocks == c.blocks
    tail = a.blocks[-1]
    pairs = manager.append_many([(a, 1), (b, 1), (c, 1)])
    assert [src for src, _ in pairs] == [tail, tail]
    assert [seq.blocks[-1] for seq in (a, b, c)] == [pairs[0][1], pairs[1][1], tail]
    assert len({seq.blocks[0] for seq in (a, b, c)}) == 1
    assert manager.append_many([(a, 1), (b, 1), (c, 1)]) == []
    assert manager.stats().cow_copies == 2


def test_fork_at_a_block_boundary_needs_no_copy() -> None:
    manager = BlockManager(8, 4)
    a = manager.new_sequence()
    manager.append_tokens(a, 4)
    b = manager.fork(a)
    assert manager.append_many([(a, 1), (b, 1)]) == [] and a.blocks[0] == b.blocks[0] and a.blocks[1] != b.blocks[1]


def test_truncate_into_a_registered_block_copies_it_and_keeps_it_cached() -> None:
    manager = BlockManager(8, 4)
    seq = filled(manager, list(range(8)))
    tail = seq.blocks[1]
    manager.truncate(seq, 6)
    assert seq.num_committed_blocks == 1
    assert manager.append_tokens(seq, 0) == []
    assert manager.append_tokens(seq, 1) == [(tail, seq.blocks[1])]
    assert manager.lookup_prefix(list(range(8))) == 8
    manager.commit(seq, [0, 1, 2, 3, 4, 5, 99])
    manager.append_tokens(seq, 1)
    assert manager.commit(seq, [0, 1, 2, 3, 4, 5, 99, 7]) == []
    assert manager.lookup_prefix([0, 1, 2, 3, 4, 5, 99, 7]) == manager.lookup_prefix(list(range(8))) == 8


def test_a_sequence_that_fills_the_pool_can_still_be_cropped_and_continued() -> None:
    manager = BlockManager(2, 4)
    seq = filled(manager, list(range(8)))
    manager.truncate(seq, 7)
    assert manager.append_tokens(seq, 1) == []
    assert manager.lookup_prefix(list(range(8))) == 4
    manager.check()


def test_a_cropped_tail_is_never_a_destination_of_its_own_call() -> None:
    """The cropped registered tail is unreferenced once copied; the same call must not overwrite it."""
    manager = BlockManager(4, 4)
    seq = filled(manager, list(range(8)))
    tail = seq.blocks[1]
    manager.truncate(seq, 5)
    assert not manager.can_append([(seq, 4 * 4)])
    pairs = manager.append_tokens(seq, 7)  # copies the tail, then fills one more block: all four blocks are in use
    assert pairs == [(tail, seq.blocks[1])] and tail not in seq.blocks
    manager.check()


def test_two_cropped_tails_and_one_block_to_spare() -> None:
    """The first tail is copied; the second is written in place and must not take the first one's source."""
    manager = BlockManager(3, 4)
    a, b = filled(manager, [1] * 4), filled(manager, [2] * 4)
    manager.truncate(a, 3)
    manager.truncate(b, 3)
    assert manager.append_many([(a, 1), (b, 1)]) == [(0, 2)]
    assert (a.blocks, b.blocks) == ([2], [1])
    assert (manager.lookup_prefix([1] * 4), manager.lookup_prefix([2] * 4)) == (4, 0)
    manager.check()


def test_peak_is_the_most_ever_used() -> None:
    manager = BlockManager(4, 2)
    for token in (1, 2):
        manager.free(filled(manager, [token] * 2))
    assert (manager.stats().used, manager.stats().peak_used) == (0, 1)
    both = [manager.new_sequence(), manager.new_sequence()]
    for token, seq in enumerate(both, 1):
        manager.match_prefix(seq, [token] * 2)
    assert (manager.stats().used, manager.stats().peak_used) == (2, 2)
    manager.free(both[0])
    manager.append_tokens(both[1], 0)
    manager.match_prefix(manager.new_sequence(), [3])
    assert (manager.stats().used, manager.stats().peak_used) == (1, 2)


def test_duplicate_content_stays_private_or_is_shared_on_request() -> None:
    manager = BlockManager(8, 2)
    a, b = filled(manager, [1, 2, 3, 4]), manager.new_sequence()
    manager.append_tokens(b, 4)
    own = list(b.blocks)
    assert manager.commit(b, [1, 2, 3, 4], 2) == [(0, own[0], a.blocks[0])] and b.blocks == own
    assert manager.commit(b, [3, 4], start=2, dedupe=True) == [(1, own[1], a.blocks[1])]
    assert b.blocks == [own[0], a.blocks[1]]
    manager.check()
    manager.free(b)
    assert manager.stats().cached == 0 and manager.stats().used == 2


def test_sharing_a_cached_duplicate_counts_as_used() -> None:
    """The own block stays with the fork, the cached one comes back into use: one block more than ever before."""
    manager = BlockManager(4, 2)
    manager.free(filled(manager, [1, 2]))
    (cached,) = manager._lru
    seq = manager.new_sequence()
    manager.append_tokens(seq, 2)
    twin = manager.fork(seq)
    assert manager.commit(seq, [1, 2], dedupe=True) == [(0, twin.blocks[0], cached)]
    assert manager.stats().used == manager.stats().peak_used == 2
    manager.check()


def test_reset_forgets_and_never_registers_what_was_computed_before() -> None:
    manager = BlockManager(8, 2)
    manager.free(filled(manager, [9, 9]))
    seq = filled(manager, [1, 2, 3, 4])
    manager.reset_prefix_cache()
    assert manager.stats().cached == 0 and manager.lookup_prefix([1, 2]) == manager.lookup_prefix([9, 9]) == 0
    manager.append_tokens(seq, 2)
    twin = manager.fork(seq)
    for stale in (seq, twin):
        assert manager.commit(stale, [1, 2, 3, 4, 5, 6]) == [] and manager.lookup_prefix([1, 2, 3, 4, 5, 6]) == 0
    manager.truncate(twin, 0)
    manager.append_tokens(twin, 2)
    manager.commit(twin, [1, 2])
    assert manager.lookup_prefix([1, 2]) == 2
    manager.check()


def test_reorder_moves_forks_and_frees() -> None:
    manager = BlockManager(8, 2)
    beams = [manager.new_sequence() for _ in range(3)]
    manager.append_many([(beam, 2) for beam in beams])
    result = manager.reorder(beams, [2, 2, 0])
    assert result[0] is beams[2] and result[2] is beams[0] and result[1].blocks == beams[2].blocks
    assert result[1] is not beams[2] and beams[1].is_freed
    manager.check()
    assert manager.stats().used == 2


def test_swap_round_trip_keeps_the_table_and_shares_what_is_still_cached() -> None:
    manager = BlockManager(4, 2, num_host_blocks=4)
    seq = filled(manager, [1, 2, 3])
    device = list(seq.blocks)
    out = manager.swap_out(seq)
    assert [src for src, _ in out] == device and seq.is_swapped and seq.num_tokens == 3
    calls: list[Callable[[SequenceBlocks], object]] = [
        manager.fork,
        manager.swap_out,
        lambda s: manager.append_tokens(s, 1),
        lambda s: manager.truncate(s, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="swapped out"):
            call(seq)
    back = manager.swap_in(seq)
    assert seq.blocks[0] == device[0] and back == [(out[1][1], seq.blocks[1])]
    assert manager.swap_in(seq) == []
    manager.swap_out(seq)
    manager.free(seq)
    assert manager.stats().host_used == 0
    manager.check()


def test_a_freed_or_foreign_sequence_is_refused() -> None:
    manager, other = BlockManager(4, 2, 4), BlockManager(4, 2, 4)
    seq = manager.new_sequence()
    manager.append_tokens(seq, 3)
    calls: list[Callable[[BlockManager], object]] = [
        lambda m: m.append_tokens(seq, 1),
        lambda m: m.can_append([(seq, 1)]),
        lambda m: m.fork(seq),
        lambda m: m.reorder([seq], [0]),
        lambda m: m.truncate(seq, 0),
        lambda m: m.commit(seq, [1, 2, 3]),
        lambda m: m.match_prefix(seq, [1, 2]),
        lambda m: m.slot_mapping(seq, 0, 1),
        lambda m: m.swap_out(seq),
        lambda m: m.swap_in(seq),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="another BlockManager"):
            call(other)
    with pytest.raises(ValueError, match="another BlockManager"):
        other.free(seq)
    manager.free(seq)
    manager.free(seq)
    for call in calls:
        with pytest.raises(ValueError, match="freed"):
            call(manager)
    assert manager.stats().free == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: BlockManager(0, 2), "num_blocks"),
        (lambda m, s: BlockManager(1, 0), "block_size"),
        (lambda m, s: BlockManager(1, 1, -1), "num_host_blocks"),
        (lambda m, s: m.grow(3), "shrink"),
        (lambda m, s: m.append_tokens(s, -1), "-1"),
        (lambda m, s: m.append_many([(s, 1), (s, 1)]), "twice"),
        (lambda m, s: m.reorder([s, s], [0, 1]), "twice"),
        (lambda m, s: m.reorder([s], [1]), "indices"),
        (lambda m, s: m.reorder([s], [-1]), "indices"),
        (lambda m, s: m.truncate(s, 4), "truncate"),
        (lambda m, s: m.truncate(s, -1), "truncate"),
        (lambda m, s: m.commit(s, [1, 2, 3], 4), "commit"),
        (lambda m, s: m.commit(s, [1, 2], 3), "commit"),
        (lambda m, s: m.commit(s, [1, 2, 3], -1), "commit"),
        (lambda m, s: m.commit(s, [2, 3], start=1), "start"),
        (lambda m, s: m.commit(s, [2, 3], start=-1), "start"),
        (lambda m, s: m.match_prefix(s, [1, 2]), "empty"),
        (lambda m, s: m.lookup_prefix([1, 2], max_tokens=-1), "max_tokens"),
        (lambda m, s: m.new_sequence(1.5), "salt"),
        (lambda m, s: m.slot_mapping(s, 0, 4), "positions"),
        (lambda m, s: m.slot_mapping(s, 2, 1), "positions"),
        (lambda m, s: m.slot_mapping(s, -1, 1), "positions"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(
    call: Callable[[BlockManager, SequenceBlocks], object], message: str
) -> None:
    world = new_world(4, 2, 0)
    seq = world.manager.new_sequence()
    world.manager.append_tokens(seq, 3)
    before = world.frozen()
    with pytest.raises(ValueError, match=message):
        call(world.manager, seq)
    assert world.frozen() == before


def test_ids_that_contradict_a_registered_block_are_refused() -> None:
    manager = BlockManager(4, 2)
    a = manager.new_sequence()
    manager.append_tokens(a, 2)
    b = manager.fork(a)
    manager.commit(a, [1, 2])
    with pytest.raises(ValueError, match="other tokens"):
        manager.commit(b, [1, 3])
    manager.commit(b, [1, 2])
    manager.check()


def test_slot_mapping() -> None:
    manager = BlockManager(4, 4)
    seq, other = manager.new_sequence(), manager.new_sequence()
    manager.append_many([(seq, 3), (other, 1)])
    manager.append_tokens(seq, 6)
    assert seq.blocks == [0, 2, 3]
    slots = [0, 1, 2, 3, 8, 9, 10, 11, 12]
    for start in range(10):
        for stop in range(start, 10):
            assert manager.slot_mapping(seq, start, stop) == slots[start:stop]


def test_check_sees_damage() -> None:
    """Each invariant, broken by hand."""

    def broken(damage: Callable[[BlockManager, SequenceBlocks], object]) -> None:
        manager = BlockManager(8, 2, 4)
        manager.free(filled(manager, [7, 7]))
        swapped = filled(manager, [8, 8])
        manager.swap_out(swapped)
        seq = filled(manager, [1, 2, 3, 4, 5])
        manager.check()
        damage(manager, seq)
        with pytest.raises(AssertionError):
            manager.check()

    for damage in (
        lambda m, s: m._refs.__setitem__(s.blocks[0], 2),
        lambda m, s: s.blocks.pop(),
        lambda m, s: m._free.pop(),
        lambda m, s: m._free.append(m._free[0]),
        lambda m, s: m._free.append(next(iter(m._lru))),
        lambda m, s: m._lru.clear(),
        lambda m, s: m._lru.update({s.blocks[0]: None}),
        lambda m, s: m._index.clear(),
        lambda m, s: m._digest_of.__setitem__(s.blocks[0], None),
        lambda m, s: m._unregister(next(iter(m._lru))),
        lambda m, s: setattr(s, "num_tokens", 9),
        lambda m, s: s.digests.reverse(),
        lambda m, s: s.host_blocks.append(0),
        lambda m, s: m.host.take(1),
        lambda m, s: setattr(m, "_peak_used", 0),
        lambda m, s: setattr(s, "is_freed", True),
    ):
        broken(damage)


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def test_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Costs are printed; the bounds are 10 to 20 times what a slow core needs, and hold at any pool size."""
    ids = list(range(32_768))
    lines = []
    for num_blocks in (4_096, 262_144):
        manager = BlockManager(num_blocks, 16)
        prompt = manager.new_sequence()
        manager.append_tokens(prompt, len(ids))
        begin = time.perf_counter()
        manager.commit(prompt, ids)
        commit = time.perf_counter() - begin
        lookup = fastest(partial(manager.lookup_prefix, ids))
        manager.free(prompt)
        batch = [(manager.new_sequence(), 1) for _ in range(32)]

        def decode(manager: BlockManager = manager, batch: list[tuple[SequenceBlocks, int]] = batch) -> None:
            for _ in range(256):
                manager.append_many(batch)

        append = fastest(decode) / (256 * 32)
        lines.append(
            f"{num_blocks} blocks: append {append * 1e9:.0f} ns a token and sequence, "
            f"32k prompt: commit {commit * 1e3:.2f} ms, lookup {lookup * 1e3:.2f} ms"
        )
        assert append < 10e-6 and commit < 50e-3 and lookup < 50e-3
    with capsys.disabled():
        print("\n" + "\n".join(lines))
