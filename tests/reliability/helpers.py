"""Stock and patched twins, one call of each, and what must be equal between them."""

from __future__ import annotations

import functools
import gc
import threading
from dataclasses import dataclass
from typing import Any

import options as table
import tiny
import torch
import transformers as hf
from torch import Tensor

import torch_pagedkv

#: of the norm of what a stock model returns in float32: the order of sums differs, nothing else
TOLERANCE = 2e-5


@functools.cache
def twins(family: str) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    """A stock model and its patched twin, made once a process. Eager: attentions can be asked for."""
    stock, patched = (tiny.make(family, **_implementation(family)) for _ in range(2))
    return stock, torch_pagedkv.patch(patched, block_size=8)


def _implementation(family: str) -> dict[str, str]:
    return {} if family == "bloom" else {"attn_implementation": "eager"}


@functools.cache
def greedy(family: str) -> Tensor:
    """What the stock model answers to the ragged batch."""
    return twins(family)[0].generate(**tiny.batch(), max_new_tokens=12, do_sample=False)


def assert_nothing_leaks(model: Any, *, live: bool = False) -> None:
    """No block is in use unless something `live` holds it, and the allocator's invariants hold."""
    manager = model.paged_cache
    if manager.stats()["used"] and not live:
        gc.collect()  # a traceback or a candidate generator holds caches in a cycle
    stats = manager.stats()
    if not live:
        assert (stats["used"], stats["sequences"]) == (0, 0)
    assert stats["used"] + stats["cached"] + stats["free"] == stats["num_blocks"]
    if stats["num_blocks"]:
        manager.blocks.check()
    assert lock_is_free(manager), "some generate() did not give the lock back"


def lock_is_free(manager: Any) -> bool:
    """Whether another thread could generate now."""
    free: list[bool] = []

    def probe() -> None:
        for lock in (manager.lock, manager.turn):
            if lock.acquire(blocking=False):
                lock.release()
                free.append(True)

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    return len(free) == 2


@dataclass
class Outcome:
    """What a call returned or raised, without its cache."""

    value: Any = None
    error: str = ""
    seen: Any = None


def call(
    family: str, model: hf.PreTrainedModel, options: dict[str, Any], inputs: dict[str, Tensor] | None = None
) -> Outcome:
    """One `generate()` under a fixed seed; an exception is an outcome, too."""
    setting = table.Setting(family, model, dict(tiny.batch() if inputs is None else inputs))
    torch.manual_seed(3)
    try:
        settings = table.resolve(table.BASE | options, setting)
        settings = settings.pop("inputs", setting.inputs) | settings
        if "generation_config" in settings:
            settings = {k: v for k, v in settings.items() if k not in table.BASE or k in options}
        value = model.generate(**settings)
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}".replace("PagedCache", "DynamicCache"))
    if isinstance(value, hf.utils.ModelOutput):
        value = {name: part for name, part in value.items() if name != "past_key_values"}
    return Outcome(value, seen=[list(x) if not isinstance(x, (list, tuple, str)) else x for x in setting.seen])


def assert_same(got: Outcome, want: Outcome, mask: Tensor | None = None) -> None:
    """Tokens, texts and errors exactly; scores and states up to roundings, where they belong to a token."""
    assert got.error == want.error
    assert got.seen == want.seen
    _compare("", got.value, want.value, mask)


def _compare(path: str, got: Any, want: Any, mask: Tensor | None) -> None:
    assert type(got) is type(want), path
    if isinstance(want, dict):
        assert list(got) == list(want), path
        for name in want:
            _compare(f"{path}.{name}", got[name], want[name], mask)
    elif isinstance(want, (tuple, list)):
        assert len(got) == len(want), path
        for i, (g, w) in enumerate(zip(got, want)):
            _compare(f"{path}[{i}]", g, w, mask)
    elif isinstance(want, Tensor):
        if path.startswith(".attentions") and got.shape[-1] > want.shape[-1]:
            # a stock sliding cache forgets what its window has passed; the paged one keeps it, with a weight of 0
            assert not got[..., : -want.shape[-1]].any(), path
            got = got[..., -want.shape[-1] :]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), path
        if want.is_floating_point():
            _compare_floats(path, got, want, mask)
        else:
            assert torch.equal(got, want), (path, got, want)
    else:
        assert got == want, path


def _compare_floats(path: str, got: Tensor, want: Tensor, mask: Tensor | None) -> None:
    if mask is not None and path.startswith((".hidden_states[0]", ".attentions[0]")):
        # of the prompt: what stands at a pad is anything
        columns = want.shape[-2]
        rows = mask.repeat_interleave(len(want) // len(mask), 0)[:, :columns].bool()
        rows = rows[:, None, :, None] if want.dim() == 4 else rows[..., None]
        got, want = got.masked_fill(~rows, 0), want.masked_fill(~rows, 0)
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(got[~finite], want[~finite]), path
    got, want = got[finite], want[finite]
    error, scale = float((got - want).norm()), float(want.norm())
    assert error <= TOLERANCE * max(scale, 1e-30), (path, error / max(scale, 1e-30))
