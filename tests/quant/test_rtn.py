"""Round to nearest, and `patch(weights="int4")`."""

from __future__ import annotations

import copy
import gc
import json
import logging
import weakref
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
import writers
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv.quant import rtn
from torch_pagedkv.quant.linear import Int4Linear
from torch_pagedkv.quant.loading import int4_layers


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(2, 26).view(2, 12), use_cache=False).logits


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("shape", [(48, 192), (33, 100), (1, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e6])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_error_is_within_half_a_step(group: int, shape: tuple[int, int], scale: float, shift: float) -> None:
    torch.manual_seed(0)
    w = (torch.randn(shape) + shift) * scale
    weight = rtn.quantize(w, group)
    layer = Int4Linear(weight, dtype=torch.float32)
    step = weight.scales.double()[weight.groups].T
    error = (layer.weight.double() - w.double()).abs()
    # a step that was rounded to float16 may leave the outermost numbers 15 roundings outside of the grid
    assert bool((error <= step * (0.5 + 15 * 2**-11)).all())
    assert weight.scales.dtype == (torch.float16 if scale == 1.0 else torch.float32)
    assert weight.q.max() <= 15 and weight.zeros is not None and weight.zeros.max() <= 15


def test_zeros_stay_zeros() -> None:
    assert not rtn.quantize(torch.zeros(4, 64), 32).scales.isnan().any()
    assert not Int4Linear(rtn.quantize(torch.zeros(4, 64), 32)).weight.any()
    w = torch.randn(64, 256)
    w[:, ::3] = 0
    once = Int4Linear(rtn.quantize(w, 64)).weight
    assert not once[:, ::3].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_weights(bad: float) -> None:
    w = torch.randn(4, 64)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        rtn.quantize(w)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_patch_and_unpatch(family: str) -> None:
    """Every family: the model is the float one with its weights rounded, and comes back to the bit."""
    model, inputs = tiny.make(family), tiny.batch()
    before, stock = copy.deepcopy(model.state_dict()), _logits(model)
    want = copy.deepcopy(model)
    torch_pagedkv.patch(model, weights="int4", group_size=32, keep_original=True)
    layers = dict(int4_layers(model))
    assert layers and "lm_head" not in layers
    with torch.no_grad():
        for name, module in want.named_modules():
            if name in layers:
                rounded = layers[name].weight
                transposed = not isinstance(module, nn.Linear)
                module.weight.copy_(rounded.T if transposed else rounded)
    reference = _logits(want)
    assert float((_logits(model) - reference).norm() / reference.norm()) < 1e-4
    assert not torch.equal(_logits(model), stock)
    assert torch_pagedkv.report(model).replaced["int4_linear"] == len(layers)
    tiny.generate(model, inputs)
    torch_pagedkv.unpatch(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(_logits(model), stock)
    assert not list(int4_layers(model)) and getattr(model, "hf_quantizer", None) is None


def test_original_is_freed_and_the_message_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    torch_pagedkv.patch(model, weights="int4")
    gc.collect()
    assert gone() is None
    got, inputs = _logits(model), tiny.batch()
    tokens = tiny.generate(model, inputs)
    with caplog.at_level(logging.WARNING):
        torch_pagedkv.unpatch(model)
    assert "stay quantised" in caplog.text and "keep_original=True" in caplog.text
    assert torch.equal(tiny.generate(model, inputs), tokens)
    torch.testing.assert_close(_logits(model), got, rtol=1e-4, atol=1e-4)
    torch_pagedkv.patch(model, weights="int4")
    assert torch.equal(tiny.generate(model, inputs), tokens)


def test_memory_while_patching() -> None:
    """No more than the float model and one layer: each original is gone before the next layer's numbers are made."""
    model = tiny.make("llama", num_hidden_layers=6)
    alive = [weakref.ref(m.weight) for _, m in writers.linears(model)]
    seen = []
    stock = rtn.quantize

    def counting(weight: Tensor, group_size: int) -> object:
        seen.append(sum(reference() is not None for reference in alive))
        return stock(weight, group_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtn, "quantize", counting)
        torch_pagedkv.patch(model, weights="int4", attention=False)
    assert seen == list(range(len(alive), 0, -1))


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny.make("qwen2", intermediate_size=160)
    torch_pagedkv.patch(model, weights="int4", group_size=64)
    want = {name: module.weight for name, module in int4_layers(model)}
    torch_pagedkv.unpatch(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["bits"] == 4 and config["group_size"] == 64
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    got = {name: module.weight for name, module in int4_layers(again)}
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert torch.equal(_logits(again), _logits(model))


def test_zero_points_of_zero_are_saved_in_the_second_format(tmp_path: Path) -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.abs_()
    torch_pagedkv.patch(model, weights="int4", group_size=32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (_, a), (_, b) in zip(int4_layers(model), int4_layers(again)):
        assert torch.equal(a.weight, b.weight)


def test_hooks_and_references_stay() -> None:
    model = tiny.make("llama")
    module, calls = model.model.layers[0].mlp.down_proj, []
    module.register_forward_hook(lambda *_: calls.append(1))
    torch_pagedkv.patch(model, weights="int4")
    _logits(model)
    assert calls and model.model.layers[0].mlp.down_proj is module


def test_copies_of_a_patched_model() -> None:
    model, inputs = tiny.make("llama"), tiny.batch()
    stock = _logits(model)
    torch_pagedkv.patch(model, weights="int4", keep_original=True)
    tokens = tiny.generate(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.generate(twin, inputs), tokens)
    torch_pagedkv.unpatch(twin)
    assert torch.equal(_logits(twin), stock)
    assert torch.equal(tiny.generate(model, inputs), tokens)


def test_what_cannot_be_quantised(tmp_path: Path) -> None:
    model = tiny.make("llama")
    stock = _logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has entries that are NaN"):
        torch_pagedkv.patch(model, weights="int4")
    assert not list(int4_layers(model))
    with pytest.raises(ValueError, match="group_size: got 48"):
        torch_pagedkv.patch(model, weights="int4", group_size=48)
    with pytest.raises(ValueError, match="weights: got 'int5'"):
        torch_pagedkv.patch(model, weights="int5")
    assert stock.isfinite().all()
    writers.write_model(tmp_path, tiny.make("llama"), "awq")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"quantised already \(awq\)"):
        torch_pagedkv.patch(loaded, weights="int4")


def test_report_says_what_was_left() -> None:
    model = tiny.make("mixtral")
    torch_pagedkv.patch(model, weights="int4")
    left = {row.module: row.reason for row in torch_pagedkv.report(model).left_alone if row.kind == "weights"}
    assert "language head" in left["lm_head"]
    assert any("experts" in reason for reason in left.values())


def test_prefixes_of_other_weights_are_forgotten() -> None:
    model, inputs = tiny.make("llama"), tiny.batch()
    torch_pagedkv.patch(model, weights="int4", group_size=32)
    tiny.generate(model, inputs)
    for _, module in int4_layers(model):
        module.scales.mul_(0.5)
    got = tiny.generate(model, inputs)
    model.paged_cache.reset()
    assert torch.equal(tiny.generate(model, inputs), got)


def test_originals_follow_a_model_that_was_cast() -> None:
    model, inputs = tiny.make("qwen2"), tiny.batch()
    want = tiny.generate(copy.deepcopy(model).to(torch.bfloat16), inputs)
    torch_pagedkv.patch(model, weights="int4", keep_original=True)
    model.to(torch.bfloat16)
    tiny.generate(model, inputs)
    torch_pagedkv.unpatch(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(tiny.generate(model, inputs), want)


def test_dequantize_while_patched() -> None:
    model = tiny.make("llama")
    torch_pagedkv.patch(model, weights="int4", keep_original=True)
    want = _logits(model)
    model.dequantize()
    assert not list(int4_layers(model))
    torch.testing.assert_close(_logits(model), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_head(tied: bool, tmp_path: Path) -> None:
    model, inputs = tiny.make("llama", tie_word_embeddings=tied), tiny.batch()
    stock, embedding = _logits(model), model.get_input_embeddings().weight
    torch_pagedkv.patch(model, weights="int4", group_size=32, quantize_head=True, keep_original=True)
    assert isinstance(model.lm_head, Int4Linear)
    want, tokens = _logits(model), tiny.generate(model, inputs)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(_logits(again), want, rtol=1e-4, atol=1e-4)
    again.generation_config.eos_token_id, again.generation_config.pad_token_id = None, tiny.PAD
    assert torch.equal(tiny.generate(again, inputs), tokens)
    torch_pagedkv.unpatch(model)
    assert torch.equal(_logits(model), stock)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied and bool(model.all_tied_weights_keys) == tied


def test_quantising_the_head_later(tmp_path: Path) -> None:
    model = torch_pagedkv.unpatch(torch_pagedkv.patch(tiny.make("llama"), weights="int4", group_size=32))
    with pytest.raises(ValueError, match="group_size: got 64, but the model has 4-bit layers in groups of 32"):
        torch_pagedkv.patch(model, weights="int4", group_size=64, quantize_head=True)
    torch_pagedkv.patch(model, weights="int4", group_size=32, quantize_head=True)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(again.lm_head, Int4Linear)
    torch.testing.assert_close(_logits(again), _logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon_gqa"])
def test_activations_in_the_epilogue(family: str) -> None:
    """Plain MLPs; whoever watches the activation is called."""
    options = {"weights": "int4", "group_size": 32}
    model = torch_pagedkv.patch(tiny.make(family), **options)
    plain = torch_pagedkv.patch(tiny.make(family), fuse_mlp=False, **options)
    ops = torch_pagedkv.report(model).replaced
    assert sum(count for op, count in ops.items() if op.startswith("int4_linear with gelu")) == 2
    want, got, calls = _logits(plain), _logits(model), []
    assert float((got - want).norm() / want.norm()) < 2e-6
    activation = next(m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in ("act", "act_fn"))
    handle = activation.register_forward_hook(lambda *_: calls.append(1))
    assert float((_logits(model) - want).norm() / want.norm()) < 2e-6 and len(calls) == 1
    handle.remove()
    _logits(model)
    assert len(calls) == 1
    torch_pagedkv.unpatch(model)
    assert float((_logits(model) - want).norm() / want.norm()) < 1e-5
