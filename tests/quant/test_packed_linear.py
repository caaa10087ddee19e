"""Layers in packed forms of their own as modules: dtypes, copies, gradients, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from ops.samples_small import Inputs
from torch import Tensor, nn

from torch_pagedkv.quant.packed import Int8Linear, PackedLinear, Q4KLinear


def _q4k(dtype: torch.dtype, bias: Tensor | None) -> PackedLinear:
    return Q4KLinear(Q4KLinear.pack(Inputs("cpu").q4k_blocks(48, 1)), bias, dtype, "GGUF Q4_K")


def _int8(dtype: torch.dtype, bias: Tensor | None) -> PackedLinear:
    torch.manual_seed(1)
    q = torch.randint(-128, 128, (48, 77), dtype=torch.int8)
    return Int8Linear(Int8Linear.pack(q, torch.rand(3, 48).half() * 0.01, 32), bias, dtype, "GGUF Q8_0")


KINDS: dict[str, Callable[[torch.dtype, Tensor | None], PackedLinear]] = {"q4k": _q4k, "int8": _int8}
kinds = pytest.mark.parametrize("kind", KINDS)


def _layer(kind: str, dtype: torch.dtype = torch.float32) -> PackedLinear:
    torch.manual_seed(0)
    return KINDS[kind](dtype, torch.randn(48).to(dtype))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(kind: str, dtype: torch.dtype) -> None:
    layer = _layer(kind, dtype)
    x = torch.randn(2, 5, layer.in_features).to(dtype)
    want = x.double() @ layer.dequantize(torch.float32).double().T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert layer.weight.dtype == dtype and layer.weight.shape == (layer.out_features, layer.in_features)
    assert layer(x[:, :0]).shape == (2, 0, layer.out_features)
    assert torch.equal(KINDS[kind](dtype, None)(x), (layer.product(x, layer.operands(), None, 32, layer.in_features)))


@kinds
def test_copies_are_the_same(kind: str) -> None:
    layer = _layer(kind)
    x = torch.randn(3, layer.in_features)
    want = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert torch.equal(twin(x), want) and repr(twin) == repr(layer)
    other = copy.deepcopy(layer)
    other.operands()[-1].zero_()
    assert not torch.equal(other(x), want)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)


@kinds
def test_casts_keep_the_numbers(kind: str) -> None:
    layer = _layer(kind)
    numbers, dtypes = layer.dequantize(torch.float32), [t.dtype for t in layer.operands()]
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(cast)
        assert layer.like.dtype == layer.bias.dtype == layer.weight.dtype == cast
        assert [t.dtype for t in layer.operands()] == dtypes
        assert torch.equal(layer.dequantize(torch.float32), numbers)
    meta = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in meta.operands()) and [t.dtype for t in meta.operands()] == dtypes


@kinds
def test_gradients(kind: str) -> None:
    layer = _layer(kind)
    x = torch.randn(4, layer.in_features, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    out = torch.randn_like(y)
    y.backward(out)
    torch.testing.assert_close(x.grad, out @ layer.weight)
    assert not list(layer.parameters())
    with pytest.raises(RuntimeError, match="-bit and fixed"):
        layer.requires_grad_()
    assert layer.requires_grad_(False) is layer
    for value in (nn.Parameter(layer.weight), layer.weight):
        with pytest.raises(AttributeError, match="-bit and fixed"):
            layer.weight = value


@kinds
def test_autocast(kind: str) -> None:
    layer = _layer(kind)
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - layer(x)).norm() / layer(x).norm()) < 0.01


@kinds
def test_compile_fullgraph(kind: str) -> None:
    layer = _layer(kind)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1 and graphs[0].count(f"torch_pagedkv.{layer.op}") == 1
    # and with a gradient
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).sum().backward()
    layer(b).sum().backward()
    assert torch.equal(a.grad, b.grad)
