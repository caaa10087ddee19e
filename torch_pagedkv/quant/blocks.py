"""A decoder run block by block over calibration data, with the inputs of one block in memory at a time.

The model's own forward says what each block is called with: it is run once and recorded, and a block is then called
again with the same arguments and other hidden states. That this gives what the model gives is checked before anything
is changed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: tokens that are run at a time: enough to keep a device busy
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 4096}


class _Enough(Exception):
    """Ends a forward pass from within a hook."""


def find(model: nn.Module, layers: set[str]) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks with their name: the list of modules that has most of these layers inside.

    Raises:
        ValueError: there is no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            inside = sum(layer.startswith(f"{name}.") for layer in layers)
            if inside and (best is None or inside > best[0]):  # the outer one of two
                best = (inside, name, module)
    if best is None:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks, which calibration goes through")
    return best[1], best[2]


class Blocks:
    """The decoder blocks of a model, and the hidden states of the calibration data in front of one of them.

    Attributes:
        names, modules: of the blocks, in order.
        batches: int64 [rows, T] token ids each.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        blocks: nn.ModuleList,
        ids: Tensor,
        offload: str | Path | None = None,
        exact: bool = True,
    ) -> None:
        """Records what the blocks are called with; changes nothing.

        Args:
            model: in evaluation mode.
            ids: int64 [S, T], sequences without padding.
            offload: where hidden states stay: None: on the model's device, "cpu", or a folder for files on disk.
            exact: keep the float model's beside those of the quantised one.

        Raises:
            ValueError: the model does not run its blocks one after the other, or gives NaN or infinite numbers.
        """
        self.model, self.modules = model, list(blocks)
        self.names = [f"{name}.{i}" for i in range(len(blocks))]
        self.device = next(model.parameters()).device
        rows = max(1, _TOKENS_AT_ONCE.get(self.device.type, 512) // ids.shape[1])
        rows = next(r for r in range(min(rows, len(ids)), 0, -1) if len(ids) % r == 0)
        self.batches = list(ids.to(self.device).split(rows))
        self._calls: list[list[_Call]] = [[] for _ in self.modules]  # block -> for each batch, or one for all
        self._offload = offload
        self._record(exact)

    def __len__(self) -> int:
        return len(self.modules)

    # ---- recording

    def _record(self, exact: bool) -> None:
        first, outputs = self._pass(self.batches[0], len(self.modules))
        self._check(first, outputs)
        second = self._pass(self.batches[1], len(self.modules))[0] if len(self.batches) > 1 else first
        # batches of one length have equal masks and positions; a model that gives its blocks more is recorded whole
        own = [not _same(a.others, b.others) for a, b in zip(first, second)]
        self._hidden = _Store(len(self.batches), first[0].hidden, self._offload)
        self._meant = _Store(len(self.batches), first[0].hidden, self._offload) if exact else None
        for index, batch in enumerate(self.batches):
            calls = first if index == 0 else self._pass(batch, len(self.modules) if any(own) else 1)[0]
            self._hidden[index] = calls[0].hidden
            if self._meant is not None:
                self._meant[index] = calls[0].hidden
            for block, call in enumerate(calls):
                if index == 0 or own[block]:
                    self._calls[block].append(call.without_hidden())

    def _pass(self, batch: Tensor, count: int) -> tuple[list[_Call], list[Tensor]]:
        """The calls of the first `count` blocks, and their outputs."""
        calls: list[_Call] = []
        outputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(calls) == count:
                raise _Enough
            calls.append(_Call.of(module, args, kwargs))
            if count == 1:
                raise _Enough

        def after(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(_first(output))
            if len(outputs) == len(self.modules):
                raise _Enough

        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.modules]
        hooks += [m.register_forward_hook(after) for m in self.modules]
        try:
            self.model(input_ids=batch, use_cache=False)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return calls, outputs

    def _check(self, calls: list[_Call], outputs: list[Tensor]) -> None:
        name = type(self.model).__name__
        if [call.module for call in calls] != self.modules:
            raise ValueError(f"{name} does not run its blocks one after the other, which calibration needs")
        for block, call in enumerate(calls):
            output = outputs[block]
            if not bool(torch.isfinite(output).all()):
                raise ValueError(f"{self.names[block]} gives NaN or infinite numbers on the calibration text")
            follows = calls[block + 1].hidden if block + 1 < len(calls) else output
            again = _first(self.modules[block](*call.args(call.hidden), **call.kwargs(call.hidden)))
            for got in (again, follows):
                error = (got.float() - output.float()).norm() / output.float().norm().clamp_min(1e-30)
                if got.shape != output.shape or not float(error) <= 4 * torch.finfo(output.dtype).eps:
                    raise ValueError(f"{name}: {self.names[block]} cannot be run by itself, which calibration needs")

    # ---- running

    def call(self, block: int, index: int, module: nn.Module | None = None, hidden: Tensor | None = None) -> Tensor:
        """The output of a block (or a module in its place) for one batch (or other hidden states of its shape)."""
        call = self._calls[block][index if len(self._calls[block]) > 1 else 0]
        x = self._hidden[index] if hidden is None else hidden
        args, kwargs = call.args(x), call.kwargs(x)
        if module is not None:
            args, kwargs = _cast(args, x.dtype), _cast(kwargs, x.dtype)
        return _first((module or self.modules[block])(*args, **kwargs))

    def watch(self, block: int, module: nn.Module, see: Callable[[int, Tensor], None]) -> None:
        """Runs the block for every batch up to the first call of one of its modules; `see` gets the batch's number and
        that call's input."""
        for index in range(len(self.batches)):
            see(index, self._until(block, index, module))

    def look_ahead(self, block: int, modules: Mapping[str, nn.Module]) -> dict[str, Sequence[Tensor]]:
        """Takes the float model's hidden states through a block that is still float.

        Args:
            modules: of the block.

        Returns:
            what each of these was given (in its first call) for each batch. A module that was not called in every
            batch, or not with equal shapes, is left out.
        """
        assert self._meant is not None
        seen: dict[str, Tensor] = {}
        kept: dict[str, _Store] = {}
        odd: set[str] = set()

        def watch(name: str) -> Callable[..., None]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.setdefault(name, input_of(args, kwargs))

            return before

        with hooked([(module, watch(name)) for name, module in modules.items()]):
            for index in range(len(self.batches)):
                seen.clear()
                self._meant[index] = self.call(block, index, hidden=self._meant[index])
                for name in modules:
                    x = seen.get(name)
                    if x is None or (name in kept and x.shape != kept[name].like.shape):
                        odd.add(name)
                        continue
                    if name not in kept:
                        kept[name] = _Store(len(self.batches), x, self._offload)
                    kept[name][index] = x
        return {name: store for name, store in kept.items() if name not in odd}

    def _until(self, block: int, index: int, stop: nn.Module) -> Tensor:
        seen: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(input_of(args, kwargs))
            raise _Enough

        with hooked([(stop, before)]), contextlib.suppress(_Enough):
            self.call(block, index)
        return seen[0]

    def advance(self, block: int) -> None:
        """Hidden states in front of the next block, with the block as it is now.

        Raises:
            ValueError: they are NaN or infinite.
        """
        for index in range(len(self.batches)):
            output = self.call(block, index)
            if not bool(torch.isfinite(output).all()):
                raise ValueError(f"{self.names[block]} gives NaN or infinite numbers once it is quantised")
            self._hidden[index] = output

    def sample(self) -> Tensor:
        """Hidden states of the first batch."""
        return self._hidden[0]


class hooked:
    """Forward pre-hooks (module, args, kwargs) for a while."""

    def __init__(self, hooks: list[tuple[nn.Module, Callable[..., None]]]) -> None:
        self._wanted = hooks

    def __enter__(self) -> None:
        self._handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in self._wanted]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one input of a linear layer."""
    return args[0] if args else next(iter(kwargs.values()))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class _Call:
    """One call of a block: its hidden states apart from all else that it was given."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str) -> None:
        self.module, self._args, self._kwargs, self._key = module, args, kwargs, key

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if args and isinstance(args[0], Tensor):
            return cls(module, args, kwargs, 0)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return cls(module, args, kwargs, name)
        raise ValueError(f"{type(module).__name__} is not called with hidden states, which calibration needs")

    @property
    def hidden(self) -> Tensor:
        return self._kwargs[self._key] if isinstance(self._key, str) else self._args[0]

    @property
    def others(self) -> tuple[Any, ...]:
        rest = self.without_hidden()
        return rest._args, rest._kwargs

    def without_hidden(self) -> _Call:
        return _Call(self.module, self.args(None), self.kwargs(None), self._key)

    def args(self, hidden: Tensor | None) -> tuple[Any, ...]:
        return (hidden, *self._args[1:]) if self._key == 0 else self._args

    def kwargs(self, hidden: Tensor | None) -> dict[str, Any]:
        return {**self._kwargs, self._key: hidden} if isinstance(self._key, str) else self._kwargs


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(each, dtype) for each in value)
    if isinstance(value, dict):
        return {key: _cast(each, dtype) for key, each in value.items()}
    return value


class _Store(Sequence[Tensor]):
    """A list of tensors of one shape, on a device or on disk; they come back on the device they were on.

    Attributes:
        like: a tensor of that shape on the meta device.
    """

    def __init__(self, count: int, like: Tensor, where: str | Path | None) -> None:
        self._device, self._shape = like.device, (count, *like.shape)
        self.like = like.to("meta")
        if where is None or where == "cpu":
            self._all = torch.empty(self._shape, dtype=like.dtype, device="cpu" if where == "cpu" else like.device)
        else:
            Path(where).mkdir(parents=True, exist_ok=True)
            size = functools.reduce(int.__mul__, self._shape)
            descriptor, name = tempfile.mkstemp(dir=where, prefix="hidden-states-")
            os.close(descriptor)
            file = Path(name)
            self._all = torch.from_file(str(file), shared=True, size=size, dtype=like.dtype).view(self._shape)
            file.unlink()  # mapped: gone from the disk when nobody needs it any more

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self._all[index].to(self._device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._all[index].copy_(value.detach())
