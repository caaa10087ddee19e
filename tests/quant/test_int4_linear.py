"""`Int4Linear` as a module: numbers, dtypes, copies, gradients, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import writers
from torch import nn

from torch_pagedkv.quant.formats import FORMATS, Scheme, read
from torch_pagedkv.quant.linear import Int4Linear

KINDS = ("zeros", "symmetric", "act_order", "odd")


def _layer(kind: str, dtype: torch.dtype = torch.float32, n: int = 48, bias: bool = True) -> Int4Linear:
    k, n = (77, 13) if kind == "odd" else (160, n)
    numbers = writers.random_layer(n, k, 64, 1, symmetric=kind == "symmetric", act_order=kind == "act_order")
    scheme = Scheme(64, kind == "symmetric", kind == "act_order")
    weight = read(FORMATS["gptq"], writers.gptq(numbers), n, k, scheme)
    torch.manual_seed(0)
    return Int4Linear(weight, torch.randn(n).to(dtype) if bias else None, dtype, "GPTQ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(kind: str, dtype: torch.dtype) -> None:
    layer = _layer(kind, dtype)
    x = torch.randn(2, 5, layer.in_features).to(dtype)
    want = x.double() @ layer.dequantize(torch.float32).double().T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert layer.weight.dtype == dtype and layer.weight.shape == (layer.out_features, layer.in_features)
    assert layer(x[:, :0]).shape == (2, 0, layer.out_features)


@pytest.mark.parametrize("kind", KINDS)
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
    other.scales.zero_()
    assert not torch.equal(other(x), want)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)


def test_casts_keep_the_numbers() -> None:
    layer = _layer("zeros")
    numbers = layer.dequantize(torch.float32)
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(cast)
        assert layer.like.dtype == layer.bias.dtype == layer.weight.dtype == cast
        assert layer.scales.dtype == torch.float16
        assert torch.equal(layer.dequantize(torch.float32), numbers)
    assert layer.half().bias.dtype == torch.float16 and layer.scales.dtype == torch.float16
    meta = copy.deepcopy(layer).to("meta")
    assert meta.scales.is_meta and meta.scales.dtype == torch.float16 and meta.packed.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_input(kind: str) -> None:
    layer = _layer(kind)
    x = torch.randn(4, layer.in_features, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    out = torch.randn_like(y)
    y.backward(out)
    torch.testing.assert_close(x.grad, out @ layer.weight)


def test_no_gradient_of_the_weight() -> None:
    layer = _layer("zeros")
    assert not list(layer.parameters())
    with pytest.raises(RuntimeError, match="4-bit and fixed"):
        layer.requires_grad_()
    assert layer.requires_grad_(False) is layer
    for value in (nn.Parameter(layer.weight), layer.weight):
        with pytest.raises(AttributeError, match="4-bit and fixed"):
            layer.weight = value
    assert layer(torch.zeros(1, layer.in_features)).shape == (1, 48)


def test_autocast() -> None:
    layer = _layer("zeros")
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)


def test_repr() -> None:
    text = repr(_layer("act_order"))
    assert "in_features=160" in text and "group_size=64, zeros, act-order, GPTQ" in text


@pytest.mark.parametrize("kind", ["zeros", "act_order"])
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
    assert len(graphs) == 1 and graphs[0].count("torch_pagedkv.int4_linear") == 1
    # and with a gradient
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).sum().backward()
    layer(b).sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.slow
def test_compile_inductor() -> None:
    layer = _layer("act_order")
    model = nn.Sequential(layer, nn.SiLU())
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
