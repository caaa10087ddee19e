"""Which causal language models can be patched? Every class of the installed transformers, as a tiny random model.

    torch-pagedkv coverage [--only CLASS ...] [--json] [--out evals/results/coverage-VERSION.json]

Each class is built small (`evals.shrink`), and what it computes is noted in float32 three times: stock, patched, and
unpatched again. A turn is forward passes over a left-padded ragged batch and over a single prompt, whole, then token by
token and in a chunk behind what is cached, without a cache, and greedy `generate()` on both, twice, so that the second
finds the first one's blocks. Windows are shorter than the prompts. The same again with the switches of its config
(biases, qk-norm, ALiBi, softcaps ...) the other way round must not be WRONG either. The result of a class is

    paged and equal             logits and tokens are stock's, and attention ran on pages (counted in the dispatcher;
                                if some layers did not, the reason says so)
    equal with stock attention  patched, equal, and the report says why attention is the stock one
    refused                     `patch` raises and names the reason; the fusions alone (attention=False) are equal
    WRONG                       anything else: other numbers, an error, a crash, not exactly stock after `unpatch`
    not built                   transformers itself cannot build it or run it on token ids; the reason names what

A worker process measures one class after the other and is replaced if it crashes or hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import torch_pagedkv
from torch_pagedkv.patches import UnsupportedModelError

from . import machine, render, shrink, trace

PAGED, STOCK, REFUSED, WRONG, NOT_BUILT = (
    "paged and equal",
    "equal with stock attention",
    "refused",
    "WRONG",
    "not built",
)
RESULTS = (PAGED, STOCK, REFUSED, WRONG, NOT_BUILT)

LENGTHS = (5, 21, 13)  # of the batch's prompts; the last one begins like the single prompt, and finds its blocks
SINGLE = 19
CHUNK = 4  # tokens of the chunk behind the cached ones
STEPS = 3
NEW_TOKENS = 12
BLOCK_SIZE = 8  # several blocks a prompt
#: ||patched - stock|| / ||stock|| of the logits at a position, at most: float32 roundings through a few layers ...
TOLERANCE = 2e-5
#: ... or, for a model that amplifies them, so many times what stock changes by if its weights move by one rounding
ROUNDINGS = 8
#: the same, of stock's logits when a token is exchanged, at least, in tolerances: else a wrong mask could hide in it
SENSITIVITY = 30
TIMEOUT = 180.0  # seconds a class


# ---- what a model computes -------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one model computed: name -> logits [positions, V] or tokens; name -> error of what it could not."""

    values: dict[str, Tensor]
    errors: dict[str, str]


