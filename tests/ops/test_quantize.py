"""The two ends of an 8-bit product: bits against the reference, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, assert_as_accurate, cpu, same_bits
from ops.samples_small import QUANTIZED, Inputs
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES

relaxed = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(
    rows=st.integers(0, 9),
    k=st.sampled_from([1, 7, 8, 40, 96, 257, 576, 1000, 4096]),
    dtype=st.sampled_from(FLOATS),
    stored=st.sampled_from(QUANTIZED),
    with_factor=st.booleans(),
    view=st.sampled_from(["whole", "padded", "every other", "turned"]),
    seed=st.integers(0, 99),
)
def test_bits_of_rows(device, rows, k, dtype, stored, with_factor, view, seed) -> None:
    """The same bits as the reference's: any strides, NaN beside what may be read, rows of zeros."""
    new = Inputs(device, seed)
    step = 2 if view == "every other" else 1
    wide = new.normal(2, rows, (k + 3) * step, scale=3.0).to(dtype)
    wide[..., k * step :] = torch.nan
    x = wide[..., : k * step : step]
    x = x.transpose(0, 1) if view == "turned" else x.contiguous() if view == "whole" else x
    if rows > 2:
        x[..., 1, :] = 0
    factor = new.normal(k).abs() + 0.1 if with_factor else None
    rotation = next(
        block for block in [(64, 32, 16, 8), (32, 8), (0,)][seed % 3] + (0,) if block == 0 or k % block == 0
    )
    q, scale = ops.quantize_per_token(x, factor, rotation=rotation, dtype=stored)
    # on the CPU: PyTorch's CUDA divides by a constant as a product with its reciprocal, which rounds otherwise
    want_q, want_scale = REFERENCES["quantize_per_token"](*cpu([x, factor]), rotation, stored)
    assert q.dtype == stored and q.is_contiguous() and q.shape == x.shape and scale.shape == x.shape[:-1]
    assert same_bits(scale, want_scale)
    assert same_bits(q, want_q.contiguous())


