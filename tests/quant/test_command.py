"""``torch-pagedkv quantize`` and the evaluation of what quantising costs, on a tiny model in a folder."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from tokenizers import Tokenizer, models

from torch_pagedkv import cli
from torch_pagedkv.evals import quantized
from torch_pagedkv.quant import calibrated
from torch_pagedkv.quant.loading import int4_layers

LETTERS = string.ascii_letters + string.digits + " .,;"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A float model and its tokenizer of letters."""
    tokens = ["<pad>", "<s>", *LETTERS]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [])),
        pad_token="<pad>",
        bos_token="<s>",
    )
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    texts = [" ".join(string.ascii_letters[(i * j) % 45 : (i * j) % 45 + 6] for j in range(40)) for i in range(12)]
    (tmp_path / "text.txt").write_text("|".join(texts))
    (tmp_path / "other.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return tmp_path


def _arguments(folder: Path, out: str, *more: str) -> list[str]:
    common = ["quantize", "--model", str(folder / "model"), "--out", str(folder / out), "--device", "cpu"]
    return [*common, "--group-size", "32", "--calibration", str(folder / "other.txt"), "--length", "64", *more]


@pytest.mark.parametrize(("method", "form"), [("awq", "awq"), ("gptq", "gptq"), ("awq+gptq", "gptq")])
def test_quantize(folder: Path, capsys: pytest.CaptureFixture[str], method: str, form: str) -> None:
    assert cli.main(_arguments(folder, "out", "--method", method, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == form and told["layers"] == 14 and told["group_size"] == 32
    assert told["bytes"] < told["bytes_before"]
    names = {file.name for file in (folder / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and ".unfinished" not in names
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "out")
    assert len(list(int4_layers(model))) == 14 and model.dtype == torch.bfloat16
    assert hf.AutoTokenizer.from_pretrained(folder / "out")("fox").input_ids


def test_rounding_needs_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", "--model", str(folder / "model"), "--out", str(folder / "out"), "--device", "cpu"]
    assert cli.main([*arguments, "--method", "rtn", "--group-size", "32"]) == 0
    assert "GPTQ checkpoint, 14 layers in 4 bits" in capsys.readouterr().out


def test_interrupted_command_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(_arguments(folder, "whole", "--method", "gptq")) == 0
    stock, rounds = calibrated._Work.quantize, []

    def breaking(self: Any, number: int) -> Any:
        rounds.append(number)
        if number == 1 and rounds.count(1) == 1:
            raise KeyboardInterrupt
        return stock(self, number)

    monkeypatch.setattr(calibrated._Work, "quantize", breaking)
    assert cli.main(_arguments(folder, "out", "--method", "gptq")) == 130
    assert cli.main(_arguments(folder, "out", "--method", "gptq")) == 0
    assert rounds == [0, 1, 1]
    a, b = (folder / name / "model.safetensors" for name in ("whole", "out"))
    assert a.read_bytes() == b.read_bytes()


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *more: str, out: str = "out") -> None:
        assert cli.main(_arguments(folder, out, *more)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and not list((folder / "out").glob("*.safetensors"))

    refused("group_size: got 48", "--group-size", "48")
    refused("is there and is not an empty folder", out="model")
    refused("--calibration: rtn takes none", "--method", "rtn")
    refused("cannot read", "--calibration", str(folder / "none.txt"))
    refused("needs at least 1024", "--samples", "2")
    refused("cannot load", "--model", str(folder))


def test_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "result.json"
    common = ["--model", str(folder / "model"), "--dtype", "fp32", "--device", "cpu", "--group-size", "32"]
    common += ["--text", str(folder / "text.txt"), "--separator", "|", "--tokens", "600", "--window", "64"]
    both = [str(folder / "text.txt"), str(folder / "other.txt")]
    assert quantized.main([*common, "--length", "64", "--calibration", *both, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["method"] for row in result["methods"]] == ["float", *quantized.METHODS]
    assert all(row["perplexity"] > 1 for row in result["methods"]) and result["tokens"] == 600
    assert len(quantized.tables(result)["quantized"]) == 2 + len(quantized.METHODS)
    changes = {row["method"]: row["change"] for row in result["methods"]}
    assert changes["float"] == 0 and all(0 < abs(change) < 0.05 for name, change in changes.items() if "8" in name)
    out = capsys.readouterr().out
    assert "AWQ+GPTQ" in out and "gap closed" in out
    del common[common.index("--separator") : common.index("--separator") + 2]
    assert quantized.main([*common, "--calibration", str(folder / "text.txt")]) == 2
    assert "is the text that is evaluated" in capsys.readouterr().err


def test_no_document_is_in_both() -> None:
    class Letters:
        def __call__(self, text: str) -> Any:
            return hf.BatchEncoding({"input_ids": [ord(c) for c in text]})

    parser = quantized.parser()
    file = Path(__file__)
    args = parser.parse_args(
        ["--text", str(file), "--calibration", str(file), "--separator", "\n\n", "--tokens", "900"]
    )
    ids, texts = quantized.data(args, Letters())
    evaluated = "".join(chr(i) for i in ids.tolist())
    assert len(ids) == 900 and len(texts) > 5
    assert not any(text in evaluated for text in texts)
