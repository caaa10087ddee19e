"""Writers of 4-bit checkpoints, one number at a time from the formats' descriptions, and their dequantiser.

Nothing of the package under test is used: words are made by shifting plain Python integers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Layer:
    """q [N][K], scales [G, N], zeros [G][N], g_idx [K]: a weight that is known number by number."""

    q: np.ndarray
    scales: Tensor
    zeros: np.ndarray
    g_idx: np.ndarray

    def dense(self) -> Tensor:
        """float64 [N, K]: scale * (q - zero) of each input's group."""
        scales = self.scales.double().numpy()
        numbers = self.q.astype(np.float64) - self.zeros.T[:, self.g_idx]
        return torch.from_numpy(scales.T[:, self.g_idx] * numbers)


def random_layer(
    n: int,
    k: int,
    group: int,
    seed: int = 0,
    symmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    size: float = 0.02,
) -> Layer:
    """Random numbers; `act_order` assigns inputs to groups at random (with a short last group: what there is left)."""
    rng = np.random.default_rng(seed)
    group = k if group == -1 else group
    groups = -(-k // group)
    g_idx = np.arange(k) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    zeros = np.full((groups, n), 8) if symmetric else rng.integers(0, 16, (groups, n))
    scales = torch.from_numpy(rng.uniform(0.2, 1.0, (groups, n)) * size).to(dtype)
    return Layer(rng.integers(0, 16, (n, k)), scales, zeros, g_idx)


def _word(nibbles: list[int]) -> int:
    value = sum(int(nibble) << (4 * position) for position, nibble in enumerate(nibbles))
    return value - (1 << 32) if value >= 1 << 31 else value


def _pack_rows(numbers: np.ndarray) -> Tensor:
    """[R, C] -> int32 [R, ceil(C / 8)], eight neighbours of a row to a word, the first lowest."""
    rows, columns = numbers.shape
    words = [
        [_word([row[c] if c < columns else 0 for c in range(first, first + 8)]) for first in range(0, columns, 8)]
        for row in numbers.tolist()
    ]
    return torch.tensor(words, dtype=torch.int32).reshape(rows, -1)


def awq(layer: Layer) -> dict[str, Tensor]:
    def pack(numbers: np.ndarray) -> Tensor:
        rows, columns = numbers.shape
        words = [
            [
                _word([row[c + o] if c + o < columns else 0 for o in AWQ_COLUMNS])
                for c in range(0, columns, 8)
            ]
            for row in numbers.tolist()
        ]  # fmt: skip
        return torch.tensor(words, dtype=torch.int32).reshape(rows, -1)

    return {"qweight": pack(layer.q.T), "qzeros": pack(layer.zeros), "scales": layer.scales.clone()}


def gptq(layer: Layer, v2: bool = False) -> dict[str, Tensor]:
    stored = layer.zeros if v2 else (layer.zeros - 1) % 16
    return {
        "qweight": _pack_rows(layer.q).T.contiguous(),
        "qzeros": _pack_rows(stored),
        "scales": layer.scales.clone(),
        "g_idx": torch.from_numpy(layer.g_idx).int(),
    }


def gptq_v2(layer: Layer) -> dict[str, Tensor]:
    return gptq(layer, v2=True)


def compressed(layer: Layer, symmetric: bool = False, act_order: bool = False) -> dict[str, Tensor]:
    n, k = layer.q.shape
    tensors = {
        "weight_packed": _pack_rows(layer.q),  # signed -8..7, plus 8
        "weight_scale": layer.scales.T.contiguous(),
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _pack_rows(layer.zeros).T.contiguous()
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(layer.g_idx).int()
    return tensors


@dataclass
class Checkpoint:
    """A directory with a 4-bit model, and the float model that it stands for."""

    path: Path
    dense: hf.PreTrainedModel
    layers: dict[str, Layer]
    tensors: dict[str, Tensor]


CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq_v2": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": False,
        "checkpoint_format": "gptq_v2",
    },
    "pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                    "actorder": None,
                },
            }
        },
    },
}
WRITERS = {"awq": awq, "gptq": gptq, "gptq_v2": gptq_v2, "pack-quantized": compressed}


def linears(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and not n.endswith(skip)]


def write_model(
    path: Path,
    model: hf.PreTrainedModel,
    form: str,
    skip: tuple[str, ...] = ("lm_head",),
    config: dict[str, Any] | None = None,
    group: int = 32,
    **kind: Any,
) -> Checkpoint:
    """Replaces the model's linears by random 4-bit ones, in place, and writes it as a checkpoint of the format."""
    layers: dict[str, Layer] = {}
    replaced: dict[str, Tensor] = {}
    for seed, (name, module) in enumerate(linears(model, skip)):
        transposed = not isinstance(module, nn.Linear)
        n, k = module.weight.T.shape if transposed else module.weight.shape
        layer = layers[name] = random_layer(n, k, group, seed, **kind)
        with torch.no_grad():
            dense = layer.dense()
            module.weight.copy_(dense.T if transposed else dense)
        options = {}
        if form == "pack-quantized":
            options = {"symmetric": kind.get("symmetric", False), "act_order": kind.get("act_order", False)}
        replaced.update({f"{name}.{leaf}": t for leaf, t in WRITERS[form](layer, **options).items()})
    dropped = {f"{name}.weight" for name in layers}
    if model.config.tie_word_embeddings:
        dropped.add("lm_head.weight")
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n not in dropped} | replaced
    path.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    settings = model.config.to_dict() | {"quantization_config": config or CONFIGS[form]}
    settings["architectures"] = [type(model).__name__]
    (path / "config.json").write_text(json.dumps(settings, default=str))
    return Checkpoint(path, model, layers, tensors)


def rewrite(checkpoint: Checkpoint, change: dict[str, Tensor | None]) -> Path:
    """The checkpoint with some tensors replaced, or left out (None)."""
    tensors = {n: t for n, t in (checkpoint.tensors | change).items() if t is not None}
    save_file({n: t.contiguous() for n, t in tensors.items()}, checkpoint.path / "model.safetensors")
    return checkpoint.path
