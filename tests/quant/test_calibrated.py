"""`patch(weights="awq" | "gptq" | "awq+gptq")` and `quantize`: whole models, on tiny random ones."""

from __future__ import annotations

import copy
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv.patches import weights
from torch_pagedkv.quant import awq, calibrated, folding
from torch_pagedkv.quant.blocks import Blocks
from torch_pagedkv.quant.calibrated import dequantized
from torch_pagedkv.quant.loading import int4_layers

METHODS = tuple(calibrated.METHODS)


def _ids(rows: int = 24, length: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(2, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=_ids(4, 48, 7) if ids is None else ids, use_cache=False).logits


def _loss(model: nn.Module, stock: Tensor) -> float:
    return float((_logits(model) - stock).norm() / stock.norm())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str) -> None:
    """Nearer to the float model than rounding to nearest, runs, and comes back to the bit."""
    model = tiny.make(family)
    stock, before = _logits(model), copy.deepcopy(model.state_dict())
    rounded = torch_pagedkv.quantize(copy.deepcopy(model), "int4", group_size=32)
    options: dict[str, Any] = {"group_size": 32, "calibration": _ids(32, 64)}
    torch_pagedkv.patch(model, weights="awq+gptq", keep_original=True, **options)
    assert dict(int4_layers(model)).keys() == dict(int4_layers(rounded)).keys()
    assert {layer.source for _, layer in int4_layers(model)} == {"AWQ+GPTQ"}
    assert _loss(model, stock) < _loss(rounded, stock)
    tiny.generate(model, tiny.batch())
    torch_pagedkv.unpatch(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(_logits(model), stock)
    assert not list(int4_layers(model)) and getattr(model, "hf_quantizer", None) is None


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.to(parameter.dtype)


#: layers of a block that share an input, and what takes over its scales
FOLDS = {
    "llama": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj",
              "mlp.gate_proj": "post_attention_layernorm", "mlp.down_proj": "mlp.up_proj"},
    "gemma2": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj",
               "mlp.gate_proj": "pre_feedforward_layernorm", "mlp.down_proj": "mlp.up_proj"},
    "phi3": {"self_attn.qkv_proj": "input_layernorm", "self_attn.o_proj": "self_attn.qkv_proj",
             "mlp.gate_up_proj": "post_attention_layernorm", "mlp.down_proj": "mlp.gate_up_proj"},
    "mixtral": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "self_attn.v_proj"},
    "gpt_neox": {"attention.query_key_value": "input_layernorm", "attention.dense": "attention.query_key_value",
                 "mlp.dense_h_to_4h": "post_attention_layernorm", "mlp.dense_4h_to_h": None},
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn", "mlp.c_fc": "ln_2", "mlp.c_proj": None},
    "falcon_mqa": {"self_attention.query_key_value": "input_layernorm", "mlp.dense_h_to_4h": "input_layernorm",
                   "self_attention.dense": "self_attention.query_key_value", "mlp.dense_4h_to_h": None},
}  # fmt: skip


@pytest.mark.parametrize("family", FOLDS)
@torch.no_grad()
def test_folded_scales_change_nothing(family: str) -> None:
    """Every stage's scales are folded where they should be, and in float64 the model's function stays what it was."""
    dtype = torch.float32 if family == "mixtral" else torch.float64  # its experts have no float64 product
    model = tiny.make(family).to(dtype)
    head_dim = 32 if family == "gemma2" else 16
    stock, ids = _logits(model), _ids()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, hf.pytorch_utils.Conv1D))}
    name, modules = weights.calibrated.find(model, set(layers))
    blocks = Blocks(model, name, modules, ids)
    found: dict[str, str | None] = {}
    for number in range(len(blocks)):
        head = blocks.names[number] + "."
        block = dict(blocks.modules[number].named_modules())
        inside = [n.removeprefix(head) for n in layers if n.startswith(head) and "gate.weight" not in n]
        stages = folding.stages(blocks.modules[number], inside, lambda n=number: blocks.call(n, 0))
        for stage in folding.find(blocks, number, stages, head_dim, set()):
            for layer in stage.layers:
                found[layer] = stage.fold.module if stage.fold else None
            if stage.fold is None:
                assert stage.why
                continue
            k = folding.matrix(block[stage.layers[0]]).shape[1]
            s = 0.5 + torch.rand(k, dtype=dtype)
            if stage.fold.rows is not None:
                assert bool((stage.fold.rows >= 0).all())
                s = (0.5 + torch.rand(int(stage.fold.rows.max()) + 1, dtype=dtype))[stage.fold.rows]
            real = folding.apply(stage.fold, s, block, _set)
            torch.testing.assert_close(real, s)
            for layer in stage.layers:
                folding.matrix(block[layer]).mul_(real)
    for layer, fold in FOLDS[family].items():
        assert found[layer] == fold, layer
    # norms compute in float32 whatever they are given
    assert float((_logits(model) - stock).norm() / stock.norm()) < 1e-6


