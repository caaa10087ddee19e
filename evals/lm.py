"""lm-eval on a patched model: its model ``pagedkv``, which is its own ``hf`` with every request on the paged cache.

    torch-pagedkv lm-eval run --model pagedkv --model_args pretrained=...,kv_cache_dtype=int8 --tasks hellaswag

or, from Python, one import::

    import torch_pagedkv.evals.lm
    lm_eval.simple_evaluate(model="pagedkv", model_args={"pretrained": ..., "kv_cache_dtype": "int8"}, ...)

The package also declares the entry point ``lm_eval.models``; an lm-eval that reads it needs neither. Model arguments
are those of ``hf`` and the fields of `PagedConfig`.

A log-likelihood of plain ``hf`` is a forward pass without a cache, on which a quantised cache has no influence. Here it
runs in the blocks of a `PagedCache`, so that what is measured is what generates. Requests with the same context compute
it once: their continuations run as rows that share its blocks. Contexts with the same beginning, few-shot examples for
one, find its blocks in the prefix index. Logits are made for continuations only, a bounded number at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from torch_pagedkv import PagedCache, PagedConfig
from torch_pagedkv.kv.manager import CacheFullError
from torch_pagedkv.kv.pool import PoolMemoryError
from torch_pagedkv.patches import generation, is_patched

from . import models

NAME = "pagedkv"

logger = logging.getLogger("torch_pagedkv")

#: logits made at once; 2 GiB while fp32 logits are turned into log-probabilities, however long a continuation is
MAX_LOGITS = 1 << 28

#: rows of a batch for batch_size="auto" on the CPU, where more do not make it faster
CPU_ROWS = 16

#: prefixes of these requests are not found by generate(), nor the other way round: it also looks at adapters
SALT = "torch_pagedkv.evals.lm"

#: lm-eval's own form of a request: (context, continuation) as text or None, then both as token ids
Request = tuple[Any, list[int], list[int]]


@dataclass(eq=False)
class Group:
    """A context and what is asked to follow it.

    Attributes:
        context: token ids, at least one.
        requests: number of a request in the call -> its continuation, at least one token.
    """

    context: tuple[int, ...]
    requests: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that is fed."""
        return len(self.context) + max(map(len, self.requests.values())) - 1


