"""GPTQ, AWQ and their grids on single layers: what they promise about the error of a layer's outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torch_pagedkv.quant import awq, correction, gptq, grids, rtn
from torch_pagedkv.quant.calibrated import dequantized
from torch_pagedkv.quant.correction import corrected
from torch_pagedkv.quant.formats import FORMATS, Int4Weight, Scheme, read, write

SHAPES = [(48, 192, 64), (33, 100, 32), (64, 288, 128), (16, 96, -1), (8, 40, 64)]


def _problem(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs of very different sizes, as those of language models are."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    x = torch.randn(4 * k, k // 2, generator=g) @ torch.randn(k // 2, k, generator=g)
    x = (x + 0.3 * torch.randn(4 * k, k, generator=g)) * torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]
    return w, x.T @ x / len(x)


def _error(w: Tensor, weight: Int4Weight, h: Tensor) -> float:
    e = dequantized(weight).double() - w.double()
    return float(((e @ h.double()) * e).sum())


@pytest.mark.parametrize("order", gptq.ORDERS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_gptq_loses_less_than_rounding(n: int, k: int, group: int, order: gptq.Order) -> None:
    w, h = _problem(n, k)
    nearest, better = rtn.quantize(w, group), gptq.quantize(w, h, group, order=order)
    assert better.q.shape == (n, k) and better.q.max() <= 15
    assert better.zeros is not None and int(better.zeros.min()) >= 1 and int(better.zeros.max()) <= 15
    assert better.scales.dtype == torch.float16 and better.group_size == nearest.group_size
    assert _error(w, better, h) < 0.5 * _error(w, nearest, h)
    assert _error(w, better, h) < _error(w, awq.quantize(w, h, group), h)
    assert torch.equal(better.q, gptq.quantize(w, h, group, order=order).q)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_clipped_grids_lose_less_than_whole_ranges(n: int, k: int, group: int) -> None:
    """Of each group alone, which is what the search looks at."""
    w, h = _problem(n, k)
    size = k if group == -1 else min(group, k)
    blocks = torch.block_diag(*[h[i : i + size, i : i + size] for i in range(0, k, size)])
    nearest, clipped = rtn.quantize(w, group), awq.quantize(w, h, group)
    for row in range(n):
        one = [_error(w[row : row + 1], _row(weight, row), blocks) for weight in (nearest, clipped)]
        assert one[1] <= one[0] * (1 + 1e-3)


def _row(weight: Int4Weight, row: int) -> Int4Weight:
    part = slice(row, row + 1)
    assert weight.zeros is not None
    return replace(weight, q=weight.q[part], scales=weight.scales[:, part], zeros=weight.zeros[:, part])


def test_independent_inputs_are_rounded_to_nearest() -> None:
    """Without correlations there is nothing to make up for."""
    w = torch.randn(16, 128)
    h = torch.eye(128)
    found = grids.search(w, h, 32)
    weight = gptq.quantize(w, h, 32)
    assert torch.equal(weight.q, awq.numbers(w, found, 32))
    assert torch.equal(weight.scales.float().T, found.scales)


def test_against_the_definition() -> None:
    """The fast form with a Cholesky factor against the plain one: solve for the inputs that are left, one by one."""
    w, h = _problem(4, 48)
    weight = gptq.quantize(w, h, 16, order="none", damping=0.02)
    a = h.double() + 0.02 * h.diagonal().double().mean() * torch.eye(48, dtype=torch.float64)
    left, q = w.double().clone(), torch.empty(4, 48, dtype=torch.uint8)
    for i in range(48):
        scale, zero = weight.scales[i // 16].double(), weight.zeros[i // 16].double()
        q[:, i] = (left[:, i] / scale + zero).round().clamp(0, 15).to(torch.uint8)
        change = (q[:, i].double() - zero) * scale - left[:, i]
        rest = slice(i + 1, 48)
        if i + 1 < 48:
            left[:, rest] -= torch.linalg.solve(a[rest, rest], a[rest, i][:, None] * change[None]).T
    assert float((q != weight.q).double().mean()) < 0.01


def test_dynamic_order_puts_the_strongest_inputs_together() -> None:
    w, h = _problem(32, 200)
    weight = gptq.quantize(w, h, 64, order="dynamic")
    assert weight.g_idx is not None
    assert torch.bincount(weight.g_idx.long()).tolist() == [64, 64, 64, 8]
    strength = h.diagonal()
    for g in range(3):
        assert strength[weight.g_idx == g].min() >= strength[weight.g_idx == g + 1].max()
    tensors = write(FORMATS["gptq"], weight)
    again = read(FORMATS["gptq"], tensors, 32, 200, Scheme(64, False, True))
    assert torch.equal(dequantized(again), dequantized(weight)) and torch.equal(again.g_idx, weight.g_idx)


def test_inputs_that_never_come_keep_their_weights() -> None:
    w, h = _problem(16, 96)
    h[10], h[:, 10] = 0, 0
    weight = gptq.quantize(w, h, 32)
    step = weight.scales.float()[0]
    assert (
        float(((dequantized(weight) - w)[:, 10].abs() / step).max()) <= 0.5 + 15 * 0.46
    )  # a clipped one may be outside
    assert torch.isfinite(dequantized(weight)).all()
    none = gptq.quantize(w, torch.zeros(96, 96), 32)
    assert torch.isfinite(dequantized(none)).all()


def test_weights_beyond_float16() -> None:
    w, h = _problem(8, 64)
    weight = gptq.quantize(w * 1e7, h, 32)
    assert weight.scales.dtype == torch.float32 and torch.isfinite(weight.scales).all()
    assert _error(w * 1e7, weight, h) < 1e14 * _error(w, rtn.quantize(w, 32), h)
    assert not dequantized(gptq.quantize(torch.zeros(4, 64), h, 32)).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers(bad: float) -> None:
    w, h = _problem(8, 64)
    for where in (0, 1):
        spoiled = [w.clone(), h.clone()]
        spoiled[where][3, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            gptq.quantize(*spoiled, 32)
    with pytest.raises(ValueError, match="damping: got 0"):
        gptq.quantize(w, h, 32, damping=0)
    with pytest.raises(ValueError, match="moments"):
        gptq.quantize(w, -h, 32)


def test_scales_of_awq() -> None:
    """They never make it worse, and where some inputs are much larger than others they help."""
    w, h = torch.randn(64, 128), torch.eye(128)
    h[::32, ::32] *= 400
    s = awq.search([w[:40], w[40:]], h, 64)

    def left(scales: Tensor) -> float:
        weight = awq.quantize(w * scales, h / scales / scales[:, None], 64)
        e = dequantized(weight) / scales - w
        return float(((e @ h) * e).sum())

    assert (s > 0).all() and left(s) < 0.8 * left(torch.ones(128))
    ties = torch.arange(128) // 4
    ties[:8] = -1
    tied = awq.search([w], h, 64, ties=ties)
    assert bool((tied[:8] == 1).all()) and torch.equal(tied[8:].view(-1, 4), tied[8::4, None].expand(-1, 4))


def test_correction_is_the_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4000, 24), torch.randn(6, 24)
    y = x @ (torch.eye(24) + 0.1 * torch.randn(24, 24))
    h, cross = y.T @ y / 4000, x.T @ y / 4000
    assert torch.equal(corrected(w, h, cross, 0.0), w)
    assert torch.allclose(corrected(w, h, h, 1.0), w)

    def loss(v: Tensor) -> float:
        return float((x @ w.T - y @ v.T).square().mean())

    assert loss(corrected(w, h, cross, 1.0)) < loss(corrected(w, h, cross, 0.5)) < loss(w)
    monkeypatch.setattr(correction, "_DAMPING", 1e-9)
    assert loss(corrected(w, h, cross, 1.0)) < 1e-8 * loss(w)
