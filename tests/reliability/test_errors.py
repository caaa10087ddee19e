"""What goes wrong in the middle of `generate()`: nothing leaks, and the model answers as before."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import options as table
import pytest
import tiny
import torch
import transformers as hf
from helpers import assert_nothing_leaks, greedy, twins
from torch import Tensor

import torch_pagedkv
from torch_pagedkv.kv import manager
from torch_pagedkv.kv.manager import CacheFullError
from torch_pagedkv.patches import generation


class Mine(Exception):
    """An error of the user's own code."""


class Fuse:
    """Raises at the n-th time."""

    def __init__(self, left: int, error: BaseException) -> None:
        self.left, self.error = left, error

    def burn(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


def _processor(fuse: Fuse) -> Any:
    class Burning(hf.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            fuse.burn()
            return scores

    return Burning()


def _streamer(fuse: Fuse) -> Any:
    streamer = table.Recorder([])
    streamer.put = fuse.burn  # type: ignore[method-assign]
    return streamer


def _criterion(fuse: Fuse) -> Any:
    def criterion(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        fuse.burn()
        return torch.zeros(len(ids), dtype=torch.bool)

    return criterion


def _allowed(fuse: Fuse) -> Any:
    def allowed(row: int, ids: Tensor) -> list[int]:
        fuse.burn()
        return list(range(2, tiny.VOCABULARY))

    return allowed


#: where the user's code runs -> an option with the fuse in it
CALLBACKS: dict[str, Callable[[Fuse], dict[str, Any]]] = {
    "logits processor": lambda fuse: {"logits_processor": [_processor(fuse)]},
    "stopping criterion": lambda fuse: {"stopping_criteria": [_criterion(fuse)]},
    "prefix_allowed_tokens_fn": lambda fuse: {"prefix_allowed_tokens_fn": _allowed(fuse)},
    "streamer": lambda fuse: {"streamer": _streamer(fuse)},
}
#: where a hook can be -> how to put it there
HOOKS: dict[str, Callable[[hf.PreTrainedModel, Fuse], Any]] = {
    "before the model": lambda model, fuse: model.register_forward_pre_hook(fuse.burn),
    "after the model": lambda model, fuse: model.register_forward_hook(fuse.burn),
    "before the last layer": lambda model, fuse: last_layer(model).register_forward_pre_hook(fuse.burn),
    "after the last layer": lambda model, fuse: last_layer(model).register_forward_hook(fuse.burn),
    "before the head": lambda model, fuse: model.get_output_embeddings().register_forward_pre_hook(fuse.burn),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
    "drafts": table.OPTIONS["prompt lookup"],
    "assistant": table.OPTIONS["patched assistant"],
    "early exit": table.OPTIONS["early exit"],
    "second turn": table.OPTIONS["second turn"],
    "attentions": table.OPTIONS["attentions"],
}


def last_layer(model: hf.PreTrainedModel) -> torch.nn.Module:
    decoder = model.base_model
    return (decoder.h if hasattr(decoder, "h") else decoder.layers)[-1]


def settings_of(mode: dict[str, Any], setting: table.Setting) -> dict[str, Any]:
    settings = table.resolve(table.BASE | mode, setting)
    return settings.pop("inputs", setting.inputs) | settings


@contextmanager
def failing(model: hf.PreTrainedModel, error: BaseException) -> Iterator[None]:
    """The error comes out, and what keeps things alive or changed without our doing is taken back."""
    layers = model.config.num_hidden_layers
    with pytest.raises(type(error)):
        yield
    error.__traceback__ = None  # its frames hold the caller's cache
    model.config.num_hidden_layers = layers  # early exit does not put it back


def assert_usable(family: str, model: hf.PreTrainedModel) -> None:
    """No leak, and the stock answer, twice: the prompt's blocks were not left half written in the prefix index."""
    assert_nothing_leaks(model)
    for _ in range(2):
        assert torch.equal(model.generate(**tiny.batch(), max_new_tokens=12, do_sample=False), greedy(family))
    assert_nothing_leaks(model)


def pairs(places: Any) -> list[Any]:
    """(place, mode): greedy and one other mode for each place are fast."""
    return [
        pytest.param(place, mode, marks=() if j in (0, 1 + i % (len(MODES) - 1)) else pytest.mark.slow)
        for i, place in enumerate(places)
        for j, mode in enumerate(MODES)
        if not (place == "streamer" and "num_beams" in MODES[mode])
    ]


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize(("place", "mode"), pairs(CALLBACKS))
def test_error_in_a_callback(place: str, mode: str, after: int) -> None:
    model = twins("llama")[1]
    model.paged_cache.reset()
    error: BaseException = (Mine("a"), KeyboardInterrupt(), SystemExit())[after % 3]
    settings = settings_of(MODES[mode], table.Setting("llama", model, tiny.batch()))
    with failing(model, error):
        model.generate(**settings, **CALLBACKS[place](Fuse(after, error)))
    del settings
    assert_usable("llama", model)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("bloom", "mistral"))])
@pytest.mark.parametrize(("place", "mode"), pairs(HOOKS))
def test_error_in_a_hook(place: str, mode: str, family: str, after: int) -> None:
    if mode == "early exit" and family in table.NOT_IN_STOCK["early exit"]:
        pytest.skip("no early exit in this family")
    model = twins(family)[1]
    model.paged_cache.reset()
    error: BaseException = (KeyboardInterrupt(), Mine("a"))[after % 2]
    settings = settings_of(MODES[mode], table.Setting(family, model, tiny.batch()))
    hook = HOOKS[place](model, Fuse(after, error))
    with failing(model, error):
        model.generate(**settings)
    hook.remove()
    del settings
    assert_usable(family, model)


