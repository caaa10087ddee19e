"""Gated activations and bias + activation: at most twice PyTorch's own error."""

from __future__ import annotations

from collections.abc import Callable
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
from torch_pagedkv.ops.activation import ACTIVATIONS

relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

#: float64 forms without the cancellation of 1 + erf and 1 + tanh in the negative tail
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    name: (lambda x, f=f: f(x.double())) for name, f in ACTIVATIONS.items()
} | {
    "gelu": lambda x: x.double() * 0.5 * torch.special.erfc(-x.double() * 0.5**0.5),
    "gelu_tanh": lambda x: (
        x.double() * torch.sigmoid((8 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3))
    ),
}

GATED: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (ops.silu_and_mul, F.silu),
    "gelu": (ops.gelu_and_mul, F.gelu),
    "gelu_tanh": (
        lambda *args: ops.gelu_and_mul(*args, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}


@relaxed
@given(
    kind=st.sampled_from([*GATED]),
    rows=st.integers(0, 4),
    n=st.sampled_from([1, 5, 16, 33, 100, 1536]),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gated(
    device: str, kind: str, rows: int, n: int, dtype: torch.dtype, scale: float, packed: bool, seed: int
) -> None:
    """gate and up apart, or side by side as a fused projection gives them."""
    new = Inputs(device, seed)
    op, plain = GATED[kind]
    rows *= max(1, 128 // n)  # enough elements that PyTorch is not exact in all of them by luck
    both = new.normal(2, rows, 2 * n + 1, dtype=dtype, scale=scale)[..., 1:]
    gate, up = both.chunk(2, -1)
    got = op(both) if packed else op(gate, up)
    assert got.is_contiguous()
    assert_as_accurate(got, plain(gate) * up, EXACT[kind](gate) * up.double())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_act(device: str, name: str, dtype: torch.dtype) -> None:
    new = Inputs(device)
    plain = ACTIVATIONS[name]
    for n, bias in ((1, True), (37, True), (256, False), (3072, True)):
        x = new.normal(5, n, dtype=dtype, scale=3)
        b = new.normal(n, dtype=dtype) if bias else None
        exact = EXACT[name](x.double() if b is None else x.double() + b.double())
        assert_as_accurate(ops.bias_act(x, b, name), plain(x if b is None else x + b), exact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_act_of_many_rows(device: str, dtype: torch.dtype) -> None:
    """The bits of a few rows at a time: dense or inside a wider tensor, with a bias or without."""
    new = Inputs(device)
    wide, bias = new.normal(1027, 4112, dtype=dtype), new.normal(4104, dtype=dtype)
    for x, b in ((wide[:, :4104], bias), (wide[:, 8:].contiguous(), None)):
        pieces = [ops.bias_act(rows, b, "gelu") for rows in x.split(100)]
        assert same_bits(ops.bias_act(x, b, "gelu"), torch.cat(pieces))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_over_the_whole_range(device: str, name: str) -> None:
    """Elementwise, from deep in the negative tail to large values, where one maximum would hide the small ones."""
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.logspace(-30, 4, 2001), -torch.logspace(-30, 4, 2001)])
    x = x.to(device)
    got, own = ops.bias_act(x, None, name).double(), ACTIVATIONS[name](x).double()
    exact = EXACT[name](x)
    # In the negative tail the result is an exponential of about -x^2, whose rounding shows in the result.
    steps = torch.where(x < 0, 4 * (1 + x.double().square()), 3.0) * torch.finfo(torch.float32).eps
    allowed = torch.maximum(2 * (own - exact).abs(), steps * exact.abs()) + 1e-37
    assert bool(((got - exact).abs() <= allowed).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zero_nan_and_infinity(device: str, name: str) -> None:
    """NaN stays, infinity stays, large values do not overflow early, -infinity gives what the formula gives."""
    x = torch.tensor([torch.nan, torch.inf, 0.0, -0.0, 3e38, -3e38, -torch.inf] * 5, device=device)
    got, exact = ops.bias_act(x, None, name), EXACT[name](x).float()
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got.nan_to_num(7.0), exact.nan_to_num(7.0))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_16_bits(device: str, name: str, dtype: torch.dtype) -> None:
    """Within a little over the last rounding, elementwise, where PyTorch's own may be further off; NaN and infinity."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    got, exact = ops.bias_act(x, None, name), EXACT[name](x.double())
    assert torch.equal(got.isnan(), exact.to(dtype).isnan())
    numbers = exact.isfinite() & x.isfinite()
    got, want, own = got[numbers].double(), exact[numbers], ACTIVATIONS[name](x[numbers]).double()
    tiny = torch.finfo(dtype).smallest_normal
    step = torch.finfo(dtype).eps * want.abs().clamp_min(tiny)
    # A GPU's approximate quotient is 0 where its divisor is over 2^126: results of 1e-36 and less.
    allowed = torch.maximum(2 * (own - want).abs(), 0.55 * step) + 2e-36
    large = got.isinf() & (want.abs() > 0.99 * torch.finfo(dtype).max)
    assert bool((((got - want).abs() <= allowed) | large).all())


def test_any_strides_and_threads(device: str) -> None:
    new = Inputs(device)
    gate, up = new.normal(6, 50, 700), new.normal(50, 6, 700).transpose(0, 1)
    want = ops.silu_and_mul(gate.contiguous(), up.contiguous())
    assert same_bits(ops.silu_and_mul(gate, up), want)
    for view in (gate[:, ::3], gate[..., ::2], gate.permute(2, 1, 0), gate[:1].expand(4, 50, 700), gate[0, 0]):
        assert same_bits(ops.gelu_and_mul(view, view), ops.gelu_and_mul(view.contiguous(), view.contiguous()))
        assert same_bits(ops.bias_act(view, None, "silu"), ops.bias_act(view.contiguous(), None, "silu"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.silu_and_mul(x.double(), x.double()), "silu_and_mul: gate: got float64"),
        (lambda x: ops.silu_and_mul(x, x[:1]), r"silu_and_mul: up: got shape \[1, 8\], needs gate's shape, \[3, 8\]"),
        (lambda x: ops.silu_and_mul(x, x.half()), "silu_and_mul: up: got float16, needs gate's dtype, float32"),
        (lambda x: ops.gelu_and_mul(x, x, approximate="fast"), 'approximate: got "fast", needs "none" or "tanh"'),
        (lambda x: ops.bias_act(x, None, "swish"), 'bias_act: activation: got "swish", needs one of none, relu'),
        (lambda x: ops.bias_act(x, x[0, :3], "relu"), r"bias_act: bias: got shape \[3\]"),
        (lambda x: ops.bias_act(x, x[0].half(), "relu"), "bias_act: bias: got float16"),
    ],
)
def test_refuses(device: str, call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(Inputs(device).normal(3, 8))


def test_refuses_an_odd_packed_width() -> None:
    with pytest.raises(ValueError, match="packed last dimension of 7, needs an even one"):
        ops.silu_and_mul(torch.zeros(2, 7))
