"""4-bit weights: packing and dequantising bit for bit, the product with PyTorch's own error as the yardstick."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, same_bits
from ops.int4_problems import Problem, check, dequantize, linear
from ops.samples_small import INT4_KINDS, Inputs, Int4
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def unpack(w: Int4, inputs: int, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
    """`int4_dequantize` of a weight packed by `int4_repack`."""
    packed = ops.int4_repack(w.q) if packed is None else packed
    numbers = w.numbers
    return ops.int4_dequantize(packed, *numbers, w.perm, group_size=w.group_size, in_features=inputs, dtype=dtype)


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 32), (33, 40), (70, 129)])
def test_layout(device: str, n: int, k: int) -> None:
    """Every nibble where the description of the layout has it; what pads is q = 8."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    packed = ops.int4_repack(q.to(device)).cpu()
    assert packed.dtype == torch.int32
    assert packed.shape == (-(-n // 32), 4 * -(-k // 32), 32)
    shift = {0: 0, 2: 4, 4: 8, 6: 12, 1: 16, 3: 20, 5: 24, 7: 28}
    words = packed.tolist()
    for output in range(packed.shape[0] * 32):
        for k_in in range(packed.shape[1] * 8):
            nibble = words[output // 32][k_in // 8][output % 32] >> shift[k_in % 8] & 15
            signed = nibble - 16 if nibble > 7 else nibble
            assert signed + 8 == (int(q[output, k_in]) if output < n and k_in < k else 8)


def test_repack_takes_views(device: str) -> None:
    q = torch.randint(0, 16, (70, 90), dtype=torch.uint8, device=device)
    assert same_bits(ops.int4_repack(q.T), ops.int4_repack(q.T.contiguous()))
    assert same_bits(ops.int4_repack(q[3:, 5:80:2]), REFERENCES["int4_repack"](q[3:, 5:80:2]))
    assert ops.int4_repack(q[:0]).shape == (0, 12, 32)


# ---- dequantising ----------------------------------------------------------------------------------------------------


@relaxed
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    group=st.sampled_from([32, 64, 96, 128, 1 << 20]),
    kind=st.sampled_from(INT4_KINDS),
    scales=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    ordered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dequantize_bit_for_bit(device, n, k, group, kind, scales, dtype, ordered, seed) -> None:
    w = Inputs(device, seed).int4(n, k, group, kind, scales, ordered)
    assert same_bits(unpack(w, k, dtype), dequantize(w, k, dtype))


@pytest.mark.parametrize("kind", ["zeros", "offsets"])
def test_one_zero_off_by_one_shows(device: str, kind: str) -> None:
    """In one group of one output, and nowhere else: by one scale, exactly; in the product too."""
    w = Inputs(device).int4(40, 200, 64, kind, torch.float16)
    before = unpack(w, 200, torch.float32)
    x = torch.ones(3, 200, dtype=torch.bfloat16, device=device)
    y = linear(x, w)
    if w.zeros is not None:
        w.zeros[2, 17] += 1
    if w.offsets is not None:
        w.offsets[2, 17] *= 2
    after = unpack(w, 200, torch.float32)
    changed = (before != after).nonzero()
    assert changed[:, 0].unique().tolist() == [17]
    assert changed[:, 1].tolist() == list(range(128, 192))
    if kind == "zeros":
        assert torch.equal(before[17, 128:192] - w.scales[2, 17].float(), after[17, 128:192])
    other = linear(x, w)
    assert (y != other).any(0).nonzero().flatten().tolist() == [17]


def test_inputs_that_nothing_points_to_are_zero(device: str) -> None:
    w = Inputs(device).int4(5, 32, 32, "symmetric", torch.float32)
    w.perm = torch.full((32,), -1, dtype=torch.int32, device=device)
    w.perm[3] = 40
    got = unpack(w, 50, torch.float32)
    assert torch.equal(got[:, 40], w.scales[0] * (w.q[:, 3].float() - 8))
    got[:, 40] = 0
    assert not got.any()


# ---- the product -----------------------------------------------------------------------------------------------------


@relaxed
@given(seed=st.integers(0, 1 << 30))
def test_any_problem(device: str, seed: int) -> None:
    check(device, seed)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: str) -> None:
    script = Path(__file__).with_name("int4_problems.py")
    command = [sys.executable, str(script), "--cases", "60", "--seed", "7000"]
    result = subprocess.run(command, env=os.environ | {"PAGEDKV_SIMD": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    if f"on {isa}:" not in result.stdout:
        pytest.skip(f"this CPU has no {isa}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", INT4_KINDS)
def test_exact_where_sums_are(device: str, dtype: torch.dtype, kind: str) -> None:
    """Whole numbers and scales that are powers of two have exact sums in any order, so every bit is known."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 17, 40, 70):
        n, k, group = 75, 200, 64
        w = Inputs(device, rows).int4(n, k, group, kind, torch.float16)
        w.scales = torch.ones_like(w.scales)
        w.scales[1] = 0.5
        if w.offsets is not None:
            w.offsets = torch.randint(-9, 2, w.offsets.shape, generator=generator).to(device, torch.float16)
        x = (torch.rand(rows, k, generator=generator) < 0.02).float().to(device, dtype)
        got = linear(x, w)
        want = x.double() @ dequantize(w, k, torch.float32).double().T
        assert float(want.abs().max()) < 128
        assert torch.equal(got.double(), want), rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9, 40, 130])
def test_many_inputs(device: str, dtype: torch.dtype, rows: int) -> None:
    """No worse than PyTorch's own at the length of a real layer: 2x, and no floor."""
    new = Inputs(device)
    for kind in INT4_KINDS:
        problem = Problem(new.normal(rows, 4096, dtype=dtype), new.int4(256, 4096, 128, kind, torch.float16))
        exact = problem.exact()
        got, own = ((t.double() - exact).square().mean().sqrt() for t in (problem.run(), problem.stock()))
        assert float(got) <= 2 * float(own)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [4, 12])
def test_a_row_does_not_depend_on_its_neighbours_values(device: str, dtype: torch.dtype, rows: int) -> None:
    new = Inputs(device)
    w = new.int4(40, 96, 32, "zeros", torch.float16)
    x = new.normal(rows, 96, dtype=dtype)
    other = x.clone()
    other[1:] = torch.nan
    first, second = linear(x, w), linear(other, w)
    assert same_bits(first[0], second[0])
    assert second[1:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(4096, 4096, 128), (1040, 2144, 32), (14336, 1024, 1 << 20), (10240, 14336, 32), (28672, 4096, 128)],
)
def test_a_layer_on_a_gpu(dtype: torch.dtype, n: int, k: int, group: int) -> None:
    """Sizes of real layers, whose sums several thread blocks have parts of: right, and the same bits again."""
    new = Inputs("cuda")
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    packed, groups = ops.int4_repack(q), -(-k // group)
    scales = (torch.rand(groups, n, device="cuda") * 0.01 + 0.005).to(torch.float16 if n == 4096 else dtype)
    zeros = torch.randint(0, 16, (groups, n), dtype=torch.uint8, device="cuda")
    by_group = torch.arange(k, device="cuda") // group
    weight = (q.double() - zeros[by_group].T) * scales[by_group].T.double()
    for rows in (1, 8, 16, 17, 32, 33, 64, 65, 200, 640, 1030):
        x, bias = new.normal(rows, k, dtype=dtype), new.normal(n, dtype=dtype)
        args = (x, packed, scales, zeros)
        got = ops.int4_linear(*args, bias=bias, group_size=group, in_features=k, activation="silu")
        exact = F.silu(x.double() @ weight.T + bias.double())
        own = F.silu(F.linear(x, weight.to(dtype), bias)).double() - exact
        error = got.double() - exact
        assert float(error.square().mean()) <= 4 * float(own.square().mean()), rows
        assert float(error.abs().max()) <= 2 * float(own.abs().max()), rows
        again = ops.int4_linear(*args, bias=bias, group_size=group, in_features=k, activation="silu")
        assert same_bits(got, again), rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "k", "group"),
    [
        (256, 6144, 4096, 128),  # tiles that two CTAs have a half of K of each
        (250, 4112, 4128, 32),
        (129, 3600, 1056, 96),
        (512, 576, 576, 64),
        (511, 592, 1536, 1 << 20),
        (1024, 6144, 1600, 64),  # whole tiles first, whose CTAs share x
        (1000, 6160, 320, 32),
        (512, 4096, 512, 128),
        (256, 4096, 6176, 32),  # K in parts that are added up by another kernel
        (512, 192, 576, 64),
    ],
)
def test_many_rows_on_a_gpu(dtype: torch.dtype, rows: int, n: int, k: int, group: int) -> None:
    """All ways to cut a product up, with all that may follow it."""
    new = Inputs("cuda")
    for scales in FLOATS[1:]:
        weight = new.int4(n, k, group, "zeros", scales)
        x, bias, residual = (new.normal(*s, dtype=dtype) for s in ((rows, k), (n,), (rows, n)))
        for problem in (Problem(x, weight), Problem(x, weight, bias, residual, "gelu")):
            got = problem.run()
            assert all(same_bits(problem.run(), got) for _ in range(5))
            assert problem.excess() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 12, 40, 300])
