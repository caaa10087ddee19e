"""The record of what a patch did to a model: how to undo it, and what to tell the user about it."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any


@dataclass(frozen=True)
class ReportRow:
    """One module of the model: the op it runs now, or why it was left as it was."""

    module: str  # qualified name inside the model
    kind: str  # "attention", "norm", "mlp", "linear", "rotary", "residual", "weights", "generation"
    op: str | None  # name of the op, None: left alone
    reason: str = ""


class _Missing(Enum):
    """No attribute of that name; an enum, so that a copy of a log still knows it."""

    MISSING = 0


def _restore(target: object, name: str, old: Any) -> None:
    if old is _Missing.MISSING:
        vars(target).pop(name, None)
    else:
        vars(target)[name] = old


@dataclass
class PatchLog:
    """Every change goes through one of these methods, so `undo()` restores the model exactly, in reverse order.

    `copy.deepcopy(model)` copies the log with the model and undoes the copy then, not the original: the actions are
    partials of functions, whose arguments are copied, and never closures.
    """

    rows: list[ReportRow] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list)

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Set `target.name` on the instance (never on its class); undo brings back the old instance value, or none."""
        namespace = vars(target)
        self.on_undo(partial(_restore, target, name, namespace.get(name, _Missing.MISSING)))
        namespace[name] = value

    def bind(self, module: object, name: str, function: Any) -> None:
        """Bind `function` as a method of this one instance, in front of its class's method of that name.

        It is bound under that name, because pickle restores a bound method by it: an unpickled model runs its class's.
        """
        code, scope = function.__code__, function.__globals__
        twin = types.FunctionType(code, scope, name, function.__defaults__, function.__closure__)
        twin.__kwdefaults__ = function.__kwdefaults__
        twin.__dict__.update(vars(function))
        self.set_attribute(module, name, types.MethodType(twin, module))

    def on_undo(self, action: Callable[[], object]) -> None:
        """Run `action`, a partial, when the patch is undone, for changes that are not a plain attribute."""
        self._undo.append(action)

    def runs(self, module: str, kind: str, op: str) -> None:
        """Report that a module runs an op now."""
        self.rows.append(ReportRow(module, kind, op))

    def kept(self, module: str, kind: str, reason: str) -> None:
        """Report that a module was left as it was, and why."""
        self.rows.append(ReportRow(module, kind, None, reason))

    def undo(self) -> None:
        """Undo everything, last change first. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self.rows.clear()

    def absorb(self, other: PatchLog) -> None:
        """Take over another log's changes and rows, as if they had been made here."""
        self._undo.extend(other._undo)
        self.rows.extend(other.rows)
        other._undo, other.rows = [], []
