"""The quantizer of models whose layers are in forms that no checkpoint format here has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from .fixed import fixed_layers
from .quantizer import FixedQuantizer

if TYPE_CHECKING:
    from ..patches.log import PatchLog


class HeldConfig(QuantizationConfigMixin):
    """Says how the layers are quantised ("gguf", "int8", "fp8"), for people."""

    def __init__(self, form: str = "", **kwargs: Any) -> None:
        self.quant_method = "torch_pagedkv"
        self.form = form


class Held(FixedQuantizer):
    """Stands for layers such as Q4_K or W8A8 ones: they run and can be dequantised, and are not saved as they are.

    Attributes:
        form: "gguf", "int8" or "fp8".
        kept: layer -> why it was left in floating point.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.form: str = quantization_config.form
        self.kept: dict[str, str] = {}

    @classmethod
    def of(cls, form: str) -> Held:
        """For layers of a form."""
        return cls(HeldConfig(form))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Raises ValueError while there is a layer that is held so."""
        for name, module in fixed_layers(model):
            raise ValueError(
                f"{name}: its weight ({module.source or module.bits}) has no exact form in the checkpoints that are "
                "written here; model.dequantize() gives float weights, which can be saved"
            )
        return dict(model.state_dict()), {}


def untie(model: PreTrainedModel, marks: PatchLog) -> None:
    """Note in the model, and in `marks` to be undone, that its head has a quantised weight of its own, if it has."""
    head, ties = model.get_output_embeddings(), dict(model.all_tied_weights_keys)
    names = [name for name, module in fixed_layers(model) if module is head]
    if names and ties.pop(f"{names[0]}.weight", None) is not None:
        marks.set_attribute(model, "all_tied_weights_keys", ties)
        marks.set_attribute(model.config, "tie_word_embeddings", False)