class _Mixing(nn.Module):
    """An MLP that reads its input in one more way."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x)) + x @ self.mix


def test_scales_wait_where_others_read_the_norm() -> None:
    """What reads the norm's output beside the linear layers must not see it divided."""
    model = tiny.make("llama")
    model.model.layers[1].mlp = _Mixing(model.model.layers[1].mlp)
    log = torch_pagedkv.patches.PatchLog()
    weights.apply(model, torch_pagedkv.PagedConfig(weights="awq", group_size=32, calibration=_ids()), log)
    reasons = {row.module: row.reason for row in log.rows if row.kind == "scales"}
    assert list(reasons) == ["model.layers.1.mlp.gate_proj"]
    assert "goes to others too" in reasons["model.layers.1.mlp.gate_proj"]


def test_functions_put_on_a_module() -> None:
    """A copy of such a block would run the original: nothing is tried on one, and the report says so."""
    model = tiny.make("llama")
    stock, forward = _logits(model), model.model.layers[1].mlp.forward
    rounded = torch_pagedkv.quantize(copy.deepcopy(model), "int4", group_size=32)
    model.model.layers[1].mlp.forward = lambda x: forward(x)
    log = torch_pagedkv.patches.PatchLog()
    config = torch_pagedkv.PagedConfig(weights="awq+gptq", group_size=32, calibration=_ids())
    weights.apply(model, config, log)
    reasons = {row.module: row.reason for row in log.rows if row.kind == "scales"}
    assert sum("something else is bound" in reason for reason in reasons.values()) == len(reasons) == 4
    assert _loss(model, stock) < _loss(rounded, stock)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("intermediate", [96, 104])
def test_saved_and_loaded_to_the_bit(method: str, intermediate: int, tmp_path: Path) -> None:
    """104 inputs leave a short last group: no place for it in AWQ, so it is saved as GPTQ."""
    model = tiny.make("qwen2", intermediate_size=intermediate)
    torch_pagedkv.quantize(model, method, group_size=32, calibration=_ids())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    as_awq = method == "awq" and intermediate == 96
    assert config["quant_method"] == ("awq" if as_awq else "gptq") and config["group_size"] == 32
    assert as_awq == (config.get("modules_to_not_convert") == ["lm_head"])
    if not as_awq:
        assert config["checkpoint_format"] == "gptq" and not config["desc_act"]
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    got, want = dict(int4_layers(again)), dict(int4_layers(model))
    assert got.keys() == want.keys() and all(torch.equal(got[name].weight, want[name].weight) for name in want)
    assert torch.equal(_logits(again), _logits(model))


def test_act_order_through_a_checkpoint(tmp_path: Path) -> None:
    """Every input's group, also those of a short last one."""
    model = tiny.make("llama", intermediate_size=104)
    torch_pagedkv.quantize(model, "gptq", group_size=32, calibration=_ids(), order="dynamic")
    layer = model.model.layers[0].mlp.down_proj
    assert torch.bincount(layer.g_idx.long()).tolist() == [32, 32, 32, 8]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["desc_act"]
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, a), (_, b) in zip(int4_layers(model), int4_layers(again)):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.g_idx, b.g_idx), name
    assert torch.equal(_logits(again), _logits(model))


def _deep(family: str, **override: Any) -> hf.PreTrainedModel:
    return tiny.make(family, num_hidden_layers=4, **override)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_resumed_is_the_same(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"group_size": 32, "calibration": _ids(), "folder": tmp_path / "kept"}
    whole = torch_pagedkv.quantize(_deep("gemma3"), method, **options | {"folder": None})

    class Enough(Exception):
        pass

    rounds = []
    stock = calibrated._Work.quantize

    def breaking(self: Any, number: int) -> Any:
        rounds.append(number)
        if number == 2 and rounds.count(2) == 1:
            raise Enough
        return stock(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated._Work, "quantize", breaking)
        with pytest.raises(Enough):
            torch_pagedkv.quantize(_deep("gemma3"), method, **options)
        again = torch_pagedkv.quantize(_deep("gemma3"), method, **options)
    assert rounds == [0, 1, 2, 2, 3]
    a, b = whole.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="results of a run with other calibration"):
        torch_pagedkv.quantize(_deep("gemma3"), method, **options | {"calibration": _ids(seed=5)})
    with pytest.raises(ValueError, match="results of a run with other options"):
        torch_pagedkv.quantize(_deep("gemma3"), method, **options | {"group_size": 64})
    with pytest.raises(ValueError, match="results of a run with other model"):
        torch_pagedkv.quantize(_deep("gemma3", intermediate_size=160), method, **options)
    next((tmp_path / "kept").glob("block-0001*")).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="corrupt or truncated"):
        torch_pagedkv.quantize(_deep("gemma3"), method, **options)


