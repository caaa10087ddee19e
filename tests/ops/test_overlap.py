"""Kernels that start while the one in front still runs (programmatic dependent launch) see what it wrote."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.accuracy import same_bits
from ops.samples_small import Inputs
from torch import Tensor

from torch_pagedkv import ops

pytestmark = pytest.mark.gpu


def assert_replays_equal_steps(run: Callable[[bool], list[Tensor]]) -> None:
    """`run(wait)` in a graph gives the bits of kernels that wait for one another, each time."""
    want = run(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(False)
    for _ in range(20):
        for tensor in got:
            tensor.zero_()
        graph.replay()
        assert all(map(same_bits, got, want))


def chain(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, wait: bool) -> list[Tensor]:
    """A large kernel, small ones on what its last rows left, and writes over what the one in front still reads."""

    def step() -> None:
        if wait:
            torch.cuda.synchronize()

    found: list[Tensor] = []
    cache = [torch.zeros(8, 16, 4, 64, device=x.device, dtype=x.dtype) for _ in range(2)]
    mapping = torch.stack([slots.new_zeros(()), slots.new_full((), 7)])[None]
    h = x
    for _ in range(6):
        step()
        y, h = ops.add_rms_norm(h, x, weight, 1e-5)
        step()
        z = ops.silu_and_mul(y[-64:], h[-64:])
        step()
        heads = z.view(64, -1, 64)
        query, key, value = heads[:, :4], heads[:, 4:8], heads[:, 8:12]
        ops.reshape_and_cache(key, value, *cache, slots)
        step()
        ops.rotary_and_cache(query, key, value, cos, sin, *cache, slots.flip(0))
        step()
        ops.copy_blocks(cache, mapping)
        step()
        q, scale = ops.quantize_per_token(z, dtype=torch.int8)
        step()
        tokens = ops.sample(z.repeat(1, 8), slots, slots, top_k=torch.full_like(slots, 50, dtype=torch.int32))
        step()
        h[-64:] = z + tokens[:, None] * 1e-6
        found += [y[-64:].clone(), z, q, scale, tokens, cache[0].clone(), cache[1].clone()]
    return found


def test_a_chain_equals_its_steps() -> None:
    """Eager, and from a CUDA graph replayed again and again: the bits of a chain that waits after each kernel."""
    new = Inputs("cuda")
    x, weight = new.normal(6000, 1024, dtype=torch.bfloat16), new.normal(1024, dtype=torch.bfloat16)
    cos, sin = new.rotation(64, 32, torch.bfloat16)
    slots = new.permutation(128, 64)
    want = chain(x, weight, cos, sin, slots, wait=True)
    for _ in range(5):
        for got, exact in zip(chain(x, weight, cos, sin, slots, wait=False), want, strict=True):
            assert same_bits(got, exact)
    assert_replays_equal_steps(lambda wait: chain(x, weight, cos, sin, slots, wait))


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 300])
def test_layers_of_4_bits_equal_their_steps(rows: int) -> None:
    """Products of 4-bit weights between norms and activations, as in a model: each reads what was written last."""
    new = Inputs("cuda")
    weights = (new.int4(n, k, 128, "zeros", torch.float16) for n, k in ((4096, 1024), (1024, 2048)))
    wide, narrow = ((ops.int4_repack(w.q), w.scales, w.zeros) for w in weights)
    weight, x = new.normal(1024, dtype=torch.bfloat16), new.normal(rows, 1024, dtype=torch.bfloat16)

    def layers(wait: bool) -> list[Tensor]:
        def product(x: Tensor, w: tuple[Tensor, ...], residual: Tensor | None = None) -> Tensor:
            if wait:
                torch.cuda.synchronize()
            return ops.int4_linear(x, *w, residual=residual, group_size=128, in_features=x.shape[1])

        h, found = x, []
        for _ in range(12):
            y = product(ops.rms_norm(h, weight, 1e-5), wide)
            if wait:
                torch.cuda.synchronize()
            h = product(ops.silu_and_mul(*y.chunk(2, -1)) * 0.01, narrow, residual=x)
            found.append(h)
        return found

    assert_replays_equal_steps(layers)


@pytest.mark.parametrize("owned", [500, 333])
def test_prompts_equal_their_steps(owned: int) -> None:
    """Prompts between the kernels around them: what was just cached is read, and rows of nobody (0) are written."""
    new = Inputs("cuda")
    tokens, heads, d = 500, 4, 64
    weight, x = new.normal(heads * d, dtype=torch.bfloat16), new.normal(tokens, heads * d, dtype=torch.bfloat16)
    slots = new.permutation(64 * 16, tokens)
    tables = torch.arange(64, dtype=torch.int32, device="cuda")[None]
    lens, start = torch.tensor([[700], [0]], dtype=torch.int32, device="cuda")
    rows = torch.full_like(lens, owned)

    def prompts(wait: bool) -> list[Tensor]:
        cache = [torch.ones(64, 16, heads, d, device="cuda", dtype=x.dtype) for _ in range(2)]
        h, found = x, []
        for _ in range(16):
            query = ops.rms_norm(h, weight, 1e-5).view(tokens, heads, d)
            if wait:
                torch.cuda.synchronize()
            ops.reshape_and_cache(query, query, *cache, slots)
            if wait:
                torch.cuda.synchronize()
            out = ops.paged_attention(query, *cache, tables, lens, start, rows, max_query_len=tokens)
            if wait:
                torch.cuda.synchronize()
            h, _ = ops.add_rms_norm(out.view(tokens, -1), h, weight, 1e-5)
            found += [out, h]
        return found

    assert_replays_equal_steps(prompts)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_layers_of_few_rows_equal_their_steps(rows: int, dtype: torch.dtype) -> None:
    """As above, of `linear`, and of `scaled_linear` between `quantize_per_token`."""
    new = Inputs("cuda")
    wide, narrow = (new.normal(n, k, dtype=torch.bfloat16, scale=0.02) for n, k in ((4096, 1024), (1024, 2048)))
    weight, x = new.normal(1024, dtype=torch.bfloat16), new.normal(rows, 1024, dtype=torch.bfloat16)

    def layers(wait: bool) -> list[Tensor]:
        def step() -> None:
            if wait:
                torch.cuda.synchronize()

        def product(x: Tensor, w: Tensor) -> Tensor:
            step()
            if dtype == torch.bfloat16:
                return ops.linear(x, w)
            q, row_scale = ops.quantize_per_token(x, rotation=64, dtype=dtype)
            step()
            w8, column_scale = ops.quantize_per_token(w, rotation=64, dtype=dtype)  # in front of what reads it
            step()
            return ops.scaled_linear(q, row_scale, w8, column_scale, dtype=torch.bfloat16)

        h, found = x, []
        for _ in range(12):
            y = product(ops.rms_norm(h, weight, 1e-5), wide)
            step()
            h = x + product(ops.silu_and_mul(*y.chunk(2, -1)), narrow)
            found.append(h)
        return found

    assert_replays_equal_steps(layers)


@pytest.mark.parametrize("sequences", [1, 5, 200])
def test_attention_sees_the_lengths_and_pages_of_the_kernel_in_front(sequences: int) -> None:
    """Lengths, query rows and block tables that the kernel in front of each call replaces: what a pause between them
    gives. Attention plans its work, and brings keys and values to L2, while that kernel still runs."""
    new = Inputs("cuda")
    pages, steps, heads, kv_heads, d = 24, 12, 8, 2, 128
    caches = [new.normal(256, 16, kv_heads, d, dtype=torch.bfloat16) for _ in range(2)]
    query = new.normal(sequences, heads, d, dtype=torch.bfloat16)
    # Block i is what step i works with, once it is copied to block `steps`.
    size = 3 * sequences + sequences * pages
    notes = torch.zeros(steps + 1, size, dtype=torch.int32, device="cuda")
    for i in range(steps):
        lens = new.permutation(pages * 16 * sequences, sequences) % (pages * 16) * (i % 4 != 3)
        rows = new.permutation(sequences, sequences)
        tables = new.permutation(max(256, sequences * pages), sequences * pages) % 256
        parts = (lens, torch.full_like(lens, int(i % 3 != 2)), rows, tables)
        notes[i] = torch.cat(parts)
    lens, lengths, rows, tables = notes[steps].split([sequences, sequences, sequences, sequences * pages])
    mappings = [torch.tensor([[i, steps]], device="cuda") for i in range(steps)]

    def calls(wait: bool) -> list[Tensor]:
        found = []
        for mapping in mappings:
            ops.copy_blocks([notes], mapping)
            if wait:
                torch.cuda.synchronize()
            found.append(
                ops.paged_attention(query, *caches, tables.view(sequences, pages), lens, rows, lengths, max_query_len=1)
            )
            if wait:
                torch.cuda.synchronize()
        return found

    assert_replays_equal_steps(calls)
