"""Decoder layers as one function: the same numbers, and whatever would see a difference brings the modules back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv.patches import UnsupportedModelError, fusion, layer, match
from torch_pagedkv.quant.linear import Int4Linear
from torch_pagedkv.quant.loading import int4_layers

#: families of the form; gemma3 has norms behind its branches too, mixtral experts
STRAIGHT = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral")
OTHERS = ("gpt2", "gemma2", "gpt_oss", "phi3", "falcon_alibi")
NAMES = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm") + tuple(
    f"self_attn.{n}_proj" for n in "qkvo"
)
INNER = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the layers that ran as one function."""
    counted = [0]
    stock = layer.Straight.__call__

    def counting(self: layer.Straight, *args: Any) -> Tensor:
        counted[0] += 1
        return stock(self, *args)

    monkeypatch.setattr(layer.Straight, "__call__", counting)
    yield counted


def _patch(model: hf.PreTrainedModel, **options: Any) -> hf.PreTrainedModel:
    return torch_pagedkv.patch(model, **options)


@torch.no_grad()
def _steps(model: hf.PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a prompt and of decoding steps."""
    cache = torch_pagedkv.PagedCache(model)
    parts = ids.split([ids.shape[1] - 3, 1, 1, 1], 1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def _ids(rows: int = 2) -> Tensor:
    return torch.randint(2, tiny.VOCABULARY, (rows, 14), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("family", STRAIGHT)
def test_same_numbers(family: str, weights: str | None, runs: list[int]) -> None:
    options = {"weights": weights, "group_size": 32}
    model, plain = _patch(tiny.make(family), **options), _patch(tiny.make(family), fuse_layers=False, **options)
    count = model.config.num_hidden_layers
    assert torch_pagedkv.report(model).replaced["one function"] == count
    assert "one function" not in torch_pagedkv.report(plain).replaced
    runs[0] = 0
    got = _steps(model, _ids())
    assert runs[0] == 4 * count
    assert match.relative_error(got, _steps(plain, _ids())) < 2e-6
    assert runs[0] == 4 * count
    assert torch.equal(tiny.generate(model, tiny.batch()), tiny.generate(plain, tiny.batch()))


@pytest.mark.parametrize("family", OTHERS)
def test_other_forms_are_left_to_their_modules(family: str, runs: list[int]) -> None:
    model = _patch(tiny.make(family))
    tiny.generate(model, tiny.batch())
    assert runs[0] == 0 and "one function" not in torch_pagedkv.report(model).replaced


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_quantised_cache(kv_cache_dtype: str, runs: list[int]) -> None:
    model, plain = (
        _patch(tiny.make("llama"), kv_cache_dtype=kv_cache_dtype, fuse_layers=fuse) for fuse in ("auto", False)
    )
    runs[0] = 0
    got = _steps(model, _ids())
    assert runs[0] == 4 * model.config.num_hidden_layers
    # a last bit of a key may fall to the other side of a rounding
    assert match.relative_error(got, _steps(plain, _ids())) < 1e-3


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("name", NAMES + INNER)
def test_hooks_see_what_they_saw(name: str, weights: str | None, runs: list[int]) -> None:
    options = {"weights": weights, "group_size": 32}
    model, plain = _patch(tiny.make("llama"), **options), _patch(tiny.make("llama"), fuse_layers=False, **options)
    want_logits = _steps(plain, _ids())
    seen: dict[str, list[Tensor]] = {"model": [], "plain": []}
    for key, each in (("model", model), ("plain", plain)):
        module = each.model.layers[1].get_submodule(name)
        module.register_forward_hook(
            lambda _m, _i, out, key=key: seen[key].append((out[0] if isinstance(out, tuple) else out).clone())
        )
    before = len(model.model.layers) * 4
    runs[0] = 0
    got = _steps(model, _ids())
    assert runs[0] == before // 2  # the other layer
    _steps(plain, _ids())
    assert len(seen["model"]) == len(seen["plain"]) == 4
    for a, b in zip(seen["model"], seen["plain"], strict=True):
        assert match.relative_error(a, b) < 2e-6
    assert match.relative_error(got, want_logits) < 2e-6
    model.model.layers[1].get_submodule(name)._forward_hooks.clear()
    runs[0] = 0
    _steps(model, _ids())
    assert runs[0] == before


def test_a_hook_between_two_tokens(runs: list[int]) -> None:
    """What is registered while generate() runs is called from the next step on."""
    model, calls = _patch(tiny.make("llama")), []

    class Watch(hf.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 12:
                model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: calls.append(1))
            return scores

    ids = _ids(1)[:, :9]
    model.generate(ids, max_new_tokens=8, do_sample=False, logits_processor=hf.LogitsProcessorList([Watch()]))
    assert len(calls) == 4


def test_hooks_on_every_module(runs: list[int]) -> None:
    model, calls = _patch(tiny.make("llama")), []
    runs[0] = 0
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    try:
        _steps(model, _ids())
    finally:
        handle.remove()
    assert runs[0] == 0 and calls.count("LlamaMLP") == 8


def test_recorded_outputs_leave_nothing_behind(runs: list[int]) -> None:
    """transformers leaves its hooks on the modules, which do nothing from then on."""
    make = lambda: tiny.make("llama", attn_implementation="eager")  # noqa: E731  (sdpa gives no weights)
    model, plain, ids = _patch(make()), make(), _ids()
    with torch.no_grad():
        want = plain(ids, output_hidden_states=True, output_attentions=True)
        got = model(ids, past_key_values=torch_pagedkv.PagedCache(model), output_hidden_states=True)
        both = model(ids, output_hidden_states=True, output_attentions=True)
    for a, b in zip((*got.hidden_states, *both.attentions), (*want.hidden_states, *want.attentions), strict=True):
        assert match.relative_error(a, b) < 1e-5
    runs[0] = 0
    _steps(model, ids)
    assert runs[0] == 4 * len(model.model.layers)


class _Scaled(nn.Module):
    """Stands for an adapter around a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.base(x)


@pytest.mark.parametrize("options", [{}, {"fuse_linear": True}, {"weights": "int4", "group_size": 32}], ids=str)
@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", *INNER[:3]])
def test_adapters_that_came_later(name: str, options: dict[str, Any]) -> None:
    """A child that took another's place runs, and its going brings the old numbers back."""
    model, plain = (
        _patch(tiny.make("llama"), **(options | more)) for more in ({}, {"fuse_layers": False, "fuse_linear": False})
    )
    before = _steps(model, _ids())
    for each in (model, plain):
        owner, leaf = each.model.layers[1].get_submodule(name.split(".")[0]), name.split(".")[1]
        setattr(owner, leaf, _Scaled(getattr(owner, leaf)))
        each.paged_cache.reset_prefixes()
    got = _steps(model, _ids())
    assert match.relative_error(got, _steps(plain, _ids())) < 2e-6
    assert match.relative_error(got, before) > 1e-3
    owner, leaf = model.model.layers[1].get_submodule(name.split(".")[0]), name.split(".")[1]
    setattr(owner, leaf, getattr(owner, leaf).base)
    assert torch.equal(_steps(model, _ids()), before)


@pytest.mark.parametrize("name", ["self_attn", "mlp", "post_attention_layernorm", "self_attn.o_proj"])
def test_another_forward_on_a_module(name: str) -> None:
    """As accelerate binds one."""
    model, calls = _patch(tiny.make("llama")), []
    want = _steps(model, _ids())
    module = model.model.layers[0].get_submodule(name)
    old = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return old(*args, **kwargs)

    module.forward = forward
    assert match.relative_error(_steps(model, _ids()), want) < 2e-6 and len(calls) == 4


def test_training_gradients_and_autocast_run_the_modules(runs: list[int]) -> None:
    model, ids = _patch(tiny.make("llama")), _ids()
    runs[0] = 0
    model.train()
    model(ids, labels=ids).loss.backward()
    model.eval()
    model(ids, past_key_values=torch_pagedkv.PagedCache(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids, past_key_values=torch_pagedkv.PagedCache(model))
    assert runs[0] == 0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("weights", [None, "int4"])
def test_copies_moves_and_pickles(weights: str | None, runs: list[int]) -> None:
    model = _patch(tiny.make("qwen2"), weights=weights, group_size=32)
    want = _steps(model, _ids())
    twin = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().zero_()
    runs[0] = 0
    assert torch.equal(_steps(twin, _ids()), want) and runs[0] == 8
    lost = pickle.loads(pickle.dumps(twin))
    with torch.no_grad():
        assert match.relative_error(lost(_ids()).logits, want) < 1e-5
    half = copy.deepcopy(twin).to(torch.bfloat16)
    runs[0] = 0
    assert match.relative_error(_steps(half, _ids()), want) < 0.05 and runs[0] == 8
    assert {t.dtype for _, m in int4_layers(half) for t in (m.bias,) if t is not None} <= {torch.bfloat16}


def test_a_wrong_layer_is_undone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stock = layer.Straight.__call__
    monkeypatch.setattr(layer.Straight, "__call__", lambda self, *args: 1.01 * stock(self, *args))
    model = _patch(tiny.make("llama"))
    assert "one function" not in torch_pagedkv.report(model).replaced
    assert "the fused logits differ from stock" in caplog.text
    assert torch_pagedkv.report(model).replaced["rotary_and_cache"] == 2  # the others stay
    want = tiny.generate(tiny.make("llama"), tiny.batch())
    assert torch.equal(tiny.generate(model, tiny.batch()), want)


def test_demanded_in_vain() -> None:
    with pytest.raises(UnsupportedModelError, match="fuse_layers=True: GPT2LMHeadModel has no layer"):
        _patch(tiny.make("gpt2"), fuse_layers=True)
    assert set(fusion.KINDS) == {f"fuse_{n}" for n in ("norm", "mlp", "rotary", "linear", "layers")}


def test_dequantised_while_patched(runs: list[int]) -> None:
    model = _patch(tiny.make("llama"), weights="int4", group_size=32)
    want = _steps(model, _ids())
    model.dequantize()
    assert not any(isinstance(m, Int4Linear) for m in model.modules())
    runs[0] = 0
    assert match.relative_error(_steps(model, _ids()), want) < 2e-6
