"""Weights in other forms than 4 bits rounded here: those of a GGUF file (`weights="gguf"`)."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..quant import gguf
from . import weights
from .checks import UnsupportedModelError
from .log import PatchLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import PagedConfig


def apply(model: PreTrainedModel, config: PagedConfig, log: PatchLog) -> None:
    """Replace the model's linear layers as `config.weights` says; each original is freed (or kept in the log) before
    the next. A model whose layers have been replaced so before stays as it is.

    Raises:
        ValueError: the model is quantised already in another way, or its weights or the file's are corrupt; nothing has
            changed.
        UnsupportedModelError: there is no layer to replace.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        if getattr(quantizer, "form", None) == config.weights:
            return
        raise weights.quantised_already(quantizer, config)
    _gguf(model, config, log)


def _keeper(undo: PatchLog | None) -> Any:
    """What keeps a layer's parameters in the log, or nothing."""

    def keep(module: nn.Module) -> None:
        if undo is not None:
            action = partial(weights._restore, module, type(module), dict(module._parameters), frozenset(vars(module)))
            undo.on_undo(action)

    return keep


def _gguf(model: PreTrainedModel, config: PagedConfig, log: PatchLog) -> None:
    undo = log if config.keep_original else None
    file = os.fspath(config.gguf_file)  # type: ignore[arg-type]
    tensors = gguf.open_file(file)
    if not any(type(module) is nn.Linear for module in model.modules()):
        raise UnsupportedModelError(f"weights='gguf': {type(model).__name__} has no linear layer to replace")
    head = config.quantize_head
    gguf.convert(model, tensors, file, exact=False, head=head, before=_keeper(undo), marks=undo)
