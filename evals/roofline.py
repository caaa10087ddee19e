"""Rooflines of what `evals.kernels` measured: how near each op is to what the machine can do.

    python -m torch_pagedkv.evals.roofline evals/results/kernels-h200.json [--out FILE.html]

Two panels. Left, for ops that calculate: floating-point operations per byte that must be moved, against the operations
per second; the roof is the slope of the copy's bandwidth, then the level of the matrix product. Right, for ops that
move: bytes per call against bytes per second, as a small call reaches no bandwidth. A filled point is ours, a hollow
one the fastest peer on the same inputs. The page is one file, drawn as SVG; the same as PNG lies beside it where
matplotlib is installed.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import command, kernels, machine, models, report

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#c2185b", "#7b52ab", "#8c564b", "#00897b", "#b8860b", "#546e7a", "#e64a19")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 440, 64, 12, 34, 48  # of a panel in pixels, and its margins


@dataclass
class Point:
    """A row, drawn."""

    x: float
    y: float
    family: str
    label: str
    peer: float | None  # the fastest peer's y
    peer_name: str = ""

    @property
    def colour(self) -> str:
        return COLOURS[list(kernels.FAMILIES).index(self.family) % len(COLOURS)]


@dataclass
class Panel:
    """A picture with logarithmic axes."""

    title: str
    x_name: str
    y_name: str
    roof: list[tuple[float, float]]  # corners, from left to right
    points: list[Point] = field(default_factory=list)

    def ranges(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top: whole powers of ten around all that is drawn."""
        xs = [p.x for p in self.points]
        ys = [y for p in self.points for y in (p.y, p.peer) if y] + [y for _, y in self.roof[-1:]]

        def around(values: Sequence[float]) -> tuple[float, float]:
            low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.1))
            return 10.0**low, 10.0 ** max(high, low + 1)

        return *around(xs), *around(ys)


def panels(result: dict[str, Any]) -> list[Panel]:
    """The two panels, without those that have no rows."""
    limit = result["limits"]
    bandwidth, product = limit["GB/s"], limit["TFLOP/s"]
    corner = product * 1e3 / bandwidth  # operations per byte
    compute = Panel(
        "what calculates",
        "operations per byte",
        "TFLOP/s",
        [(corner * 1e-6, product * 1e-6), (corner, product), (corner * 1e6, product)],
    )
    memory = Panel("what moves", "bytes per call", "GB/s", [(1.0, bandwidth), (1e15, bandwidth)])
    families = {op: family for family, members in kernels.FAMILIES.items() for op in members}
    for row in result["rows"]:
        if not row.get("bytes") or row["op"] == "swap_blocks":  # failed, of an older form, or not on the device alone
            continue
        name, best = min(
            ((name, peer["us"]) for name, peer in row["peers"].items() if "us" in peer),
            key=lambda found: found[1],
            default=("", None),
        )
        panel = compute if row["flops"] else memory
        x = row["flops"] / row["bytes"] if row["flops"] else row["bytes"]
        rate = row["flops"] / 1e6 if row["flops"] else row["bytes"] / 1e3  # by us
        label = f"{row['op']} {row['shape']}: {row['us']:.1f} us, {row['rate']:.4g} {row['unit']}"
        peer = None if best is None else rate / best
        panel.points.append(
            Point(
                x, rate / row["us"], families[row["op"]], label, peer, "" if best is None else f"{name} {best:.1f} us"
            )
        )
    return [panel for panel in (compute, memory) if panel.points]


def colours(drawn: Sequence[Panel]) -> dict[str, str]:
    """family of ops -> its colour, of those that are drawn."""
    return {point.family: point.colour for panel in drawn for point in panel.points}


def power(value: float) -> str:
    """A power of ten for an axis."""
    exponent = round(math.log10(value))
    units = {0: "", 3: " K", 6: " M", 9: " G", 12: " T"}
    base = exponent // 3 * 3
    return f"{10 ** (exponent - base)}{units[base]}" if base in units else f"{value:g}"


