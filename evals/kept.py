"""Finished runs on disk, each under a key made of all that it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from . import models


class Kept:
    """Finished runs, a line of JSON each, in a file that is only added to.

    Args:
        file: None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.lines: dict[str, dict[str, Any]] = {}
        if file is not None and file.is_file():
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # an interrupt may have torn the last one
                    entry = json.loads(line)
                    self.lines[entry["key"]] = entry

    def get(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The run with these arguments, if it is there."""
        return self.lines.get(digest(facts))

    def add(self, facts: dict[str, Any], run: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
        """Keeps a run."""
        entry = {"key": digest(facts), "facts": facts, "run": run, "samples": samples}
        entry = json.loads(json.dumps(entry))  # the same types whether it was measured or read
        self.lines[entry["key"]] = entry
        if self.file is not None:
            torn = self.file.is_file() and not self.file.read_bytes().endswith(b"\n")
            with self.file.open("a") as out:
                out.write(("\n" if torn and self.file.stat().st_size else "") + json.dumps(entry) + "\n")
        return entry


def digest(facts: dict[str, Any]) -> str:
    """A key for the arguments of a run."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def model_facts(name: str) -> list[Any]:
    """What tells a model from another under the same name: of a folder, its files' sizes and times."""
    path = Path(models.fetch(name))
    if not path.is_dir():
        return [name]
    files = sorted(file for pattern in ("*.safetensors", "*.bin", "*.json") for file in path.glob(pattern))
    return [path.name, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]
