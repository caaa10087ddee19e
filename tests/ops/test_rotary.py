"""Rotary embedding: HuggingFace's bits in float32, one rounding in 16 bits, in place, and the fused cache write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, assert_as_accurate, cpu, same_bits
from ops.samples_small import QUANTIZED, Inputs
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.ops.rotary import _rotate

relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stock(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotation as HuggingFace models write it, in x's dtype: x * cos + rotate_half(x) * sin."""
    half = cos.shape[1]
    rot, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = (t.to(x.dtype)[:, None] for t in (cos, sin))
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        other = torch.stack([-rot[..., 1::2], rot[..., ::2]], -1).flatten(-2)
    else:
        cos, sin = (torch.cat([t, t], -1) for t in (cos, sin))
        other = torch.cat([-rot[..., half:], rot[..., :half]], -1)
    return torch.cat([rot * cos + other * sin, rest], -1)


@relaxed
@given(
    tokens=st.integers(0, 5),
    heads=st.integers(1, 4),
    d=st.sampled_from([2, 16, 64, 80, 96, 120, 128, 256]),
    share=st.sampled_from([0.0, 0.25, 0.4, 1.0]),
    dtype=st.sampled_from(FLOATS),
    table=st.sampled_from([None, torch.float32]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotates_slices_of_a_fused_projection(
    device: str,
    tokens: int,
    heads: int,
    d: int,
    share: float,
    dtype: torch.dtype,
    table: torch.dtype | None,
    interleaved: bool,
    seed: int,
) -> None:
    """Query and key in place; what lies beside them, and the elements past the rotated ones, keep their bits."""
    new = Inputs(device, seed)
    cos, sin = new.rotation(tokens, int(d * share) // 2, table or dtype)
    fused = new.normal(tokens, (heads + 2) * d + 1, dtype=dtype)
    before = fused.clone()

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 1 : 1 + heads * d].view(tokens, heads, d), x[:, 1 + heads * d : 1 + (heads + 1) * d].unsqueeze(1)

    query, key = split(fused)
    ops.rotary_embedding(query, key, cos, sin, interleaved=interleaved)
    for got, x in zip(split(fused), split(before)):
        own = stock(x, cos, sin, interleaved)
        if dtype == torch.float32 and device == "cpu":
            assert same_bits(got, own)
        else:
            assert_as_accurate(got, own, _rotate(x, cos, sin, interleaved))
        assert same_bits(got[..., 2 * cos.shape[1] :], x[..., 2 * cos.shape[1] :])
    assert same_bits(fused[:, :1], before[:, :1])
    assert same_bits(fused[:, 1 + (heads + 1) * d :], before[:, 1 + (heads + 1) * d :])


def test_query_alone_and_many_tokens(device: str) -> None:
    new = Inputs(device)
    query, (cos, sin) = new.normal(1000, 4, 64), new.rotation(1000, 32)
    own, exact = stock(query, cos, sin, False), _rotate(query, cos, sin, False)
    ops.rotary_embedding(query, None, cos, sin)
    assert_as_accurate(query, own, exact)


def test_tables_broadcast_over_tokens(device: str) -> None:
    """One row of cos and sin for all tokens, as an expanded view (a decode step of equal positions)."""
    new = Inputs(device)
    cos, sin = new.rotation(1, 32)
    query = new.normal(6, 2, 64)
    each = query.clone()
    ops.rotary_embedding(query, None, cos.expand(6, -1), sin.expand(6, -1))
    for t in range(6):
        ops.rotary_embedding(each[t : t + 1], None, cos, sin)
    assert same_bits(query, each)


@relaxed
@given(
    tokens=st.integers(0, 6),
    dtype=st.sampled_from(FLOATS),
    cache_dtype=st.sampled_from([None, *QUANTIZED]),
    d=st.sampled_from([16, 80, 128]),
    partial=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fused_write_has_the_bits_of_both_ops(
    device: str,
    tokens: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    d: int,
    partial: bool,
    interleaved: bool,
    seed: int,
) -> None:
    new = Inputs(device, seed)
    cos, sin = new.rotation(tokens, d // 4 if partial else d // 2)
    fused = new.normal(tokens, 8 * d, dtype=dtype)
    query, key, value = fused.view(tokens, 8, d).split([4, 2, 2], 1)
    caches = new.cache(3, 8, 2, d, cache_dtype or dtype)
    slots = new.permutation(24, tokens)
    slots[seed % 2 :: 4] = -1
    want = fused.clone()
    q, k, v = want.view(tokens, 8, d).split([4, 2, 2], 1)
    want_caches = [None if x is None else x.clone() for x in caches]
    ops.rotary_embedding(q, k, cos, sin, interleaved=interleaved)
    ops.reshape_and_cache(k, v, *want_caches[:2], slots, *want_caches[2:])
    kept = key.clone(), value.clone()
    ops.rotary_and_cache(
        *(query, key, value, cos, sin, *caches[:2], slots),
        interleaved=interleaved,
        k_scale=caches[2],
        v_scale=caches[3],
    )
    assert same_bits(query, q)
    assert same_bits(key, kept[0])
    assert same_bits(value, kept[1])
    for x, y in zip(caches, want_caches):
        assert x is None or same_bits(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda x: x[0]}, r"query: got shape \[2, 16\], needs \[T, H, D\]"),
        ({"query": lambda x: x.double()}, "query: got float64"),
        ({"key": lambda x: x.half()}, "key: got float16, needs query's dtype, float32"),
        ({"key": lambda x: x[:2]}, r"key: got shape \[2, 1, 16\]"),
        ({"cos": lambda x: x[:, :4]}, "sin: got shape"),
        ({"cos": lambda x: x.repeat(1, 2), "sin": lambda x: x.repeat(1, 2)}, r"cos: got shape .* needs R / 2 <= D / 2"),
        ({"sin": lambda x: x.half()}, "sin: got float16, needs query's dtype, float32, or float32"),
        ({"query": lambda x: x.repeat_interleave(2, -1)[..., ::2]}, "query: got stride 2 in the last dimension"),
    ],
)
def test_refuses(device: str, change: dict[str, Any], message: str) -> None:
    new = Inputs(device)
    cos, sin = new.rotation(3, 8)
    named = {"query": new.normal(3, 2, 16), "key": new.normal(3, 1, 16), "cos": cos, "sin": sin}
    named |= {key: f(named[key]) for key, f in change.items()}
    with pytest.raises(RuntimeError, match=f"rotary_embedding: {message}"):
        ops.rotary_embedding(**named)


def test_fused_write_refuses_a_slot_outside_before_rotating() -> None:
    new = Inputs("cpu")
    cos, sin = new.rotation(2, 8)
    k, v, _, _ = new.cache(2, 8, 1, 16, torch.float32)
    args = [new.normal(2, 2, 16), new.normal(2, 1, 16), new.normal(2, 1, 16), cos, sin, k, v, torch.tensor([0, 99])]
    before = cpu(args)
    with pytest.raises(RuntimeError, match="rotary_and_cache: slot_mapping: got slot 99 for token 1"):
        ops.rotary_and_cache(*args)
    assert all(map(same_bits, args, before))


@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "d"), [(500, (4, 2, 2), 64), (500, (3, 2, 2), 96), (1540, (32, 4, 4), 256)]
)
def test_many_tokens_at_once(
    device: str, tokens: int, heads: tuple[int, int, int], d: int, cache_dtype: torch.dtype | None
) -> None:
    """Enough rows for the kernel that large batches take, a head more than it pairs up, and more than L2 keeps: the
    bits of the two ops."""
    new = Inputs(device)
    fused = new.normal(tokens, sum(heads) * d, dtype=torch.bfloat16)
    cos, sin = new.rotation(tokens, d // 2, torch.bfloat16)
    slots = new.permutation(1600, tokens)
    slots[7] = -1
    if device == "cuda":
        slots[8] = 1600  # the CPU looks at slots, and refuses
    found = []
    for together in (True, False):
        query, key, value = (x.unflatten(-1, (-1, d)) for x in fused.clone().split([n * d for n in heads], -1))
        new = Inputs(device, 1)
        k, v, k_scale, v_scale = new.cache(100, 16, heads[1], d, cache_dtype or torch.bfloat16)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        if together:
            ops.rotary_and_cache(query, key, value, cos, sin, k, v, slots, **scales)
        else:
            ops.rotary_embedding(query, key, cos, sin)
            ops.reshape_and_cache(key, value, k, v, slots, **scales)
        found.append([query, k, v, *(x for x in (k_scale, v_scale) if x is not None)])
    for got, want in zip(*found, strict=True):
        assert same_bits(got, want)
