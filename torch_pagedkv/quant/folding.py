"""Which linear layers of a block share an input, and which operation in front of them can take over its scales.

Everything is found by looking at one pass through the block, not by names: layers share an input if they are given the
same tensor; it may be the output of a norm; or each of its channels may be proportional to one output of an earlier
linear layer (the values behind an attention, the ungated half of an MLP), which shows when those outputs are scaled by
known factors. What was found is tried on a copy of the block before it is used.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .blocks import Blocks, hooked, input_of

_DIGITS = 64  # outputs are told apart by factors 1 + digit / _DIGITS, a digit of their number a pass
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fold:
    """What takes over the scales of an input.

    Attributes:
        module: the name, inside the block, of a norm or a linear layer.
        offset: of a norm: what its forward adds to its weight (Gemma: 1).
        rows: of a linear layer: int64 [K], its output that each channel is proportional to, -1: none. None: a norm.
    """

    module: str
    offset: float = 0.0
    rows: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """Linear layers that are given the same tensor.

    Attributes:
        layers: their names inside the block, in the order of their calls.
        fold: what can take over scales of their input, or None.
        why: why nothing can.
    """

    layers: tuple[str, ...]
    fold: Fold | None = None
    why: str = ""


def is_copyable(block: nn.Module) -> bool:
    """False if somebody has put a plain function on one of the modules: a copy would run the original through it."""
    return not any(isinstance(vars(module).get("forward"), types.FunctionType) for module in block.modules())


def matrix(module: Any) -> Tensor:
    """The weight as [N, K]."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


# ------------------------------------------------------------------------------------------------ finding


