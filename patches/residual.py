"""A residual add and the norm behind it -> `add_rms_norm`.

Decoder layers say, somewhere in the middle,
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.some_norm(hidden_states)
These three statements are found in the syntax tree of the layer's own forward, whatever surrounds them, and become one
call. The rest of the forward stays as its authors wrote it, arguments and all; the result is compiled once a class and
bound to the instances.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import ops
from . import match, norm
from .log import PatchLog

if TYPE_CHECKING:
    from ..config import PagedConfig

_NAME = "_pagedkv_add_and_norm"


def add_and_norm(module: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(module(residual + x), residual + x), in one op where the module is a fused RMSNorm that nobody hooked."""
    spec = norm.spec_of(module)
    mixed = x.dtype != residual.dtype  # under autocast
    if spec is None or mixed or match.has_hooks(module) or match.wants_grad(x, residual, module.weight):
        residual = residual + x
        return module(residual), residual
    return ops.add_rms_norm(
        x,
        residual,
        module.weight,
        spec.eps,
        weight_offset=spec.weight_offset,
        round_before_weight=spec.round_before_weight,
    )


def _target(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _fuse(add: ast.stmt, keep: ast.stmt, call: ast.stmt) -> tuple[ast.stmt, str] | None:
    """The one statement that stands for the three, and the norm's attribute name; None if they are not those three."""
    hidden, residual = _target(add), _target(keep)
    if hidden is None or residual is None or hidden == residual or _target(call) != hidden:
        return None
    assert isinstance(add, ast.Assign) and isinstance(keep, ast.Assign) and isinstance(call, ast.Assign)
    total, norm_call = add.value, call.value
    if not (isinstance(total, ast.BinOp) and isinstance(total.op, ast.Add) and _is_name(keep.value, hidden)):
        return None
    sides = (total.left, total.right)
    branch = next((b for a, b in (sides, sides[::-1]) if _is_name(a, residual)), None)
    if branch is None or any(_is_name(n, residual) for n in ast.walk(branch)):
        return None
    if not (
        isinstance(norm_call, ast.Call)
        and isinstance(norm_call.func, ast.Attribute)
        and _is_name(norm_call.func.value, "self")
        and len(norm_call.args) == 1
        and not norm_call.keywords
        and _is_name(norm_call.args[0], hidden)
    ):
        return None
    fused = ast.parse(f"{hidden}, {residual} = {_NAME}(x, x, {residual})").body[0]
    assert isinstance(fused, ast.Assign) and isinstance(fused.value, ast.Call)
    fused.value.args[0], fused.value.args[1] = norm_call.func, branch
    return ast.copy_location(fused, add), norm_call.func.attr


@functools.cache
def fused_forward(cls: type) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    """The class's forward with its add-and-norm statements fused, and the norms' names; None where there are none."""
    forward = cls.forward  # type: ignore[attr-defined]
    if getattr(forward, "__code__", None) and forward.__code__.co_name == "forward_with_checkpointing":
        forward = forward.__wrapped__  # transformers' wrapper; it acts in training only, when the stock forward runs
    tree = copy.deepcopy(match.function_tree(forward))
    if tree is None or forward.__closure__ or hasattr(forward, "__wrapped__"):
        return None
    norms, body = [], list(tree.body)
    for i in range(len(body) - 2):
        fused = _fuse(*body[i : i + 3])
        if fused is not None:
            body[i : i + 3] = [fused[0], ast.Pass(), ast.Pass()]
            norms.append(fused[1])
    if not norms:
        return None
    tree.body, tree.decorator_list, tree.returns = body, [], None
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    module = ast.fix_missing_locations(ast.Module([tree], []))
    scope: dict[str, Any] = {}
    exec(compile(module, f"<{cls.__name__}.forward, add and norm fused>", "exec"), {}, scope)
    code = next(iter(scope.values())).__code__
    twin = types.FunctionType(
        code, match.scope_of(forward, {_NAME: add_and_norm}), forward.__name__, forward.__defaults__
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin, tuple(norms)


class FusedLayer:
    """The fused forward of one class of layers, which have it."""

    def __init__(self, cls: type) -> None:
        fused = fused_forward(cls)
        assert fused is not None
        self.cls = cls
        self.forward = fused[0]

    def __reduce__(self) -> tuple[Any, ...]:  # a function made here has no name to be pickled by
        return FusedLayer, (self.cls,)


def _layer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.training:
        return type(self).forward(self, *args, **kwargs)
    return self._pagedkv_layer.forward(self, *args, **kwargs)


def apply(model: nn.Module, config: PagedConfig, log: PatchLog) -> None:
    """Bind the fused forward to every decoder layer that adds and then normalises by a fused RMSNorm."""
    if not config.fuse_norm:
        return
    for name, module in match.modules_of(model):
        if not type(module).__name__.endswith(("DecoderLayer", "Block", "Layer")):
            continue
        cls: Any = type(module)
        fused = fused_forward(cls)
        if fused is None:
            continue
        if match.is_bound_elsewhere(module):
            log.kept(name, "residual", "something else is bound to its forward")
        elif all(norm.spec_of(getattr(module, n)) is None for n in fused[1]):
            log.kept(name, "residual", "the norm behind its residual add is not a fused RMSNorm")
        else:
            log.set_attribute(module, "_pagedkv_layer", FusedLayer(cls))
            log.bind(module, "forward", _layer_forward)
            log.runs(name, "residual", "add_rms_norm")
