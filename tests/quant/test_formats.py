"""Checkpoint formats to and from the logical and the packed form, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import writers
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.quant.formats import FORMATS, FormatError, Int4Weight, Scheme, read, unpacked, write


def _dequantized(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    form = weight.packed()
    return ops.int4_dequantize(
        form.packed,
        form.scales,
        form.zeros,
        form.offsets,
        form.perm,
        group_size=form.run,
        in_features=weight.q.shape[1],
        dtype=dtype,
    )


def _written(name: str, layer: writers.Layer, symmetric: bool, act_order: bool) -> dict[str, Tensor]:
    if name == "pack-quantized":
        return writers.compressed(layer, symmetric, act_order)
    return writers.WRITERS[name](layer)


KINDS = ("zeros", "symmetric", "act_order")
CASES = [(name, kind) for name in FORMATS for kind in KINDS if (name, kind) != ("awq", "act_order")]


@pytest.mark.parametrize("name, kind", CASES)
@pytest.mark.parametrize("group", [32, 64, 128, -1, 16, 48])
@pytest.mark.parametrize("shape", [(32, 256), (40, 320), (13, 77), (8, 24)])
def test_bits(name: str, group: int, kind: str, shape: tuple[int, int]) -> None:
    n, k = shape
    act_order = kind == "act_order"
    layer = writers.random_layer(n, k, group, seed=group + n, symmetric=kind == "symmetric", act_order=act_order)
    scheme = Scheme(group, kind == "symmetric", act_order)
    tensors = _written(name, layer, scheme.symmetric, act_order)
    weight = read(FORMATS[name], tensors, n, k, scheme)
    assert np.array_equal(weight.q.numpy(), layer.q)
    want = layer.dense()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(_dequantized(weight, dtype), want.float().to(dtype))
    # and back
    form = weight.packed()
    again = unpacked(
        form.packed,
        form.scales,
        form.zeros,
        form.offsets,
        form.perm,
        form.g_idx,
        run=form.run,
        group_size=weight.group_size,
        in_features=k,
    )
    back = write(FORMATS[name], again, scheme)
    assert back.keys() >= tensors.keys() - {"weight_g_idx"}
    for leaf, tensor in back.items():
        if leaf == "weight_g_idx" and leaf not in tensors:
            continue
        assert tensor.dtype == tensors[leaf].dtype
        assert torch.equal(tensor, tensors[leaf]), leaf


@pytest.mark.parametrize("name", FORMATS)
def test_one_zero_off_is_seen(name: str) -> None:
    layer = writers.random_layer(16, 128, 32, seed=3)
    changed = replace(layer, zeros=layer.zeros.copy())
    changed.zeros[2, 5] ^= 1
    a, b = (read(FORMATS[name], writers.WRITERS[name](x), 16, 128, Scheme(32, False)) for x in (layer, changed))
    different = _dequantized(a) != _dequantized(b)
    assert int(different.sum()) == 32
    assert bool(different[5, 64:96].all())


def test_first_gptq_format_stores_zeros_less_one() -> None:
    layer = writers.random_layer(16, 64, 32, seed=4)
    tensors = writers.gptq(layer)
    first = read(FORMATS["gptq"], tensors, 16, 64, Scheme(32, False))
    second = read(FORMATS["gptq_v2"], tensors, 16, 64, Scheme(32, False))
    assert first.zeros is not None and second.zeros is not None
    assert torch.equal(first.zeros, (second.zeros + 1) % 16)
    assert 0 in layer.zeros and torch.equal(_dequantized(first), layer.dense().float())


@pytest.mark.parametrize("counts", [(1, 63, 0, 64), (128, 0, 0, 0), (33, 31, 32, 32), (5, 7, 100, 16)])
def test_any_assignment_of_inputs(counts: tuple[int, ...]) -> None:
    """Groups of any size, empty ones too: more than what writers make of act-order."""
    k = sum(counts)
    layer = writers.random_layer(24, k, 32, seed=7)
    layer.g_idx = np.random.default_rng(1).permutation(np.repeat(np.arange(4), counts))
    tensors = writers.gptq(layer)
    weight = read(FORMATS["gptq"], tensors, 24, k, Scheme(32, False, act_order=True))
    assert torch.equal(_dequantized(weight), layer.dense().float())
    x = torch.randn(3, k, dtype=torch.float64)
    form = weight.packed()
    y = ops.int4_linear(
        x.float(), form.packed, form.scales, form.zeros, form.offsets, form.perm, group_size=form.run, in_features=k
    )
    torch.testing.assert_close(y.double(), x.float().double() @ layer.dense().T, rtol=1e-5, atol=1e-5)
    used = [group for group, count in enumerate(counts) if count]
    again = unpacked(
        form.packed,
        form.scales,
        form.zeros,
        form.offsets,
        form.perm,
        form.g_idx,
        run=form.run,
        group_size=32,
        in_features=k,
    )
    back = write(FORMATS["gptq"], again)
    assert torch.equal(back["qweight"], tensors["qweight"]) and torch.equal(back["g_idx"], tensors["g_idx"])
    assert torch.equal(back["scales"][used], tensors["scales"][used])


def test_signed_zero_points_of_an_early_writer() -> None:
    layer = writers.random_layer(12, 64, 32, seed=5)
    tensors = writers.compressed(layer)
    tensors["weight_zero_point"] = torch.from_numpy(layer.zeros.T - 8).to(torch.int8)
    weight = read(FORMATS["pack-quantized"], tensors, 12, 64, Scheme(32, False))
    assert torch.equal(_dequantized(weight), layer.dense().float())


def test_one_scale_for_a_tensor() -> None:
    layer = writers.random_layer(12, 64, -1, seed=5, symmetric=True)
    layer.scales[:] = layer.scales[0, 0]
    tensors = writers.compressed(layer, symmetric=True) | {"weight_scale": layer.scales[0, :1].clone()}
    weight = read(FORMATS["pack-quantized"], tensors, 12, 64, Scheme(-1, True))
    assert torch.equal(_dequantized(weight), layer.dense().float())


def _bad(name: str, change: dict[str, Tensor | None], scheme: Scheme, act_order: bool = False) -> None:
    layer = writers.random_layer(16, 128, 32, seed=3, act_order=act_order)
    tensors = {k: v for k, v in (_written(name, layer, False, act_order) | change).items() if v is not None}
    read(FORMATS[name], tensors, 16, 128, scheme)


@pytest.mark.parametrize(
    "name, change, scheme, message",
    [
        ("gptq", {"qzeros": None}, Scheme(32, False), "qzeros: missing"),
        ("gptq", {"scales": None}, Scheme(32, True), "scales: missing"),
        ("gptq", {"g_idx": None}, Scheme(32, False, True), "g_idx: missing"),
        ("gptq", {}, Scheme(64, False), r"qzeros: got \[4, 2\], needs \[2, 2\].*group_size 64"),
        ("awq", {}, Scheme(16, False), r"qzeros: got \[4, 2\], needs \[8, 2\]"),
        ("awq", {}, Scheme(0, False), "group_size: got 0"),
        ("awq", {"qweight": torch.zeros(128, 4, dtype=torch.int32)}, Scheme(32, False), r"qweight: got \[128, 4\]"),
        ("awq", {"qweight": torch.zeros(128, 2)}, Scheme(32, False), "qweight: got torch.float32"),
        ("awq", {"scales": torch.full((4, 16), torch.nan)}, Scheme(32, False), "scales: 64 entries are NaN"),
        ("awq", {"scales": torch.zeros(4, 16, dtype=torch.int32)}, Scheme(32, False), "needs a floating dtype"),
        ("gptq", {"g_idx": torch.full((128,), 4)}, Scheme(32, False), r"g_idx: got 4 .. 4, needs 0 .. 3"),
        ("gptq", {"g_idx": torch.full((128,), -1)}, Scheme(32, False), r"g_idx: got -1"),
        ("pack-quantized", {"weight_shape": torch.tensor([128, 16])}, Scheme(32, False), "weight_shape: got"),
        ("pack-quantized", {"weight_zero_point": None}, Scheme(32, False), "weight_zero_point: missing"),
        (
            "pack-quantized",
            {"weight_zero_point": torch.full((16, 4), -20, dtype=torch.int8)},
            Scheme(32, False),
            "out of a 4-bit number",
        ),
    ],
)
def test_bad_tensors(name: str, change: dict[str, Tensor | None], scheme: Scheme, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        _bad(name, change, scheme)


def test_what_a_format_cannot_hold() -> None:
    layer = writers.random_layer(16, 128, 32, seed=3, act_order=True)
    weight = read(FORMATS["gptq"], writers.gptq(layer), 16, 128, Scheme(32, False, True))
    with pytest.raises(FormatError, match="act-order"):
        write(FORMATS["awq"], weight)
    offsets = replace(weight, g_idx=None, zeros=None, offsets=weight.scales)
    with pytest.raises(FormatError, match="offsets"):
        write(FORMATS["gptq"], offsets)
