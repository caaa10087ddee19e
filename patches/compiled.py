"""torch.compile around a patched model.

Planning a forward pass (blocks, tables, slots) is host work and stays outside of the graph: the frames that do it are
left to Python, and the frame below them is what gets compiled, whether the user said `torch.compile(model)`,
`model.compile()`, `model.forward = torch.compile(model.forward)` or let `generate()` compile by itself.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.eval_frame import OptimizedModule, skip_code

if TYPE_CHECKING:
    from ..kv.cache import PagedCache

__all__ = ["let_wrappers_generate", "note_lengths", "own_code", "skip_code"]


def own_code(function: Any) -> Callable[..., Any]:
    """The same function with a code object of its own: the compiler keeps and counts its graphs by code object, and
    one model's shall not use up another's limit."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def note_lengths(cache: PagedCache, inputs: dict[str, Any]) -> None:
    """Tells the compiler which sizes change from call to call, so that it compiles one graph for all of them instead
    of one for the first prompt's and another when it sees the second's."""
    step = cache.step
    assert step is not None
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        maybe_mark_dynamic(mask, 1)
    if cache.planned_columns > 1:
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            x = inputs.get(name)
            if isinstance(x, Tensor):
                maybe_mark_dynamic(x, x.dim() - 1 if name == "position_ids" else 1)
        maybe_mark_dynamic(step.block_tables, 1)
        maybe_mark_dynamic(step.slot_mapping, 0)


class _Generate:
    """`torch.compile(model).generate`. The wrapper that torch.compile makes passes this name on to the model, which
    knows nothing of the wrapper and would run uncompiled; of a patched model it runs compiled. Of any other model, and
    for the class itself, there is no such attribute, as before."""

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[OptimizedModule, Callable[..., Any]] = weakref.WeakKeyDictionary()

    def __get__(self, wrapper: OptimizedModule | None, owner: type) -> Callable[..., Any]:
        model = None if wrapper is None else wrapper._orig_mod
        if wrapper is None or "_pagedkv_run" not in vars(model):
            raise AttributeError("generate")
        return functools.wraps(model.generate)(functools.partial(self._run, wrapper))

    def _run(self, wrapper: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        model: Any = wrapper._orig_mod
        if wrapper not in self._calls:
            self._calls[wrapper] = wrapper.dynamo_ctx(model._call_impl)
        namespace = vars(model)
        missing = object()
        before = namespace.get("_compiled_call_impl", missing)
        namespace["_compiled_call_impl"] = self._calls[wrapper]
        try:
            return model.generate(*args, **kwargs)
        finally:
            if before is missing:
                namespace.pop("_compiled_call_impl", None)
            else:
                namespace["_compiled_call_impl"] = before


_generate = _Generate()


def let_wrappers_generate() -> None:
    """Give torch.compile's wrapper the attribute above, once a process."""
    if "generate" not in vars(OptimizedModule):
        OptimizedModule.generate = _generate
