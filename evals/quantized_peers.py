"""Other quantisers on the same model and calibration data, where they are installed: llm-compressor.

    pip install --no-deps --target peers llmcompressor compressed-tensors loguru

and that folder in PYTHONPATH, with a transformers that it takes; the evaluations require the rest of what it requires.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import models

#: name of a row -> what llm-compressor runs
METHODS = {"llm-compressor AWQ": "awq", "llm-compressor GPTQ": "gptq"}


def version() -> str:
    """Of llm-compressor.

    Raises:
        UserError: it is not installed, or not for this transformers.
    """
    try:
        import llmcompressor  # noqa: F401
    except Exception as error:  # whatever its requirements raise
        raise models.UserError(f"--peers: llm-compressor cannot be imported ({error})") from error
    return importlib.metadata.version("llmcompressor")


def quantize(model: Any, method: str, ids: Tensor, group_size: int) -> None:
    """Quantise a model in place: asymmetric 4-bit groups, all linear layers but the head, its own defaults otherwise.

    Args:
        method: a value of METHODS.
        ids: int64 [S, T].
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size)
    scheme = {
        "config_groups": {"4 bits": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    recipe = [GPTQModifier(**scheme)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**scheme)]
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    with _no_pinning():
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
        )


@contextlib.contextmanager
def _no_pinning() -> Iterator[None]:
    """Its AWQ pins memory also where there is no GPU to pin it for."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(Tensor, "pin_memory", lambda self, *_: self):
        yield
