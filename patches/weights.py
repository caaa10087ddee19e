"""4-bit weights: linear layers -> `int4_linear`, for models that were loaded so, and for others by `weights="int4"`.
(`quantized.py` has the other forms.)"""

from __future__ import annotations

import collections
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from ..kv.pool import MODEL_DTYPES
from ..quant import rtn
from ..quant.held import held_layers, op_of, untie
from ..quant.linear import Int4Linear
from ..quant.loading import Rounded, int4_layers
from . import match
from .checks import UnsupportedModelError
from .log import PatchLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import PagedConfig

logger = logging.getLogger("torch_pagedkv")

#: smaller matrices (routers, gates) weigh nothing and lose the most
_SMALLEST = 32


def apply(model: PreTrainedModel, config: PagedConfig, log: PatchLog) -> None:
    """Quantise if asked to, layer by layer, each original freed (or kept in the log) before the next; report.

    Raises:
        ValueError: the model is quantised already in another way, or a weight is NaN or infinite; nothing has changed.
        UnsupportedModelError: there is no linear layer to quantise.
    """
    if config.weights == "int4":
        _round(model, config, log)
    elif config.weights is not None:
        from . import quantized

        quantized.apply(model, config, log)
    for name, module in held_layers(model):
        log.runs(name, "weights", op_of(module))
    for name, reason in getattr(getattr(model, "hf_quantizer", None), "kept", {}).items():
        log.kept(name, "weights", reason)


def stay(model: nn.Module, config: PagedConfig) -> bool:
    """True if an unpatched model keeps quantised layers, because their originals are gone."""
    return config.weights is not None and not config.keep_original and bool(held_layers(model))


def _round(model: PreTrainedModel, config: PagedConfig, log: PatchLog) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, Rounded):
        raise quantised_already(quantizer, config)
    layers = _layers(model, config, log)
    if not layers and not any(True for _ in int4_layers(model)):
        raise UnsupportedModelError(
            f"weights={config.weights!r}: {type(model).__name__} has no linear layer to quantise"
        )
    if quantizer is not None and layers and quantizer.quantization_config.group_size != config.group_size:
        # one checkpoint has one group size
        size = quantizer.quantization_config.group_size
        raise ValueError(f"group_size: got {config.group_size}, but the model has 4-bit layers in groups of {size}")
    for name, module in layers:
        if not bool(torch.isfinite(_matrix(module)).all()):
            raise ValueError(f"weights: {name}.weight has entries that are NaN or infinite")
    undo = log if config.keep_original else None
    for _, module in hf_logging.tqdm(layers, desc="Quantising to 4 bits"):
        _replace(module, config.group_size, undo)
    marks = undo or PatchLog()
    head = model.get_output_embeddings()
    untie(model, marks)
    if quantizer is not None:
        quantizer.quantization_config.lm_head = isinstance(head, Int4Linear)
    else:
        # what save_pretrained writes
        made = Rounded.of(config.group_size, lm_head=isinstance(head, Int4Linear))
        marks.set_attribute(model, "hf_quantizer", made)
        marks.set_attribute(model.config, "quantization_config", made.quantization_config)


def quantised_already(quantizer: Any, config: PagedConfig) -> ValueError:
    """The error for a model that another quantizer holds."""
    method = getattr(quantizer, "form", None) or getattr(quantizer.quantization_config, "quant_method", "?")
    return ValueError(
        f"weights: got {config.weights!r}, but the model is quantised already ({getattr(method, 'value', method)})"
    )


def _layers(model: PreTrainedModel, config: PagedConfig, log: PatchLog) -> list[tuple[str, nn.Module]]:
    """The layers to quantise; why the others are not goes into the report."""
    owners = collections.Counter(id(p) for module in model.modules() for p in module._parameters.values())
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if any(p is not None and p.dim() == 3 for p in module._parameters.values()):
            log.kept(name, "weights", "a stack of matrices (experts, a convolution), not a linear layer")
        if not isinstance(module, (nn.Linear, Conv1D)) or isinstance(module, Int4Linear):
            continue
        if module is head and not config.quantize_head:
            log.kept(name, "weights", "the language head keeps its precision (quantize_head)")
        elif ".lora_" in name:
            log.kept(name, "weights", "an adapter")
        elif match.is_bound_elsewhere(module):
            log.kept(name, "weights", "something else is bound to it")
        elif owners[id(module.weight)] > 1 and module is not head:
            log.kept(name, "weights", "its weight is shared with another module")
        elif module.weight.dtype not in MODEL_DTYPES:
            log.kept(name, "weights", f"its weight is {module.weight.dtype}")
        elif min(module.weight.shape) < _SMALLEST:
            log.kept(name, "weights", f"fewer than {_SMALLEST} inputs or outputs")
        elif not _is_plain(module):
            log.kept(name, "weights", "it is more than a linear layer")
        else:
            found.append((name, module))
    return found


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    """True for the stock linear layers, and for others whose forward gives the same numbers."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    weight: Any = module.weight
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        got = module.forward(x)
    except Exception:
        return False
    return isinstance(module, nn.Linear) and match.close_enough(got, F.linear(x, weight, module.bias))


def _matrix(module: Any) -> Tensor:
    """[N, K]."""
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


def _replace(module: nn.Module, group_size: int, undo: PatchLog | None) -> None:
    matrix = _matrix(module)
    weight = rtn.quantize(matrix, group_size)
    if undo is not None:
        undo.on_undo(partial(_restore, module, type(module), dict(module._parameters), frozenset(vars(module))))
    Int4Linear.adopt(module, weight, matrix.dtype, "RTN")


def _restore(module: nn.Module, cls: type, parameters: dict[str, Any], names: frozenset[str]) -> None:
    like = match.weight_like(module)  # the model may have been moved since
    for parameter in parameters.values():
        if parameter is not None and like is not None:
            parameter.data = parameter.data.to(like.device, like.dtype)
    for name in [*module._buffers]:
        delattr(module, name)
    for name in set(vars(module)) - names:
        del vars(module)[name]
    module.__class__ = cls
    module._parameters.clear()
    module._parameters.update(parameters)
