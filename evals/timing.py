"""Timers of single calls: CUDA-graph replay or wall clock over inputs in turn; and this machine's limits."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from . import machine

GRAPH_US = 2000.0  # work in a CUDA graph, so that starting it (3 us) does not count
MAX_CALLS = 400  # of a graph
MIB = 1 << 20


def cuda(call: Callable[[Any], Any], sets: Sequence[Any], seconds: float, graphed: bool = True) -> tuple[float, str]:
    """Time of one call on a GPU: the median over replays of one CUDA graph of calls on all sets, several times each if
    they are few and short.

    Returns:
        us, and "graph" or, where it cannot be captured, "eager".
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for a in sets[:3]:
            call(a)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    begin = time.perf_counter()
    for a in sets[:8]:
        call(a)
    torch.cuda.synchronize()
    guess = (time.perf_counter() - begin) * 1e6 / len(sets[:8])
    rounds = max(1, math.ceil(min(GRAPH_US / guess, MAX_CALLS) / len(sets)))

    def run() -> None:
        for _ in range(rounds):
            for a in sets:
                call(a)

    how = "eager"
    graph = torch.cuda.CUDAGraph()
    if graphed:
        try:
            with torch.cuda.graph(graph):
                run()
            how, run = "graph", graph.replay
        except RuntimeError:
            torch.cuda.synchronize()

    run()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(sets)))
    return statistics.median(times), how


def cpu(call: Callable[[Any], Any], sets: Sequence[Any], seconds: float) -> tuple[float, str]:
    """Time of one call on the CPU: (us, "wall"), the median."""
    for a in sets[:2]:
        call(a)
    times: list[float] = []
    begin = time.perf_counter()
    for a in itertools.cycle(sets):
        start = time.perf_counter()
        call(a)
        end = time.perf_counter()
        times.append((end - start) * 1e6)
        if len(times) >= 5 and end - begin > seconds:
            return statistics.median(times), "wall"
    raise AssertionError("no inputs")


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine can do, measured here and now.

    Returns:
        "GB/s" of a copy of one large tensor (read and write), "TFLOP/s" of a large matrix product in the dtype and, on
        a GPU, "PCIe GB/s" of a copy to pinned memory and "PCIe GB/s, both ways" of one there and one back at once.
    """
    on_gpu = device.type == "cuda"
    # A copy node of a graph goes through the copy engine and reaches two thirds of what the same call does outside.
    timer = partial(cuda, graphed=False) if on_gpu else cpu
    count, n = (min(1 << 33, _memory(device) // 8), 8192) if on_gpu else (1 << 26, 1024)
    x = torch.zeros(count, dtype=torch.uint8, device=device)
    y = torch.ones_like(x)  # written once, so that its pages are there
    copied, _ = timer(lambda a: a.y.copy_(a.x), [SimpleNamespace(x=x, y=y)], 0.3)
    m = torch.randn(n, n, device=device, dtype=dtype)
    product, _ = timer(lambda a: a.m @ a.m, [SimpleNamespace(m=m)], 0.3)
    found = {"GB/s": 2 * count / copied / 1e3, "TFLOP/s": 2 * n**3 / product / 1e6}
    if on_gpu:
        size = 256 * MIB
        host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        side = torch.cuda.Stream()

        def both_ways(a: Any) -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                host[0].copy_(x[:size], non_blocking=True)
            y[:size].copy_(host[1], non_blocking=True)
            torch.cuda.current_stream().wait_stream(side)

        us, _ = timer(lambda a: host[0].copy_(x[:size], non_blocking=True), [None], 0.03)
        found["PCIe GB/s"] = size / us / 1e3
        us, _ = timer(both_ways, [None], 0.03)
        found["PCIe GB/s, both ways"] = 2 * size / us / 1e3
    return found


def clocks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A GPU's clocks in MHz while it multiplies matrices, as nvidia-smi tells them; {} on a CPU."""
    if device.type != "cuda":
        return {}
    m = torch.randn(8192, 8192, device=device, dtype=dtype)
    out = torch.empty_like(m)
    for _ in range(500):  # half a second and more: longer than nvidia-smi takes
        torch.mm(m, m, out=out)
    told = machine.gpu(device)
    torch.cuda.synchronize()
    return {name: told[name] for name in ("sm_clock_mhz", "memory_clock_mhz")}
