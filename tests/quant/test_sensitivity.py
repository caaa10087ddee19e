"""What rounding a layer would cost, against what it costs."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_pagedkv.quant import sensitivity

#: layer -> the size of noise that costs some thousandths of a nat
SIZES = {
    "model.layers.0.self_attn.v_proj": 0.01,
    "model.layers.0.mlp.down_proj": 0.01,
    "model.layers.1.mlp.up_proj": 0.1,
}


def _model() -> nn.Module:
    """A small model that is sure of some of its tokens."""
    model = tiny.make("llama", vocab_size=40)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))  # padding's, too
    return model


@torch.no_grad()
def _text(model: nn.Module, rows: int = 96, length: int = 48) -> Tensor:
    """Text of the model's own, which has the likelihoods that it gives."""
    torch.manual_seed(1)
    ids = torch.randint(0, 40, (rows, 1))
    while ids.shape[1] < length:
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    return ids


@torch.no_grad()
def _divergence(model: nn.Module, name: str, noise: Tensor, ids: Tensor) -> float:
    """How much likelihood text of the model's own loses on average when a layer's outputs change."""
    want = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    module = model.get_submodule(name)
    hook = module.register_forward_hook(lambda module, args, output: output + noise)
    got = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    hook.remove()
    return float(F.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("name", SIZES)
def test_costs_are_what_noise_costs(name: str) -> None:
    model = _model()
    ids, module = _text(model), model.get_submodule(name)
    noise = SIZES[name] * torch.randn(*ids.shape, module.out_features, generator=torch.Generator().manual_seed(2))
    rows = iter(noise)  # each row once, in order
    cost = sensitivity.costs(model, {name: module}, lambda _, x: next(rows), ids)[name]
    want = _divergence(model, name, noise, ids)
    assert 1e-5 < want < 0.02
    assert 0.7 < cost / want < 1.4


def test_nothing_changes() -> None:
    model = _model()
    ids, layers = _text(model, 4), {name: model.get_submodule(name) for name in (*SIZES, "lm_head")}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = sensitivity.costs(model, layers, lambda name, x: x.new_ones(1), ids)
    model.requires_grad_(True)
    with torch.no_grad():
        free = sensitivity.costs(model, layers, lambda name, x: x.new_ones(1), ids)
    assert frozen == free and all(cost > 0 for cost in free.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    never = {"never": nn.Linear(2, 2)}
    assert sensitivity.costs(model, never, lambda name, x: x, ids) == {"never": 0}


def test_costs_are_bounded_where_gradients_are_not() -> None:
    """Padding's embedding is 0, and the first norm's gradient there is 1 / sqrt(eps)."""
    model, ids = tiny.make("llama", vocab_size=40), torch.full((2, 8), tiny.PAD)
    module = model.get_submodule("model.layers.0.self_attn.v_proj")
    assert 0 < sensitivity.costs(model, {"v": module}, lambda name, x: x.new_ones(1), ids)["v"] <= 0.5 * 8 / 7


def test_too_costly() -> None:
    cost, sizes = {"a": 1.0, "b": 3.0, "c": 2.0}, {"a": 1, "b": 10, "c": 2}
    for bound, spared in ((6.0, []), (5.0, ["a"]), (4.9, ["a", "c"]), (0.0, ["a", "c", "b"])):
        assert sensitivity.too_costly(cost, sizes, bound) == spared
