"""8 bits on both sides of the product: `weights="int8"` (W8A8) and `"fp8"`."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv import ops
from torch_pagedkv.quant import eight, sensitivity
from torch_pagedkv.quant.eight import Fp8Linear, W8A8Linear
from torch_pagedkv.quant.fixed import fixed_layers
from torch_pagedkv.quant.packed import Int8Linear

FORMS = {"int8": W8A8Linear, "fp8": Fp8Linear}
forms = pytest.mark.parametrize("form", FORMS)
TEXT = ["a few words to look at the ranges of activations with " * 300]


def _layer(form: str, dtype: torch.dtype = torch.float32, factor: Tensor | None = None) -> eight.EightLinear:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    layer = FORMS[form](FORMS[form].pack(weight, factor), bias, dtype, form)
    assert isinstance(layer, eight.EightLinear)
    return layer


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows on the grid of `dtype`, in float64."""
    most = 127.0 if dtype == torch.int8 else 448.0
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / most
    y = x * (1 / scale)
    y = y.round().clamp(-127, 127) if dtype == torch.int8 else y.to(dtype).float()
    return y.double() * scale.double()


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_forward(form: str, dtype: torch.dtype, smoothed: bool) -> None:
    """The product of the rounded numbers, exactly but for the last rounding; near that of the numbers themselves."""
    torch.manual_seed(1)
    factor = torch.rand(64) + 0.5 if smoothed else None
    layer = _layer(form, dtype, factor)
    torch.manual_seed(0)
    weight = torch.randn(48, 64).to(dtype)
    for rows in (1, 3, 17, 40):
        x = torch.randn(2, rows, 64).to(dtype)
        used = layer.factor if layer.factor is not None else torch.ones(64)  # with signs, where there is a rotation
        if factor is not None:
            assert torch.equal(used.abs(), factor)
        rotated = (ops.quantize.rotated(t, layer.rotation(64)) for t in (x.float() * used, weight.float() / used))
        a, b = (_rounded(t, layer.dtype) for t in rotated)
        want = a @ b.T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), want, rtol=torch.finfo(dtype).eps, atol=4e-5)
        real = x.double() @ weight.double().T + layer.bias.double()
        assert float((layer(x).double() - real).norm() / real.norm()) < (0.015 if form == "int8" else 0.05)
    assert layer(x[:, :0]).shape == (2, 0, 48)
    assert layer(x[0, 0]).shape == (48,)
    error = (layer.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm()
    assert float(error) < (0.01 if form == "int8" else 0.03)


def test_whole_products_in_float_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer("int8"), torch.randn(5, 64)
    want = layer(x)
    monkeypatch.setattr(W8A8Linear, "whole", False)
    assert torch.equal(layer(x), want)


@forms
def test_as_a_module(form: str) -> None:
    """Copies, casts, gradients."""
    layer, x = _layer(form), torch.randn(3, 64)
    want = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)  # pickle itself knows no float8
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), want) and repr(twin) == repr(layer)
    dtypes = [None if t is None else t.dtype for t in layer.operands()]
    layer.to(torch.bfloat16)
    assert [None if t is None else t.dtype for t in layer.operands()] == dtypes and layer.bias.dtype == torch.bfloat16
    layer.float()
    x.requires_grad_()
    y = layer(x)
    out = torch.randn_like(y)
    y.backward(out)
    torch.testing.assert_close(x.grad, out @ layer.weight)