@pytest.mark.parametrize("offload", ["cpu", "folder"])
def test_offloaded_is_the_same(offload: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"group_size": 32, "calibration": _ids()}
    whole = torch_pagedkv.quantize(tiny.make("llama"), "awq+gptq", **options)
    where = str(tmp_path / "states") if offload == "folder" else offload
    again = torch_pagedkv.quantize(tiny.make("llama"), "awq+gptq", offload=where, **options)
    a, b = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list((tmp_path / "states").iterdir()) if offload == "folder" else True


def test_original_is_freed_block_by_block(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama", num_hidden_layers=3)
    alive = [weakref.ref(p) for n, p in model.named_parameters() if "proj" in n]
    seen = []
    stock = calibrated._Work.quantize

    def counting(self: Any, number: int) -> Any:
        seen.append(sum(reference() is not None for reference in alive))
        return stock(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated._Work, "quantize", counting)
        torch_pagedkv.patch(model, weights="gptq", group_size=32, calibration=_ids())
    assert seen == [21, 14, 7]
    got, tokens = _logits(model), tiny.generate(model, tiny.batch())
    with caplog.at_level(logging.WARNING):
        torch_pagedkv.unpatch(model)
    assert "stay quantised" in caplog.text
    assert torch.equal(tiny.generate(model, tiny.batch()), tokens)
    torch.testing.assert_close(_logits(model), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Scales are folded into rounded norms; the layers are given what those really amount to."""
    model = tiny.make("gemma2").to(dtype)
    stock = _logits(model).float()
    rounded = torch_pagedkv.quantize(copy.deepcopy(model), "int4", group_size=32)
    torch_pagedkv.quantize(model, "awq+gptq", group_size=32, calibration=_ids())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert _loss(model, stock) < 0.9 * _loss(rounded, stock)


def test_quantised_head(tmp_path: Path) -> None:
    model = tiny.make("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    options: dict[str, Any] = {"group_size": 32, "calibration": _ids(), "quantize_head": True}
    torch_pagedkv.quantize(model, "awq", **options)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(_logits(again), _logits(model), rtol=1e-4, atol=1e-4)


def test_refused_before_anything_changes() -> None:
    model = tiny.make("llama")
    before = copy.deepcopy(model.state_dict())

    def refused(match: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            torch_pagedkv.quantize(model, **{"method": "gptq", "calibration": _ids(), "group_size": 32} | options)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before) and not list(int4_layers(model))

    refused("weights: got 'gptp'", method="gptp")
    refused("group_size: got 48", group_size=48)
    refused("unknown option 'sample'", TypeError, sample=3)
    refused("order: got 'random'", order="random")
    refused("damping: got 0", damping=0)
    refused("correction: got 2", correction=2)
    refused("calibration: got 480 tokens", calibration=_ids(10))
    refused(
        "calibration: got token ids 2 .. 96", calibration=torch.full((24, 48), 96).index_fill(0, torch.tensor(0), 2)
    )
    refused("tokenizer: got None, and there is none at", calibration=["a text"])
    refused("calibration: got one, but weights='int4'", method="int4")
    with torch.no_grad():
        before["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has entries that are NaN"):
        torch_pagedkv.quantize(model, "awq", calibration=_ids(), group_size=32)
    assert not list(int4_layers(model))
    spoiled = tiny.make("llama")
    with torch.no_grad():
        spoiled.model.layers[1].input_layernorm.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1 gives NaN or infinite numbers"):
        torch_pagedkv.quantize(spoiled, "awq", calibration=_ids(), group_size=32)
    assert not list(int4_layers(spoiled))
    with pytest.raises(ValueError, match="calibration: got one, but weights=None"):
        torch_pagedkv.patch(tiny.make("llama"), calibration=["text"])


def test_scale_search_is_of_use() -> None:
    """The same model with some inputs made large: AWQ protects them."""
    model = tiny.make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::32] *= 30
            layer.post_attention_layernorm.weight[::32] *= 30
    stock = _logits(model)
    found = copy.deepcopy(model)
    torch_pagedkv.quantize(found, "awq", group_size=64, calibration=_ids(48), correction=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq, "search", lambda weights, h, size, ties=None: torch.ones(h.shape[0]))
        plain = torch_pagedkv.quantize(copy.deepcopy(model), "awq", group_size=64, calibration=_ids(48), correction=0.0)
    assert _loss(found, stock) < 0.9 * _loss(plain, stock)


def test_weight_is_what_was_rounded() -> None:
    """A layer's 4-bit numbers are those that the rest of its block was calibrated with."""
    model = tiny.make("llama")
    torch_pagedkv.quantize(model, "gptq", group_size=32, calibration=_ids())
    for _, layer in int4_layers(model):
        torch.testing.assert_close(dequantized(layer.logical()), layer.weight, rtol=0, atol=0)
