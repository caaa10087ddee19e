"""RMSNorm and LayerNorm: at most twice PyTorch's own error, and the rounding of the models they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, assert_as_accurate, same_bits
from ops.samples_small import Inputs
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES

relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
WIDTHS = st.sampled_from([1, 2, 7, 16, 31, 33, 64, 129, 576, 1000, 4096])


def stock_rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> Tensor:
    """The formula of HuggingFace's Llama (round_first) and Gemma models."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if round_first:
        return (weight * y.to(x.dtype)).to(x.dtype)
    return (y * (offset + weight.float())).to(x.dtype)


@relaxed
@given(
    rows=st.integers(0, 4),
    n=WIDTHS,
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(["none", "same", "float32"]),
    offset=st.sampled_from([0.0, 1.0]),
    round_first=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rms_norm(
    device: str,
    rows: int,
    n: int,
    dtype: torch.dtype,
    weight_dtype: str,
    offset: float,
    round_first: bool,
    scale: float,
    residual: bool,
    seed: int,
) -> None:
    """With and without a residual, rows of a wider tensor at an odd offset."""
    if weight_dtype == "none" or round_first:
        offset = 0.0
    new = Inputs(device, seed)
    x, y = (new.normal(rows, 2, n + 3, dtype=dtype, scale=scale)[..., 1 : n + 1] for _ in range(2))
    weight = None if weight_dtype == "none" else new.normal(n, dtype=dtype if weight_dtype == "same" else torch.float32)
    keywords: dict[str, Any] = {"weight_offset": offset, "round_before_weight": round_first}
    if residual:
        got, h = ops.add_rms_norm(x, y, weight, 1e-5, **keywords)
        assert same_bits(h, x + y)
    else:
        got, h = ops.rms_norm(x, weight, 1e-5, **keywords), x
    assert got.is_contiguous()
    own = stock_rms_norm(h, weight, 1e-5, offset, round_first)
    exact = h.double() * torch.rsqrt(h.double().square().mean(-1, keepdim=True) + 1e-5)
    if weight is not None:
        exact = exact * (weight.double() + offset)
    assert_as_accurate(got, own, exact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_rounds_as_the_model(device: str, dtype: torch.dtype) -> None:
    """Nearly all elements have the bits of Llama's and Gemma's formula; the sum's order leaves some one step off."""
    new = Inputs(device)
    x, weight = new.normal(64, 576, dtype=dtype), new.normal(576, dtype=dtype)
    for offset, round_first in ((0.0, True), (1.0, False)):
        got = ops.rms_norm(x, weight, 1e-5, weight_offset=offset, round_before_weight=round_first)
        own = stock_rms_norm(x, weight, 1e-5, offset, round_first)
        assert float((got == own).double().mean()) > (0.5 if dtype == torch.float32 else 0.99)
        step = torch.finfo(dtype).eps * own.double().abs()
        assert bool(((got.double() - own.double()).abs() <= (4 if dtype == torch.float32 else 1) * step).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_before_weight_is_exact(device: str, dtype: torch.dtype) -> None:
    """With the reciprocal root exactly 1, only the two roundings are left: they must be the reference's bits."""
    new = Inputs(device)
    x = torch.sign(new.normal(4, 96)).to(dtype)
    weight = new.normal(96)
    for round_first in (False, True):
        got = ops.rms_norm(x, weight, 0.0, round_before_weight=round_first)
        assert same_bits(got, REFERENCES["rms_norm"](x, weight, 0.0, 0.0, round_first))


@relaxed
@given(
    rows=st.integers(0, 4),
    n=WIDTHS,
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(["none", "same", "float32"]),
    bias=st.booleans(),
    mean=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_layer_norm(
    device: str, rows: int, n: int, dtype: torch.dtype, weight_dtype: str, bias: bool, mean: float, seed: int
) -> None:
    new = Inputs(device, seed)
    x = (new.normal(2, rows, n, dtype=dtype) + mean).transpose(0, 1)
    other = dtype if weight_dtype == "same" else torch.float32
    weight = None if weight_dtype == "none" else new.normal(n, dtype=other)
    shift = new.normal(n, dtype=other) if bias else None
    got = ops.layer_norm(x, weight, shift, 1e-5)
    wide = [None if t is None else t.double() for t in (x, weight, shift)]
    exact = F.layer_norm(wide[0], (n,), wide[1], wide[2], 1e-5)
    own = F.layer_norm(x.float(), (n,), *(None if t is None else t.float() for t in (weight, shift)), 1e-5).to(dtype)
    assert_as_accurate(got, own, exact)


def test_layer_norm_with_a_large_mean(device: str) -> None:
    """A mean 10,000 times the deviation costs no digits."""
    x = Inputs(device).normal(8, 1024) + 1e4
    exact = F.layer_norm(x.double(), (1024,))
    assert_as_accurate(ops.layer_norm(x, None, None, 1e-5), F.layer_norm(x, (1024,)), exact)
    assert float((ops.layer_norm(x, None, None, 1e-5).double() - exact).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [256, 4096])
def test_layer_norm_of_rows_that_begin_far_from_their_mean(device: str, dtype: torch.dtype, n: int) -> None:
    """Outliers in the first places, alone or several, and equal entries, whose deviation is 0."""
    x = Inputs(device).normal(8, n, dtype=dtype)
    for row, count in enumerate((1, 4, 8, 64)):
        x[row, :count] = 1e4
    x[4, 0], x[5, :8], x[6], x[7] = -6e4, -3e4, 1000.0, 1000.0
    x[7, 0] = 0.0
    exact = F.layer_norm(x.double(), (n,))
    assert_as_accurate(ops.layer_norm(x, None, None, 1e-5), F.layer_norm(x.float(), (n,)).to(dtype), exact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows(device: str, dtype: torch.dtype) -> None:
    """The bits of a few rows at a time."""
    new = Inputs(device)
    x, y = (new.normal(3100, 4096, dtype=dtype) for _ in range(2))
    weight, bias = new.normal(4096, dtype=dtype), new.normal(4096, dtype=dtype)
    pieces = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 3100, 100)]
    assert same_bits(ops.rms_norm(x, weight, 1e-5), torch.cat([ops.rms_norm(a, weight, 1e-5) for a, _ in pieces]))
    norms = [ops.layer_norm(a, weight, bias, 1e-5) for a, _ in pieces]
    assert same_bits(ops.layer_norm(x, weight, bias, 1e-5), torch.cat(norms))
    sums = zip(*(ops.add_rms_norm(a, b, weight, 1e-5) for a, b in pieces))
    assert all(map(same_bits, ops.add_rms_norm(x, y, weight, 1e-5), map(torch.cat, sums)))


def test_any_strides(device: str) -> None:
    """Dimensions in any order, also with a last one that is not dense."""
    new = Inputs(device)
    x, weight = new.normal(4, 6, 5, 24), new.normal(24)
    for view in (x.permute(2, 0, 1, 3), x[::2, 1::2], x[:, :1].expand(4, 3, 5, 24), x[..., ::2], x[0, 0, 0]):
        w = weight[: view.shape[-1]]
        assert same_bits(ops.rms_norm(view, w, 1e-5), ops.rms_norm(view.contiguous(), w, 1e-5))
        assert same_bits(ops.layer_norm(view, w, w, 1e-5), ops.layer_norm(view.contiguous(), w, w, 1e-5))
        for a, b in zip(ops.add_rms_norm(view, view, w, 1e-5), ops.add_rms_norm(*[view.contiguous()] * 2, w, 1e-5)):
            assert same_bits(a, b)


def test_many_rows_on_all_threads(device: str) -> None:
    new = Inputs(device)
    x, weight = new.normal(3000, 96), new.normal(96)
    got = ops.rms_norm(x, weight, 1e-5)
    assert same_bits(got, torch.cat([ops.rms_norm(part, weight, 1e-5) for part in x.split(100)]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_does_not_depend_on_the_batch(device: str, dtype: torch.dtype) -> None:
    """The same bits alone and among many rows, of which a GPU's lanes hold several if they are short; at every width
    that the kernels are made for."""
    new = Inputs(device)
    for n in (8, 64, 136, 256, 264, 576, 1024, 2304, 4096, 5120, 8200, 16384):
        lanes = 1 << ((n - 1) // 8).bit_length()
        rows = 20 if n > 256 or device == "cpu" else (1 << 18) // lanes + 5
        x, y = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
        weight, bias = new.normal(n, dtype=dtype), new.normal(n)

        def norms(some: slice, x: Tensor = x, y: Tensor = y, w: Tensor = weight, b: Tensor = bias) -> list[Tensor]:
            x, y = x[some], y[some]
            both = ops.add_rms_norm(x, y, w, 1e-5, round_before_weight=True)
            return [*both, ops.rms_norm(x, b, 1e-5, weight_offset=1.0), ops.layer_norm(x, w, b, 1e-5)]

        whole = norms(slice(None))
        for i in (0, rows // 2, rows - 1):
            for a, b in zip(whole, norms(slice(i, i + 1)), strict=True):
                assert same_bits(a[i : i + 1], b)
        exact = F.layer_norm(x.double(), (n,), weight.double(), bias.double(), 1e-5)
        own = F.layer_norm(x.float(), (n,), weight.float(), bias, 1e-5).to(dtype)
        assert_as_accurate(whole[3], own, exact)


def test_zeros_nan_and_infinity(device: str) -> None:
    x = torch.zeros(3, 20, device=device)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    y = ops.rms_norm(x, None, 1e-5)
    assert torch.equal(y[0], x[0])
    assert bool(y[1].isnan().all())
    assert bool(y[2, 4].isnan())
    assert torch.equal(ops.layer_norm(x[:1], None, None, 1e-5), x[:1])
    assert bool(ops.layer_norm(x[1:], None, None, 1e-5).isnan().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.rms_norm(x.double(), w, 1e-5), "rms_norm: x: got float64"),
        (lambda x, w: ops.rms_norm(x, w[:4], 1e-5), r"rms_norm: weight: got shape \[4\], needs \[N\] \(8\)"),
        (lambda x, w: ops.rms_norm(x, w.half(), 1e-5), "rms_norm: weight: got float16, needs x's dtype, float32"),
        (lambda x, w: ops.rms_norm(x, w, -1.0), "rms_norm: eps: got -1, needs 0 or more"),
        (lambda x, w: ops.rms_norm(x[:, :0], None, 1e-5), r"rms_norm: x: got shape \[3, 0\]"),
        (lambda x, w: ops.rms_norm(x.sum(), None, 1e-5), r"rms_norm: x: got shape \[\]"),
        (lambda x, w: ops.add_rms_norm(x, x[:1], w, 1e-5), r"add_rms_norm: residual: got shape \[1, 8\], needs x's"),
        (lambda x, w: ops.add_rms_norm(x, x.half(), w, 1e-5), "add_rms_norm: residual: got float16"),
        (lambda x, w: ops.layer_norm(x, w, w[:3], 1e-5), "layer_norm: bias: got shape"),
        (lambda x, w: ops.layer_norm(x, w.repeat(2)[::2], w, 1e-5), "layer_norm: weight: got stride 2"),
    ],
)
def test_refuses(device: str, call: Any, message: str) -> None:
    new = Inputs(device)
    with pytest.raises(RuntimeError, match=message):
        call(new.normal(3, 8), new.normal(8))
