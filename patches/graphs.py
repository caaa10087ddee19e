"""Decoding steps as CUDA graphs, without a compiler.

A decoding step of a model is some hundred kernels of a few microseconds. On an H200's machine it took Python 7.5 ms a
token to launch those of a model of Llama-3-8B's shape, which run for 4.8 ms, and for 2.8 ms with 4-bit weights. A
decode step's tables, slots and lengths lie in tensors that stay (`kv.step.DecodeSteps`), so the same launches serve
every step that follows: they are recorded once, and replayed as one.

A graph repeats what the device did; Python does not run again. So one is made and used only where nothing in Python can
matter: all modules are torch's, transformers' or ours, nobody hooked or replaced one, no mode of torch looks on, the
arguments are numbers and tensors that are known. And it is believed only after it has given the very bits of a step at
another position that Python ran. What does not fit (a model that asks the device something in between, one that keeps
count of its steps) goes on as before; `Graphs.refused` says why.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kv.cache import PagedCache
from ..kv.step import PagedStep
from . import layer

logger = logging.getLogger("torch_pagedkv")

#: what runs a forward pass: model, args, kwargs -> its output
Runner = Callable[..., Any]

_WARM = 2  # steps of a kind that run before one is recorded: by then every kernel is loaded
_MOST = 16  # graphs of a model; each keeps the memory of its activations
_SCALARS = (bool, int, float, str, type(None))  # arguments that are part of a kind
_PLAIN = (Tensor, nn.Parameter)
_KNOWN = ("torch", "transformers", "torch_pagedkv")  # packages whose modules may be recorded
_TENSORS = {"input_ids", "position_ids", "attention_mask"}
_OUTPUTS = {"logits", "past_key_values"}


def can_record(device: torch.device) -> bool:
    """Whether the device has graphs and none is being recorded now."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def record(function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Runs `function` without its kernels.

    Returns:
        its result, whose tensors are written by each call of the second value.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), _no_garbage():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says again that the capture failed
                    graph.capture_end()
                torch._C._cuda_endAllocateToPool(stream.device_index, graph.pool())
                raise
            graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
    return result, graph.replay


