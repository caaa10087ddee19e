"""What a checkpoint's quantization_config says, and what its files hold, before any weight is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formats import FORMATS, Format, Scheme

logger = logging.getLogger("torch_pagedkv")

#: quantization methods that are loaded here -> the packages that transformers' own loader needs
METHODS = {
    "awq": ("gptqmodel", "accelerate"),
    "gptq": ("optimum", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint's 4-bit layers are stored.

    Attributes:
        form: of the tensors.
        title: of the format, for people.
        rules: (targets, scheme); the first of which a target matches a layer holds for it. A target is "Linear", a
            layer's name, its end, or "re:" and a regular expression on it.
    """

    form: Format
    title: str
    rules: tuple[tuple[tuple[str, ...], Scheme], ...]

    def scheme(self, layer: str) -> Scheme:
        """Of a layer by its name.

        Raises:
            ValueError: no rule is for it.
        """
        for exact in (True, False):
            for targets, scheme in self.rules:
                if any(_targets(target, layer) if exact else target == "Linear" for target in targets):
                    return scheme
        raise ValueError("it is stored in 4 bits, and no group of the quantization_config is for it")


def _targets(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], layer) is not None
    return layer == target or layer.endswith("." + target)


def recipe(config: Mapping[str, Any]) -> Recipe:
    """Reads a quantization_config.

    Raises:
        ValueError: it is of a kind that is not loaded here; the message says what is.
    """
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method")))
    if method == "compressed-tensors":
        return _compressed(config)
    if method not in METHODS:
        raise ValueError(f"quant_method: got {method!r}, needs one of {', '.join(METHODS)}")
    _need("bits", config.get("bits"), (4,))
    group_size = _group_size(config.get("group_size", 128), "group_size")
    stored = config.get("version") if method == "awq" else config.get("checkpoint_format")
    stored = str(getattr(stored, "value", stored) or config.get("format") or ("gemm" if method == "awq" else "gptq"))
    if method == "awq":
        _need("version", stored.lower(), ("gemm",))
        scheme = Scheme(group_size, symmetric=not config.get("zero_point", True))
        return Recipe(FORMATS["awq"], "AWQ", ((("Linear",), scheme),))
    _need("checkpoint_format", stored.lower(), ("gptq", "gptq_v2"))
    if config.get("adapter"):
        raise ValueError(f"adapter: got {config['adapter']!r}, needs none: what it adds to the layers would be missing")
    if config.get("is_marlin_format") or config.get("pack_dtype") not in (None, "int32"):
        raise ValueError(
            "only GPTQ checkpoints packed in int32 words are loaded (not Marlin's layout, not other words)"
        )
    scheme = Scheme(group_size, bool(config.get("sym", True)), bool(config.get("desc_act", False)))
    return Recipe(FORMATS[stored.lower()], "GPTQ", (*_dynamic(config, scheme), (("Linear",), scheme)))


#: of GPTQModel's exceptions: what would be another layout, or more than a weight
_NOT_HERE = ("format", "checkpoint_format", "method", "quant_method", "pack_dtype", "adapter")


def _dynamic(config: Mapping[str, Any], scheme: Scheme) -> list[tuple[tuple[str, ...], Scheme]]:
    """GPTQModel's exceptions: a regular expression on layers ("-:" in front: not quantised) -> other settings."""
    rules: list[tuple[tuple[str, ...], Scheme]] = []
    for pattern, settings in (config.get("dynamic") or {}).items():
        expression = _expression(pattern.removeprefix("-:").removeprefix("+:"), "dynamic")
        if pattern.startswith("-:"):
            continue
        if settings.get("bits", 4) != 4:
            raise ValueError(f"dynamic: {pattern!r} has bits={settings['bits']}, only 4 are supported")
        for name in _NOT_HERE:
            if settings.get(name) not in (None, config.get(name)):
                raise ValueError(f"dynamic: {pattern!r} has {name}={settings[name]!r}, which is not supported")
        own = Scheme(
            _group_size(settings.get("group_size", scheme.group_size), f"dynamic: {pattern!r}: group_size"),
            bool(settings.get("sym", scheme.symmetric)),
            bool(settings.get("desc_act", scheme.act_order)),
        )
        rules.append((("re:" + expression,), own))
    return rules


def _expression(pattern: str, name: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from error
    return pattern


def _group_size(value: Any, name: str) -> int:
    if not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"{name}: got {value!r}, needs -1 or an integer >= 1")
    return value


def _compressed(config: Mapping[str, Any]) -> Recipe:
    groups = config.get("config_groups") or {}
    for name, content in (
        ("sparsity_config", (config.get("sparsity_config") or {}).get("format", "dense") != "dense"),
        ("transform_config", bool((config.get("transform_config") or {}).get("config_groups"))),
    ):
        if content:
            raise ValueError(f"{name}: compressed-tensors checkpoints that need it are not supported")
    if config.get("kv_cache_scheme"):
        logger.warning("torch_pagedkv: kv_cache_scheme is not applied (patch has kv_cache_dtype for it)")
    rules: list[tuple[tuple[str, ...], Scheme]] = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        _need(f"{where}.format", group.get("format") or config.get("format"), ("pack-quantized",))
        weights = group.get("weights") or {}
        _need(f"{where}.weights.num_bits", weights.get("num_bits"), (4,))
        _need(f"{where}.weights.type", weights.get("type", "int"), ("int",))
        _need(f"{where}.weights.strategy", weights.get("strategy") or "group", ("group", "channel", "tensor"))
        for other in ("input_activations", "output_activations"):
            _need(f"{where}.{other}", group.get(other), (None,))
        size = weights.get("group_size") if (weights.get("strategy") or "group") == "group" else -1
        size = _group_size(size, f"{where}.weights.group_size")
        scheme = Scheme(size, bool(weights.get("symmetric", True)), weights.get("actorder") in ("group", True))
        targets = tuple(group.get("targets") or ())
        for target in targets:
            _expression(target.removeprefix("re:") if target.startswith("re:") else "", f"{where}.targets")
        rules.append((targets, scheme))
    if not rules:
        raise ValueError("config_groups: got none, needs the layers that are quantised")
    return Recipe(FORMATS["pack-quantized"], "compressed-tensors", tuple(rules))


def _need(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        listed = " or ".join(map(repr, choices))
        raise ValueError(f"{name}: got {value!r}, needs {listed}: only 4-bit weights of these kinds are loaded")


def headers(files: Sequence[str]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's files as an empty one on the meta device: names, shapes and dtypes.

    Raises:
        ValueError: a file is corrupt or truncated.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(_header(file))
        except Exception as error:
            raise ValueError(f"{file}: corrupt or truncated: {error}") from error
    return tensors


def _header(file: str) -> dict[str, Tensor]:
    if not file.endswith(".safetensors"):
        content = torch.load(file, map_location="meta", weights_only=True)
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    from safetensors import safe_open

    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
            part = opened.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
            tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return tensors
