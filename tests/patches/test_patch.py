"""patch, unpatch and report: refusals before any change, exact restoration, nothing outside of the one model."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

import torch_pagedkv
from torch_pagedkv.evals import shrink
from torch_pagedkv.patches import UnsupportedModelError, attention, checks, is_patched

_SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a patch could leave changed: classes, attributes by identity, configs by content, weights by storage."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name, "class"] = type(module)
        state[name, "names"] = list(vars(module))
        for key, value in vars(module).items():
            if key.startswith("_") and isinstance(value, dict):
                state[name, key] = {k: id(v) for k, v in value.items()}
            else:
                state[name, key] = id(value)
        config = vars(module).get("config")
        if config is not None:
            state[name, "config content"] = copy.deepcopy(vars(config))
    for name, tensor in model.state_dict(keep_vars=True).items():
        state[name, "storage"] = (tensor.data_ptr(), tensor.storage_offset(), tensor.stride(), tensor._version)
        state[name, "bits"] = tensor.detach().clone()
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_unpatch_restores_everything(family: str) -> None:
    model, inputs = tiny.make(family), tiny.batch()
    want = tiny.generate(model, inputs)
    before = snapshot(model)
    assert torch_pagedkv.patch(model) is model
    assert is_patched(model)
    tiny.generate(model, inputs)
    assert torch_pagedkv.unpatch(model) is model
    assert_same(before, snapshot(model))
    assert not hasattr(model, "paged_cache")
    assert torch.equal(tiny.generate(model, inputs), want)
    torch_pagedkv.patch(model)  # and again
    assert torch.equal(tiny.generate(model, inputs), want)


def test_unpatch_after_an_exception() -> None:
    model = tiny.make("llama")
    before = snapshot(model)
    torch_pagedkv.patch(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(model, tiny.batch())
    hook.remove()
    torch_pagedkv.unpatch(model)
    assert_same(before, snapshot(model))


def test_what_the_user_changed_meanwhile_stays() -> None:
    model = tiny.make("llama")
    config = model.config
    torch_pagedkv.patch(model)
    model.config.output_hidden_states = True
    model.config.my_note = "kept"
    torch_pagedkv.unpatch(model)
    assert model.config is config and config.output_hidden_states and config.my_note == "kept"
    assert config._attn_implementation == "sdpa"


def test_patching_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = torch_pagedkv.patch(tiny.make("llama"))
    before = snapshot(model)
    with caplog.at_level(logging.WARNING, "torch_pagedkv"):
        assert torch_pagedkv.patch(model, block_size=32) is model
    assert "already patched" in caplog.text
    assert_same(before, snapshot(model))
    caplog.clear()
    torch_pagedkv.unpatch(model)
    assert not caplog.text
    torch_pagedkv.unpatch(model)
    assert "not patched" in caplog.text


def test_a_recipe_that_fails_undoes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    before = snapshot(model)

    def apply(model: nn.Module, config: object, log: torch_pagedkv.patches.PatchLog, *_: object) -> None:
        log.set_attribute(model.model.layers[0], "mark", 1)
        raise ZeroDivisionError

    monkeypatch.setattr(torch_pagedkv.patches.fusion, "apply", apply)
    with pytest.raises(ZeroDivisionError):
        torch_pagedkv.patch(model)
    assert_same(before, snapshot(model))
    assert not is_patched(model)


def test_models_of_one_config_are_apart() -> None:
    """Two models made from the same config object share it; patching one must not show in the other."""
    first = tiny.make("llama")
    second = hf.LlamaForCausalLM(first.config).eval()
    assert first.config is second.config
    inputs = tiny.batch()
    want = tiny.generate(second, inputs)
    before = snapshot(second)
    torch_pagedkv.patch(first)
    assert_same(before, snapshot(second))
    torch_pagedkv.patch(second)
    torch_pagedkv.unpatch(first)
    assert torch.equal(tiny.generate(second, inputs), want)
    assert second.paged_cache.stats()["peak_used"] > 0
    torch_pagedkv.unpatch(second)
    assert_same(before, snapshot(second))


def test_report() -> None:
    model = tiny.make("llama")
    with pytest.raises(ValueError, match="not patched"):
        torch_pagedkv.report(model)
    torch_pagedkv.patch(model)
    report = torch_pagedkv.report(model)
    assert report.replaced["paged_attention"] == 2
    text = str(report)
    assert "LlamaForCausalLM" in text and "model.layers.*.self_attn" in text and "paged_attention" in text
    assert len(text.splitlines()) < 30
    torch_pagedkv.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        torch_pagedkv.report(model)


def test_report_names_layers_that_are_left() -> None:
    model = tiny.make("llama", layer_types=["full_attention", "chunked_attention"])
    torch_pagedkv.patch(model)
    (row,) = [row for row in torch_pagedkv.report(model).left_alone if row.kind == "attention"]
    assert row.module == "model.layers.1.self_attn" and "chunked attention" in row.reason
    assert row.reason in str(torch_pagedkv.report(model))


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, match: str, error: type[Exception] = UnsupportedModelError, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        torch_pagedkv.patch(model, **options)
    assert_same(before, snapshot(model))
    assert not is_patched(model)


def test_what_is_no_causal_language_model() -> None:
    with pytest.raises(TypeError, match="got dict, needs a causal language model"):
        torch_pagedkv.patch({})  # type: ignore[arg-type]
    refused(nn.Linear(2, 2), "got Linear, needs a causal", TypeError)
    config = hf.LlamaConfig(**_SMALL, intermediate_size=32)
    refused(hf.LlamaModel(config), "not a causal language model")
    refused(hf.LlamaForSequenceClassification(config), "not a causal language model")
    translator = hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refused(hf.T5ForConditionalGeneration(translator), "encoder-decoder")


def test_architectures_without_a_key_value_cache_of_their_own() -> None:
    refused(hf.MambaForCausalLM(hf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)), "state-space")
    latent = hf.DeepseekV3Config(
        **_SMALL,
        intermediate_size=32,
        moe_intermediate_size=16,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        num_key_value_heads=2,
    )
    refused(hf.DeepseekV3ForCausalLM(latent), "multi-head latent attention")
    refused(shrink.make("GitForCausalLM"), "does not go through the attention interface")
    refused(shrink.make("MiniMaxM3VLForCausalLM"), "changes or keeps keys and values after update")
    refused(shrink.make("MoshiForCausalLM"), "only transformers' own cache drops what is outside")
    crossed = hf.GPT2Config(vocab_size=32, n_positions=32, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True)
    refused(hf.GPT2LMHeadModel(crossed), "cross-attention")


def test_shapes_devices_and_dtypes() -> None:
    refused(tiny.make("llama", head_dim=12), "head_dim must be a multiple of 8.*12")
    refused(tiny.make("llama", head_dim=320), "head_dim must be a multiple of 8.*320")
    refused(tiny.make("llama").to(torch.float64), "torch.float64; supported are")
    with torch.device("meta"):
        meta = hf.LlamaForCausalLM(hf.LlamaConfig(**_SMALL, intermediate_size=32))
    with pytest.raises(UnsupportedModelError, match="meta device"):
        torch_pagedkv.patch(meta)
    mixed = tiny.make("llama")
    mixed.lm_head.weight = nn.Parameter(mixed.lm_head.weight.to("meta"))
    with pytest.raises(UnsupportedModelError, match="meta device"):
        torch_pagedkv.patch(mixed)


@pytest.mark.gpu
def test_two_devices() -> None:
    model = tiny.make("llama")
    model.lm_head.cuda()
    refused(model, "parameters on cpu, cuda:0")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"blok_size": 8}, TypeError, "unknown option 'blok_size': did you mean 'block_size'"),
        ({"zzz": 8}, TypeError, "unknown option 'zzz': there are block_size, "),
        ({"block_size": 24}, ValueError, r"block_size: got 24, needs one of 8, 16, 32, 64, 128 \(a power of two\)"),
        ({"block_size": 16.0}, ValueError, "block_size: got 16.0"),
        ({"kv_cache_dtype": "int4"}, ValueError, "kv_cache_dtype: got 'int4', needs one of None, 'int8', 'fp8'"),
        ({"num_blocks": 0}, ValueError, "num_blocks: got 0, needs None or an integer >= 1"),
        ({"num_blocks": True}, ValueError, "num_blocks: got True"),
        ({"num_blocks": 9, "max_blocks": 4}, ValueError, "max_blocks: got 4, less than num_blocks=9"),
        ({"memory_fraction": 1.5}, ValueError, r"memory_fraction: got 1.5, needs a number in \(0, 1\]"),
        ({"salt": 1.5}, TypeError, "salt: got float"),
        ({"fuse_norm": "yes"}, ValueError, "fuse_norm: got 'yes', needs one of 'auto', True, False"),
        ({"prefix_caching": None}, ValueError, "prefix_caching: got None"),
        ({"long_prompts": "cut"}, ValueError, "long_prompts: got 'cut'"),
        ({"config": {}}, TypeError, "config: got dict, needs a PagedConfig"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = tiny.make("llama")
    refused(model, match, error, **options)


def test_options_replace_fields_of_a_config() -> None:
    config = torch_pagedkv.PagedConfig(block_size=32, num_blocks=7)
    model = torch_pagedkv.patch(tiny.make("llama"), config, block_size=8)
    stats = model.paged_cache.stats()
    assert (stats["block_size"], model.paged_cache.pool.num_blocks) == (8, 7)
    assert config.block_size == 32


def test_attention_may_be_left_alone() -> None:
    model, inputs = tiny.make("llama"), tiny.batch()
    want = tiny.generate(model, inputs)
    torch_pagedkv.patch(model, attention=False)
    assert {row.kind for row in torch_pagedkv.report(model).rows}.isdisjoint({"attention", "generation"})
    assert not hasattr(model, "paged_cache") and model.config._attn_implementation == "sdpa"
    assert torch.equal(tiny.generate(model, inputs), want)


# ---- living with other tools -----------------------------------------------------------------------------------------


def test_training_is_that_of_the_stock_model() -> None:
    losses, gradients = [], []
    for patched in (False, True):
        model = tiny.make("llama", attention_dropout=0.1)
        if patched:
            torch_pagedkv.patch(model)
        model.train()
        torch.manual_seed(5)
        inputs = tiny.batch()
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_through_a_paged_cache(family: str, training: bool) -> None:
    """Of a pass behind a stored prefix: the step's own keys and values carry gradients, the prefix is a constant."""
    inputs, gradients = tiny.batch((11, 11)), []
    first, second = (inputs["input_ids"][:, part] for part in (slice(0, 6), slice(6, None)))
    for patched in (False, True):
        model = tiny.make(family).train(training)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if patched:
            torch_pagedkv.patch(model)
        cache = torch_pagedkv.PagedCache(model) if patched else hf.DynamicCache()
        with torch.no_grad():
            model(first, past_key_values=cache)
        mask = torch.ones_like(inputs["input_ids"])
        logits = model(second, attention_mask=mask, past_key_values=cache).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), second.flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(want.norm() for want in gradients[0].values())
    for name, want in gradients[0].items():
        # a gradient that is 0 but for roundings (a key's bias shifts all logits alike) has no size of its own
        assert (gradients[1][name] - want).norm() <= 5e-6 * want.norm() + 1e-9 * largest, name


