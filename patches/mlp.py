"""Gated MLPs, down(act(gate(x)) * up(x)) -> `silu_and_mul` or `gelu_and_mul` between the projections. Plain ones,
down(act(up(x))), of 4-bit layers -> the activation in the epilogue of `int4_linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.activation import ACTIVATIONS
from ..quant.linear import Int4Linear
from . import linear, match
from .log import PatchLog

if TYPE_CHECKING:
    from ..config import PagedConfig

#: (gate, up, down) children of a gated MLP; gate == up: one packed projection, gate first
_LAYOUTS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
)
#: (up, down) children of a plain MLP
_PLAIN_LAYOUTS = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
#: activation -> the name of its op and the op
GATED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": ("silu_and_mul", ops.silu_and_mul),
    "gelu": ("gelu_and_mul", ops.gelu_and_mul),
    "gelu_tanh": ("gelu_and_mul", lambda gate, up: ops.gelu_and_mul(gate, up, approximate="tanh")),
}


@dataclass(frozen=True)
class GatedMLPSpec:
    """Which children a gated MLP has, the attribute that is its activation, and which one that is."""

    gate: str
    up: str
    down: str
    act: str
    activation: str  # a key of GATED


def gated_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    x = match.first_argument(args, kwargs)
    spec: GatedMLPSpec = vars(self)["_pagedkv_mlp"]
    gate, up = getattr(self, spec.gate), getattr(self, spec.up)
    act = self._modules.get(spec.act)
    if match.wants_grad(x, match.weight_like(gate)) or (act is not None and match.has_hooks(act)):
        return type(self).forward(self, x)
    fused = vars(self).get("_pagedkv_gate_up")
    if gate is up:
        gate_states, up_states = gate(x).chunk(2, -1)
    elif (
        fused is not None
        and fused.parts == (gate, up)  # an adapter may have taken their places
        and fused.is_current()
        and not (match.has_hooks(gate) or match.has_hooks(up))
    ):
        gate_states, up_states = fused(x)
    else:
        gate_states, up_states = gate(x), up(x)
    return getattr(self, spec.down)(GATED[spec.activation][1](gate_states, up_states))


@dataclass(frozen=True)
class PlainMLPSpec:
    """Which children a plain MLP has, the attribute that is its activation, and which one that is."""

    up: str
    down: str
    act: str
    activation: str


def plain_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    x = match.first_argument(args, kwargs)
    spec: PlainMLPSpec = vars(self)["_pagedkv_plain_mlp"]
    up, act = getattr(self, spec.up), self._modules.get(spec.act)
    own = type(up) is Int4Linear and "forward" not in vars(up)
    watched = match.has_hooks(up) or (act is not None and match.has_hooks(act))
    if self.training or not own or watched or match.wants_grad(x):
        return type(self).forward(self, x)
    return getattr(self, spec.down)(up.activated(x, spec.activation))


@torch.no_grad()
def _activation_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation, found by its values."""
    x = torch.linspace(-9, 9, 361)
    for name in GATED:
        try:
            y = function(x)
        except Exception:
            return None
        if y.shape == x.shape and float((y - ACTIVATIONS[name](x)).abs().max()) <= 1e-6:
            return name
    return None


def _spec(module: nn.Module) -> GatedMLPSpec | None:
    children = dict(module.named_children())
    activation_name = next((n for n in _ACTIVATION_NAMES if callable(getattr(module, n, None))), None)
    if activation_name is None:
        return None
    for gate, up, down in _LAYOUTS:
        if {gate, up, down} == {n for n in children if n != activation_name}:
            activation = _activation_of(getattr(module, activation_name))
            return None if activation is None else GatedMLPSpec(gate, up, down, activation_name, activation)
    return None


def _plain_spec(module: nn.Module) -> PlainMLPSpec | None:
    name = next((n for n in _ACTIVATION_NAMES if callable(getattr(module, n, None))), None)
    others = {n for n, child in module.named_children() if n != name and not isinstance(child, nn.Dropout)}
    for up, down in _PLAIN_LAYOUTS:
        if name is not None and {up, down} == others and type(getattr(module, up)) is Int4Linear:
            activation = _activation_of(getattr(module, name))
            return None if activation is None else PlainMLPSpec(up, down, name, activation)
    return None


def _fuse_plain(name: str, module: Any, spec: PlainMLPSpec, log: PatchLog) -> None:
    cls: Any = type(module)
    if match.is_bound_elsewhere(module) or not match.is_straight_line(cls):
        log.kept(name, "mlp", "its forward branches, or something else is bound to it")
        return
    up: Int4Linear = getattr(module, spec.up)
    scratch = PatchLog()
    scratch.set_attribute(module, "_pagedkv_plain_mlp", spec)
    scratch.bind(module, "forward", plain_forward)
    with match.evaluating(module):
        same = _reproduces(module, up.in_features, up.like)
    if not same:
        scratch.undo()
        log.kept(name, "mlp", "the fused forward does not reproduce its numbers")
        return
    log.absorb(scratch)
    log.runs(name, "mlp", f"int4_linear with {spec.activation}")


@torch.no_grad()
def _reproduces(module: Any, in_features: int, like: Tensor) -> bool:
    x = torch.randn(3, in_features, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    try:
        want = type(module).forward(module, x)
        got = module.forward(x)
    except Exception:
        return False
    # two roundings fewer than stock (the activation's and the product's): allow them through the down projection
    return got.shape == want.shape and match.relative_error(got, want) <= 4 * torch.finfo(want.dtype).eps


def apply(model: nn.Module, config: PagedConfig, log: PatchLog) -> None:
    """Bind the fused forward to every gated MLP whose numbers it reproduces."""
    if not config.fuse_mlp:
        return
    for name, module in match.modules_of(model):
        cls: Any = type(module)
        if not cls.__name__.endswith(("MLP", "FeedForward")):
            continue
        spec, plain = _spec(module), _plain_spec(module)
        if plain is not None:
            _fuse_plain(name, module, plain, log)
            continue
        if spec is None:
            log.kept(name, "mlp", "it is not gate, up and down projections with a known activation")
            continue
        if match.is_bound_elsewhere(module) or not match.is_straight_line(cls):
            log.kept(name, "mlp", "its forward branches, or something else is bound to it")
            continue
        gate, up = getattr(module, spec.gate), getattr(module, spec.up)
        weight = match.weight_like(gate)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or not isinstance(gate, nn.Linear):
            log.kept(name, "mlp", "its projections are not plain linears")
            continue
        scratch = PatchLog()
        scratch.set_attribute(module, "_pagedkv_mlp", spec)
        scratch.bind(module, "forward", gated_forward)
        if not _reproduces(module, gate.in_features, weight):
            scratch.undo()
            log.kept(name, "mlp", "the fused forward does not reproduce its numbers")
            continue
        log.absorb(scratch)
        log.runs(name, "mlp", GATED[spec.activation][0])
        if gate is not up:
            fused = linear.fuse((gate, up), config, log, f"{name}.{spec.gate}+{spec.up}")
            if fused is not None:
                log.set_attribute(module, "_pagedkv_gate_up", fused)
