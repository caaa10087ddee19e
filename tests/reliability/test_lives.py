"""Patched models that are copied, moved, saved, trained, adapted, and used side by side."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import options as table
import pytest
import tiny
import torch
import transformers as hf
from helpers import assert_nothing_leaks
from options import FAMILIES
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv.patches import is_patched

LONG = tiny.batch((40, 22))  # several blocks of 8, so that prefixes are found


def answer(model: Any, inputs: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    return model.generate(
        **(LONG if inputs is None else inputs), **({"max_new_tokens": 8, "do_sample": False} | options)
    )


def pair(family: str = "llama") -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    return tiny.make(family), torch_pagedkv.patch(tiny.make(family), block_size=8)


# ---- side by side ----------------------------------------------------------------------------------------------------


def test_three_models_token_by_token() -> None:
    """Loops of the user's own, interleaved: two patched models and a stock one, sharing nothing."""
    models = [torch_pagedkv.patch(tiny.make("llama"), block_size=8), torch_pagedkv.patch(tiny.make("mistral"))]
    models.append(tiny.make("gpt2"))
    ids = LONG["input_ids"][:1]
    want = [answer(tiny.make(name), {"input_ids": ids}) for name in ("llama", "mistral", "gpt2")]
    caches: list[Any] = [torch_pagedkv.PagedCache(model) for model in models[:2]] + [hf.DynamicCache()]
    tokens, steps = [ids] * 3, [ids] * 3
    with torch.no_grad():
        for _ in range(8):
            for i, (model, cache) in enumerate(zip(models, caches)):
                logits = model(steps[i], past_key_values=cache, use_cache=True).logits[:, -1:]
                steps[i] = logits.argmax(-1)
                tokens[i] = torch.cat([tokens[i], steps[i]], 1)
    for got, expected in zip(tokens, want):
        assert torch.equal(got, expected)
    caches.clear()
    del cache
    for model in models[:2]:
        assert_nothing_leaks(model)


def test_a_model_asks_another_in_the_middle() -> None:
    """Each from a logits processor of the other, two deep."""
    (stock, first), (other, second) = pair("llama"), pair("gpt2")
    want, wanted = answer(stock), answer(other)

    def asking(model: Any, expected: Tensor, **options: Any) -> hf.LogitsProcessor:
        class Ask(hf.LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                assert torch.equal(answer(model, **options), expected)
                return scores

        return Ask()

    inner = {"logits_processor": [asking(first, want)], "max_new_tokens": 2}
    shorter = answer(other, max_new_tokens=2)
    assert torch.equal(answer(first, logits_processor=[asking(second, shorter, **inner)]), want)
    assert torch.equal(answer(second), wanted)
    for model in (first, second):
        assert_nothing_leaks(model)


@pytest.mark.parametrize("who", ["main", "assistant", "both", "itself"])
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
def test_who_is_patched_in_assisted_generation(family: str, who: str) -> None:
    if who in ("main", "assistant") and family in table.NOT_IN_STOCK.get("assistant", ()):
        pytest.skip("a stock sliding cache of this version of transformers cannot go back")
    setting = table.Setting(family, tiny.make(family), {})
    main, assistant = setting.model, setting.assistant()
    inputs = table.single(20)
    want = answer(main, inputs, max_new_tokens=24)
    if who in ("main", "both", "itself"):
        torch_pagedkv.patch(main, block_size=8)
    if who in ("assistant", "both"):
        torch_pagedkv.patch(assistant, block_size=8)
    drafts = main if who == "itself" else assistant
    for _ in range(2):
        assert torch.equal(answer(main, inputs, max_new_tokens=24, assistant_model=drafts), want)
    for model in (main, assistant):
        if is_patched(model):
            assert_nothing_leaks(model)


@pytest.mark.parametrize("lookbehind", [{}, {"assistant_lookbehind": 4, "target_lookbehind": 5}], ids=["", "set"])
def test_assistant_with_another_tokenizer(lookbehind: dict[str, int]) -> None:
    """Universal assisted generation: drafts of another vocabulary, translated."""
    want = answer(tiny.make("llama"), table.single(), max_new_tokens=16)
    main, assistant = (
        torch_pagedkv.patch(model, block_size=8) for model in (tiny.make("llama"), tiny.make("llama", vocab_size=80))
    )
    assistant.generation_config.update(**lookbehind)
    tokenizers = {"tokenizer": table.tokenizer(), "assistant_tokenizer": table.tokenizer(16, 22)}
    for _ in range(2):
        got = answer(main, table.single(), max_new_tokens=16, assistant_model=assistant, **tokenizers)
        assert torch.equal(got, want)
        assert_nothing_leaks(assistant)
    # sampled, it prunes the assistant's head to the common tokens; stock is not the same from run to run
    got = answer(main, table.single(), do_sample=True, max_new_tokens=16, assistant_model=assistant, **tokenizers)
    assert got.shape == (1, 30)
    assert torch.equal(answer(main, table.single(), max_new_tokens=16), want)
    assert_nothing_leaks(main)
    assert_nothing_leaks(assistant)


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_live_their_own_lives(family: str) -> None:
    """A twin with other weights, a twin of the twin, and the first one unpatched: none touches another."""
    stock, model = pair(family)
    want = answer(stock)
    held = answer(model, return_dict_in_generate=True)  # a live cache of the first one's
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin), want)
    changed = copy.deepcopy(stock)
    for one in (twin, changed):
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "0" in name and parameter.dim() > 1:
                    parameter.mul_(1.25)
    other = answer(changed)
    assert not torch.equal(other, want)
    assert torch.equal(answer(twin), other)
    assert torch.equal(answer(model), want)
    third = copy.deepcopy(twin)
    torch_pagedkv.unpatch(model)
    assert torch.equal(answer(model), want)
    assert torch.equal(answer(twin), other)
    torch_pagedkv.unpatch(twin)
    assert torch.equal(answer(twin), other)
    assert is_patched(third) and torch.equal(answer(third, num_beams=2), answer(changed, num_beams=2))
    assert_nothing_leaks(third)
    assert torch.equal(held.sequences, want)