class PagedLM(HFLM):
    """lm-eval's HFLM on a patched model.

    Args:
        pretrained: as HFLM's; a model that is patched already keeps its options.
        share_contexts: compute a context that several requests have once. False: a row for each request.
        kwargs: HFLM's arguments and the fields of `PagedConfig`. ``batch_size="auto"`` tries nothing out: 16 rows on
            the CPU, what the cache holds (up to max_batch_size) on CUDA. A batch that does not fit is halved.

    Raises:
        UserError: an option is wrong, the model cannot be patched, or it is patched and options are given.
    """

    def __init__(self, pretrained: Any, *, share_contexts: bool = True, **kwargs: Any) -> None:
        names = {option.name for option in dataclasses.fields(PagedConfig)} - {"tokenizer"}  # which is HFLM's too
        options = {name: kwargs.pop(name) for name in sorted(names & kwargs.keys())}
        try:
            PagedConfig(**options)  # before anything is loaded
        except (TypeError, ValueError) as error:
            raise models.UserError(str(error)) from error
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **kwargs)
        if is_patched(self.model):
            if options:
                raise models.UserError(f"{', '.join(options)}: the model is patched already")
        else:
            models.patch(self.model, tokenizer=self.tokenizer, **options)
        self.share_contexts = share_contexts
        accepted = inspect.signature(type(self.model).forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_kept = "logits_to_keep" in accepted

    # ---- what lm-eval calls ------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would choose it."""
        if getattr(self.model, "paged_cache", None) is None:  # patched with attention=False
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        groups = self._grouped(requests)
        answers: dict[int, tuple[float, bool]] = {}
        self.model.paged_cache.reset_prefixes()  # of other weights, perhaps
        with tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        ) as bar:
            for batch in self._batches(groups, override_bs):
                for number, answer in self._halving(batch):
                    answers[number] = answer
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    bar.update()
        return [answers[number] for number in range(len(requests))]

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """Rows for batch_size="auto", without trying."""
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len(context) + len(continuation))
        return self._rows(length)

    def _rows(self, length: int) -> int:
        manager = getattr(self.model, "paged_cache", None)
        most = self.max_batch_size or 64
        if self.device.type == "cpu" or manager is None:
            return min(CPU_ROWS, most)
        limit = manager.pool.max_blocks or manager.pool.num_blocks
        return max(1, min(most, limit // (-(-length // manager.block_size) + 1)))

    # ---- batches -----------------------------------------------------------------------------------------------------

    def _grouped(self, requests: Sequence[Request]) -> list[Group]:
        """Requests by context, cut on the left to what the model can see; the longest first."""
        groups: dict[Any, Group] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not continuation or len(continuation) > self.max_length:
                raise models.UserError(
                    f"request {number}: a context of {len(context)} and a continuation of {len(continuation)} tokens; "
                    f"both need one at least, and the continuation at most max_length, {self.max_length}"
                )
            room = self.max_length + 1 - len(continuation)
            if len(context) > room:
                logger.warning("request %d: %d tokens cut off on the left", number, len(context) - room)
            kept = tuple(context[-room:])
            # where keys depend on the length of the sequence, a context has others behind it
            key = kept if self.share_contexts and self._has_prefixes else number
            groups.setdefault(key, Group(kept)).requests[number] = tuple(continuation)
        return sorted(groups.values(), key=lambda group: (-group.length, group.context))

    def _batches(self, groups: Sequence[Group], rows: int | None) -> Iterator[list[Group]]:
        """Batches of contexts with several continuations, then of those with one."""
        for several in (True, False):
            chosen = [group for group in groups if (len(group.requests) > 1) == several]
            start = 0
            while start < len(chosen):
                count = rows or (self._rows(chosen[start].length) if self.batch_size == "auto" else self.batch_size)
                yield chosen[start : start + count]
                start += count

    def _halving(self, batch: list[Group]) -> list[tuple[int, tuple[float, bool]]]:
        """The answers to a batch, in two halves if it does not fit into memory."""
        try:
            return list(self._run(batch))
        except (torch.OutOfMemoryError, CacheFullError, PoolMemoryError) as error:
            if len(batch) == 1:
                raise
            logger.warning("a batch of %d contexts does not fit, halved: %s", len(batch), error)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        return self._halving(batch[:middle]) + self._halving(batch[middle:])

    # ---- one batch ---------------------------------------------------------------------------------------------------

    @property
    def _has_prefixes(self) -> bool:
        return generation.driver_of(self.model).has_prefixes

    def _run(self, batch: list[Group]) -> Iterator[tuple[int, tuple[float, bool]]]:
        manager = self.model.paged_cache
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            cache = PagedCache(manager)
            try:
                run = self._single if all(len(group.requests) == 1 for group in batch) else self._shared
                yield from run(batch, cache)
            finally:
                cache.release()

    def _single(self, batch: list[Group], cache: PagedCache) -> Iterator[tuple[int, tuple[float, bool]]]:
        """One continuation each: context and continuation are one left-padded row, fed at once."""
        numbers, continuations = zip(*(next(iter(group.requests.items())) for group in batch))
        ids, mask = self._padded([(*group.context, *c[:-1]) for group, c in zip(batch, continuations)], left=True)
        columns = ids.shape[1]
        scores = Scores(continuations, [columns - len(c) for c in continuations], self.device)
        self._prefill(cache, ids, mask, columns - max(map(len, continuations)), scores.add)
        yield from zip(numbers, scores.answers())

    def _shared(self, batch: list[Group], cache: PagedCache) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The contexts once; then rows that share their blocks, one for each different continuation but its last token
        (the last one is not fed)."""
        ids, mask = self._padded([group.context for group in batch], left=True)
        last: list[Tensor] = []
        self._prefill(cache, ids, mask, ids.shape[1] - 1, lambda log_probs, _: last.append(log_probs[:, 0]))
        first = last[0]  # [contexts, V]
        cache.stop_sharing()  # what follows a context is not looked for again
        rows: dict[tuple[int, tuple[int, ...]], list[tuple[int, tuple[int, ...]]]] = {}
        for index, group in enumerate(batch):
            for number, continuation in group.requests.items():
                rows.setdefault((index, continuation[:-1]), []).append((number, continuation))
        for (index, fed), asked in rows.items():
            if not fed:
                for number, (token,) in asked:
                    yield number, (float(first[index, token]), int(first[index].argmax()) == token)
        ordered = sorted((key for key in rows if key[1]), key=lambda key: -len(key[1]))
        size = max(len(batch), 1)
        for start in range(0, len(ordered), size):
            chosen = ordered[start : start + size]
            yield from self._behind(cache, first, mask, chosen, rows)

    def _behind(
        self,
        cache: PagedCache,
        first: Tensor,
        mask: Tensor,
        keys: Sequence[tuple[int, tuple[int, ...]]],
        rows: dict[tuple[int, tuple[int, ...]], list[tuple[int, tuple[int, ...]]]],
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Continuations (`keys`: number of the context, ids fed) on a copy of the contexts' cache."""
        contexts = torch.tensor([index for index, _ in keys])
        ids, shown = self._padded([fed for _, fed in keys], left=False)
        base = mask.shape[1]
        asked = [(row, number, c) for row, key in enumerate(keys) for number, c in rows[key]]
        scores = Scores(
            [c for _, _, c in asked],
            [base - 1] * len(asked),
            self.device,
            rows=[row for row, _, _ in asked],
        )
        scores.add(first[contexts.to(first.device)][:, None], base - 1)
        twin = copy.deepcopy(cache)
        try:
            twin.batch_select_indices(contexts)
            mask = torch.cat([mask[contexts.to(mask.device)], shown], 1)
            self._feed(twin, ids, mask, base, base, scores.add)
        finally:
            twin.release(commit=False)
        yield from zip((number for _, number, _ in asked), scores.answers())

    # ---- forward passes ----------------------------------------------------------------------------------------------

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and mask [rows, longest] on the device."""
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for row, tokens in enumerate(rows):
            where = slice(width - len(tokens), None) if left else slice(len(tokens))
            ids[row, where], mask[row, where] = torch.tensor(tokens), 1
        return ids.to(self.device), mask.to(self.device)

    def _prefill(
        self, cache: PagedCache, ids: Tensor, mask: Tensor, wanted: int, take: Callable[[Tensor, int], None]
    ) -> None:
        """Feeds whole rows to an empty cache, without what it finds; see `_feed`."""
        batch, columns = ids.shape
        match = cache.manager.config.prefix_caching and self._has_prefixes
        generation._follow_model(self.model)
        cache.start(ids, mask, batch=batch, columns=columns, salt=SALT, match=match)
        if cache.get_seq_length() > wanted:  # the logits there are asked for
            cache.rewind()
        self._feed(cache, ids, mask, 0, wanted, take)

    def _feed(
        self, cache: PagedCache, ids: Tensor, mask: Tensor, base: int, wanted: int, take: Callable[[Tensor, int], None]
    ) -> None:
        """Runs the model over the columns that the cache does not have yet.

        Args:
            ids: [B, N - base], the columns from `base` on. mask: [B, N], of all.
            wanted: the first column whose logits are asked for.
            take: called with log-probabilities [B, n, V] and the column that they begin at.
        """
        batch, columns = mask.shape
        cache.expect(mask, batch, columns)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        most = columns
        if self._has_prefixes:  # else a sequence must be fed at once
            most = max(1, MAX_LOGITS // (batch * self.model.config.get_text_config().vocab_size))
        start = cache.get_seq_length()
        while start < columns:
            stop = min(columns, (max(start, wanted) if self._takes_kept else start) + most)
            cache.plan(batch, stop - start)
            if base == 0:
                cache.note_ids(ids[:, :stop], whole=True)
            kept = stop - max(start, wanted)
            options: dict[str, Any] = {"position_ids": positions[:, start:stop]} if self._takes_positions else {}
            if self._takes_kept:
                options["logits_to_keep"] = max(1, kept)
            logits = self.model(
                ids[:, start - base : stop - base],
                attention_mask=mask[:, :stop],
                past_key_values=cache,
                use_cache=True,
                **options,
            ).logits
            if kept > 0:
                take(F.log_softmax(logits[:, -kept:], dim=-1, dtype=self.softmax_dtype), stop - kept)
            start = stop


class Scores:
    """Collects the log-probabilities of continuations from pieces of rows.

    Args:
        continuations: token ids, one for each answer.
        begins: the column whose logits tell an answer's first token.
        rows: the row of each answer. None: its number.
    """

    def __init__(
        self,
        continuations: Sequence[tuple[int, ...]],
        begins: Sequence[int],
        device: torch.device,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.targets = [torch.tensor(c, device=device) for c in continuations]
        self.begins = begins
        self.rows = range(len(begins)) if rows is None else rows
        self.pieces: list[list[Tensor]] = [[] for _ in begins]
        self.greedy = [True] * len(begins)

    def add(self, log_probs: Tensor, column: int) -> None:
        """Takes log-probabilities [rows, n, V] of the columns from `column` on."""
        choices = log_probs.argmax(-1)
        for answer, (target, begin, row) in enumerate(zip(self.targets, self.begins, self.rows)):
            low, high = max(begin, column), min(begin + len(target), column + log_probs.shape[1])
            if low < high:
                part, where = target[low - begin : high - begin], slice(low - column, high - column)
                self.pieces[answer].append(log_probs[row, where].gather(1, part[:, None])[:, 0])
                self.greedy[answer] &= bool((choices[row, where] == part).all())

    def answers(self) -> list[tuple[float, bool]]:
        """Each continuation's log-probability, summed as lm-eval sums, and whether all its tokens are the likeliest."""
        return [(float(torch.cat(pieces).sum()), greedy) for pieces, greedy in zip(self.pieces, self.greedy)]


def register() -> None:
    """Makes lm-eval know the model ``pagedkv``; an entry point may have done it before."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=PagedLM)


register()


def main(argv: Sequence[str] | None = None) -> int:
    """lm-eval's own command line, with ``--model pagedkv``."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["torch-pagedkv lm-eval", *(sys.argv[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    from torch_pagedkv.evals import lm  # the module under its own name is the one that registers

    sys.exit(lm.main())
