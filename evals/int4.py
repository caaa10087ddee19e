"""What do 4-bit weights (or 8-bit ones, `--weights`) do for speed and memory? `generate()` of one prompt: stock,
patched, and with such weights.

    python -m torch_pagedkv.evals.int4 [--model ... | --random llama3-8b] [--device ...] [--json FILE]
        [--weights int4 int8 fp8]

Every way has a model of its own, all are in memory at once, and they take turns: in each round every way generates the
same number of tokens after the same prompt, so that a machine that slows down slows all. Given are medians, and in the
JSON file every time. Where llama-cpp-python is installed and there is a GGUF file (`--gguf`; SmolLM2's own comes from
its package), llama.cpp runs it on the same prompt in the same rounds, and so do we, with the numbers as they are in the
file.

    decoding      (N - 1) / (time of N tokens - time of 1 token)
    first token   time of one token after the prompt, no prefix of it cached
    linears, head bytes of the linear layers, and of the language head where it has weights of its own
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torch_pagedkv
from torch_pagedkv.cli import positive

from . import command, demo, machine, models, prompts, render, speed

#: group sizes of the table: SmolLM2, the CPU's default model, has layers that 128 does not divide
GROUPS = {"cpu": (64, 32), "cuda": (128,)}


#: weights= of `patch` -> the op that has to run then
OPS = {"int4": "int4_linear", "int8": "int8_mm", "fp8": "fp8_mm"}


def ways_of(device: str, weights: Sequence[str] = ("int4",)) -> dict[str, dict[str, Any] | None]:
    """Way -> options of `patch`; None: stock."""
    quantised: dict[str, dict[str, Any]] = {}
    for form in weights:
        for group in GROUPS[device] if form == "int4" else (None,):
            name = form if group is None else f"{form} g{group}"
            quantised[name] = {"weights": form, **({} if group is None else {"group_size": group})}
    with_head = {f"{name}, head": {**options, "quantize_head": True} for name, options in quantised.items()}
    return {"stock": None, "patched": {}, **quantised, **with_head}


FROM_FILE = "patched, the GGUF file's numbers"
LLAMA_CPP = "llama.cpp"


class Ours:
    """A model of transformers, patched or not."""

    def __init__(self, model: Any, options: dict[str, Any] | None) -> None:
        self.model = model
        if options is not None:
            models.patch(model, **options)
        self.is_patched = options is not None
        self.op = OPS.get((options or {}).get("weights", ""))

    def generate(self, ids: list[int], count: int) -> tuple[float, list[int]]:
        """Seconds and tokens of one call; the prompt is new to the cache."""
        if self.is_patched:
            self.model.paged_cache.reset_prefixes()
        given = torch.tensor([ids], device=self.model.device)
        with prompts.endless(self.model):
            began = demo.synchronised_time(self.model.device)
            out = demo.generate(self.model, {"input_ids": given, "attention_mask": torch.ones_like(given)}, count)
            seconds = demo.synchronised_time(self.model.device) - began
        return seconds, out[0, len(ids) :].tolist()

    def memory(self) -> dict[str, int]:
        """Bytes of the linear layers and of a head that is tied to nothing."""
        head, shared = self.model.get_output_embeddings(), self.model.get_input_embeddings().weight
        linears = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m is not head]
        own = not any(t is shared for t in (*head._parameters.values(), *head._buffers.values()))
        return {"linears": _bytes(linears), "head": _bytes([head]) if own else 0}

    def failures(self) -> list[str]:
        """What must not be: quantised weights that no layer has."""
        ran = torch_pagedkv.report(self.model).replaced if self.is_patched else {}
        return [f"no layer runs {self.op}"] if self.op and not ran.get(self.op) else []


def _bytes(modules: list[Any]) -> int:
    tensors: list[Tensor] = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class LlamaCpp:
    """llama.cpp by its Python binding, greedy, on the CPU."""

    def __init__(self, file: Path, threads: int, context: int) -> None:
        llama: Any = importlib.import_module("llama_cpp")
        self.version: str = llama.__version__
        self.file = file
        self.model = llama.Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
        )

    def generate(self, ids: list[int], count: int) -> tuple[float, list[int]]:
        """As `Ours.generate`."""
        self.model.reset()  # else it finds the prompt in its cache
        began = time.perf_counter()
        tokens = list(itertools.islice(self.model.generate(ids, temp=0.0, repeat_penalty=1.0), count))
        return time.perf_counter() - began, tokens

    def memory(self) -> dict[str, int]:
        """Bytes of the file's matrices."""
        if models.is_missing("gguf"):
            return {}
        gguf: Any = importlib.import_module("gguf")
        sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(str(self.file)).tensors if len(t.shape) == 2}
        return {
            "linears": sum(size for name, size in sizes.items() if name.startswith("blk.")),
            "head": sizes.get("output.weight", 0),
        }

    def failures(self) -> list[str]:
        """None."""
        return []


def _from_file(file: Path, device: str, dtype: str) -> Ours:
    model: Any = torch_pagedkv.from_gguf(str(file), dtype=models.DTYPES[dtype])
    return Ours(model.to(device).eval(), {})


