"""The tensors of one forward pass over a paged cache: what each layer needs, made once for all of them.

A decode step's tensors are handed out and taken back (`DecodeSteps`) rather than made for each sequence of steps, so
that a captured CUDA graph, whose addresses are fixed, fits the next `generate()` of the same batch size, too.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo import mark_static_address

#: blocks a row of a decode step's table has room for at least: tables of one shape fit one compiled graph, and unused
#: entries cost nothing but their memory (16,384 tokens in blocks of 16: 4 KiB a row)
_DECODE_TABLE = 1024


@dataclass(frozen=True)
class PagedStep:
    """What every layer of one forward pass needs; tensors on the model's device, S rows of Q columns.

    Attributes:
        block_tables: int32 [S, W].
        seq_lens: int32 [S], KV length of each row, this step's tokens included.
        query_start: int32 [S], first packed query row: b * Q + pads.
        query_len: int32 [S].
        slot_mapping: int64 [S * Q], where each column is written; -1: a pad, or a token that is in the cache already.
        columns: int64 [], columns of the padded batch in the cache before this step.
        groups: int32 [3, S // 2] of a decode step: first row, rows and shared tokens of each group of rows that begin
            with the same blocks (`SharedPrefixes`); what is not used is 0.
    """

    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    query_len: Tensor
    slot_mapping: Tensor
    columns: Tensor
    groups: Tensor | None = None


@dataclass(frozen=True)
class SharedPrefixes:
    """Groups of neighbouring rows that begin with the same blocks, for `paged_attention_cascade`.

    Attributes:
        group_start, group_len, prefix_lens: int32 [G], in the step's `groups`: a captured graph finds there what is
            true at its replay, and attends to rows plainly that are in no group any more.
        max_group_len: the largest of group_len.
        longest: tokens of the longest row when the groups were found.
    """

    group_start: Tensor
    group_len: Tensor
    prefix_lens: Tensor
    max_group_len: int
    longest: int

    def serves(self, sliding_window: int | None) -> bool:
        """Whether a layer with this window gains: the groups are of no use once a row is longer than it."""
        return not sliding_window or sliding_window >= self.longest


@dataclass(frozen=True)
class DenseView:
    """Where the tokens of a padded batch of B rows lie in dense keys and values.

    Attributes:
        starts: int32 [B], the gathered row at which each sequence begins.
        place: int64 [B, columns], which of its tokens each column shows; None: the gathered rows are the columns.
        shown: bool [B, columns, 1, 1], which columns are tokens; with `place`.
    """

    starts: Tensor
    place: Tensor | None = None
    shown: Tensor | None = None


class DecodeSteps:
    """Decode steps that no cache uses now, by batch size; the one given back last is taken first."""

    def __init__(self) -> None:
        self._free: dict[int, list[PagedStep]] = collections.defaultdict(list)

    def take(self, batch: int, width: int, device: torch.device) -> PagedStep:
        """A step for `batch` rows with tables at least `width` blocks wide; what it says is old, but `query_start` and
        `query_len`."""
        free = self._free[batch]
        if free and free[-1].block_tables.shape[1] >= width:
            return free.pop()
        free.clear()  # too narrow: others would be, too
        wide = max(_DECODE_TABLE, 1 << (width - 1).bit_length())
        with torch.inference_mode(False):  # it is written outside of it, too
            rows = torch.arange(batch, dtype=torch.int32, device=device)
            step = PagedStep(
                block_tables=torch.zeros(batch, wide, dtype=torch.int32, device=device),
                seq_lens=torch.zeros_like(rows),
                query_start=rows,
                query_len=torch.ones_like(rows),
                slot_mapping=torch.full((batch,), -1, dtype=torch.int64, device=device),
                columns=torch.zeros((), dtype=torch.int64, device=device),
                groups=torch.zeros(3, batch // 2, dtype=torch.int32, device=device),
            )
        for tensor in vars(step).values():
            mark_static_address(tensor)
        return step

    def give_back(self, step: PagedStep) -> None:
        """The step may be taken again."""
        self._free[step.seq_lens.shape[0]].append(step)
