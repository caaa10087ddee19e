"""Tables of measurements: as text for the terminal, and in README.md from the committed results.

    python -m torch_pagedkv.evals.render [--check]

In the document, what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is written anew from
``evals/results/NAME.json``; ``NAME/SECTION`` takes one section of it, and a ``*`` in NAME joins the rows of several
results of one kind. A result names the module that made it
(``"eval": "speed"``), and that module's ``tables(result)`` gives the sections, a header and rows of strings each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine

ROOT = Path(__file__).resolve().parent.parent

#: the header, then the rows; all of one length
Rows = Sequence[Sequence[str]]

MARK = re.compile(r"<!-- *(?:table: *(?P<name>[\w./*-]+)|(?P<end>end)) *-->")


class RenderError(ValueError):
    """A document that cannot be rendered: the message names the line or the result."""


def text(rows: Rows, *, numbers: bool = True) -> str:
    """Rows aligned for the terminal: the first column to the left, the others, if they are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.rjust(width) if i and numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Rows, *, numbers: bool = True) -> str:
    """Rows as a markdown table, aligned like `text`."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *["---:" if numbers else "---"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])


def tables(result: dict[str, Any]) -> dict[str, Rows]:
    """The sections of a result, made by the module that measured it."""
    module = importlib.import_module(f".{result['eval']}", __package__)
    return module.tables(result)


def block(name: str, results: Path) -> str:
    """The markdown of one marker's table: the sections asked for, what was measured, where and how."""
    stem, _, section = name.partition("/")
    files = sorted(results.glob(f"{stem}.json"))
    if not files:
        raise RenderError(f"table {name}: there is no {stem}.json in {results}")
    chosen: list[list[Sequence[str]]] = []
    captions = []
    for file in files:
        result = json.loads(file.read_text())
        sections = tables(result)
        if section and section not in sections:
            raise RenderError(f"table {name}: {file.name} has no section {section!r}, but {', '.join(sections)}")
        mine = [sections[section]] if section else list(sections.values())
        if chosen and [rows[0] for rows in chosen] != [rows[0] for rows in mine]:
            raise RenderError(f"table {name}: {file.name} has other columns than {files[0].name}")
        chosen = [[*rows, *more[1:]] for rows, more in zip(chosen, mine)] if chosen else [list(rows) for rows in mine]
        captions.append(f"{result['model']}; {machine.summary(result['machine'])}: `{result['machine']['command']}`")
    return "\n\n".join([*map(markdown, chosen), *captions])


def render(document: str, results: Path) -> str:
    """The document with the text between all pairs of markers written anew.

    Raises:
        RenderError: a marker without its partner, or a table whose result is missing.
    """
    out, opened, begin = [], None, 0
    for mark in MARK.finditer(document):
        line = document.count("\n", 0, mark.start()) + 1
        if mark["name"]:
            if opened:
                raise RenderError(f"line {line}: table {mark['name']} begins inside table {opened}")
            opened = mark["name"]
            out += [document[begin : mark.end()], f"\n{block(opened, results)}\n"]
        else:
            if not opened:
                raise RenderError(f"line {line}: an end without a table")
            opened, begin = None, mark.start()
    if opened:
        raise RenderError(f"table {opened} has no end")
    return "".join([*out, document[begin:]])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 if ``--check`` finds tables that do not show the results, 2 if it cannot tell."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_pagedkv.evals.render", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="default: README.md")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "evals" / "results", metavar="DIR", help="default: evals/results"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if something would change")
    args = parser.parse_args(argv)
    try:
        old = args.readme.read_text()
        new = render(old, args.results)
    except (OSError, RenderError) as error:
        print(f"{args.readme.name}: {error}", file=sys.stderr)
        return 2
    if args.check:
        if new != old:
            print(
                f"{args.readme.name}: its tables are not those of {args.results.name}/; run without --check",
                file=sys.stderr,
            )
        return int(new != old)
    if new != old:
        args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
