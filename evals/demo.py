"""Stock and patched ``generate()`` side by side on one loaded model: same tokens, speed, memory, prefix reuse.

``make demo`` and ``torch-pagedkv demo`` run this. All times are medians of warm runs; each starts with an empty prefix
cache, except where the reuse of a prefix is what is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import torch_pagedkv
from torch_pagedkv.cli import positive

from . import machine, models

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse keeper who collects letters that never arrived.",
    "List three uses of a paperclip.",
    "I have 3 apples, buy 5 more, give half of them to my sister and eat one. How many apples do I have left? "
    "Think step by step.",
    "Translate to French: Where is the train station?",
)

PREFIX = (
    "You are the assistant of a public library and answer the questions of its visitors. Be friendly, brief and "
    "exact; prefer plain words to technical ones. The library opens at nine in the morning and closes at eight in "
    "the evening, on Sundays at five. Books may be borrowed for four weeks, films and music for one week, and "
    "magazines are only read in the hall. A loan can be extended twice unless somebody else has reserved the item. "
    "Late returns cost ten cents a day, children and students pay half, and nobody pays more than five euros. The "
    "reading room on the second floor is silent; groups can reserve one of six rooms on the first floor. Computers "
    "are beside the entrance and may be used for two hours a day. Printing costs five cents a page in black and "
    "twenty cents in colour; scanning is free. Every Wednesday afternoon there is a story hour for children between"
    " four and seven years. If a book is missing, note its title and author and promise an answer within three "
    "days. Never give out the address, the loans or the reading habits of another visitor. When a question is not "
    "about the library, answer it as well as you can. When somebody asks for a recommendation, name one old book "
    "and one new book, and say why in one sentence. Do not invent opening hours, prices or titles; say that you do "
    "not know and where one can ask. Answer in the language of the question."
)


class Watch:
    """A stopping criterion that never stops: it notes when the first token was there, and how full the cache gets."""

    def __init__(self, device: torch.device, stats: Callable[[], dict[str, Any]] | None = None) -> None:
        self.device, self.stats = device, stats
        self.began = synchronised_time(device)
        self.first = 0.0
        self.blocks = self.bytes = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.first:
            self.first = synchronised_time(self.device) - self.began
        if self.stats:
            now = self.stats()
            self.blocks, self.bytes = max(self.blocks, now["used"]), max(self.bytes, now["bytes_used"])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def synchronised_time(device: torch.device) -> float:
    """The clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def generate(model: Any, batch: Any, new_tokens: int, **options: Any) -> Any:
    """Greedy generation, called as any user calls it."""
    return model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)


