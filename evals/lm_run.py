"""One model in memory as one variant after the other, and one lm-eval task on it."""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
from typing import Any

import torch

import torch_pagedkv

from . import models, trace
from .lm_tasks import TEXT, Tasks, Unit
from .meter import Memory, Meter
from .metrics import add_metrics, aggregation, label_of, sample_values, standard_error
from .variants import Variant, split

SEED = 1234


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
        if self.model is None or self.variant is None or wanted.dtype != self.variant.dtype or self.is_quantised():
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

    def is_quantised(self) -> bool:
        """True if the model does not come back from its variant: its weights were freed."""
        return self.variant is not None and bool((self.variant.options or {}).get("weights"))

    def _restore(self) -> None:
        self.made = None
        if self.variant is not None and self.variant.options is not None and self.model is not None:
            torch_pagedkv.unpatch(self.model)

    def close(self) -> None:
        """Gives the model back."""
        self._restore()
        self.model = self.tokenizer = self.variant = None


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
