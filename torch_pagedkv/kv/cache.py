"""`PagedCache`: a `transformers.Cache` whose keys and values lie in the blocks of a `CacheManager`.

Columns and tokens. transformers counts columns of a padded batch; the cache stores tokens. `get_seq_length()` is the
number of columns, and of row b only the unmasked columns are stored, one behind the other, so position p of row b is
its p-th unmasked token, in block p // block_size of the row's table.

A forward pass is *planned* first (`plan`, called by the patched model, outside of compiled code): blocks are taken,
shared ones copied, and the step's tables and slots written to the device, once for all layers. `update()` then only
writes keys and values, and returns

- in a *paged* step a `PagedLayer` as both key and value, which the patched attention understands;
- in a *dense* step ordinary tensors [B, Hkv, columns, D], gathered from the blocks, so that any attention function with
  any mask works: custom masks, tokens hidden after they were stored, rows whose new columns are not one run, layers
  whose pattern is known from the mask alone.

A plan counts as carried out when the forward pass has returned. One that was not (an exception, an interrupt, inputs
prepared but not used) is undone by the next plan, and its blocks never enter the prefix index.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from .. import ops
from .blocks import Salt, SequenceBlocks
from .manager import CacheManager
from .step import DenseView, PagedStep, SharedPrefixes

_MIN_TABLE = 8  # blocks a row of a prompt's table has room for at least


class PagedLayer(NamedTuple):
    """One layer's cache and the step: key and value at once for an attention function that reads pages."""

    key_cache: Tensor  # [num_blocks, block_size, Hkv, D]
    value_cache: Tensor
    k_scale: Tensor | None  # float32 [num_blocks, block_size, Hkv] of a quantised cache
    v_scale: Tensor | None
    step: PagedStep
    value_dim: int | None = None  # elements of a value, if fewer than of a key
    shared: SharedPrefixes | None = None  # of a decode step's rows, where it pays to attend to them once
    batch_invariant: bool = False

    def to(self, *args: Any, **kwargs: Any) -> PagedLayer:
        """Itself: layers that share keys and values say `.to(device)`, and a patched model is on one."""
        return self


def active_layer(cache: object, layer_idx: int) -> PagedLayer | None:
    """The layer's pages if `cache` runs a paged step for it now, else None: then the stock forward must run."""
    return cache.layer(layer_idx) if isinstance(cache, PagedCache) and cache.is_paged(layer_idx) else None


