"""The prompts of the measurements (prompts.json), and how they are given to a model."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA: dict[str, Any] = json.loads((Path(__file__).parent / "prompts.json").read_text())

#: a text of more than 512 tokens, the shared prefix of some prompts
PASSAGE: str = DATA["passage"]

#: short prompts of many kinds, 2 to 75 tokens
SHORT: list[str] = [prompt["text"] for prompt in DATA["prompts"]]


def texts() -> list[str]:
    """All prompts: the short ones, and two questions about the passage after each of the first two sixes.

    So the first two batches of eight are ragged in the extreme, and the others cheap.
    """
    one, two, three, four = (f"{PASSAGE}\n\n{question}" for question in DATA["questions"])
    return [*SHORT[:6], one, two, *SHORT[6:12], three, four, *SHORT[12:]]


def beginnings(tokenizer: Any, shortest: int) -> list[list[int]]:
    """Token ids of prompts and of sentences of the passage, without a chat template, no two with the same first two.

    They are independent samples for statistics of rounding: texts with a common beginning share what is rounded there.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for text in SHORT + re.split(r"(?<=[.]) |\n\n", PASSAGE):
        ids = list(tokenizer(text)["input_ids"])
        if len(ids) >= shortest:
            found.setdefault(tuple(ids[:2]), ids)
    return list(found.values())


@contextlib.contextmanager
def endless(model: Any) -> Iterator[None]:
    """Let the model generate as many tokens as asked for, whatever they are: no token ends a sequence."""
    config = model.generation_config
    ends, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = ends