def batch(lengths: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Random prompts, padded on the left: input_ids and attention_mask, int64 [rows, longest]."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    ids = torch.randint(4, shrink.VOCABULARY, (len(lengths), columns), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : columns - length], mask[row, : columns - length] = 0, 0
    if lengths == LENGTHS:
        ids[-1, -LENGTHS[-1] :] = batch((SINGLE,), seed=1)["input_ids"][0, : LENGTHS[-1]]
    return {"input_ids": ids, "attention_mask": mask}


def observe(model: PreTrainedModel, make_cache: Callable[[], Any] = lambda: None, *, again: bool = False) -> Turn:
    """Runs everything that is compared.

    Args:
        make_cache: gives the cache of the forward passes; None: the model's own.
        again: generate a second time.
    """
    values: dict[str, Tensor] = {}
    errors: dict[str, str] = {}
    for name, lengths in (("single", (SINGLE,)), ("batch", LENGTHS)):
        inputs = batch(lengths, seed=len(lengths))
        parts: tuple[tuple[str, Callable[[], dict[str, Tensor]]], ...] = (
            (f"{name}, forward", lambda i=inputs: _forward(model, i, make_cache())),
            (f"{name}, no cache", lambda i=inputs: _plain(model, i)),
            (f"{name}, generate", lambda i=inputs: _generate(model, i)),
            (f"{name}, generate again", lambda i=inputs: _generate(model, i)),
        )[: 4 if again else 3]
        for part, run in parts:
            try:
                found = run()
            except Exception as error:
                errors[part] = shrink.first_line(error)
            else:
                values |= {f"{part}{sub}": value.detach().clone() for sub, value in found.items()}
    return Turn(values, errors)


def _forward(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any) -> dict[str, Tensor]:
    """Prompt, then token by token, then a chunk, through one cache."""
    mask = inputs["attention_mask"]
    rows = mask.shape[0]
    out = (
        model(**inputs, past_key_values=cache, use_cache=True) if cache is not None else model(**inputs, use_cache=True)
    )
    values = {"": _logits(out)[mask.bool()]}
    for name, count in (*((f", step {i + 1}", 1) for i in range(STEPS)), (", chunk", CHUNK)):
        ids = batch((count,) * rows, seed=count)["input_ids"]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        values[name] = _logits(out).flatten(0, 1)
    return values


def _plain(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"": _logits(model(**inputs, use_cache=False))[inputs["attention_mask"].bool()]}


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {"": torch.stack(out.logits, 1).flatten(0, 1), ", tokens": out.sequences[:, -NEW_TOKENS:]}


def _logits(out: Any) -> Tensor:
    logits = out.logits
    return logits[0] if isinstance(logits, tuple) else logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and log lines, of stock's and ours; neither gradients."""
    transformers.logging.set_verbosity_error()
    ours = logging.getLogger("torch_pagedkv")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.setLevel(level)


# ---- one class -------------------------------------------------------------------------------------------------------


def differences(got: Turn, want: Turn, limit: float) -> tuple[list[str], float]:
    """What differs by more than `limit` at any position (tokens: at all), and the largest error of the logits."""
    found, largest = [], 0.0
    for name, reference in want.values.items():
        value = got.values.get(name)
        if value is None:
            part = next(part for part in got.errors if name.startswith(part))
            found.append(f"{name}: {got.errors[part]}")
        elif not reference.is_floating_point():
            if not torch.equal(value, reference):
                found.append(name)
        else:
            error = _error(value, reference)
            largest = max(largest, error)
            if not error <= limit:
                found.append(f"{name} by {error:.1e}")
    return found, largest


def _error(got: Tensor, want: Tensor) -> float:
    """The largest ||got - want|| / ||want|| of a row; infinite if one is NaN where the other is not."""
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = (x.double().nan_to_num(0, 0, 0) for x in (got, want))
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)).max())


def sensitivity(model: PreTrainedModel) -> float:
    """How much the last logits of a prompt change if a token shortly before it is another one, relative."""
    inputs = batch((SINGLE,), seed=1)
    first = _logits(model(**inputs, use_cache=False))[:, -1]
    inputs["input_ids"][0, -3] = 4 if int(inputs["input_ids"][0, -3]) != 4 else 5
    return _error(_logits(model(**inputs, use_cache=False))[:, -1], first)


