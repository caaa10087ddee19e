"""The command ``torch-pagedkv quantize``: a float model to a 4-bit checkpoint that other tools read, too."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import torch_pagedkv
from torch_pagedkv.cli import positive

from ..evals import models
from . import calibrated, calibration, gptq
from .loading import int4_layers

#: results of finished blocks, inside of the folder that is written
_KEPT = ".unfinished"


def load(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """A model in the dtype it is stored in (or another), and its tokenizer.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = models.fetch(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=models.DTYPES[dtype] if dtype else "auto")
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        raise models.UserError(f"cannot load {name}: {str(error).strip().splitlines()[0]}") from error


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Quantise and save.

    Raises:
        UserError: something does not fit; nothing was written, but for the results of finished blocks.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    out, kept = args.out, args.out / _KEPT
    if out.exists() and (not out.is_dir() or any(file.name != _KEPT for file in out.iterdir())):
        raise models.UserError(f"--out: {out} is there and is not an empty folder")
    model, tokenizer = load(args.model, args.device, args.dtype)
    before, began = model.get_memory_footprint(), time.perf_counter()
    options: dict[str, Any] = {"group_size": args.group_size, "quantize_head": args.quantize_head}
    if args.method != "rtn":
        options |= {
            "calibration": args.calibration,
            "tokenizer": tokenizer,
            "samples": args.samples,
            "length": args.length,
            "order": args.order,
            "damping": args.damping,
            "correction": args.correction,
            "folder": kept,
            "offload": args.offload,
        }
    elif args.calibration is not None:
        raise models.UserError("--calibration: rtn takes none")
    try:
        torch_pagedkv.quantize(model, "int4" if args.method == "rtn" else args.method, **options)
    except (TypeError, ValueError) as error:
        raise models.UserError(str(error)) from error
    seconds = time.perf_counter() - began
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(kept, ignore_errors=True)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    return {
        "model": args.model,
        "out": str(out),
        "method": args.method,
        "format": settings["quant_method"],
        "group_size": settings["group_size"],
        "act_order": bool(settings.get("desc_act")),
        "layers": sum(1 for _ in int4_layers(model)),
        "bytes_before": before,
        "bytes": model.get_memory_footprint(),
        "seconds": round(seconds, 1),
    }


def parser() -> argparse.ArgumentParser:
    """Declare the options."""
    top = argparse.ArgumentParser(
        prog="torch-pagedkv quantize",
        description="Quantise a model's linear layers to 4 bits and save it as an AWQ or GPTQ checkpoint. Interrupted, "
        "the same command goes on.",
    )
    add: Callable[..., Any] = top.add_argument
    add("--model", required=True, help="name, folder or hub id")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the checkpoint")
    add("--method", choices=("rtn", *calibrated.METHODS), default="awq+gptq", help="default: %(default)s")
    add("--calibration", type=Path, metavar="FILE", help="text, or .jsonl with 'text' (default: Wikipedia passages)")
    add("--group-size", type=int, default=128, metavar="N", help="-1: all inputs (default: %(default)s)")
    add("--quantize-head", action="store_true", help="the language head too")
    add("--samples", type=positive, default=calibration.SAMPLES, metavar="N", help="default: %(default)s")
    add("--length", type=positive, default=calibration.LENGTH, metavar="N", help="tokens (default: %(default)s)")
    add("--order", choices=gptq.ORDERS, default="static", help="of inputs in GPTQ (default: %(default)s)")
    add("--damping", type=float, default=0.01, metavar="X", help="of GPTQ (default: %(default)s)")
    add("--correction", type=float, default=0.5, metavar="X", help="of earlier layers' errors (default: %(default)s)")
    add("--offload", metavar="WHERE", help="hidden states to cpu, or to a folder on disk")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add("--dtype", choices=models.DTYPES, help="default: that of the files")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("--json", action="store_true", help="print JSON")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 with one line on stderr for what the user can mend."""
    args = parser().parse_args(argv)
    try:
        result = run(args)
    except models.UserError as problem:
        print(f"torch-pagedkv quantize: error: {problem}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        size = f"{result['bytes_before'] / 2**20:.0f} -> {result['bytes'] / 2**20:.0f} MiB"
        print(
            f"{result['out']}: {result['format'].upper()} checkpoint, {result['layers']} layers in 4 bits, groups of "
            f"{result['group_size']}, {size}, {result['seconds']:.0f} s"
        )
    return 0
