"""`linear` against the reference, with PyTorch's own error as the yardstick."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, assert_as_accurate, same_bits
from ops.samples_small import Inputs

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    terms = float((x.double().abs() @ weight.double().abs().T).max()) if x.numel() and x.dtype == torch.float32 else 0.0
    assert_as_accurate(ops.linear(x, weight, bias), F.linear(x, weight, bias), REFERENCES["linear"](*wide), terms)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_every_number_of_rows(device: str, dtype: torch.dtype, rows: int) -> None:
    new = Inputs(device)
    for n, k in ((1, 1), (15, 576), (64, 192), (33, 31), (17, 72), (33, 8200)):
        weight, bias = new.normal(n, k, dtype=dtype), new.normal(n, dtype=dtype)
        check(new.normal(rows, k, dtype=dtype), weight, bias)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    pad=st.integers(0, 9),
    dtype=st.sampled_from(FLOATS),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(device, rows, n, k, pad, dtype, biased, seed) -> None:
    """Strided rows of x and weight at odd offsets; NaN in the padding beside them must not be read into the result."""
    new = Inputs(device, seed)
    x, weight = new.normal(rows, k + pad, dtype=dtype), new.normal(n, k + pad, dtype=dtype)
    x[:, k:], weight[:, k:] = torch.nan, torch.nan
    check(x[:, :k], weight[:, :k], new.normal(n, dtype=dtype) if biased else None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact_where_sums_are(device: str, dtype: torch.dtype) -> None:
    """Small integers have exact sums in any order, so every bit is known."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (5, 100), generator=generator)
    weight = torch.randint(-2, 3, (37, 100), generator=generator).clamp(-1, 1)
    want = (x @ weight.T).to(device, dtype)
    assert float(want.abs().max()) < 256
    assert same_bits(ops.linear(x.to(device, dtype), weight.to(device, dtype)), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours_values(device: str, dtype: torch.dtype) -> None:
    new = Inputs(device)
    x, weight = new.normal(4, 96, dtype=dtype), new.normal(40, 96, dtype=dtype)
    other = x.clone()
    other[1:] = torch.nan
    assert same_bits(ops.linear(x, weight)[0], ops.linear(other, weight)[0])


def test_leading_dimensions(device: str) -> None:
    new = Inputs(device)
    x, weight = new.normal(2, 3, 4, 24), new.normal(7, 24)
    got = ops.linear(x.transpose(0, 1), weight)
    assert got.shape == (3, 2, 4, 7) and got.is_contiguous()
    torch.testing.assert_close(got, F.linear(x.transpose(0, 1), weight))
    assert ops.linear(x[0, 0, 0], weight).shape == (7,)


def test_refuses_arguments(device: str) -> None:
    x, weight = torch.randn(2, 8, device=device), torch.randn(4, 8, device=device)
    for call, message in (
        (lambda: ops.linear(x, weight[:, :7]), "linear: weight: got shape"),
        (lambda: ops.linear(x, weight.half()), "linear: weight: got float16, needs x's dtype, float32"),
        (lambda: ops.linear(x, weight, torch.randn(3, device=device)), "linear: bias: got shape"),
        (lambda: ops.linear(x.int(), weight), "linear: x: got int32"),
        (lambda: ops.linear(x, weight.T.contiguous().T), "linear: weight: got stride"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
