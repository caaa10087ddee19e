"""Our quantizer's place in transformers' registry, and the configurations that need no other package.

Imported while transformers itself is being imported (quant/hook.py), so nothing here may need more of it than its
registry does.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import GPTQConfig as _GPTQConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import METHODS

_forced: contextvars.ContextVar[bool] = contextvars.ContextVar("torch_pagedkv_forced", default=False)
_STOCK: dict[str, tuple[Any, Any]] = {}  # method -> transformers' own quantizer and configuration


@contextlib.contextmanager
def forced() -> Iterator[None]:
    """Checkpoints that are loaded in this context come here, whatever is installed."""
    register()
    token = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(token)


def register() -> None:
    """Put our classes in front of transformers' own. Done once."""
    for method in METHODS:
        if method in _STOCK:
            continue
        _STOCK[method] = (auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method])
        auto.AUTO_QUANTIZER_MAPPING[method] = _Choice
        if method in _CONFIGS:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _CONFIGS[method]


def is_ours(method: str) -> bool:
    """True if a checkpoint of the method is loaded here: when asked for, or when transformers could not load it."""
    return _forced.get() or not all(importlib.util.find_spec(name) for name in METHODS[method])


def _method(config: Any) -> str:
    return str(getattr(config.quant_method, "value", config.quant_method))


class _Choice(HfQuantizer):
    """Stands in transformers' table; makes our quantizer, or the stock one where that can run."""

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        method = _method(quantization_config)
        from .loading import Int4Quantizer

        if is_ours(method) and kwargs.get("pre_quantized", True):
            return Int4Quantizer(quantization_config, **kwargs)
        return _STOCK[method][0](quantization_config, **kwargs)


class GPTQConfig(_GPTQConfig):  # of the same name: transformers compares it with the user's configuration
    """transformers' configuration that keeps all of GPTQModel's fields and needs no other package."""

    def __init__(self, bits: int, modules_in_block_to_quantize: Any = None, **kwargs: Any) -> None:
        super().__init__(bits, **kwargs)
        self.modules_in_block_to_quantize = modules_in_block_to_quantize
        for name in ("dynamic", "lm_head", "pack_dtype", "is_marlin_format", "adapter"):
            if name in kwargs:
                setattr(self, name, kwargs[name])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if not is_ours("gptq"):
            return _STOCK["gptq"][1].from_dict(config_dict, return_unused_kwargs, **kwargs)
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


class CompressedTensorsConfig(QuantizationConfigMixin):
    """A compressed-tensors configuration as it stands in the file."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.quant_method = "compressed-tensors"
        self.dequantize = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        fields = config_dict.get("quantization_config", config_dict)
        kinds = {fields.get("format")} | {g.get("format") for g in (fields.get("config_groups") or {}).values()}
        if not is_ours("compressed-tensors") or "pack-quantized" not in kinds:
            # another compression: transformers' own, which names the package it needs
            return _STOCK["compressed-tensors"][1].from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.fields)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Nothing of it may be replaced by the user's configuration."""
        return {}


_CONFIGS: dict[str, Any] = {"gptq": GPTQConfig, "compressed-tensors": CompressedTensorsConfig}
