"""`torch-pagedkv eval` and `report` on a tiny random model and tasks of a few documents. Nothing is downloaded."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import tiny as tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_pagedkv
from torch_pagedkv import cli
from torch_pagedkv.evals import harness, lm_run, lm_tasks, metrics, models, render, variants

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from torch_pagedkv.evals import lm, report

tiny = tiny_model  # the fixture: a random Llama with a byte-level tokenizer, saved as a folder

DOCS = """
from datasets import Dataset, DatasetDict

WORDS = "red green blue black white pink grey brown gold silver".split()

def load(**_):
    docs = [
        {"question": f"A {a} ball and a {b} one. Which was first?", "choices": [a, b, f"{a} and {b}"], "label": i % 3}
        for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1]))
    ]
    return DatasetDict({"test": Dataset.from_list(docs)})
"""

TASK = """
task: {name}
custom_dataset: !function docs.load
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: {target}
{rest}
"""

CHOICE = """doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm"""

WORD = """metric_list:
  - metric: perplexity
  - metric: acc"""

UNTIL = """generation_kwargs:
  until: ["."]
  max_gen_toks: 6
metric_list:
  - metric: exact_match"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files: one for each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.py").write_text(DOCS)
    for name, kind, target, rest in (
        ("balls", "multiple_choice", "label", CHOICE),
        ("balls_word", "loglikelihood", '" {{choices[0]}}"', WORD),
        ("balls_until", "generate_until", '"{{choices[0]}}"', UNTIL),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, target=target, rest=rest))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"Line {i} of a text about cats, dogs and birds.\n" for i in range(40)))
    return file


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_PAGEDKV_TASKS", "package")


def options(model: str, tasks: Path, *extra: str) -> list[str]:
    return ["--model", model, "--include-path", str(tasks), "--device", "cpu", "--batch-size", "4", *extra]


