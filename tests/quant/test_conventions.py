"""Configurations as hub checkpoints have them: exceptions by layer, several groups, keys of different writers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
import writers

from torch_pagedkv.quant import loading
from torch_pagedkv.quant.checkpoint import recipe

DOWN, UP = "mlp.down_proj", "mlp.up_proj"


def _load(path: Path, **options: Any) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def _write(path: Path, form: str, config: dict[str, Any], groups: dict[str, int], **kind: Any) -> writers.Checkpoint:
    """A checkpoint in groups of 32, but for layers whose names end like these."""
    checkpoint = writers.write_model(path, tiny.make("llama"), form, config=config, **kind)
    change = {}
    for name, layer in checkpoint.layers.items():
        for end, group in groups.items():
            if name.endswith(end):
                n, k = layer.q.shape
                made = checkpoint.layers[name] = writers.random_layer(n, k, group, seed=len(change))
                with torch.no_grad():
                    checkpoint.dense.get_submodule(name).weight.copy_(made.dense())
                options = {"symmetric": kind.get("symmetric", False)} if form == "pack-quantized" else {}
                change |= {f"{name}.{leaf}": t for leaf, t in writers.WRITERS[form](made, **options).items()}
    writers.rewrite(checkpoint, change)
    return checkpoint


def _check(checkpoint: writers.Checkpoint, model: hf.PreTrainedModel) -> None:
    found = dict(loading.int4_layers(model))
    assert found.keys() == checkpoint.layers.keys()
    for name, layer in checkpoint.layers.items():
        assert torch.equal(found[name].weight, layer.dense().float()), name


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_both_names_of_the_format(key: str, form: str, tmp_path: Path) -> None:
    """Newer versions of GPTQModel write `format` alone. A zero that is off by one would show in every weight."""
    config = {name: value for name, value in writers.CONFIGS[form].items() if name != "checkpoint_format"}
    _check(writers.write_model(tmp_path, tiny.make("llama"), form, config=config | {key: form}), _load(tmp_path))


def test_fields_that_change_nothing(tmp_path: Path) -> None:
    config = writers.CONFIGS["gptq"] | {
        "true_sequential": True,
        "static_groups": True,
        "damp_percent": 0.05,
        "damp_auto_increment": 0.0015,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "is_marlin_format": False,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:1.4.0"], "uri": "https://github.com/modelcloud/gptqmodel"},
    }
    _check(writers.write_model(tmp_path, tiny.make("llama"), "gptq", config=config), _load(tmp_path))


@pytest.mark.parametrize("prefix", ["", "+:"])
def test_dynamic(prefix: str, tmp_path: Path) -> None:
    """Other settings for layers by a regular expression, from a name's beginning on; the first that matches holds."""
    dynamic = {
        f"{prefix}.*\\.layers\\.\\d+\\.mlp\\.down_proj$": {"group_size": 64},
        f"{prefix}.*\\.mlp\\.(down|up)_proj": {"group_size": -1, "damp_percent": 0.2},
        f"{prefix}mlp": {"group_size": 16},  # matches nothing: names begin with "model."
    }
    config = writers.CONFIGS["gptq"] | {"dynamic": dynamic}
    checkpoint = _write(tmp_path / "a", "gptq", config, {DOWN: 64, UP: -1})
    model = _load(tmp_path / "a")
    _check(checkpoint, model)
    model.save_pretrained(tmp_path / "b")
    _check(checkpoint, _load(tmp_path / "b"))


def test_dynamic_exceptions_come_first(tmp_path: Path) -> None:
    dynamic = {"-:.*down_proj": {}, "+:.*mlp.*": {"group_size": 64}}
    config = writers.CONFIGS["gptq"] | {"dynamic": dynamic}
    checkpoint = writers.write_model(tmp_path, tiny.make("llama"), "gptq", skip=("lm_head", DOWN), config=config)
    change = {}
    for name, layer in checkpoint.layers.items():
        if ".mlp." in name:
            made = checkpoint.layers[name] = writers.random_layer(*layer.q.shape, 64)
            change |= {f"{name}.{leaf}": t for leaf, t in writers.gptq(made).items()}
    writers.rewrite(checkpoint, change)
    _check(checkpoint, _load(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dynamic": {"+:.*": {"bits": 8}}}, r"dynamic: '\+:\.\*' has bits=8, only 4"),
        ({"dynamic": {"mlp": {"format": "gptq_v2"}}}, "dynamic: 'mlp' has format='gptq_v2'"),
        ({"dynamic": {"mlp": {"adapter": {"name": "lora"}}}}, "dynamic: 'mlp' has adapter="),
        ({"dynamic": {"mlp": {"group_size": 0}}}, r"dynamic: 'mlp': group_size: got 0, needs -1 or an integer >= 1"),
        ({"dynamic": {"(mlp": {}}}, r"'\(mlp' is no regular expression"),
        ({"dynamic": {"-:(mlp": {}}}, r"'\(mlp' is no regular expression"),
        ({"adapter": {"name": "lora", "path": "x"}}, "adapter: got .* needs none"),
        ({"pack_dtype": "int64"}, "packed in int32 words"),
        ({"is_marlin_format": True}, "not Marlin's layout"),
        ({"checkpoint_format": "bitblas"}, "checkpoint_format: got 'bitblas'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'"),
        ({"bits": 2}, "bits: got 2"),
    ],
)
def test_what_gptq_checkpoints_are_refused_for(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    writers.write_model(tmp_path, tiny.make("llama"), "gptq", config=writers.CONFIGS["gptq"] | change)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path)