def prompt(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[int]:
    """The prompt's token ids."""
    given = speed.Inputs(model, tokenizer, args.prompt_tokens).single(args.prompt_tokens)
    return given["input_ids"][0].tolist()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every way."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    file = None if args.random else args.gguf
    if not args.random and file is None and device == "cpu":
        file = models.gguf_file(args.model)
    if file is not None and not file.is_file():
        raise models.UserError(f"--gguf: there is no {file}")
    ids: list[int] = []
    ways: dict[str, Callable[[], Any]] = {}

    def ours(options: dict[str, Any] | None) -> Ours:
        model, tokenizer = command.load(args, device, args.dtype)
        if not ids:
            ids.extend(prompt(args, model, tokenizer))
        # the models are there at the same time: none may take all memory for its cache
        return Ours(model, None if options is None else {"memory_fraction": 0.5 / len(given), **options})

    given = ways_of(device, args.weights)
    for name, options in given.items():
        ways[name] = functools.partial(ours, options)
    if file is not None:
        ways[FROM_FILE] = lambda: _from_file(file, device, args.dtype)
        if device == "cpu" and not models.is_missing("llama_cpp"):
            ways[LLAMA_CPP] = lambda: LlamaCpp(file, args.threads or threads, len(ids) + args.new_tokens + 8)
    if args.ways:
        unknown = [name for name in args.ways if name not in ways]
        if unknown:
            raise models.UserError(f"--ways: got {unknown[0]!r}, there are {', '.join(ways)}")
        ways = {name: make for name, make in ways.items() if name in args.ways}
    measured: dict[str, dict[str, Any]] = {}
    torch.set_num_threads(args.threads or threads)
    try:
        sides = {name: make() for name, make in tqdm(ways.items(), desc="loading", leave=False, disable=None)}
        gc.collect()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for name, side in sides.items():
            _, tokens = side.generate(ids, args.new_tokens)  # warms up
            measured[name] = {"way": name, "bytes": side.memory(), "tokens": tokens}
        for _ in tqdm(range(args.rounds), unit="round", leave=False, disable=None):
            for name, side in sides.items():
                first, _ = side.generate(ids, 1)
                times[name].append((first, side.generate(ids, args.new_tokens)[0]))
        broken = [f"{name}: {line}" for name, side in sides.items() for line in side.failures()]
        version = next((side.version for side in sides.values() if isinstance(side, LlamaCpp)), None)
    finally:
        torch.set_num_threads(threads)
    for name, one in measured.items():
        first, total = (statistics.median(column) for column in zip(*times[name]))
        one["decode_tokens_per_second"] = (args.new_tokens - 1) / (total - first)
        one["first_token_seconds"] = first
        one["all_seconds"] = times[name]
    return {
        "eval": "int4",
        "model": f"{args.random}, random weights" if args.random else command.model_name(args.model),
        "device": device,
        "dtype": args.dtype,
        "threads": args.threads or threads,
        "prompt_tokens": len(ids),
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "llama_cpp": version,
        "machine": machine.describe(device, args.argv),
        "ways": list(measured.values()),
        "failures": broken,
    }


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The result as one table; factors are against its first row."""
    threads = f", {result['threads']} thread{'s' * (result['threads'] > 1)}" if result["device"] == "cpu" else ""
    head = ["tokens/s", "", "first token, ms", "", "linears, MiB", "head, MiB"]
    rows: list[Sequence[str]] = [[f"{result['dtype']}, one prompt of {result['prompt_tokens']}{threads}", *head]]
    base = result["ways"][0]
    for one in result["ways"]:
        name = one["way"]
        if name == LLAMA_CPP:
            name += f" ({result['llama_cpp']} of llama-cpp-python)"
        sizes = [f"{one['bytes'][part] / 2**20:.1f}" if part in one["bytes"] else "-" for part in ("linears", "head")]
        rate, first = "decode_tokens_per_second", "first_token_seconds"
        rows.append(
            [
                name,
                f"{one[rate]:.1f}",
                f"{one[rate] / base[rate]:.2f}x",
                f"{1e3 * one[first]:.1f}",
                f"{base[first] / one[first]:.2f}x",
                *sizes,
            ]
        )
    return {"int4": rows}


def parser() -> argparse.ArgumentParser:
    """Declare the options."""
    top = command.parser("int4", __doc__, random=True)
    add: Callable[..., Any] = top.add_argument
    add("--dtype", choices=models.DTYPES, default="bf16", help="default: %(default)s")
    add("--weights", nargs="+", choices=OPS, default=["int4"], help="in which the rows are (default: int4)")
    add("--ways", nargs="+", metavar="WAY", help="some of the table's rows (default: all)")
    add("--gguf", type=Path, metavar="FILE", help="for llama.cpp (default: the model's own, if it has one)")
    add("--rounds", type=positive, default=5, metavar="N", help="turns of each way (default: %(default)s)")
    add("--new-tokens", type=speed.at_least_two, default=64, metavar="N", help="default: %(default)s")
    add("--prompt-tokens", type=positive, default=64, metavar="N", help="default: %(default)s")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a way did not run what it is called."""
    return command.main(parser(), run, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
