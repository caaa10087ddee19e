"""Sampling of the next token on the device, without a sort, with a seeded random stream for each row.

For each row, in float32:
    z = logits / temperature                          (temperature 0: the argmax, whatever else is set)
    top-k:  keep z >= the k-th largest                (ties with it are kept; k <= 0 or k >= V: off)
    top-p:  keep z >= the largest v for which the softmax mass of {kept by top-k, z >= v} reaches p     (p >= 1: off)
    min-p:  keep softmax(z) >= min_p * max softmax(z) (min_p <= 0: off)
    with any of these filters on:
        token = argmax over the kept of  z_i - log(E_0i)                       (the exponential race / Gumbel-max trick)
    without, in two heats, so that few random numbers are drawn:
        group = argmax over the groups of GROUP entries of  log(sum of exp(z_i), i // GROUP == g) - log(E_1g)
        token = argmax over that group of  z_i - log(E_0i)
    E_hi = -log1p(-w_hi),  w_hi = min((x_hi + 0.5) * 2^-32, 1 - 2^-24),
    x_hi = word i % 4 of Philox4x32-10(counter, key) with
    counter = (i // 4, h, offset & 0xffffffff, offset >> 32), key = (seed & 0xffffffff, seed >> 32)
The token depends only on the row's logits, its parameters, seed and offset: not on the batch, the device's grid or
the order of a sum. NaN counts as -inf; if +inf occurs, only the +inf entries take part. A row with nothing above -inf
returns -1. Ties go to the lowest index.

w is small where E is small, which is where winners are: float32 resolves E there to 2^-32, where -log(u) with u near 1
would collapse to 0 once in 2^24 draws and pick wrong tokens at a rate visible with large vocabularies.

Sources: Philox: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011); Gumbel-max: Maddison et al.,
arXiv:1411.0030; top-p: Holtzman et al., arXiv:1904.09751; min-p: Nguyen et al., arXiv:2407.01082.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, reference

_ops = torch.ops.torch_pagedkv

#: entries that race as one in the first heat
GROUP = 256


@define(
    "sample(Tensor logits, Tensor seeds, Tensor offsets, Tensor? temperature=None, Tensor? top_k=None, "
    "Tensor? top_p=None, Tensor? min_p=None) -> Tensor"
)
def _(logits, seeds, offsets, temperature=None, top_k=None, top_p=None, min_p=None):
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


@define("argmax(Tensor logits) -> Tensor")
def _(logits):
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ references

_M32 = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _mul32(c0, 0xD2511F53), _mul32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = p1[0] ^ c1 ^ k0, p1[1], p0[0] ^ c3 ^ k1, p0[1]
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return [c0, c1, c2, c3]


def _mul32(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of a * m without leaving int64."""
    low_part, high_part = (a & 0xFFFF) * m, (a >> 16) * m  # both below 2^48
    total_low = low_part + ((high_part & 0xFFFF) << 16)
    return ((high_part >> 16) + (total_low >> 32)) & _M32, total_low & _M32


def exponentials(count: int, seed: int, offset: int, heat: int = 0) -> Tensor:
    """E_hi of the module's docstring, h = heat, float64 [count]."""
    index = torch.arange(-(-count // 4), dtype=torch.int64)
    zero = torch.zeros_like(index)
    seed, offset = seed & (2**64 - 1), offset & (2**64 - 1)
    words = philox4x32((index, zero + heat, zero + (offset & _M32), zero + (offset >> 32)), (seed & _M32, seed >> 32))
    x = torch.stack(words, 1).flatten()[:count]
    w = ((x.double() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log1p(-w)


def group_masses(z: Tensor) -> Tensor:
    """log(sum of exp(z_i)) of each group of z [V], [groups]."""
    return torch.nn.functional.pad(z, (0, -len(z) % GROUP), value=-torch.inf).view(-1, GROUP).logsumexp(1)


@reference("sample")
def sample_reference(
    logits: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The contract in plain PyTorch and float64, row by row, with a sort."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    for r in range(rows):
        z = logits[r].cpu().double()
        z = torch.where(z.isnan(), -torch.inf, z)
        if bool(z.eq(torch.inf).any()):
            z = torch.where(z.eq(torch.inf), 0.0, -torch.inf)
        t = 1.0 if temperature is None else float(temperature[r])
        if bool(z.eq(-torch.inf).all()):
            out[r] = -1
            continue
        if t == 0:
            out[r] = int(z.argmax())
            continue
        z = z / t
        k = 0 if top_k is None else int(top_k[r])
        p = 1.0 if top_p is None else float(top_p[r])
        m = 0.0 if min_p is None else float(min_p[r])
        if 0 < k < vocab:
            z = z.masked_fill(z < z.topk(k).values[-1], -torch.inf)
        if p < 1:
            values = z.sort(descending=True).values
            mass = torch.softmax(values, 0).cumsum(0)
            last = int((mass < p).sum().clamp_max(vocab - 1))
            z = z.masked_fill(z < values[last], -torch.inf)
        if m > 0:
            z = z.masked_fill(torch.softmax(z, 0) < m * torch.softmax(z, 0).max(), -torch.inf)
        stream = int(seeds[r]), int(offsets[r])
        if not (0 < k < vocab or p < 1 or m > 0):
            masses = group_masses(z)
            first = int((masses - exponentials(len(masses), *stream, heat=1).log()).argmax()) * GROUP
            z[:first] = z[first + GROUP :] = -torch.inf
        out[r] = int((z - torch.log(exponentials(vocab, *stream))).argmax())
    return out.to(logits.device)


@reference("argmax")
def argmax_reference(logits: Tensor) -> Tensor:
    """The contract in plain PyTorch: NaN is skipped, the lowest index wins a tie, -1 if nothing is above -inf."""
    z = torch.where(logits.isnan(), -torch.inf, logits.double())
    best = z.max(-1, keepdim=True).values
    first = (z == best).int().argmax(-1)
    return torch.where(best[:, 0] == -torch.inf, -1, first)


# ------------------------------------------------------------------------------------------------ public functions


def sample(
    logits: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Draw one token a row. The module's docstring defines the distribution and the random stream.

    Args:
        logits: [B, V], float32, float16 or bfloat16, unit stride in V.
        seeds, offsets: int64 [B]; the stream of a row is (seed, offset): count the offset up with each token.
        temperature, top_p, min_p: float32 [B] or None; top_k: int32 [B] or None.

    Returns:
        int64 [B].
    """
    return _ops.sample(logits, seeds, offsets, temperature, top_k, top_p, min_p)


def argmax(logits: Tensor) -> Tensor:
    """The index of each row's largest entry, int64 [B]: lowest index on a tie, NaN skipped, -1 for a row of -inf."""
    return _ops.argmax(logits)
