"""Decoding steps that are recorded and replayed. Without a GPU a tape stands in for CUDA graphs: it repeats the same
operations on the same tensors, and Python does not run again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import torch_pagedkv
from torch_pagedkv.patches import graphs


class Tape(TorchDispatchMode):
    """Notes what the device is told to do, and tells it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def on_tape(function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    tape = Tape()
    with tape:
        result = function()
    return result, tape.replay


@pytest.fixture(autouse=True)
def taped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(graphs, "record", on_tape)
        monkeypatch.setattr(graphs, "can_record", lambda device: True)


@pytest.fixture
def pair() -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    stock, patched = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"), block_size=8)
    yield stock, patched
    assert patched.paged_cache.stats()["used"] == 0
    patched.paged_cache.blocks.check()


def recorded(model: PreTrainedModel) -> graphs.Graphs:
    return vars(model)["_pagedkv_driver"].recorded


def replays(model: PreTrainedModel, run: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and how many steps of it were replayed."""
    before = recorded(model).replays
    result = run()
    return result, recorded(model).replays - before


MIXED = ((9,), (5, 19, 11), (20,), (3, 3, 40))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_replayed_tokens_are_those_of_python(family: str, kv_cache_dtype: str | None) -> None:
    options = {"kv_cache_dtype": kv_cache_dtype}
    model = torch_pagedkv.patch(tiny.make(family), **options)
    eager = torch_pagedkv.patch(tiny.make(family), cuda_graphs=False, **options)
    for least, lengths in (*((18, one) for one in MIXED), *((23, one) for one in MIXED)):
        inputs = tiny.batch(lengths)
        got, count = replays(model, lambda inputs=inputs: tiny.generate(model, inputs))
        assert torch.equal(got, tiny.generate(eager, inputs))
        assert count >= least  # the second time it is all there
    assert not recorded(model).refused
    assert not recorded(eager).replays


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.3},
        {"eos_token_id": list(range(2, 96, 3))},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    ],
)
def test_modes_equal_stock(pair: tuple[PreTrainedModel, PreTrainedModel], options: dict[str, Any]) -> None:
    for _ in range(2):
        results = []
        for model in pair:
            torch.manual_seed(3)
            results.append(model.generate(**tiny.batch(), **{"max_new_tokens": 24, "do_sample": False, **options}))
        want, got = results
        if isinstance(want, torch.Tensor):
            assert torch.equal(got, want)
            continue
        assert torch.equal(got.sequences, want.sequences)
        for g, w in zip((*got.scores, *got.logits), (*want.scores, *want.logits), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
        del got, results
    assert recorded(pair[1]).replays


def test_a_loop_of_ones_own(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """With positions, and without; each step's logits are its own."""
    ids, logits = tiny.batch((9,))["input_ids"], {}
    for given in (True, False):
        for model in pair:
            cache = torch_pagedkv.PagedCache(model) if model is pair[1] else None
            out, rows = [], ids
            before = recorded(pair[1]).replays
            with torch.no_grad():
                for step in range(12):
                    at = torch.arange(ids.shape[1] + step)[None, -rows.shape[1] :]
                    result = model(
                        rows, past_key_values=cache, use_cache=True, **({"position_ids": at} if given else {})
                    )
                    cache, rows = result.past_key_values, result.logits[:, -1:].argmax(-1)
                    out.append(result.logits[:, -1])
            logits[model is pair[1]] = torch.stack(out)
            if model is pair[1]:
                assert recorded(model).replays - before == 12 - 1 - 4
            del cache, result
        torch.testing.assert_close(logits[True], logits[False], rtol=1e-4, atol=1e-4)


def test_a_hook_is_called_each_time(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    inputs, calls = tiny.batch((9,)), []
    tiny.generate(pair[1], inputs)
    hook = pair[1].model.layers[1].self_attn.register_forward_hook(lambda *args: calls.append(1))
    _, count = replays(pair[1], lambda: tiny.generate(pair[1], inputs))
    assert (count, len(calls)) == (0, 24)
    hook.remove()
    assert replays(pair[1], lambda: tiny.generate(pair[1], inputs))[1] > 20


@pytest.mark.parametrize("change", ["data", "parameter", "in place", "module", "forward", "scalar", "tensor", "pool"])
def test_a_change_is_followed(change: str) -> None:
    """What is built in at recording is looked at again; a kernel that reads changed numbers in place needs nothing."""
    models = [torch_pagedkv.patch(tiny.make("llama"), cuda_graphs=on, prefix_caching=False) for on in (True, False)]
    inputs, results = tiny.batch((9, 4)), []
    for model in models:
        tiny.generate(model, inputs)
        layer = model.model.layers[1]
        with torch.no_grad():
            if change == "data":
                layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data * -1.5
            elif change == "parameter":
                layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight * -1.5)
            elif change == "in place":
                layer.mlp.down_proj.weight.mul_(-1.5)
            elif change == "module":
                layer.mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
                torch.nn.init.constant_(layer.mlp.down_proj.weight, 0.1)
            elif change == "forward":
                layer.mlp.forward = lambda x: torch.zeros_like(x)
            elif change == "scalar":
                layer.self_attn.scaling *= 3
            elif change == "tensor":  # two of them have no truth
                for _ in range(2):
                    layer.self_attn.scale_of_mine = torch.tensor([1.0, 2.0])
                    tiny.generate(model, inputs)
            else:
                tiny.generate(model, tiny.batch((400,) * 12))  # more than the pool has at first
        results.append(tiny.generate(model, inputs))
    assert torch.equal(*results)
    if change not in ("pool", "tensor"):
        assert not torch.equal(results[0], tiny.generate(torch_pagedkv.patch(tiny.make("llama")), inputs))
    elif change == "pool":
        assert models[0].paged_cache.pool.moves
    assert recorded(models[0]).replays >= (18 if change == "forward" else 36)


class Counting(torch.nn.Module):
    """Something that is not the device's alone."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * (1 + self.calls % 3)


def test_modules_of_the_caller_run_in_python(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    for model in pair:
        model.lm_head = Counting(model.lm_head)
    assert torch.equal(*(tiny.generate(model, tiny.batch()) for model in pair))
    assert not recorded(pair[1]).replays and "Counting" in recorded(pair[1]).refused
    assert [model.lm_head.calls for model in pair] == [24, 24]


@pytest.mark.parametrize("fault", ["other numbers", "error"])
def test_what_does_not_reproduce_is_not_replayed(
    pair: tuple[PreTrainedModel, PreTrainedModel], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        if fault == "error":
            function()
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        result, replay = on_tape(function, device)
        return result, lambda: (replay(), result.logits[0, 0, 7].mul_(1 + 1e-6))[0]

    monkeypatch.setattr(graphs, "record", wrong)
    inputs = tiny.batch()
    assert torch.equal(*(tiny.generate(model, inputs) for model in pair))
    assert not recorded(pair[1]).replays
    assert recorded(pair[1]).refused == (
        "a replayed step differs from one that Python ran"
        if fault == "other numbers"
        else "RuntimeError: operation not permitted when stream is capturing"
    )


def test_when_python_is_needed(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, inputs = pair[1], tiny.batch((9,))
    tiny.generate(model, inputs)

    def attempt(**options: Any) -> int:
        return replays(model, lambda: tiny.generate(model, inputs, **options))[1]

    assert attempt() > 20
    with torch.autocast("cpu", torch.bfloat16):
        assert not attempt()
    with Tape():
        assert not attempt()
    assert attempt() > 20
    model.train()
    assert not attempt()
    model.eval()
    assert attempt() > 20


def test_few_are_kept(pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST", 2)
    for rows in (1, 2, 3, 2, 1):
        inputs = tiny.batch((7,) * rows)
        assert torch.equal(*(tiny.generate(model, inputs) for model in pair))
        assert len(recorded(pair[1])._kinds) <= 2


def test_a_reset_cache_and_a_copied_model(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    stock, model = pair
    inputs = tiny.batch()
    want = tiny.generate(stock, inputs)
    assert torch.equal(tiny.generate(model, inputs), want)
    model.paged_cache.reset()
    assert torch.equal(tiny.generate(model, inputs), want)
    twin = copy.deepcopy(model)
    assert recorded(twin) is not recorded(model) and not recorded(twin).replays
    assert torch.equal(tiny.generate(twin, inputs), want)
    assert recorded(twin).replays


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8", "fp8"])
def test_cuda_graphs_without_a_compiler(family: str, dtype: torch.dtype, kv_cache_dtype: str | None) -> None:
    options = {"kv_cache_dtype": kv_cache_dtype, "num_blocks": 4096}
    model = torch_pagedkv.patch(tiny.make(family).to("cuda", dtype), **options)
    eager = torch_pagedkv.patch(tiny.make(family).to("cuda", dtype), cuda_graphs=False, **options)
    for lengths in (*MIXED, *MIXED):
        inputs = {name: x.cuda() for name, x in tiny.batch(lengths).items()}
        for beams in (1, 2):
            got, count = replays(model, lambda i=inputs, n=beams: tiny.generate(model, i, num_beams=n))
            assert torch.equal(got, tiny.generate(eager, inputs, num_beams=beams))
            assert count >= 18
    assert not recorded(model).refused


@pytest.mark.gpu
def test_a_step_that_asks_the_device_is_not_recorded() -> None:
    """The failed recording leaves stream and allocator as they were."""
    model = torch_pagedkv.patch(tiny.make("llama").cuda(), num_blocks=256)
    stock = tiny.make("llama").cuda()
    inputs = {name: x.cuda() for name, x in tiny.batch().items()}
    embed = type(model.model.embed_tokens)
    forward = embed.forward
    try:
        embed.forward = lambda self, ids: forward(self, ids * int(ids.max() >= 0))
        assert torch.equal(tiny.generate(model, inputs), tiny.generate(stock, inputs))
    finally:
        embed.forward = forward
    assert not recorded(model).replays and recorded(model).refused
    graph = torch.cuda.CUDAGraph()
    x = torch.ones(1000, device="cuda")
    with torch.cuda.graph(graph):
        y = x * 2
    graph.replay()
    assert float(y.sum()) == 2000
