"""What the op tests share: errors measured against PyTorch's own, CPU copies of arguments, raw bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def assert_as_accurate(got: Tensor, stock: Tensor, exact: Tensor, terms: float = 0.0) -> None:
    """Fail unless the errors of `got` are within 2x those of PyTorch's own `stock` in the same dtype.

    `exact` is the float64 result. The largest and the root mean square error are compared. On a few elements PyTorch
    is exact by luck, so that half a step of the dtype at the largest entry is always allowed, which is what the last
    rounding may cost; one step in float32, where the arithmetic itself rounds as coarsely, at the largest entry or, if
    given, at `terms`, the size of what was summed: where terms cancel, PyTorch may be exact by luck.
    """
    assert got.shape == exact.shape
    assert got.dtype == stock.dtype
    stock_dtype = stock.dtype
    got, stock, exact = got.double().cpu(), stock.double().cpu(), exact.double().cpu()
    if not exact.numel():
        return
    steps = 1.0 if stock_dtype == torch.float32 else 0.51
    floor = steps * torch.finfo(stock_dtype).eps * max(float(exact.abs().max()), terms)
    for norm in (lambda e: float(e.abs().max()), lambda e: float(e.square().mean().sqrt())):
        assert norm(got - exact) <= max(2 * norm(stock - exact), floor)


def cpu(args: Any) -> Any:
    """Copies on the CPU of all tensors in nested lists, tuples and dicts."""
    if isinstance(args, Tensor):
        return args.detach().cpu().clone()
    if isinstance(args, (list, tuple)):
        return type(args)(cpu(a) for a in args)
    if isinstance(args, dict):
        return {k: cpu(v) for k, v in args.items()}
    return args


def bits(x: Tensor) -> Tensor:
    """The raw bytes, on the CPU, to compare NaN and dtypes that torch cannot compare."""
    return x.detach().cpu().contiguous().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