def run(*argv: str) -> dict[str, Any]:
    return harness.run(harness.parser().parse_args(argv))


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_eval(tiny: str, tasks: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All kinds of tasks: the values are lm-eval's, the patched model's are the stock's, an int8 cache's are not."""
    out = tmp_path / "result.json"
    names = "balls,balls_word:7,balls_until:3,perplexity"
    argv = options(tiny, tasks, "--tasks", names, "--data", str(text), "--window", "64", "--out", str(out))
    assert cli.main(["eval", *argv, "--variants", "stock,paged,kv-int8+block_size=8"]) == 0
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["machine"]["command"].startswith(f"torch-pagedkv eval --model {Path(tiny).name} ")
    assert [run["variant"] for run in result["runs"][::4]] == ["stock", "paged", "kv-int8+block_size=8"]
    by = {(run["variant"], run["task"]): run for run in result["runs"]}
    for task, count in (("balls", 10), ("balls_word", 7), ("balls_until", 3), ("text_perplexity", 1)):
        stock, ours, int8 = (by[name, task] for name in ("stock", "paged", "kv-int8+block_size=8"))
        assert stock["samples"] == ours["samples"] == {task: count}
        for label, entry in stock["metrics"][task].items():
            assert ours["metrics"][task][label]["value"] == pytest.approx(entry["value"], rel=1e-5)
            assert f"{task}, {label}" in shown
        assert ours["kv_bytes_per_token"] == stock["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
        assert int8["kv_bytes_per_token"] == 2 * 2 * 2 * (16 + 4)
        assert ours["kv_bytes"] > 0 == ours["kv_bytes"] % (16 * 512) and int8["kv_bytes"] % (8 * 160) == 0
        assert int8["kv_bytes"] < ours["kv_bytes"] and stock["kv_bytes"] > 0 == stock["kv_bytes"] % 512
        assert stock["attention"] is None and ours["attention"]["paged"] and not ours["attention"]["dense"]
        assert stock["comparison"] == {} and stock["seconds"] > 0 and stock["tokens_per_second"] > 0
    logprob = by["kv-int8+block_size=8", "balls"]["comparison"]["balls"]["gold_logprob"]
    assert logprob["test"] == "t" and logprob["different"] == logprob["samples"] == 10
    assert by["paged", "balls"]["comparison"]["balls"]["acc"]["test"] == "sign"
    windows = by["kv-int8+block_size=8", "text_perplexity"]["comparison"]["text_perplexity"]["token_perplexity"]
    assert windows["samples"] == math.ceil(len(text.read_bytes()) / 64)
    assert by["stock", "balls_until"]["generated_tokens"] > 0 == by["stock", "balls"]["generated_tokens"]
    assert "NaN" not in out.read_text()
    assert str(tmp_path) not in out.read_text() and str(tiny) not in out.read_text()
    assert render.tables(result)["summary"][1][0] == "balls, acc_norm"


def test_values_are_lm_evals(tiny: str, tasks: Path) -> None:
    """As its own evaluation of its own model prints them, standard errors of means included."""
    import lm_eval

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        HFLM(model, tokenizer=tokenizer, batch_size=4), tasks=["balls", "balls_word"], task_manager=manager
    )
    ours = run(*options(tiny, tasks, "--tasks", "balls,balls_word", "--variants", "stock"))
    assert theirs is not None
    for done in ours["runs"]:
        for label, entry in done["metrics"][done["task"]].items():
            if label == "gold_logprob":
                continue
            values = theirs["results"][done["task"]]
            assert entry["value"] == pytest.approx(values[f"{label},none"], rel=1e-6)
            if entry["aggregation"] == "mean":
                assert entry["stderr"] == pytest.approx(values[f"{label}_stderr,none"], rel=1e-9)


def test_standard_errors() -> None:
    """Of a perplexity, bits and a mean, against the spread over many random samples."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 20, (400, 300), generator=draw).double()
    sums = -lengths * (1.5 + 0.3 * torch.randn(400, 300, generator=draw).double())

    def check(aggregation: str, statistic: Any, weighted: bool) -> None:
        value = statistic(sums, lengths)
        column: list[Any] = [[float(a), float(b)] for a, b in zip(sums[0], lengths[0])]
        if not weighted:
            column = [a for a, _ in column]
        metric = {"aggregation": aggregation, "value": float(value[0])}
        assert metrics.standard_error(metric, column) == pytest.approx(float(value.std()), rel=0.15)

    check("weighted_perplexity", lambda a, w: torch.exp(-a.sum(1) / w.sum(1)), True)
    check("bits_per_byte", lambda a, w: -a.sum(1) / w.sum(1) / math.log(2), True)
    check("mean", lambda a, w: a.mean(1), False)
    sums /= 30
    check("perplexity", lambda a, w: torch.exp(-a.mean(1)), False)
    assert metrics.standard_error({"aggregation": "mean", "value": 1.0}, [1.0]) is None
    assert metrics.standard_error({"aggregation": "f1_score", "value": 1.0}, [1.0, 0.0]) is None


def test_gold_logprob_is_of_the_right_choice(tiny: str, tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    task = manager.load(["balls"])["tasks"]["balls"]
    rows = [
        {
            "metrics": ["acc"],
            "acc": 1.0,
            "filter": "none",
            "doc": {"label": gold, "choices": ["a", "b", "c"], "question": ""},
            "filtered_resps": [(-1.0, False), (-2.0, False), (-3.0, True)],
        }
        for gold in (2, 0)
    ]
    assert metrics.sample_values(task, rows) == {"acc": [1.0, 1.0], "gold_logprob": [-3.0, -1.0]}
    rows[1]["doc"] = rows[1]["doc"] | {"label": 7}  # no such choice
    twice = [row | {"filter": name, "f1": (1, 2)} for name in ("none", "other") for row in rows]
    twice[0]["metrics"] = ["acc", "text"]
    twice[0]["text"] = "no number"
    twice[2]["metrics"] = twice[3]["metrics"] = ["acc", "f1"]
    assert metrics.sample_values(task, twice) == {
        "acc": [1.0, 1.0],
        "acc,other": [1.0, 1.0],
    }


def test_eval_goes_on_from_what_is_kept(
    tiny: str, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "result.json"
    argv = options(tiny, tasks, "--tasks", "balls,balls_word", "--variants", "stock,paged", "--limit", "4")
    whole = run(*argv, "--out", str(out))
    file = out.with_suffix(".samples.jsonl")
    lines = file.read_text().splitlines()
    assert len(lines) == 4
    measured: list[tuple[str, str]] = []
    measure = lm_run.run_unit

    def watched(made: Any, tasks: Any, unit: lm_tasks.Unit, args: argparse.Namespace) -> Any:
        measured.append((type(made).__name__, unit.name))
        return measure(made, tasks, unit, args)

    monkeypatch.setattr(lm_run, "run_unit", watched)
    load, loaded = models.load, []
    monkeypatch.setattr(models, "load", lambda *args: loaded.append(args) or load(*args))

    again = run(*argv, "--out", str(out))
    assert measured == [] and loaded == []  # not even the model was needed
    assert again["runs"] == whole["runs"]

    file.write_text("\n".join(lines[:3]) + '\n{"key": "torn')  # an interrupt while the last was written
    assert run(*argv, "--out", str(out))["runs"][:3] == whole["runs"][:3]
    assert measured == [("Paged", "balls_word")]
    assert run(*argv, "--out", str(out))["runs"][:3] == whole["runs"][:3] and len(measured) == 1

    run(*argv[:-1], "3", "--out", str(out))  # other arguments
    assert len(measured) == 5
    run(*argv, "--out", str(tmp_path / "other.json"))
    assert len(measured) == 9


def test_an_interrupt_keeps_what_is_finished(
    tiny: str, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = lm_run.run_unit

    def stop_at_until(made: Any, tasks: Any, unit: lm_tasks.Unit, args: argparse.Namespace) -> Any:
        if unit.name == "balls_until":
            raise KeyboardInterrupt
        return measure(made, tasks, unit, args)

    monkeypatch.setattr(lm_run, "run_unit", stop_at_until)
    argv = options(tiny, tasks, "--tasks", "balls,balls_until", "--out", str(tmp_path / "result.json"))
    assert cli.main(["eval", *argv]) == 130
    assert len((tmp_path / "result.samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("stock", "fp32", None),
        ("paged-bf16", "bf16", {}),
        ("kv-int8", "fp32", {"kv_cache_dtype": "int8"}),
        ("kv-fp8-fp16", "fp16", {"kv_cache_dtype": "fp8"}),
        (
            "kv-int8+block_size=32+fuse_mlp=False+salt=x",
            "fp32",
            {"kv_cache_dtype": "int8", "block_size": 32, "fuse_mlp": False, "salt": "x"},
        ),
    ],
)
def test_variants(name: str, dtype: str, expected: dict[str, Any] | None) -> None:
    assert variants.variant(name, "fp32") == variants.Variant(name, dtype, expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--variants", "stock,pagd"), "'pagd' is none of stock, paged, kv-int8"),
        (("--variants", "paged-fp64"), "'paged-fp64' is none of"),
        (("--variants", "paged+block_size=12"), "block_size: got 12"),
        (("--variants", "paged+blocksize=16"), "did you mean 'block_size'"),
        (("--variants", "paged+block_size"), "is not OPTION=VALUE"),
        (("--variants", "stock+block_size=16"), "the stock model has no options"),
        (("--tasks", "hellaswagg"), "did you mean hellaswag"),
        (("--tasks", "balls:none"), "'none' is no number of documents"),
        (("--tasks", "perplexity", "--data", "/no/such/text"), "--data: .*No such file"),
        (("--model", "/no/such/model"), "cannot load"),
    ],
)
def test_wrong_arguments(
    tiny: str,
    tasks: Path,
    argv: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lm_tasks.Tasks, "every", types.SimpleNamespace(all_tasks=["hellaswag", "mmlu"]))  # slow to read
    assert cli.main(["eval", *options(tiny, tasks, "--tasks", "balls", "--limit", "2"), *argv]) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err) and not shown.out


def test_wrong_source(tiny: str, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_PAGEDKV_TASKS", "nowhere")
    assert cli.main(["eval", *options(tiny, tasks, "--tasks", "balls")]) == 2


def test_lm_eval_missing(
    tiny: str, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "is_missing", lambda name: name == "lm_eval")
    assert cli.main(["eval", *options(tiny, tasks, "--tasks", "balls")]) == 2
    assert "pip install 'torch-pagedkv[eval]'" in capsys.readouterr().err


def test_the_model_is_given_back_as_it_was(tiny: str, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model object for all variants of a dtype, patched for one at a time."""
    load, made = models.load, []
    monkeypatch.setattr(models, "load", lambda *args: made.append(load(*args)) or made[-1])
    result = run(
        *options(tiny, tasks, "--tasks", "balls", "--limit", "2"), "--variants", "paged,stock,kv-fp8,paged-bf16"
    )
    assert len(made) == 2
    assert not torch_pagedkv.patches.is_patched(made[0][0]) and not torch_pagedkv.patches.is_patched(made[1][0])
    assert result["baseline"] == "paged" and result["runs"][1]["comparison"]["balls"]["acc"]["p"] == 1.0


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def result(tiny: str, tasks: Path, text: Path, tmp_path: Path) -> Path:
    file = tmp_path / "result.json"
    argv = options(tiny, tasks, "--tasks", "balls,perplexity", "--data", str(text), "--window", "64")
    assert harness.main([*argv, "--variants", "stock,kv-int8", "--out", str(file)]) == 0
    return file


def test_report(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["report", str(result)]) == 0
    page, png = result.with_suffix(".html"), result.with_suffix(".png")
    assert capsys.readouterr().out.split() == [str(page), str(png)]
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "http" not in text.replace("<!doctype html>", "")  # nothing is fetched by the page
    for rows in render.tables(json.loads(result.read_text())).values():
        assert all(report.escape(cell) in text for row in rows for cell in row)
    assert cli.main(["report", str(result), "--out", str(tmp_path / "other" / "page.html")]) == 0
    assert (tmp_path / "other" / "page.png").is_file()


def test_report_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "speed.json").write_text('{"eval": "speed"}')
    assert cli.main(["report", str(tmp_path / "speed.json")]) == 2
    assert cli.main(["report", str(tmp_path / "missing.json")]) == 2
    assert "not a result of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "speed.json"), "--out", "page.pdf"])


# ---- lm-eval's own command line --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lm_evals_command_line(tiny: str, tasks: Path, tmp_path: Path) -> None:
    """The users' usual command reaches the patched model."""
    model = f"pretrained={tiny},kv_cache_dtype=int8,block_size=8"
    argv = ["run", "--model", "pagedkv", "--model_args", model, "--tasks", "balls", "--include_path", str(tasks)]
    command = [sys.executable, "-m", "torch_pagedkv.cli", "lm-eval", *argv, "--limit", "2", "--device", "cpu"]
    child = subprocess.run(
        [*command, "--output_path", str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert child.returncode == 0, child.stderr
    written = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert written["config"]["model"] == "pagedkv"
    assert "acc,none" in written["results"]["balls"]


def test_python_needs_one_import(tiny: str, tasks: Path) -> None:
    import lm_eval

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    got = lm_eval.simple_evaluate(
        model="pagedkv",
        model_args={"pretrained": tiny, "kv_cache_dtype": "int8", "dtype": "float32"},
        tasks=["balls"],
        task_manager=manager,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    ours = run(*options(tiny, tasks, "--tasks", "balls", "--variants", "kv-int8"))
    assert got is not None and lm.NAME == "pagedkv"
    assert got["results"]["balls"]["acc_norm,none"] == ours["runs"][0]["metrics"]["balls"]["acc_norm"]["value"]


def test_torch_seed_is_set(tiny: str, tasks: Path) -> None:
    """Whatever was drawn before, a task that samples gives the same."""
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        got = run(*options(tiny, tasks, "--tasks", "balls_until:2", "--variants", "paged", "--num-fewshot", "2"))
        values.append(got["runs"][0]["metrics"])
    assert values[0] == values[1]
