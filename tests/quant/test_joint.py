"""Projections of one input in one 4-bit product: the same numbers, one copy of them, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
import writers
from ops.samples_small import Inputs
from torch import nn

import torch_pagedkv
from torch_pagedkv.patches import match
from torch_pagedkv.quant.eight import Fp8Linear, W8A8Linear, unrounded
from torch_pagedkv.quant.fixed import FixedLinear
from torch_pagedkv.quant.formats import FORMATS, Scheme, read
from torch_pagedkv.quant.joint import Joint
from torch_pagedkv.quant.linear import Int4Linear
from torch_pagedkv.quant.loading import int4_layers
from torch_pagedkv.quant.packed import Int8Linear, Q4KLinear

KINDS = ("zeros", "symmetric", "act_order", "one_group", "bias")


def _layers(kind: str = "zeros", outputs: tuple[int, ...] = (64, 32, 13), k: int = 160) -> list[Int4Linear]:
    made = []
    symmetric, order, group = kind == "symmetric", kind == "act_order", -1 if kind == "one_group" else 64
    for seed, n in enumerate(outputs):
        numbers = writers.random_layer(n, k, group, seed, symmetric=symmetric, act_order=order)
        if made and order:
            numbers.g_idx = writers.random_layer(n, k, group, 0, act_order=True).g_idx
        weight = read(FORMATS["gptq"], writers.gptq(numbers), n, k, Scheme(group, symmetric, order))
        bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)) if kind == "bias" else None
        made.append(Int4Linear(weight, bias, torch.float32))
        if order and seed == 0:
            first = numbers.g_idx
        elif order:
            assert (numbers.g_idx == first).all()
    return made


def _bytes(modules: list[Any]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in modules for t in m.buffers()}
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_same_bits(kind: str, rows: int) -> None:
    parts = _layers(kind)
    alone = copy.deepcopy(parts)
    before, size = [dict(m.state_dict()) for m in alone], _bytes(alone)
    joint = Joint(parts)
    x = torch.randn(rows, 160)
    want = torch.cat([m(x) for m in alone], -1)
    assert torch.equal(joint(x), want)
    assert torch.equal(torch.cat([m(x) for m in parts], -1), want)
    # one copy of the numbers: not a byte more, but for what is empty or padding
    assert _bytes(parts) <= size
    for part, old, state in zip(parts, alone, before, strict=True):
        assert part.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in part.state_dict().items())
        assert torch.equal(part.weight, old.weight)
        a, b = part.logical(), old.logical()
        assert torch.equal(a.q, b.q) and torch.equal(a.scales, b.scales) and a.scales.is_contiguous()
    joint.separate()
    for part in parts:
        for t in part.buffers():
            assert t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size()
    assert torch.equal(torch.cat([m(x) for m in parts], -1), want)


def _others(kind: type[FixedLinear], outputs: tuple[int, ...] = (64, 32, 16)) -> list[FixedLinear]:
    """Layers of 256 inputs in other forms than `Int4Linear`."""
    made: list[FixedLinear] = []
    for seed, n in enumerate(outputs):
        new = Inputs("cpu", seed)
        if kind is Q4KLinear:
            weight = Q4KLinear.pack(new.q4k_blocks(n, 1))
        elif kind is Int8Linear:
            q = torch.randint(-128, 128, (n, 256), generator=new.generator, dtype=torch.int8)
            weight = Int8Linear.pack(q, new.normal(8, n), 32)
        else:
            weight = kind.pack(new.normal(n, 256))  # type: ignore[attr-defined]
        made.append(kind(weight, new.normal(n), torch.float32))
    return made


@pytest.mark.parametrize("kind", [W8A8Linear, Fp8Linear, Int8Linear, Q4KLinear])
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_other_forms(kind: type[FixedLinear], rows: int) -> None:
    """As above; float8 on the CPU may sum in another order."""
    parts = _others(kind)
    alone, x = copy.deepcopy(parts), torch.randn(rows, 256)
    joint = Joint(parts)
    want = torch.cat([m(x) for m in alone], -1)
    torch.testing.assert_close(joint(x), want, rtol=1e-6, atol=1e-5 if kind is Fp8Linear else 0)
    assert torch.equal(torch.cat([m(x) for m in parts], -1), want)
    assert _bytes(parts) <= _bytes(alone)
    for part, old in zip(parts, alone, strict=True):
        assert torch.equal(part.weight, old.weight)
        assert part.state_dict().keys() == old.state_dict().keys()
    joint.separate()
    for part in parts:
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in part.buffers())
    assert torch.equal(torch.cat([m(x) for m in parts], -1), want)


def test_obstacles_of_other_forms() -> None:
    a, b = _others(W8A8Linear, (64, 64))
    assert Joint.obstacle((a, b)) == ""
    assert Joint.obstacle((a, *_others(Fp8Linear, (64,)))) == "not all are 8-bit"
    b.factor = b.factor * 2
    assert Joint.obstacle((a, b)) == "their inputs are smoothed differently"
    assert Joint.obstacle((nn.Linear(256, 32), a)) == "Linear cannot be joined"
    assert "not multiples of 32" in Joint.obstacle(_others(Q4KLinear, (40, 32)))


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_8_bits_are_fused(form: str) -> None:
    """Where it is asked for (on CUDA it is by itself); the numbers stay, and layers that are not to round run alone."""
    model, inputs = tiny.make("qwen2"), tiny.batch()
    plain = torch_pagedkv.patch(copy.deepcopy(model), weights=form)
    assert not any(name.startswith("fused") for name in torch_pagedkv.report(plain).replaced)
    want = tiny.generate(plain, inputs)
    torch_pagedkv.patch(model, weights=form, fuse_linear=True)
    name = "fused int8_mm" if form == "int8" else "fused fp8_mm"
    assert torch_pagedkv.report(model).replaced[name] == 2 * model.config.num_hidden_layers
    assert torch.equal(tiny.generate(model, inputs), want)
    fused = vars(model.model.layers[0].self_attn.q_proj)["_pagedkv_part"][0].fused
    assert fused.is_current()
    with unrounded(model):
        assert not fused.is_current()
    assert fused.is_current()
    torch_pagedkv.unpatch(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:], want[:, :8])


def test_what_is_written_in_place_holds_for_both() -> None:
    parts, x = _layers("bias"), torch.randn(5, 160)
    others = _layers("bias")
    for other in others:
        other.scales.mul_(0.5)
        other.bias.add_(1)
    joint = Joint(parts)
    for part, other in zip(parts, others, strict=True):
        part.load_state_dict(other.state_dict())
    assert joint.is_current()
    assert torch.equal(joint(x), torch.cat([m(x) for m in others], -1))


@pytest.mark.parametrize("change", ["assign", "cast", "scales", "bias"])
def test_tensors_that_were_replaced(change: str) -> None:
    parts, x = _layers("bias"), torch.randn(5, 160)
    joint = Joint(parts)
    if change == "assign":
        for part in parts:
            part.load_state_dict(
                {k: t * 2 if k == "scales" else t.clone() for k, t in part.state_dict().items()}, assign=True
            )
    elif change == "cast":
        nn.ModuleList(parts).to(torch.bfloat16)
        x = x.bfloat16()
    elif change == "scales":
        parts[1].scales = parts[1].scales * 3
    else:
        parts[2].bias = parts[2].bias + 1
    assert not joint.is_current()
    want = torch.cat([m(x) for m in parts], -1)
    assert joint.join() == "" and joint.is_current()
    assert torch.equal(joint(x), want)


def test_obstacles() -> None:
    def reason(*parts: nn.Module) -> str:
        before = [dict(p._buffers) for p in parts]
        with pytest.raises(ValueError, match=r"^parts: "):
            Joint(parts)  # type: ignore[arg-type]
        assert all(dict(p._buffers) == b for p, b in zip(parts, before, strict=True))
        return Joint.obstacle(parts)

    a, b = _layers(outputs=(64, 64))
    assert Joint.obstacle((a, b)) == ""
    assert "not different" in reason(a, a).replace("are not different", "not different")
    assert "not all are 4-bit" in reason(a, nn.Linear(160, 32))
    assert "differ in inputs or groups" in reason(a, *_layers(outputs=(64,), k=192))
    assert "differ in inputs or groups" in reason(a, *_layers("one_group", outputs=(64,)))
    assert "differ in zeros" in reason(a, *_layers("symmetric", outputs=(64,)))
    assert "differ in bias" in reason(a, *_layers("bias", outputs=(64,)))
    assert "not multiples of 32" in reason(*_layers(outputs=(33, 32)))
    first, other = _layers("act_order", outputs=(64, 64))
    assert Joint.obstacle((first, other)) == ""
    other.perm.copy_(other.perm.flip(0))
    assert "different orders" in reason(first, other)


@pytest.mark.parametrize("form", ["awq", "gptq", "pack-quantized"])
def test_loaded_checkpoints_are_fused(form: str, tmp_path: Path) -> None:
    model = tiny.make("qwen2", hidden_size=128, intermediate_size=160)
    writers.write_model(tmp_path / "a", model, form)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        want = loaded(ids).logits
        torch_pagedkv.patch(loaded)
        rows = torch_pagedkv.report(loaded).rows
        assert sum(row.op == "fused int4_linear" for row in rows) == 2 * loaded.config.num_hidden_layers
        assert match.relative_error(loaded(ids).logits, want) < 2e-6
        numbers = {name: m.weight for name, m in int4_layers(loaded)}
        loaded.save_pretrained(tmp_path / "b")
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
        got = {name: m.weight for name, m in int4_layers(again)}
        assert got.keys() == numbers.keys() and all(torch.equal(got[n], numbers[n]) for n in got)
        torch_pagedkv.unpatch(loaded)
        assert torch.equal(loaded(ids).logits, want)
    for _, m in int4_layers(loaded):
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in m.buffers())
        assert "forward" not in vars(m)


def test_report_says_why_not() -> None:
    model = torch_pagedkv.patch(tiny.make("llama", intermediate_size=100), weights="int4", group_size=32)
    report = torch_pagedkv.report(model)
    assert report.replaced["fused int4_linear"] == 2
    assert {r.reason for r in report.left_alone if "gate_proj+up_proj" in r.module} == {
        "projections not fused: their outputs are not multiples of 32"
    }
    plain = torch_pagedkv.patch(tiny.make("llama"), weights="int4", group_size=32, fuse_linear=False)
    assert "fused int4_linear" not in torch_pagedkv.report(plain).replaced


def test_one_copy_of_the_numbers_and_at_most_one_layer_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is alive while layers are joined: their own numbers and one join's."""
    model = tiny.make("llama", num_hidden_layers=5)
    torch_pagedkv.patch(model, weights="int4", group_size=32, attention=False, fuse_linear=False)
    torch_pagedkv.unpatch(model)
    layers = [m for _, m in int4_layers(model)]
    size, alive, most = _bytes(layers), [], [0]
    stock = Joint.join

    def counting(self: Joint) -> str:
        gone = [weakref.ref(t) for p in self.parts for t in (p.packed, p.scales)]
        result = stock(self)
        gc.collect()
        assert all(ref() is None for ref in gone)  # before the next ones are made
        most[0] = max(most[0], _bytes(layers))
        alive.append(1)
        return result

    monkeypatch.setattr(Joint, "join", counting)
    torch_pagedkv.patch(model)
    assert len(alive) == 10 and most[0] <= size == _bytes(layers)


