"""AWQ: inputs that matter more get finer steps, by scaling their weights up and what feeds them down.

W x = (W s) (x / s) for any scales s of the inputs. Rounding W s instead of W has its errors divided by s: large scales
protect the inputs that are large in the calibration data, at the cost of wider ranges for all others of their groups.
`search` looks for the scales s = a^p / b^r, where a is an input's root mean square and b its weights', that cost the
outputs least: e H e^T summed over the outputs for the rounding errors e.

Source: Lin et al., AWQ, arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import grids
from .formats import Int4Weight
from .gptq import stored

_STEPS = 12  # exponents that are tried, with and without the weights' own sizes
_ROWS = 512  # outputs that are looked at: of more, as many, evenly spread


@torch.no_grad()
def quantize(weight: Tensor, moments: Tensor, group_size: int = 128) -> Int4Weight:
    """Round to the nearest on grids that are clipped where that costs the outputs least.

    Args:
        weight: [N, K], floating, finite.
        moments: [K, K], mean(x x^T) of the layer's inputs x, up to a factor.
        group_size: inputs in a group, -1: all. The last group may be short.
    """
    k = weight.shape[1]
    size = k if group_size == -1 else min(group_size, k)
    w = weight.float()
    found = grids.search(w, moments.float(), size)
    return Int4Weight(numbers(w, found, size), *stored(found.scales, found.zeros), None, size)


def numbers(w: Tensor, found: grids.Grids, size: int) -> Tensor:
    """uint8 [N, K], the nearest on these grids."""
    s, z = (t.T[..., None] for t in (found.scales, found.zeros))
    q = grids.round_to(grids.groups_of(w, size), s, z)
    return q.transpose(0, 1).flatten(1)[:, : w.shape[1]].to(torch.uint8)


@torch.no_grad()
def search(weights: Sequence[Tensor], moments: Tensor, group_size: int = 128, *, ties: Tensor | None = None) -> Tensor:
    """The best scales for the inputs of linear layers that share them.

    Args:
        weights: [N_i, K] each, float32.
        moments: [K, K], mean(x x^T) of their inputs.
        group_size: inputs in a group, -1: all.
        ties: int64 [K]: inputs of one number have one scale (query heads that share a value head); inputs of -1 are
            not scaled.

    Returns:
        float32 [K]; 1 if no others are better.
    """
    w, h = torch.cat([weight.float() for weight in weights]), moments.float()
    if len(w) > _ROWS:
        w = w[torch.linspace(0, len(w) - 1, _ROWS, device=w.device).round().long()]
    size = w.shape[1] if group_size == -1 else min(group_size, w.shape[1])
    ones = torch.ones(w.shape[1], device=w.device)
    inputs, columns = _tied(h.diagonal().sqrt(), ties), _tied(_sizes(w, size), ties)
    best, lowest = ones, _cost(w, h, ones, size)
    for duo in (False, True):
        for step in range(0 if duo else 1, _STEPS + 1):
            share = step / _STEPS
            s = inputs**share / (columns ** (1 - share) if duo else 1)
            s = _bounded(s, ties)
            cost = _cost(w, h, s, size)
            if cost < lowest:
                best, lowest = s, cost
    return best


def _sizes(w: Tensor, size: int) -> Tensor:
    """Each input's mean share of its group's range."""
    grouped = grids.groups_of(w.abs(), size)
    share = grouped / grouped.amax(-1, keepdim=True).clamp_min(1e-30)
    return share.mean(1).flatten()[: w.shape[1]]


def _tied(values: Tensor, ties: Tensor | None) -> Tensor:
    """The root mean square over inputs of one number."""
    values = values.clamp_min(1e-4 * float(values.mean()) or 1e-30)
    if ties is None:
        return values
    at = ties.clamp_min(0)
    total = values.new_zeros(int(at.max()) + 1).index_add_(0, at, values.square())
    count = values.new_zeros(total.shape).index_add_(0, at, torch.ones_like(values))
    return (total / count.clamp_min(1)).sqrt()[at]


def _bounded(s: Tensor, ties: Tensor | None) -> Tensor:
    s = s / (s.max() * s.min()).sqrt()
    s = s.clamp(1e-2, 1e2)  # float16 has room for what is divided by them
    return s if ties is None else torch.where(ties < 0, torch.ones_like(s), s)


def _cost(w: Tensor, h: Tensor, s: Tensor, size: int) -> float:
    scaled = w * s
    found = grids.search(scaled, h / s / s[:, None], size, coarse=True)
    scale, zero = (t.T[..., None] for t in (found.scales, found.zeros))
    grouped = grids.groups_of(scaled, size)
    error = (grids.round_to(grouped, scale, zero) - zero) * scale - grouped
    e = error.transpose(0, 1).flatten(1)[:, : w.shape[1]] / s
    return float(((e @ h) * e).sum(dtype=torch.float64))