class PagedCache(Cache):
    """Keys and values of one batch, in the blocks of a patched model's cache.

    `generate()` of a patched model makes one by itself. Make one for a loop of your own, and pass it as
    `past_key_values` to the patched model::

        cache = PagedCache(model)
        logits = model(input_ids, attention_mask=mask, past_key_values=cache).logits

    Dropping the last reference frees the blocks; `copy.deepcopy` shares them until one of the two writes.

    Args:
        owner: a patched model, or its `CacheManager`.
        expected_tokens: columns that the cache will probably reach; tables are made that wide at once.

    Raises:
        ValueError: `owner` is not patched.
    """

    #: False: transformers shall not build the masks of a static cache for it. Compiled it can be all the same.
    is_compileable = False

    def __init__(self, owner: Any, *, expected_tokens: int = 0) -> None:
        super().__init__(layers=[])
        manager = owner if isinstance(owner, CacheManager) else getattr(owner, "paged_cache", None)
        if not isinstance(manager, CacheManager):
            raise ValueError(f"owner: got {type(owner).__name__}, needs a model patched by torch_pagedkv.patch()")
        self.manager = manager
        self.epoch = manager.epoch
        self.pending = False  # a plan is waiting for its forward pass
        self.dense = False  # of the planned step
        self.trusted = False  # masks beyond those expected are all ones: generate() appends them
        self.cacheable = True  # finished blocks may be found by others
        self.defers_stop = False  # generate() may find out a step late that it is at its end
        self.is_recorded = False  # the forward pass now is one that a graph will repeat
        self.step: PagedStep | None = None
        self.shared: SharedPrefixes | None = None  # in the decode step in use
        #: set by the rotary patch: a rotation that the next `update()` carries out in the same kernel as the write
        self.pending_rotary: Any = None
        #: cos and sin as the model gives them, and as the kernels want them, for the layers of one forward pass
        self.rotary_angles: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._num_blocks_wide = max(_MIN_TABLE, -(-expected_tokens // manager.block_size))  # of a decode step's table
        self._seqs: list[SequenceBlocks] = []  # never rebound: the manager knows it
        self._requests: list[tuple[SequenceBlocks, int]] = []  # one more token for each
        self._base = 0  # columns before the planned step
        self._queries = 0  # columns of the planned step
        self._tokens: list[int] = []  # of each row behind the planned step
        self._before: list[int] = []  # `num_tokens` of each sequence before the planned step, to undo it
        self._skipped_of = 0  # columns of a prompt whose beginning `start` skipped, until its first plan
        self._begun: list[int] = []  # `_tokens` before the planned step
        self._given: list[int] = []  # leading tokens that are in the cache without a write of this row's
        self._mask: Tensor | None = None  # bool [B, N] on the host: which of the first N columns are tokens; others are
        self._hidden = False  # a mask hides tokens that are stored
        self._gapped = False  # some row has a pad between two tokens
        self._regular = False  # every row's last column is a token: decoding needs no look at masks
        self._stale = True  # the decode step's tables are not those of the sequences
        self._commit_due = False
        self._held: list[PagedStep] = []  # the decode step in use, if any; never rebound: the manager knows it
        self._view: DenseView | None = None  # of the planned step, if a layer needs it
        # [columns before the step, columns after it, gathered rows of a sequence]: of these only the shape is used. A
        # compiled graph leaves a tensor's sizes open, but takes each new value of an int for a reason to compile again.
        self._extent: Tensor | None = None
        self._ids: Tensor | None = None  # [B, columns] the token ids seen, on any device
        self._finalizer = manager.watch(self, self._seqs, self._held)

    # ---- planning ----------------------------------------------------------------------------------------------------

    def start(
        self,
        input_ids: Tensor | None,
        mask: Tensor | None,
        *,
        batch: int,
        columns: int,
        salt: Salt = None,
        match: bool = True,
        skip: bool = True,
    ) -> None:
        """Takes the blocks of a prompt, sharing what is cached, before anything is computed.

        Afterwards `get_seq_length()` is the first column that any row needs to compute (0 without `skip`).

        Args:
            input_ids: [B, columns]; None: unknown, or keys and values depend on more than they: nothing is shared.
            mask: [B, columns] attention mask, or None: no pads.
            match: look up prefixes of earlier sequences, and register this one's.
            skip: leave out leading columns that are cached in every row.

        Raises:
            CacheFullError: the prompt does not fit; the cache is empty.
        """
        with self.manager.lock:
            blocks = self.manager.blocks
            self.manager.drain()
            self.expect(mask, batch, columns)
            self.cacheable = match and input_ids is not None
            self._ids = input_ids
            rows = [] if input_ids is None else self._row_ids(columns)
            lengths = self._row_lengths(batch, columns)
            regular = not any(map(self._is_irregular, range(batch)))
            owners: dict[tuple[int, ...], int] = {}  # a whole prompt -> the row that stores it
            matched: list[int] = []
            try:
                for row, length in enumerate(lengths):
                    pads = columns - length
                    key = (pads, *rows[row]) if rows and regular else (-1, row)
                    if key in owners:  # beams and several returns: one prompt, stored once
                        self._seqs.append(blocks.fork(self._seqs[owners[key]]))
                        self._given.append(length)
                        matched.append(matched[owners[key]])
                        continue
                    owners[key] = row
                    seq = blocks.new_sequence(salt)
                    self._seqs.append(seq)
                    found = 0
                    if self.cacheable and length and not self._pads_matter(row, pads):
                        found = blocks.match_prefix(seq, rows[row], max_tokens=length - 1)
                    self._given.append(found)
                    matched.append(found)
                    self.manager.append([(seq, length - found)])
                if skip and regular and not (self.manager.rules.pads_shift_positions and min(lengths) < columns):
                    self._base = min((columns - n + m for n, m in zip(lengths, matched)), default=0)
                    self._base = max(0, min(self._base, columns - 1))
                    self._skipped_of = columns if self._base else 0
                self._tokens = [max(0, self._base - (columns - n)) for n in lengths]
                self._requests = [(seq, 1) for seq in self._seqs]
            except BaseException:
                self.release(commit=False)
                raise

    def expect(self, mask: Tensor | None, batch: int, columns: int) -> None:
        """Notes which of the first `columns` columns are tokens.

        Args:
            mask: [B, columns] attention mask, or None: all of them.

        Raises:
            ValueError: the mask's shape does not fit, or it shows a column that was stored as a pad.
        """
        base = self.columns
        if mask is not None and (mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < columns):
            raise ValueError(
                f"attention_mask: got shape {list(mask.shape)}, needs [{batch}, {columns}]: {base} columns in the "
                f"cache and {columns - base} new ones"
            )
        old = self._stored(base, batch)
        if mask is None:
            new = torch.ones(batch, columns, dtype=torch.bool) if self._mask is not None else None
        else:
            new = mask[:, :columns].to("cpu", torch.bool)
            if self._mask is None and bool(new.all()):
                new = None
        if new is None:
            self._hidden = False
            return
        seen = new[:, :base]
        if bool((seen & ~old).any()):
            raise ValueError(
                "attention_mask: it shows a column that was a pad when it was processed, so its keys and values were "
                "not stored; pass the same mask, extended, in every call"
            )
        self._hidden = bool((old & ~seen).any())
        self._mask = torch.cat([old, new[:, base:]], 1)

    def plan(self, batch: int, queries: int, *, dense: bool = False) -> None:
        """Prepares one forward pass over the next `queries` columns.

        Args:
            dense: give every layer dense keys and values.

        Raises:
            CacheFullError: too few blocks; nothing is changed.
            ValueError: the batch is not that of the cache.
            RuntimeError: the cache's pool is gone.
        """
        manager = self.manager
        with manager.lock:
            if self.epoch != manager.epoch and not self._seqs:  # empty: it takes the new pool
                self._finalizer.detach()
                self.epoch = manager.epoch
                self._held.clear()  # of the old device, maybe
                self._finalizer = manager.watch(self, self._seqs, self._held)
            if self.epoch != manager.epoch:
                raise RuntimeError("the KV cache was reset or moved after this PagedCache was made: make a new one")
            if manager._dropped:
                manager.drain()
            self.undo()
            if self._skipped_of and self.columns + queries > self._skipped_of:
                self.rewind()  # a loop that feeds the whole prompt although the cache has its beginning
            self._skipped_of = 0
            if self._commit_due:
                self.commit()
            if not self._seqs:
                self._seqs.extend(manager.blocks.new_sequence() for _ in range(batch))
                self._tokens, self._given = [0] * batch, [0] * batch
                self._requests = [(seq, 1) for seq in self._seqs]
            elif batch != len(self._seqs):
                raise ValueError(f"the batch has {batch} rows, the PagedCache {len(self._seqs)}")
            if queries == 1 and not dense and not self._hidden and self._can_count():
                self._plan_next()
            else:
                self._plan_columns(queries, dense or self._hidden)

    def _can_count(self) -> bool:
        """Whether the next column is one token more in every row, and the step stays paged."""
        rules = self.manager.rules
        return (
            self._regular
            and (self._mask is None or self._mask.shape[1] <= self.columns)
            and not (self._gapped and rules.gaps_dense)
            and (rules.dense_after is None or max(self._tokens) < rules.dense_after)
        )

    def _plan_next(self) -> None:
        """One token for each row: the tables change only where a block begins."""
        seqs, manager = self._seqs, self.manager
        before = [seq.num_tokens for seq in seqs]
        copied = manager.append(self._requests)
        self._note_plan(before, [n + 1 for n in before], 1)
        self.dense = False
        if copied or self._stale or not self._held:
            self._fill_decode()
            return
        manager.shared_steps += self.shared is not None
        step = self._held[0]
        step.seq_lens.add_(1)
        step.slot_mapping.add_(1)
        step.columns.fill_(self._base)
        size = manager.block_size
        began = [row for row, n in enumerate(before) if n % size == 0]
        if began:
            columns = [before[row] // size for row in began]
            if max(columns) >= step.block_tables.shape[1]:
                self._fill_decode()
                return
            taken = [seqs[row].blocks[-1] for row in began]
            rows, places, new = self._to_device([began, columns, taken], torch.int64).unbind()
            step.block_tables[rows, places] = new.int()
            step.slot_mapping[rows] = new * size
        self._look()

    def _fill_decode(self) -> None:
        """Writes the decode step anew, into the same tensors as long as they are large enough."""
        seqs, size = self._seqs, self.manager.block_size
        tables = self._tables()
        if self._held and self._held[0].block_tables.shape[1] < tables.shape[1]:
            self._held.clear()
        if not self._held:
            wide = max(tables.shape[1], self._num_blocks_wide)
            self._held.append(self.manager.decode_steps.take(len(seqs), wide, self.manager.device))
        step = self._held[0]
        step.block_tables[:, : tables.shape[1]] = tables
        step.seq_lens.copy_(self._to_device(self._tokens, torch.int32))
        slots = [seq.blocks[-1] * size + (seq.num_tokens - 1) % size for seq in seqs]
        step.slot_mapping.copy_(self._to_device(slots, torch.int64))
        step.columns.fill_(self._base)
        self.step = step
        self.shared = self._find_shared()
        self._stale = False
        self._look()

    def _find_shared(self) -> SharedPrefixes | None:
        """Groups of rows whose common prefix is worth attending to once, as long as their tables stay."""
        manager, groups = self.manager, self._held[0].groups
        assert groups is not None
        if not manager.can_share_reads:
            return None
        groups.zero_()
        found = manager.shareable(self._seqs, self._tokens)
        if not found:
            return None
        rows = [group.count for group in found]
        tokens = [group.blocks * manager.block_size for group in found]
        groups = groups[:, : len(found)]
        groups.copy_(self._to_device([[group.start for group in found], rows, tokens], torch.int32))
        manager.shared_steps += 1
        return SharedPrefixes(groups[0], groups[1], groups[2], max(rows), max(self._tokens))

    def _look(self) -> None:
        """Finds out where the dense keys and values of the planned step lie, if a layer needs them."""
        rules = self.manager.rules
        self._view = self._extent = None
        if not (self.dense or rules.dense_layers or rules.real_masks):
            return
        columns, batch = self._base + self._queries, len(self._seqs)
        width = columns if not self._gapped else max(self._tokens, default=0)
        self._extent = torch.empty(1, device=self.manager.device).expand(self._base, columns, width)
        if not (self.dense or rules.dense_layers):
            return
        stored = self._stored(columns, batch) if self._mask is not None else None
        starts = torch.arange(batch) * width
        place = shown = None
        if stored is not None and not self._gapped:
            starts += stored.int().argmax(1) * stored.any(1)
        elif stored is not None:  # token p of a row belongs to its p-th stored column
            place = (stored.cumsum(1) - 1).clamp(min=0).to(self.manager.device)
            shown = stored.to(self.manager.device)[..., None, None]
        self._view = DenseView(starts.to(self.manager.device, torch.int32), place, shown)

    def _plan_columns(self, queries: int, dense: bool) -> None:
        """The general case: any number of columns, pads anywhere, rows ahead of what they have computed."""
        manager, seqs, rules = self.manager, self._seqs, self.manager.rules
        base, batch = self.columns, len(self._seqs)
        new = self._stored(base + queries, batch)[:, base:] if self._mask is not None else None
        if new is None or bool(new.all()):
            starts, counts, one_run = [0] * batch, [queries] * batch, True
            new = None
        else:
            counts = new.sum(1).tolist()
            starts = new.int().argmax(1).tolist()
            ends = (queries - new.flip(1).int().argmax(1)).tolist()
            one_run = all(n in (0, end - start) for n, start, end in zip(counts, starts, ends))
        gapped = self._gapped or not one_run or self._makes_gap(base, starts, counts)
        before = [seq.num_tokens for seq in seqs]
        begun = self._tokens
        totals = [n + count for n, count in zip(begun, counts)]
        requests = [(seq, n - seq.num_tokens) for seq, n in zip(seqs, totals) if n > seq.num_tokens]
        manager.append(requests)

        slots = torch.full((batch, queries), -1, dtype=torch.int64)
        for row, (seq, start, count) in enumerate(zip(seqs, starts, counts)):
            given = self._given[row]
            skipped = min(count, max(0, given - begun[row]))
            if count > skipped:
                written = manager.blocks.slot_mapping(seq, begun[row] + skipped, totals[row])
                where = slice(start, start + count) if one_run or new is None else new[row].nonzero()[:, 0]
                own = torch.tensor([-1] * skipped + written, dtype=torch.int64)
                slots[row, where] = own
        self._note_plan(before, totals, queries)
        self._gapped = gapped
        self._regular = (
            one_run
            and all(start + count == queries for start, count in zip(starts, counts))
            and totals == [seq.num_tokens for seq in seqs]  # else a chunk of a prompt whose blocks were taken at once
        )
        self._commit_due = self.cacheable
        self._stale = True
        self.dense = (
            dense
            or not one_run
            or (gapped and rules.gaps_dense)
            or (rules.dense_after is not None and max(totals, default=0) > rules.dense_after)
            or self._continues_pads(base + queries)
        )
        if queries == 1 and self._regular and all(n >= given for n, given in zip(begun, self._given)):
            self._fill_decode()  # the buffers that later steps count up
            return
        row_starts = [row * queries + start for row, start in enumerate(starts)]
        seq_lens, first, numbers = self._to_device([totals, row_starts, counts], torch.int32).unbind()
        slot_mapping = slots.flatten().to(manager.device, non_blocking=True)
        columns = self._to_device(self._base, torch.int64)
        self.shared = None
        self.step = PagedStep(self._tables(), seq_lens, first, numbers, slot_mapping, columns)
        self._look()

    def _note_plan(self, before: list[int], totals: list[int], queries: int) -> None:
        self._base, self._queries = self.columns, queries
        self._before, self._begun, self._tokens = before, self._tokens, totals
        self.pending = True

    def undo(self) -> None:
        """Takes back a plan whose forward pass did not happen or did not finish."""
        if not self.pending or self.epoch != self.manager.epoch:
            return
        self.pending_rotary = None
        self.rotary_angles.clear()
        self.pending, self._queries = False, 0
        for seq, n in zip(self._seqs, self._before):
            self.manager.blocks.truncate(seq, n)
        self._tokens = self._begun
        self._stale, self._regular, self._commit_due = True, False, False

    def fits(self, batch: int, queries: int) -> bool:
        """Whether the planned step is that of a forward pass over so many rows and columns."""
        return batch == len(self._seqs) and queries == self._queries

    def has_room(self) -> bool:
        """Whether another token for each row fits the pool as it is."""
        manager = self.manager
        with manager.lock:
            if self.epoch != manager.epoch:
                return False
            blocks = manager.blocks
            # a row takes one block at most: a new one, or a copy of its last
            return blocks.num_available >= len(self._seqs) or blocks.can_append(self._requests)

    def restart(self) -> None:
        """Frees everything but the knowledge of pads: the same columns will be computed again."""
        mask = self._mask
        self.release(commit=False)
        self._mask = mask

    def rewind(self) -> None:
        """Makes the whole prompt be computed again after `start` skipped cached columns (they are not written)."""
        self._base, self._queries = 0, 0
        self._tokens = [0] * len(self._seqs)

    # ---- masks -------------------------------------------------------------------------------------------------------

    def _stored(self, columns: int, batch: int) -> Tensor:
        """bool [B, columns] on the host: which columns are tokens."""
        if self._mask is None:
            return torch.ones(batch, columns, dtype=torch.bool)
        extra = columns - self._mask.shape[1]
        if extra <= 0:
            return self._mask[:, :columns]
        return torch.cat([self._mask, torch.ones(batch, extra, dtype=torch.bool)], 1)

    def _row_lengths(self, batch: int, columns: int) -> list[int]:
        return [columns] * batch if self._mask is None else self._stored(columns, batch).sum(1).tolist()

    def _is_irregular(self, row: int) -> bool:
        """Whether a row is anything else than pads on the left and tokens on the right."""
        return self._mask is not None and bool((self._mask[row, 1:] < self._mask[row, :-1]).any())

    def _pads_matter(self, row: int, pads: int) -> bool:
        return self._is_irregular(row) or (pads > 0 and self.manager.rules.pads_shift_positions)

    def _makes_gap(self, base: int, starts: list[int], counts: list[int]) -> bool:
        """Whether a token of this step follows a pad that follows a token of its row."""
        if self._mask is None or not base:
            return False
        last = self._stored(base, len(starts))[:, -1].tolist()
        return any(
            count and begun and (start or not token)
            for start, count, begun, token in zip(starts, counts, self._tokens, last)
        )

    def _continues_pads(self, columns: int) -> bool:
        """Whether generate() goes on from a pad: right-padded prompts. Stock models sample from what the pad attends
        to, and a paged step gives pads nothing."""
        mask = self._mask
        return self.trusted and mask is not None and mask.shape[1] == columns and not bool(mask[:, -1].all())

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def _to_device(self, values: Sequence[Any] | int, dtype: torch.dtype) -> Tensor:
        if self.manager.device.type == "cpu":
            return torch.tensor(values, dtype=dtype)
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self.manager.device, non_blocking=True)

    def _tables(self) -> Tensor:
        """int32 [S, W] block tables; unused entries are 0 and never read."""
        longest = max((len(seq.blocks) for seq in self._seqs), default=0)
        wide = max(_MIN_TABLE, longest)
        return self._to_device([seq.blocks + [0] * (wide - len(seq.blocks)) for seq in self._seqs], torch.int32)

    # ---- what layers call --------------------------------------------------------------------------------------------

    def is_paged(self, layer_idx: int) -> bool:
        """Whether the planned step lets this layer attend in the pages."""
        return self.pending and not self.dense and layer_idx not in self.manager.rules.dense_layers

    @property
    def takes_rotary(self) -> bool:
        """Whether `update()` may be handed a rotation: the planned step is paged in every layer."""
        return self.pending and not self.dense and not self.manager.rules.dense_layers

    def layer(self, layer_idx: int) -> PagedLayer:
        """The layer's tensors and the planned step.

        Raises:
            RuntimeError: no step is planned.
        """
        if not self.pending or self.step is None:
            raise RuntimeError(
                "this PagedCache has no step planned: pass it to the patched model itself, not to a part of it or to "
                "an unpatched model"
            )
        pool = self.manager.pool
        # Not in a compiled graph, which would be another one with groups than without.
        shared = None if torch.compiler.is_compiling() else self.shared
        k_scale = pool.key_scales[layer_idx] if pool.is_quantized else None
        v_scale = pool.value_scales[layer_idx] if pool.is_quantized else None
        return PagedLayer(
            pool.key_caches[layer_idx],
            pool.value_caches[layer_idx],
            k_scale,
            v_scale,
            self.step,
            pool.specs[layer_idx].value_dim,
            shared,
            self.manager.config.batch_invariant,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Writes the step's keys and values.

        Args:
            key_states, value_states: [B, Hkv, Q, D].

        Returns:
            A `PagedLayer` twice in a paged step, else all keys and values, [B, Hkv, columns, D] in key_states' dtype.
        """
        layer = self.layer(layer_idx)
        dtype = self.manager.dtype
        value = _rows(value_states, dtype)
        if layer.value_dim is not None:
            value = F.pad(value, (0, layer.key_cache.shape[-1] - layer.value_dim))
        rotary, self.pending_rotary = self.pending_rotary, None
        if rotary is not None and rotary.key_states is not key_states:
            raise RuntimeError("the key states are not those of the rotation handed on to this cache")
        if rotary is None or rotary.key.dtype != dtype:
            if rotary is None:
                key = _rows(key_states, dtype)
            else:  # under autocast: the fused kernel writes the dtype that it rotates in
                ops.rotary_embedding(rotary.query, rotary.key, rotary.cos, rotary.sin, interleaved=rotary.interleaved)
                key = rotary.key.to(dtype)
            ops.reshape_and_cache(
                key,
                value,
                layer.key_cache,
                layer.value_cache,
                layer.step.slot_mapping,
                layer.k_scale,
                layer.v_scale,
            )
        else:
            ops.rotary_and_cache(
                rotary.query,
                rotary.key,
                value,
                rotary.cos,
                rotary.sin,
                layer.key_cache,
                layer.value_cache,
                layer.step.slot_mapping,
                interleaved=rotary.interleaved,
                k_scale=layer.k_scale,
                v_scale=layer.v_scale,
            )
        if self.is_paged(layer_idx):
            return layer, layer
        key, value = self._gather(layer, key_states.dtype)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # what is stored has no gradient; this step's own columns have
            key, value = (
                torch.cat([stored[:, :, : -new.shape[2]], new], 2)
                for stored, new in ((key, key_states), (value, value_states))
            )
        return key, value

    def _gather(self, layer: PagedLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Dense keys and values in the columns of the padded batch; pads are 0."""
        view, extent = self._view, self._extent
        assert view is not None and extent is not None
        batch, width = view.starts.shape[0], extent.shape[2]
        key, value = ops.gather_cache(
            layer.key_cache,
            layer.value_cache,
            layer.step.block_tables,
            layer.step.seq_lens,
            view.starts,
            batch * width,
            dtype=dtype,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
        )
        key, value = (x.unflatten(0, (batch, width)) for x in (key, value))
        if view.place is not None:
            rows = torch.arange(batch, device=view.place.device)[:, None]
            key, value = (x[rows, view.place] * view.shown for x in (key, value))
        return key.transpose(1, 2), value[..., : layer.value_dim].transpose(1, 2)

    # ---- prefixes ----------------------------------------------------------------------------------------------------

    def note_ids(self, input_ids: Tensor | None, whole: bool) -> None:
        """Notes the token ids of the planned step, needed to register its blocks later.

        Args:
            input_ids: [B, columns] of all columns (`whole`) or [B, Q] of the planned ones; None: unknown.
        """
        if not self.cacheable:
            return
        if input_ids is not None and not whole and self._base:
            old, new = self._ids, input_ids
            known = old is not None and old.shape[1] >= self._base
            input_ids = torch.cat([old[:, : self._base], new.to(old.device)], 1) if known and old is not None else None
        if input_ids is None or input_ids.shape != (len(self._seqs), self._base + self._queries):
            self.cacheable, self._ids = False, None
        else:
            self._ids = input_ids

    def stop_sharing(self) -> None:
        """Registers what is computed and nothing from here on."""
        if self.cacheable:
            with self.manager.lock:
                self.commit()
            self.cacheable, self._ids = False, None

    def _row_ids(self, columns: int) -> list[list[int]]:
        assert self._ids is not None
        rows = self._ids[:, :columns].tolist()
        if self._mask is None:
            return rows
        return [list(compress(ids, keep)) for ids, keep in zip(rows, self._stored(columns, len(rows)).tolist())]

    def commit(self) -> None:
        """Registers the computed full blocks in the prefix index. The caller holds the manager's lock."""
        self._commit_due = False
        if not self.cacheable or self._ids is None or not self._seqs:
            return
        tokens = self._begun if self.pending else self._tokens
        for row, ids in enumerate(self._row_ids(self.columns)):
            seq, computed = self._seqs[row], min(len(ids), tokens[row])
            if computed // self.manager.block_size > seq.num_committed_blocks and not self._pads_matter(
                row, self.columns - len(ids)
            ):
                duplicates = self.manager.blocks.commit(seq, ids, computed, dedupe=not self.pending)
                self._stale = self._stale or bool(duplicates)

    def release(self, *, commit: bool = True) -> None:
        """Frees the blocks; with `commit`, finished ones stay findable for later prompts. Harmless when repeated."""
        manager = self.manager
        with manager.lock:
            if self.epoch == manager.epoch:
                try:
                    if commit:
                        self.commit()
                finally:
                    manager.free(self._seqs)
            self._clear()

    def _give_step_back(self) -> None:
        if self._held and self.epoch == self.manager.epoch:
            self.manager.decode_steps.give_back(self._held[0])
        self._held.clear()

    def _clear(self) -> None:
        self._seqs.clear()
        self._requests, self._tokens, self._begun, self._before, self._given = [], [], [], [], []
        self.pending = self._hidden = self._gapped = self._regular = self._commit_due = False
        self._base = self._queries = self._skipped_of = 0
        self._mask = self._ids = self.step = self.shared = self._view = self._extent = None
        self._give_step_back()
        self._stale, self.pending_rotary = True, None
        self.rotary_angles.clear()

    # ---- transformers.Cache ------------------------------------------------------------------------------------------

    @property
    def columns(self) -> int:
        """Columns of the padded batch that are in the cache."""
        return self._base if self.pending else self._base + self._queries

    @property
    def decode_step(self) -> PagedStep | None:
        """The planned step, if it is one token for each row, paged in all layers, in tensors that stay."""
        rules = self.manager.rules
        if not self._held or self.step is not self._held[0] or rules.real_masks or not self.takes_rotary:
            return None
        return self.step

    @property
    def has_pads(self) -> bool:
        """Whether some column is not a token in some row."""
        return self._mask is not None

    def open_sizes(self) -> list[tuple[Tensor, int]]:
        """Tensors of the planned step and those of their dimensions that the next step may have otherwise."""
        assert self.step is not None
        sizes = [] if self._extent is None else [(self._extent, dim) for dim in range(3)]
        if self._view is not None and self._view.place is not None and self._view.shown is not None:
            sizes += [(self._view.place, 1), (self._view.shown, 1)]
        if self.step.slot_mapping.shape != self.step.seq_lens.shape:
            sizes += [(self.step.block_tables, 1), (self.step.slot_mapping, 0)]
        return sizes

    def __len__(self) -> int:
        return len(self.manager.specs)

    def __repr__(self) -> str:
        return f"PagedCache({len(self._seqs)} rows, {self.columns} columns)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in the cache, pads included; inside a graph a tensor [], which does not grow with it."""
        if (torch.compiler.is_compiling() or self.is_recorded) and self.pending and self.step is not None:
            return self.step.columns  # type: ignore[return-value]
        return self.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the first query, for masks. A paged step has none: 0, a constant for the compiler."""
        if not self._has_mask(layer_idx):
            return 0
        extent = self._extent
        return extent.shape[0] if extent is not None and self.pending else self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns and offset of the mask; (0, 0) says that a paged step needs none."""
        if not self._has_mask(layer_idx):
            return 0, 0
        extent = self._extent
        return extent.shape[1] if extent is not None and self.pending else self.columns + query_length, 0

    def _has_mask(self, layer_idx: int) -> bool:
        return self.manager.rules.real_masks or not self.is_paged(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit but the pool's."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length`, by its older name."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward pass."""
        return len(self._seqs) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything is stored."""
        return bool(self._seqs)

    @property
    def is_croppable(self) -> bool:
        """True: all tokens are kept, so that `crop` can always go back."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """True for layers that need a mask of their own, so that transformers asks for its size."""
        return [layer in self.manager.rules.dense_layers for layer in range(len(self))]

    @property
    def is_linear(self) -> list[bool]:
        """No layer keeps a recurrent state."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """No layer is without keys and values of its own."""
        return [False] * len(self)

    def activate_past_recording(self) -> None:
        """Nothing to do: the past is always kept."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """True."""
        return True

    def reset(self) -> None:
        """Empties the cache, keeping what it computed findable as prefixes."""
        self.release()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove columns; a positive number is the number of columns to keep."""
        with self.manager.lock:
            self.undo()
            columns = self.columns
            keep = columns + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, columns)
            if keep < 0:
                raise ValueError(f"crop: cannot remove {-tokens_to_remove} of {columns} columns")
            if keep == columns:
                return
            batch = len(self._seqs)
            removed = self._stored(columns, batch)[:, keep:].sum(1).tolist()
            self._tokens = [n - gone for n, gone in zip(self._tokens, removed)]
            for seq, n in zip(self._seqs, self._tokens):
                self.manager.blocks.truncate(seq, min(n, seq.num_tokens))
            if self._mask is not None:
                self._mask = self._mask[:, :keep]
            if self._ids is not None:
                self._ids = self._ids[:, :keep]
            self._base, self._queries = keep, 0
            self._given = [min(given, n) for given, n in zip(self._given, self._tokens)]
            self._stale, self._regular = True, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues row beam_idx[i]; blocks are shared until written."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, sharing its blocks."""
        self.batch_select_indices(torch.arange(len(self._seqs)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` (numbers, or a bool for each row), in this order."""
        rows = (indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist()
        with self.manager.lock:
            self.undo()
            if not self._seqs or rows == list(range(len(self._seqs))):
                return
            self._seqs[:] = self.manager.blocks.reorder(self._seqs, rows)
            self._requests = [(seq, 1) for seq in self._seqs]
            self._tokens, self._given = ([old[row] for row in rows] for old in (self._tokens, self._given))
            if self._mask is not None:
                self._mask = self._mask[rows]
            if self._ids is not None:
                self._ids = self._ids[torch.tensor(rows, device=self._ids.device)]
            self._stale = True
            if self._held and len(rows) != self._held[0].seq_lens.shape[0]:
                self._give_step_back()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A second cache over the same blocks, copied when one of the two writes to a shared one."""
        with self.manager.lock:
            self.undo()
            twin = PagedCache(self.manager, expected_tokens=self._num_blocks_wide * self.manager.block_size)
            twin._seqs.extend(self.manager.blocks.fork(seq) for seq in self._seqs)
            twin._requests = [(seq, 1) for seq in twin._seqs]
            twin._base, twin._tokens, twin._given = self.columns, list(self._tokens), list(self._given)
            for name in ("cacheable", "_mask", "_hidden", "_gapped", "_regular", "_ids", "_commit_due"):
                setattr(twin, name, getattr(self, name))
            memo[id(self)] = twin
            return twin


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, Q, D] -> [B * Q, H, D]. Under autocast the states come in another dtype than the model's."""
    rows = x.detach().transpose(1, 2).flatten(0, 1).to(dtype)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
