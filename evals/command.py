"""What the command lines of all measurements do alike: from the arguments to the result shown, written and judged.

A result is a dictionary of JSON types, with what `machine.describe` gives under ``machine``. Exit status: 0; 1 if
something measured is not as it must be; 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch_pagedkv.cli import positive

from . import machine, models, render


def main(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    tables: Callable[[dict[str, Any]], dict[str, render.Rows]],
    argv: Sequence[str] | None = None,
) -> int:
    """A whole command with the option ``--json FILE``.

    Args:
        parser: its ``prog`` is how the command is called.
        run: measures; the result's ``failures`` are lines for stderr, and with any of them the exit status is 1.
        tables: of the result, by section; all are printed.
        argv: arguments (default: this process's).
    """
    args = parse(parser, argv)
    try:
        result = run(args)
    except models.UserError as problem:
        return refuse(problem)
    show(result, tables(result).values())
    if args.json:
        write(args.json, result)
    for line in result["failures"]:
        print(f"FAILED: {line}", file=sys.stderr)
    return int(bool(result["failures"]))


def parser(name: str, doc: str | None, *, random: bool = False, threads: bool = True) -> argparse.ArgumentParser:
    """What all that measure a model take: --model, --device, --json, with `threads` --threads N, and with `random`
    --random SHAPE in place of --model.

    Args:
        name: of the module in `evals`; doc: its docstring.
    """
    top = argparse.ArgumentParser(
        prog=f"python -m torch_pagedkv.evals.{name}", description=(doc or "").partition("\n")[0]
    )
    which = top.add_mutually_exclusive_group()
    which.add_argument("--model", default="SmolLM2-135M-Instruct", help="name, folder or hub id (default: %(default)s)")
    if random:
        help = "a model of this shape with random weights, made on the device"
        which.add_argument("--random", choices=models.RANDOM, help=help)
    top.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    if threads:
        top.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    top.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there too")
    top.set_defaults(argv=None)
    return top


def load(args: argparse.Namespace, device: str, dtype: str) -> tuple[Any, Any]:
    """The model that the arguments name and its tokenizer: None for one of random weights. Raises as `models.load`."""
    if args.random:
        return models.random_model(args.random, device, models.DTYPES[dtype]), None
    return models.load(args.model, device, dtype)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, and as ``argv`` the command line for `machine.describe`: None if it is this process's."""
    args = parser.parse_args(argv)
    args.argv = None if argv is None else [*shlex.split(parser.prog), *argv]
    return args


def refuse(problem: object) -> int:
    """Says why nothing is measured; the exit status."""
    print(f"error: {problem}", file=sys.stderr)
    return 2


def show(result: dict[str, Any], tables: Iterable[render.Rows]) -> None:
    """Prints what was measured, on what machine, and tables of it."""
    print(f"{result['model']}; {machine.summary(result['machine'])}")
    for rows in tables:
        print(f"\n{render.text(rows)}")


def write(file: Path, result: dict[str, Any]) -> None:
    """Writes a result, and makes the folder for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def model_name(model: str) -> str:
    """A model's name for a result: of a folder the last part, as the others say nothing elsewhere."""
    return Path(model).name if Path(model).is_dir() else model


def require(*packages: str) -> None:
    """Raises UserError if one is not installed."""
    missing = [name for name in packages if models.is_missing(name)]
    if missing:
        raise models.UserError(f"{', '.join(missing)} not installed: pip install 'torch-pagedkv[eval]'")
