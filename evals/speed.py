"""How fast is a patched model? Stock and patched `generate()` on the same model object, in turns.

    python -m torch_pagedkv.evals.speed [--model ... | --random llama3-8b] [--device ...] [--json FILE]

For every case (dtype, batch, threads) the model is measured stock, patched, stock, patched and so on, at least five
times each: a machine that slows down slows both. Each turn begins with a full untimed call. Given are medians, and in
the JSON file every time. No end-of-sequence token is known, so that all rows have the same length.

    decoding      batch * (N - 1) / (time of N tokens - time of 1 token)
    first token   time of generate(max_new_tokens=1) on a single prompt of 64 and of 512 tokens, and again on the
                  latter with its blocks in the prefix cache; before all other timed calls prefixes are forgotten
    KV bytes      stock: the tensors of the cache at the end; patched: the most blocks in use at any time
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import torch_pagedkv
from torch_pagedkv.cli import positive

from . import command, demo, machine, models, prompts, render, trace

SIDES = ("stock", "patched")
FIRST = (64, 512)  # tokens of the prompts whose first token is timed


class Inputs:
    """Batches for one model: real prompts if it has a tokenizer, else random ids."""

    def __init__(self, model: Any, tokenizer: Any, longest: int) -> None:
        self.model, self.tokenizer, self.longest = model, tokenizer, longest

    def random(self, length: int, seed: int) -> Tensor:
        """int64 [length] random ids."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))

    def batch(self, size: int) -> dict[str, Tensor]:
        """Prompts of ragged lengths, all different, padded on the left."""
        if self.tokenizer is not None:
            pairs = (f"{a}\n\n{b}" for a, b in itertools.permutations(prompts.SHORT, 2))
            texts = list(itertools.islice(itertools.chain(prompts.SHORT[6:], prompts.SHORT[:6], pairs), size))
            return dict(models.encode(self.tokenizer, texts, self.model.device))
        lengths = [self.longest - i * 3 * self.longest // (4 * size) for i in range(size)]
        ids = torch.zeros(size, self.longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, self.longest - length :] = self.random(length, row)
            mask[row, self.longest - length :] = 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def single(self, length: int) -> dict[str, Tensor]:
        """One prompt of exactly so many tokens."""
        if self.tokenizer is None:
            ids = self.random(length, 1000 + length)
        else:
            ids = torch.tensor(self.tokenizer(prompts.PASSAGE)["input_ids"][:length])
            if len(ids) < length:
                raise models.UserError(f"the passage has {len(ids)} tokens in this model's vocabulary, not {length}")
        ids = ids[None].to(self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def turn(model: Any, side: str, case: dict[str, Any], batch: dict[str, Tensor], inputs: Inputs) -> dict[str, Any]:
    """One turn of one side: a warm-up, then every time once, in seconds."""
    count, device = case["new_tokens"], model.device
    cache = model.paged_cache if side == "patched" else None
    forget: Callable[[], None] = cache.reset_prefixes if cache else lambda: None

    def timed(given: dict[str, Tensor], tokens: int) -> float:
        began = demo.synchronised_time(device)
        demo.generate(model, given, tokens)
        return demo.synchronised_time(device) - began

    def fresh(given: dict[str, Tensor], tokens: int) -> float:
        forget()
        return timed(given, tokens)

    out = demo.generate(model, batch, count, return_dict_in_generate=True)  # warms up
    if cache:
        stats = cache.stats()
        kv_bytes = stats["peak_used"] * stats["bytes_per_block"]
    else:
        kv_bytes = demo.cache_bytes(out.past_key_values)
    rows = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    del out
    times = {"total": fresh(batch, count), "first": fresh(batch, 1)}
    if case["first"]:
        for length in FIRST:
            given = inputs.single(length)
            demo.generate(model, given, 1)
            times[f"first_{length}"] = fresh(given, 1)
        times["first_again"] = timed(given, 1)  # on the patched side its blocks are found now
    return {"tokens": rows, "kv_bytes": kv_bytes, "times": times}


def measure(
    model: Any, inputs: Inputs, case: dict[str, Any], rounds: int, progress: Callable[[], Any]
) -> dict[str, Any]:
    """All turns of a case. The model is stock before and after."""
    batch = inputs.batch(case["batch"])
    models.patch(model)
    try:
        with trace.AttentionTrace() as calls:
            demo.generate(model, batch, 2)
    finally:
        torch_pagedkv.unpatch(model)
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with prompts.endless(model):
        for _ in range(rounds):
            for side in SIDES:
                if side == "patched":
                    models.patch(model)
                try:
                    turns[side].append(turn(model, side, case, batch, inputs))
                finally:
                    if side == "patched":
                        torch_pagedkv.unpatch(model)
                        gc.collect()
                        if model.device.type == "cuda":
                            torch.cuda.empty_cache()  # stock's cache needs what the pool had
                progress()
    lengths = batch["attention_mask"].sum(1).tolist()
    result = {**case, "prompt_tokens": lengths, "rounds": rounds, "attention": calls.counts}
    for side in SIDES:
        times = {key: [one["times"][key] for one in turns[side]] for key in turns[side][0]["times"]}
        median = {key: statistics.median(values) for key, values in times.items()}
        steps = median["total"] - median["first"]
        result[side] = {
            "kv_bytes": turns[side][0]["kv_bytes"],
            "decode_tokens_per_second": len(lengths) * (case["new_tokens"] - 1) / steps,
            "tokens_per_second": len(lengths) * case["new_tokens"] / median["total"],
            "seconds": median,
            "all_seconds": times,
        }
    ours, theirs = (turns[side][0]["tokens"] for side in reversed(SIDES))
    result["first_difference"] = demo.compare(ours, theirs)
    return result


def cases(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid of a device, or what the options say."""
    is_cpu = device.type == "cpu"
    every = torch.get_num_threads()
    dtypes = args.dtypes or (["fp32", "bf16"] if is_cpu else ["bf16"])
    sizes = args.batches or ([1, 8] if is_cpu else [1, 8, 32])
    threads = args.threads or (sorted({1, every}) if is_cpu else [every])
    return [
        {"dtype": dtype, "threads": count, "batch": size, "new_tokens": args.new_tokens, "first": size == min(sizes)}
        for dtype in dtypes
        for count in threads
        for size in sizes
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every case."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    grid = cases(device, args)
    threads = torch.get_num_threads()
    measured = []
    bar = tqdm(total=2 * args.rounds * len(grid), unit="turn", leave=False, disable=None)
    try:
        for dtype, group in itertools.groupby(grid, key=lambda case: case["dtype"]):
            model, tokenizer = command.load(args, str(device), dtype)
            inputs = Inputs(model, tokenizer, args.prompt_tokens)
            for case in group:
                torch.set_num_threads(case["threads"])
                bar.set_description(f"{dtype}, {case['threads']} threads, batch {case['batch']}")
                measured.append(measure(model, inputs, case, args.rounds, bar.update))
            del model, inputs
            gc.collect()
    finally:
        bar.close()
        torch.set_num_threads(threads)
    name = f"{args.random}, random weights" if args.random else args.model
    return {
        "eval": "speed",
        "model": command.model_name(name),
        "device": str(device),
        "machine": machine.describe(device, args.argv),
        "cases": measured,
        "failures": [line for case in measured for line in failures(case)],
    }


def failures(case: dict[str, Any]) -> list[str]:
    """What must not be: another path than the paged one, other tokens in fp32."""
    wrong = [(row, at) for row, at in enumerate(case["first_difference"]) if at is not None and case["dtype"] == "fp32"]
    lines = [f"{label(case)}: row {row} differs from stock at token {at}" for row, at in wrong]
    return trace.failures(label(case), case["attention"]) + lines


def label(case: dict[str, Any]) -> str:
    """Name a case."""
    return f"{case['dtype']}, batch {case['batch']}, {case['threads']} thread{'s' * (case['threads'] > 1)}"


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The result as two tables: decoding, and time to the first token."""
    on_cpu = result["device"] == "cpu"

    def faster(theirs: float, ours: float) -> str:
        return f"{theirs / ours:.2f}x"

    def name(case: dict[str, Any]) -> str:
        return label(case) if on_cpu else f"{case['dtype']}, batch {case['batch']}"

    decode = [
        [
            "generated tokens/s",
            "stock",
            "patched",
            "",
            "s, all: stock",
            "patched",
            "KV MiB: stock",
            "patched",
            "same tokens",
        ]
    ]
    first = [["first token, ms", "stock", "patched", "", "prefix found", ""]]
    for case in result["cases"]:
        stock, ours = (case[side] for side in SIDES)
        row = [name(case)]
        row += [f"{side['decode_tokens_per_second']:.1f}" for side in (stock, ours)]
        row += [faster(ours["decode_tokens_per_second"], stock["decode_tokens_per_second"])]
        row += [f"{side['seconds']['total']:.2f}" for side in (stock, ours)]
        row += [f"{side['kv_bytes'] / 2**20:.1f}" for side in (stock, ours)]
        equal = sum(at is None for at in case["first_difference"])
        decode.append([*row, f"{equal} of {case['batch']}"])
        if not case["first"]:
            continue
        for length in FIRST:
            a, b = (side["seconds"][f"first_{length}"] for side in (stock, ours))
            cells = [f"{name(case)}, prompt {length}", f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", faster(a, b)]
            again = ours["seconds"]["first_again"]
            cells += [f"{1e3 * again:.1f}", faster(a, again)] if length == FIRST[-1] else ["-", "-"]
            first.append(cells)
    return {"decode": decode, "first-token": first}


def parser() -> argparse.ArgumentParser:
    """Declare the options."""
    top = command.parser("speed", __doc__, random=True, threads=False)
    add = top.add_argument
    add("--dtypes", choices=models.DTYPES, nargs="+", help="default: fp32 and bf16 on cpu, bf16 on cuda")
    add("--batches", type=positive, nargs="+", metavar="N", help="default: 1 and 8 on cpu, 1, 8 and 32 on cuda")
    add("--threads", type=positive, nargs="+", metavar="N", help="CPU threads (default: 1 and all)")
    add("--rounds", type=positive, default=5, metavar="N", help="turns of each side (default: %(default)s)")
    add("--new-tokens", type=at_least_two, default=64, metavar="N", help="default: %(default)s")
    add("--prompt-tokens", type=positive, default=128, metavar="N", help="longest random prompt (default: %(default)s)")
    return top


def at_least_two(text: str) -> int:
    """Parse a number of tokens of which one can be the first and others decoded."""
    value = positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError("at least 2 tokens are needed to time decoding")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if tokens differ in fp32, where they must not."""
    return command.main(parser(), run, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
