"""All the fusions of one model: applied, taught by a probe forward, and checked against the stock model as a whole."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kv.cache import PagedCache
from ..kv.manager import CacheManager
from ..quant.eight import unrounded
from . import checks, layer, linear, match, mlp, norm, residual, rotary
from .checks import UnsupportedModelError
from .log import PatchLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import PagedConfig

logger = logging.getLogger("torch_pagedkv")

#: option -> the kinds of module that it fuses (`residual` builds on `norm`)
KINDS = {
    "fuse_norm": "norm",
    "fuse_mlp": "mlp",
    "fuse_rotary": "rotary",
    "fuse_linear": "linear",
    "fuse_layers": "layer",
}
_RECIPES = (norm, mlp, residual, linear, rotary)


@torch.no_grad()
def probe(model: PreTrainedModel) -> Tensor:
    """Logits [2, 9, V] of fixed random tokens, without a cache: what must stay the same."""
    ids = _tokens(model)
    with match.evaluating(model), unrounded(model):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = checks.num_embeddings(model)
    return torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0)).to(model.device)


@torch.no_grad()
def _probe_pages(model: PreTrainedModel, config: PagedConfig, facts: checks.ModelFacts) -> Tensor:
    """As `probe`, on pages: a prompt of all tokens but one, and a decoding step. The few blocks that it takes are its
    own, and in the model's dtype: a quantised cache's error is none of the fusions'."""
    ids = _tokens(model)
    blocks = 2 * -(-ids.shape[1] // config.block_size)
    few = dataclasses.replace(config, num_blocks=blocks, max_blocks=blocks, kv_cache_dtype=None)
    cache = PagedCache(CacheManager(few, facts.specs, facts.dtype, facts.device, facts.rules))
    logits = []
    with match.evaluating(model), unrounded(model):
        for part in ids.split([ids.shape[1] - 1, 1], 1):
            cache.plan(*part.shape)
            logits.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def wanted(config: PagedConfig) -> bool:
    """True if any fusion is asked for."""
    return any(getattr(config, option) for option in KINDS)


def apply(
    model: PreTrainedModel, config: PagedConfig, log: PatchLog, stock: Tensor, facts: checks.ModelFacts | None
) -> None:
    """Fuse what can be fused.

    Args:
        facts: of the model, whose attention is on pages; None: it is not.
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
    if _keep(model, log, fusions, probe(model), stock) and facts is not None:
        layers = PatchLog()
        layer.apply(model, config, layers)
        if layers.rows:
            _keep(model, log, layers, _probe_pages(model, config, facts), stock)
    fused = {row.kind for row in log.rows if row.op is not None}
    for option, kind in KINDS.items():
        if getattr(config, option) is True and kind not in fused:
            raise UnsupportedModelError(f"{option}=True: {type(model).__name__} has no {kind} module that can be fused")


def _keep(model: PreTrainedModel, log: PatchLog, fusions: PatchLog, fused: Tensor, stock: Tensor) -> bool:
    """Takes fusions over into the log, or undoes them where the logits are not the stock ones."""
    # Roundings go different ways in every layer; a wrong fusion is off by far more than this.
    error, limit = match.relative_error(fused, stock), max(1e-4, 32 * torch.finfo(stock.dtype).eps)
    if error <= limit:
        log.absorb(fusions)
        return True
    fusions.undo()
    reason = f"undone: the fused logits differ from stock by {error:.1e} of their norm, allowed are {limit:.1e}"
    logger.warning("torch_pagedkv: fusions of %s %s", type(model).__name__, reason)
    log.kept("", "fusion", reason)
    return False
