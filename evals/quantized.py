"""What quantised weights cost: perplexity of a model as it is, and with weights of 4 and of 8 bits, rounded to nearest
or calibrated.

    python -m torch_pagedkv.evals.quantized --model ... --text FILE --calibration FILE [FILE ...] [--json FILE]

Each method quantises the float model anew, on the same calibration data, and the result runs on the kernels for it.
Given are the perplexity of the text, its change with the standard error of the paired difference (token by token: far
below the perplexity's own), the share of the loss of rounding to nearest that 4-bit methods make up for,

    gap closed    (RTN - method) / (RTN - float)

and the seconds that quantising took. "int8" and "fp8" round activations, too, and need no data; "+" behind them stands
for the same with calibration data. The text is cut in windows; each begins with the tokenizer's <bos>, if it has one,
and every token of the text is predicted once. With ``--separator`` files are sets of documents; evaluation and
calibration may be of one file then: its first documents are the text, the others the calibration data.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import torch_pagedkv
from torch_pagedkv.cli import positive
from torch_pagedkv.quant import calibrated, calibration
from torch_pagedkv.quant.eight import EightLinear
from torch_pagedkv.quant.fixed import fixed_layers
from torch_pagedkv.quant.packed import Int8Linear

from . import command, machine, models, quantized_peers, render

METHODS = ("int4", *calibrated.METHODS, "int8", "int8+", "fp8", "fp8+")
TITLES = {
    "float": "float",
    "int4": "RTN",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "awq+gptq": "AWQ+GPTQ",
    "int8": "int8, W8A8",
    "int8+": "int8, W8A8, calibrated",
    "fp8": "fp8, W8A8",
    "fp8+": "fp8, W8A8, calibrated",
}


def documents(file: Path, separator: str | None) -> list[str]:
    """The texts of a file.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise models.UserError(f"cannot read {file} as UTF-8: {error}") from error
    parts = [part.strip() for part in text.split(separator)] if separator else [text]
    parts = [part for part in parts if part.strip()]
    if not parts:
        raise models.UserError(f"{file} is empty")
    return parts


def data(args: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, list[str]]:
    """The ids of the text, [tokens], and what to calibrate with: no document is in both."""
    texts = documents(args.text, args.separator)
    same = any(file.resolve() == args.text.resolve() for file in args.calibration)
    if same and len(texts) < 2:
        raise models.UserError("--calibration: the file is the text that is evaluated; give --separator to divide it")
    ids: list[int] = []
    used = 0
    while used < len(texts) and len(ids) < args.skip_tokens + args.tokens:
        ids += tokenizer(texts[used]).input_ids
        used += 1
    ids = ids[args.skip_tokens : args.skip_tokens + args.tokens]
    other = [file for file in args.calibration if file.resolve() != args.text.resolve()]
    theirs = [part for file in other for part in documents(file, args.separator)]
    theirs += texts[used + args.reserve :] if same else []
    kept = set(texts[: used + args.reserve])
    if not ids or not theirs:
        raise models.UserError(f"--tokens: {args.text.name} is too short for this many, or nothing is left of it")
    return torch.tensor(ids), [text for text in theirs if text not in kept]


@torch.no_grad()
def losses(model: Any, ids: Tensor, window: int, begin: list[int]) -> Tensor:
    """The negative log-likelihood of each token of a text [tokens] in float64, but for those without a token in front
    of them: in windows of `window` tokens, `begin` in front of each."""
    found = []
    for piece in tqdm(ids.split(window), desc="perplexity", leave=False, disable=None):
        given = torch.cat([torch.tensor(begin, dtype=torch.int64), piece])[:-1].to(model.device)
        logits = model(input_ids=given[None], use_cache=False).logits[0]
        wanted = piece.to(model.device)[-len(given) :]
        # a part at a time: float32 logits of a large vocabulary are large
        for some, right in zip(logits[-len(wanted) :].split(256), wanted.split(256)):
            found.append(torch.nn.functional.cross_entropy(some.float(), right, reduction="none").double().cpu())
    return torch.cat(found)


def compared(found: Tensor, base: Tensor) -> dict[str, float]:
    """The perplexity of losses, and how it differs from that of others of the same tokens: a share, and its standard
    error."""
    difference = found - base
    change = math.exp(float(difference.mean()))
    stderr = change * float(difference.std()) / math.sqrt(len(difference))
    return {"perplexity": math.exp(float(found.mean())), "change": change - 1, "stderr": stderr}


