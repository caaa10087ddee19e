"""`patch(batch_invariant=True)`: every layer's attention is asked for it, and no layer shares reads between rows."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_pagedkv

OPS = torch.ops.torch_pagedkv
FLAG = [a.name for a in OPS.paged_attention.default._schema.arguments].index("batch_invariant")


class Calls(TorchDispatchMode):
    """The flag of each call of paged_attention, and how often paged_attention_cascade was called."""

    def __init__(self) -> None:
        super().__init__()
        self.flags: list[bool] = []
        self.cascades = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.cascades += function is OPS.paged_attention_cascade.default
        if function is OPS.paged_attention.default:
            self.flags.append(args[FLAG] if len(args) > FLAG else (kwargs or {}).get("batch_invariant", False))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fuse_layers", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_every_call_says_so(wanted: bool, fuse_layers: bool) -> None:
    stock, inputs = tiny.make("llama"), tiny.batch((21, 9, 13))
    options = {"num_beams": 2, "max_new_tokens": 8}  # rows that share blocks
    expected = tiny.generate(stock, inputs, **options)
    model = torch_pagedkv.patch(stock, block_size=8, batch_invariant=wanted, fuse_layers=fuse_layers)
    with Calls() as calls:
        tokens = tiny.generate(model, inputs, **options)
    assert calls.flags and set(calls.flags) == {wanted}
    assert not wanted or calls.cascades == 0
    assert torch.equal(tokens, expected)
    assert ("cascade" in str(torch_pagedkv.report(model))) != wanted


def test_options() -> None:
    with pytest.raises(ValueError, match="batch_invariant: got 'yes'"):
        torch_pagedkv.PagedConfig(batch_invariant="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cascade: got True"):
        torch_pagedkv.PagedConfig(batch_invariant=True, cascade=True)
