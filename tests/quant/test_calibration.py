"""What calibration data may be, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_pagedkv.quant import calibration

SETTINGS: dict[str, Any] = {"vocabulary": 96, "samples": 20, "length": 64}


class WithBegin:
    """A tokenizer of letters that begins every text with 1."""

    bos_token_id = 1

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[1, *(2 + ord(c) % 60 for c in text)])


TEXT = "the quick brown fox jumps over the lazy dog " * 60


def test_texts_files_and_ids(tmp_path: Path) -> None:
    tokenizer = WithBegin()
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n\n")
    want = calibration.tokens([TEXT], tokenizer, **SETTINGS)
    assert want.dtype == torch.int64 and want.shape == (20, 64)
    assert bool((want[:, 0] == 1).all()) and not bool((want[:, 1:] == 1).any())
    for source in (tmp_path / "a.txt", str(tmp_path / "a.txt"), tmp_path / "a.jsonl"):
        assert torch.equal(calibration.tokens(source, tokenizer, **SETTINGS), want)
    ids = torch.arange(32 * 40).view(32, 40) % 96
    assert torch.equal(calibration.tokens(ids.int(), None, **SETTINGS | {"samples": 30}), ids[:30])
    assert calibration.tokens(ids.tolist(), None, **SETTINGS).shape == (20, 64)
    assert calibration.tokens([TEXT], tokenizer, **SETTINGS | {"longest": 32, "samples": 999}).shape[1] == 32


def test_sequences_are_spread_over_the_text() -> None:
    ids = [[i % 96 for i in range(100_000)]]
    found = calibration.tokens(ids, None, **SETTINGS)
    starts = (found[:, 0] - torch.linspace(0, 100_000 // 64 - 1, 20).round().long() * 64) % 96
    assert not starts.any()


def test_no_begin_where_the_tokenizer_has_none() -> None:
    class Plain(WithBegin):
        def __call__(self, text: str) -> Any:
            encoded = super().__call__(text)
            encoded.input_ids = encoded.input_ids[1:]
            return encoded

    assert calibration.first_tokens(WithBegin()) == [1] and calibration.first_tokens(Plain()) == []
    found = calibration.tokens([TEXT], Plain(), **SETTINGS)
    assert found.flatten()[:64].tolist() == Plain()(TEXT).input_ids[:64]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "got an empty list"),
        (["short"], ValueError, "got 0 tokens"),
        (["a" * 900], ValueError, "needs at least 1024"),
        ("no such file", ValueError, "cannot read 'no such file' as text"),
        (3, TypeError, "got int"),
        (b"bytes", TypeError, "got bytes"),
        ([1, "a"], TypeError, "several kinds"),
        (torch.zeros(3, 4), ValueError, r"got a tensor \[3, 4\] of torch.float32"),
        (torch.zeros(2000, dtype=torch.long), ValueError, r"needs token ids \[S, T\]"),
        (torch.full((60, 60), -1), ValueError, "got token ids -1"),
        (torch.full((60, 60), 96), ValueError, "needs 0 .. 95"),
        (torch.zeros(10, 500, dtype=torch.long), ValueError, "the model takes 256"),
    ],
)
def test_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibration.tokens(given, WithBegin(), longest=256, **SETTINGS)


def test_refused_settings(tmp_path: Path) -> None:
    for name in ("samples", "length"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            calibration.tokens([TEXT], WithBegin(), **SETTINGS | {name: 0})
    with pytest.raises(ValueError, match="tokenizer: got None"):
        calibration.tokens([TEXT], None, **SETTINGS)
    (tmp_path / "a.jsonl").write_text('{"txt": "x"}\n')
    with pytest.raises(ValueError, match="no text under 'text'"):
        calibration.tokens(tmp_path / "a.jsonl", WithBegin(), **SETTINGS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read"):
        calibration.tokens(tmp_path / "binary", WithBegin(), **SETTINGS)


def test_default_text(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pytest.importorskip("torch_pagedkv.evals.data")
    monkeypatch.setattr(data, "passages", lambda: [TEXT] * 3)
    assert calibration.tokens(None, WithBegin(), **SETTINGS).shape == (20, 64)

    def missing() -> None:
        raise data.models.ModelUnavailable("pip cannot download it")

    monkeypatch.setattr(data, "passages", missing)
    with pytest.raises(ValueError, match=r"no default text \(pip cannot download it\); give"):
        calibration.tokens(None, WithBegin(), **SETTINGS)
