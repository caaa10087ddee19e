"""The end of generation asked for without waiting for the device.

transformers' decoding loop asks after every step whether all rows are finished and waits for the answer. Meanwhile
nothing is queued: all of the host's work for the next step is added to the time of every token. Its
`DeferredStopCheck` reads the answer one step later instead, while the next step runs, and takes back that step where it
was one too many; it is used on MPS alone. `DeferredCheck` allows it on CUDA for a `PagedCache` that says so (`defer`
decides that for each call), and for no other cache.

The step too many is not seen: its token, scores and cache entries are dropped by transformers, its random numbers and
its claim on the last blocks of a full cache here. What of the caller's own would see it (a criterion, a processor of
logits, a hook) keeps the check of every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import utils as generation_utils

from ..kv.cache import PagedCache
from . import layer

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_Stock: Any = generation_utils.DeferredStopCheck
_DEVICES = {"cuda"}


class DeferredCheck(_Stock):
    """transformers' deferred check, on CUDA, too, where the cache is paged and allows it."""

    def __init__(
        self, input_ids: Tensor, max_length: int, cache: Cache | None, cache_is_returned: bool, streamer: Any = None
    ) -> None:
        super().__init__(input_ids, max_length, cache, cache_is_returned, streamer)
        self.paged = cache if isinstance(cache, PagedCache) else None
        self._random: list[tuple[torch.Generator, int]] = []  # where random numbers stood behind the last two steps
        if self.paged is not None and input_ids.is_cuda:
            generator = torch.cuda.default_generators[input_ids.device.index]
            self._random = [(generator, generator.get_offset())] * 2

    @staticmethod
    def is_supported(device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool) -> bool:
        """Whether the question may be put off."""
        if isinstance(cache, PagedCache) and device.type in _DEVICES:
            return cache.defers_stop and not is_assistant
        return _Stock.is_supported(device, cache, cache_is_returned, is_assistant)

    def __call__(self, unfinished_sequences: Tensor, tokens: Tensor, length: int) -> bool:
        stopping = super().__call__(unfinished_sequences, tokens, length)
        if self._random:
            generator = self._random[1][0]
            self._random = [self._random[1], (generator, generator.get_offset())]
        if stopping or self.paged is None or self.paged.has_room():
            return stopping
        # The next step would take blocks that may not be there, and perhaps it is one too many: ask now.
        flag, _, copied = self.slots[1]
        copied.synchronize()
        return bool(flag)

    def finish(self) -> int:
        """The number of steps to undo, as for transformers' own."""
        steps = super().finish()
        if steps and self._random:
            generator, offset = self._random[0]
            generator.set_offset(offset)
        return steps


def allow() -> None:
    """Let transformers' loop find the class above, once a process."""
    generation_utils.DeferredStopCheck = DeferredCheck


def defer(model: PreTrainedModel, explicit: dict[str, Any]) -> bool:
    """Whether a `generate()` with these arguments may compute a step too many: nobody but transformers looks on."""
    if explicit.get("synced_gpus") or explicit.get("custom_generate") is not None:
        return False
    if explicit.get("prefix_allowed_tokens_fn") is not None:
        return False
    for name in ("logits_processor", "stopping_criteria"):
        if not all(map(_is_stock, explicit.get(name) or ())):
            return False
    return not any(map(_is_watched, model.modules()))


def _is_stock(one: object) -> bool:
    return type(one).__module__.startswith("transformers.")


def _is_watched(module: torch.nn.Module) -> bool:
    hooks: Iterable[dict[Any, Any]] = (module._forward_hooks, module._forward_pre_hooks)
    return any(layer.watches(hook) for each in hooks for hook in each.values())