def answers(model: Any, batch: Any, sequences: torch.Tensor) -> list[list[int]]:
    """The new tokens of each row, up to and including the end-of-sequence token."""
    rows = sequences[:, batch["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a stock cache."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)


def measure(
    model: Any, batch: Any, args: argparse.Namespace, before: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Tokens, speed, first-token time and KV memory of a batch, ``before`` run untimed ahead of each run.

    The first run warms up and gives the tokens and the memory; the times are medians of the others.
    """
    cache = getattr(model, "paged_cache", None)
    totals, firsts = [], []
    for repeat in range(args.repeats + 1):
        if before:
            before()
        watch = Watch(model.device, cache.stats if cache and not repeat else None)
        options = {"return_dict_in_generate": True} if cache is None and not repeat else {}
        out = generate(model, batch, args.max_new_tokens, stopping_criteria=[watch], **options)
        totals.append(synchronised_time(model.device) - watch.began)
        firsts.append(watch.first)
        if repeat:
            continue
        if cache is None:
            memory = {"kv_bytes": cache_bytes(out.past_key_values)}
        else:
            memory = {"kv_bytes": watch.bytes, "blocks": watch.blocks}
        rows = answers(model, batch, out if cache else out.sequences)
    total = statistics.median(totals[1:])
    return {
        "tokens": rows,
        "seconds": total,
        "tokens_per_second": sum(map(len, rows)) / total,
        "first_token_seconds": statistics.median(firsts[1:]),
        **memory,
    }


def stock(model: Any, batch: Any, shared: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements of the model as it is."""
    return {"plain": measure(model, batch, args), "prefix": measure(model, shared, args)}


def patched(model: Any, batch: Any, shared: Any, opener: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The same measurements on the paged cache. ``opener`` is another question behind the shared prefix."""
    cache = model.paged_cache

    def open_with_prefix() -> None:
        cache.reset_prefixes()
        generate(model, opener, 1)

    plain = measure(model, batch, args, cache.reset_prefixes)
    prefix = measure(model, shared, args, open_with_prefix)
    open_with_prefix()
    before = cache.stats()
    generate(model, shared, 1)
    after = cache.stats()
    prefix["reused_tokens"] = after["hit_tokens"] - before["hit_tokens"]
    prefix["reused_blocks"] = prefix["reused_tokens"] // after["block_size"]
    return {"plain": plain, "prefix": prefix, "stats": after}


def compare(ours: list[list[int]], theirs: list[list[int]]) -> list[int | None]:
    """Per row the position of the first token that differs, or None."""
    return [
        None if a == b else next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        for a, b in zip(ours, theirs)
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the demonstration and return everything measured."""
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts: tuple[str, ...] = PROMPTS
    if args.prompts:
        prompts = tuple(line for line in Path(args.prompts).read_text().splitlines() if line.strip())
        if not prompts:
            raise models.UserError(f"{args.prompts} has no prompts: one a line is expected")
    model, tokenizer = models.load(args.model, args.device, args.dtype)
    batch = models.encode(tokenizer, prompts, model.device)
    shared = models.encode(tokenizer, prompts, model.device, PREFIX)
    opener = models.encode(tokenizer, ["When do you open?"], model.device, PREFIX)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = shared["input_ids"].shape[1] + args.max_new_tokens
    if limit and longest > limit:
        raise models.UserError(f"{args.model} has {limit} positions and the demo needs {longest}: take another model")
    note("stock generate()")
    before = stock(model, batch, shared, args)
    note("patched generate()")
    models.patch(model)
    try:
        after = patched(model, batch, shared, opener, args)
    finally:
        torch_pagedkv.unpatch(model)
    lengths = batch["attention_mask"].sum(1).tolist()
    prefixed = [
        *zip(shared["input_ids"], shared["attention_mask"]),
        (opener["input_ids"][0], opener["attention_mask"][0]),
    ]
    rows = [ids[mask.bool()].tolist() for ids, mask in prefixed]
    common = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows))
    return {
        "model": args.model,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine.describe(model.device, ["torch-pagedkv", "demo", *args.argv]),
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "prompts": list(prompts),
        "prompt_tokens": lengths,
        "prefix_tokens": len(list(common)),
        "answers": [tokenizer.decode(row, skip_special_tokens=True) for row in after["plain"]["tokens"]],
        "first_difference": {key: compare(after[key]["tokens"], before[key]["tokens"]) for key in ("plain", "prefix")},
        "stock": before,
        "patched": after,
    }


def note(text: str) -> None:
    """Tell on stderr what runs now."""
    print(f"torch_pagedkv: measuring {text} ...", file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    before, after = result["stock"], result["patched"]
    lengths = result["prompt_tokens"]
    lines = [""]
    for prompt, answer in zip(result["prompts"], result["answers"]):
        lines += [f"> {shorten(prompt)}", f"  {shorten(answer)}"]
    lines += [
        "",
        f"{result['model']}, {result['dtype']}, threads: {result['machine']['threads']}",
        machine.summary(result["machine"]),
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens in one batch, "
        f"{result['max_new_tokens']} new tokens each, greedy",
        "",
    ]

    def row(what: str, *cells: str) -> str:
        a, b, rest = (*cells, "")[:3]
        return f"  {what:<30}{a:>12}{b:>12}  {rest}".rstrip()

    def equal(key: str) -> str:
        different = [i for i in result["first_difference"][key] if i is not None]
        return f"{len(lengths) - len(different)} of {len(lengths)}"

    def speed(key: str) -> list[str]:
        a, b = before[key], after[key]
        faster = b["tokens_per_second"] / a["tokens_per_second"]
        sooner = a["first_token_seconds"] / b["first_token_seconds"]
        rates = [f"{x['tokens_per_second']:.1f}" for x in (a, b)]
        firsts = [f"{1e3 * x['first_token_seconds']:.1f}" for x in (a, b)]
        return [
            row("same tokens as stock", "", equal(key)),
            row("generated tokens/s", *rates, f"{faster:.2f}x"),
            row("first token, ms", *firsts, f"{sooner:.2f}x"),
        ]

    a, b, prefix = before["plain"], after["plain"], after["prefix"]
    lines += [row("", "stock", "patched"), *speed("plain")]
    lines += [row("KV cache, MiB", *(f"{x['kv_bytes'] / 2**20:.2f}" for x in (a, b)), f"{b['blocks']} blocks")]
    lines += ["", f"behind a shared system prompt of {result['prefix_tokens']} tokens, seen once before:", ""]
    lines += [row("", "stock", "patched"), *speed("prefix")]
    blocks, tokens = prefix["reused_blocks"], prefix["reused_tokens"]
    lines += [row("blocks reused", "0", str(blocks), f"{tokens} tokens not computed again")]
    return "\n".join(lines)


def shorten(text: str, width: int = 110) -> str:
    """A text on one line, cut to a width."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model", default="SmolLM2-135M-Instruct", help="name, folder or hub id (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=models.DTYPES, help="default: fp32 on cpu, bf16 on cuda")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--prompts", metavar="FILE", help="prompts, one a line, in place of the built-in ones")
    parser.add_argument("--json", metavar="FILE", help="write everything measured there too")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if tokens differ in fp32, where they must not."""
    parser = argparse.ArgumentParser(prog="torch-pagedkv demo", description=(__doc__ or "").splitlines()[0])
    arguments(parser)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    result = run(args)
    print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    different = any(i is not None for rows in result["first_difference"].values() for i in rows)
    if different and result["dtype"] == "float32":
        print("\nThe tokens differ in fp32: please report this with the --json file.", file=sys.stderr)
        return 1
    return 0
