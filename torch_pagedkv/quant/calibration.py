"""Calibration data: text, files of text or token ids -> sequences of one length.

With a tokenizer that begins a text with a token of its own (`<bos>`), every sequence begins with it, too: models that
were trained so give numbers of another size without it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("torch_pagedkv")

#: what a run takes by default: 65,536 tokens
SAMPLES, LENGTH = 128, 512
#: with fewer tokens nothing is known about most inputs of a layer
_LEAST = 1024

#: texts, a file, or token ids
Calibration = Sequence[str] | str | os.PathLike[str] | Tensor | Sequence[Sequence[int]] | None


def tokens(
    calibration: Calibration,
    tokenizer: Any,
    *,
    vocabulary: int,
    samples: int = SAMPLES,
    length: int = LENGTH,
    longest: int | None = None,
) -> Tensor:
    """The data to calibrate with.

    Args:
        calibration: a list of texts; a path to a file of text (UTF-8; ``.jsonl``: a text under "text" in each line);
            token ids: a tensor [S, T], which is taken as it is, or a list of lists; None: passages of Wikipedia out of
            a Python package (evals/data.py).
        tokenizer: for text.
        vocabulary: token ids are below.
        samples, length: up to how many sequences, of how many tokens. If there is more text, they are spread over it.
        longest: positions of the model.

    Returns:
        int64 [S, T].

    Raises:
        ValueError: there is too little text, a file cannot be read, or token ids are out of range.
        TypeError: something else was given.
    """
    for name, value in (("samples", samples), ("length", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, needs an integer >= 1")
    length = min(length, longest or length)
    ids = _ids(calibration)
    if isinstance(ids, Tensor):
        found = ids.long()[:samples]
        if longest is not None and found.shape[1] > longest:
            raise ValueError(f"calibration: got sequences of {found.shape[1]} tokens, the model takes {longest}")
    else:
        begin: list[int] = []
        if ids is None:
            if tokenizer is None:
                raise ValueError("tokenizer: got None, needs the model's to turn calibration text into token ids")
            texts = _texts(calibration)
            begin = _begin(tokenizer)
            ids = (tokenizer(text).input_ids for text in texts)
        found = _cut(ids, samples, length, begin)
    if found.numel() < _LEAST:
        raise ValueError(
            f"calibration: got {found.numel()} tokens in whole sequences of {length}, needs at least {_LEAST} "
            f"({SAMPLES * LENGTH} are better)"
        )
    if int(found.min()) < 0 or int(found.max()) >= vocabulary:
        raise ValueError(
            f"calibration: got token ids {int(found.min())} .. {int(found.max())}, needs 0 .. {vocabulary - 1} "
            "(is it another model's tokenizer?)"
        )
    return found


def is_text(calibration: Calibration) -> bool:
    """True if a tokenizer is needed.

    Raises:
        TypeError, ValueError: it is nothing to calibrate with.
    """
    return _ids(calibration) is None


def _ids(calibration: Any) -> Tensor | Iterable[Sequence[int]] | None:
    """Token ids, None: it is text."""
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point() or calibration.dtype == torch.bool:
            raise ValueError(
                f"calibration: got a tensor {list(calibration.shape)} of {calibration.dtype}, needs token ids [S, T]"
            )
        return calibration
    if calibration is None or isinstance(calibration, (str, os.PathLike)):
        return None
    if not isinstance(calibration, Sequence) or isinstance(calibration, bytes):
        raise TypeError(
            f"calibration: got {type(calibration).__name__}, needs texts, a path to a file, token ids or None"
        )
    if not calibration:
        raise ValueError("calibration: got an empty list")
    if all(isinstance(text, str) for text in calibration):
        return None
    if all(isinstance(row, Sequence) and all(isinstance(i, int) for i in row) for row in calibration):
        return calibration
    raise TypeError("calibration: got a list of several kinds, needs texts or lists of token ids")


def _texts(calibration: Any) -> list[str]:
    if calibration is None:
        return _default()
    if not isinstance(calibration, (str, os.PathLike)):
        return list(calibration)
    path = Path(calibration)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"calibration: cannot read {str(calibration)[:200]!r} as text ({error}); texts themselves stand in a list"
        ) from error
    if path.suffix != ".jsonl":
        return [text]
    try:
        return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"calibration: {path}: a line has no text under 'text' ({error!r})") from error


def _default() -> list[str]:
    try:
        from torch_pagedkv.evals import data, models
    except ModuleNotFoundError as error:
        raise ValueError(
            f"calibration: the default needs {error.name}: pip install 'torch-pagedkv[eval]', or give text of your own"
        ) from error
    try:
        return data.passages()
    except models.UserError as error:
        raise ValueError(f"calibration: no default text ({error}); give text of your own") from error


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text."""
    one, other = tokenizer("a").input_ids, tokenizer("b").input_ids
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and one[:1] == other[:1] == [bos] else []


def _cut(ids: Iterable[Sequence[int]], samples: int, length: int, begin: list[int]) -> Tensor:
    """Sequences from texts one behind the other, as many as there are, spread evenly."""
    stream = torch.tensor([i for text in ids for i in text], dtype=torch.int64)
    if begin and stream[:1].tolist() == begin:
        stream = stream[1:]
    piece = max(1, length - len(begin))
    pieces = stream[: len(stream) // piece * piece].view(-1, piece)
    if len(pieces) > samples:
        pieces = pieces[torch.linspace(0, len(pieces) - 1, samples).round().long()]
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(pieces), -1), pieces], 1)
