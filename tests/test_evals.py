"""The measurements themselves, on a tiny random model: what they report, and that their gates can fail."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

import torch_pagedkv
from torch_pagedkv.evals import accuracy, compiled, int4, machine, models, prompts, render, speed, trace

#: bytes of a token in the cache of the tiny model: K and V, 2 layers, 2 heads of 16, fp32
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


class Bytes:
    """A tokenizer: the bytes of a text, padded on the left."""

    chat_template = None

    def __call__(self, texts: str | Sequence[str], **options: Any) -> Any:
        if isinstance(texts, str):
            return {"input_ids": list(texts.encode())}
        rows = [list(text.encode()) for text in texts]
        width = max(map(len, rows))
        ids = [[0] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`models.load` gives a random model of two layers for every name."""

    def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
        return models.random_model("tiny", device or "cpu", models.DTYPES[dtype or "fp32"]), Bytes()

    monkeypatch.setattr(models, "load", load)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch() that also moves one weight by a little."""
    patch, unpatch = torch_pagedkv.patch, torch_pagedkv.unpatch

    def bad_patch(model: Any, **options: Any) -> Any:
        model.model.norm.weight.data[0] += 1.0
        return patch(model, **options)

    def bad_unpatch(model: Any) -> Any:
        model.model.norm.weight.data[0] -= 1.0
        return unpatch(model)

    monkeypatch.setattr(torch_pagedkv, "patch", bad_patch)
    monkeypatch.setattr(torch_pagedkv, "unpatch", bad_unpatch)


# ---- accuracy --------------------------------------------------------------------------------------------------------

ACCURACY = [
    "--device",
    "cpu",
    "--prompts",
    "5",
    "--batch-size",
    "3",
    "--new-tokens",
    "40",
    "--beam-tokens",
    "12",
    "--sequences",
    "4",
    "--steps",
    "9",
]


def test_accuracy(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "accuracy.json"
    assert accuracy.main([*ACCURACY, "--half", "bf16", "fp16", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert result["failures"] == []
    assert result["tokens"]["prompt_tokens"] == [len(text.encode()) for text in prompts.texts()[:5]]
    greedy, found, beams = result["tokens"]["runs"].values()
    assert [(run["rows"], run["tokens"]) for run in (greedy, found, beams)] == [(5, 40), (5, 40), (10, 12)]
    assert found["hit_tokens"] >= sum(n // 16 * 16 - 16 for n in result["tokens"]["prompt_tokens"])
    assert beams["score_error"] < 1e-4
    runs = result["logits"]["runs"]
    assert [(run["dtype"], run["phase"]) for run in runs] == [
        (dtype, phase) for dtype in ("bf16", "fp16") for phase in ("prefill", "decode")
    ]
    assert all(1e-5 < run[side]["norm"] < 0.1 for run in runs for side in ("stock", "patched"))
    bytes_per_token = [run["bytes_per_token"] for run in result["kv"]["runs"]]
    assert result["kv"]["bytes_per_token"] == TOKEN_BYTES
    assert bytes_per_token == [TOKEN_BYTES / 4 + 2 * 2 * 2 * 4] * 2  # a byte an element, a scale a head
    text = capsys.readouterr().out
    assert "fp32, greedy, prefix found" in text and "bf16, decode" in text and "fp8" in text


def test_perplexity_is_that_of_the_texts(tiny: None) -> None:
    """Teacher forcing in steps, over left-padded rows, gives the NLL of each row on its own."""
    args = accuracy.parser().parse_args(ACCURACY)
    args.kv = []
    model, tokenizer = models.load("")
    got = accuracy.check_kv(model, tokenizer, args)
    texts = [ids[:64] for ids in prompts.beginnings(tokenizer, 2 * accuracy.KV_STEPS)]
    losses, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([text])
        with torch.inference_mode():
            losses += float(model(ids, labels=ids).loss) * (len(text) - 1)
        count += len(text) - 1
    assert (got["texts"], got["tokens"]) == (len(texts), count)
    assert got["perplexity"] == pytest.approx(torch.tensor(losses / count).exp().item(), rel=1e-4)


def test_coarser_format_is_no_pass(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An fp8 cache where the error of int8 is expected."""
    monkeypatch.setattr(accuracy, "KV_FORMATS", {"fp8": torch.int8})
    assert accuracy.main([*ACCURACY, "--checks", "kv"]) == 1
    assert "times the error of the format, the limit is 1.05" in capsys.readouterr().err


