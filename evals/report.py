"""A page and a picture of what `evals.harness` measured: accuracy against memory and speed, with error bars.

    torch-pagedkv report results.json [--out results.html]

The page is one file: its picture and its style are inside. The picture is also written beside it as PNG.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import command, comparison, machine, metrics, models

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #dde3e9; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
tr.first td { border-top: 2px solid #aab4bf; }
.scroll { overflow-x: auto; }
.machine { color: #5b6875; }
img { max-width: 100%; }
code { font-size: .9em; }
"""

NOTES = """The stock model is measured by lm-eval's own model for transformers. ± is a standard error: of a value over
its samples, of a difference over the pairs of the same samples, which is the smaller one. p is of an exact sign test
(McNemar's) where a sample is right or wrong, of a t-test otherwise; "same" means that no sample differs. Differences
of perplexities are in per cent. Tokens/s counts the tokens that stock lm-eval would feed, or those generated; KV MiB
is the most that keys and values took at once."""


def read(file: Path) -> dict[str, Any]:
    """A result of `evals.harness`.

    Raises:
        UserError: there is none in the file.
    """
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise models.UserError(f"{file}: {error}") from error
    if not isinstance(result, dict) or result.get("eval") != "harness" or not result.get("runs"):
        raise models.UserError(f"{file}: not a result of `torch-pagedkv eval`")
    return result


def points(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is drawn: for each task its main metric's rows, one a variant."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in comparison.rows(result):
        if row["metric"] == comparison.primary(result, row["task"]):
            chosen.setdefault(f"{row['task']}, {row['metric']}", []).append(row)
    return chosen


def picture(result: dict[str, Any]) -> bytes:
    """A PNG: a row for each task; its main metric over memory and over speed, and differences to the baseline.

    Raises:
        UserError: matplotlib is not installed.
    """
    command.require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = points(result)
    figure = Figure(figsize=(15, 3.6 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 3, squeeze=False)
    colours = [f"C{i}" for i in range(10)]
    order = {one["name"]: i for i, one in enumerate(result["variants"])}
    handles: dict[str, Any] = {}
    for (title, rows), (by_memory, by_speed, differences) in zip(tasks.items(), axes):
        for row in rows:
            entry, run = row["entry"], row["run"]
            style: dict[str, Any] = {"fmt": "o", "capsize": 3, "color": colours[order[row["variant"]] % len(colours)]}
            for axis, x in ((by_memory, run["kv_bytes"] / 2**20), (by_speed, run["tokens_per_second"])):
                if x:
                    bar = axis.errorbar([x], [entry["value"]], yerr=[entry["stderr"] or 0.0], **style)
                    handles.setdefault(row["variant"], bar)
        by_memory.set(title=title, xlabel="KV cache at its fullest, MiB", ylabel=direction(rows[0]["entry"]))
        by_speed.set(title=title, xlabel="tokens/s")
        for axis in (by_memory, by_speed):
            axis.set_xlim(left=0.0, right=1.1 * axis.dataLim.x1)
            axis.grid(alpha=0.3)
        draw_differences(differences, rows, result["baseline"], colours, order)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles) or 1)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def direction(entry: dict[str, Any]) -> str:
    """The axis label of a metric."""
    better = {True: "higher is better", False: "lower is better"}.get(entry["higher_is_better"])
    return f"value ± standard error{f' ({better})' if better else ''}"


def draw_differences(
    axis: Any, rows: Sequence[dict[str, Any]], baseline: str, colours: Sequence[str], order: dict[str, int]
) -> None:
    """Differences to the baseline with the standard errors of pairs, a line each."""
    drawn = [(row, found) for row in rows if (found := comparison.difference(row)) is not None]
    scale = 100.0 if rows and metrics.is_perplexity(rows[0]["entry"]) else 1.0
    for i, (row, (value, error)) in enumerate(drawn):
        colour = colours[order[row["variant"]] % len(colours)]
        bar = None if error is None else [scale * error]
        axis.errorbar([scale * value], [i], xerr=bar, fmt="o", capsize=3, color=colour)
    axis.axvline(0.0, color="0.6", linewidth=1)
    axis.set_yticks(range(len(drawn)), [row["variant"] for row, _ in drawn])
    axis.set(title=f"difference to {baseline}", xlabel="per cent ± paired error" if scale != 1 else "± paired error")
    axis.set_ylim(max(len(drawn), 1) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=6)
    axis.grid(alpha=0.3, axis="x")


def page(result: dict[str, Any], png: bytes) -> str:
    """The page as HTML."""
    tables = comparison.tables(result)
    options = {name: value for name, value in result["options"].items() if value not in (None, False)}
    runs = {run["task"]: run for run in result["runs"]}
    sources = [
        f"{task}: {run['source']}" + (f", limit {run['limit']:g}" if run["limit"] else "") for task, run in runs.items()
    ]
    variants = [
        f"{one['name']}: {one['dtype']}, {'stock' if one['options'] is None else one['options'] or 'patched'}"
        for one in result["variants"]
    ]
    parts = [
        f"<h1>{escape(result['model'])}: lm-eval</h1>",
        f'<p class="machine">{escape(machine.summary(result["machine"]))}<br>'
        f"<code>{escape(result['machine']['command'])}</code></p>",
        "<h2>Main metrics</h2>",
        table(tables["summary"]),
        "<h2>Accuracy against memory and speed</h2>",
        f'<img alt="accuracy against memory and speed" src="data:image/png;base64,{base64.b64encode(png).decode()}">',
        "<h2>Variants against tasks</h2>",
        table(tables["differences"]),
        "<h2>All metrics</h2>",
        table(tables["all"]),
        f"<p>{escape(NOTES)}</p>",
        "<h2>What was run</h2>",
        "<ul>" + "".join(f"<li>{escape(str(line))}</li>" for line in [*variants, *sources]) + "</ul>",
        f"<p>Options: {escape(', '.join(f'{name} {value}' for name, value in options.items()) or 'none')}. "
        f"Differences are to {escape(result['baseline'])}.</p>",
    ]
    head = f"<title>{escape(result['model'])}: lm-eval</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{head}</head>\n<body>\n{body}\n</body></html>\n'
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as an HTML table; a line above each new first cell."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body, before = [], None
    for row in rows[1:]:
        mark = ' class="first"' if row[0] != before else ""
        before = row[0]
        body.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table><tr>{header}</tr>\n' + "\n".join(body) + "\n</table></div>"


def escape(text: str) -> str:
    """Text for HTML."""
    return html.escape(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="torch-pagedkv report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="what `torch-pagedkv eval --out` wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: beside the result, as .html)")
    args = parser.parse_args(argv)
    out = args.out or args.result.with_suffix(".html")
    if out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out: got {out.name}, needs a name that ends in .html; the picture lies beside it as .png")
    try:
        result = read(args.result)
        png = picture(result)
    except models.UserError as problem:
        return command.refuse(problem)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".png").write_bytes(png)
    out.write_text(page(result, png))
    print(f"{out}\n{out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
