"""Which attention a patched model ran. A measurement of the paged path must know that it was not the dense fallback:
that one is stock's own attention over gathered pages, and would pass every comparison with stock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PAGED = ("paged_attention", "paged_attention_v1", "paged_attention_v2")


class AttentionTrace(TorchDispatchMode):
    """Counts, inside a with statement, the calls of paged attention and those that gather pages for a dense one.

    Attributes:
        paged, dense: the numbers of calls, one a layer and forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paged = self.dense = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count, then run."""
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "torch_pagedkv":
            name = func._schema.name.partition("::")[2]
            self.paged += name in PAGED
            self.dense += name == "gather_cache"
        return func(*args, **(kwargs or {}))

    @property
    def counts(self) -> dict[str, int]:
        """Both numbers, for a report."""
        return {"paged": self.paged, "dense": self.dense}


def failures(what: str, counts: Mapping[str, int]) -> list[str]:
    """A line if a run was not wholly on paged attention."""
    if counts["paged"] and not counts["dense"]:
        return []
    return [f"{what}: not on the paged path ({counts['paged']} paged calls of attention, {counts['dense']} dense ones)"]
