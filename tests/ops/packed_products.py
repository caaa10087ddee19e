"""What holds for products with a weight in any packed form, `q4k_linear` and `int8_linear`: PyTorch's own error is the
yardstick, and every bit is the same when called again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, same_bits
from ops.int4_problems import PLAIN
from ops.samples_small import Inputs
from torch import Tensor

# an inherited test runs for each of the classes
relaxed = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


@dataclass
class Weight:
    """A weight [n, k] as arguments of its family's ops."""

    n: int
    k: int
    parts: tuple[Tensor, ...]
    linear: Callable[..., Tensor]  # (x, *parts, bias, residual, activation=)
    dequantize: Callable[..., Tensor]  # (*parts, dtype=)

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return self.linear(x, *self.parts, **options)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(*self.parts, dtype=dtype)


class Products:
    """The tests; a class for each op says what is its own."""

    long: int  # the size whose inputs are as many as a real layer's

    def weight(self, new: Inputs, n: int, size: int, seed: int = 0) -> Weight:
        """A random weight of n outputs; more inputs with a larger size."""
        raise NotImplementedError

    def simple(self, w: Weight, new: Inputs) -> None:
        """Makes a weight's numbers small multiples of 1/2."""
        raise NotImplementedError

    def no_inputs(self, new: Inputs, bias: Tensor) -> Tensor:
        """The product with 40 outputs and no inputs, on 3 rows."""
        raise NotImplementedError

    scales: tuple[int, ...]  # which of a weight's parts [groups, n] are numbers of a group of 32

    @relaxed
    @given(
        seed=st.integers(0, 1000),
        rows=st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 65, 130, 257]),
        n=st.sampled_from([1, 5, 31, 32, 45, 64, 96, 130, 260, 272]),
        size=st.integers(1, 5),
        dtype=st.sampled_from(FLOATS),
        activation=st.sampled_from([*PLAIN]),
        parts=st.sampled_from(["", "bias", "residual", "both"]),
        view=st.sampled_from(["whole", "padded", "every other", "turned"]),
    )
    def test_any_problem(self, device, seed, rows, n, size, dtype, activation, parts, view) -> None:
        """At most twice PyTorch's own error, or one rounding; NaN beside what is read; equal bits when called again."""
        new = Inputs(device, seed)
        w = self.weight(new, n, size, seed)
        step = 2 if view == "every other" else 1
        wide = new.normal(2, rows, (w.k + 3) * step, dtype=dtype)
        wide[..., w.k * step :] = torch.nan
        x = wide[..., : w.k * step : step]
        x = x.transpose(0, 1) if view == "turned" else x.contiguous() if view == "whole" else x
        bias = new.normal(n, dtype=dtype) if parts in ("bias", "both") else None
        residual = new.normal(n, *x.shape[:-1], dtype=dtype).permute(1, 2, 0) if parts in ("residual", "both") else None
        got = w(x, bias=bias, residual=residual, activation=activation)
        assert got.is_contiguous() and got.dtype == dtype and got.shape == (*x.shape[:-1], n)
        assert same_bits(got, w(x, bias=bias, residual=residual, activation=activation))

        def product(x: Tensor, weight: Tensor, *added: Tensor | None) -> Tensor:
            y = PLAIN[activation](F.linear(x, weight, added[0]))
            return y if added[1] is None else y + added[1]

        added = [None if t is None else t.double() for t in (bias, residual)]
        exact = product(x.double(), w.numbers(torch.float32).double(), *added)
        stock = product(x, w.numbers(dtype), bias, residual)
        terms = x.double().abs() @ w.numbers(torch.float32).double().abs().T
        rounding = 0.51 * torch.finfo(dtype).eps * float(exact.abs().max())
        floor = rounding + torch.finfo(torch.float32).eps * float(terms.max())
        mine, own = ((t.double() - exact).abs() for t in (got, stock))
        assert float(mine.max()) <= max(2 * float(own.max()), floor)
        assert float(mine.square().mean().sqrt()) <= max(2 * float(own.square().mean().sqrt()), floor)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("rows", [1, 3, 9, 40])
    def test_many_inputs(self, device: str, dtype: torch.dtype, rows: int) -> None:
        """No worse than PyTorch's own at the length of a real layer: 2x, and no floor."""
        new = Inputs(device)
        w = self.weight(new, 128, self.long)
        x = new.normal(rows, w.k, dtype=dtype)
        exact = x.double() @ w.numbers(torch.float32).double().T
        stock = F.linear(x, w.numbers(dtype))
        got, own = ((t.double() - exact).square().mean().sqrt() for t in (w(x), stock))
        assert float(got) <= 2 * float(own)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_exact_where_sums_are(self, device: str, dtype: torch.dtype) -> None:
        """Whole numbers and scales that are powers of two have exact sums in any order, so every bit is known."""
        new = Inputs(device)
        for rows, n in itertools.product((1, 2, 3, 5, 17, 40, 70, 130), (75, 80)):
            w = self.weight(new, n, 2)
            self.simple(w, new)
            x = (torch.rand(rows, w.k, generator=new.generator) < 0.01).float().to(device, dtype)
            want = x.double() @ w.numbers(torch.float32).double().T
            assert float(want.abs().max()) < 128
            assert torch.equal(w(x).double(), want), (rows, n)

    def test_one_group_off_by_one_shows(self, device: str) -> None:
        new = Inputs(device)
        w = self.weight(new, 40, 2)
        x = torch.ones(3, w.k, device=device)
        before, y = w.numbers(torch.float32), w(x)
        for part in self.scales:
            changed = w.parts[part]
            old = changed.clone()
            changed[2, 17] = changed[2, 17] + 1
            places = (before != w.numbers(torch.float32)).nonzero()
            assert places[:, 0].unique().tolist() == [17]
            assert set(places[:, 1].tolist()) <= set(range(64, 96)) and len(places) > 20
            assert (y != w(x)).any(0).nonzero().flatten().tolist() == [17]
            changed.copy_(old)

    @pytest.mark.parametrize("rows", [4, 12, 40])
    def test_a_row_does_not_depend_on_its_neighbours_values(self, device: str, rows: int) -> None:
        new = Inputs(device)
        w = self.weight(new, 48, 1)
        for dtype in FLOATS:
            x = new.normal(rows, w.k, dtype=dtype)
            other = x.clone()
            other[1:] = torch.nan
            first, second = w(x), w(other)
            assert same_bits(first[0], second[0])
            assert second[1:].isnan().all()

    def test_no_rows_no_inputs_no_outputs(self, device: str) -> None:
        new = Inputs(device)
        w = self.weight(new, 40, 1)
        assert w(new.normal(0, w.k)).shape == (0, 40)
        assert w(new.normal(w.k)).shape == (40,)
        nothing, bias = self.weight(new, 0, 1), new.normal(40)
        assert nothing(new.normal(3, nothing.k)).shape == (3, 0)
        assert torch.equal(self.no_inputs(new, bias), bias.expand(3, 40))

    def test_one_graph_for_any_number_of_rows(self, device: str) -> None:
        """Traced with symbolic sizes, without a graph break, with the bits of the eager call."""
        new = Inputs(device)
        w, counts = self.weight(new, 40, 1), torch._dynamo.testing.CompileCounter()

        @torch.compile(fullgraph=True, dynamic=True, backend=counts)
        def layer(x: Tensor, residual: Tensor) -> Tensor:
            return w.linear(x * 2, *w.parts, residual=residual, activation="silu") + 1

        for rows in (5, 3, 7, 50):  # 5: no other size, which tracing would take for the same
            x, residual = new.normal(rows, 4, w.k), new.normal(rows, 4, 40)
            want = w(x * 2, residual=residual, activation="silu") + 1
            assert same_bits(layer(x, residual), want)
        assert counts.frame_count == 1

    def test_threads_do_not_change_a_bit(self) -> None:
        new = Inputs("cpu")
        w = self.weight(new, 700, 2)
        for rows in (1, 30, 300):
            x = new.normal(rows, w.k, dtype=torch.bfloat16)
            one = w(x)
            torch.set_num_threads(2)
            two = w(x)
            torch.set_num_threads(1)
            assert same_bits(one, two)
