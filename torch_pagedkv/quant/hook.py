"""Lets `from_pretrained` load 4-bit checkpoints once `torch_pagedkv` is imported, without importing transformers.

transformers looks a checkpoint's method up in two dictionaries of `transformers.quantizers.auto`. As soon as that
module is there, our classes stand in front of its own for "awq", "gptq" and "compressed-tensors" (quant/registry.py).
They hand over to the stock ones wherever the packages are installed that these need. `TORCH_PAGEDKV_QUANTIZERS=0` in
the environment leaves transformers alone; `torch_pagedkv.from_pretrained` works then too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register now, if transformers' registry is loaded, or when it will be."""
    if os.environ.get("TORCH_PAGEDKV_QUANTIZERS", "1") == "0":
        return
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from .registry import register

    register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing of its own: runs `_register` behind the import of one module, and takes itself away."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and `_register` behind it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # what is asked of the module's loader later (its source) is asked of the real one
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
