"""Which rows of a batch begin with the same blocks, so that attention reads those once for all of them.

Blocks are shared where one prompt has several rows (beams, several returns) and where prompts begin alike. Only
neighbouring rows are put into one group. Plain Python: it runs once for each batch and again when its tables change.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Neighbouring rows `start` .. `start + count` whose tables begin with the same `blocks` blocks."""

    start: int
    count: int
    blocks: int

    @property
    def saved(self) -> int:
        """Blocks that need not be read again."""
        return (self.count - 1) * self.blocks


def common_blocks(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """With how many equal blocks two tables begin, `limit` at most."""
    limit = min(limit, len(a), len(b))
    if limit <= 0 or a[0] != b[0]:
        return 0
    equal, unequal = 1, limit + 1  # a[:equal] are equal, a[:unequal] are not
    middle = limit  # most often it is all or nothing
    while unequal - equal > 1:
        if a[equal:middle] == b[equal:middle]:
            equal = middle
        else:
            unequal = middle
        middle = (equal + unequal) // 2
    return equal


def find_groups(tables: Sequence[Sequence[int]], tokens: Sequence[int], block_size: int) -> list[Group]:
    """Groups that save the most reads, each row in one at most.

    Args:
        tables: the blocks of each row.
        tokens: of each row; whole blocks in front of the last token can be shared.
    """
    whole = [(n - 1) // block_size for n in tokens]
    common = [
        common_blocks(tables[row], tables[row + 1], min(whole[row], whole[row + 1])) for row in range(len(tables) - 1)
    ]
    return _best(common)


def _best(common: list[int]) -> list[Group]:
    """The groups, from what each row has in common with the next. Rows are cut apart only where less is common than
    on a side of the cut; between such places (there are none if all rows share the same) each run stays together."""
    last = len(common)
    cuts = [
        k for k, n in enumerate(common) if not n or (k and n < common[k - 1]) or (k + 1 < last and n < common[k + 1])
    ]
    edges = [-1, *cuts, last]  # run i is the rows edges[i] + 1 .. edges[i + 1]
    inside = [min(common[a + 1 : b], default=None) for a, b in itertools.pairwise(edges)]
    saved = [0]  # by the first runs
    groups: list[Group | None] = []  # which ends with each run
    begins: list[int] = []  # and the run that it begins with
    for run, least in enumerate(inside):
        best, group, begin = saved[run], None, run
        for first in range(run, -1, -1):  # runs first .. run together
            if first < run:
                joined = [n for n in (least, common[edges[first + 1]], inside[first]) if n is not None]
                least = min(joined)
            if least is not None:
                together = Group(edges[first] + 1, edges[run + 1] - edges[first], least)
                if saved[first] + together.saved > best:
                    best, group, begin = saved[first] + together.saved, together, first
                if not least:
                    break
        saved.append(best)
        groups.append(group)
        begins.append(begin)
    found: list[Group] = []
    run = len(groups) - 1
    while run >= 0:
        group = groups[run]
        if group is not None:
            found.append(group)
        run = begins[run] - 1
    return found[::-1]