def test_a_copied_model_refuses_the_first_ones_cache() -> None:
    model = pair()[1]
    twin, cache = copy.deepcopy(model), torch_pagedkv.PagedCache(model)
    with pytest.raises(ValueError, match="made for another model"):
        answer(twin, past_key_values=cache)
    assert answer(model, past_key_values=cache).shape == (2, 48)


def test_a_copied_answer_goes_on_by_itself() -> None:
    """`copy.deepcopy` of what generate() returned: both continue, differently."""
    stock, model = pair()
    first = answer(model, return_dict_in_generate=True)
    twin = copy.deepcopy(first)
    for one, token in ((first, 5), (twin, 9)):
        ids = torch.cat([one.sequences, torch.full((2, 1), token)], 1)
        mask = torch.cat([LONG["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(answer(model, inputs, past_key_values=one.past_key_values), answer(stock, inputs))
    del first, twin, one
    assert_nothing_leaks(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, tmp_path: Any) -> None:
    """save_pretrained, torch.save and pickle of a patched model that has generated: stock models come back."""
    stock, model = pair(family)
    want = answer(stock)
    answer(model)
    model.save_pretrained(tmp_path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for loaded in (
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=stock.config._attn_implementation),
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(model)),
    ):
        assert not is_patched(loaded)
        assert torch.equal(answer(loaded), want)
        torch_pagedkv.patch(loaded.eval(), block_size=8)
        for _ in range(2):
            assert torch.equal(answer(loaded), want)
        assert loaded.paged_cache.stats()["hits"] > 0
        assert_nothing_leaks(loaded)


# ---- moves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_between_dtypes(family: str) -> None:
    """There and back again: the weights are those of the stock model moved alike, and so are the tokens."""
    stock, model = pair(family)
    assert torch.equal(answer(model), answer(stock))
    for dtype in (torch.bfloat16, torch.float16):
        for one in (stock, model):
            one.to(dtype)
        with torch.no_grad():
            want = stock(**LONG).logits[LONG["attention_mask"].bool()].double()
            cache = torch_pagedkv.PagedCache(model)
            got = model(**LONG, past_key_values=cache).logits[LONG["attention_mask"].bool()].double()
            exact = copy.deepcopy(stock).float()(**LONG).logits[LONG["attention_mask"].bool()].double()
        # of most tokens: where two experts are nearly alike, a rounding chooses
        ours, theirs = ((logits - exact).norm(dim=-1).median() for logits in (got, want))
        assert 0 < ours <= 1.5 * theirs, dtype
        del cache
        hits = model.paged_cache.stats()["hits"]
        answer(model)
        stats = model.paged_cache.stats()
        assert (stats["dtype"], stats["hits"]) == (str(dtype).removeprefix("torch."), hits)
        assert_nothing_leaks(model)
        for one in (stock, model):
            one.float()
        assert torch.equal(answer(model), answer(stock))


def test_moved_to_what_is_not_supported() -> None:
    """A clear error; back on the ground the model works."""
    stock, model = pair()
    want = answer(stock)
    model.double()
    with pytest.raises((ValueError, RuntimeError), match=r"float64"):
        answer(model)
    model.float()
    assert torch.equal(answer(model), want)
    assert_nothing_leaks(model)
    weights = copy.deepcopy(model.state_dict())
    model.to("meta")
    with pytest.raises((ValueError, RuntimeError), match=r"meta"):
        answer(model)
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    model.model.rotary_emb = copy.deepcopy(stock.model.rotary_emb)  # its buffer is not in the state
    assert torch.equal(answer(model), want)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_moved_to_the_gpu_and_back(family: str) -> None:
    stock, model = pair(family)
    want = answer(model)
    moved = {name: value.cuda() for name, value in LONG.items()}
    for one in (stock, model):
        one.cuda()
    assert torch.equal(answer(model, moved), answer(stock, moved))
    assert model.paged_cache.pool.key_caches[0].is_cuda
    model.cpu()
    assert torch.equal(answer(model), want)
    assert_nothing_leaks(model)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_take_turns(context: Callable[[], Any]) -> None:
    """A pool made in one mode is grown, written and copied in another."""
    stock, model = pair()
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 8}):
        with context():
            assert torch.equal(answer(model, **options), answer(stock, **options))
        inputs = tiny.batch((90, 33), seed=11)
        assert torch.equal(answer(model, inputs, **options), answer(stock, inputs, **options))
        with context():
            held = answer(model, return_dict_in_generate=True, **options)
        more = answer(model, {"input_ids": held.sequences[:1]}, **options)
        assert torch.equal(more, answer(stock, {"input_ids": held.sequences[:1]}, **options))
        del held
    assert_nothing_leaks(model)


