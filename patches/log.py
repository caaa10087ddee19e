"""The record of what a patch did to a model: how to undo it, and what to tell the user about it."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MISSING = object()


@dataclass(frozen=True)
class ReportRow:
    """One module of the model: the op it runs now, or why it was left as it was."""

    module: str  # qualified name inside the model
    kind: str  # "attention", "norm", "mlp", "linear", "rotary", "residual", "generation"
    op: str | None  # name of the op, None: left alone
    reason: str = ""


@dataclass
class PatchLog:
    """Every change goes through one of these methods, so `undo()` restores the model exactly, in reverse order."""

    rows: list[ReportRow] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Set `target.name` on the instance (never on its class); undo brings back the old instance value, or none."""
        namespace = vars(target)
        old = namespace.get(name, _MISSING)
        namespace[name] = value

        def undo() -> None:
            if old is _MISSING:
                namespace.pop(name, None)
            else:
                namespace[name] = old

        self._undo.append(undo)

    def bind(self, module: object, name: str, function: Callable[..., Any]) -> None:
        """Bind `function` as a method of this one instance, in front of its class's method of that name."""
        self.set_attribute(module, name, types.MethodType(function, module))

    def on_undo(self, action: Callable[[], None]) -> None:
        """Run `action` when the patch is undone, for changes that are not a plain attribute."""
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
