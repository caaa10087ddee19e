"""RMSNorm and LayerNorm modules -> `rms_norm`, `layer_norm`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from . import match
from .log import PatchLog

if TYPE_CHECKING:
    from ..config import PagedConfig

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
#: (weight_offset, round_before_weight): what the RMSNorms of transformers differ in
_VARIANTS = ((0.0, True), (0.0, False), (1.0, False), (1.0, True))


@dataclass(frozen=True)
class RMSNormSpec:
    """How a norm module computes, found by probing it."""

    eps: float
    weight_offset: float
    round_before_weight: bool


def spec_of(module: nn.Module) -> RMSNormSpec | None:
    """The spec of a patched RMSNorm module, else None."""
    return vars(module).get("_pagedkv_norm")


def rms_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    x = match.first_argument(args, kwargs)
    weight = getattr(self, "weight", None)
    if match.wants_grad(x, weight):
        return type(self).forward(self, x)
    spec: RMSNormSpec = vars(self)["_pagedkv_norm"]
    return ops.rms_norm(
        x, weight, spec.eps, weight_offset=spec.weight_offset, round_before_weight=spec.round_before_weight
    )


def _layer_norm_forward(self: nn.LayerNorm, input: Tensor) -> Tensor:
    if match.wants_grad(input, self.weight, self.bias):
        return type(self).forward(self, input)
    return ops.layer_norm(input, self.weight, self.bias, self.eps)


def _eps(module: nn.Module) -> float | None:
    for name in _EPS_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _size(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0] if weight.dim() == 1 else None
    return None


@torch.no_grad()
def _probe(module: Any, eps: float, size: int) -> RMSNormSpec | str:
    """The variant whose output is nearest to the module's own on random rows, or why there is none."""
    weight = module.weight
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    # rows of several magnitudes, so that a wrong eps shows; weights away from 0 and 1, so that the offset shows
    x = torch.randn(5, size, generator=generator) * torch.tensor([[1.0], [30.0], [0.1], [1e-2], [1e-3]])
    x = x.to(weight.device, weight.dtype)
    twin.weight.copy_(torch.rand(size, generator=generator) + 0.25)
    try:
        want = type(twin).forward(twin, x)
    except Exception as e:
        return f"its forward does not take one tensor ({type(e).__name__})"
    if not isinstance(want, Tensor) or want.shape != x.shape or want.dtype != x.dtype:
        return "its forward does not return a tensor like its input"

    def row_error(variant: tuple[float, bool]) -> float:
        got = ops.rms_norm(x, twin.weight, eps, weight_offset=variant[0], round_before_weight=variant[1])
        return max(match.relative_error(g, w) for g, w in zip(got, want, strict=True))

    best = min(_VARIANTS, key=row_error)
    if row_error(best) > 2 * torch.finfo(x.dtype).eps:
        return "its numbers are not an RMSNorm's"
    return RMSNormSpec(eps, *best)


def apply(model: nn.Module, config: PagedConfig, log: PatchLog) -> None:
    """Bind the norm ops to every RMSNorm and LayerNorm that they reproduce."""
    if not config.fuse_norm:
        return
    probed: dict[tuple[Any, ...], RMSNormSpec | str] = {}
    for name, module in match.modules_of(model):
        cls: Any = type(module)
        if isinstance(module, nn.LayerNorm):
            if cls.forward is not nn.LayerNorm.forward or len(module.normalized_shape) != 1:
                log.kept(name, "norm", "its forward is not torch's LayerNorm over one dimension")
            elif match.is_bound_elsewhere(module):
                log.kept(name, "norm", "something else is bound to its forward")
            else:
                log.bind(module, "forward", _layer_norm_forward)
                log.runs(name, "norm", "layer_norm")
            continue
        if not cls.__name__.endswith("RMSNorm"):
            continue
        eps, size = _eps(module), _size(module)
        parameters = {n for n, _ in module.named_parameters()}
        if match.is_bound_elsewhere(module):
            log.kept(name, "norm", "something else is bound to its forward")
        elif eps is None or size is None or parameters != {"weight"} or list(module.children()):
            log.kept(name, "norm", "it is not a weight vector and an epsilon")
        elif not match.is_straight_line(cls):
            log.kept(name, "norm", "its forward branches")
        else:
            key = (cls, eps, size, module.weight.dtype, module.weight.device)
            if key not in probed:
                probed[key] = _probe(module, eps, size)
            spec = probed[key]
            if isinstance(spec, str):
                log.kept(name, "norm", spec)
                continue
            log.set_attribute(module, "_pagedkv_norm", spec)
            log.bind(module, "forward", rms_forward)
            log.runs(name, "norm", "rms_norm")