@forms
def test_compile_fullgraph(form: str) -> None:
    layer, x = _layer(form), torch.randn(3, 64)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(compiled(x[None].expand(2, 3, 64)), layer(x[None].expand(2, 3, 64)))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    batch = tiny.batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@forms
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_patch_and_unpatch(form: str, family: str) -> None:
    """Logits are near, `generate` runs, and the model comes back to the bit."""
    model = tiny.make(family)
    before, stock = copy.deepcopy(model.state_dict()), _logits(model)
    torch_pagedkv.patch(model, weights=form, keep_original=True)
    layers = dict(fixed_layers(model))
    assert layers and "lm_head" not in layers and all(isinstance(module, FORMS[form]) for module in layers.values())
    report = torch_pagedkv.report(model)
    assert report.replaced[FORMS[form].op] == len(layers)
    assert not any("undone" in row.reason for row in report.left_alone)  # roundings are no wrong fusion
    assert all(module.rounds for module in layers.values())
    error = float((_logits(model) - stock).norm() / stock.norm())
    assert 0 < error < (0.05 if form == "int8" else 0.2)
    tiny.generate(model, tiny.batch())
    torch_pagedkv.unpatch(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(_logits(model), stock)
    assert not fixed_layers(model) and getattr(model, "hf_quantizer", None) is None


@forms
def test_smoothing_helps_with_outliers(form: str) -> None:
    """Inputs that are 100 times larger than the others, which float8 bears by itself."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96), torch.randn(32, 96)
    x[:, ::17] *= 100
    weight[:, ::17] /= 100
    want = x @ weight.T
    cls = FORMS[form]

    def error(factor: Tensor | None) -> float:
        layer = cls(cls.pack(weight, factor), dtype=torch.float32)
        return float((layer(x) - want).norm() / want.norm())

    smoothed, plain = error(eight.search(cls, weight, x.abs().amax(0), x[:20])), error(None)
    assert smoothed < (0.5 * plain if form == "int8" else 1.2 * plain)
    assert smoothed < (0.015 if form == "int8" else 0.05)


def test_smoothing_of_nothing() -> None:
    """Dead inputs and empty columns get 1."""
    weight = torch.ones(4, 5)
    weight[:, 2] = 0
    largest = torch.tensor([4.0, 0.0, 3.0, 1.0, torch.inf])
    assert eight.smoothing(weight, largest, 0.5).tolist() == [0.5, 1, 1, 1, 1]


class _Tokenizer:
    """Letters."""

    bos_token_id = None

    def __call__(self, text: str) -> hf.BatchEncoding:
        return hf.BatchEncoding({"input_ids": [2 + ord(letter) % 30 for letter in text]})


@forms
def test_calibration(form: str, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    """From texts, a file or ids; the same scales from the same tokens; hooks are gone, the mode is what it was."""
    (tmp_path / "text.txt").write_text(TEXT[0])
    ids = torch.tensor(_Tokenizer()(TEXT[0])["input_ids"])
    results = []
    for calibration in (TEXT, str(tmp_path / "text.txt"), ids[: len(ids) // 64 * 64].view(-1, 64)[:128]):
        model = tiny.make("llama", max_position_embeddings=64)
        model.train()
        torch_pagedkv.patch(model, weights=form, calibration=calibration, tokenizer=_Tokenizer())
        assert all(not module._forward_pre_hooks and module.training for module in model.modules())
        layers = dict(fixed_layers(model))
        results.append({name: module.factor for name, module in layers.items() if "smoothed" in module.source})
        assert len(results[-1]) > len(layers) // 3
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(factor, results[1][name]) for name, factor in results[0].items())
    for bad, error, message in (
        (["too short"], ValueError, "calibration: got"),
        (3, TypeError, "calibration: got int"),
        (torch.full((32, 64), 10**6), ValueError, "calibration: got token ids"),
    ):
        model = tiny.make("llama", max_position_embeddings=64)
        with pytest.raises(error, match=message):
            torch_pagedkv.patch(model, weights=form, calibration=bad, tokenizer=_Tokenizer())
        assert not fixed_layers(model)


def _total_cost(model: nn.Module, form: str, ids: Tensor) -> float:
    """Of all its layers."""
    found: list[float] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sensitivity, "too_costly", lambda cost, *more: found.extend(cost.values()) or [])
        torch_pagedkv.quantize(model, form, calibration=ids)
    return sum(found)


@forms
def test_what_costs_too_much_is_spared(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the bound, from none of the layers to all; the report says which, and all come back."""
    ids = torch.arange(64 * 32).view(32, 64) * 7 % 89
    shares = []
    for bound in (1e9, None, 0.0):
        model = tiny.make("gpt2", n_positions=64)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # rounding does cost something
        before, stock = copy.deepcopy(model.state_dict()), _logits(model)
        if bound is None:
            bound = 0.5 * _total_cost(copy.deepcopy(model), form, ids)
        monkeypatch.setattr(eight, "BOUND", bound)
        torch_pagedkv.patch(model, weights=form, calibration=ids, keep_original=True)
        layers = dict(fixed_layers(model))
        spared = {name for name, module in layers.items() if isinstance(module, Int8Linear)}
        shares.append(len(spared) / len(layers))
        report = torch_pagedkv.report(model)
        assert {row.module for row in report.left_alone if "its activations are not rounded" in row.reason} == spared
        assert report.replaced.get(FORMS[form].op, 0) == len(layers) - len(spared)
        assert report.replaced.get("int8_linear", 0) == len(spared)
        error = float((_logits(model) - stock).norm() / stock.norm())
        assert error < (0.01 if bound == 0 else 0.2)
        torch_pagedkv.unpatch(model)
        assert all(torch.equal(after, before[name]) for name, after in model.state_dict().items())
    assert shares[0] == 0 < shares[1] < 1 == shares[2]


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrated_on_cuda(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are those that the CPU finds, some layers are spared, and the logits are near the float model's."""
    ids = torch.arange(64 * 32).view(32, 64) * 7 % 89
    model = tiny.make("llama", max_position_embeddings=64)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    totals = {device: _total_cost(copy.deepcopy(model).to(device, dtype), form, ids) for device in ("cpu", "cuda")}
    assert totals["cuda"] == pytest.approx(totals["cpu"], rel=0.02 if dtype == torch.float32 else 0.2)
    monkeypatch.setattr(eight, "BOUND", 0.5 * totals["cuda"])
    model.to("cuda", dtype)
    batch = {name: tensor.cuda() for name, tensor in tiny.batch().items()}
    with torch.no_grad():
        stock = model(**batch).logits.float()
        torch_pagedkv.quantize(model, form, calibration=ids)
        got = model(**batch).logits.float()
    kinds = {type(module) for _, module in fixed_layers(model)}
    assert kinds == {FORMS[form], Int8Linear}
    assert 0 < float((got - stock).norm() / stock.norm()) < (0.03 if form == "int8" else 0.1)


@forms
def test_another_default_dtype(form: str) -> None:
    """What a model is loaded under does not reach the scales, which products want in float32."""
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    want = FORMS[form](FORMS[form].pack(weight))(x)
    torch.set_default_dtype(torch.bfloat16)
    layer = FORMS[form](FORMS[form].pack(weight))
    assert {name: buffer.dtype for name, buffer in layer.named_buffers() if name in ("scales", "one")} == {
        "scales": torch.float32,
        "one": torch.float32,
    }
    assert torch.equal(layer(x), want)


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_number_of_rows_on_cuda(form: str, dtype: torch.dtype) -> None:
    """Few rows, and many in float8, take other products: the same bits in int8, else what less precise sums leave."""
    for bias in (None, torch.randn(160, device="cuda")):
        layer = FORMS[form](FORMS[form].pack(torch.randn(160, 96, device="cuda")), bias)
        x = torch.randn(600, 96, device="cuda", dtype=dtype)
        many = layer(x)
        for rows in (1, 3, eight.FEW_ROWS, eight.FEW_ROWS + 1, 17, 100):
            few = layer(x[:rows])
            if form == "int8":
                assert torch.equal(few, many[:rows])
            else:
                torch.testing.assert_close(few, many[:rows], rtol=0.01, atol=0.05)


@pytest.mark.parametrize("inputs", [64, 72])
def test_spared_weights(inputs: int) -> None:
    """To half a step of each group's, and whatever the range."""
    torch.manual_seed(0)
    for size in (1.0, 1e-9, 1e9):
        weight = torch.randn(48, inputs) * torch.rand(inputs) * size
        weight[3] = 0
        got = eight.spared(weight).dequantize(torch.float32)
        groups = F.pad(weight, (0, -inputs % 32)).unflatten(1, (-1, 32)).abs().amax(-1) / 127
        steps = groups.repeat_interleave(32, 1)[:, :inputs]
        assert bool(((got - weight).abs() <= 0.5 * steps + 127 * 2**-11 * steps).all()) and not got[3].any()


def test_options() -> None:
    for options, message in (
        ({"calibration": ["x"]}, "calibration: got one, but weights=None needs no calibration data"),
        ({"weights": "int8", "gguf_file": "x"}, "gguf_file: got 'x', needs None unless weights='gguf'"),
        ({"weights": "int6"}, "weights: got 'int6', needs one of None, 'int4', 'awq', .*'gguf', 'int8', 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            torch_pagedkv.PagedConfig(**options)


@forms
def test_head_and_saving(form: str, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    torch_pagedkv.patch(model, weights=form, quantize_head=True)
    assert isinstance(model.lm_head, FORMS[form])
    with pytest.raises(ValueError, match=rf"q_proj: its weight \({form}\) has no exact form .*dequantize"):
        model.save_pretrained(tmp_path)
    want = _logits(model)
    with caplog.at_level(logging.WARNING):
        torch_pagedkv.unpatch(model)
    assert "stay quantised" in caplog.text
    torch_pagedkv.patch(model, weights=form)
    assert torch.equal(_logits(model), want)
    torch_pagedkv.unpatch(model)
    with pytest.raises(ValueError, match=rf"weights: got 'int4', but the model is quantised already \({form}\)"):
        torch_pagedkv.patch(model, weights="int4")
    model.dequantize()
    assert not fixed_layers(model)
    model.save_pretrained(tmp_path)


def test_refusals(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan
    for form in FORMS:
        with pytest.raises(ValueError, match=r"weights: .*up_proj\.weight has entries that are NaN"):
            torch_pagedkv.patch(model, weights=form)
        assert not fixed_layers(model)
    monkeypatch.setattr(eight, "_float8_on_cpu", lambda: False)
    with pytest.raises(ValueError, match=r"weights: got 'fp8', but torch\._scaled_mm"):
        torch_pagedkv.patch(tiny.make("llama"), weights="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"compute capability 8.9 or later; cuda:0 \(A100\) has 8.0"):
        eight.refuse_float8(torch.device("cuda:0"))
    monkeypatch.setattr(W8A8Linear, "whole", True)
    monkeypatch.setattr(eight, "whole_products", lambda: False)
    with caplog.at_level(logging.WARNING):
        torch_pagedkv.patch(tiny.make("llama"), weights="int8")
    assert "torch._int_mm is slow on this CPU or missing" in caplog.text
