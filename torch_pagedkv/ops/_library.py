"""The `torch_pagedkv` op namespace: schemas and fakes live in Python, the native libraries only add kernels.

That order lets one native binary serve every torch from 2.11 on (the stable ABI has no tags before 2.12), and makes
`import torch_pagedkv` define the ops before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

NAMESPACE = "torch_pagedkv"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

#: name of every op -> its schema string, in order of definition
SCHEMAS: dict[str, str] = {}
#: name of every op -> its plain-PyTorch reference (same arguments; written for clarity, computes in float64)
REFERENCES: dict[str, Callable[..., Any]] = {}


def define(schema: str) -> Callable[[F], F]:
    """Define an op; the decorated function becomes its fake implementation (shapes and dtypes only)."""
    name = schema.split("(", 1)[0]
    SCHEMAS[name] = schema
    LIBRARY.define(schema, tags=_TAGS)

    def register(fake: F) -> F:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        return fake

    return register


def reference(name: str) -> Callable[[F], F]:
    """Mark a function as the plain-PyTorch reference of op `name`."""

    def register(function: F) -> F:
        REFERENCES[name] = function
        return function

    return register