def test_lora_on_top() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.make("llama"), tiny.batch()
    torch_pagedkv.patch(model, weights="int4", group_size=32)
    want = tiny.generate(model, inputs)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    plain = tiny.make("llama")
    torch_pagedkv.patch(plain, weights="int4", group_size=32, fuse_linear=False, fuse_layers=False, fuse_mlp=False)
    torch.manual_seed(0)
    other = peft.get_peft_model(plain, config).eval()
    options = {"max_new_tokens": 12, "do_sample": False}
    got = adapted.generate(**inputs, **options)
    assert torch.equal(got, other.generate(**inputs, **options))
    assert not torch.equal(got[:, inputs["input_ids"].shape[1] :], want[:, :12])
    with adapted.disable_adapter():
        without = adapted.generate(**inputs, **options)
    assert torch.equal(without[:, inputs["input_ids"].shape[1] :], want[:, :12])


@torch.inference_mode()
def test_prefixes_of_other_scales_are_forgotten() -> None:
    """Changed where no version counts it."""
    model, inputs = tiny.make("llama"), tiny.batch()
    torch_pagedkv.patch(model, weights="int4", group_size=32)
    tiny.generate(model, inputs)
    for _, module in int4_layers(model):
        module.scales.data.mul_(0.5)
    got = tiny.generate(model, inputs)
    model.paged_cache.reset()
    assert torch.equal(tiny.generate(model, inputs), got)


def test_compiled_layers_that_were_replaced() -> None:
    """A graph is made again when the tensors that it holds are no longer the layers'."""
    model = torch_pagedkv.patch(tiny.make("qwen2"), weights="int4", group_size=32, attention=False)
    ids, graphs = torch.arange(2, 26).view(2, 12), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        first = compiled(ids, use_cache=False).logits
        assert torch.equal(first, model(ids, use_cache=False).logits)
        assert graphs[0].count("torch_pagedkv.int4_linear") == 4 * model.config.num_hidden_layers
        state = {k: t * 2 if k.endswith("scales") else t.clone() for k, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        got, want = (each(ids, use_cache=False).logits for each in (compiled, model))
    assert match.relative_error(got, want) < 2e-6 < match.relative_error(got, first)
