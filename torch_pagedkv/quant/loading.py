"""AWQ, GPTQ and compressed-tensors checkpoints through transformers' `from_pretrained` and `save_pretrained`.

The files' headers say which layers are stored in 4 bits, and are checked against the model and the configuration before
a weight is read. Those layers take the checkpoint's tensors as they are, and become `Int4Linear` one after the other.
Saving writes the same format again.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from .. import __version__
from . import formats, registry
from .checkpoint import Recipe, headers, recipe
from .formats import FORMATS, FormatError, Scheme
from .linear import Int4Linear
from .quantizer import FixedQuantizer
from .registry import GPTQConfig


def from_pretrained(path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, with AWQ, GPTQ and pack-quantized checkpoints on the kernels of this
    package, also where the packages are installed that transformers would run them with.

    Raises:
        ValueError: the checkpoint cannot be loaded, by the layer's and tensor's name; nothing is left behind.
    """
    with registry.forced():
        return AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)


class _Pending(nn.Module):
    """A linear layer that waits for its tensors of the checkpoint, which are its buffers."""

    @property
    def weight(self) -> Tensor:
        """Nothing, for those who initialise weights: there is none."""
        nothing = torch.empty(0)
        nothing._is_hf_initialized = True  # type: ignore[attr-defined]
        return nothing

    in_features: int
    out_features: int
    # hooks that are set up while loading keep this function
    forward = Int4Linear.forward


class Int4Quantizer(FixedQuantizer):
    """Loads a checkpoint's 4-bit layers into `Int4Linear`, and saves them."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.recipe: Recipe = recipe(quantization_config.to_dict())
        self.schemes: dict[str, Scheme] = {}

    # ---- loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("state_dict: a 4-bit checkpoint is loaded from its files, not from a state_dict")
        stored = _by_module(model, headers(checkpoint_files))
        linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        form = self.recipe.form
        packed = [name for name, tensors in stored.items() if form.weight in tensors]
        _refuse_strangers(model, [name for name in packed if name not in linears])
        if not packed:
            raise ValueError(f"no {form.weight} tensor in the checkpoint: it is not a {self.recipe.title} checkpoint")
        _refuse_gaps(model, linears, stored, form)
        for name in packed:
            tensors = {leaf: stored[name][leaf] for leaf in form.leaves if leaf in stored[name]}
            module = linears[name]
            n, k = _features(module)
            try:
                self.schemes[name] = self.recipe.scheme(name)
                formats.check(form, tensors, n, k, self.schemes[name])
                if getattr(module, "bias", None) is not None and "bias" not in stored[name]:
                    raise FormatError("bias: missing")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            _wait(module, tensors, stored[name].get("bias"), dtype or model.dtype)
            _untie(model, name, module)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if getattr(model, "_tp_size", None):
            raise ValueError(
                "tensor parallelism does not work with 4-bit checkpoints: load the model without a tp_plan"
            )
        form = self.recipe.form
        pending = [(name, module) for name, module in model.named_modules() if isinstance(module, _Pending)]
        for name, module in hf_logging.tqdm(pending, desc="Packing 4-bit weights"):
            tensors = {leaf: tensor for leaf, tensor in module._buffers.items() if tensor is not None}
            tensors.pop("bias", None)
            for leaf, tensor in tensors.items():
                if tensor.is_meta:
                    raise ValueError(f"{name}.{leaf}: offloaded by the device_map, which 4-bit layers cannot be")
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(f"{name}.{leaf}: missing in the checkpoint")
            try:
                weight = formats.read(form, tensors, module.out_features, module.in_features, self.schemes[name])
            except FormatError as error:
                raise ValueError(f"{name}: {error}") from None
            for leaf in tensors:
                del module._buffers[leaf]
            Int4Linear.adopt(module, weight, model.dtype, self.recipe.title)
        return model

    # ---- saving

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors in the checkpoint's format."""
        tensors: dict[str, Tensor] = dict(model.state_dict())
        form = self._form(model)
        for name, module in int4_layers(model):
            for buffer in module._buffers:
                if buffer != "bias":
                    tensors.pop(f"{name}.{buffer}", None)
            try:
                written = formats.write(form, module.logical(), self.schemes.get(name))
            except FormatError as error:
                raise ValueError(f"{name}: {error}") from None
            tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in written.items()})
        return tensors, {}

    def _form(self, model: PreTrainedModel) -> formats.Format:
        return self.recipe.form


