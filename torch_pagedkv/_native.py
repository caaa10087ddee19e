"""Find or build the native libraries and load them; remember what was loaded, or why not.

The operators' schemas and fakes are plain Python (`torch_pagedkv.ops`), so importing works, and tracing too, before
anything is compiled. An operator whose library is missing raises the reason when it is called.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import build
from .ops._library import NAMESPACE, SCHEMAS

DISPATCH_KEY = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass
class Library:
    """One native library: ``path`` once it is loaded, else the ``reason`` why it is not.

    ``target`` says what the code in it is for: the instruction set picked on this CPU (``avx512``), or the CUDA
    architectures compiled in (``80;90a;100+PTX``). ``stale`` keeps the error of a rebuild that failed, when an older
    library was loaded instead.
    """

    kind: str
    path: Path | None = None
    target: str | None = None
    reason: str | None = None
    stale: str | None = None
    _stubs: torch.library.Library | None = field(default=None, repr=False)


libraries: dict[str, Library] = {}


def load() -> None:
    """Load the libraries this machine has a use for. Called once, on ``import torch_pagedkv``, after the schemas."""
    kinds = ["cpu"] + ["cuda"] * _cuda_usable()
    for kind in kinds:
        libraries[kind] = lib = Library(kind)
        try:
            path = _find(lib)
            torch.ops.load_library(str(path))
            lib.path, lib.target = path, _target(kind, path)
        except (build.BuildError, OSError) as error:
            lib.reason = str(error)
            lib._stubs = _raise_when_called(kind, lib.reason)
            summary = lib.reason.strip().splitlines()[0]
            warnings.warn(f"torch_pagedkv: the {kind.upper()} kernels are not available: {summary}", stacklevel=3)


def operators() -> list[str]:
    """Return the names of all operators, such as ``rms_norm``, sorted."""
    return sorted(SCHEMAS)


def _cuda_usable() -> bool:
    """A CUDA torch that sees a GPU, asked without creating a CUDA context (so that a later fork still works)."""
    return torch.version.cuda is not None and torch.cuda.device_count() > 0


def _find(lib: Library) -> Path:
    """Return the library file to load, building it first where that is needed."""
    kind = lib.kind
    if given := os.environ.get("TORCH_PAGEDKV_LIB"):  # exactly these, whatever the sources say
        path = build.library(Path(given), kind)
        if not path.is_file():
            raise build.BuildError(f"TORCH_PAGEDKV_LIB={given} has no {path.name}")
        return path

    package = build.HERE / "lib"
    capabilities = build.gpus() if kind == "cuda" else []
    source = build.source_hash(kind) if build.CSRC.is_dir() else None

    def usable(folder: Path) -> bool:
        stamp = build.stamp(folder, kind)
        fits = all(build.covers(stamp.get("archs", build.DEFAULT_ARCHS), c) for c in capabilities)
        return bool(stamp) and fits and source in (None, stamp.get("source"))

    if usable(package):
        return build.library(package, kind)
    in_place = build.CHECKOUT is not None and os.access(build.HERE, os.W_OK)
    archs = build.pick_archs(native=True) if kind == "cuda" and build.find_nvcc() else None
    folder = package if in_place else _cache(source, archs)
    if not usable(folder):
        if os.environ.get("TORCH_PAGEDKV_BUILD", "1") == "0":
            raise build.BuildError("not built, and TORCH_PAGEDKV_BUILD=0 forbids to build on import")
        work = build.CHECKOUT / "build" / "native" if in_place and build.CHECKOUT else folder / "work"
        try:
            build.build(folder, work, [kind], archs)
        except build.BuildError as error:
            if not build.library(folder, kind).is_file():
                raise
            lib.stale = str(error)
            warnings.warn(
                f"torch_pagedkv: the {kind.upper()} kernels' sources changed but do not build; using the OLD library."
                f"\n{error}",
                stacklevel=5,
            )
    return build.library(folder, kind)


def _cache(source: str | None, archs: str | None) -> Path:
    """The folder of a library built on first import, one per sources, CUDA version and architectures."""
    base = os.environ.get("TORCH_PAGEDKV_CACHE") or Path.home() / ".cache" / "torch_pagedkv"
    name = "-".join([source or "none", *([f"cu{torch.version.cuda}", archs.replace(";", "_")] if archs else ["cpu"])])
    return Path(base) / "native" / name


def _target(kind: str, path: Path) -> str | None:
    """Ask a loaded library what it runs on."""
    name = {"cpu": "pagedkv_cpu_isa", "cuda": "pagedkv_cuda_archs"}[kind]
    try:
        function = getattr(ctypes.CDLL(str(path)), name)
    except AttributeError:  # a partial build, without the unit that knows
        return None
    function.restype = ctypes.c_char_p
    return function().decode()


def _raise_when_called(kind: str, reason: str) -> torch.library.Library:
    """Give each operator without a kernel for this device one that raises ``reason``."""
    key = DISPATCH_KEY[kind]
    stubs = torch.library.Library(NAMESPACE, "IMPL")

    def explain(name: str) -> None:
        def missing(*args: object, **kwargs: object) -> None:
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no {key} kernel, as the native library could not be loaded "
                f"(`torch-pagedkv env` shows what is missing): {reason}"
            )

        stubs.impl(name, missing, key)

    for name in operators():
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
            explain(name)
    return stubs