def svg(panel: Panel) -> str:
    """A panel as SVG; a point tells of its row when the mouse is on it."""
    left, right, bottom, top = (math.log10(v) for v in panel.ranges())

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - left) / (right - left)
        up = (math.log10(y) - bottom) / (top - bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<text x="{WIDTH / 2}" y="18" text-anchor="middle" font-weight="bold">{report.escape(panel.title)}</text>',
    ]
    x0, y0 = at(10**left, 10**bottom)
    x1, y1 = at(10**right, 10**top)
    for exponent in range(round(left), round(right) + 1):
        x, _ = at(10.0**exponent, 10**bottom)
        out.append(f'<line x1="{x:.1f}" y1="{y0}" x2="{x:.1f}" y2="{y1}" stroke="#dde3e9"/>')
        out.append(f'<text x="{x:.1f}" y="{y0 + 16}" text-anchor="middle">{power(10.0**exponent)}</text>')
    for exponent in range(round(bottom), round(top) + 1):
        _, y = at(10**left, 10.0**exponent)
        out.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x1}" y2="{y:.1f}" stroke="#dde3e9"/>')
        out.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{power(10.0**exponent)}</text>')
    out.append(
        f'<text x="{(x0 + x1) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{report.escape(panel.x_name)}</text>'
        f'<text transform="translate(14 {(y0 + y1) / 2}) rotate(-90)" text-anchor="middle">'
        f"{report.escape(panel.y_name)}</text>"
    )
    roof = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in panel.roof)
    name = f"roof{abs(hash(panel.title)) % 10**6}"
    out.append(
        f'<clipPath id="{name}"><rect x="{x0}" y="{y1}" width="{x1 - x0}" height="{y0 - y1}"/></clipPath>'
        f'<polyline points="{roof}" fill="none" stroke="#1c2733" stroke-width="1.5" clip-path="url(#{name})"/>'
    )
    for point in panel.points:
        x, y = at(point.x, point.y)
        if point.peer:
            _, other = at(point.x, point.peer)
            out.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{other:.1f}" stroke="{point.colour}" opacity=".35"/>'
                f'<circle cx="{x:.1f}" cy="{other:.1f}" r="3.5" fill="#fff" stroke="{point.colour}">'
                f"<title>{report.escape(f'{point.label}; here: {point.peer_name}')}</title></circle>"
            )
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{point.colour}">'
            f"<title>{report.escape(point.label)}</title></circle>"
        )
    return "\n".join([*out, "</svg>"])


def page(result: dict[str, Any]) -> str:
    """The page as HTML, without anything from elsewhere."""
    drawn = panels(result)
    legend = " ".join(
        f'<span style="color:{colour}">&#9679;</span> {report.escape(name)}' for name, colour in colours(drawn).items()
    )
    limit = ", ".join(f"{value:.4g} {unit}" for unit, value in result["limits"].items())
    parts = [
        f"<h1>{report.escape(result['model'])}: rooflines</h1>",
        f'<p class="machine">{report.escape(machine.summary(result["machine"]))}<br>'
        f"<code>{report.escape(result['machine']['command'])}</code><br>limits: {report.escape(limit)}</p>",
        "".join(svg(panel) for panel in drawn),
        f"<p>{legend}</p><p>Filled: ours; hollow: the fastest peer on the same inputs; the line: this machine's limit, "
        "measured in the same run.</p>",
        *(f"<h2>{report.escape(name)}</h2>{report.table(rows)}" for name, rows in kernels.tables(result).items()),
    ]
    head = f"<title>{report.escape(result['model'])}: rooflines</title><style>{report.STYLE}</style>"
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{head}</head>\n<body>\n{body}\n</body></html>\n'
    )


def picture(result: dict[str, Any]) -> bytes:
    """The panels as PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    command.require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = panels(result)
    figure = Figure(figsize=(7.5 * max(len(drawn), 1), 6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axis in zip(drawn, figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]):
        left, right, bottom, top = panel.ranges()
        for point in panel.points:
            if point.peer:
                axis.plot([point.x] * 2, [point.y, point.peer], color=point.colour, alpha=0.35, linewidth=1)
                axis.plot(point.x, point.peer, "o", markersize=5, markerfacecolor="white", color=point.colour)
            axis.plot(point.x, point.y, "o", markersize=5, color=point.colour)
        axis.plot(*zip(*panel.roof), color="0.1", linewidth=1.5)
        axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        axis.set(title=panel.title, xlabel=panel.x_name, ylabel=panel.y_name)
        axis.grid(alpha=0.3)
    handles = [axis.plot([], [], "o", color=colour, label=name)[0] for name, colour in colours(drawn).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize="small")
    figure.suptitle(machine.summary(result["machine"]), fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def write(result: dict[str, Any], file: Path) -> list[str]:
    """Writes the page and, where matplotlib is installed, the picture beside it; lines that say what there is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(result))
    png = file.with_suffix(".png")
    try:
        png.write_bytes(picture(result))
    except models.UserError as problem:
        return [str(file), f"no {png.name}: {problem}"]
    return [str(file), str(png)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_pagedkv.evals.roofline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("result", type=Path, help="what `torch-pagedkv bench --json` wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: beside the result, as .html)")
    args = parser.parse_args(argv)
    out = args.out or args.result.with_suffix(".html")
    if out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out: got {out.name}, needs a name that ends in .html; the picture lies beside it as .png")
    try:
        result = json.loads(args.result.read_text())
        if result.get("eval") != "kernels" or not any("bytes" in row for row in result["rows"]):
            raise models.UserError(f"{args.result}: not a result of `torch-pagedkv bench`, or of an older form")
    except (OSError, ValueError) as error:
        return command.refuse(f"{args.result}: {error}")
    except models.UserError as problem:
        return command.refuse(problem)
    print("\n".join(write(result, out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
