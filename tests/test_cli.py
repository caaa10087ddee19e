"""The command line, on a tiny random model with a byte-level tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import torch_pagedkv
from torch_pagedkv import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama saved as a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


# ---- env -------------------------------------------------------------------------------------------------------------


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "cpu library" in text and "libpagedkv_cpu.so" in text


def test_env_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["torch_pagedkv"] == torch_pagedkv.__version__
    assert info["libraries"]["cpu"]["loaded"]
    assert info["libraries"]["cpu"]["for"] in ("generic", "avx2", "avx512", "avx512bf16", "neon")
    assert "rms_norm" in info["operators"]


def test_env_says_what_is_missing(tmp_path: Path) -> None:
    env = {**os.environ, "TORCH_PAGEDKV_LIB": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "-W", "ignore", "-m", "torch_pagedkv.cli", "env"]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == 1
    assert "has no libpagedkv_cpu.so" in child.stdout
    assert "no C++ compiler (no-such-compiler not found)" in child.stdout
    assert child.stderr == ""


def test_env_without_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; from torch_pagedkv import cli; sys.exit(cli.main(['env']))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--temperature", "0.9", "--seed", "3"], ["--raw"], ["--block-size", "8"]])
def test_generate_equals_stock(tiny: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", tiny, "--prompt", "Hello there", "--max-new-tokens", "40", "--device", "cpu"]
    assert cli.main([*command, *options]) == 0
    ours = capsys.readouterr().out
    stock = [option for option in options if option not in ("--block-size", "8")]
    assert cli.main([*command, *stock, "--stock"]) == 0
    assert ours == capsys.readouterr().out
    assert len(ours) > 10


def test_generate_stats(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", tiny, "--prompt", "Hello", "--max-new-tokens", "5", "--device", "cpu", "--stats"]
    assert cli.main([*command, "--kv-cache-dtype", "int8"]) == 0
    errors = capsys.readouterr().err
    assert "5 tokens in" in errors
    stats = json.loads(next(line for line in errors.splitlines() if line.startswith("{")))
    assert stats["num_blocks"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such-model"], "cannot load no/such-model"),
        (["--kv-cache-dtype", "int3"], "kv_cache_dtype"),
        (["--block-size", "12"], "block_size"),
        (["--device", "cuda:77"], "cuda:77"),
    ],
)
def test_generate_errors_take_one_line(
    tiny: str,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = ["generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]
    assert cli.main([*command, *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("torch-pagedkv: error")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize("command", [[], ["nonsense"], ["generate"], ["env", "--nonsense"], ["demo", "--repeats", "0"]])
def test_usage_errors(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main(command)
    assert status.value.code == 2
    assert "usage: torch-pagedkv" in capsys.readouterr().err


def test_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise KeyError("bug")

    monkeypatch.setattr(cli, "env", broken)
    with pytest.raises(KeyError):
        cli.main(["env"])


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_demo(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One?\n\nAnd a second, longer prompt!\n")
    report = tmp_path / "report.json"
    command = ["demo", "--model", tiny, "--device", "cpu", "--max-new-tokens", "12", "--repeats", "1"]
    assert cli.main([*command, "--prompts", str(prompts), "--json", str(report)]) == 0
    text = capsys.readouterr().out
    assert "2 prompts of 4 to 28 tokens" in text
    assert text.count("2 of 2") == 2
    result = json.loads(report.read_text())
    assert result["first_difference"] == {"plain": [None, None], "prefix": [None, None]}
    assert result["prompt_tokens"] == [4, 28]
    assert [len(row) for row in result["patched"]["plain"]["tokens"]] == [12, 12]
    # every whole block of the prefix, in both rows
    block = result["patched"]["stats"]["block_size"]
    assert result["prefix_tokens"] > 1000
    assert result["patched"]["prefix"]["reused_blocks"] >= 2 * (result["prefix_tokens"] // block)
    # keys and values of 2 layers, 2 heads of 16, fp32, at the longest step of both rows
    per_token = 2 * 2 * 2 * 16 * 4
    assert result["stock"]["plain"]["kv_bytes"] == 2 * (28 + 11) * per_token
    assert result["patched"]["plain"]["kv_bytes"] == result["patched"]["plain"]["blocks"] * block * per_token
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert "--max-new-tokens 12" in result["machine"]["command"]


def test_demo_model_too_short(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model", tiny, "--device", "cpu", "--max-new-tokens", "4000"]) == 2
    assert "has 4096 positions" in capsys.readouterr().err
    (tmp_path / "empty").write_text("\n")
    assert cli.main(["demo", "--model", tiny, "--device", "cpu", "--prompts", str(tmp_path / "empty")]) == 2
    assert "has no prompts" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from torch_pagedkv import cli; sys.exit(cli.main(['lm-eval']))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 2
    assert "pip install 'torch-pagedkv[eval]'" in child.stderr
