"""Which rows share what: by example, and against trying every partition of a small batch."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pagedkv.kv.shared import Group, common_blocks, find_groups


def find(*tables: list[int], tokens: int = 1000) -> list[tuple[int, int, int]]:
    """Groups of rows whose tables are so long that only they decide."""
    return [(group.start, group.count, group.blocks) for group in find_groups(tables, [tokens] * len(tables), 4)]


def test_common_blocks() -> None:
    assert common_blocks([1, 2, 3], [1, 2, 4], 9) == 2
    assert common_blocks([1, 2, 3], [1, 2, 3], 9) == 3
    assert common_blocks([1, 2, 3], [1, 2, 3], 1) == 1
    assert common_blocks([1, 2, 3], [1, 2, 3], 0) == 0
    assert common_blocks([1, 2, 3], [5, 2, 3], 9) == 0
    assert common_blocks([1, 9, 3], [1, 2, 3], 9) == 1  # what is equal behind a difference does not count
    assert common_blocks([], [1], 9) == 0


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40), st.integers(0, 50))
def test_common_blocks_of_any_tables(a: list[int], b: list[int], limit: int) -> None:
    wanted = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
    assert common_blocks(a, b, limit) == min(wanted, limit)


def test_groups() -> None:
    assert find() == find([1, 2]) == find([1, 2], [3, 4]) == []
    assert find([1, 2, 3], [1, 2, 4], [1, 2, 5]) == [(0, 3, 2)]
    assert find([1, 2], [3, 4], [3, 5], [6]) == [(1, 2, 1)]
    assert find([1, 2], [1, 3], [4, 5], [4, 6]) == [(0, 2, 1), (2, 2, 1)]
    # a system prompt of one block, and prompts of three more with two rows each: the longer prefixes save more
    assert find([1, 2, 3, 4, 9], [1, 2, 3, 4, 8], [1, 5, 6, 7, 9], [1, 5, 6, 7, 8]) == [(0, 2, 4), (2, 2, 4)]
    # of three blocks, and prompts of one more: the shorter one does
    assert find([1, 2, 3, 4, 9], [1, 2, 3, 4, 8], [1, 2, 3, 7, 9], [1, 2, 3, 7, 8]) == [(0, 4, 3)]


def test_only_whole_blocks_in_front_of_the_last_token_are_shared() -> None:
    assert find([1, 2, 3], [1, 2, 3], tokens=12) == [(0, 2, 2)]
    assert find([1, 2, 3], [1, 2, 3], tokens=9) == [(0, 2, 2)]
    assert find([1, 2, 3], [1, 2, 3], tokens=8) == [(0, 2, 1)]
    assert find([1], [1], tokens=4) == find([], [], tokens=0) == []
    assert find_groups([[1, 2, 3], [1, 2]], [12, 8], 4) == [Group(0, 2, 1)]


@settings(max_examples=300)
@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), max_size=7))
def test_no_other_groups_save_more(tables: list[list[int]]) -> None:
    # what the tables begin with in common is all that counts: names of blocks that tell the path apart
    named = [[hash(tuple(table[: i + 1])) for i in range(len(table))] for table in tables]
    groups = find_groups(named, [17] * len(tables), 4)
    rows = [row for group in groups for row in range(group.start, group.start + group.count)]
    assert rows == sorted(set(rows))
    for group in groups:
        own = named[group.start : group.start + group.count]
        assert group.count > 1
        assert group.blocks > 0
        assert all(table[: group.blocks] == own[0][: group.blocks] for table in own)

    def save(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(named)]
        saved = 0
        for a, b in itertools.pairwise(edges):
            common = min((common_blocks(named[a], named[row], 4) for row in range(a, b)), default=0)
            saved += max(0, b - a - 1) * common
        return saved

    inner = range(1, len(named))
    best = max(save(cuts) for n in range(len(named)) for cuts in itertools.combinations(inner, n)) if named else 0
    assert sum(group.saved for group in groups) == best


def test_many_rows_that_share_ever_more() -> None:
    rows = 500
    tables = [[*range(row + 1), -row - 1] for row in range(rows)]
    groups = find_groups(tables, [100000] * rows, 4)
    assert sum(group.saved for group in groups) >= 250 * 249  # those of the second half as one