@torch.no_grad()
def stages(block: nn.Module, layers: list[str], run: Callable[[], object]) -> list[Stage]:
    """The layers by the tensor they are given, in the order of their calls. A layer that is not called is left out.

    Args:
        block: a decoder block.
        layers: names of linear layers inside of it.
        run: runs the block.
    """
    inputs: list[Tensor] = []
    groups: list[list[str]] = []

    def watch(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if any(name in group for group in groups):
                return
            for seen, group in zip(inputs, groups):
                if _is_same(seen, x):
                    group.append(name)
                    return
            inputs.append(x)
            groups.append([name])

        return before

    with hooked([(block.get_submodule(name), watch(name)) for name in layers]):
        run()
    return [Stage(tuple(group)) for group in groups]


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


@torch.no_grad()
def find(blocks: Blocks, number: int, found: list[Stage], head_dim: int, shared: set[int]) -> list[Stage]:
    """The stages of a block with what can take over their scales, each tried on a copy of the block in float32.

    Args:
        blocks, number: the block.
        found: of `stages`.
        head_dim: size of an attention head: fused projections are looked through in pieces of it.
        shared: ids of parameters that more than one module has, which must not change.
    """
    if not is_copyable(blocks.modules[number]):
        return [Stage(stage.layers, None, "something else is bound to a module of its block") for stage in found]
    twin = _Twin(blocks, number)
    norms = twin.norms(found)
    out: list[Stage] = []
    for index, stage in enumerate(found):
        fold, why = None, "no operation in front of it that scales can be folded into"
        if stage.layers[0] in norms:
            fold, why = _norm(twin, norms[stage.layers[0]], stage, shared)
        else:
            for earlier in reversed([name for before in found[:index] for name in before.layers]):
                rows = twin.rows_of(earlier, stage.layers[0], head_dim)
                if rows is not None:
                    fold = Fold(earlier, rows=rows)
                    if twin.keeps(fold, stage):
                        break
                    fold, why = None, f"{earlier} feeds more than these layers"
        out.append(Stage(stage.layers, fold, "" if fold else why))
    return out


def _norm(twin: _Twin, name: str, stage: Stage, shared: set[int]) -> tuple[Fold | None, str]:
    if any(id(p) in shared for p in twin.original.get_submodule(name).parameters()):
        return None, f"the weight of {name} is shared with another module"
    for offset in (0.0, 1.0):
        fold = Fold(name, offset)
        if twin.keeps(fold, stage):
            return fold, ""
    return None, f"the output of {name} goes to others too, or is not proportional to its weight"


class _Twin:
    """A float32 copy of a block, to try things on."""

    def __init__(self, blocks: Blocks, number: int) -> None:
        self.original = blocks.modules[number]
        self.block = copy.deepcopy(self.original).float()
        self.hidden = blocks.sample().float()
        self._call = lambda: blocks.call(number, 0, self.block, self.hidden)
        self._plain: Tensor | None = None

    def norms(self, found: list[Stage]) -> dict[str, str]:
        """The first layer of a stage -> the norm whose output it is given."""
        outputs: list[tuple[str, Tensor]] = []
        given: dict[str, Tensor] = {}

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    outputs.append((name, output))

            return hook

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given[name] = input_of(args, kwargs)

            return hook

        handles = [m.register_forward_hook(after(name)) for name, m in self.block.named_modules() if _is_norm(m)]
        firsts = [stage.layers[0] for stage in found]
        try:
            with hooked([(self.block.get_submodule(name), before(name)) for name in firsts]):
                self._call()
        finally:
            for handle in handles:
                handle.remove()
        return {
            first: name
            for first in firsts
            if first in given
            for name, output in outputs
            if _is_same(output, given[first])
        }

    def keeps(self, fold: Fold, stage: Stage) -> bool:
        """True if folding random scales leaves the block's output as it was."""
        if self._plain is None:
            self._plain = self._call()
        size = matrix(self.block.get_submodule(stage.layers[0])).shape[1]
        s = _random(size, self.hidden.device)
        if fold.rows is not None:
            s = torch.where(fold.rows < 0, torch.ones_like(s), _random(int(fold.rows.max()) + 1, s.device)[fold.rows])
        old = {name: value.clone() for name, value in self.block.state_dict().items()}
        apply(fold, s, dict(self.block.named_modules()), _set)
        for name in stage.layers:
            matrix(self.block.get_submodule(name)).mul_(s)
        got = self._call()
        self.block.load_state_dict(old)
        return float((got - self._plain).norm()) <= _TOLERANCE * float((self._plain - self.hidden).norm())

    def rows_of(self, source: str, layer: str, head_dim: int) -> Tensor | None:
        """Which output of `source` each input of `layer` is proportional to; None if that is not so for any."""
        n = matrix(self.block.get_submodule(source)).shape[0]
        plain = self._input(layer, source, None)
        pieces = [n] + [n // p for p in (2, 3) if n % p == 0] + ([head_dim] if n % head_dim == 0 else [])
        for piece in dict.fromkeys(pieces):
            rows = torch.full((plain.shape[-1],), -1, device=plain.device)
            clean = True
            for first in range(0, n, piece):
                found = self._proportional(source, layer, plain, first, piece, n)
                if found is None:
                    clean = clean and piece < n
                    continue
                rows = torch.where(found >= 0, found, rows)
            if bool((rows >= 0).any()):
                return rows
        return None

    def _proportional(self, source: str, layer: str, plain: Tensor, first: int, piece: int, n: int) -> Tensor | None:
        """Scales outputs first .. first + piece: which of them each input follows, -1: none. None: something that they
        change is not proportional to them."""
        number = torch.arange(piece, device=plain.device)
        result = torch.zeros(plain.shape[-1], dtype=torch.long, device=plain.device)
        moved = None
        place = 1
        while place == 1 or place < piece:
            digit = number // place % _DIGITS
            factors = torch.ones(n, device=plain.device)
            # from 1 + 1 / 64: an input that follows none of them stays as it is
            factors[first : first + piece] = 1 + (digit + 1) / _DIGITS
            got = self._input(layer, source, factors)
            norm = plain.square().sum(0).clamp_min(1e-30)
            ratio = (got * plain).sum(0) / norm
            rest = (got - ratio * plain).square().sum(0) / norm
            here = (ratio - 1) * _DIGITS - 1
            moving = here > -0.5
            wrong = (rest.sqrt() > 1e-3) | (moving & ((here - here.round()).abs() > 0.1))
            if bool(wrong.any()) or (moved is not None and not torch.equal(moved, moving)) or not bool(moving.any()):
                return None
            moved = moving
            result += here.round().long().clamp_min(0) * place
            place *= _DIGITS
        assert moved is not None
        return torch.where(moved, result + first, torch.full_like(result, -1))

    def _input(self, layer: str, source: str, factors: Tensor | None) -> Tensor:
        """[tokens, K] that a layer is given while the outputs of another are multiplied."""
        given: list[Tensor] = []

        def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output if factors is None else output * factors

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(input_of(args, kwargs).flatten(0, -2))

        handle = self.block.get_submodule(source).register_forward_hook(scale)
        try:
            with hooked([(self.block.get_submodule(layer), before)]):
                self._call()
        finally:
            handle.remove()
        return given[0]


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not module._modules


def _random(count: int, device: torch.device) -> Tensor:
    return (0.5 + torch.rand(count, generator=torch.Generator().manual_seed(count))).to(device)


# ------------------------------------------------------------------------------------------------ folding


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.to(parameter.dtype)


@torch.no_grad()
def apply(
    fold: Fold,
    scales: Tensor,
    modules: Mapping[str, nn.Module],
    change: Callable[[Tensor, Tensor], None],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Divide what comes out of `fold.module` by scales.

    Args:
        scales: [K], float32 or wider; of inputs that follow one output they are equal.
        modules: of the block.
        change: (parameter, its new value), which may be rounded to the parameter's dtype.
        weights: float32 matrices that stand for the weights of linear layers, changed in place.

    Returns:
        the scales that a norm's rounded weight really amounts to, by which the layers' weights are to be multiplied.
    """
    module: Any = modules[fold.module]
    bias = module._parameters.get("bias")
    if fold.rows is None:
        old = module.weight.detach().to(scales.dtype) + fold.offset
        change(module.weight, old / scales - fold.offset)
        new = module.weight.detach().to(scales.dtype) + fold.offset
        real = torch.where((new == 0) | (old == 0), torch.ones_like(old), old / new)
        if bias is not None:
            change(bias, bias.detach().to(scales.dtype) / real)
        return real
    by_row = torch.ones(matrix(module).shape[0], dtype=scales.dtype, device=scales.device)
    followed = fold.rows >= 0
    by_row[fold.rows[followed]] = scales[followed]
    if weights is not None and fold.module in weights:
        divided = weights[fold.module].div_(by_row[:, None])
    else:
        divided = matrix(module).to(scales.dtype) / by_row[:, None]
    change(module.weight, divided.T if isinstance(module, Conv1D) else divided)
    if bias is not None:
        change(bias, bias.detach().to(scales.dtype) / by_row)
    return scales
