"""Linear layers. Few rows (decoding) -> `linear`; on CUDA, and of 4-bit layers, projections of one input in one call.

The fused weight holds the rows of all of them, and each original parameter becomes a view of its part, so the model has
one copy of its weights, `state_dict` and in-place loading work as before, and the modules still run on their own.
`unpatch` gives every parameter a storage of its own again.

One launch instead of two or three pays where launches are the cost: on CUDA. On the CPU a few rows are bound by reading
the weights, which `linear` does at twice the speed of `F.linear`, and the weights keep their own storage. 4-bit weights
are so small that calls cost as much as reading them: they are fused everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from ..quant.eight import Fp8Linear, W8A8Linear
from ..quant.fixed import FixedLinear
from ..quant.joint import Joint
from ..quant.linear import Int4Linear
from ..quant.packed import Int8Linear, Q4KLinear
from . import match
from .log import PatchLog

if TYPE_CHECKING:
    from ..config import PagedConfig


#: up to how many rows `linear` runs. On the CPU it was faster than F.linear up to 32 rows on a 2-core AVX-512 machine
#: (bfloat16, SmolLM2's layers, one thread: 7.0 against 23.6 ms at 1 row, 14.8 against 24.5 at 8, 36 against 41 at 32),
#: on an H200 at one (Llama-3-8B's layers, bfloat16: 112.1 against 114.4 us; at 8 cuBLAS is 1 % faster).
FEW_ROWS = {"cpu": 16, "cuda": 1}
_HALVES = (torch.float16, torch.bfloat16)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, by our op where it has few rows and nobody asked for gradients or another dtype."""
    ours = has_few_rows(x) and x.dtype == weight.dtype and not match.wants_grad(x, weight)
    if ours and not torch.is_autocast_enabled(x.device.type):
        return ops.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def has_few_rows(x: Tensor) -> bool:
    """Whether `linear` is the faster one."""
    most = _most_rows(x.device, x.dtype)
    if not torch.compiler.is_compiling() or (x.dim() == 3 and x.shape[1] == 1):
        return x.numel() <= most * x.shape[-1]
    # a prompt's length that the graph leaves open shall not be split in two graphs
    return statically_known_true(x.numel() <= most * x.shape[-1])


def _most_rows(device: torch.device, dtype: torch.dtype) -> int:
    return 0 if device.type == "cuda" and dtype not in _HALVES else FEW_ROWS.get(device.type, 0)


def wanted(config: PagedConfig, module: nn.Module) -> bool:
    """True if the config (or, on "auto", the weight's device and format) asks for fused projections."""
    if config.fuse_linear != "auto":
        return bool(config.fuse_linear)
    weight = match.weight_like(module)
    return isinstance(module, Int4Linear) or (weight is not None and weight.is_cuda)


def fuse(parts: Sequence[nn.Module], config: PagedConfig, log: PatchLog, name: str) -> FusedLinear | FusedPacked | None:
    """Fuse projections of one input, if the config wants it and they allow it; report it under `name`."""
    if not wanted(config, parts[0]):
        return None
    if any("forward" in vars(part) for part in parts):
        log.kept(name, "linear", "something else is bound to the projections")
        return None
    if isinstance(parts[0], FixedLinear):
        if reason := Joint.obstacle(parts):
            log.kept(name, "linear", f"projections not fused: {reason}")
            return None
        joint = Joint(parts)  # type: ignore[arg-type]
        log.on_undo(joint.separate)
        log.runs(name, "linear", f"fused {parts[0].op}")
        return FusedPacked(joint)
    fused = FusedLinear.of(parts, log)  # type: ignore[arg-type]
    if fused is None:
        log.kept(name, "linear", "its projections differ in input, bias or binding")
    else:
        log.runs(name, "linear", "fused projection")
    return fused


