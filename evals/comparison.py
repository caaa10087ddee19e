"""Runs of `evals.harness` against the baseline's: sample by sample, as rows, as tables."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from . import paired, render
from .metrics import is_perplexity

#: the metric of a task that stands for it in short tables and pictures: the first of these that it has
PRIMARY = ("acc_norm", "token_perplexity", "perplexity", "acc", "exact_match", "word_perplexity")


def comparisons(
    done: dict[str, Any], samples: dict[tuple[str, str], dict[str, Any]], baseline: str
) -> dict[str, dict[str, Any]]:
    """A run's metrics against the baseline's on the same samples, by task and metric; {} for the baseline."""
    ours, theirs = (samples[name, done["task"]] for name in (done["variant"], baseline))
    if done["variant"] == baseline:
        return {}
    return {
        name: {
            label: {
                # JSON has no nan
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in dataclasses.asdict(paired.compare(ours[name][label], theirs[name][label])).items()
            }
            for label in metrics
            if label in ours[name] and label in theirs[name]
        }
        for name, metrics in done["metrics"].items()
    }


def rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every value measured: task, metric, variant, the metric's entry, its comparison (or None), the run, and the
    baseline's entry; task by task, metric by metric."""
    order = {one["name"]: i for i, one in enumerate(result["variants"])}
    names = [(done, name) for done in result["runs"] for name in done["metrics"]]
    seen = dict.fromkeys((done["task"], name) for done, name in names)
    for unit, name in seen:
        done_here = sorted(
            (done for done in result["runs"] if done["task"] == unit), key=lambda done: order[done["variant"]]
        )
        for label in done_here[0]["metrics"][name]:
            base = next((d for d in done_here if d["variant"] == result["baseline"]), None)
            for done in done_here:
                yield {
                    "task": name,
                    "metric": label,
                    "variant": done["variant"],
                    "entry": done["metrics"][name][label],
                    "base": base["metrics"][name][label] if base else None,
                    "comparison": done["comparison"].get(name, {}).get(label),
                    "run": done,
                }


def primary(result: dict[str, Any], task: str) -> str | None:
    """The metric that stands for a task."""
    labels = list(dict.fromkeys(row["metric"] for row in rows(result) if row["task"] == task))
    for wanted in PRIMARY:
        for label in labels:
            if label.partition(",")[0] == wanted:
                return label
    return labels[0] if labels else None


def difference(row: dict[str, Any]) -> tuple[float, float | None] | None:
    """Variant - baseline and its standard error, of a perplexity as a share of the baseline's; None: no baseline."""
    entry, base, found = row["entry"], row["base"], row["comparison"]
    if base is None or found is None:
        return None
    error = found["stderr"]
    if is_perplexity(entry):
        ratio = entry["value"] / base["value"]
        return ratio - 1, None if error is None else ratio * error
    scale = 1 / math.log(2) if entry["aggregation"] == "bits_per_byte" else 1.0
    return entry["value"] - base["value"], None if error is None else scale * error


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """``all``: every metric; ``summary``: one a task; ``differences``: variants against tasks."""
    clock = "tokens/s of CPU time" if all(run["clock"] == "cpu" for run in result["runs"]) else "tokens/s"
    header = ["task", "variant", "value", "difference", "p", clock, "", "KV B/token", "KV MiB", "peak MiB"]
    every, short = [header], [header]
    speeds = {
        done["task"]: done["tokens_per_second"] for done in result["runs"] if done["variant"] == result["baseline"]
    }
    for row in rows(result):
        done = row["run"]
        cells = [f"{row['task']}, {row['metric']}", row["variant"], value_text(row["entry"]), *difference_text(row)]
        speed, base = done["tokens_per_second"], speeds.get(done["task"])
        measured = [
            f"{speed:.1f}" if speed else "-",
            f"{speed / base:.2f}x" if speed and base else "-",
            f"{done['kv_bytes_per_token']}",
            f"{done['kv_bytes'] / 2**20:.1f}",
            f"{done['peak_bytes'] / 2**20:.0f}" if done["peak_bytes"] else "-",
        ]
        every.append([*cells, *measured])
        if row["metric"] == primary(result, row["task"]):
            short.append([*cells, *measured])
    return {"all": every, "summary": short, "differences": differences(result)}


def differences(result: dict[str, Any]) -> render.Rows:
    """A row for each variant: what it adds to the baseline's values, which stand in the first row. Of multiple choices
    the log-probability of the right one, too, in which there is more to see."""
    cells: dict[tuple[str, str], dict[str, str]] = {}  # (task, metric) -> variant -> text
    for row in rows(result):
        if row["metric"] in (primary(result, row["task"]), "gold_logprob"):
            found = difference_text(row)[0] or value_text(row["entry"])
            cells.setdefault((row["task"], row["metric"]), {})[row["variant"]] = found
    titles = [f"{task.removeprefix('offline_')}: {metric.partition(',')[0]}" for task, metric in cells]
    names = {one["name"]: re.sub(r"\+calibration=[^+]*", ", calibrated", one["name"]) for one in result["variants"]}
    header = [result["model"], *titles]
    return [header, *([name, *(column.get(key, "-") for column in cells.values())] for key, name in names.items())]


def value_text(entry: dict[str, Any]) -> str:
    """A metric and its standard error."""
    digits = 3 if is_perplexity(entry) else 4
    return f"{entry['value']:.{digits}f}" + (f" ± {entry['stderr']:.{digits}f}" if entry["stderr"] is not None else "")


def difference_text(row: dict[str, Any]) -> list[str]:
    """The difference with its standard error, and p."""
    found = difference(row)
    if found is None or row["comparison"] is None:
        return ["", ""]
    value, error = found
    scale, digits, unit = (100, 3, "%") if is_perplexity(row["entry"]) else (1, 4, "")
    text = f"{scale * value:+.{digits}f}{unit}"
    if error is not None:
        text += f" ± {scale * error:.{digits}f}{unit}"
    p = row["comparison"]["p"]
    if row["comparison"]["different"] == 0:
        return [text, "same"]
    return [text, "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"]