@contextlib.contextmanager
def _no_garbage() -> Any:
    """No collection meanwhile: it could free a tensor or a graph, which a stream that is recorded does not allow."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Build:
    """How a model is built: what a recorded step has built in."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = list(model.modules())
        config = vars(model.config.get_text_config(decoder=True))  # the number of layers to run, for example
        self.namespaces = [config, *map(vars, self.modules)]
        self.hooks: list[dict[Any, Any]] = [*layer.EVERYWHERE]
        self.hooks += [hooks for m in self.modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._stores = [store for m in self.modules for store in (m._modules, m._parameters, m._buffers)]
        self._before = [m.__class__ for m in self.modules], [*map(dict, self.namespaces)]
        self._parts = self._all_parts()
        self.tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = [*map(_address, self.tensors)]

    def _all_parts(self) -> list[Any]:
        """Children, parameters and buffers."""
        return [*itertools.chain.from_iterable(store.values() for store in self._stores)]

    def is_intact(self) -> bool:
        """Whether it is built like that still."""
        parts = self._all_parts()
        try:
            return (
                len(parts) == len(self._parts)
                and all(map(operator.is_, parts, self._parts))
                and [*map(_address, self.tensors)] == self._addresses
                and ([m.__class__ for m in self.modules], self.namespaces) == self._before
            )
        except (RuntimeError, TypeError, ValueError):  # attributes that cannot be compared are not the same ones
            return False

    def is_hooked(self) -> bool:
        """Whether somebody looks on."""
        return any(self.hooks) and any(layer.watches(hook) for hooks in self.hooks for hook in hooks.values())

    def obstacle(self, root_forward: Any) -> str:
        """Why its steps cannot be recorded, or ""."""
        for module in self.modules:
            package = type(module).__module__.partition(".")[0]
            if package not in _KNOWN:
                return f"{type(module).__name__} is a module of {package}"
            forward = root_forward if module is self.modules[0] else vars(module).get("forward")
            owner = getattr(getattr(forward, "__func__", forward), "__module__", None) or ""
            if forward is not None and owner.partition(".")[0] != "torch_pagedkv":
                return f"a forward of {owner or 'unknown origin'} is bound to a {type(module).__name__}"
        odd = next((type(t).__name__ for t in self.tensors if type(t) not in _PLAIN), "")
        return odd and f"a parameter is a {odd}"


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in _PLAIN else id(tensor)


@dataclass(eq=False)
class Recorded:
    """Decoding steps of one kind, over the tensors of one `PagedStep`.

    Attributes:
        step: those tensors.
        seen: steps that Python ran.
        inputs: input_ids and, if given, position_ids, [B, 1], which a replay reads.
        form: class of the output. logits: in it, written by a replay.
        replay: None until it is recorded.
        column: where the recorded step was.
        trusted: a replay has given what Python gave.
    """

    step: PagedStep
    seen: int = 0
    inputs: dict[str, Tensor] = field(default_factory=dict)
    form: Any = None
    logits: Tensor | None = None
    replay: Callable[[], None] | None = None
    column: int = -1
    trusted: bool = False

    def again(self, inputs: dict[str, Any]) -> Tensor:
        """The logits of a step; the next call overwrites them."""
        assert self.replay is not None and self.logits is not None
        for name, tensor in self.inputs.items():
            tensor.copy_(inputs[name])
        self.replay()
        return self.logits


class Graphs:
    """The recorded steps of one patched model."""

    def __init__(self) -> None:
        self.refused = ""  # why none are made
        self.replays = 0
        self._build: Build | None = None
        self._checked: Callable[[], object] = lambda: None  # the generate() in which the build was looked at last
        self._place = (-1, -1)  # which pool of keys and values, and how often it moved
        self._kinds: OrderedDict[Any, Recorded] = OrderedDict()

    def runner(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        inputs: dict[str, Any],
        call: object,
        before: Any,
        eager: Runner,
    ) -> Runner:
        """What runs a planned decoding step.

        Args:
            inputs: arguments of the forward pass, by name.
            call: the generate() that makes it; None: the user does.
            before: the forward that is bound to the model below ours.
            eager: runs it in Python.

        Returns:
            `eager`, or what replays it, or what runs and records it.
        """
        step, key = cache.decode_step, _kind(model, cache, inputs)
        if step is None or key is None or not can_record(step.seq_lens.device):
            return eager
        self._look(model, cache, call, before)
        assert self._build is not None
        if self.refused or self._build.is_hooked():
            return eager
        key = id(step), *key
        one = self._kinds.get(key)
        if one is None:
            one = self._kinds[key] = Recorded(step)
            if len(self._kinds) > _MOST:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        if not one.trusted:
            return lambda model, args, kwargs: self._approach(one, model, cache, inputs, eager)

        def replay(model: PreTrainedModel, args: Any, kwargs: Any) -> Any:
            self.replays += 1
            return one.form(logits=one.again(inputs).clone(), past_key_values=cache)

        return replay

    def _look(self, model: PreTrainedModel, cache: PagedCache, call: object, before: Any) -> None:
        """Forgets what was recorded of another build or pool. (The build is looked at once in a generate().)"""
        place = cache.epoch, cache.manager.pool.moves
        if place != self._place:
            self._kinds.clear()
            self._place = place
        if self._build is not None and call is not None and self._checked() is call:
            return
        if self._build is None or not self._build.is_intact():
            self._kinds.clear()
            self._build = Build(model)
            self.refused = self._build.obstacle(before)
        self._checked = (lambda: None) if call is None else weakref.ref(call)

    def _approach(
        self, one: Recorded, model: PreTrainedModel, cache: PagedCache, inputs: dict[str, Any], eager: Runner
    ) -> Any:
        """Runs a step in Python; then records it, or compares it with a replay."""
        result = eager(model, (), inputs)
        one.seen += 1
        try:
            if one.replay is None:
                if one.seen > _WARM:
                    self._record(one, model, cache, inputs, eager, result)
            elif cache.columns != one.column:
                one.trusted = torch.equal(one.again(inputs), result.logits)
                if not one.trusted:
                    self._refuse("a replayed step differs from one that Python ran")
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            self._refuse(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return result

    def _record(
        self, one: Recorded, model: PreTrainedModel, cache: PagedCache, inputs: dict[str, Any], eager: Runner, like: Any
    ) -> None:
        if not isinstance(like, dict) or set(like) - _OUTPUTS or not isinstance(like.get("logits"), Tensor):
            self._refuse("its forward pass gives more than logits")
            return
        with torch.inference_mode(False):  # they are written to outside of it, too
            one.inputs = {
                name: torch.zeros_like(inputs[name])
                for name in ("input_ids", "position_ids")
                if inputs.get(name) is not None
            }
        for name, tensor in one.inputs.items():
            tensor.copy_(inputs[name])
        given = {**inputs, **one.inputs, "attention_mask": None}  # a paged step needs no mask
        cache.is_recorded = True
        try:
            output, replay = record(lambda: eager(model, (), given), one.step.seq_lens.device)
        finally:
            cache.is_recorded = False
        one.form, one.logits, one.column = type(output), output.logits, cache.columns
        one.replay = replay

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._kinds.clear()
        logger.info("torch_pagedkv: decoding steps are not replayed as CUDA graphs: %s", reason)


def _kind(model: PreTrainedModel, cache: PagedCache, inputs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What tells kinds of steps apart; None: such a step is not recorded."""
    ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if type(ids) is not Tensor or type(positions) not in (Tensor, type(None)):
        return None
    if torch.is_grad_enabled() or model.training or torch.is_autocast_enabled(ids.device.type):
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    rest = tuple((name, value) for name, value in inputs.items() if name not in _TENSORS and value is not cache)
    if not all(type(value) in _SCALARS for _, value in rest):
        return None
    masked = None if mask is None else mask.dim()
    placed = None if positions is None else (positions.shape, positions.dtype)
    modes = torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()
    return ids.dtype, placed, masked, cache.has_pads, _groups(model, cache), *modes, *rest


def _groups(model: PreTrainedModel, cache: PagedCache) -> tuple[Any, ...] | None:
    """What is built in of rows that begin with the same blocks, where they are attended to once."""
    shared = getattr(cache, "shared", None)
    if shared is None:
        return None
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    return shared.group_start.shape[0], shared.max_group_len, shared.serves(window)
