"""4-bit checkpoints through transformers: loaded to the bits that were written, and written again."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
import writers
from safetensors.torch import load_file
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv.quant import loading, registry
from torch_pagedkv.quant.linear import Int4Linear

FORMS = tuple(writers.WRITERS)


def _load(path: Path, **options: Any) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    ids = torch.arange(2, 26).view(2, 12)
    return model(input_ids=ids, use_cache=False).logits


def _check(checkpoint: writers.Checkpoint, model: hf.PreTrainedModel) -> None:
    """Every 4-bit layer to the bit, and the whole model's logits."""
    found = dict(loading.int4_layers(model))
    assert found.keys() == checkpoint.layers.keys()
    for name, layer in checkpoint.layers.items():
        assert torch.equal(found[name].weight, layer.dense().float()), name
    want, got = _logits(checkpoint.dense), _logits(model)
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_load_and_save(form: str, family: str, tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path / "a", tiny.make(family), form, act_order=form == "gptq_v2")
    model = _load(checkpoint.path)
    _check(checkpoint, model)
    assert model.hf_quantizer.is_serializable()
    model.save_pretrained(tmp_path / "b")
    # what was read is what is written, tensor for tensor
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name
    old, new = (json.loads((tmp_path / d / "config.json").read_text())["quantization_config"] for d in "ab")
    for field in old.keys() - {"checkpoint_format"}:
        assert new[field] == old[field], field
    _check(checkpoint, _load(tmp_path / "b"))


@pytest.mark.parametrize("group", [64, 128, -1, 40])
@pytest.mark.parametrize("form", ["awq", "gptq", "pack-quantized"])
def test_groups(form: str, group: int, tmp_path: Path) -> None:
    config = copy.deepcopy(writers.CONFIGS[form])
    if form == "pack-quantized":
        weights = config["config_groups"]["group_0"]["weights"]
        weights |= {"group_size": group} if group != -1 else {"group_size": None, "strategy": "channel"}
    else:
        config["group_size"] = group
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), form, group=group, config=config)
    _check(checkpoint, _load(tmp_path))


@pytest.mark.parametrize("form", ["gptq", "pack-quantized"])
def test_symmetric(form: str, tmp_path: Path) -> None:
    config = copy.deepcopy(writers.CONFIGS[form])
    if form == "gptq":
        config["sym"] = True
    else:
        config["config_groups"]["group_0"]["weights"]["symmetric"] = True
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), form, config=config, symmetric=True)
    model = _load(tmp_path)
    _check(checkpoint, model)
    assert all(module.zeros is None for _, module in loading.int4_layers(model))


def test_act_order_of_compressed_tensors(tmp_path: Path) -> None:
    config = copy.deepcopy(writers.CONFIGS["pack-quantized"])
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "pack-quantized", config=config, act_order=True)
    _check(checkpoint, _load(tmp_path))


@pytest.mark.parametrize("form", ["awq", "gptq"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_heads(form: str, tied: bool, quantised: bool, tmp_path: Path) -> None:
    """lm_head tied to the embedding, of its own, or 4-bit (which unties it)."""
    model = tiny.make("llama", tie_word_embeddings=tied)
    if quantised and tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    checkpoint = writers.write_model(tmp_path / "a", model, form, skip=() if quantised else ("lm_head",))
    if quantised and tied:
        assert "lm_head.qweight" in checkpoint.tensors
    loaded = _load(tmp_path / "a")
    _check(checkpoint, loaded)
    loaded.save_pretrained(tmp_path / "b")
    _check(checkpoint, _load(tmp_path / "b"))
    assert (loaded.get_input_embeddings().weight is loaded.lm_head.weight) == (tied and not quantised)


def test_modules_not_converted_and_biases_of_the_writer(tmp_path: Path) -> None:
    config = writers.CONFIGS["awq"] | {"modules_to_not_convert": ["down_proj"]}
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "awq", skip=("lm_head", "down_proj"), config=config)
    # a bias that the model's class does not have
    bias = torch.randn(64)
    writers.rewrite(checkpoint, {"model.layers.0.self_attn.q_proj.bias": bias})
    model = _load(tmp_path)
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.bias, bias)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    checkpoint.dense.model.layers[0].self_attn.q_proj.bias = nn.Parameter(bias)
    _check(checkpoint, model)


def test_gpt2_linears_that_are_stored_transposed(tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("gpt2"), "gptq")
    _check(checkpoint, _load(tmp_path))


def test_exceptions_of_gptqmodel(tmp_path: Path) -> None:
    config = writers.CONFIGS["gptq"] | {
        "dynamic": {"-:.*down_proj": {}},
        "lm_head": False,
        "modules_in_block_to_quantize": [["self_attn.q_proj"]],
    }
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "gptq", skip=("lm_head", "down_proj"), config=config)
    model = _load(tmp_path)
    _check(checkpoint, model)
    saved = model.config.quantization_config.to_dict()
    assert saved["dynamic"] == config["dynamic"] and saved["lm_head"] is False


