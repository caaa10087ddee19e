"""Variants of a model by name: ``KIND``, ``KIND-DTYPE``, either with ``+OPTION=VALUE`` behind it.

``stock``, ``kv-int8``, ``paged-bf16``, ``kv-fp8+block_size=32``, ``awq+group_size=64+calibration=text.txt``; `KINDS`
lists the kinds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch_pagedkv import PagedConfig

from . import models

#: what a variant does to the model; None: nothing
KINDS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "paged": {},
    "kv-int8": {"kv_cache_dtype": "int8"},
    "kv-fp8": {"kv_cache_dtype": "fp8"},
    "int4": {"weights": "int4"},
    "awq": {"weights": "awq"},
    "gptq": {"weights": "gptq"},
    "awq_gptq": {"weights": "awq+gptq"},
    "int8": {"weights": "int8"},
    "fp8": {"weights": "fp8"},
    "attention": {
        "fuse_norm": False,
        "fuse_mlp": False,
        "fuse_rotary": False,
        "fuse_linear": False,
        "fuse_layers": False,
    },
    "fusions": {"attention": False},
}


@dataclass(frozen=True)
class Variant:
    """What is measured: a name, a key of `models.DTYPES`, options or None for the stock model.

    The options are `patch`'s, and ``share_contexts`` of `evals.lm.PagedLM`.
    """

    name: str
    dtype: str
    options: dict[str, Any] | None


def variant(name: str, dtype: str) -> Variant:
    """Reads ``KIND[-DTYPE][+OPTION=VALUE...]``; `dtype` is for a name without one.

    Raises:
        UserError: the kind, an option or a value does not exist.
    """
    head, *settings = name.split("+")
    kind, _, last = head.rpartition("-")
    if last in models.DTYPES:
        dtype = last
    else:
        kind = head
    if kind not in KINDS:
        raise models.UserError(
            f"variant {name!r}: {kind!r} is none of {', '.join(KINDS)}; behind it may stand "
            f"{', '.join(f'-{d}' for d in models.DTYPES)} and options of patch() such as +block_size=32"
        )
    options = KINDS[kind]
    if settings and options is None:
        raise models.UserError(f"variant {name!r}: the stock model has no options")
    if options is not None:
        options = {**options, **dict(option(name, text) for text in settings)}
        try:
            PagedConfig.merge(None, split(options)[0])
        except (TypeError, ValueError) as error:
            raise models.UserError(f"variant {name!r}: {error}") from error
    return Variant(name, dtype, options)


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for `patch`, and those for lm-eval's model."""
    theirs = {name: value for name, value in options.items() if name == "share_contexts"}
    return {name: value for name, value in options.items() if name not in theirs}, theirs


def option(name: str, text: str) -> tuple[str, Any]:
    """Reads ``OPTION=VALUE``; a value is a JSON literal, True, False, None or a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise models.UserError(f"variant {name!r}: {text!r} is not OPTION=VALUE")
    try:
        return key, json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except ValueError:
        return key, value
