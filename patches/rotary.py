"""Rotary position embedding -> `rotary_embedding`, or fused with the cache write -> `rotary_and_cache`.

Nearly every attention forward of transformers says
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
with `apply_rotary_pos_emb` a global of its module. The patched instance runs the same code over a copy of those globals
in which that one name is ours: no forward is rewritten, and no other model sees a difference. Which convention the
original follows (halves or interleaved pairs, full or partial, how cos is laid out) is learned by comparing results in
the probe forward that `patch` makes. Where the two statements follow each other as above, the rotation is handed on to
`PagedCache.update`, which does it in the same kernel as the write.
"""

from __future__ import annotations

import ast
import contextlib
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from . import match
from .log import PatchLog

if TYPE_CHECKING:
    from ..config import PagedConfig

_NAME = "apply_rotary_pos_emb"

#: name -> the part of cos (or sin) that holds one value a pair
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda c: c[..., : c.shape[-1] // 2],  # cat(freqs, freqs)
    "even": lambda c: c[..., ::2],  # repeat_interleave(freqs, 2)
    "whole": lambda c: c,  # freqs alone
}


class Convention(NamedTuple):
    """How a model's own rotary function works."""

    interleaved: bool
    layout: str


_CONVENTIONS = [
    Convention(interleaved, layout)
    for interleaved, layout in [(False, "first"), (True, "even"), (True, "first"), (False, "whole"), (True, "whole")]
]


class PendingRotary(NamedTuple):
    """A rotation that `PagedCache.update` is to do together with the cache write: [T, H, D] views and [T, R / 2]."""

    query: Tensor
    key_states: Tensor  # the very tensor that update() will be given
    key: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool


