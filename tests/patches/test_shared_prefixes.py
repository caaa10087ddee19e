"""Decoding with shared prefixes attended to once: found where they are, the same tokens, off where it should be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import torch_pagedkv
from torch_pagedkv.kv import manager as manager_module

OP = torch.ops.torch_pagedkv.paged_attention_cascade.default
#: rotary embedding; softcap and alternating windows; ALiBi; sinks; a window on every layer; positions of its own
FAMILIES = ("llama", "gemma2", "bloom", "gpt_oss", "mistral", "gpt2")


class Count(TorchDispatchMode):
    """Counts the calls of the op."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is OP
        return function(*args, **(kwargs or {}))


def prompts(rows: int, shared: int, own: int, seed: int = 5) -> dict[str, Tensor]:
    """Prompts that begin alike."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(2, tiny.VOCABULARY, (1, shared), generator=generator)
    rest = torch.randint(2, tiny.VOCABULARY, (rows, own), generator=generator)
    ids = torch.cat([first.expand(rows, -1), rest], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, int]:
    """Tokens, and how often the op was called."""
    torch.manual_seed(3)
    with Count() as count:
        tokens = tiny.generate(model, inputs, **options)
    return tokens, count.calls


MODES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "returns": (prompts(1, 20, 1), {"do_sample": True, "num_return_sequences": 3}),
    "returns of each": (prompts(2, 20, 4), {"do_sample": True, "num_return_sequences": 3}),
    "beams": (prompts(2, 17, 1), {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 20}),
    "padded beams": (tiny.batch((21, 9)), {"num_beams": 3, "max_new_tokens": 20}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family: str, mode: str) -> None:
    inputs, options = MODES[mode]
    plain = torch_pagedkv.patch(tiny.make(family), block_size=8, cascade=False)
    model = torch_pagedkv.patch(tiny.make(family), block_size=8, cascade=True)
    wanted, none = generate(plain, inputs, **options)
    got, calls = generate(model, inputs, **options)
    assert none == plain.paged_cache.stats()["shared_steps"] == 0
    assert torch.equal(got, wanted)
    assert model.paged_cache.stats()["shared_steps"] > 0
    # where all layers have a window shorter than the rows there is nothing to gain
    assert (calls > 0) == (family != "mistral")
    model.paged_cache.check()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefixes_found_in_the_cache(family: str) -> None:
    """Prompts that begin alike share blocks once one of them was computed: the second call finds them."""
    plain = torch_pagedkv.patch(tiny.make(family), block_size=8, cascade=False)
    model = torch_pagedkv.patch(tiny.make(family), block_size=8, cascade=True)
    for inputs in (prompts(1, 20, 3), prompts(4, 20, 5)):
        wanted, _ = generate(plain, inputs, max_new_tokens=8)
        got, calls = generate(model, inputs, max_new_tokens=8)
        assert torch.equal(got, wanted)
    layers = len(model.paged_cache.specs)
    assert calls == 7 * layers  # of eight new tokens the first comes from the prompt's pass
    assert model.paged_cache.stats()["shared_steps"] == 7


def test_hooked_layers_share_too() -> None:
    """The modules' own way to attention, which a hook brings back."""
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, cascade=True)
    inputs, options = MODES["returns"]
    wanted, calls = generate(model, inputs, **options)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    got, hooked = generate(model, inputs, **options)
    assert torch.equal(got, wanted)
    assert calls == hooked > 0


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_quantised_cache(kv_cache_dtype: str) -> None:
    inputs, options = MODES["beams"]
    results = []
    for cascade in (False, True):
        model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, cascade=cascade, kv_cache_dtype=kv_cache_dtype)
        tokens, calls = generate(model, inputs, **options)
        assert (calls > 0) == cascade
        results.append(tokens)
    assert torch.equal(*results)


def test_auto_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = MODES["returns"]
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8)
    wanted, calls = generate(model, inputs, **options)
    assert calls == 0  # so few bytes
    size = 8 * 2 * 2 * 16 * 4  # of a block of one layer; three rows share two blocks of eight tokens
    for least, enough, shares in ((16, 4 * size, True), (16, 4 * size + 1, False), (17, 0, False)):
        monkeypatch.setitem(manager_module._WORTH_SHARING, "cpu", (least, enough))
        got, calls = generate(model, inputs, **options)
        assert torch.equal(got, wanted)
        assert (calls > 0) == shares


def test_loop_of_ones_own() -> None:
    """A cache that is repeated, cropped, continued by several tokens at once and copied."""
    stock = tiny.make("llama")
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, cascade=True)
    ids = prompts(1, 26, 1)["input_ids"]
    new = torch.randint(2, tiny.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    whole = torch.cat([ids.expand(3, -1), new], 1)
    with torch.no_grad(), Count() as count:
        wanted = stock(whole).logits
        cache = torch_pagedkv.PagedCache(model)
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(3)

        def step(cache: Any, begin: int, end: int) -> int:
            before = count.calls
            tokens = whole[:, 27 + begin : 27 + end]
            torch.testing.assert_close(
                model(tokens, past_key_values=cache).logits, wanted[:, 27 + begin : 27 + end], rtol=1e-4, atol=1e-5
            )
            return count.calls - before

        layers = len(model.paged_cache.specs)
        assert step(cache, 0, 1) == step(cache, 1, 2) == layers
        assert step(cache, 2, 6) == 0  # several tokens at once
        assert step(cache, 6, 7) == layers
        twin = copy.deepcopy(cache)
        assert step(twin, 7, 8) == step(cache, 7, 8) == layers
        cache.crop(27 + 3)
        assert step(cache, 3, 4) == layers
        cache.crop(4)  # less than a block is left
        assert model(whole[:, 4:5], past_key_values=cache).logits.isfinite().all()
        assert step(twin, 8, 9) == layers


def test_report_and_options() -> None:
    text = "paged_attention_cascade"
    assert text in str(torch_pagedkv.report(torch_pagedkv.patch(tiny.make("llama"))))
    assert text not in str(torch_pagedkv.report(torch_pagedkv.patch(tiny.make("llama"), cascade=False)))
    with pytest.raises(ValueError, match="cascade: got 'yes'"):
        torch_pagedkv.patch(tiny.make("llama"), cascade="yes")


@pytest.mark.slow
def test_compiled_steps_do_without() -> None:
    """The graphs of rows that share are those of rows that do not."""
    inputs, options = MODES["returns"]
    results = []
    for cascade in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = torch_pagedkv.patch(tiny.make("llama"), block_size=8, cascade=cascade)
        model.compile()
        torch.manual_seed(3)
        results.append((tiny.generate(model, inputs, **options), dict(counters["stats"])))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1]["unique_graphs"] > 0
