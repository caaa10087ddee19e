"""`FixedQuantizer`: what transformers asks of the quantizer of any model with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .fixed import fixed_layers, to_linear


class FixedQuantizer(HfQuantizer):
    """Its layers run, can be dequantised, and adapters can be trained beside them."""

    requires_calibration = False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for _, module in fixed_layers(model):
            to_linear(module, dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: where there is no format, `get_state_dict_and_metadata` says so."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained, inputs have gradients."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True."""
        return True
