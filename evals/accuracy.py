"""Is a patched model as accurate as the stock one? Three checks on a real model, each with a gate.

    python -m torch_pagedkv.evals.accuracy [--model ...] [--device ...] [--json FILE]

tokens
    In fp32 the greedy tokens of ragged, left-padded batches must be those of stock `generate()`: on an empty cache,
    when the prompts are found in it, and with beams and several returns. Where a token differs, its position is given
    and by how much stock's logits prefer stock's token to ours there: nearly nothing is a tie broken by rounding.
logits
    In bf16 (on CUDA also fp16) the error of the patched model's logits, in the prefill and decoding token by token,
    must be at most twice stock's own. Both are measured against stock in fp32 on the same rounded weights, so that the
    error of rounding the weights, which both have, hides nothing.
kv
    An int8 or fp8 cache changes the logits by design. Its error must be that of the format, which stock shows on a
    cache whose rows are rounded to the format in plain PyTorch: at most 5 % more, as a geometric mean over texts. The
    model amplifies which way a value near a tie was rounded, so that a relative change of 1e-6 moves the error of one
    text by 5 to 10 %. So the format's error is the mean of several simulations with such a change, the texts have no
    common beginning, and the standard error is given: where it is too large to tell, that is a failure too. Perplexity
    and the share of equal greedy choices are given beside.

Every patched run is traced: one that fell back to dense attention over gathered pages, which is stock's own and agrees
with it by nature, fails too. Exit status 1 if a gate fails. In tokens and kv the stock runs are made with the same
model object, before it is patched.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import torch_pagedkv
from torch_pagedkv.cli import positive
from torch_pagedkv.ops.cache import quantize_rows

from . import command, demo, machine, models, prompts, render, trace

CHECKS = ("tokens", "logits", "kv")
KV_FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

LOGITS_GATE = 2.0  # patched error / stock's own error
KV_GATE = 1.05  # patched error / error of the format
KV_RESOLUTION = 0.025  # largest standard error of the ratio that can tell 5 % more from none
KV_STEPS = 8  # tokens of each text that are decoded
SIMULATIONS = 4
PERTURBATION = 1e-6  # relative; what another order of summation does in fp32

BEAMS = {"num_beams": 4, "num_return_sequences": 2}


@contextlib.contextmanager
def patched(model: Any, **options: Any) -> Iterator[Any]:
    """The model patched inside a with statement."""
    models.patch(model, **options)
    try:
        yield model
    finally:
        torch_pagedkv.unpatch(model)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def check_tokens(model: Any, tokenizer: Any, texts: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Compare generated tokens, batch by batch; see the module."""

    def batched(size: int) -> list[Any]:
        return [models.encode(tokenizer, texts[i : i + size], model.device) for i in range(0, len(texts), size)]

    batches = batched(args.batch_size)
    beam_batches = batched(max(1, args.batch_size // 2))  # each row becomes four
    bar = tqdm(total=3 * len(batches) + 2 * len(beam_batches), desc="tokens", unit="batch", leave=False, disable=None)

    def greedy() -> list[list[int]]:
        rows = []
        with prompts.endless(model):
            for batch in batches:
                out = demo.generate(model, batch, args.new_tokens)
                rows += out[:, batch["input_ids"].shape[1] :].tolist()
                bar.update()
        return rows

    def beams() -> tuple[list[list[int]], list[float]]:
        rows, scores = [], []
        for batch in beam_batches:
            options = {**BEAMS, "return_dict_in_generate": True, "output_scores": True}
            out = demo.generate(model, batch, args.beam_tokens, **options)
            rows += out.sequences[:, batch["input_ids"].shape[1] :].tolist()
            scores += out.sequences_scores.tolist()
            bar.update()
        return rows, scores

    with bar:
        stock, (stock_beams, stock_scores) = greedy(), beams()
        with patched(model):
            with trace.AttentionTrace() as first_calls:
                first = greedy()
            before = model.paged_cache.stats()
            with trace.AttentionTrace() as again_calls:
                again = greedy()
            after = model.paged_cache.stats()
            with trace.AttentionTrace() as beam_calls:
                ours_beams, ours_scores = beams()
    hits = after["hit_tokens"] - before["hit_tokens"]

    def gap(row: int, at: int, theirs: int, ours: int) -> float:
        """How far stock's logits prefer `theirs` to `ours` behind the first `at` new tokens of stock's answer."""
        batch, i = batches[row // args.batch_size], row % args.batch_size
        prompt = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        ids = torch.cat([prompt, prompt.new_tensor(stock[row][:at])])
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, -1].float()
        return float(logits[theirs] - logits[ours])

    def differences(ours: list[list[int]], theirs: list[list[int]], returns: int = 1) -> list[dict[str, Any]]:
        found = []
        for row, at in enumerate(demo.compare(ours, theirs)):
            if at is None:
                continue
            a, b = (rows[row][at] if at < len(rows[row]) else None for rows in (theirs, ours))
            known = returns == 1 and a is not None and b is not None
            found.append(
                {
                    "prompt": row // returns,
                    "position": at,
                    "stock": a,
                    "patched": b,
                    "gap": gap(row, at, a, b) if known and a is not None and b is not None else None,
                    "text": demo.shorten(texts[row // returns]),
                }
            )
        return found

    returns = BEAMS["num_return_sequences"]
    score_error = max(abs(a - b) for a, b in zip(stock_scores, ours_scores))
    runs = {
        "greedy": {
            "rows": len(stock),
            "tokens": args.new_tokens,
            "attention": first_calls.counts,
            "differences": differences(first, stock),
        },
        "greedy, prefix found": {
            "rows": len(stock),
            "tokens": args.new_tokens,
            "hit_tokens": hits,
            "attention": again_calls.counts,
            "differences": differences(again, stock),
        },
        f"{BEAMS['num_beams']} beams, {returns} returns": {
            "rows": len(stock_beams),
            "tokens": args.beam_tokens,
            "score_error": score_error,
            "attention": beam_calls.counts,
            "differences": differences(ours_beams, stock_beams, returns),
        },
    }
    prompt_tokens = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    failures: list[str] = []
    for name, run in runs.items():
        failures += trace.failures(f"tokens, {name}", run["attention"])
        if args.dtype == "fp32":
            failures += [f"tokens, {name}: {describe(item)}" for item in run["differences"]]
    if hits <= 0:
        failures.append("tokens: the prompts were not found in the cache when they came again")
    return {"prompts": len(texts), "prompt_tokens": prompt_tokens, "runs": runs, "failures": failures}


def describe(item: dict[str, Any]) -> str:
    """A difference in one line."""
    gap = "" if item["gap"] is None else f", stock's logits differ by {item['gap']:.2e}"
    where = f"prompt {item['prompt']} ({item['text']!r}), token {item['position']}"
    return f"{where}: stock {item['stock']}, patched {item['patched']}{gap}"


# ---- logits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forced:
    """Sequences that are given token by token: a left-padded batch of prompts and what follows each.

    Attributes:
        ids: [B, P] prompts. mask: [B, P]. next_ids: [B, N] continuations.
    """

    ids: Tensor
    mask: Tensor
    next_ids: Tensor

    @property
    def targets(self) -> dict[str, Tensor]:
        """The token behind each position, in the order of `forced_logits`."""
        after = torch.cat([self.ids[:, 1:], self.next_ids[:, :1]], 1)
        behind = torch.cat([self.next_ids[:, 1:], torch.full_like(self.next_ids[:, :1], -100)], 1)
        return {"prefill": after[self.mask.bool()], "decode": behind.T.flatten()}


def forced(model: Any, tokenizer: Any, texts: Sequence[str], args: argparse.Namespace) -> Forced:
    """The first prompts and the model's own answers to them."""
    batch = models.encode(tokenizer, texts[: args.sequences], model.device)
    with prompts.endless(model):
        out = demo.generate(model, batch, args.steps)
    width = batch["input_ids"].shape[1]
    return Forced(batch["input_ids"], batch["attention_mask"], out[:, width:])


@torch.inference_mode()
def forced_logits(model: Any, data: Forced, cache: Any) -> dict[str, Tensor]:
    """The logits of a prefill over the prompts, then of one decoding step for each further token.

    Returns:
        ``prefill``: fp32 [tokens of all prompts, V]; ``decode``: fp32 [N * B, V], step by step.
    """
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options = {"position_ids": positions} if takes_positions else {}
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        return out.logits.float()

    mask = data.mask
    prefill = step(data.ids, mask)[mask.bool()]
    decode = []
    for i in range(data.next_ids.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        decode.append(step(data.next_ids[:, i : i + 1], mask)[:, 0])
    return {"prefill": prefill, "decode": torch.cat(decode)}


def error(got: Tensor, exact: Tensor) -> dict[str, float]:
    """The norm of the error relative to that of the logits, and the largest error of a logit.

    A logit shift common to a whole row changes no probability, but stock makes none either: it counts.
    """
    difference = got - exact
    return {"norm": float(difference.norm() / exact.norm()), "max": float(difference.abs().max())}


def ratio(ours: float, theirs: float) -> float:
    """ours / theirs; 1 if both are exact."""
    return ours / theirs if theirs else (1.0 if ours == 0 else math.inf)


def check_logits(data: Forced, args: argparse.Namespace) -> dict[str, Any]:
    """Errors of stock and patched in 16-bit dtypes; see the module."""
    runs, failures = [], []
    for dtype in tqdm(args.half, desc="logits", unit="dtype", leave=False, disable=None):
        exact_model, _ = models.load(args.model, args.device, "fp32")
        for parameter in exact_model.parameters():
            parameter.data = parameter.data.to(models.DTYPES[dtype]).float()
        exact = forced_logits(exact_model, data, DynamicCache())
        del exact_model
        model, _ = models.load(args.model, args.device, dtype)
        stock = forced_logits(model, data, DynamicCache())
        with patched(model), trace.AttentionTrace() as calls:
            ours = forced_logits(model, data, torch_pagedkv.PagedCache(model))
        del model
        failures += trace.failures(f"logits, {dtype}", calls.counts)
        for phase in exact:
            a, b = error(stock[phase], exact[phase]), error(ours[phase], exact[phase])
            ratios = {key: ratio(b[key], a[key]) for key in a}
            runs.append(
                {"dtype": dtype, "phase": phase, "stock": a, "patched": b, "ratio": ratios, "attention": calls.counts}
            )
            failures += [
                f"logits, {dtype}, {phase}: the {key} error is {value:.2f} times stock's, the limit is {LOGITS_GATE}"
                for key, value in ratios.items()
                if not value <= LOGITS_GATE
            ]
    return {"sequences": len(data.ids), "steps": data.next_ids.shape[1], "runs": runs, "failures": failures}


# ---- quantised caches ------------------------------------------------------------------------------------------------


class RoundedCache(DynamicCache):
    """A stock cache whose rows went through a quantised format: what an int8 or fp8 cache does, in plain PyTorch.

    Each value is first changed by a random share of the size `PERTURBATION`, drawn from the seed.
    """

    def __init__(self, dtype: torch.dtype, seed: int, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round, then store."""
        return super().update(self.round(key_states), self.round(value_states), *args, **kwargs)

    def round(self, x: Tensor) -> Tensor:
        """Quantise and dequantise rows of the last dimension."""
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        stored, scale = quantize_rows(x * (1 + PERTURBATION * noise), self.dtype)
        return (stored.float() * scale[..., None]).to(x.dtype)


def independent(model: Any, tokenizer: Any) -> Forced:
    """Texts without a common beginning, left-padded; the last tokens of each are decoded."""
    texts = [ids[:64] for ids in prompts.beginnings(tokenizer, 2 * KV_STEPS)]
    width = max(map(len, texts)) - KV_STEPS
    ids, mask = torch.zeros(2, len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        start = width - (len(text) - KV_STEPS)
        ids[row, start:], mask[row, start:] = torch.tensor(text[:-KV_STEPS]), 1
    rest = torch.tensor([text[-KV_STEPS:] for text in texts])
    return Forced(*(x.to(model.device) for x in (ids, mask, rest)))


def row_errors(got: dict[str, Tensor], exact: dict[str, Tensor], data: Forced) -> dict[str, Tensor]:
    """float64 [B] for each phase: the logarithm of the relative error of each text's logits."""

    def rows(logits: dict[str, Tensor]) -> dict[str, Sequence[Tensor]]:
        return {
            "prefill": logits["prefill"].split(data.mask.sum(1).tolist()),
            "decode": logits["decode"].unflatten(0, data.next_ids.T.shape).unbind(1),
        }

    a, b = rows(got), rows(exact)
    return {
        phase: torch.tensor([error(x, y)["norm"] for x, y in zip(a[phase], b[phase])], dtype=torch.float64).log()
        for phase in a
    }


def check_kv(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Errors and perplexity with quantised caches; see the module."""
    data = independent(model, tokenizer)
    exact = forced_logits(model, data, DynamicCache())
    targets = data.targets

    def perplexity(logits: dict[str, Tensor]) -> float:
        nll = [F.cross_entropy(logits[k], targets[k], reduction="none")[targets[k] != -100] for k in logits]
        return float(torch.cat(nll).double().mean().exp())

    runs: list[dict[str, Any]] = []
    failures: list[str] = []
    with patched(model):
        plain_bytes = bytes_per_token(model)
    for name in tqdm(args.kv, desc="kv", unit="format", leave=False, disable=None):
        samples = []
        for seed in range(SIMULATIONS):
            simulated = forced_logits(model, data, RoundedCache(KV_FORMATS[name], seed, model.device))
            samples.append(row_errors(simulated, exact, data))
        with patched(model, kv_cache_dtype=name):
            with trace.AttentionTrace() as calls:
                ours = forced_logits(model, data, torch_pagedkv.PagedCache(model))
            ours_bytes = bytes_per_token(model)
        failures += trace.failures(f"kv, {name}", calls.counts)
        errors = row_errors(ours, exact, data)
        phases = {}
        for phase in exact:
            change = errors[phase] - torch.stack([sample[phase] for sample in samples]).mean(0)
            value = float(change.mean().exp())
            spread = value * float(change.std()) / math.sqrt(len(change))
            phases[phase] = {"error": error(ours[phase], exact[phase]), "ratio": value, "standard_error": spread}
            what = f"kv, {name}, {phase}: {value:.3f} +- {spread:.3f} times the error of the format"
            if not value <= KV_GATE:
                failures.append(f"{what}, the limit is {KV_GATE}")
            if not spread <= KV_RESOLUTION:
                failures.append(f"{what}: too uncertain to tell, the limit is +- {KV_RESOLUTION}")
        same = torch.cat([ours[k].argmax(-1) == exact[k].argmax(-1) for k in exact])
        run = {
            "format": name,
            "attention": calls.counts,
            "phases": phases,
            "perplexity": perplexity(ours),
            "format_perplexity": perplexity(simulated),
            "agreement": float(same.double().mean()),
            "bytes_per_token": ours_bytes,
        }
        runs.append(run)
    return {
        "texts": len(data.ids),
        "perplexity": perplexity(exact),
        "bytes_per_token": plain_bytes,
        "tokens": sum(int((ids != -100).sum()) for ids in targets.values()),
        "runs": runs,
        "failures": failures,
    }


def bytes_per_token(model: Any) -> float:
    """Bytes that a token takes in a patched model's cache, all layers."""
    stats = model.paged_cache.stats()
    return stats["bytes_per_block"] / stats["block_size"]


def kv_formats(device: torch.device) -> list[str]:
    """The quantised formats that a device has kernels for: fp8 needs compute capability 8.9."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    return [name for name in KV_FORMATS if not (old and name == "fp8")]


# ---- the whole -------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the checks asked for; ``failures`` lists every gate that did not hold."""
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = prompts.texts()[: args.prompts]
    model, tokenizer = models.load(args.model, args.device, args.dtype)
    args.device = str(model.device)
    longest = max(len(ids) for ids in models.encode(tokenizer, texts, model.device)["input_ids"])
    needed = longest + max(args.new_tokens, args.beam_tokens, args.steps)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and needed > limit:
        raise models.UserError(f"{args.model} has {limit} positions and this needs {needed}: give fewer --prompts")
    args.kv = kv_formats(model.device)
    # stock attention in fp16 takes minutes a prompt on a CPU: MKL has no fast kernels for it
    args.half = args.half or (["bf16"] if model.device.type == "cpu" else ["bf16", "fp16"])
    result: dict[str, Any] = {
        "eval": "accuracy",
        "model": command.model_name(args.model),
        "device": args.device,
        "dtype": args.dtype,
        "machine": machine.describe(args.device, args.argv),
    }
    if "tokens" in args.checks:
        result["tokens"] = check_tokens(model, tokenizer, texts, args)
    if "kv" in args.checks:
        result["kv"] = check_kv(model, tokenizer, args)
    if "logits" in args.checks:
        data = forced(model, tokenizer, texts, args)
        del model
        result["logits"] = check_logits(data, args)
    result["failures"] = [line for check in CHECKS if check in result for line in result[check]["failures"]]
    return result


def tables(result: dict[str, Any]) -> dict[str, render.Rows]:
    """The result as tables, one for each check that was run."""
    made: dict[str, render.Rows] = {}
    if "tokens" in result:
        rows = [["tokens against stock", "tokens", "sequences", "equal", "first difference"]]
        for name, run in result["tokens"]["runs"].items():
            wrong = run["differences"]
            equal = run["rows"] - len(wrong)
            first = str(min(item["position"] for item in wrong)) if wrong else "-"
            rows.append([f"{result['dtype']}, {name}", str(run["tokens"]), str(run["rows"]), str(equal), first])
        made["tokens"] = rows
    if "logits" in result:
        rows = [["error of the logits", "stock", "patched", "ratio", "stock, max", "patched, max", "ratio"]]
        for run in result["logits"]["runs"]:
            cells = [f"{run['dtype']}, {run['phase']}"]
            for key, form in (("norm", ".3%"), ("max", ".3f")):
                cells += [f"{run[side][key]:{form}}" for side in ("stock", "patched")] + [f"{run['ratio'][key]:.2f}"]
            rows.append(cells)
        made["logits"] = rows
    if "kv" in result:
        kv = result["kv"]
        head = [
            "KV cache",
            "bytes per token",
            "perplexity",
            "same choice",
            "error in prefill",
            "in decoding",
            "of the format's",
            "in decoding",
        ]
        rows = [head, [result["dtype"], f"{kv['bytes_per_token']:.0f}", f"{kv['perplexity']:.4f}", *["-"] * 5]]
        for run in kv["runs"]:
            phases = [run["phases"][phase] for phase in ("prefill", "decode")]
            cells = [
                run["format"],
                f"{run['bytes_per_token']:.0f}",
                f"{run['perplexity']:.4f}",
                f"{run['agreement']:.2%}",
            ]
            cells += [f"{phase['error']['norm']:.3%}" for phase in phases]
            cells += [f"{phase['ratio']:.3f} ± {phase['standard_error']:.3f}" for phase in phases]
            rows.append(cells)
        made["kv"] = rows
    return made


def parser() -> argparse.ArgumentParser:
    """Declare the options."""
    top = command.parser("accuracy", __doc__)
    add = top.add_argument
    add("--dtype", choices=models.DTYPES, default="fp32", help="of tokens and kv; tokens may differ in other than fp32")
    add("--half", choices=("bf16", "fp16"), nargs="+", help="dtypes of logits (default: bf16, on cuda both)")
    add("--checks", choices=CHECKS, nargs="+", default=list(CHECKS), help="default: all")
    add("--prompts", type=positive, metavar="N", help="take the first N prompts only")
    add("--batch-size", type=positive, default=8, metavar="N", help="default: %(default)s")
    add("--new-tokens", type=positive, default=200, metavar="N", help="greedy (default: %(default)s)")
    add("--beam-tokens", type=positive, default=40, metavar="N", help="with beams (default: %(default)s)")
    add("--sequences", type=positive, default=8, metavar="N", help="of logits (default: %(default)s)")
    add("--steps", type=positive, default=64, metavar="N", help="decoded in logits (default: %(default)s)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a gate fails, with a line on stderr for each."""
    return command.main(parser(), run, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