def test_a_plan_made_without_gradients_is_made_again_with_them() -> None:
    model, inputs = torch_pagedkv.patch(tiny.make("llama")), tiny.batch((9,))
    cache = torch_pagedkv.PagedCache(model)
    with torch.no_grad():
        prepared = model.prepare_inputs_for_generation(**inputs, past_key_values=cache)
        assert cache.is_paged(0)
    model(**prepared).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_deep_copy_has_its_own_cache() -> None:
    model, inputs = torch_pagedkv.patch(tiny.make("llama")), tiny.batch()
    want = tiny.generate(model, inputs)
    stats = model.paged_cache.stats()
    twin = copy.deepcopy(model)
    assert is_patched(twin) and twin.paged_cache is not model.paged_cache
    assert twin.paged_cache.stats()["num_blocks"] == 0
    assert torch.equal(tiny.generate(twin, inputs), want)
    assert twin.paged_cache.stats()["queries"] == len(inputs["input_ids"])
    assert model.paged_cache.stats() == stats
    torch_pagedkv.unpatch(twin)
    assert twin.config._attn_implementation == "sdpa" and "generate" not in vars(twin)
    assert torch.equal(tiny.generate(twin, inputs), want)
    assert is_patched(model)
    assert torch.equal(tiny.generate(model, inputs), want)


