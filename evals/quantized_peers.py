"""Other quantisers on the same model and calibration data, where they are installed: llm-compressor, GPTQModel.

    pip install --no-deps --target peers llmcompressor compressed-tensors loguru
    pip install --no-deps --target peers gptqmodel logbar device-smi tokenicer pypcre threadpoolctl torchao defuser dill

and that folder in PYTHONPATH, with a transformers that they take; the evaluations require the rest of their needs.
(Of GPTQModel the source archive is enough: what it compiles are kernels.)
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import models

#: name of a row -> the package that makes it, and what it runs
METHODS = {
    "llm-compressor AWQ": ("llmcompressor", "awq"),
    "llm-compressor GPTQ": ("llmcompressor", "gptq"),
    "GPTQModel GPTQ": ("gptqmodel", "gptq"),
    "GPTQModel GPTQ, act-order": ("gptqmodel", "gptq, act-order"),
}


def versions() -> dict[str, str]:
    """Of the packages that can be imported.

    Raises:
        UserError: none can, or none for this transformers.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer GPTQModel does not start
    found, problems = {}, []
    for package in dict.fromkeys(package for package, _ in METHODS.values()):
        try:
            module = importlib.import_module(package)
        except Exception as error:  # whatever its requirements raise
            problems.append(f"{package} cannot be imported ({error})")
            continue
        version = getattr(module, "__version__", None)
        found[package] = version or importlib.import_module(f"{package}.version").__version__
    if not found:
        raise models.UserError(f"--peers: {'; '.join(problems)}")
    return found


def quantize(model: Any, tokenizer: Any, title: str, ids: Tensor, group_size: int) -> None:
    """Quantise a model in place: asymmetric 4-bit groups, all linear layers but the head, their own defaults otherwise.

    Args:
        title: a key of METHODS.
        ids: int64 [S, T].
    """
    package, method = METHODS[title]
    if package == "gptqmodel":
        _gptqmodel(model, tokenizer, method, ids, group_size)
    else:
        _llmcompressor(model, method, ids, group_size)


def _gptqmodel(model: Any, tokenizer: Any, method: str, ids: Tensor, group_size: int) -> None:
    """It wants a folder, and gives layers of its own: their weights, dequantised by its own code, go into the model."""
    peer: Any = importlib.import_module("gptqmodel")
    settings = peer.QuantizeConfig(bits=4, group_size=group_size, sym=False, desc_act="act-order" in method)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it writes a log where it is
        try:
            model.save_pretrained("float")
            tokenizer.save_pretrained("float")
            made = peer.GPTQModel.load("float", settings, device=str(model.device))
            made.quantize(rows, batch_size=1)
            made.save("made")
            made = peer.GPTQModel.load(
                "made", backend=peer.BACKEND.GPTQ_TORCH, device=str(model.device), dtype=torch.float16
            )
        finally:
            os.chdir(here)
        changed = 0
        for name, module in made.model.named_modules():
            if hasattr(module, "qweight"):
                model.get_submodule(name).weight.data.copy_(module.dequantize_weight().T)
                changed += 1
        assert changed


def _llmcompressor(model: Any, method: str, ids: Tensor, group_size: int) -> None:
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
