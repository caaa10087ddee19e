"""What holds for a layer with fixed weights in any packed form: numbers, dtypes, copies, gradients, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from torch_pagedkv.quant.fixed import FixedLinear


class Layers:
    """The tests; a class for each form makes its layers."""

    def layer(self, dtype: torch.dtype = torch.float32, bias: bool = True) -> FixedLinear:
        """The same random layer each time, with a bias or without."""
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_forward(self, dtype: torch.dtype) -> None:
        layer = self.layer(dtype)
        x = torch.randn(2, 5, layer.in_features).to(dtype)
        exact = x.double() @ layer.dequantize(torch.float32).double().T
        close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
        torch.testing.assert_close(layer(x).double(), exact + layer.bias.double(), **close)
        torch.testing.assert_close(self.layer(dtype, bias=False)(x).double(), exact, **close)
        assert layer.weight.dtype == dtype and layer.weight.shape == (layer.out_features, layer.in_features)
        assert layer(x[:, :0]).shape == (2, 0, layer.out_features)

    def test_copies_are_the_same(self) -> None:
        layer = self.layer()
        x = torch.randn(3, layer.in_features)
        want = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
        for twin in twins:
            assert torch.equal(twin(x), want) and repr(twin) == repr(layer)
        other = copy.deepcopy(layer)
        for tensor in other.buffers():
            tensor.zero_()
        assert not torch.equal(other(x), want)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), want)

    def test_casts_keep_the_numbers(self) -> None:
        layer = self.layer()
        numbers, dtypes = layer.dequantize(torch.float32), self.dtypes(layer)
        for cast in (torch.bfloat16, torch.float16, torch.float32):
            layer.to(cast)
            assert layer.like.dtype == layer.bias.dtype == layer.weight.dtype == cast
            assert self.dtypes(layer) == dtypes
            assert torch.equal(layer.dequantize(torch.float32), numbers)
        assert layer.half().bias.dtype == torch.float16 and self.dtypes(layer) == dtypes
        meta = copy.deepcopy(layer).to("meta")
        assert all(t.is_meta for t in meta.buffers()) and self.dtypes(meta) == dtypes

    @staticmethod
    def dtypes(layer: FixedLinear) -> dict[str, torch.dtype]:
        """Of the parts of its weight."""
        return {name: t.dtype for name in layer.parts if (t := getattr(layer, name)) is not None}

    def test_gradient_of_the_input(self) -> None:
        layer = self.layer()
        x = torch.randn(4, layer.in_features, requires_grad=True)
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(y, layer(x))
        out = torch.randn_like(y)
        y.backward(out)
        torch.testing.assert_close(x.grad, out @ layer.weight)

    def test_no_gradient_of_the_weight(self) -> None:
        layer = self.layer()
        assert not list(layer.parameters())
        with pytest.raises(RuntimeError, match=f"{layer.bits} and fixed"):
            layer.requires_grad_()
        assert layer.requires_grad_(False) is layer
        for value in (nn.Parameter(layer.weight), layer.weight):
            with pytest.raises(AttributeError, match=f"{layer.bits} and fixed"):
                layer.weight = value
        assert layer(torch.zeros(1, layer.in_features)).shape == (1, layer.out_features)

    def test_autocast(self) -> None:
        layer = self.layer()
        x = torch.randn(3, layer.in_features)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert float((y.float() - layer(x)).norm() / layer(x).norm()) < 0.01

    def test_compile_fullgraph(self) -> None:
        layer = self.layer()
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

    @pytest.mark.slow
    def test_compile_inductor(self) -> None:
        layer = self.layer()
        model = nn.Sequential(layer, nn.SiLU())
        x = torch.randn(3, layer.in_features)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
