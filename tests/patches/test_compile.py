"""torch.compile around a patched model: whole graphs, one for any length, the eager tokens, no copy of the cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.testing import CompileCounterWithBackend

import torch_pagedkv

PROMPTS = [((9,), 1), ((23,), 2), ((5,), 3)]
BATCHES = [((5, 9), 1), ((14, 30), 2), ((3, 17), 3)]
LAYERS = 2  # of the tiny models used here


def module(model: Any, **options: Any) -> Any:
    """`model.compile()`."""
    model.compile(**options)
    return model


def wrapper(model: Any, **options: Any) -> Any:
    """`torch.compile(model)`."""
    return torch.compile(model, **options)


def forward(model: Any, **options: Any) -> Any:
    """`model.forward = torch.compile(model.forward)`."""
    model.forward = torch.compile(model.forward, **options)
    return model


WAYS = [module, wrapper, forward]


@pytest.fixture(autouse=True)
def quiet_limits() -> Iterator[None]:
    """A recompile for each length would end in an error soon: the limit is far below the number of steps."""
    with torch._dynamo.config.patch(recompile_limit=4):
        yield


def check_tokens(compiled: Any, stock: hf.PreTrainedModel, prompts: list[tuple[tuple[int, ...], int]]) -> None:
    for lengths, seed in prompts:
        inputs = tiny.batch(lengths, seed=seed)
        assert torch.equal(tiny.generate(compiled, inputs), tiny.generate(stock, inputs))


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_one_graph_for_prompts_and_one_for_decoding(way: Callable[..., Any]) -> None:
    """Of any length, also in the next call, and the same of a batch."""
    stock, model, counter = tiny.make("llama"), tiny.make("llama"), CompileCounterWithBackend("eager")
    compiled = way(torch_pagedkv.patch(model), fullgraph=True, backend=counter)
    check_tokens(compiled, stock, PROMPTS)
    assert counter.frame_count == 2
    check_tokens(compiled, stock, BATCHES)
    assert counter.frame_count == 4
    assert model.paged_cache.stats()["used"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mistral", "gemma3", "phi3", "mixtral", "gpt2", "gpt_neox", "falcon_mqa", "falcon_alibi", "bloom", "mpt"]
)
def test_every_family_compiles_whole(family: str) -> None:
    """Each form of attention: sliding windows and models that build their masks in any case included."""
    stock, model, counter = tiny.make(family), tiny.make(family), CompileCounterWithBackend("eager")
    module(torch_pagedkv.patch(model), fullgraph=True, backend=counter)
    check_tokens(model, stock, PROMPTS)
    assert counter.frame_count == 2
    check_tokens(model, stock, BATCHES)
    assert counter.frame_count == 4


def test_layers_with_dense_keys_compile_too() -> None:
    """Chunked attention reads gathered keys and values under a mask; both are part of the graph."""
    config = hf.Llama4TextConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=8,
        pad_token_id=tiny.PAD,
        bos_token_id=1,
        eos_token_id=None,
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(hf.Llama4ForCausalLM(config).eval())
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1 if parameter.dim() > 1 else parameter)
    stock, model = models
    counter = CompileCounterWithBackend("eager")
    module(torch_pagedkv.patch(model), fullgraph=True, backend=counter)
    check_tokens(model, stock, [((19,), 1), ((33,), 2), ((12,), 3)])
    assert counter.frame_count == 2


def test_a_growing_pool_needs_no_new_graph() -> None:
    stock, model, counter = tiny.make("llama"), tiny.make("llama"), CompileCounterWithBackend("eager")
    torch_pagedkv.patch(model, long_prompts="allow")
    module(model, fullgraph=True, backend=counter)
    check_tokens(model, stock, [((9,), 1)])
    blocks = model.paged_cache.stats()["num_blocks"]
    check_tokens(model, stock, [((16 * blocks + 9,), 1)])
    assert model.paged_cache.stats()["num_blocks"] > blocks and counter.frame_count == 2


def test_forward_of_ones_own_without_positions() -> None:
    """Positions are counted from a tensor then, not from a number that every step changes."""
    stock, model, counter = tiny.make("llama"), tiny.make("llama"), CompileCounterWithBackend("eager")
    module(torch_pagedkv.patch(model), fullgraph=True, backend=counter)
    for lengths, seed in PROMPTS:
        ids = tiny.batch(lengths, seed=seed)["input_ids"]
        cache, want = torch_pagedkv.PagedCache(model), hf.DynamicCache()
        with torch.no_grad():
            for step in [ids[:, :-3], *ids[:, -3:].split(1, 1)]:
                got = model(step, past_key_values=cache).logits
                exact = stock(step, past_key_values=want).logits
                assert (got - exact).norm() <= 2e-6 * exact.norm()
    assert counter.frame_count == 2


def test_models_do_not_share_a_limit() -> None:
    """Each has graphs of its own, so that a process may hold many compiled models."""
    stock = tiny.make("llama")
    for _ in range(3):
        model = tiny.make("llama")
        module(torch_pagedkv.patch(model), fullgraph=True, backend="eager")
        check_tokens(model, stock, PROMPTS[:1] + BATCHES[:1])


def test_search_and_drafts_under_compile() -> None:
    stock, model = tiny.make("llama"), tiny.make("llama")
    module(torch_pagedkv.patch(model), fullgraph=True, backend="eager")
    inputs = tiny.batch((4, 9))
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        assert torch.equal(tiny.generate(model, inputs, **options), tiny.generate(stock, inputs, **options))
    inputs = tiny.batch((9,))
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny.make("llama")}):
        assert torch.equal(tiny.generate(model, inputs, **options), tiny.generate(stock, inputs))
    assert model.paged_cache.stats()["used"] == 0


# ---- ways in ---------------------------------------------------------------------------------------------------------


def test_generate_compiles_when_given_a_compile_config() -> None:
    stock, model = tiny.make("llama"), torch_pagedkv.patch(tiny.make("llama"))
    config = hf.CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    graphs = torch._dynamo.utils.counters["stats"]
    for lengths, seed in PROMPTS:
        inputs = tiny.batch(lengths, seed=seed)
        want = tiny.generate(stock, inputs)
        assert torch.equal(tiny.generate(model, inputs), want) and graphs["unique_graphs"] == (seed > 1)
        assert torch.equal(tiny.generate(model, inputs, compile_config=config), want) and graphs["unique_graphs"] == 1


def test_the_wrapper_of_a_stock_model_is_as_it_was() -> None:
    torch_pagedkv.patch(tiny.make("llama"))
    stock = tiny.make("llama")
    assert torch.compile(stock).generate == stock.generate
    assert not hasattr(OptimizedModule, "generate")
    assert not hasattr(torch.compile(torch.nn.Linear(1, 1)), "generate")


def test_wrapped_before_patched_and_unpatched_behind_it() -> None:
    stock, model, counter = tiny.make("llama"), tiny.make("llama"), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch_pagedkv.patch(model)
    check_tokens(compiled, stock, PROMPTS[:2])
    assert counter.frame_count == 2 and model._compiled_call_impl is None
    torch_pagedkv.unpatch(model)
    check_tokens(compiled, stock, PROMPTS[:2])  # as torch leaves it: uncompiled
    assert counter.frame_count == 2


# ---- what the compiler makes of it -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way, kv_cache_dtype", [(module, None), (wrapper, "int8"), (forward, None)])
def test_inductor_leaves_the_same_cache_and_tokens(way: Callable[..., Any], kv_cache_dtype: str | None) -> None:
    """Every key and value is where eager code puts it: torch 2.11 compiles a mutated view to a wrong address where the
    tensor it is a view of has an offset in its storage. Caches are passed whole, and have none."""
    eager, model = (tiny.make("llama") for _ in range(2))
    for each in (eager, model):
        torch_pagedkv.patch(each, kv_cache_dtype=kv_cache_dtype, num_blocks=64)
    assert all(pool.storage_offset() == 0 and pool.is_contiguous() for pool in model.paged_cache.pool.tensors)
    for each in (eager, model):
        for pool in each.paged_cache.pool.tensors:
            pool.zero_()
    compiled = way(model, fullgraph=True)
    for lengths, seed in (*PROMPTS[:2], *BATCHES[:2]):
        inputs = tiny.batch(lengths, seed=seed)
        assert torch.equal(tiny.generate(compiled, inputs), tiny.generate(eager, inputs))
    for got, want in zip(model.paged_cache.pool.tensors, eager.paged_cache.pool.tensors, strict=True):
        if want.dtype == torch.int8:  # a rounding before the last bit may end on the other side of it
            assert (got.int() - want.int()).abs().max() <= 1
        else:
            assert (got - want).norm() <= 2e-6 * want.norm()
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_generated_code_calls_each_op_once_and_fuses_around_them() -> None:
    from torch._inductor.utils import run_and_get_code

    model = torch_pagedkv.patch(tiny.make("llama"), num_blocks=64)
    module(model, fullgraph=True)
    _, codes = run_and_get_code(tiny.generate, model, tiny.batch((9,)))
    assert len(codes) == 2  # the prompt's and the decoding's
    expected = {
        "rotary_and_cache": LAYERS,
        "paged_attention": LAYERS,
        "silu_and_mul": LAYERS,
        "add_rms_norm": LAYERS,
        "rms_norm": LAYERS + 1,
    }
    for code in codes:
        names = re.findall(r"^ +(?:\w+ = )?torch\.ops\.torch_pagedkv\.(\w+)\.", code, re.M)
        assert {name: names.count(name) for name in expected} == expected
        # embedding, cos and sin, the residual add: the rest is calls of ours and matrix products
        fused = set(re.findall(r"^(cpp_fused_\w+) = ", code, re.M))
        assert 2 <= len(fused) <= 4, fused
        pool = model.paged_cache.pool.key_caches[0].numel()
        for shape in re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code):
            sizes = [int(n) if n.strip().isdigit() else 64 for n in shape.split(",") if n.strip()]
            assert torch.tensor(sizes).prod() < pool, f"a buffer as large as the cache: {shape}"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_cuda_graphs_give_the_eager_tokens(family: str) -> None:
    stock = tiny.make(family).cuda()
    model = torch_pagedkv.patch(tiny.make(family).cuda(), num_blocks=4096)
    module(model, fullgraph=True, mode="reduce-overhead")
    for lengths, seed in (*PROMPTS, *PROMPTS, *BATCHES, *BATCHES):
        inputs = {name: x.cuda() for name, x in tiny.batch(lengths, seed=seed).items()}
        want = tiny.generate(stock, inputs)
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(tiny.generate(model, inputs), want)


@pytest.mark.gpu
def test_compiled_steps_do_not_copy_the_cache() -> None:
    model = torch_pagedkv.patch(tiny.make("llama").cuda(), num_blocks=65536)
    module(model, fullgraph=True)
    inputs = {name: x.cuda() for name, x in tiny.batch((9,)).items()}
    tiny.generate(model, inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tiny.generate(model, inputs)
    assert torch.cuda.max_memory_allocated() - before < model.paged_cache.pool.nbytes / 4
