"""AWQ and GPTQ of a whole decoder, block after block, from calibration data.

Each block sees what the blocks before it give once they are quantised. In it AWQ's scales are searched and folded
first, for all layers from one pass over the data; then the weights are rounded, on AWQ's clipped grids or by GPTQ, in
the order of the layers' calls, each for inputs that the layers before it in the block have changed already ("true
sequential"). What is rounded is a weight that makes up for those changes (quant/correction.py).

At any time there are the hidden states in front of one block (the float model's and the quantised one's), float weights
of one block, and the second moments of its inputs. With a folder, a block's result is written there once it is done,
and a run that was broken off goes on from the blocks that are there.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from . import awq, folding, gptq, rtn
from .blocks import Blocks, find, hooked, input_of
from .correction import corrected
from .formats import Int4Weight

#: method -> (scales are searched and folded, weights are rounded by GPTQ)
METHODS = {"awq": (True, False), "gptq": (False, True), "awq+gptq": (True, True)}


@dataclass(frozen=True)
class Options:
    """How to quantise.

    Attributes:
        method: one of METHODS.
        group_size: inputs in a group, -1: all.
        order: of GPTQ, one of `gptq.ORDERS`.
        damping: of GPTQ.
        correction: how much of the error that the layers before have made is made up for, 0 .. 1 (quant/correction.py).
            0: each layer has its own weight as target, and a run takes half the time.
    """

    method: str
    group_size: int = 128
    order: gptq.Order = "static"
    damping: float = 0.01
    correction: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, needs one of {', '.join(map(repr, METHODS))}")
        if self.order not in gptq.ORDERS:
            raise ValueError(f"order: got {self.order!r}, needs one of {', '.join(map(repr, gptq.ORDERS))}")
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ValueError(f"damping: got {self.damping!r}, needs a number in (0, 1]")
        if not isinstance(self.correction, (int, float)) or not 0 <= self.correction <= 1:
            raise ValueError(f"correction: got {self.correction!r}, needs a number in 0 .. 1")


@dataclass(frozen=True)
class Changes:
    """What a run may do to the model.

    Attributes:
        begin: (layers), before any of them changes.
        change: (parameter, value): a parameter gets a new value, rounded to its dtype.
        replace: (layer, weight, source): a layer becomes 4-bit.
        kept: (name, reason), for the report.
    """

    begin: Callable[[Sequence[nn.Module]], None]
    change: Callable[[Tensor, Tensor], None]
    replace: Callable[[nn.Module, Int4Weight, str], None]
    kept: Callable[[str, str], None]


@torch.no_grad()
def run(
    model: nn.Module,
    layers: dict[str, nn.Module],
    ids: Tensor,
    options: Options,
    changes: Changes,
    *,
    head_dim: int,
    folder: Path | None = None,
    offload: str | Path | None = None,
) -> None:
    """Quantise these layers of a model.

    Args:
        model: in evaluation mode, on one device.
        layers: by name.
        ids: int64 [S, T], calibration data.
        head_dim: of its attention.
        folder: for the results of finished blocks.
        offload: see `Blocks`.

    Raises:
        ValueError: the model cannot be calibrated, or the folder holds the results of something else. Nothing has
            changed, unless it says which layer gave NaN or infinite numbers.
    """
    name, modules = find(model, set(layers))
    kept = _Kept(folder, model, layers, ids, options) if folder is not None else None
    blocks = Blocks(model, name, modules, ids, offload, exact=options.correction > 0)
    work = _Work(model, layers, options, changes, blocks, head_dim)
    with hf_logging.tqdm(total=len(blocks), desc=f"{options.method}, blocks", unit="block") as bar:
        for number in range(len(blocks)):
            if kept is not None and kept.has(number):
                work.take(number, *kept.read(number))
            else:
                results = work.quantize(number)
                if kept is not None:
                    kept.write(number, *results)
            bar.update()
    work.rest()


class _Work:
    """A run: what is done to one block after the other."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        options: Options,
        changes: Changes,
        blocks: Blocks,
        head_dim: int,
    ) -> None:
        self.model, self.layers, self.options, self.changes = model, layers, options, changes
        self.blocks, self.head_dim = blocks, head_dim
        counts = collections.Counter(id(p) for module in model.modules() for p in module._parameters.values())
        self.shared = {key for key, count in counts.items() if count > 1}
        self.scaling, self.compensating = METHODS[options.method]
        self.source = options.method.upper()

    def inside(self, number: int) -> list[str]:
        """Names, inside a block, of its layers."""
        head = self.blocks.names[number] + "."
        return [name.removeprefix(head) for name in self.layers if name.startswith(head)]

    # ---- blocks

    def quantize(self, number: int) -> tuple[dict[str, Int4Weight], dict[str, Tensor]]:
        """Quantise a block and go on to the next one.

        Returns:
            layer -> weight, and the new values of other parameters, by their names inside the block.
        """
        block, names = self.blocks.modules[number], self.inside(number)
        modules = dict(block.named_modules())
        self.changes.begin([modules[name] for name in names])
        weights = {name: folding.matrix(modules[name]).float().clone() for name in names}
        stages = folding.stages(block, names, lambda: self.blocks.call(number, 0))
        meant = self._look_ahead(number, {stage.layers[0]: modules[stage.layers[0]] for stage in stages})
        scales: dict[str, Tensor] = {}
        if self.scaling and stages:
            stages = folding.find(self.blocks, number, stages, self.head_dim, self.shared)
            moments = self._moments(number, [stage.layers[0] for stage in stages])
            for stage in stages:
                scales[stage.layers[0]] = self._scale(number, stage, weights, moments, modules)
        results: dict[str, Int4Weight] = {}
        for stage in stages:
            first = stage.layers[0]
            w, h = self._problem(number, stage, weights, meant.get(first), scales.get(first))
            parts = [len(weights[name]) for name in stage.layers]
            for name, part in zip(stage.layers, _split(self._round(w, h), parts)):
                results[name] = part
                self._set(modules[name], dequantized(part))
        for name in names:
            if name not in results:
                self.changes.kept(f"{self.blocks.names[number]}.{name}", _NEVER)
                results[name] = rtn.quantize(weights[name], self.options.group_size)
                self._set(modules[name], dequantized(results[name]))
        folded = {
            f"{fold.module}.{leaf}": parameter.detach()
            for fold in [stage.fold for stage in stages if stage.fold is not None]
            for leaf, parameter in modules[fold.module]._parameters.items()
            if parameter is not None and not (leaf == "weight" and fold.module in results)
        }
        self._finish(number, results)
        return results, folded

    def take(self, number: int, results: dict[str, Int4Weight], folded: dict[str, Tensor]) -> None:
        """A block's results from an earlier run."""
        block = self.blocks.modules[number]
        modules = dict(block.named_modules())
        self.changes.begin([modules[name] for name in self.inside(number)])
        self._look_ahead(number, {})
        for path, value in folded.items():
            self.changes.change(block.get_parameter(path), value)
        for name, weight in results.items():
            self._set(modules[name], dequantized(weight))
        self._finish(number, results)

    def _look_ahead(self, number: int, modules: dict[str, nn.Module]) -> Mapping[str, Sequence[Tensor]]:
        """What these modules of a block, still float, are given in the float model."""
        return self.blocks.look_ahead(number, modules) if self.options.correction else {}

    def _finish(self, number: int, results: dict[str, Int4Weight]) -> None:
        block = self.blocks.modules[number]
        if number + 1 < len(self.blocks):
            self.blocks.advance(number)
        for name, weight in results.items():
            self.changes.replace(block.get_submodule(name), weight, self.source)

    def rest(self) -> None:
        """Layers outside of the blocks, from one pass of the quantised model."""
        heads = tuple(f"{name}." for name in self.blocks.names)
        outside = {name: module for name, module in self.layers.items() if not name.startswith(heads)}
        if not outside:
            return
        sums = {name: _Moments() for name in outside}
        with hooked([(module, sums[name].add_input) for name, module in outside.items()]):
            for batch in self.blocks.batches:
                self.model(input_ids=batch, use_cache=False)
        self.changes.begin(list(outside.values()))
        for name, module in outside.items():
            w = folding.matrix(module)
            if sums[name].count:
                weight = self._round(w, sums[name].mean(name))
            else:
                self.changes.kept(name, _NEVER)
                weight = rtn.quantize(w, self.options.group_size)
            self.changes.replace(module, weight, self.source)

    # ---- a block's parts

    def _scale(
        self,
        number: int,
        stage: folding.Stage,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        modules: dict[str, nn.Module],
    ) -> Tensor:
        """Search and fold the scales of a stage; they are 1 where nothing can take them over."""
        first = stage.layers[0]
        h, fold, why = moments[first], stage.fold, stage.why
        if fold is not None and fold.rows is not None and fold.module not in weights:
            why = f"{fold.module} is not quantised"
            fold = None
        if fold is None:
            self.changes.kept(f"{self.blocks.names[number]}.{first}", f"not scaled: {why}")
            return torch.ones(h.shape[0], device=h.device)
        s = awq.search([weights[name] for name in stage.layers], h, self.options.group_size, ties=fold.rows)
        real = folding.apply(fold, s, modules, self.changes.change, weights)
        for name in stage.layers:
            self._set(modules[name], weights[name].mul_(real))
        return real

    def _problem(
        self,
        number: int,
        stage: folding.Stage,
        weights: dict[str, Tensor],
        meant: Sequence[Tensor] | None,
        scales: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The weights of a stage that are to be rounded, [N, K], and the second moments of its inputs as they are
        now."""
        first = stage.layers[0]
        where = f"{self.blocks.names[number]}.{first}"
        w = torch.cat([weights[name] for name in stage.layers])
        total, cross = _Moments(), _Moments()

        def see(index: int, given: Tensor) -> None:
            total.add(given)
            if meant is not None:
                cross.add(meant[index] if scales is None else meant[index] / scales, given)

        self.blocks.watch(number, self.blocks.modules[number].get_submodule(first), see)
        h = total.mean(where)
        return (w if meant is None else corrected(w, h, cross.mean(where), self.options.correction)), h

    def _round(self, w: Tensor, h: Tensor) -> Int4Weight:
        options = self.options
        if self.compensating:
            return gptq.quantize(w, h, options.group_size, order=options.order, damping=options.damping)
        return awq.quantize(w, h, options.group_size)

    def _moments(self, number: int, layers: list[str]) -> dict[str, Tensor]:
        """Of several layers' inputs, from one pass."""
        block = self.blocks.modules[number]
        sums = {name: _Moments() for name in layers}
        with hooked([(block.get_submodule(name), sums[name].add_input) for name in layers]):
            for index in range(len(self.blocks.batches)):
                self.blocks.call(number, index)
        return {name: sums[name].mean(f"{self.blocks.names[number]}.{name}") for name in layers}

    def _set(self, module: Any, w: Tensor) -> None:
        self.changes.change(module.weight, w.T if isinstance(module, Conv1D) else w)


_NEVER = "rounded to nearest: the calibration text never reaches it"


class _Moments:
    """Sums up second moments of inputs."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, other: Tensor | None = None) -> None:
        """x: [..., K]. other: x's shape; with it the moments are mean(x other^T)."""
        rows = x.detach().flatten(0, -2).float()
        columns = rows if other is None else other.detach().flatten(0, -2).float()
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total.addmm_(rows.T, columns)
        self.count += len(rows)

    def add_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """As a forward pre-hook."""
        self.add(input_of(args, kwargs))

    def mean(self, name: str) -> Tensor:
        """float32 [K, K].

        Raises:
            ValueError: an input was NaN or infinite.
        """
        assert self.total is not None
        if not bool(torch.isfinite(self.total).all()):
            raise ValueError(f"{name}: its inputs are NaN or infinite on the calibration text")
        return self.total / self.count


def dequantized(weight: Int4Weight) -> Tensor:
    """float32 [N, K]."""
    groups = weight.groups
    zeros = 8 if weight.zeros is None else weight.zeros.float()[groups].T
    return weight.scales.float()[groups].T * (weight.q.float() - zeros)


def _split(weight: Int4Weight, rows: list[int]) -> Iterator[Int4Weight]:
    first = 0
    assert weight.zeros is not None
    for count in rows:
        part = slice(first, first + count)
        scales = weight.scales[:, part]
        half = scales.half()
        if scales.dtype != torch.float16 and bool((half.float() == scales).all()):
            scales = half
        yield Int4Weight(
            weight.q[part].contiguous(),
            scales.contiguous(),
            weight.zeros[:, part].contiguous(),
            None,
            weight.group_size,
            weight.g_idx,
        )
        first += count


# ------------------------------------------------------------------------------------------------ kept results


class _Kept:
    """Results of finished blocks in a folder."""

    def __init__(
        self, folder: Path, model: nn.Module, layers: dict[str, nn.Module], ids: Tensor, options: Options
    ) -> None:
        self.folder = folder
        mark = {"options": asdict(options), "calibration": _digest([ids]), "model": _digest(_probe(model, layers))}
        file = folder / "run.json"
        if file.is_file():
            found = json.loads(file.read_text())
            for name, value in mark.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"{folder}: holds the results of a run with other {name}; remove it, or give another folder"
                    )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mark, indent=1) + "\n")

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:04}.safetensors"

    def has(self, number: int) -> bool:
        return self._file(number).is_file()

    def write(self, number: int, results: dict[str, Int4Weight], folded: dict[str, Tensor]) -> None:
        tensors = {f"parameter:{path}": value for path, value in folded.items()}
        sizes = {}
        for name, weight in results.items():
            sizes[name] = str(weight.group_size)
            for leaf in ("q", "scales", "zeros", "g_idx"):
                value = getattr(weight, leaf)
                if value is not None:
                    tensors[f"{leaf}:{name}"] = value
        part = self._file(number).with_suffix(".part")
        save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, part, metadata=sizes)
        os.replace(part, self._file(number))

    def read(self, number: int) -> tuple[dict[str, Int4Weight], dict[str, Tensor]]:
        from safetensors import safe_open

        try:
            tensors = load_file(self._file(number))
            with safe_open(self._file(number), framework="pt") as file:
                sizes = file.metadata()
        except Exception as error:
            raise ValueError(f"{self._file(number)}: corrupt or truncated, remove it: {error}") from error
        results = {
            name: Int4Weight(
                tensors[f"q:{name}"],
                tensors[f"scales:{name}"],
                tensors.get(f"zeros:{name}"),
                None,
                int(size),
                tensors.get(f"g_idx:{name}"),
            )
            for name, size in sizes.items()
        }
        folded = {key.removeprefix("parameter:"): t for key, t in tensors.items() if key.startswith("parameter:")}
        return results, folded


def _probe(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[Tensor]:
    """Some of each layer's numbers."""
    for module in layers.values():
        yield folding.matrix(module)[:: max(1, module.weight.shape[0] // 8), :64].float()  # type: ignore[index]


def _digest(tensors: Iterator[Tensor] | list[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(str(tuple(tensor.shape)).encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