def test_too_few_texts_is_no_pass(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "KV_RESOLUTION", 0.0)
    assert accuracy.main([*ACCURACY, "--checks", "kv"]) == 1
    assert "too uncertain to tell" in capsys.readouterr().err


@pytest.mark.parametrize("check", accuracy.CHECKS)
def test_gates_fail(check: str, tiny: None, broken: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main([*ACCURACY, "--checks", check]) == 1
    errors = capsys.readouterr().err
    assert f"FAILED: {check}" in errors
    if check == "tokens":
        assert "stock's logits differ by" in errors
        assert {line.split(",")[1] for line in errors.splitlines() if "FAILED" in line} >= {" greedy", " 4 beams"}


def test_a_difference_is_described(tiny: None, broken: None, tmp_path: Path) -> None:
    """Position, tokens and the gap in stock's logits are those of stock's own greedy run."""
    report = tmp_path / "accuracy.json"
    assert accuracy.main([*ACCURACY, "--checks", "tokens", "--json", str(report)]) == 1
    run = json.loads(report.read_text())["tokens"]["runs"]["greedy"]
    item = run["differences"][0]
    model, tokenizer = models.load("")
    ids = torch.tensor(tokenizer(prompts.texts()[item["prompt"]])["input_ids"])[None]
    with prompts.endless(model):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=item["position"] + 1, do_sample=False
        )
    assert out[0, -1] == item["stock"]
    with torch.inference_mode():
        logits = model(out[:, :-1]).logits[0, -1]
    assert item["gap"] == pytest.approx(float(logits[item["stock"]] - logits[item["patched"]]), abs=1e-4)
    assert item["gap"] > 0


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a patched model falls back to dense attention."""
    plan = torch_pagedkv.PagedCache.plan
    monkeypatch.setattr(
        torch_pagedkv.PagedCache,
        "plan",
        lambda self, batch, queries, dense=False: plan(self, batch, queries, dense=True),
    )


@pytest.mark.parametrize("check", accuracy.CHECKS)
def test_dense_fallback_is_no_pass(check: str, tiny: None, dense: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main([*ACCURACY, "--checks", check]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "FAILED" in line]
    assert errors and all("not on the paged path (0 paged calls" in line for line in errors)
    assert all(line.startswith(f"FAILED: {check}, ") for line in errors)


def test_speed_of_a_dense_fallback_is_no_pass(dense: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main([*SPEED, "--dtypes", "bf16", "--batches", "1"]) == 1
    assert "FAILED: bf16, batch 1, 1 thread: not on the paged path" in capsys.readouterr().err


def test_trace() -> None:
    """One call a layer and forward pass; stock makes none."""
    model = models.random_model("tiny", "cpu", torch.float32)
    ids = torch.arange(10)[None]
    with trace.AttentionTrace() as calls:
        model(ids)
    assert calls.counts == {"paged": 0, "dense": 0}
    assert trace.failures("x", calls.counts)
    torch_pagedkv.patch(model)
    with trace.AttentionTrace() as calls:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert calls.counts == {"paged": 6, "dense": 0}
    assert trace.failures("x", calls.counts) == []


def test_too_long(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--device", "cpu", "--prompts", "7"]) == 2  # the seventh is the passage
    assert "has 2048 positions" in capsys.readouterr().err


def test_infinite_ratio_is_no_pass() -> None:
    assert accuracy.ratio(0.0, 0.0) == 1.0
    assert not accuracy.ratio(1e-9, 0.0) <= accuracy.LOGITS_GATE


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "compiled.json"
    argv = ["--random", "tiny", "--device", "cpu", "--threads", "1", "--new-tokens", "4", "--rounds", "1"]
    assert compiled.main([*argv, "--json", str(report)]) == 0
    ways = {one["way"]: one for one in json.loads(report.read_text())["ways"]}
    assert list(ways) == list(compiled.WAYS)
    assert ways["patched, compiled"]["graphs"] == 2 and ways["patched, compiled"]["graphs_added"] == 0
    assert ways["patched"]["graphs"] == ways["stock"]["graphs"] == 0
    assert "patched, compiled" in capsys.readouterr().out


# ---- speed -----------------------------------------------------------------------------------------------------------

SPEED = [
    "--random",
    "tiny",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--rounds",
    "2",
    "--new-tokens",
    "9",
    "--prompt-tokens",
    "40",
]


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    assert speed.main([*SPEED, "--batches", "1", "4", "--json", str(report)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(report.read_text())
    assert result["machine"]["command"].startswith("python -m torch_pagedkv.evals.speed --random tiny --device cpu ")
    assert [(case["dtype"], case["batch"]) for case in result["cases"]] == [
        ("fp32", 1), ("fp32", 4), ("bf16", 1), ("bf16", 4)
    ]  # fmt: skip
    case = result["cases"][1]
    assert case["prompt_tokens"] == [40, 33, 25, 18]
    assert case["first_difference"] == [None] * 4
    assert case["stock"]["kv_bytes"] == 4 * 48 * TOKEN_BYTES  # columns, pads and all; the last token has no KV
    assert case["patched"]["kv_bytes"] == sum(-(-(n + 8) // 16) * 16 for n in case["prompt_tokens"]) * TOKEN_BYTES
    assert "first_512" not in case["stock"]["seconds"]
    single = result["cases"][0]["patched"]
    assert set(single["seconds"]) == {"total", "first", "first_64", "first_512", "first_again"}
    assert all(len(times) == 2 and min(times) > 0 for times in single["all_seconds"].values())
    seconds = case["patched"]["seconds"]
    rate = 4 * 8 / (seconds["total"] - seconds["first"])
    assert case["patched"]["decode_tokens_per_second"] == pytest.approx(rate)
    text = capsys.readouterr().out
    assert "fp32, batch 4, 1 thread" in text and "bf16, batch 1, 1 thread, prompt 512" in text


def test_speed_tells_of_wrong_tokens(broken: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main([*SPEED, "--dtypes", "fp32", "--batches", "2"]) == 1
    assert "FAILED: fp32, batch 2, 1 thread: row 0 differs from stock at token" in capsys.readouterr().err


def test_real_prompts(tiny: None) -> None:
    model, tokenizer = models.load("")
    inputs = speed.Inputs(model, tokenizer, 128)
    assert inputs.single(512)["input_ids"][0].tolist() == list(prompts.PASSAGE.encode()[:512])
    rows = inputs.batch(64)["input_ids"].tolist()
    assert len({tuple(row) for row in rows}) == 64
    with pytest.raises(models.UserError, match="tokens in this model's vocabulary"):
        inputs.single(10**5)


# ---- prompts and machine ---------------------------------------------------------------------------------------------


def test_prompts() -> None:
    texts = prompts.texts()
    assert len(set(texts)) == len(texts) == len(prompts.SHORT) + len(prompts.DATA["questions"]) >= 28
    assert sum(text.startswith(prompts.PASSAGE) for text in texts[:16]) == 4
    assert len(prompts.PASSAGE.split()) > 512
    assert all(text.strip() == text for text in texts)


def test_endless_is_undone() -> None:
    model = models.random_model("tiny", "cpu", torch.float32)
    model.generation_config.eos_token_id = 7
    with pytest.raises(KeyboardInterrupt), prompts.endless(model):
        assert model.generation_config.eos_token_id is None
        raise KeyboardInterrupt
    assert model.generation_config.eos_token_id == 7


def test_machine() -> None:
    found = machine.describe("cpu", ["python", "-m", "x", "--json", "/some/where/a file.json", "--model", "some/model"])
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "python -m x --json 'a file.json' --model some/model"
    assert found["gpu"] is None and found["native"]["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"] in machine.summary(found)


@pytest.mark.gpu
def test_machine_gpu() -> None:
    found = machine.describe("cuda")
    assert found["gpu"]["name"] == torch.cuda.get_device_name()
    assert found["gpu"]["driver"] and float(found["gpu"]["max_sm_clock_mhz"]) > 0
    assert found["gpu"]["name"] in machine.summary(found)


# ---- render ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one result."""
    folder = tmp_path_factory.mktemp("results")
    assert speed.main([*SPEED, "--dtypes", "fp32", "--batches", "1", "--json", str(folder / "speed-cpu.json")]) == 0
    return folder