def test_checkpoint_without_the_prefix_of_its_class(tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("llama", tie_word_embeddings=True), "awq")
    tensors = {name.removeprefix("model."): t for name, t in checkpoint.tensors.items()}
    checkpoint.tensors = tensors
    writers.rewrite(checkpoint, {})
    _check(checkpoint, _load(tmp_path))


def test_bfloat16_keeps_the_scales(tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("qwen2"), "awq")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, module in loading.int4_layers(model):
        assert module.scales.dtype == torch.float16 and module.weight.dtype == torch.bfloat16
        assert torch.equal(module.dequantize(torch.float32), checkpoint.layers[name].dense().float())
    want = _logits(copy.deepcopy(checkpoint.dense).bfloat16()).float()
    assert float((_logits(model).float() - want).norm() / want.norm()) < 0.02


def test_dequantize_gives_a_plain_model(tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("qwen2"), "gptq")
    model = _load(tmp_path)
    model.dequantize()
    assert not list(loading.int4_layers(model))
    assert torch.equal(_logits(model), _logits(checkpoint.dense))


# ---- bad input -----------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{Q}.qweight": None}, rf"{Q}.qweight: missing.*only g_idx, qzeros, scales"),
        ({f"{Q}.scales": None}, rf"{Q}: scales: missing"),
        ({f"{Q}.qzeros": None}, rf"{Q}: qzeros: missing"),
        ({f"{Q}.{leaf}": None for leaf in ("qweight", "qzeros", "scales", "g_idx")}, rf"{Q}.qweight: missing"),
        ({f"{Q}.scales": torch.full((2, 64), torch.nan)}, rf"{Q}: scales: 128 entries are NaN"),
        ({f"{Q}.qweight": torch.zeros(16, 64, dtype=torch.int32)}, rf"{Q}: qweight: got \[16, 64\], needs \[8, 64\]"),
        ({f"{Q}.qweight": torch.zeros(8, 64, dtype=torch.int64)}, rf"{Q}: qweight: got torch.int64"),
        ({"model.layers.7.mlp.up_proj.qweight": torch.zeros(1, 8, dtype=torch.int32)}, "layers.7.*no linear layers"),
        ({"lm_head.weight": None}, "lm_head.qweight: missing"),
    ],
)
def test_bad_tensors(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "gptq")
    writers.rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path)


def test_missing_bias(tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("qwen2"), "gptq")
    writers.rewrite(checkpoint, {f"{Q}.bias": None})
    with pytest.raises(ValueError, match=f"{Q}: bias: missing"):
        _load(tmp_path)


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("gptq", {"bits": 8}, "bits: got 8"),
        ("gptq", {"bits": 3}, "bits: got 3"),
        ("awq", {"bits": 8}, "bits: got 8"),
        ("gptq", {"group_size": 64}, r"needs .*group_size 64"),
        ("awq", {"group_size": 128}, r"needs .*group_size 128"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'"),
        ("awq", {"version": "gemv"}, "version: got 'gemv'"),
        ("gptq", {"dynamic": {".*": {"bits": 8}}}, "dynamic: .*bits=8"),
        ("pack-quantized", {"config_groups": {}}, "config_groups"),
        ("pack-quantized", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ],
)
def test_bad_configurations(form: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    writers.write_model(tmp_path, tiny.make("llama"), form, config=writers.CONFIGS[form] | change)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [({"num_bits": 8}, "num_bits: got 8"), ({"type": "float"}, "type: got 'float'"), ({"group_size": 64}, "size 64")],
)
def test_bad_weights_of_compressed_tensors(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = copy.deepcopy(writers.CONFIGS["pack-quantized"])
    config["config_groups"]["group_0"]["weights"] |= change
    writers.write_model(tmp_path, tiny.make("llama"), "pack-quantized", config=config)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path)


def test_other_compression_names_its_package(tmp_path: Path) -> None:
    config = writers.CONFIGS["pack-quantized"] | {"format": "float-quantized"}
    writers.write_model(tmp_path, tiny.make("llama"), "pack-quantized", config=config)
    with pytest.raises(ImportError, match="compressed-tensors"):
        _load(tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.0001])
def test_truncated_file(keep: float, tmp_path: Path) -> None:
    writers.write_model(tmp_path, tiny.make("llama"), "awq")
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: max(4, int(keep * len(content)))])
    with pytest.raises(ValueError, match=r"model.safetensors: corrupt or truncated"):
        _load(tmp_path)


def test_experts_are_refused(tmp_path: Path) -> None:
    model = tiny.make("mixtral")
    checkpoint = writers.write_model(tmp_path, model, "awq")
    layer = writers.awq(writers.random_layer(96, 64, 32))
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    writers.rewrite(checkpoint, {f"{expert}.{leaf}": tensor for leaf, tensor in layer.items()})
    with pytest.raises(ValueError, match="experts of a mixture"):
        _load(tmp_path)


# ---- the hook ------------------------------------------------------------------------------------------------------