def spared(model: Any) -> float | None:
    """The share of weights whose layers do not round activations, where others do (`eight.spared`)."""
    sizes = dict.fromkeys((Int8Linear, EightLinear), 0)
    for _, layer in fixed_layers(model):
        for kind in sizes:
            sizes[kind] += layer.in_features * layer.out_features * isinstance(layer, kind)
    return sizes[Int8Linear] / sum(sizes.values()) if sizes[EightLinear] else None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every method."""
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = quantized_peers.version() if args.peers else None
    model, tokenizer = models.load(args.model, args.device, args.dtype)
    ids, texts = data(args, tokenizer)
    begin = calibration.first_tokens(tokenizer)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(args.length, longest or args.length)
    given = calibration.tokens(
        texts, tokenizer, vocabulary=len(tokenizer), samples=args.samples, length=length, longest=longest
    )
    rows: list[dict[str, Any]] = []
    base: list[Tensor] = []

    def measured(method: str, quantised: Any, seconds: float | None) -> None:
        found = losses(quantised, ids, args.window, begin)
        base.append(found)  # the first one counts
        rows.append({"method": method, **compared(found, base[0]), "seconds": seconds, "spared": spared(quantised)})
        row = rows[-1]
        change = f"{100 * row['change']:+.2f} % ± {100 * row['stderr']:.2f}"
        tqdm.write(f"{TITLES.get(method, method)}: {row['perplexity']:.3f}, {change}", file=sys.stderr)

    measured("float", model, None)
    for method in args.methods:
        twin = copy.deepcopy(model)
        began = time.perf_counter()
        needs = method in calibrated.METHODS or method.endswith("8+")
        settings: dict[str, Any] = {"calibration": given, "samples": len(given)} if needs else {}
        if method in calibrated.METHODS:
            settings |= {"order": args.order, "damping": args.damping, "correction": args.correction}
        try:
            torch_pagedkv.quantize(twin, method.replace("8+", "8"), group_size=args.group_size, **settings)
        except (TypeError, ValueError) as error:
            raise models.UserError(str(error)) from error
        seconds = time.perf_counter() - began
        measured(method, twin, round(seconds, 1))
        del twin
    for title, peer in quantized_peers.METHODS.items() if args.peers else ():
        twin = copy.deepcopy(model)
        began = time.perf_counter()
        try:
            quantized_peers.quantize(twin, peer, given, args.group_size)
        except Exception as error:  # theirs, whatever it is
            tqdm.write(f"{title}: failed: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        measured(title, twin, round(time.perf_counter() - began, 1))
        del twin
    by_method = {row["method"]: row["perplexity"] for row in rows}
    gap = by_method.get("int4", math.nan) - by_method["float"]
    for row in rows:
        four = row["method"] not in ("float", "int4") and "8" not in row["method"]
        closed = (by_method["int4"] - row["perplexity"]) / gap if "int4" in by_method and gap > 0 else None
        row["gap_closed"] = closed if four else None
    return {
        "eval": "quantized",
        "model": command.model_name(args.model),
        "dtype": next(name for name, dtype in models.DTYPES.items() if dtype == model.dtype),
        "group_size": args.group_size,
        "window": args.window,
        "tokens": len(ids),
        "text": args.text.name,
        "calibration": {"files": [file.name for file in args.calibration], "sequences": list(given.shape)},
        "options": {"order": args.order, "damping": args.damping, "correction": args.correction},
        "peers": {"llm-compressor": peers} if args.peers else {},
        "machine": machine.describe(model.device, args.argv),
        "methods": rows,
        "failures": [],
    }


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The result as one table."""
    name = f"{result['model']}, {result['dtype']}"
    rows = [["weights", "perplexity", "change", "gap closed", "quantised in, s"]]
    for row in result["methods"]:
        closed = "-" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f}%"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        title = TITLES.get(row["method"], row["method"])
        if row["method"] != "float" and "8" not in row["method"]:
            title += f", groups of {result['group_size']}"
        if row.get("spared"):
            title += f" ({100 * row['spared']:.0f}% weights only)"
        change = "-"
        if "change" in row and row["method"] != "float":
            change = f"{100 * row['change']:+.2f}% ± {100 * row['stderr']:.2f}%"
        rows.append([f"{name}: {title}", f"{row['perplexity']:.2f}", change, closed, seconds])
    return {"quantized": rows}


def parser() -> argparse.ArgumentParser:
    """Declare the options."""
    top = command.parser("quantized", __doc__)
    add: Callable[..., Any] = top.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="to evaluate")
    add("--calibration", type=Path, required=True, nargs="+", metavar="FILE", help="to calibrate with")
    add("--separator", metavar="TEXT", help="between the documents of all these files")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--peers", action="store_true", help="llm-compressor too (evals/quantized_peers.py says how)")
    add("--group-size", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--window", type=positive, default=2048, metavar="N", help="tokens of a window (default: %(default)s)")
    add("--tokens", type=positive, default=8192, metavar="N", help="of the text (default: %(default)s)")
    add("--skip-tokens", type=int, default=0, metavar="N", help="of the text, at its beginning")
    add("--reserve", type=int, default=0, metavar="N", help="documents behind the text that nobody sees, for tuning")
    add("--samples", type=positive, default=calibration.SAMPLES, metavar="N", help="default: %(default)s")
    add("--length", type=positive, default=calibration.LENGTH, metavar="N", help="default: %(default)s")
    add("--order", choices=("static", "dynamic", "none"), default="static", help="of GPTQ (default: %(default)s)")
    add("--damping", type=float, default=0.01, metavar="X", help="of GPTQ (default: %(default)s)")
    add("--correction", type=float, default=0.5, metavar="X", help="0 .. 1 (default: %(default)s)")
    add("--dtype", choices=models.DTYPES, help="default: fp32 on cpu, bf16 on cuda")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return command.main(parser(), run, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