@pytest.fixture
def document(results: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A document with two markers, and the options that render it."""
    readme = tmp_path / "README.md"
    readme.write_text(
        "# Title\n\n<!-- table: speed-cpu -->\nold\n<!-- end -->\n\nBetween.\n\n"
        "<!-- table: speed-cpu/first-token --><!-- end -->\nLast.\n"
    )
    return readme, ["--readme", str(readme), "--results", str(results)]


def test_render(document: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    readme, options = document
    before = readme.read_text()
    assert render.main([*options, "--check"]) == 1
    assert readme.read_text() == before
    assert "run without --check" in capsys.readouterr().err
    assert render.main(options) == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# Title\n\n<!-- table: speed-cpu -->\n| generated tokens/s | stock | patched |")
    assert "<!-- end -->\n\nBetween.\n\n<!-- table: speed-cpu/first-token -->\n| first token, ms |" in text
    assert text.endswith("`\n<!-- end -->\nLast.\n")
    assert text.count("| generated tokens/s |") == 1 and text.count("| first token, ms |") == 2
    assert text.count(torch.__version__) == 2
    assert render.main([*options, "--check"]) == 0
    readme.write_text(text.replace("| fp32, batch 1", "| fp32, batch 2"))
    assert render.main([*options, "--check"]) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: missing -->\n<!-- end -->", "there is no missing.json"),
        ("<!-- table: speed-cpu/nonsense -->\n<!-- end -->", "no section 'nonsense', but decode, first-token"),
        ("<!-- table: speed-cpu -->\n", "table speed-cpu has no end"),
        ("a\n<!-- end -->\n", "line 2: an end without a table"),
        ("<!-- table: speed-cpu -->\n<!-- table: speed-cpu -->\n<!-- end -->", "begins inside table speed-cpu"),
    ],
)
def test_render_errors(
    document: tuple[Path, list[str]], text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, options = document
    readme.write_text(text)
    assert render.main(options) == 2
    assert message in capsys.readouterr().err
    assert readme.read_text() == text


def test_table_forms() -> None:
    rows = [["name", "n"], ["a|b", "1000"], ["c", "2"]]
    assert render.text(rows) == "name     n\n----------\na|b   1000\nc        2"
    assert render.markdown(rows) == "| name | n |\n| --- | ---: |\n| a\\|b | 1000 |\n| c | 2 |"


# ---- int4 ------------------------------------------------------------------------------------------------------------


def test_int4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "int4.json"
    argv = [
        "--random",
        "tiny",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--new-tokens",
        "4",
        "--prompt-tokens",
        "9",
        "--threads",
        "1",
    ]
    assert int4.main([*argv, "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    ways = {one["way"]: one for one in result["ways"]}
    assert list(ways) == list(int4.ways_of("cpu"))
    assert all(len(one["tokens"]) == 4 and len(one["all_seconds"]) == 1 for one in ways.values())
    # 64 x 64 and 64 x 96 matrices: bfloat16, and 4 bits with a float16 scale and a zero for each group
    sizes = {name: one["bytes"]["linears"] for name, one in ways.items()}
    numbers = 2 * (3 * 64 * 96 + 2 * 64 * 64 + 2 * 32 * 64)
    assert sizes["stock"] == sizes["patched"] == 2 * numbers
    assert numbers / 2 < sizes["int4 g64"] < sizes["int4 g32"] < numbers
    assert ways["int4 g32, head"]["bytes"]["head"] < ways["stock"]["bytes"]["head"] == 2 * 256 * 64
    assert "int4 g32, head" in capsys.readouterr().out
    assert result["machine"]["command"].startswith("python -m torch_pagedkv.evals.int4 --random tiny")


def test_int4_of_8_bits(tmp_path: Path) -> None:
    report, few = tmp_path / "int8.json", ["--rounds", "1", "--new-tokens", "2", "--prompt-tokens", "5"]
    argv = ["--random", "tiny", "--device", "cpu", "--weights", "int8", "--ways", "stock", "int8", "int8, head", *few]
    assert int4.main([*argv, "--json", str(report)]) == 0
    ways = {one["way"]: one["bytes"] for one in json.loads(report.read_text())["ways"]}
    stock = ways["stock"]
    assert stock["linears"] / 2 < ways["int8"]["linears"] < 0.6 * stock["linears"]
    assert ways["int8"]["head"] == stock["head"] > ways["int8, head"]["head"]


def test_int4_names_the_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert int4.main(["--random", "tiny", "--device", "cpu", "--ways", "fp4"]) == 2
    assert "--ways: got 'fp4', there are stock, patched," in capsys.readouterr().err