# ---- other weights ---------------------------------------------------------------------------------------------------


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(**LONG, labels=LONG["input_ids"], use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _adam(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(**LONG, labels=LONG["input_ids"]).loss.backward()  # in evaluation mode, with the model's own cache
    optimizer.step()


def _values(model: nn.Module) -> Tensor:
    return next(p for name, p in model.named_parameters() if "layers.0" in name and "v_proj" in name)


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        _values(model).mul_(1.5)


def _data(model: nn.Module) -> None:
    _values(model).data.mul_(1.5)


def _data_replaced(model: nn.Module) -> None:
    _values(model).data = _values(model).data * 1.5


def _inference(model: nn.Module) -> None:
    with torch.inference_mode():
        _values(model).mul_(1.5)


def _loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def _new_module(model: Any) -> None:
    new = nn.Linear(64, 32, bias=False)
    new.weight.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.2)
    model.model.layers[0].self_attn.v_proj = new


def _embeddings(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(100, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)


def _assigned(model: Any) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)


def _buffer(model: Any) -> None:
    """A constant of the model's own, not a parameter: other rotary frequencies."""
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _config(model: Any) -> None:
    model.config.num_hidden_layers = 1


def _hook(model: Any) -> None:
    """Steering: a direction added to what the first layer says."""
    direction = torch.linspace(-1, 1, 64)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + direction)


def _forward_replaced(model: Any) -> None:
    linear = model.model.layers[0].self_attn.v_proj
    linear.forward = lambda x: 1.5 * nn.functional.linear(x, linear.weight)


