"""Inputs for every op but attention: for opcheck, for compiling, and to compare devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_pagedkv.ops import REFERENCES

Sample = tuple[str, tuple[Any, ...], dict[str, Any]]

QUANTIZED = [torch.int8, torch.float8_e4m3fn]


INT4_KINDS = ("symmetric", "zeros", "offsets")


@dataclass
class Int4:
    """A 4-bit weight, its numbers q not yet packed."""

    q: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    perm: Tensor | None
    group_size: int

    @property
    def packed(self) -> Tensor:
        """Packed by the reference."""
        return REFERENCES["int4_repack"](self.q)

    @property
    def numbers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """scales, zeros, offsets."""
        return self.scales, self.zeros, self.offsets


class Inputs:
    """Random tensors on a device, the same ones for every device."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal random numbers."""
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, dtype)

    def permutation(self, n: int, count: int) -> Tensor:
        """`count` different numbers below n, int64."""
        return torch.randperm(n, generator=self.generator)[:count].to(self.device)

    def vector(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        """A vector of these values."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def cache(
        self, blocks: int, block_size: int, heads: int, d: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """key_cache, value_cache, k_scale, v_scale with something in each entry; no scales unless quantised."""
        shape = (blocks, block_size, heads, d)
        if dtype not in QUANTIZED:
            return self.normal(*shape, dtype=dtype), self.normal(*shape, dtype=dtype), None, None
        k, v = (self.normal(*shape, scale=20).to(dtype) for _ in range(2))
        return k, v, self.normal(*shape[:3]).abs(), self.normal(*shape[:3]).abs()

    def int4(self, n: int, k: int, group_size: int, kind: str, dtype: torch.dtype, ordered: bool = True) -> Int4:
        """A random 4-bit weight of n outputs and k inputs with scales of a dtype; unless `ordered`, its inputs are
        permuted, with padding among them."""
        generator = self.generator
        perm = None
        inputs = k
        if not ordered:
            inputs = k + int(torch.randint(0, 70, (), generator=generator))
            perm = torch.full((inputs,), -1, dtype=torch.int32)
            perm[torch.randperm(inputs, generator=generator)[:k]] = torch.arange(k, dtype=torch.int32)
        group_size = group_size if group_size % 32 == 0 else max(group_size, inputs)
        q = torch.randint(0, 16, (n, inputs), generator=generator, dtype=torch.uint8)
        shape = (-(-inputs // group_size), n)
        scales = (torch.rand(shape, generator=generator) * 0.02 + 0.005).to(dtype)
        zeros = torch.randint(0, 17, shape, generator=generator, dtype=torch.uint8) if kind == "zeros" else None
        offsets = None
        if kind == "offsets":
            offsets = (-8 * scales.float() + torch.randn(shape, generator=generator) * 0.02).to(dtype)
        parts = [None if t is None else t.to(self.device) for t in (q, scales, zeros, offsets, perm)]
        return Int4(*parts, group_size)  # type: ignore[arg-type]

    def q4k_blocks(self, n: int, supers: int) -> Tensor:
        """Random super-blocks of GGUF's Q4_K, uint8 [n, 144 supers]: n outputs, 256 supers inputs."""
        blocks = torch.randint(0, 256, (n, supers, 144), generator=self.generator, dtype=torch.uint8)
        numbers = torch.rand(n, supers, 2, generator=self.generator) * 0.01 + 0.001
        blocks[..., :4] = numbers.half().view(torch.uint8).view(n, supers, 4)
        return blocks.flatten(1).to(self.device)

    def q4k(self, n: int, supers: int) -> tuple[Tensor, ...]:
        """packed, scales, mins, d, dmin of a random Q4_K weight."""
        return REFERENCES["q4k_repack"](self.q4k_blocks(n, supers))

    def int8(self, n: int, k: int, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """packed, scales of a random 8-bit weight."""
        q = torch.randint(-128, 128, (n, k), generator=self.generator, dtype=torch.int8)
        scales = torch.rand(-(-k // group_size), n, generator=self.generator) * 0.002 + 0.0005
        return REFERENCES["int8_repack"](q).to(self.device), scales.to(self.device, dtype)

    def rotation(self, tokens: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin of random angles."""
        angle = self.normal(tokens, half, scale=3).cpu()
        return angle.cos().to(self.device, dtype), angle.sin().to(self.device, dtype)


def samples(device: str) -> Iterator[Sample]:
    """Yield (op name, args, kwargs) for `torch.ops.torch_pagedkv`, fresh tensors each time."""
    new = Inputs(device)
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        k, v, k_scale, v_scale = new.cache(3, 8, 2, 16, dtype)
        source = torch.float16 if dtype in QUANTIZED else dtype
        key, value = new.normal(5, 2, 16, dtype=source), new.normal(5, 2, 16, dtype=source)
        slots = new.permutation(24, 5)
        slots[1] = -1
        yield "reshape_and_cache", (key, value, k, v, slots, k_scale, v_scale), {}
        cos, sin = new.rotation(5, 6)
        query = new.normal(5, 4, 16, dtype=source)
        k, v, k_scale, v_scale = new.cache(3, 8, 2, 16, dtype)
        args = (query, key, value, cos, sin, k, v, slots, dtype == torch.bfloat16, k_scale, v_scale)
        yield "rotary_and_cache", args, {}
        k, v, k_scale, v_scale = new.cache(4, 8, 2, 16, dtype)
        tables = new.vector([[2, 0], [1, 7], [3, 9]], torch.int32)
        lens, starts = new.vector([11, 8, 0], torch.int32), new.vector([1, 12, 0], torch.int32)
        yield "gather_cache", (k, v, tables, lens, starts, 24, source, k_scale, v_scale), {}
    mixed = [new.normal(4, 8, 2, 16), new.normal(4, 8, 2), new.normal(4, 8, 2, 16).to(torch.int8)]
    yield "copy_blocks", (mixed, new.vector([[0, 2], [3, 1]], torch.int64)), {}
    yield "swap_blocks", (new.normal(3, 8, 4), new.normal(5, 8, 4), torch.tensor([[0, 4], [2, 1]])), {}

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, residual = new.normal(2, 3, 40, dtype=dtype), new.normal(2, 3, 40, dtype=dtype)
        weight, bias = new.normal(40, dtype=dtype), new.normal(40)
        yield "rms_norm", (x, weight, 1e-6), {"round_before_weight": True}
        yield "add_rms_norm", (x, residual, weight.float(), 1e-6, 1.0), {}
        yield "layer_norm", (x, weight, bias, 1e-5), {}
        cos, sin = new.rotation(3, 8, dtype)
        query, key = new.normal(3, 4, 16, dtype=dtype), new.normal(3, 2, 16, dtype=dtype)
        yield "rotary_embedding", (query, key, cos, sin), {}
        yield "silu_and_mul", (x, residual), {}
        yield "gelu_and_mul", (x, residual, "tanh"), {}
        yield "bias_act", (x, weight, "gelu"), {}
        wide = new.normal(9, 48, dtype=dtype)
        yield "linear", (x, new.normal(21, 40, dtype=dtype), new.normal(21, dtype=dtype)), {}
        yield "linear", (wide[1:, 3:36], new.normal(5, 48, dtype=dtype)[:, :33]), {}
        for i, kind in enumerate(INT4_KINDS):
            w = new.int4(45, 130, (32, 64, 130)[i], kind, (torch.float16, dtype, torch.float32)[i], i != 1)
            yield "int4_dequantize", (w.packed, *w.numbers, w.perm, w.group_size, 130, dtype), {}
            options = {"activation": ("none", "silu", "gelu_tanh")[i]}
            rows = ((1,), (2, 3), (20,))[i]
            x = new.normal(*rows, 130, dtype=dtype)
            more = (new.normal(45, dtype=dtype), new.normal(*rows, 45, dtype=dtype)) if i else (None, None)
            yield "int4_linear", (x, w.packed, *w.numbers, w.perm, *more, w.group_size, 130), options
        for i, rows in enumerate(((1,), (2, 3), (20,))):
            more = (new.normal(45, dtype=dtype), new.normal(*rows, 45, dtype=dtype)) if i else (None, None)
            options = {"activation": ("none", "silu", "gelu_tanh")[i]}
            q4k = new.q4k(45, 2)
            yield "q4k_dequantize", (*q4k, dtype), {}
            yield "q4k_linear", (new.normal(*rows, 512, dtype=dtype), *q4k, *more), options
            group, scales = (32, 64, 130)[i], (torch.float16, dtype, torch.float32)[i]
            int8 = new.int8(45, 130, group, scales)
            yield "int8_dequantize", (*int8, group, 130, dtype), {}
            yield "int8_linear", (new.normal(*rows, 130, dtype=dtype), *int8, *more, group, 130), options
        for i, stored in enumerate(QUANTIZED):
            x = new.normal(3, 2, 44 + 8 * i, dtype=dtype)[..., 4 * i :]
            yield "quantize_per_token", (x, new.normal(x.shape[-1]).abs() if i else None, 16 * i, stored), {}
            sums = new.normal(3, 2, 41 - i, scale=1000)
            scales = new.normal(3, 2).abs(), new.normal(41 - i).abs()
            bias = new.normal(41 - i, dtype=dtype) if i else None
            yield "dequantize_sums", (sums if i else sums.int(), *scales, bias, dtype), {}
            eight = [new.normal(*size, scale=9).to(stored) for size in ((3, 2, 40 + 8 * i), (41 - i, 40 + 8 * i))]
            yield "scaled_linear", (eight[0], scales[0], eight[1], scales[1], bias, dtype), {}
        yield "argmax", (new.normal(3, 70, dtype=dtype),), {}
        seeds, offsets = new.vector([1, 2, -3], torch.int64), new.vector([0, 2**40, 7], torch.int64)
        parameters = {
            "temperature": new.vector([0.0, 0.7, 1.3], torch.float32),
            "top_k": new.vector([0, 9, 40], torch.int32),
            "top_p": new.vector([1.0, 0.9, 0.8], torch.float32),
            "min_p": new.vector([0.0, 0.0, 0.05], torch.float32),
        }
        yield "sample", (new.normal(3, 70, dtype=dtype), seeds, offsets), parameters
    for n, k in ((5, 70), (64, 32)):
        yield "int4_repack", (new.permutation(16 * n * k, n * k).remainder(16).to(torch.uint8).view(n, k),), {}
        yield "int8_repack", (new.normal(n, k, scale=40).to(torch.int8),), {}
    for n, supers in ((5, 1), (33, 3)):
        yield "q4k_repack", (new.q4k_blocks(n, supers),), {}
    yield "rms_norm", (new.normal(3, 17), None, 1e-6), {}
    yield "layer_norm", (new.normal(3, 17), None, None, 1e-5), {}
    yield "rotary_embedding", (new.normal(3, 4, 16), None, *new.rotation(3, 5), True), {}
    yield "bias_act", (new.normal(3, 17), None, "relu2"), {}
    yield "sample", (new.normal(2, 33), new.vector([5, 6], torch.int64), new.vector([0, 1], torch.int64)), {}
    yield "rms_norm", (new.normal(0, 8), None, 1e-6), {}