def test_pickled_model_comes_back_unpatched() -> None:
    model, inputs = torch_pagedkv.patch(tiny.make("llama")), tiny.batch()
    want = tiny.generate(model, inputs)
    for twin in (pickle.loads(pickle.dumps(model)), _saved(model)):
        assert not is_patched(twin)
        assert torch.equal(tiny.generate(twin, inputs), want)
        torch_pagedkv.patch(twin)
        assert torch.equal(tiny.generate(twin, inputs), want)
        assert twin.paged_cache.stats()["peak_used"] > 0


def _saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_saved_model_is_the_stock_one(tmp_path: Any) -> None:
    model = torch_pagedkv.patch(tiny.make("llama"))
    tiny.generate(model, tiny.batch())
    model.save_pretrained(tmp_path)
    assert "paged" not in (tmp_path / "config.json").read_text()
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf.LlamaForCausalLM and loaded.config._attn_implementation == "sdpa"
    for name, tensor in tiny.make("llama").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_stock_function_is_taken_from_the_modules_file() -> None:
    module = tiny.make("gemma2").model.layers[0].self_attn
    from transformers.models.gemma2 import modeling_gemma2

    assert attention._stock_function("eager", module) is modeling_gemma2.eager_attention_forward


def test_forms_are_read_from_the_source() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    form = checks.attention_form(Gemma2Attention)
    assert form is not None and form.obstacle is None
    assert form.keywords == {"dropout", "scaling", "sliding_window", "softcap"}
    assert checks.attention_form(LlamaAttention).keywords == {"dropout", "scaling"}  # type: ignore[union-attr]
    assert checks.attention_form(LlamaMLP) is None
