"""Weights in other forms than 4 bits rounded here: those of a GGUF file (`weights="gguf"`), and 8 bits on both sides of
the product (`"int8"`, `"fp8"`)."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from ..quant import calibration, eight, gguf, sensitivity
from ..quant.held import Held, untie
from ..quant.packed import Int8Linear
from . import checks, match, weights
from .checks import UnsupportedModelError
from .log import PatchLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import PagedConfig

logger = logging.getLogger("torch_pagedkv")


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
    (_gguf if config.weights == "gguf" else _eight)(model, config, log)


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


# ------------------------------------------------------------------------------------------------ 8 bits


def _eight(model: PreTrainedModel, config: PagedConfig, log: PatchLog) -> None:
    form = str(config.weights)
    layer = eight.LAYERS[form]
    multiple = eight.MULTIPLE[layer.dtype]
    found, kept = [], {}
    for name, module in weights._layers(model, config, log):
        matrix = weights._matrix(module)
        if any(size % multiple for size in matrix.shape):
            kept[name] = f"its inputs and outputs are no multiples of {multiple}"
            continue
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"weights: {name}.weight has entries that are NaN or infinite")
        found.append((name, module))
    if not found:
        raise UnsupportedModelError(f"weights={form!r}: {type(model).__name__} has no linear layer to quantise")
    for device in {weights._matrix(module).device for _, module in found}:
        _examine(form, device)
    factors: dict[str, Tensor | None] = {}
    spared: list[str] = []
    if config.calibration is not None:
        layers, ids = dict(found), _tokens(model, config)
        for name, seen in _look(model, layers, ids).items():
            factors[name] = eight.search(layer, weights._matrix(layers[name]), *seen)
        cost = _costs(model, layers, layer, factors, ids)
        sizes = {name: weights._matrix(module).numel() for name, module in found}
        spared = sensitivity.too_costly(cost, sizes, eight.BOUND)
        for name in spared:
            kept[name] = f"int8 weights, its activations are not rounded: in {form} it would cost {cost[name]:.1e} nats"

    undo = log if config.keep_original else None
    keep = _keeper(undo)
    for name, module in hf_logging.tqdm(found, desc="Quantising to 8 bits"):
        matrix, factor = weights._matrix(module), factors.get(name)
        keep(module)
        if name in spared:
            Int8Linear.adopt(module, eight.spared(matrix), matrix.dtype, "int8")
        else:
            source = f"{form}, smoothed" if factor is not None else form
            layer.adopt(module, layer.pack(matrix, factor), matrix.dtype, source)
    marks = undo or PatchLog()
    quantizer: Any = Held.of(form)
    quantizer.kept = kept
    untie(model, marks)
    marks.set_attribute(model, "hf_quantizer", quantizer)
    marks.set_attribute(model.config, "quantization_config", quantizer.quantization_config)


def _examine(form: str, device: torch.device) -> None:
    """Refuse what the device cannot do, and say what it does slowly."""
    if form == "fp8":
        eight.refuse_float8(device)
        if device.type == "cpu":
            logger.warning("torch_pagedkv: float8 products are slow on a CPU: slower than those of floats")
    elif device.type == "cpu":
        eight.W8A8Linear.whole = eight.whole_products()
        if not eight.W8A8Linear.whole:
            logger.warning(
                "torch_pagedkv: torch._int_mm is slow on this CPU or missing, so int8 layers multiply in float32: the "
                "same numbers, no faster than float layers"
            )


#: sequences of calibration data that are looked at, and rows of a layer's inputs that smoothing is tried on
_SEQUENCES, _ROWS = 32, 128
#: sequences, and tokens of them, that are run backwards
_BACKWARD = 16, 256


def _tokens(model: PreTrainedModel, config: PagedConfig) -> Tensor:
    """The calibration data, [S, T]."""
    longest = checks.setting(checks.text_config(model), "max_position_embeddings")
    tokenizer = config.tokenizer
    if tokenizer is None and calibration.is_text(config.calibration):
        tokenizer = weights.tokenizer_of(model)
    return calibration.tokens(
        config.calibration,
        tokenizer,
        vocabulary=checks.num_embeddings(model),
        samples=_SEQUENCES,
        longest=longest if isinstance(longest, int) else None,
    )


def _costs(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    layer: type[eight.EightLinear],
    factors: dict[str, Tensor | None],
    ids: Tensor,
) -> dict[str, float]:
    """What rounding each layer costs, in nats of a token."""
    matrices = {name: weights._matrix(module) for name, module in layers.items()}

    def change(name: str, x: Tensor) -> Tensor:
        return eight.change(layer, matrices[name], factors.get(name), x)

    rows, tokens = _BACKWARD
    some = ids[torch.linspace(0, len(ids) - 1, min(rows, len(ids))).round().long(), :tokens]
    with match.evaluating(model):
        return sensitivity.costs(model, layers, change, some)


@torch.no_grad()
def _look(model: PreTrainedModel, layers: dict[str, nn.Module], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> the largest magnitude of each of its inputs [K] over the calibration data, and some rows of them."""
    largest: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    each = max(2, -(-_ROWS // len(ids)))  # the first row of a sequence is not like the others

    def look(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        now = x.abs().amax(0)
        largest[name] = torch.maximum(largest[name], now) if name in largest else now
        if len(rows.setdefault(name, [])) * each < _ROWS:
            rows[name].append(x[torch.linspace(0, len(x) - 1, each, device=x.device).long()])

    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in layers.items()]
    try:
        with match.evaluating(model):
            for row in hf_logging.tqdm(ids, desc="Looking at calibration data"):
                model(input_ids=row[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    wrong = [name for name, seen in largest.items() if not bool(seen.isfinite().all())]
    if wrong:
        raise ValueError(f"calibration: the inputs of {wrong[0]} are NaN or infinite")
    return {name: (seen, torch.cat(rows[name])) for name, seen in largest.items()}