def test_errors_again_and_again() -> None:
    """The pool does not grow from call to call that fails."""
    model, sizes = twins("llama")[1], set()
    model.paged_cache.reset()
    for n in range(12):
        with pytest.raises(Mine):
            model.generate(
                **tiny.batch(seed=n % 3),
                num_beams=2,
                max_new_tokens=9,
                **CALLBACKS["logits processor"](Fuse(5, Mine())),
            )
        if n >= 6:
            sizes.add(model.paged_cache.stats()["num_blocks"])
    assert len(sizes) == 1
    assert_usable("llama", model)


def test_error_in_the_second_turn_leaves_the_callers_cache() -> None:
    """Cut back to what the first turn left, the conversation goes on."""
    model = twins("llama")[1]
    setting = table.Setting("llama", model, tiny.batch())
    settings = settings_of(MODES["second turn"], setting)
    cache = settings["past_key_values"]
    columns = cache.get_seq_length()
    want = twins("llama")[0].generate(
        **settings_of(MODES["second turn"], table.Setting("llama", twins("llama")[0], tiny.batch()))
    )
    for after in (0, 3):
        with pytest.raises(Mine):
            model.generate(**settings, **CALLBACKS["logits processor"](Fuse(after, Mine())))
        assert_nothing_leaks(model, live=True)
        cache.crop(columns - cache.get_seq_length())
    assert torch.equal(model.generate(**settings), want)
    del settings, cache
    assert_usable("llama", model)


# ---- an interrupt at any line ----------------------------------------------------------------------------------------

_OURS = tuple(os.path.dirname(str(module.__file__)) + os.sep for module in (generation, manager))


@contextmanager
def interrupt_at(line: int) -> Iterator[list[int]]:
    """A KeyboardInterrupt in front of the n-th line of this package that runs; yields the count of lines."""
    count = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS) or frame.f_code.co_name == "turn":
            return None
        # Python looks for signals at calls and jumps, never between the end of a block and what its `with` does then
        here = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not here.lstrip().startswith("with "):
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("mode", "points"),
    [
        ("greedy", 40),
        ("beams", 20),
        *(pytest.param(mode, 250, marks=pytest.mark.slow) for mode in ("greedy", "beams", "chunks", "drafts")),
    ],
)
def test_interrupt_at_any_line(mode: str, points: int) -> None:
    """Ctrl-C between two statements of the bookkeeping, which may tear it."""
    model = twins("llama")[1]
    # the rows' common beginning is found by the second call, and copied on writing
    settings = settings_of(MODES[mode] | {"max_new_tokens": 4}, table.Setting("llama", model, tiny.batch()))
    model.paged_cache.reset()
    model.generate(**settings)
    with interrupt_at(0) as count:
        model.generate(**settings)
    hit = 0
    for point in range(points):
        line = 1 + point * count[0] // points
        try:
            with interrupt_at(line):
                model.generate(**settings)
        except KeyboardInterrupt:
            hit += 1
        assert_nothing_leaks(model)
        assert torch.equal(model.generate(**tiny.batch(), max_new_tokens=12, do_sample=False), greedy("llama")), line
    assert hit > points * 0.9


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "beams", "samples", "chunks"])
def test_cache_full(mode: str) -> None:
    """At once or in the middle; with fewer tokens or rows the same model goes on."""
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, num_blocks=10)
    want = tiny.make("llama").generate(**tiny.batch((14,)), max_new_tokens=12, do_sample=False)
    for lengths, new in (((14, 14, 14), 40), ((79, 79), 2), ((70,), 30)):
        with pytest.raises(CacheFullError, match="num_blocks"):
            model.generate(**tiny.batch(lengths), **(table.BASE | MODES[mode] | {"max_new_tokens": new}))
        assert_nothing_leaks(model)
        assert torch.equal(model.generate(**tiny.batch((14,)), max_new_tokens=12, do_sample=False), want)


def test_cache_full_of_live_conversations() -> None:
    """Caches that the caller holds are never taken from: the next call says that it is full, they go on."""
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, num_blocks=10)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    held = [model.generate(**tiny.batch((20,), seed=seed), **options) for seed in (1, 2)]
    with pytest.raises(CacheFullError, match="5 more blocks of 8 tokens are needed, 2 of 10"):
        model.generate(**tiny.batch((33,), seed=3), max_new_tokens=4)
    assert_nothing_leaks(model, live=True)
    stock = tiny.make("llama")
    for first in held:
        ids = first.sequences
        got = model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
        assert torch.equal(got, stock.generate(ids, max_new_tokens=5, do_sample=False))
    del held, first
    assert_nothing_leaks(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_too_long(family: str) -> None:
    limit = {"llama": {"max_position_embeddings": 64}, "gpt2": {"n_positions": 64}}[family]
    model = torch_pagedkv.patch(tiny.make(family, **limit), block_size=8)
    for lengths, options in (((65,), {}), ((3, 65), {"num_beams": 2}), ((70,), {"prefill_chunk_size": 8})):
        with pytest.raises(ValueError, match=f"the prompt has {lengths[-1]} tokens, the model 64 positions"):
            model.generate(**tiny.batch(lengths), max_new_tokens=3, **options)
        assert_nothing_leaks(model)
    want = tiny.make(family, **limit).generate(**tiny.batch((50,)), max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(**tiny.batch((50,)), max_new_tokens=10, do_sample=False), want)