def rows_of(x: Tensor) -> Tensor:
    """[B, H, Q, D] -> [B * Q, H, D]; a view wherever the strides allow one (they do for a projection's output)."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class RotaryBinding:
    """One attention class in one patched model: its forward over the replaced global, shared by the layers."""

    def __init__(self, cls: type, convention: Convention | None = None) -> None:
        self.cls = cls
        self.convention = convention
        self.learning = False
        self.failed = False
        self.cache: Any = None  # the PagedCache of the call that is running, if it can take the rotation
        self.original: Callable[..., Any] = cls.forward.__globals__[_NAME]  # type: ignore[attr-defined]
        tree = match.function_tree(cls.forward)  # type: ignore[attr-defined]
        self.hands_on = tree is not None and hands_on_to_update(tree)
        self.forward = _over_globals(cls.forward, {_NAME: _replacement(self)})  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:  # a copied or unpickled model builds its own
        return RotaryBinding, (self.cls, self.convention)

    def learn(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """Run the original and note the convention that gives the same numbers."""
        want = self.original(query.clone(), key.clone(), cos, sin)
        if not self.failed and self.convention is None:
            self.convention = next((c for c in _CONVENTIONS if self._reproduces(c, query, key, cos, sin, want)), None)
            self.failed = self.convention is None
        elif self.convention is not None:
            self.failed = not self._reproduces(self.convention, query, key, cos, sin, want)
        return want

    def _reproduces(self, convention: Convention, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, want: Any) -> bool:
        try:
            got = self.rotate(q.clone(), k.clone(), cos, sin, convention)
        except (RuntimeError, ValueError):
            return False
        return all(match.relative_error(g, w) <= 2 * torch.finfo(w.dtype).eps for g, w in zip(got, want, strict=True))

    def rotate(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, convention: Convention
    ) -> tuple[Tensor, Tensor]:
        """Both rotated, in place where they are views of a projection's output."""
        q, k = rows_of(query), rows_of(key)
        cos, sin = self.angles(cos, sin, query.shape[0], convention)
        ops.rotary_embedding(q, k, cos, sin, interleaved=convention.interleaved)
        return _unflatten(q, query), _unflatten(k, key)

    def angles(
        self, cos: Tensor, sin: Tensor, batch: int, convention: Convention, kept: list[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or B, Q, R] -> [B * Q, R / 2]; a paged cache keeps them (`kept`) for the next layers, which
        are given the same tensors."""
        if kept is None:
            kept = [] if self.cache is None else self.cache.rotary_angles
        for old_cos, old_sin, flat_cos, flat_sin in kept:
            if old_cos is cos and old_sin is sin:
                return flat_cos, flat_sin
        take = _LAYOUTS[convention.layout]

        def flat(x: Tensor) -> Tensor:
            x = take(x)
            x = x if x.stride(-1) == 1 else x.contiguous()
            return x.expand(batch, *x.shape[1:]).flatten(0, 1)

        result = flat(cos), flat(sin)
        kept.append((cos, sin, *result))
        return result


def _unflatten(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _replacement(binding: RotaryBinding) -> Callable[..., Any]:
    """The function that stands in for `apply_rotary_pos_emb` in the patched instances' globals."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if q.dim() != 4 or cos.dim() != 3 or match.wants_grad(q, k):
            return binding.original(q, k, cos, sin)
        if binding.learning:
            return binding.learn(q, k, cos, sin)
        convention = binding.convention
        if convention is None or binding.failed:
            return binding.original(q, k, cos, sin)
        if binding.cache is None:
            return binding.rotate(q, k, cos, sin, convention)
        query = rows_of(q)
        cos, sin = binding.angles(cos, sin, q.shape[0], convention)
        binding.cache.pending_rotary = PendingRotary(query, k, rows_of(k), cos, sin, convention.interleaved)
        return _unflatten(query, q), k

    return apply_rotary_pos_emb


def _is_call_to(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def hands_on_to_update(tree: ast.FunctionDef) -> bool:
    """True if right after the rotary call comes `if ...: key, value = <cache>.update(key, value, ...)`."""
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(statement, ast.Assign) and _is_call_to(statement.value, _NAME)):
            continue
        target = statement.targets[0]
        if not (isinstance(target, ast.Tuple) and len(target.elts) == 2 and isinstance(target.elts[1], ast.Name)):
            return False
        key = target.elts[1].id
        if not (isinstance(following, ast.If) and len(following.body) == 1 and not following.orelse):
            return False
        update = following.body[0]
        call = update.value if isinstance(update, ast.Assign) else None
        return (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "update"
            and bool(call.args)
            and isinstance(call.args[0], ast.Name)
            and call.args[0].id == key
        )
    return False


def calls_rotary(tree: ast.FunctionDef) -> bool:
    """True if the forward calls the rotary function once, as (query, key, cos, sin) by position."""
    calls = [n for n in ast.walk(tree) if _is_call_to(n, _NAME)]
    return len(calls) == 1 and len(calls[0].args) == 4 and not calls[0].keywords  # type: ignore[attr-defined]


def attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    binding: RotaryBinding = vars(self)["_pagedkv_rotary"]
    # rotating in place would change what a hook on a projection was given
    if any(match.has_hooks(child) for child in self.children()):
        return type(self).forward(self, *args, **kwargs)
    if binding.hands_on:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        binding.cache = cache if getattr(cache, "takes_rotary", False) else None
    try:
        return binding.forward(self, *args, **kwargs)
    finally:
        binding.cache = None  # a cache that the user drops must be free to go


def _over_globals(function: Callable[..., Any], replacements: dict[str, Any]) -> Callable[..., Any]:
    """The same code over a copy of its globals in which some names are replaced."""
    scope = match.scope_of(function, replacements)
    twin = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def apply(model: nn.Module, config: PagedConfig, log: PatchLog) -> None:
    """Bind every attention module that rotates by `apply_rotary_pos_emb`. Until `learn` the original rotates."""
    if not config.fuse_rotary:
        return
    bindings: dict[type, RotaryBinding] = {}
    for name, module in match.modules_of(model):
        cls = type(module)
        if not cls.__name__.endswith("Attention") or not hasattr(module, "layer_idx"):
            continue
        forward = cls.forward
        tree = match.function_tree(forward)
        original = getattr(forward, "__globals__", {}).get(_NAME)
        if tree is None or not callable(original) or not calls_rotary(tree) or hasattr(forward, "__wrapped__"):
            log.kept(name, "rotary", f"its forward does not call {_NAME} in the usual form")
        elif match.is_bound_elsewhere(module):
            log.kept(name, "rotary", "something else is bound to its forward")
        else:
            binding = bindings.setdefault(cls, RotaryBinding(cls))
            log.set_attribute(module, "_pagedkv_rotary", binding)
            log.bind(module, "forward", attention_forward)


@contextlib.contextmanager
def learning(model: nn.Module, log: PatchLog) -> Iterator[None]:
    """While open, a forward pass of the model teaches its bindings their convention; reports them when closed."""
    owners: dict[int, tuple[RotaryBinding, list[str]]] = {}
    for name, module in match.modules_of(model):
        binding = vars(module).get("_pagedkv_rotary")
        if binding is not None:
            owners.setdefault(id(binding), (binding, []))[1].append(name)
    for binding, _ in owners.values():
        binding.learning = True
    try:
        yield
    finally:
        for binding, names in owners.values():
            binding.learning = False
            known = binding.convention is not None and not binding.failed
            for name in names:
                if known:
                    log.runs(name, "rotary", "rotary_and_cache" if binding.hands_on else "rotary_embedding")
                else:
                    log.kept(name, "rotary", "its rotary function follows no convention of the op's")
