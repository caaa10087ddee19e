"""Metrics of one run: the value of every sample, two metrics more than lm-eval has, standard errors.

``gold_logprob`` is the log-probability of the right choice, and ``token_perplexity`` that of a text whose samples are
windows.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

from . import paired

#: lm-eval's aggregations whose standard error follows from the samples -> of a perplexity?
AGGREGATIONS = {"mean": False, "perplexity": True, "weighted_perplexity": True, "bits_per_byte": False}
#: of them, those whose values are pairs (log-likelihood, weight)
WEIGHTED = ("weighted_perplexity", "bits_per_byte")


def label_of(metric: str, kept: str) -> str:
    """A metric's name, with the filter of the answers unless it is lm-eval's "none"."""
    return metric if kept == "none" else f"{metric},{kept}"


def sample_values(task: Any, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Each metric's values, a number or a pair of numbers a sample; of multiple choice the right one's too."""
    values: dict[str, list[Any]] = {}
    asked: dict[str, int] = {}  # rows of a metric's filter
    counts = collections.Counter(row["filter"] for row in rows)
    for row in rows:
        for metric in row["metrics"]:
            label, value = label_of(metric, row["filter"]), row[metric]
            asked[label] = counts[row["filter"]]
            pair = aggregation(task, metric) in WEIGHTED
            if pair or is_number(value):
                values.setdefault(label, []).append([float(part) for part in value] if pair else float(value))
        if task.OUTPUT_TYPE == "multiple_choice" and row["filter"] == rows[0]["filter"]:
            gold = (task.doc_to_text if task.multiple_input else task.doc_to_target)(row["doc"])
            asked["gold_logprob"] = counts[row["filter"]]
            if isinstance(gold, int) and 0 <= gold < len(row["filtered_resps"]):
                values.setdefault("gold_logprob", []).append(float(row["filtered_resps"][gold][0]))
    # what some samples do not have cannot be paired
    return {label: column for label, column in values.items() if len(column) == asked[label]}


def aggregation(task: Any, metric: str) -> str | None:
    """The name of lm-eval's function that makes one number of a metric's values."""
    return getattr(task.aggregation().get(metric), "__name__", None)


def is_number(value: Any) -> bool:
    """Whether a sample's value can be compared as a number (numpy's included)."""
    return isinstance(value, (int, float)) or hasattr(value, "__float__")


def add_metrics(metrics: dict[str, Any], samples: dict[str, list[Any]], windows: Sequence[tuple[float, int]]) -> None:
    """Our own two metrics, where there is something to make them from."""
    if "gold_logprob" in samples:
        column = samples["gold_logprob"]
        metrics["gold_logprob"] = {
            "value": math.fsum(column) / len(column),
            "aggregation": "mean",
            "higher_is_better": True,
        }
    if windows:
        samples["token_perplexity"] = [list(window) for window in windows]
        total, tokens = math.fsum(value for value, _ in windows), sum(count for _, count in windows)
        metrics["token_perplexity"] = {
            "value": math.exp(-total / tokens),
            "aggregation": "weighted_perplexity",
            "higher_is_better": False,
        }


def standard_error(metric: dict[str, Any], values: Sequence[Any] | None) -> float | None:
    """Of a metric over independent samples; None where it cannot be told from them."""
    if values is None or len(values) < 2 or metric["aggregation"] not in AGGREGATIONS:
        return None
    zero: list[paired.Value] = [[0.0, value[1]] if isinstance(value, list) else 0.0 for value in values]
    error = paired.compare(values, zero).stderr
    if AGGREGATIONS[metric["aggregation"]]:
        return error * metric["value"]
    return error / math.log(2) if metric["aggregation"] == "bits_per_byte" else error


def is_perplexity(entry: dict[str, Any]) -> bool:
    """Whether differences are shown in per cent."""
    return bool(AGGREGATIONS.get(entry["aggregation"] or "", False))