def test_kernels_that_overlap(rows: int) -> None:
    """Inputs and weights that the kernels in front have just written, in a graph and out of it."""
    new = Inputs("cuda")
    w = new.int4(512, 512, 64, "zeros", torch.float16)
    q, x, start = w.q.clone(), new.normal(rows, 512, dtype=torch.float16), new.normal(512, 512, dtype=torch.float16)
    scales, zeros = w.scales * 0.1, w.zeros

    def chain() -> Tensor:
        y = x
        for turn in range(20):
            packed = torch.ops.torch_pagedkv.int4_repack(q ^ (turn % 16))  # without a look at q by the host
            y = ops.int4_linear(y, packed, scales * (1 + turn % 3), zeros, group_size=64, in_features=512)
            y = (y + start[turn]).clamp(-4, 4)
        return y

    want = x
    for turn in range(20):
        packed = ops.int4_repack(q ^ (turn % 16))
        factors = scales * (1 + turn % 3)
        torch.cuda.synchronize()
        want = ops.int4_linear(want, packed, factors, zeros, group_size=64, in_features=512)
        torch.cuda.synchronize()
        want = (want + start[turn]).clamp(-4, 4)
    assert same_bits(chain(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(3):
        got.fill_(torch.nan)
        graph.replay()
        assert same_bits(got, want)


def test_threads_do_not_change_a_bit() -> None:
    new = Inputs("cpu")
    w = new.int4(700, 300, 64, "zeros", torch.float16, ordered=False)
    for rows in (1, 30, 300):
        x = new.normal(rows, 300, dtype=torch.bfloat16)
        one = linear(x, w)
        torch.set_num_threads(2)
        two = linear(x, w)
        torch.set_num_threads(1)
        assert same_bits(one, two)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_rows_no_inputs_no_outputs(device: str, dtype: torch.dtype) -> None:
    new = Inputs(device)
    w, x = new.int4(40, 96, 32, "zeros", dtype), new.normal(0, 96, dtype=dtype)
    assert linear(x, w).shape == (0, 40)
    assert linear(new.normal(96, dtype=dtype), w).shape == (40,)
    bias = new.normal(40, dtype=dtype)
    nothing = ops.int4_repack(torch.empty(40, 0, dtype=torch.uint8, device=device))
    scales = torch.empty(0, 40, dtype=dtype, device=device)
    got = ops.int4_linear(new.normal(3, 0, dtype=dtype), nothing, scales, bias=bias, group_size=32, in_features=0)
    assert torch.equal(got, bias.expand(3, 40))
    nothing = ops.int4_repack(torch.empty(0, 96, dtype=torch.uint8, device=device))
    scales = torch.empty(3, 0, dtype=dtype, device=device)
    x = new.normal(3, 96, dtype=dtype)
    assert ops.int4_linear(x, nothing, scales, group_size=32, in_features=96).shape == (3, 0)


def test_one_group(device: str) -> None:
    """group_size -1 is K, of whatever length."""
    new = Inputs(device)
    for ordered in (True, False):
        w = new.int4(40, 77, 1 << 20, "zeros", torch.float16, ordered)
        x = new.normal(3, 77)
        args = (x, w.packed, *w.numbers, w.perm)
        want = linear(x, w)
        assert same_bits(ops.int4_linear(*args, group_size=-1, in_features=77), want)
        assert same_bits(ops.int4_linear(*args, group_size=4096, in_features=77), want)
        assert same_bits(
            ops.int4_dequantize(*args[1:], group_size=-1, in_features=77, dtype=torch.float16),
            dequantize(w, 77, torch.float16),
        )


def test_one_graph_for_any_number_of_rows(device: str) -> None:
    """Traced with symbolic sizes, without a graph break, with the bits of the eager call."""
    new = Inputs(device)
    w = new.int4(40, 96, 32, "zeros", torch.float16)
    packed, counts = w.packed, torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counts)
    def layer(x: Tensor, residual: Tensor) -> Tensor:
        return linear(x * 2, w, packed, residual=residual, activation="silu") + 1

    for rows in (5, 3, 7, 50):  # 5: no other size, which tracing would take for the same
        x, residual = new.normal(rows, 4, 96), new.normal(rows, 4, 40)
        want = linear(x * 2, w, packed, residual=residual, activation="silu") + 1
        assert same_bits(layer(x, residual), want)
    assert counts.frame_count == 1


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x.double()}, "x: got float64, needs float32, float16 or bfloat16"),
        ({"x": lambda x: x[0, 0]}, r"x: got shape \[\], needs \[..., in_features\] with in_features = 96"),
        ({"x": lambda x: x[:, :95]}, r"x: got shape \[3, 95\], needs \[..., in_features\] with in_features = 96"),
        ({"in_features": lambda _: 95}, r"x: got shape \[3, 96\]"),
        ({"packed": lambda p: p[:1]}, r"packed: got shape \[1, 12, 32\], needs int4_repack's \[.*\] \(2, 12, 32\)"),
        ({"packed": lambda p: p[:, :-1]}, r"packed: got shape \[2, 11, 32\]"),
        ({"packed": lambda p: p.long()}, "packed: got int64, needs int32"),
        ({"packed": lambda p: p.flatten()}, r"packed: got shape \[768\]"),
        ({"packed": lambda p: p.transpose(0, 1).contiguous().transpose(0, 1)}, "packed: got a strided view"),
        ({"scales": lambda s: s.int()}, "scales: got int32, needs float32, float16 or bfloat16"),
        ({"scales": lambda s: s[:1]}, r"scales: got shape \[1, 40\]"),
        ({"scales": lambda s: s[0]}, r"scales: got shape \[40\]"),
        ({"scales": lambda s: s.T.contiguous().T}, "scales: got a strided view"),
        ({"zeros": lambda z: z.int()}, "zeros: got int32, needs uint8"),
        ({"zeros": lambda z: z[:, :3]}, r"zeros: got shape \[2, 3\], needs scales' shape \(2, 40\)"),
        ({"offsets": lambda _: torch.zeros(2, 40)}, "offsets: got a tensor, needs None with zeros"),
        ({"zeros": lambda _: None, "offsets": lambda _: torch.zeros(2, 40).half()}, "offsets: got float16"),
        ({"perm": lambda _: torch.arange(96)}, "perm: got int64, needs int32"),
        ({"perm": lambda _: torch.zeros(2, 48, dtype=torch.int32)}, r"perm: got shape \[2, 48\]"),
        ({"bias": lambda _: torch.zeros(39)}, r"bias: got shape \[39\]"),
        ({"bias": lambda _: torch.zeros(40).half()}, "bias: got float16, needs float32"),
        ({"residual": lambda _: torch.zeros(3, 41)}, r"residual: got shape \[3, 41\], needs the result's shape"),
        ({"residual": lambda _: torch.zeros(40)}, r"residual: got shape \[40\]"),
        ({"residual": lambda _: torch.zeros(3, 40).half()}, "residual: got float16, needs x's dtype, float32"),
        ({"group_size": lambda _: 48}, "group_size: got 48, needs a multiple of 32, or K = 96 for one group"),
        ({"group_size": lambda _: 0}, "group_size: got 0"),
        ({"group_size": lambda _: 32}, r"scales: got shape \[2, 40\]"),
        ({"activation": lambda _: "relu"}, 'activation: got "relu", needs one of none, silu, gelu, gelu_tanh'),
    ],
)
def test_refuses(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    w = new.int4(40, 96, 64, "zeros", torch.float32)
    args: dict[str, Any] = {"x": new.normal(3, 96), "packed": w.packed, "scales": w.scales, "zeros": w.zeros}
    args |= {"group_size": 64, "in_features": 96}
    for name, edit in change.items():
        value = edit(args.get(name))
        args[name] = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(RuntimeError, match=f"int4_linear: ({message})"):
        ops.int4_linear(**args)


def test_refuses_numbers_out_of_range(device: str) -> None:
    q = torch.full((3, 4), 15, dtype=torch.uint8, device=device)
    ops.int4_repack(q)
    q[1, 2] = 16
    with pytest.raises(ValueError, match=r"int4_repack: q: got 16, needs 0\.\.15"):
        ops.int4_repack(q)
    with pytest.raises(RuntimeError, match="int4_repack: q: got int8, needs uint8"):
        ops.int4_repack(q.to(torch.int8))
    with pytest.raises(RuntimeError, match=r"int4_repack: q: got shape \[3\]"):
        ops.int4_repack(q[:, 0])


def test_dequantize_refuses(device: str) -> None:
    w = Inputs(device).int4(40, 96, 64, "zeros", torch.float32)
    args = (w.packed, w.scales, w.zeros)
    with pytest.raises(RuntimeError, match="int4_dequantize: dtype: got int32"):
        ops.int4_dequantize(*args, group_size=64, in_features=96, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="int4_dequantize: packed: got shape"):
        ops.int4_dequantize(*args, group_size=64, in_features=97, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="int4_dequantize: in_features: got -3"):
        ops.int4_dequantize(*args, group_size=64, in_features=-3, dtype=torch.float32)


def test_a_cpu_refuses_inputs_that_are_not_there() -> None:
    w = Inputs("cpu").int4(40, 96, 32, "symmetric", torch.float32)
    x = torch.randn(3, 96)
    for wrong in (96, -2):
        perm = torch.arange(96, dtype=torch.int32)
        perm[7] = wrong
        with pytest.raises(RuntimeError, match=f"int4_linear: perm: got index {wrong} at 7, needs -1 .* < 96"):
            ops.int4_linear(x, w.packed, w.scales, perm=perm, group_size=32, in_features=96)
        with pytest.raises(RuntimeError, match=f"int4_dequantize: perm: got index {wrong} at 7"):
            ops.int4_dequantize(w.packed, w.scales, perm=perm, group_size=32, in_features=96, dtype=torch.float32)


def test_one_step_of_a_layer() -> None:
    """What a quantised layer is: q from rounding a real weight, the product near that of the weight."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256) * 0.05, torch.randn(5, 256)
    groups = weight.view(96, 4, 64)
    scales = (groups.amax(-1) - groups.amin(-1)) / 15
    zeros = (-groups.amin(-1) / scales).round().clamp(0, 15)
    q = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    packed = ops.int4_repack(q.view(96, 256).to(torch.uint8))
    numbers = scales.T.contiguous(), zeros.T.contiguous().to(torch.uint8)
    got = ops.int4_linear(x, packed, *numbers, group_size=64, in_features=256)
    want = F.linear(x, weight)
    assert float((got - want).norm() / want.norm()) < 0.12