def conditioning(moved: PreTrainedModel, stock: Turn) -> float:
    """How much stock's logits change if every weight moves by one rounding, relative: what float32 can tell.

    Args:
        moved: another model like that of `stock`; it is changed.
    """
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float32).eps
    for parameter in moved.parameters():
        parameter.mul_(1 + eps * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    turn = observe(moved)
    errors = [
        _error(value, stock.values[key])
        for key, value in turn.values.items()
        if value.is_floating_point() and key in stock.values
    ]
    return max((error for error in errors if error < 1e-2), default=0.0)  # more: a token was another one by chance


def measure(name: str, note: Callable[[str], None] = lambda phase: None, *, switches: bool = True) -> dict[str, Any]:
    """The row of one class.

    Args:
        name: of a class of transformers.
        note: told the phase that begins ("stock", "patched").
        switches: also with the switches of its config the other way round.

    Returns:
        class, result (one of RESULTS), reason, layers (attention layers on pages, of all), error (the largest of the
        logits), skipped (what stock cannot do), switched (the result with `shrink.SWITCHES` the other way round),
        seconds.
    """
    began = time.perf_counter()
    with _quiet():
        row = _measure(name, note)
        if switches and row["result"] != NOT_BUILT:
            other = _measure(name, lambda phase: None, switched=True)
            row["switched"] = other["result"]
            if other["result"] == WRONG != row["result"]:
                row |= {"result": WRONG, "reason": f"with its switches the other way round: {other['reason']}"}
    return {"class": name, **row, "seconds": round(time.perf_counter() - began, 2)}


def _row(result: str, reason: str = "", **more: Any) -> dict[str, Any]:
    return {"result": result, "reason": reason, **more}


def _measure(name: str, note: Callable[[str], None], *, switched: bool = False) -> dict[str, Any]:
    note("stock")
    try:
        model = shrink.make(name, switched=switched)
    except shrink.NotBuiltError as error:
        return _row(NOT_BUILT, str(error))
    stock = observe(model, again=True)
    if not stock.values:
        return _row(NOT_BUILT, next(iter(stock.errors.values())))
    if not all(value.isfinite().all() for value in stock.values.values()):
        return _row(NOT_BUILT, "its logits are not finite")
    limit = max(TOLERANCE, ROUNDINGS * conditioning(shrink.make(name, switched=switched), stock))
    changed = sensitivity(model)
    if changed < SENSITIVITY * limit:
        return _row(NOT_BUILT, f"its logits hardly depend on the prompt ({changed:.0e}, roundings {limit:.0e})")
    skipped = {"skipped": stock.errors} if stock.errors else {}
    # the second generate() tells whether stock repeats itself to the bit
    repeats = all(
        torch.equal(v, stock.values[k.replace(" again", "")]) for k, v in stock.values.items() if "again" in k
    )
    exact = {key for key in stock.values if repeats and "again" not in key}

    note("patched")
    try:
        row = _compare(model, stock, exact, limit, attention=True)
    except UnsupportedModelError as error:
        row = _refused(name, error, lambda: _compare(model, stock, exact, limit, attention=False))
    return row | skipped


def _refused(name: str, error: UnsupportedModelError, fusions: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of a class whose attention is refused: its fusions alone must be right, or refused, too."""
    reason = re.sub(f"^{name}:? ", "", str(error))
    try:
        row = fusions()
    except UnsupportedModelError:
        return _row(REFUSED, reason)
    return row if row["result"] == WRONG else _row(REFUSED, reason, error=row["error"])


def _compare(model: PreTrainedModel, stock: Turn, exact: set[str], limit: float, *, attention: bool) -> dict[str, Any]:
    """Patches, compares, unpatches, compares."""
    torch_pagedkv.patch(model, block_size=BLOCK_SIZE, attention=attention)
    try:
        rows = [row for row in torch_pagedkv.report(model).rows if row.kind == "attention"]
        paged = [row.module for row in rows if row.op == "paged_attention"]
        turns = {"own cache": observe(model, again=True)}
        if attention:
            turns["PagedCache"] = observe(model, lambda: torch_pagedkv.PagedCache(model), again=True)
        wrong, errors = [], []
        for kind, turn in turns.items():
            found, largest = differences(turn, stock, limit)
            wrong += [f"{kind}: {text}" for text in found]
            errors.append(largest)
        wrong += _wrong_counts(model, len(paged), stock) if attention else []
        if attention and model.paged_cache.stats()["used"]:
            wrong.append(f"{model.paged_cache.stats()['used']} blocks of the cache are not given back")
    finally:
        torch_pagedkv.unpatch(model)
    after = observe(model)
    wrong += [f"unpatched: {key}" for key in sorted(exact) if not _same(after.values.get(key), stock.values[key])]
    error = {"error": max(errors)}
    if wrong:
        return _row(WRONG, "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""), **error)
    if not paged:
        return _row(STOCK, "; ".join(sorted({row.reason for row in rows})), **error)
    reason = "; ".join(sorted({row.reason for row in rows if row.op is None}))
    if reason:
        reason = f"{len(paged)} of {len(rows)} layers on pages; the others: {reason}"
    return _row(PAGED, reason, layers=[len(paged), len(rows)], **error)


def _same(got: Tensor | None, want: Tensor) -> bool:
    return got is not None and torch.equal(got, want)


def _wrong_counts(model: PreTrainedModel, paged: int, stock: Turn) -> list[str]:
    """Does a decoding step call paged attention as often as the report says?"""
    inputs = batch((SINGLE,), seed=3)
    cache = torch_pagedkv.PagedCache(model)
    if any(part.startswith("single, forward") for part in stock.errors):
        return []
    model(**inputs, past_key_values=cache, use_cache=True)
    mask = torch.ones(1, SINGLE + 1, dtype=torch.long)
    with trace.AttentionTrace() as counts:
        model(input_ids=mask[:, :1] * 7, attention_mask=mask, past_key_values=cache, use_cache=True)
    if counts.paged < paged or (not paged and counts.paged):
        return [f"the report says {paged} layers run paged_attention, a step called it {counts.paged} times"]
    return []


# ---- all of them -----------------------------------------------------------------------------------------------------


class Worker:
    """A process that measures classes, one line of JSON each."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, "-m", "torch_pagedkv.evals.coverage", "--worker", "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def measure(self, name: str, timeout: float) -> dict[str, Any]:
        """The class's row. If there is none in time the worker is gone, and the row says so."""
        assert self.process.stdin is not None
        phase, deadline = "stock", time.monotonic() + timeout
        try:
            self.process.stdin.write(f"{name}\n")
            self.process.stdin.flush()
            while True:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
                if line is None:
                    why = f"the process ended with {self.process.wait()}"
                    break
                answer = json.loads(line)
                if "phase" not in answer:
                    return answer
                phase = answer["phase"]
        except queue.Empty:
            why = f"no result after {timeout:.0f} s"
        except BrokenPipeError:
            why = "the process is gone"
        self.stop()
        result = NOT_BUILT if phase == "stock" else WRONG
        return {"class": name, "result": result, "reason": f"{phase}: {why}", "seconds": round(timeout, 2)}

    @property
    def alive(self) -> bool:
        """Whether it can take another class."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def survey(names: Sequence[str], threads: int = 1, timeout: float = TIMEOUT) -> list[dict[str, Any]]:
    """A row for each class, in the order of `names`."""
    rows, worker = [], None
    progress = tqdm(names, unit="class", disable=None)
    try:
        for name in progress:
            progress.set_postfix_str(name)
            if worker is None or not worker.alive:
                worker = Worker(threads)
            rows.append(worker.measure(name, timeout))
    finally:
        if worker is not None:
            worker.stop()
    return rows


def work() -> None:
    """The worker: reads names from stdin, answers on what stdout was; prints of models go to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    for line in sys.stdin:
        name = line.strip()
        try:
            row = measure(name, lambda phase: say(phase=phase))
        except Exception as error:
            logging.getLogger(__name__).exception("%s", name)
            row = {"class": name, "result": WRONG, "reason": shrink.first_line(error)}
        say(**row)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Result -> number of classes, every result named."""
    return {result: sum(row["result"] == result for row in rows) for result in RESULTS}


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The sections of a result: the counts, and every class."""
    version = result["machine"]["versions"]["transformers"]
    numbers = [str(n) for n in result["counts"].values()]
    counted: render.Rows = [["transformers", "classes", *RESULTS], [version, str(len(result["rows"])), *numbers]]
    listed: render.Rows = [[row["class"], row["result"], row["reason"]] for row in result["rows"]]
    return {"counts": counted, "classes": [["class", "result", "reason"], *listed]}


def document(result: dict[str, Any]) -> str:
    """The whole table in markdown, what is wrong first."""
    order = {name: i for i, name in enumerate((WRONG, PAGED, STOCK, REFUSED, NOT_BUILT))}
    rows = sorted(result["rows"], key=lambda row: (order[row["result"]], row["class"]))
    parts = tables(result | {"rows": rows})
    caption = f"{machine.summary(result['machine'])}: `{result['machine']['command']}`"
    return "\n\n".join(["# Coverage", *(render.markdown(part, numbers=False) for part in parts.values()), caption, ""])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="torch-pagedkv coverage", description=(__doc__ or "").split("\n")[0])
    add = top.add_argument
    add("--only", nargs="+", metavar="CLASS", help="some classes (a pattern matches whole names)")
    add("--json", action="store_true", help="print JSON in place of the table")
    add("--out", type=Path, metavar="FILE", help="write the JSON there, and a table in markdown beside it")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of the worker (default: %(default)s)")
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help="seconds a class may take (default: %(default)s)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 if anything is WRONG, 2 if the arguments name no class."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.worker:
        work()
        return 0
    names = shrink.classes()
    if args.only:
        names = [name for name in names if any(re.fullmatch(pattern, name) for pattern in args.only)]
        if not names:
            print(f"--only: no class of transformers {transformers.__version__} is like that", file=sys.stderr)
            return 2
    rows = survey(names, args.threads, args.timeout)
    result: dict[str, Any] = {
        "eval": "coverage",
        "model": "every causal language model, tiny and random",
        "machine": machine.describe("cpu"),
        "counts": counts(rows),
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(document(result))
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        shown = tables(result)
        print(render.text(shown["classes"], numbers=False), render.text(shown["counts"]), sep="\n\n")
    return int(result["counts"][WRONG] > 0)


if __name__ == "__main__":
    sys.exit(main())