class FusedLinear:
    """Several nn.Linear of one input as one GEMM over a shared weight."""

    def __init__(self, parts: Sequence[nn.Linear], weight: Tensor, bias: Tensor | None) -> None:
        self.parts = tuple(parts)
        self.weight = weight
        self.bias = bias
        self.sizes = [p.out_features for p in parts]

    @classmethod
    @torch.no_grad()
    def of(cls, parts: Sequence[nn.Linear], log: PatchLog) -> FusedLinear | None:
        """Fuse plain linears, moving their parameters into one storage; None where they do not allow it."""
        first = parts[0]
        if any(type(p) is not nn.Linear or "forward" in vars(p) for p in parts):
            return None
        if any(p.in_features != first.in_features or (p.bias is None) != (first.bias is None) for p in parts):
            return None
        if len({id(p.weight) for p in parts}) != len(parts):
            return None
        weight = _join([p.weight for p in parts], log)
        bias = None if first.bias is None else _join([p.bias for p in parts if p.bias is not None], log)
        return cls(parts, weight, bias)

    def is_current(self) -> bool:
        """False once the parameters were moved or replaced (`.to()`): then the parts must run on their own."""
        return torch.compiler.is_compiling() or self.parts[0].weight.data_ptr() == self.weight.data_ptr()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return project(x, self.weight, self.bias).split(self.sizes, -1)


class FusedPacked:
    """Several packed layers of one input as one product (`Joint`)."""

    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        self.parts = joint.parts
        self.sizes = [p.out_features for p in joint.parts]

    def is_current(self) -> bool:
        """True if the layers are joined; after a move (`.to()`) they are joined again. False while they are not to
        round."""
        if not all(getattr(part, "rounds", True) for part in self.parts):  # they may be of another class by now
            return False
        if torch.compiler.is_compiling():  # `refresh` may have been here before
            return self.joint.is_current()
        return self.joint.is_current() or not self.joint.join()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.joint(x).split(self.sizes, -1)


def _join(parameters: Sequence[Tensor], log: PatchLog) -> Tensor:
    joined = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, joined.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
        log.on_undo(partial(_own_storage, parameter))
    return joined


def _own_storage(parameter: Tensor) -> None:
    parameter.data = parameter.detach().clone()


class SharedProjection:
    """q, k and v projections that are called one after the other on the same input: the first computes all three."""

    def __init__(self, fused: FusedLinear | FusedPacked) -> None:
        self.fused = fused
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor | None:
        """The output of part `index` for x; None if x is not the input that part 0 was called with last."""
        if index == 0:
            self._input, self._outputs = x, self.fused(x)
        elif self._input is not x:
            return None
        output = self._outputs[index]
        if index == len(self.fused.parts) - 1:
            self._input, self._outputs = None, ()
        return output


_KINDS = (nn.Linear, Int4Linear, Int8Linear, Q4KLinear, W8A8Linear, Fp8Linear)


def part_forward(self: nn.Linear, input: Tensor) -> Tensor:
    shared, index = vars(self)["_pagedkv_part"]
    if not match.wants_grad(input, match.weight_like(self)) and shared.fused.is_current():
        output = shared.part(index, input)
        if output is not None:
            return output
    return type(self).forward(self, input)


def few_rows_forward(self: nn.Linear, input: Tensor) -> Tensor:
    return project(input, self.weight, self.bias)


def _fused_of(module: nn.Module) -> FusedLinear | FusedPacked | None:
    shared, index = vars(module).get("_pagedkv_part", (None, 0))
    return shared.fused if shared is not None and index == 0 else vars(module).get("_pagedkv_gate_up")


def refresh(model: nn.Module) -> None:
    """Joins packed layers again that were moved since."""
    for fused in vars(model).get("_pagedkv_fused", ()):
        fused.is_current()


def apply(model: nn.Module, config: PagedConfig, log: PatchLog) -> None:
    """Fuse q_proj, k_proj and v_proj of every attention module that has them; bind `linear` to the other layers."""
    if not config.fuse_linear:
        return
    names = ("q_proj", "k_proj", "v_proj")
    for name, module in match.modules_of(model):
        parts: list[Any] = [getattr(module, n, None) for n in names]
        if not type(module).__name__.endswith("Attention") or not all(type(p) in _KINDS for p in parts):
            continue
        fused = fuse(parts, config, log, f"{name}.q+k+v")
        if fused is None:
            continue
        shared = SharedProjection(fused)
        for index, part in enumerate(parts):
            log.set_attribute(part, "_pagedkv_part", (shared, index))
            log.bind(part, "forward", part_forward)
    found = [fused for _, module in match.modules_of(model) if (fused := _fused_of(module)) is not None]
    log.set_attribute(model, "_pagedkv_fused", [fused for fused in found if isinstance(fused, FusedPacked)])
    for name, module in match.modules_of(model):
        if type(module) is not nn.Linear or match.is_bound_elsewhere(module):
            continue
        if _most_rows(module.weight.device, module.weight.dtype):
            log.bind(module, "forward", few_rows_forward)
            log.runs(name, "linear", "linear")