# ---- AWQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["GEMM", "gemm", None])
def test_awq_versions(version: str | None, tmp_path: Path) -> None:
    config = writers.CONFIGS["awq"] | {"version": version}
    _check(writers.write_model(tmp_path, tiny.make("llama"), "awq", config=config), _load(tmp_path))


@pytest.mark.parametrize("version", ["gemv", "GEMV", "gemv_fast", "marlin", "llm-awq"])
def test_other_awq_layouts_are_refused(version: str) -> None:
    with pytest.raises(ValueError, match=f"version: got '{version.lower()}', needs 'gemm'"):
        recipe(writers.CONFIGS["awq"] | {"version": version})


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


def _groups(*groups: tuple[list[str], dict[str, Any]]) -> dict[str, Any]:
    """A configuration of several groups: targets, and what is other than in `writers.CONFIGS`."""
    config = copy.deepcopy(writers.CONFIGS["pack-quantized"])
    first = config["config_groups"].pop("group_0")
    for number, (targets, change) in enumerate(groups):
        one = copy.deepcopy(first) | {"targets": targets}
        one["weights"] |= change
        config["config_groups"][f"group_{number}"] = one
    return config


def test_several_groups(tmp_path: Path) -> None:
    """Names, ends of names and expressions come before classes, wherever they stand."""
    config = _groups(
        (["Linear"], {}),
        ([r"re:.*\.mlp\.down_proj$"], {"group_size": 64}),
        (["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], {"group_size": None, "strategy": "channel"}),
    )
    checkpoint = _write(tmp_path / "a", "pack-quantized", config, {DOWN: 64, UP: -1})
    model = _load(tmp_path / "a")
    _check(checkpoint, model)
    model.save_pretrained(tmp_path / "b")
    _check(checkpoint, _load(tmp_path / "b"))


def test_ignored_layers(tmp_path: Path) -> None:
    config = _groups((["Linear"], {})) | {"ignore": ["lm_head", r"re:.*down_proj$"]}
    model = tiny.make("llama")
    checkpoint = writers.write_model(tmp_path, model, "pack-quantized", skip=("lm_head", DOWN), config=config)
    loaded = _load(tmp_path)
    _check(checkpoint, loaded)
    for number, block in enumerate(loaded.model.layers):
        assert torch.equal(block.mlp.down_proj.weight, model.model.layers[number].mlp.down_proj.weight)


@pytest.mark.parametrize("order", ["weight", "static", "dynamic", None])
def test_orders_without_an_assignment(order: str | None, tmp_path: Path) -> None:
    """Only "group" keeps its order: the others' groups are runs of inputs."""
    config = _groups((["Linear"], {"actorder": order}))
    _check(writers.write_model(tmp_path, tiny.make("llama"), "pack-quantized", config=config), _load(tmp_path))


def test_an_assignment_that_is_missing(tmp_path: Path) -> None:
    config = _groups((["Linear"], {"actorder": "group"}))
    writers.write_model(tmp_path, tiny.make("llama"), "pack-quantized", config=config)
    with pytest.raises(ValueError, match="weight_g_idx: missing"):
        _load(tmp_path)


def test_layers_that_no_group_is_for(tmp_path: Path) -> None:
    writers.write_model(tmp_path, tiny.make("llama"), "pack-quantized", config=_groups((["re:.*mlp.*"], {})))
    with pytest.raises(ValueError, match="k_proj: it is stored in 4 bits, and no group of the quantization_config"):
        _load(tmp_path)


def test_a_target_that_is_no_expression() -> None:
    with pytest.raises(ValueError, match=r"config_groups.group_0.targets: '\*mlp' is no regular expression"):
        recipe(_groups((["re:*mlp"], {})))


@pytest.mark.parametrize("format", ["mixed-precision", "int-quantized", "marlin-24"])
def test_groups_of_another_compression(format: str) -> None:
    config = _groups((["Linear"], {}), (["re:.*mlp.*"], {}))
    config["config_groups"]["group_1"]["format"] = format
    with pytest.raises(ValueError, match=f"config_groups.group_1.format: got '{format}'"):
        recipe(config)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", writers.WRITERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = writers.write_model(tmp_path / "a", tiny.make("llama"), form, dtype=dtype)
    model = _load(tmp_path / "a")
    _check(checkpoint, model)
    assert all(layer.scales.dtype == dtype for _, layer in loading.int4_layers(model))
    model.save_pretrained(tmp_path / "b")
    _check(checkpoint, _load(tmp_path / "b"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_refused_by_name(family: str, tmp_path: Path) -> None:
    """As their own hub checkpoints name them."""
    if family not in tiny.FAMILIES:
        pytest.skip(f"no tiny {family}")
    checkpoint = writers.write_model(tmp_path, tiny.make(family), "gptq")
    inner = {"mixtral": "block_sparse_moe.experts.1.w2", "qwen3_moe": "mlp.experts.1.down_proj"}[family]
    expert = f"model.layers.0.{inner}"
    layer = writers.gptq(writers.random_layer(64, 96, 32))
    writers.rewrite(checkpoint, {f"{expert}.{leaf}": tensor for leaf, tensor in layer.items()})
    with pytest.raises(ValueError, match="experts of a mixture"):
        _load(tmp_path)
