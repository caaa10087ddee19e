"""GPTQ: weights are rounded input by input, and what rounding one does to the output is made up for by the others.

For a linear layer with inputs x of second moments H = mean(x x^T), rounding input k of an output by e costs least if
the inputs after it change by -e U[k, k+1:] / U[k, k], where U is the upper Cholesky factor of the inverse of H. H is
damped (a share of its mean diagonal is added to it) so that directions that the data did not show keep their weights.

Inputs are taken in order of their moments, the strongest first ("act-order"), while there are most others left to make
up for them. Groups are either runs of the layer's own order ("static": the grids are chosen before, and nothing needs a
permutation later), or runs of that order ("dynamic": each grid is chosen when its inputs are reached; the assignment is
saved as `g_idx`).

Source: Frantar et al., GPTQ, arXiv:2210.17323.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import grids
from .formats import Int4Weight

Order = Literal["static", "dynamic", "none"]
ORDERS = ("static", "dynamic", "none")

#: inputs whose corrections are added up before the inputs behind them see them: a product instead of many sums
_BLOCK = 128


@torch.no_grad()
def quantize(
    weight: Tensor,
    moments: Tensor,
    group_size: int = 128,
    *,
    order: Order = "static",
    damping: float = 0.01,
) -> Int4Weight:
    """Round a layer's weight so that its outputs change least on inputs with these second moments.

    Args:
        weight: [N, K], floating, finite.
        moments: [K, K], mean(x x^T) of the layer's inputs x, up to a factor.
        group_size: inputs in a group, -1: all. The last group may be short.
        order: "static", "dynamic" (see the module) or "none" (inputs in the layer's order).
        damping: added to the diagonal, as a share of its mean.

    Returns:
        the weight, zeros 1..15, with `g_idx` if order is "dynamic" and there is more than one group.

    Raises:
        ValueError: an entry of weight or moments is NaN or infinite, or damping is not above 0.
    """
    n, k = weight.shape
    size = k if group_size == -1 else min(group_size, k)
    w = weight.float().clone()
    if not bool(torch.isfinite(w).all()) or not bool(torch.isfinite(moments).all()):
        raise ValueError("weight, moments: some of their entries are NaN or infinite")
    if not damping > 0:
        raise ValueError(f"damping: got {damping!r}, needs a number above 0")
    h = moments.float()
    index = torch.arange(k, device=w.device)
    perm = index if order == "none" else torch.argsort(h.diagonal(), descending=True, stable=True)
    group = torch.empty_like(index)
    group[perm if order == "dynamic" else index] = index // size
    count = -(-k // size)
    if order == "static":
        fixed = grids.search(w, h, size)
        scales, zeros = fixed.scales, fixed.zeros
    else:
        scales, zeros = w.new_ones(n, count), w.new_full((n, count), 8)
    w, ordered, group_of = w[:, perm], h[perm][:, perm], group[perm]
    upper = inverse_factor(ordered, damping).float()
    q = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    step = _BLOCK if order == "static" else size
    for first in range(0, k, step):
        last = min(first + step, k)
        if order != "static":
            run = slice(first, last)
            found = grids.search(w[:, run], ordered[run, run], last - first)
            scales[:, first // size], zeros[:, first // size] = found.scales[:, 0], found.zeros[:, 0]
        errors = torch.empty(n, last - first, device=w.device)
        block, factor = w[:, first:last], upper[first:last, first:last]
        for i in range(last - first):
            g = group_of[first + i]
            column, scale, zero = block[:, i], scales[:, g], zeros[:, g]
            number = grids.round_to(column, scale, zero)
            q[:, first + i] = number.to(torch.uint8)
            errors[:, i] = (column - (number - zero) * scale) / factor[i, i]
            block[:, i:].addr_(errors[:, i], factor[i, i:], alpha=-1)
        w[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    natural = torch.empty_like(q)
    natural[:, perm] = q
    g_idx = None if torch.equal(group, index // size) else group.to(torch.int32)
    return Int4Weight(natural, *stored(scales, zeros), None, size, g_idx)


def stored(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """[N, G] of the search -> [G, N] of `Int4Weight`: scales in float16 if that holds them all exactly."""
    half = scales.half()
    exact = bool((half.float() == scales).all())
    return (half if exact else scales).T.contiguous(), zeros.T.to(torch.uint8).contiguous()


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """float64 upper triangular U with U^T U = (H + damping mean(diag H) 1)^-1.

    Inputs that were never other than 0 count as independent ones of mean moment: they keep their weights. More damping
    is added where rounding leaves the matrix not positive definite.
    """
    h = moments.double().clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    added = damping * mean
    for _ in range(8):
        damped = h.clone()
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed):
                return upper
        added *= 4
    raise ValueError("moments: are not those of any data (far from positive semidefinite)")
