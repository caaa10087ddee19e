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

__all__ = ["Region", "let_wrappers_generate", "note_lengths", "skip_code"]


class Region:
    """A function that is compiled as a whole, with a code object of its own for each kind of call. The compiler keeps
    its graphs by code object, tries them one after the other and allows eight: one model shall not use up another's
    limit, nor prompts that of decoding."""

    def __init__(self, origin: Any) -> None:
        self._origin = origin
        self._functions: dict[str, Callable[..., Any]] = {}

    def function(self, kind: str) -> Callable[..., Any]:
        """The function for one kind of call."""
        if kind not in self._functions:
            origin = self._origin
            self._functions[kind] = types.FunctionType(
                origin.__code__.replace(), origin.__globals__, origin.__name__, origin.__defaults__
            )
        return self._functions[kind]

    def __reduce__(self) -> tuple[Any, ...]:  # a copied model has its own
        return Region, (self._origin,)


def note_lengths(cache: PagedCache | None, inputs: dict[str, Any]) -> None:
    """Tells the compiler which sizes change from call to call, so that it compiles one graph for all of them instead
    of one for the first prompt's and another when it sees the second's."""
    mask, ids, embeds = (inputs.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
    sizes = [] if cache is None else cache.open_sizes()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        sizes.append((mask, 1))
    first = ids if ids is not None else embeds
    if first is not None and first.shape[1] > 1:
        positions = inputs.get("position_ids")
        sizes += [(x, 1) for x in (ids, embeds) if x is not None]
        if isinstance(positions, Tensor):
            sizes.append((positions, positions.dim() - 1))
    for tensor, dim in sizes:
        maybe_mark_dynamic(tensor, dim)


class _Generate:
    """`torch.compile(model).generate`. The wrapper that torch.compile makes passes this name on to the model, which
    knows nothing of the wrapper and would run uncompiled; of a patched model it runs compiled. Of any other model, and
    for the class itself, there is no such attribute, as before."""

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[OptimizedModule, Callable[..., Any]] = weakref.WeakKeyDictionary()

    def __get__(self, wrapper: OptimizedModule | None, owner: type) -> Callable[..., Any]:
        model: Any = None if wrapper is None else wrapper._orig_mod
        if wrapper is None or "_pagedkv_region" not in vars(model):
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
        OptimizedModule.generate = _generate  # type: ignore[attr-defined]