@pytest.mark.parametrize("stored", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_wide_and_odd_rows(device: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Every width that the kernels are made for; from tiny rows to huge ones, with what is no number among them."""
    new = Inputs(device)
    for k in (40, 576, 1032, 2304, 4096, 8192, 16384, 16392):
        x = new.normal(20, k, dtype=dtype, scale=3.0)
        x *= torch.logspace(-36, 38, len(x), device=device)[:, None].to(dtype)
        x[1], x[2, 3], x[3, 5], x[4, -1], x[5] = 0, torch.nan, torch.inf, -torch.inf, 1e-40
        for factor in (None, new.normal(k).abs() + 0.1):
            got = ops.quantize_per_token(x, factor, dtype=stored)
            want = REFERENCES["quantize_per_token"](*cpu([x, factor]), 0, stored)
            for a, b in zip(got, want, strict=True):
                numbers = ~b.float().isnan()
                assert torch.equal(~a.cpu().float().isnan(), numbers)
                assert torch.equal(a.cpu().float()[numbers], b.float()[numbers])


@pytest.mark.parametrize("stored", QUANTIZED, ids=str)
def test_many_rows(device: str, stored: torch.dtype) -> None:
    """The bits of a few rows at a time."""
    x = Inputs(device).normal(6200, 4096, dtype=torch.bfloat16)
    pieces = zip(*(ops.quantize_per_token(rows, None, dtype=stored) for rows in x.split(100)))
    assert all(map(same_bits, ops.quantize_per_token(x, None, dtype=stored), map(torch.cat, pieces)))


@pytest.mark.parametrize("stored", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_half_a_step(device: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    x = Inputs(device).normal(20, 333, dtype=dtype)
    q, scale = ops.quantize_per_token(x, dtype=stored)
    error = (q.double() * scale.double()[:, None] - x.double()).abs()
    # int8: half a step of the row; float8: half a unit in the last of four binary places
    step = scale.double()[:, None] if stored == torch.int8 else x.double().abs() / 8 + scale.double()[:, None] / 256
    assert bool((error <= 0.501 * step).all())


def test_rotation_is_hadamards(device: str) -> None:
    """A unit vector becomes a row of the matrix; what is rotated twice is what it was."""
    for block in (8, 16, 32, 64):
        matrix = torch.ones(1, 1)
        while len(matrix) < block:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        q, scale = ops.quantize_per_token(torch.eye(2 * block, device=device), rotation=block, dtype=torch.int8)
        want = 127 * torch.block_diag(matrix, matrix)
        assert torch.equal(q.cpu().float(), want)
        torch.testing.assert_close(scale.cpu(), torch.full((2 * block,), block**-0.5 / 127))
        x = torch.randn(3, 2 * block)
        torch.testing.assert_close(ops.quantize.rotated(ops.quantize.rotated(x, block), block), x)


def test_odd_rows(device: str) -> None:
    """NaN reaches the scale; subnormal rows store 0."""
    x = torch.ones(4, 16, device=device)
    x[0, 3], x[1], x[2] = torch.nan, 1e-40, 0
    for stored in QUANTIZED:
        q, scale = ops.quantize_per_token(x, dtype=stored)
        assert bool(scale[0].isnan()) and not q[1:3].float().any()
        assert bool((q[3].float() == (127 if stored == torch.int8 else 448)).all())


@relaxed
@given(
    rows=st.integers(0, 5),
    n=st.sampled_from([0, 1, 7, 8, 40, 257]),
    whole=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums(device, rows, n, whole, dtype, with_bias, seed) -> None:
    new = Inputs(device, seed)
    sums = new.normal(2, rows, n, scale=3e4)
    sums = sums.int() if whole else sums
    row, column = new.normal(2, rows).abs() * 0.01, new.normal(n).abs() * 0.01
    bias = new.normal(n, dtype=dtype) if with_bias else None
    got = ops.dequantize_sums(sums, row, column, bias, dtype=dtype)
    exact = sums.double() * row.double()[..., None] * column.double()
    stock = sums.float() * row[..., None] * column
    if bias is not None:
        exact, stock = exact + bias.double(), stock + bias.float()
    assert got.is_contiguous()
    assert_as_accurate(got, stock.to(dtype), exact)


@relaxed
@given(
    rows=st.sampled_from([0, 1, 2, 7, 8, 9, 17, 40]),
    n=st.sampled_from([0, 1, 15, 16, 40, 257]),
    k=st.sampled_from([0, 1, 8, 16, 144, 1000, 4096, 16400]),
    stored=st.sampled_from(QUANTIZED),
    dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    step=st.sampled_from([0, 1, 16]),
    seed=st.integers(0, 99),
)
def test_few_products(device, rows, n, k, stored, dtype, with_bias, step, seed) -> None:
    """Whole numbers: the bits of `dequantize_sums` of exact sums; float8: float32's error. NaN beside what is read."""
    new = Inputs(device, seed)
    x = new.normal(rows, k, scale=60).clamp(-127, 127).to(stored)
    wide = new.normal(n, k + step, scale=60).clamp(-127, 127).to(stored)
    if stored != torch.int8:
        wide[:, k:] = torch.nan
    w = wide[:, :k]
    row, column = new.normal(rows).abs() * 0.01, new.normal(n).abs() * 0.01
    bias = new.normal(n, dtype=dtype) if with_bias else None
    got = ops.scaled_linear(x, row, w, column, bias, dtype=dtype)
    assert got.is_contiguous() and got.dtype == dtype and got.shape == (rows, n)
    assert same_bits(got, ops.scaled_linear(x, row, w, column, bias, dtype=dtype))
    sums = x.double() @ w.double().T
    if stored == torch.int8:
        assert same_bits(got, ops.dequantize_sums(sums.int(), row, column, bias, dtype=dtype))
        return
    scale = row.double()[:, None] * column.double()
    shift = torch.zeros_like(column) if bias is None else bias
    exact = sums * scale + shift.double()
    terms = x.double().abs() @ w.double().abs().T * scale + shift.double().abs()
    info = torch.finfo(dtype)
    assert bool(((got.double() - exact).abs() <= 1e-6 * terms + 0.51 * info.eps * (exact.abs() + info.tiny)).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x.double()}, "x: got float64, needs float32, float16 or bfloat16"),
        ({"x": lambda x: x[0, 0]}, r"x: got shape \[\], needs \[..., K\] with K >= 1"),
        ({"x": lambda x: x[:, :0]}, r"x: got shape \[3, 0\]"),
        ({"factor": lambda f: f[1:]}, r"factor: got shape \[15\]"),
        ({"factor": lambda f: f.half()}, "factor: got float16, needs float32"),
        ({"rotation": lambda _: 12}, "rotation: got 12, needs 0, 8, 16, 32 or 64 that divides K = 16"),
        ({"rotation": lambda _: 32}, "rotation: got 32"),
        ({"dtype": lambda _: torch.uint8}, "dtype: got uint8, needs int8 or float8_e4m3fn"),
    ],
)
def test_rows_refuse(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    args: dict[str, Any] = {"x": new.normal(3, 16), "factor": new.normal(16), "rotation": 0, "dtype": torch.int8}
    args |= {name: edit(args[name]) for name, edit in change.items()}
    with pytest.raises(RuntimeError, match=f"quantize_per_token: {message}"):
        ops.quantize_per_token(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": lambda s: s.long()}, "sums: got int64, needs int32 or float32"),
        ({"sums": lambda s: s.T.contiguous().T}, "sums: got a strided view"),
        ({"row_scale": lambda r: r[1:]}, r"row_scale: got shape \[2\], needs sums' shape without N"),
        ({"row_scale": lambda r: r.half()}, "row_scale: got float16, needs float32"),
        ({"column_scale": lambda c: c[1:]}, r"column_scale: got shape \[15\]"),
        ({"bias": lambda b: b.half()}, "bias: got float16, needs float32"),
        ({"dtype": lambda _: torch.int8}, "dtype: got int8, needs float32, float16 or bfloat16"),
    ],
)
def test_sums_refuse(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    args: dict[str, Any] = {"sums": new.normal(3, 16).int(), "row_scale": new.normal(3), "column_scale": new.normal(16)}
    args |= {"bias": new.normal(16), "dtype": torch.float32}
    for name, edit in change.items():
        value = edit(args[name])
        args[name] = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(RuntimeError, match=f"dequantize_sums: {message}"):
        ops.dequantize_sums(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x.float()}, "x: got float32, needs int8 or float8_e4m3fn"),
        ({"x": lambda x: x.T.contiguous().T}, "x: got a strided view"),
        ({"weight": lambda w: w[:, 1:]}, r"weight: got shape \[5, 15\], needs \[N, K\]"),
        ({"weight": lambda w: w.to(torch.float8_e4m3fn)}, "weight: got float8_e4m3fn"),
        ({"weight": lambda w: w.T.contiguous().T}, "weight: got stride 5 in the last dimension, needs 1"),
        ({"row_scale": lambda r: r[1:]}, r"row_scale: got shape \[2\], needs x's shape without K"),
        ({"column_scale": lambda c: c.half()}, "column_scale: got float16, needs float32"),
        ({"bias": lambda b: b.half()}, "bias: got float16, needs float32"),
        ({"dtype": lambda _: torch.int8}, "dtype: got int8, needs float32, float16 or bfloat16"),
    ],
)
def test_few_products_refuse(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    args: dict[str, Any] = {"x": new.normal(3, 16).to(torch.int8), "weight": new.normal(5, 16).to(torch.int8)}
    args |= {"row_scale": new.normal(3), "column_scale": new.normal(5), "bias": new.normal(5), "dtype": torch.float32}
    args |= {name: edit(args[name]) for name, edit in change.items()}
    with pytest.raises(RuntimeError, match=f"scaled_linear: {message}"):
        ops.scaled_linear(**args)