CHANGES = [
    _step, _adam, _in_place, _data, _data_replaced, _inference, _loaded, _new_module, _embeddings, _assigned, _buffer,
    _config, _hook, _forward_replaced
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_prefixes_of_other_weights_are_forgotten(change: Callable[[Any], None]) -> None:
    stock, model = pair()
    before = answer(stock)
    for _ in range(2):
        assert torch.equal(answer(model), before)
    assert model.paged_cache.stats()["hits"] == 2
    for one in (stock, model):
        change(one)
    want = answer(stock)
    assert not torch.equal(want, before), "the change shows"
    assert torch.equal(answer(model), want)
    assert model.paged_cache.stats()["hits"] == 2
    assert torch.equal(answer(model), want)
    assert model.paged_cache.stats()["hits"] == 4, "and the new ones are found"
    assert_nothing_leaks(model)


# ---- adapters --------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A hand-made LoRA around a linear layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.on = base, True
        generator = torch.Generator().manual_seed(2)
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.2)  # type: ignore[arg-type]
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + x @ self.down.T @ self.up.T if self.on else out


def test_hand_made_adapter() -> None:
    """Put in after the patch, trained, taken out."""
    stock, model = pair()
    plain = answer(stock)
    assert torch.equal(answer(model), plain)
    adapters = []
    for one in (stock, model):
        for layer in one.model.layers:
            layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
            layer.mlp.down_proj = Adapter(layer.mlp.down_proj)
            adapters += [layer.self_attn.v_proj, layer.mlp.down_proj]
    want = answer(stock)
    assert not torch.equal(want, plain)
    for _ in range(2):
        assert torch.equal(answer(model), want)
    with torch.no_grad():
        for adapter in adapters:
            adapter.up.mul_(-2)
    trained = answer(stock)
    assert not torch.equal(trained, want)
    assert torch.equal(answer(model), trained)
    for adapter in adapters:  # a switch that nothing but the adapter knows of
        adapter.on = False
    assert torch.equal(answer(model), plain)
    for one in (stock, model):
        for layer in one.model.layers:
            layer.self_attn.v_proj, layer.mlp.down_proj = layer.self_attn.v_proj.base, layer.mlp.down_proj.base
    assert torch.equal(answer(model), plain)
    torch_pagedkv.unpatch(model)
    assert torch.equal(answer(model), plain)


@pytest.fixture
def lora() -> Iterator[tuple[Any, Any]]:
    """A stock and a patched model with the same two PEFT adapters, "a" and "b"."""
    peft = pytest.importorskip("peft")
    wrapped = []
    for model in pair():
        for i, name in enumerate("ab"):
            config = peft.LoraConfig(r=4, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
            torch.manual_seed(i)
            if i:
                model.add_adapter(name, config)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name)
        wrapped.append(model.eval())
    yield wrapped[0], wrapped[1]
    gc.collect()
    assert_nothing_leaks(wrapped[1].get_base_model())


def test_peft_adapters_are_switched(lora: tuple[Any, Any]) -> None:
    """Prefixes are kept for each adapter apart, and found again when it comes back."""
    answers = []
    for name in "abab":
        for model in lora:
            model.set_adapter(name)
        want = answer(lora[0])
        assert torch.equal(answer(lora[1]), want)
        answers.append(want)
    assert not torch.equal(answers[0], answers[1])
    for model in lora:
        model.set_adapter("a")
    with lora[0].disable_adapter(), lora[1].disable_adapter():
        want = answer(lora[0])
        assert not torch.equal(want, answers[0]) and torch.equal(answer(lora[1]), want)
    assert torch.equal(answer(lora[1]), answers[0])


def test_peft_adapter_is_merged(lora: tuple[Any, Any]) -> None:
    want = answer(lora[0])
    assert torch.equal(answer(lora[1]), want)
    for model in lora:
        model.merge_adapter()
    assert torch.equal(answer(lora[1]), answer(lora[0]))
    for model in lora:
        model.unmerge_adapter()
        for layer in model.get_base_model().model.layers:
            layer.mlp.down_proj.set_scale("a", 3.0)
    want = answer(lora[0])
    assert torch.equal(answer(lora[1]), want)
    merged = [model.merge_and_unload() for model in lora]
    assert torch.equal(answer(merged[1]), answer(merged[0]))
    torch_pagedkv.unpatch(merged[1])
    assert torch.equal(answer(merged[1]), answer(merged[0]))
    torch_pagedkv.patch(merged[1])
