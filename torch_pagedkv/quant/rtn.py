"""Round to nearest: a weight's own range, group by group, onto 16 steps. Needs no data, and loses the most."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Int4Weight

#: weights that are turned into float32 at a time: bounds the memory beside the result
_AT_ONCE = 1 << 22


@torch.no_grad()
def quantize(weight: Tensor, group_size: int = 128) -> Int4Weight:
    """Asymmetric round-to-nearest with whole zeros. |w - quantised w| <= scale / 2, up to the rounding of a scale.

    A group's grid holds 0 exactly, its step is (max - min) / 15 rounded to float16 (to float32 where a float16's range
    would not do). The last group may be short.

    Args:
        weight: [N, K], floating, finite.
        group_size: inputs in a group, -1: all.

    Returns:
        scales [G, N] in float16 (float32), zeros [G, N] of 0..15.

    Raises:
        ValueError: an entry is NaN or infinite, or group_size is out of range.
    """
    n, k = weight.shape
    size = k if group_size == -1 else min(group_size, k)
    if size < 1:
        raise ValueError(f"group_size: got {group_size}, needs -1 or an integer >= 1")
    groups = -(-k // size)
    rows = max(1, _AT_ONCE // max(k, 1))
    q = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    steps = torch.empty(groups, n, dtype=torch.float32, device=weight.device)
    zeros = torch.empty(groups, n, dtype=torch.uint8, device=weight.device)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        steps[:, part] = _grouped(weight[part], size)[1].T
    if not bool(torch.isfinite(steps).all()):
        raise ValueError("weight: some of its entries are NaN or infinite")
    limits = torch.finfo(torch.float16)
    fits = bool(((steps >= limits.tiny) & (steps <= limits.max)).all())
    scales = steps.half() if fits else steps
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        grouped, _, low = _grouped(weight[part], size)
        scale = scales[:, part].T.float()[..., None]
        zero = (-low[..., None] / scale).round().clamp(0, 15)
        numbers = ((grouped / scale).round() + zero).clamp(0, 15)
        q[part] = numbers.flatten(1)[:, :k].to(torch.uint8)
        zeros[:, part] = zero[..., 0].T.to(torch.uint8)
    return Int4Weight(q, scales, zeros, None, size)


def _grouped(rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [n, groups, size] with zeros behind a short group; each group's step and its lowest entry or 0, [n,
    groups]. A group of nothing but zeros has step 1."""
    short = -rows.shape[1] % size
    grouped = torch.nn.functional.pad(rows.float(), (0, short)).unflatten(1, (-1, size))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    step = (high - low) / 15
    # NaN passes through
    return grouped, torch.where(step == 0, torch.ones_like(step), step), low
