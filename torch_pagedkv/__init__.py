"""Paged KV cache and fast kernels for HuggingFace causal language models.

>>> model = AutoModelForCausalLM.from_pretrained(...)
>>> torch_pagedkv.patch(model)
>>> model.generate(**inputs)            # the same call and tokens, a paged cache underneath
>>> torch_pagedkv.unpatch(model)

The operators (`torch_pagedkv.ops`) need torch only; what needs transformers is imported when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout patches/ and evals/ lie beside this package; an installed wheel has them inside it.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "pyproject.toml")) and os.path.isdir(os.path.join(_root, "csrc")):
    __path__.append(_root)

from . import ops  # noqa: E402
from ._native import load as _load  # noqa: E402

_load()

from .quant import hook as _hook  # noqa: E402

_hook.install()

if TYPE_CHECKING:
    from .config import PagedConfig
    from .kv.cache import PagedCache
    from .patches import patch, report, unpatch
    from .patches.weights import quantize
    from .quant.gguf import from_gguf
    from .quant.linear import Int4Linear
    from .quant.loading import from_pretrained

__all__ = [
    "Int4Linear",
    "PagedCache",
    "PagedConfig",
    "__version__",
    "from_gguf",
    "from_pretrained",
    "ops",
    "patch",
    "quantize",
    "report",
    "unpatch",
]

_LAZY = {
    "Int4Linear": ".quant.linear",
    "PagedCache": ".kv.cache",
    "PagedConfig": ".config",
    "from_gguf": ".quant.gguf",
    "from_pretrained": ".quant.loading",
    "patch": ".patches",
    "quantize": ".patches.weights",
    "report": ".patches",
    "unpatch": ".patches",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