def int4_layers(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """The 4-bit layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            yield name, module


# ------------------------------------------------------------------------------------------------ before loading


def _features(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def _by_module(model: PreTrainedModel, stored: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module -> its tensors, by the model's names: renamed as transformers will when it loads them."""
    mapping = copy.deepcopy(get_model_conversion_mapping(model))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = dict(model.state_dict())
    modules: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    for key, tensor in stored.items():
        module, _, leaf = key.rpartition(".")
        if module not in names:
            twin, merged = rename_source_key(f"{module}.weight", renamings, converters, model.base_model_prefix, own)
            names[module] = module if merged is not None else twin.removesuffix(".weight")
        modules.setdefault(names[module], {})[leaf] = tensor
    return modules


def _refuse_strangers(model: PreTrainedModel, names: list[str]) -> None:
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    names = [name for name in names if not any(pattern.search(f"{name}.weight") for pattern in ignored)]
    if not names:
        return
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if any("expert" in name for name in names):
        why = "experts of a mixture, which this version of transformers stacks into one tensor, cannot be 4-bit yet"
    else:
        why = f"{type(model).__name__} has no linear layers of these names"
    raise ValueError(f"{listed}: stored in 4 bits, but {why}")


def _refuse_gaps(
    model: PreTrainedModel, linears: dict[str, nn.Module], stored: dict[str, dict[str, Tensor]], form: formats.Format
) -> None:
    """Every linear layer of the decoder must be in the checkpoint, whole: what is not would be random."""
    head = model.get_output_embeddings()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name, module in linears.items():
        tensors = stored.get(name, {})
        if form.weight in tensors or "weight" in tensors or f"{name}.weight" in model.all_tied_weights_keys:
            continue
        partly = sorted(set(tensors) & set(form.leaves))
        inside = name.startswith(f"{model.base_model_prefix}.") or module is head
        if partly or (inside and not any(pattern.search(f"{name}.weight") for pattern in ignored)):
            has = f"there is only {', '.join(partly)}" if partly else "there is no weight either"
            raise ValueError(f"{name}.{form.weight}: missing in the checkpoint ({has})")


def _wait(module: nn.Module, tensors: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
    """Make a linear layer ready for its tensors, in place."""
    n, k = _features(module)
    module._parameters.pop("weight", None)
    module.__class__ = _Pending
    assert isinstance(module, _Pending)
    module.in_features, module.out_features = k, n
    for leaf, tensor in tensors.items():
        module.register_buffer(leaf, tensor)
    if bias is not None and module._parameters.get("bias") is None:
        # the writer's layer had one, if only of zeros
        module._parameters.pop("bias", None)
        module.register_buffer("bias", torch.empty(n, dtype=dtype, device="meta"))


def _untie(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """A layer with 4-bit numbers of its own shares no weight with the embedding, whatever the configuration says."""
    if model.all_tied_weights_keys.pop(f"{name}.weight", None) is not None and module is model.get_output_embeddings():
        model.config.tie_word_embeddings = False


#: Who wrote a GPTQ checkpoint, and as whom: of the first format with zeros other than 8 GPTQModel reads only what names
#: a version of its own from which on zeros are right. (AutoGPTQ had stored a zero of 0 as 15.)
_WRITERS = [f"torch_pagedkv:{__version__}", "gptqmodel:0.9.0"]


class Rounded(Int4Quantizer):
    """Of a model that was quantised here. As GPTQ it is saved in the first format, which every reader knows, unless a
    zero is 0: that one it stores as -1, which some readers take for 0 and others for 16. The second format has no such
    case."""

    @classmethod
    def of(cls, group_size: int, lm_head: bool = False, *, act_order: bool = False, awq: bool = False) -> Rounded:
        """For groups of `group_size` inputs.

        Args:
            lm_head: the language head is 4-bit too.
            act_order: inputs are not in order of their groups.
            awq: save as AWQ, which has a place for neither of these, nor for a short last group.
        """
        if awq:
            return cls(AwqConfig(bits=4, group_size=group_size, zero_point=True))
        return cls(
            GPTQConfig(
                4, group_size=group_size, sym=False, desc_act=act_order, lm_head=lm_head, meta={"quantizer": _WRITERS}
            )
        )

    def _form(self, model: PreTrainedModel) -> formats.Format:
        configs = (self.quantization_config, model.config.quantization_config)  # a patched model has a copy
        if self.recipe.form is FORMATS["awq"]:
            left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Int4Linear)]
            for config in configs:
                config.modules_to_not_convert = left or None
            return self.recipe.form
        zero = any(m.zeros is not None and bool((m.zeros == 0).any()) for _, m in int4_layers(model))
        form = FORMATS["gptq_v2" if zero else "gptq"]
        for config in configs:
            config.format = form.name
        return form
