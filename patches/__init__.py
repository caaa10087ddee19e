"""`patch`, `unpatch` and `report`: a loaded HuggingFace causal language model onto paged attention and fused kernels.

Everything is bound to the one model given: no other model and no global state of transformers changes (two attention
functions are added to its interface under names of our own; the wrapper that torch.compile makes learns `generate` for
patched models, and its check for the end of generation to be put off for paged caches). What is done is written to a
`PatchLog`, which undoes it exactly.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..config import PagedConfig
from . import attention, checks, fusion, generation, weights
from .checks import UnsupportedModelError
from .log import PatchLog, ReportRow

__all__ = ["PatchLog", "Report", "ReportRow", "UnsupportedModelError", "patch", "report", "unpatch"]

logger = logging.getLogger("torch_pagedkv")

_STATE = "_torch_pagedkv"


def patch(model: PreTrainedModel, config: PagedConfig | None = None, **options: Any) -> PreTrainedModel:
    """Let a causal language model of transformers run on a paged KV cache and fused kernels; the rest of your code
    stays as it is. Patching a patched model changes nothing and logs a warning.

    Args:
        model: loaded, on one device, in float32, float16 or bfloat16.
        config: options; `options` (fields of `PagedConfig` by keyword) replace single ones.

    Returns:
        The same object. `model.paged_cache` is the `CacheManager` with `stats()` and `reset()`.

    Raises:
        TypeError: `model` is not a model of transformers, or an option does not exist.
        ValueError: an option's value is out of range or not available on the device.
        UnsupportedModelError: the model cannot be patched; the message says why.

    Whatever is raised, the model is as it was (its float weights only with `keep_original=True`, once `weights` was
    through with them).
    """
    config = PagedConfig.merge(config, options)
    if is_patched(model):
        logger.warning("torch_pagedkv: this model is already patched, nothing changed (unpatch it to change options)")
        return model
    checks.check_model(model, config)
    facts = checks.examine(model, config) if config.attention else None
    log = PatchLog()
    try:
        weights.apply(model, config, log)
        stock = fusion.probe(model) if fusion.wanted(config) else None
        if facts is not None:
            attention.apply(model, facts, log)
            generation.apply(model, config, facts, log)
        if stock is not None:
            fusion.apply(model, config, log, stock, facts)
    except BaseException:
        log.undo()
        _tell_of_weights(model, config)
        raise
    vars(model)[_STATE] = _State(log, dataclasses.replace(config, calibration=None, tokenizer=None))
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Restore a model exactly: methods, config objects, every module's attributes, the weights' storage. The cache is
    dropped. A model that is not patched is left alone, and a warning says so. Weights that `patch` quantised come back
    if it was told `keep_original=True`; else the model goes on with its 4-bit layers, and a warning says so.

    Returns:
        The same object.
    """
    if not is_patched(model):
        logger.warning("torch_pagedkv: this model is not patched, nothing changed")
        return model
    manager = vars(model).get("paged_cache")
    if manager is not None:
        manager.discard()
    state: _State = vars(model).pop(_STATE)
    state.log.undo()
    _tell_of_weights(model, state.config)
    return model


def _tell_of_weights(model: PreTrainedModel, config: PagedConfig) -> None:
    if weights.stay(model, config):
        logger.warning(
            "torch_pagedkv: the linear layers of %s stay quantised, their original weights were freed. Load the model "
            "again to have them back, or patch(..., keep_original=True) to keep them beside the quantised ones.",
            type(model).__name__,
        )


def is_patched(model: object) -> bool:
    """Whether `patch` was applied to this object."""
    return isinstance(getattr(model, "__dict__", {}).get(_STATE), _State)


def report(model: PreTrainedModel) -> Report:
    """Which module of a patched model runs which op, and why the others were left alone. Print it.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError("the model is not patched: call torch_pagedkv.patch(model) first")
    return Report(type(model).__name__, tuple(vars(model)[_STATE].log.rows))


@dataclass(frozen=True)
class Report:
    """What `patch` did.

    Attributes:
        model: the model's class name.
        rows: one for each module looked at.
    """

    model: str
    rows: tuple[ReportRow, ...]

    @property
    def replaced(self) -> dict[str, int]:
        """Op -> how many modules run it."""
        return dict(collections.Counter(row.op for row in self.rows if row.op is not None))

    @property
    def left_alone(self) -> list[ReportRow]:
        """Modules that run their stock code."""
        return [row for row in self.rows if row.op is None]

    def __str__(self) -> str:
        groups: dict[tuple[str, str, bool], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.op or row.reason, row.op is not None), []).append(row.module)
        runs = [(kind, text, names) for (kind, text, ran), names in groups.items() if ran]
        kept = [(kind, text, names) for (kind, text, ran), names in groups.items() if not ran]
        lines = [f"{self.model}, patched by torch_pagedkv"]
        for title, entries in (("runs", runs), ("left alone", kept)):
            if not entries:
                continue
            lines.append(title)
            wide = [max(len(entry[i]) for entry in entries) for i in (0, 1)]
            for kind, text, names in entries:
                lines.append(f"  {kind:{wide[0]}}  {text:{wide[1]}}  {len(names):4} x  {_common(names)}")
        return "\n".join(line.rstrip() for line in lines)


def _common(names: list[str]) -> str:
    """One pattern for names that differ in their numbers."""
    patterns = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    return ", ".join(sorted(patterns)[:3]) + (", ..." if len(patterns) > 3 else "")


@dataclass
class _State:
    """What a patched model remembers."""

    log: PatchLog
    config: PagedConfig

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle restores bound methods by name, so an unpickled model runs its class's own: it is not patched.
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        twin = memo[id(self)] = _State(copy.deepcopy(self.log, memo), self.config)
        return twin
