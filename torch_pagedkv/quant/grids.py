"""Grids of 16 steps for groups of weights: the scale and the zero that cost the layer's output least.

A group w of an output, with inputs x, adds w x to it; rounding adds e x, which on average over the calibration data is
e H e^T for the second moments H = mean(x x^T) of the group's inputs. `search` tries ranges within the group's own
(clipping its outermost entries makes all steps finer) and keeps the best by that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: numbers in a tensor that are worked on at a time: bounds the memory beside the weight
_AT_ONCE = 1 << 18
_SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54)
#: the ends of a range, as shares of the group's own lowest and highest entry
_FINE = tuple((low, high) for low in _SHARES for high in _SHARES)
_COARSE = ((1.0, 1.0), (0.85, 0.85))


@dataclass(frozen=True)
class Grids:
    """w = scale * (q - zero), q in 0..15, for each output and group.

    Attributes:
        scales: float32 [N, G], above 0; numbers of float16, unless its range does not do.
        zeros: float32 [N, G], whole, 1..15. (0 has no place in GPTQ's first format.)
    """

    scales: Tensor
    zeros: Tensor


def round_to(w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest number q of the grid, floating, shapes broadcast."""
    return ((w / scales).round_().add_(zeros)).clamp_(0, 15)


def groups_of(w: Tensor, size: int) -> Tensor:
    """[N, K] -> [G, N, size], zeros behind a short last group."""
    short = -w.shape[1] % size
    padded = torch.nn.functional.pad(w, (0, short)) if short else w
    return padded.unflatten(1, (-1, size)).transpose(0, 1)


def blocks_of(h: Tensor, size: int) -> Tensor:
    """The diagonal blocks [G, size, size] of [K, K], zeros behind a short last one."""
    short = -h.shape[0] % size
    padded = torch.nn.functional.pad(h, (0, short, 0, short)) if short else h
    return torch.stack([padded[i : i + size, i : i + size] for i in range(0, padded.shape[0], size)])


def search(w: Tensor, moments: Tensor, size: int, coarse: bool = False) -> Grids:
    """The best grid of each output and group.

    Args:
        w: float32 [N, K].
        moments: float32 [K, K], second moments of the inputs; only those within a group are used.
        size: inputs in a group.
        coarse: try fewer.
    """
    return search_groups(groups_of(w, size), blocks_of(moments, size), coarse)


def search_groups(w: Tensor, moments: Tensor, coarse: bool = False) -> Grids:
    """As `search`, for w [G, N, size] and moments [G, size, size]; inputs may have been put in any order."""
    scales = torch.empty(w.shape[1], w.shape[0], dtype=torch.float32, device=w.device)
    zeros = torch.empty_like(scales)
    rows = max(1, _AT_ONCE // max(1, w.shape[0] * w.shape[2]))
    for first in range(0, w.shape[1], rows):
        part = slice(first, first + rows)
        scale, zero = _search(w[:, part], moments, _COARSE if coarse else _FINE)
        scales[part], zeros[part] = scale.T, zero.T
    return Grids(scales, zeros)


def _search(w: Tensor, moments: Tensor, shares: tuple[tuple[float, float], ...]) -> tuple[Tensor, Tensor]:
    """[G, N] scales and zeros."""
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    half = bool(((high - low).amax() / 15 <= torch.finfo(torch.float16).max).item())
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.full_like(low, 8)
    for below, above in shares:
        scale, zero = _grid(low * below, high * above, half)
        error = _error(w, moments, scale, zero)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _grid(low: Tensor, high: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    scale = (high - low) / 15
    if half:
        tiny = torch.finfo(torch.float16).tiny
        scale = scale.half().float()
        scale = torch.where(scale < tiny, torch.full_like(scale, tiny), scale)
    else:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale).round().clamp(1, 15)


def _error(w: Tensor, moments: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    s, z = scale[..., None], zero[..., None]
    e = (round_to(w, s, z) - z) * s - w
    return (torch.bmm(e, moments) * e).sum(-1)
