"""What torch.compile gives: stock eager, stock on a static cache and compiled, patched, patched and compiled.

    python -m torch_pagedkv.evals.compiled [--model ... | --random llama3-8b] [--weights int4] [--device ...] [--json F]

Each way decodes the same prompts with plain `generate()`, on the same model object, from an empty compiler. Given are

    first call    seconds from the call to its first token and to its last one, compilation included
    decoding      batch * (N - 1) / (time of N tokens - time of 1 token), medians, once compiled
    graphs        compiled graphs after the first call, and how many more prompts of other lengths added
    peak memory   of the device while decoding (CUDA), over what was in use before
    tokens        whether they are those of stock eager (they must be in fp32)
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

import torch_pagedkv
from torch_pagedkv.cli import positive
from torch_pagedkv.patches import is_patched

from . import command, demo, machine, models, prompts, render
from .speed import Inputs, at_least_two


class FirstToken(BaseStreamer):
    """Notes when generate() hands out the first new token."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls, self.at = device, 0, 0.0

    def put(self, value: Tensor) -> None:
        """The prompt comes first, then token by token."""
        self.calls += 1
        if self.calls == 2:
            self.at = demo.synchronised_time(self.device)

    def end(self) -> None:
        """Nothing to do."""


def stock_static(model: Any, mode: str) -> dict[str, Any]:
    """Stock's own way: a static cache, and generate() compiles decoding."""
    config = CompileConfig(mode=mode, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


class Way(NamedTuple):
    """How the model runs; with `weights`, it is patched for good."""

    patched: bool
    compiled: bool
    weights: str | None = None


WAYS = {
    "stock": Way(False, False),
    "stock, static, compiled": Way(False, True),
    "patched": Way(True, False),
    "patched, compiled": Way(True, True),
}


def ways(weights: str | None) -> dict[str, Way]:
    """The usual ones, and last those with other weights."""
    if weights is None:
        return WAYS
    return WAYS | {f"{weights}": Way(True, False, weights), f"{weights}, compiled": Way(True, True, weights)}


def weight_bytes(model: Any) -> int:
    """Of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def measure(
    model: Any, inputs: Inputs, name: str, way: Way, args: argparse.Namespace, want: list[list[int]] | None
) -> dict[str, Any]:
    """One way, from an empty compiler; the model is uncompiled before and after, and stock unless its weights are
    replaced."""
    patched, compiled, weights = way
    torch._dynamo.reset()
    counters.clear()
    options: dict[str, Any] = {}
    if patched and not is_patched(model):
        models.patch(model, **({} if weights is None else {"weights": weights, "group_size": args.group_size}))
    if compiled and patched:
        model.compile(mode=args.mode, fullgraph=True)
    elif compiled:
        options = stock_static(model, args.mode)
    device, batch = model.device, inputs.batch(args.batch)
    try:
        streamer = FirstToken(device)
        began = demo.synchronised_time(device)
        if args.batch == 1:
            options["streamer"] = streamer
        out = demo.generate(model, batch, args.new_tokens, **options)
        ended = demo.synchronised_time(device)
        options.pop("streamer", None)
        tokens = out[:, batch["input_ids"].shape[1] :].tolist()
        graphs = counters["stats"]["unique_graphs"]
        for length in (48, 100):
            demo.generate(model, inputs.single(length), 4, **options)
        if args.batch > 1:
            demo.generate(model, inputs.batch(args.batch), 4, **options)
        more = counters["stats"]["unique_graphs"] - graphs

        def timed(count: int) -> float:
            if patched:
                model.paged_cache.reset_prefixes()
            start = demo.synchronised_time(device)
            demo.generate(model, batch, count, **options)
            return demo.synchronised_time(device) - start

        timed(args.new_tokens)
        memory = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        times = {"total": [timed(args.new_tokens) for _ in range(args.rounds)], "first": []}
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) - before
        times["first"] = [timed(1) for _ in range(args.rounds)]
    finally:
        model._compiled_call_impl = None
        if patched and weights is None:
            torch_pagedkv.unpatch(model)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    total, first = (statistics.median(times[key]) for key in ("total", "first"))
    return {
        "way": name,
        "weight_bytes": weight_bytes(model),
        "first_token_seconds": streamer.at - began if args.batch == 1 else None,
        "first_call_seconds": ended - began,
        "decode_tokens_per_second": args.batch * (args.new_tokens - 1) / (total - first),
        "all_seconds": times,
        "graphs": graphs,
        "graphs_added": more,
        "peak_bytes": memory,
        "first_difference": demo.compare(tokens, want if want is not None else tokens),
        "tokens": tokens,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every way."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = command.load(args, str(device), dtype)
    inputs = Inputs(model, tokenizer, args.prompt_tokens)
    measured: list[dict[str, Any]] = []
    with prompts.endless(model):
        for name, way in tqdm(ways(args.weights).items(), unit="way", leave=False, disable=None):
            measured.append(measure(model, inputs, name, way, args, measured[0]["tokens"] if measured else None))
    for one in measured:
        del one["tokens"]
    wrong = [
        one["way"]
        for one in measured
        if dtype == "fp32" and one["way"] in WAYS and any(at is not None for at in one["first_difference"])
    ]
    again = [
        one["way"]
        for one in measured
        if ways(args.weights)[one["way"]].patched and one["graphs_added"] > 2 * (args.batch > 1)
    ]
    return {
        "eval": "compiled",
        "model": f"{args.random}, random weights" if args.random else command.model_name(args.model),
        "device": str(device),
        "dtype": dtype,
        "batch": args.batch,
        "mode": args.mode,
        "machine": machine.describe(device, args.argv),
        "ways": measured,
        "failures": [f"{way}: other tokens than stock eager" for way in wrong]
        + [f"{way}: prompts of other lengths were compiled again" for way in again],
    }


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The result as one table."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    head = [
        "generate()",
        "tokens/s",
        "weights MiB",
        "first token, s",
        "first call, s",
        "graphs",
        "added",
        "same tokens",
    ]
    rows = [[f"{result['dtype']}, batch {result['batch']}", *head[1:]]]
    for one in result["ways"]:
        same = sum(at is None for at in one["first_difference"])
        rows.append(
            [
                one["way"],
                f"{one['decode_tokens_per_second']:.1f}",
                f"{one['weight_bytes'] / 2**20:.0f}" if "weight_bytes" in one else "-",
                seconds(one["first_token_seconds"]),
                seconds(one["first_call_seconds"]),
                str(one["graphs"]),
                str(one["graphs_added"]),
                f"{same} of {result['batch']}",
            ]
        )
        if one["peak_bytes"] is not None:
            rows[-1].append(f"{one['peak_bytes'] / 2**20:.0f}")
    if any(one["peak_bytes"] is not None for one in result["ways"]):
        rows[0].append("peak MiB")
    return {"compiled": rows}


def parser() -> argparse.ArgumentParser:
    """Declare the options."""
    top = command.parser("compiled", __doc__, random=True)
    add: Callable[..., Any] = top.add_argument
    add("--dtype", choices=models.DTYPES, help="default: fp32 on cpu, bf16 on cuda")
    add("--batch", type=positive, default=1, metavar="N", help="default: %(default)s")
    add("--mode", default="default", help="torch.compile's, such as reduce-overhead (default: %(default)s)")
    add("--rounds", type=positive, default=3, metavar="N", help="timed calls (default: %(default)s)")
    add("--new-tokens", type=at_least_two, default=64, metavar="N", help="default: %(default)s")
    add("--prompt-tokens", type=positive, default=128, metavar="N", help="longest random prompt (default: %(default)s)")
    add("--weights", choices=("int4",), help="two more ways, with the weights of the linear layers replaced")
    add("--group-size", type=positive, default=128, metavar="N", help="of --weights int4 (default: %(default)s)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if tokens differ in fp32 or a prompt's length was compiled again."""
    return command.main(parser(), run, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