def _python(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("order", ["torch_pagedkv, transformers", "transformers, torch_pagedkv"])
@pytest.mark.parametrize("hook", ["1", "0"])
def test_hook(order: str, hook: str) -> None:
    code = f"""
import sys, {order.split(",")[0]}
assert "transformers" not in sys.modules or "{order}".startswith("transformers")
import {order}
from transformers.quantizers import auto
print(auto.AUTO_QUANTIZER_MAPPING["awq"].__module__)
import inspect; assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(auto)
"""
    ours = _python(code, TORCH_PAGEDKV_QUANTIZERS=hook) == "torch_pagedkv.quant.registry"
    assert ours == (hook == "1")


def test_installed_packages_keep_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With transformers' own packages there, theirs is taken, but for `torch_pagedkv.from_pretrained`."""
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "awq")
    monkeypatch.setattr(registry, "METHODS", {"awq": ("torch",), "gptq": ("torch",), "compressed-tensors": ("torch",)})
    with pytest.raises(ImportError, match="gptqmodel"):  # which is not really there
        _load(checkpoint.path)
    _check(checkpoint, torch_pagedkv.from_pretrained(checkpoint.path, dtype=torch.float32))


# ---- with patch() --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["awq", "gptq_v2"])
def test_patch_of_a_loaded_model(form: str, tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), form)
    model = _load(tmp_path)
    stock = tiny.generate(model, tiny.batch())
    torch_pagedkv.patch(model)
    assert torch.equal(tiny.generate(model, tiny.batch()), stock)
    replaced = torch_pagedkv.report(model).replaced
    assert replaced["int4_linear"] == len(checkpoint.layers)
    assert replaced["silu_and_mul"] == 2 and replaced["paged_attention"] == 2
    torch_pagedkv.unpatch(model)
    _check(checkpoint, model)
    assert all(type(module) is Int4Linear for _, module in loading.int4_layers(model))


def test_compile_of_a_patched_model(tmp_path: Path) -> None:
    """One graph a kind of step, no break, one call of the op a layer."""
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "gptq_v2", act_order=True)
    model = _load(tmp_path)
    want = tiny.generate(model, tiny.batch())
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls.append(sum("int4_linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch_pagedkv.patch(model)
    model.compile(backend=backend, fullgraph=True)
    assert torch.equal(tiny.generate(model, tiny.batch()), want)
    assert set(calls) == {len(checkpoint.layers)}


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}])
def test_device_maps(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "awq")
    _check(checkpoint, _load(tmp_path, **options))


def test_shards_and_bin_files(tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path / "a", tiny.make("llama"), "gptq")
    _load(tmp_path / "a").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    _check(checkpoint, _load(tmp_path / "shards"))
    (tmp_path / "bin").mkdir()
    torch.save(checkpoint.tensors, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    _check(checkpoint, _load(tmp_path / "bin"))


def test_gradients_and_copies_of_a_loaded_model(tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "awq")
    model, ids = _load(tmp_path), torch.arange(2, 26).view(2, 12)
    _check(checkpoint, pickle.loads(pickle.dumps(model)))
    _check(checkpoint, copy.deepcopy(model))
    for each in (model, checkpoint.dense):
        each(input_ids=ids, labels=ids).loss.backward()
    grads = [m.get_input_embeddings().weight.grad for m in (model, checkpoint.dense)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


HEADS = ("lm_head", "embed_out")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_patched(family: str, tmp_path: Path) -> None:
    """4-bit layers in every kind of model that can be patched (of Mixtral's, those outside of the experts)."""
    checkpoint = writers.write_model(tmp_path, tiny.make(family), "gptq", skip=HEADS)
    # older transformers would take sdpa for Gemma 2, without the softcap
    model = _load(tmp_path, attn_implementation=checkpoint.dense.config._attn_implementation)
    inputs = tiny.batch()
    _check(checkpoint, model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, tiny.PAD
    want = tiny.generate(model, inputs)
    torch_pagedkv.patch(model)
    assert torch.equal(tiny.generate(model, inputs), want)
    assert torch_pagedkv.report(model).replaced["int4_linear"] == len(checkpoint.layers)
    assert not any(row.kind == "fusion" for row in torch_pagedkv.report(model).rows)
    torch_pagedkv.unpatch(model)
    _check(checkpoint, model)


@pytest.mark.parametrize("form", FORMS)
def test_odd_sizes_and_a_quantised_head_patched(form: str, tmp_path: Path) -> None:
    model = tiny.make("qwen2", intermediate_size=77, hidden_size=72, num_attention_heads=3, num_key_value_heads=1)
    checkpoint = writers.write_model(tmp_path, model, form, skip=())
    loaded, inputs = _load(tmp_path), tiny.batch()
    _check(checkpoint, loaded)
    loaded.generation_config.pad_token_id = tiny.PAD
    want = tiny.generate(loaded, inputs)
    torch_pagedkv.patch(loaded)
    assert torch.equal(tiny.generate(loaded, inputs), want)


def test_settings_given_by_the_user(tmp_path: Path) -> None:
    """transformers' own configuration objects beside the checkpoint's."""
    for form, settings in (("gptq", hf.GPTQConfig(bits=4, backend="auto")), ("awq", hf.AwqConfig(bits=4))):
        checkpoint = writers.write_model(tmp_path / form, tiny.make("llama"), form)
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            _check(checkpoint, _load(tmp_path / form, quantization_config=settings))
