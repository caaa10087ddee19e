"""The fused norms, MLPs, rotary embeddings, residuals and projections: stock numbers, and gone without a trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from torch_pagedkv.patches import linear, match, mlp, norm, residual, rotary
from torch_pagedkv.patches.log import PatchLog

ALL = SimpleNamespace(fuse_norm=True, fuse_mlp=True, fuse_rotary=True, fuse_linear=True)

#: model type -> the ops that its fused form runs (an op that is missing there is one that the family has no place for)
FAMILIES = {
    "llama": {"rms_norm", "add_rms_norm", "silu_and_mul", "rotary_and_cache", "fused projection"},
    "mistral": {"rms_norm", "add_rms_norm", "silu_and_mul", "rotary_and_cache", "fused projection"},
    "qwen2": {"rms_norm", "add_rms_norm", "silu_and_mul", "rotary_and_cache", "fused projection"},
    "qwen3": {"rms_norm", "add_rms_norm", "silu_and_mul", "rotary_and_cache", "fused projection"},
    "gemma2": {"rms_norm", "add_rms_norm", "gelu_and_mul", "rotary_and_cache", "fused projection"},
    "gemma3_text": {"rms_norm", "add_rms_norm", "gelu_and_mul", "rotary_and_cache", "fused projection"},
    "phi3": {"rms_norm", "add_rms_norm", "silu_and_mul", "rotary_and_cache"},
    "mixtral": {"rms_norm", "add_rms_norm", "rotary_and_cache", "fused projection"},
    "cohere": {"silu_and_mul", "rotary_and_cache", "fused projection"},  # interleaved pairs
    "glm": {"rms_norm", "add_rms_norm", "silu_and_mul", "rotary_and_cache", "fused projection"},  # interleaved, partial
    "gpt_oss": {"rms_norm", "add_rms_norm", "rotary_and_cache", "fused projection"},  # cos of half width
    "gpt_neox": {"layer_norm", "rotary_and_cache"},
    "stablelm": {"layer_norm", "silu_and_mul", "rotary_embedding", "fused projection"},
    "gpt2": {"layer_norm"},
}


def tiny(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # norms' weights away from 1, everything large enough to matter
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
        else:
            nn.init.uniform_(p, 0.5, 1.5)
    return model.to(dtype)


def fuse(model: nn.Module, ids: torch.Tensor) -> PatchLog:
    log = PatchLog()
    for recipe in (norm, mlp, residual, linear, rotary):
        recipe.apply(model, ALL, log)
    with torch.no_grad(), rotary.learning(model, log):
        model(ids)
    return log


def state(model: nn.Module) -> dict[str, dict[str, object]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_same_numbers_and_undone(model_type):
    model = tiny(model_type)
    ids = torch.randint(3, 128, (2, 9))
    before = state(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model(ids).logits
        log = fuse(model, ids)
        got = model(ids).logits
    assert {r.op for r in log.rows if r.op} - {"linear"} == FAMILIES[model_type]
    assert match.relative_error(got, want) < 4e-6
    log.undo()
    assert state(model) == before
    for n, p in model.named_parameters():
        assert torch.equal(p, weights[n]), n
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), n
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_within_stock(dtype):
    """In half precision the fused model is as near to float64 as the stock one."""
    model = tiny("llama", dtype)
    ids = torch.randint(3, 128, (3, 17))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
        stock = match.relative_error(model(ids).logits, exact)
        fuse(model, ids)
        fused = match.relative_error(model(ids).logits, exact)
    assert 0 < fused <= 2 * stock


def test_gradients_take_the_stock_path():
    model, ids = tiny("llama"), torch.randint(3, 128, (2, 9))
    model(ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    fuse(model, ids)
    model(ids, labels=ids).loss.backward()
    for n, p in model.named_parameters():
        assert torch.equal(p.grad, want[n]), n


def test_hooks_see_what_stock_shows_them():
    model, ids = tiny("llama"), torch.randint(3, 128, (2, 9))
    watched = ["q_proj", "gate_proj", "up_proj", "post_attention_layernorm", "self_attn", "mlp"]

    def record() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        handles = [
            m.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
            for n, m in model.named_modules()
            if n.rsplit(".", 1)[-1] in watched
        ]
        with torch.no_grad():
            model(ids)
        for h in handles:
            h.remove()
        return [t.clone() for t in seen]

    want = record()
    fuse(model, ids)
    got = record()
    assert len(got) == len(want) == len(watched) * 2
    for g, w in zip(got, want, strict=True):
        assert match.relative_error(g, w) < 1e-5


def test_copies_are_independent():
    model, ids = tiny("llama"), torch.randint(3, 128, (2, 9))
    fuse(model, ids)
    with torch.no_grad():
        want = model(ids).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, want)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(ids).logits, want)


def test_moved_parameters_are_used():
    """`.to()` replaces the parameters, so the fused weights are stale: the projections must run on their own."""
    model, ids = tiny("llama"), torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        want = copy.deepcopy(model).double()(ids).logits
        fuse(model, ids)
        assert match.relative_error(model.double().float()(ids).logits, want) < 4e-6


class _ShiftedRMSNorm(nn.Module):
    """Looks like an RMSNorm, is none: it centres first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class _OddMLP(nn.Module):
    """A gated MLP with one thing more."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.01


@pytest.mark.parametrize(
    ("recipe", "module", "reason"),
    [(norm, _ShiftedRMSNorm(), "numbers are not an RMSNorm's"), (mlp, _OddMLP(), "does not reproduce its numbers")],
)
def test_look_alikes_are_left_alone(recipe, module, reason):
    model, log = nn.Sequential(module), PatchLog()
    recipe.apply(model, ALL, log)
    assert "forward" not in vars(module)
    assert [r.op for r in log.rows] == [None] and reason in log.rows[0].reason
