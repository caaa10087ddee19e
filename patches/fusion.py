"""All the fusions of one model: applied, taught by a probe forward, and checked against the stock model as a whole."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quant.eight import unrounded
from . import checks, linear, match, mlp, norm, residual, rotary
from .checks import UnsupportedModelError
from .log import PatchLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import PagedConfig

logger = logging.getLogger("torch_pagedkv")

#: option -> the kinds of module that it fuses (`residual` builds on `norm`)
KINDS = {"fuse_norm": "norm", "fuse_mlp": "mlp", "fuse_rotary": "rotary", "fuse_linear": "linear"}
_RECIPES = (norm, mlp, residual, linear, rotary)


@torch.no_grad()
def probe(model: PreTrainedModel) -> Tensor:
    """Logits [2, 9, V] of fixed random tokens, without a cache: what must stay the same."""
    vocabulary = checks.num_embeddings(model)
    ids = torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0)).to(model.device)
    with match.evaluating(model), unrounded(model):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def wanted(config: PagedConfig) -> bool:
    """True if any fusion is asked for."""
    return any(getattr(config, option) for option in KINDS)


def apply(model: PreTrainedModel, config: PagedConfig, log: PatchLog, stock: Tensor) -> None:
    """Fuse what can be fused.

    Args:
        stock: `probe(model)` of before any patch. If the fused model's logits differ from it by more than roundings
            explain, every fusion is undone, the report says so, and a warning is logged.

    Raises:
        UnsupportedModelError: an option is True (not "auto") and the model has nothing to fuse there.
    """
    fusions = PatchLog()
    for recipe in _RECIPES:
        recipe.apply(model, config, fusions)
    with rotary.learning(model, fusions):
        probe(model)
    # Roundings go different ways in every layer; a wrong fusion is off by far more than this.
    error, limit = match.relative_error(probe(model), stock), max(1e-4, 32 * torch.finfo(stock.dtype).eps)
    if error > limit:
        fusions.undo()
        reason = f"undone: the fused logits differ from stock by {error:.1e} of their norm, allowed are {limit:.1e}"
        logger.warning("torch_pagedkv: fusions of %s %s", type(model).__name__, reason)
        log.kept("", "fusion", reason)
    else:
        log.absorb(fusions)
    fused = {row.kind for row in log.rows if row.op is not None}
    for option, kind in KINDS.items():
        if getattr(config, option) is True and kind not in fused:
            raise UnsupportedModelError(f"{option}=True: {type(model).__name__} has no {kind} module that can be fused")
