"""What a run takes: tokens and seconds of an lm-eval model, memory of the model under it."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import torch_pagedkv

from . import demo


class Meter:
    """Mixed into an lm-eval model: the time its model takes, the tokens, the windows of rolling requests.

    Time is the clock's and this process's share of the processors, which others at work on the machine do not change
    as much.
    """

    def start(self) -> None:
        """Forget what was measured."""
        self.seconds = self.cpu_seconds = 0.0
        self.scored = self.generated = 0
        self.windows: list[tuple[float, int]] = []

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time inside a with statement."""
        device = self.device  # type: ignore[attr-defined]
        began, cpu = demo.synchronised_time(device), time.process_time()
        yield
        self.seconds += demo.synchronised_time(device) - began
        self.cpu_seconds += time.process_time() - cpu

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As the model does it; bars on terminals only."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As `loglikelihood`."""
        quiet = disable_tqdm or not sys.stderr.isatty()
        return super().loglikelihood_rolling(requests, disable_tqdm=quiet)  # type: ignore[misc]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As `loglikelihood`."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        if not sys.stderr.isatty():
            kwargs["disable_tqdm"] = True
        with self.timed():
            answers = super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]
        self.scored += sum(len(context) + len(continuation) - 1 for _, context, continuation in requests)
        for (key, _, continuation), (value, _) in zip(requests, answers):
            if key is None:
                self.windows.append((value, len(continuation)))
        return answers

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        with self.timed():
            out = super()._model_generate(context, *args, **kwargs)  # type: ignore[misc]
        new = out[:, context.shape[1] :]
        self.generated += int((new != self.tokenizer.pad_token_id).sum())  # type: ignore[attr-defined]
        return out


class Memory:
    """Memory of a run, from `start` on: of keys and values, and of all at its peak."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kv_bytes = self.kv_bytes_per_token = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[Memory]:
        """Measures inside a with statement."""
        manager = getattr(self.model, "paged_cache", None)
        if manager is not None:
            manager.reset()  # with a peak of its own
        cuda = self.model.device.type == "cuda"
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.model.device)
        else:
            resettable = reset_peak()
        hook = self.model.register_forward_hook(self._look)
        try:
            yield self
        finally:
            hook.remove()
        peak = torch.cuda.max_memory_allocated(self.model.device) if cuda else peak_bytes() if resettable else None
        if manager is not None:
            stats = manager.stats()
            self.kv_bytes = stats["peak_used"] * stats["bytes_per_block"]
            self.kv_bytes_per_token = stats["bytes_per_block"] // stats["block_size"]
            if cuda and peak is not None:  # the pool takes what is free; count what was used of it
                peak += self.kv_bytes - stats["bytes_total"]
        self.peak_bytes = peak

    def _look(self, model: Any, args: Any, out: Any) -> None:
        cache = getattr(out, "past_key_values", None)
        layers = getattr(cache, "layers", None)
        if not layers or isinstance(cache, torch_pagedkv.PagedCache):
            return
        size = demo.cache_bytes(cache)
        self.kv_bytes = max(self.kv_bytes, size)
        keys = getattr(layers[0], "keys", None)
        if keys is not None and keys.numel():
            self.kv_bytes_per_token = size // (keys.shape[0] * keys.shape[2])


def reset_peak() -> bool:
    """Starts the process's peak of resident memory anew; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_bytes() is not None


def peak_bytes() -> int | None:
    """Peak of the process's resident memory."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) << 10 if line else None
