"""Is this module one that an op can stand in for? By structure (its forward's syntax tree) and by a numeric probe.

A module is matched by what it says and does, not by its class's name: the structure shows where something can be
replaced, and what it cannot show (1 + weight, the order of two roundings, which rotary convention a helper follows) is
settled by running both on random numbers. New models of a known form need no entry anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def function_tree(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The syntax tree of a function, or None where its source cannot be read."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


@functools.cache
def is_straight_line(cls: type) -> bool:
    """True if the class's forward has no branch or loop: then one probe shows all that it does."""
    tree = function_tree(cls.forward)  # type: ignore[attr-defined]
    branching = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.Match)
    return tree is not None and not any(isinstance(n, branching) for n in ast.walk(tree))


def scope_of(function: Callable[..., Any], replacements: dict[str, Any]) -> dict[str, Any]:
    """A copy of a function's globals with some names replaced. Without __name__, torch.compile treats it as what it
    is, a scope of its own, not the module's."""
    return {k: v for k, v in function.__globals__.items() if k != "__name__"} | replacements


def is_bound_elsewhere(module: nn.Module) -> bool:
    """True if somebody (accelerate, another patch) has already put a forward on this instance."""
    return "forward" in vars(module)


def runs(module: nn.Module, function: Callable[..., Any] | None) -> bool:
    """True if a call of this instance runs `function`, bound by a `PatchLog`; None: its class's forward."""
    bound = vars(module).get("forward")
    if function is None or bound is None:
        return function is bound
    return getattr(getattr(bound, "__func__", None), "__code__", None) is function.__code__


def has_hooks(module: nn.Module) -> bool:
    """True if the user hooked this module: then it must be called as a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def wants_grad(*tensors: Tensor | None) -> bool:
    """True if autograd would record these: the ops have no backward, so the stock forward runs instead."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while, each module's own mode restored behind it."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def weight_like(module: nn.Module) -> Tensor | None:
    """A tensor with the dtype, device and requires_grad of a linear layer's weight: the weight itself, or what stands
    for it where it is packed."""
    found = module._buffers.get("like", module._parameters.get("weight"))
    return getattr(module, "weight", None) if found is None else found


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a norm or MLP forward, whose name differs from class to class."""
    return args[0] if args else next(iter(kwargs.values()))


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules with qualified names, each once."""
    yield from model.named_modules()


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN compares as infinite."""
    got, want = got.double(), want.double()
    error = float((got - want).norm() / want.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def close_enough(got: Tensor, want: Tensor) -> bool:
    """True if a fused result differs from the stock one by no more than a rounding or two of its dtype."""
    return (
        got.shape == want.shape
        and got.dtype == want.dtype
        and relative_error(got, want) <= 2 * torch.finfo(want.dtype).eps
    )
