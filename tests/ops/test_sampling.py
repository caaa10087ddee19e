"""Sampling: the distribution, the kept sets, the random stream, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.accuracy import FLOATS, cpu
from ops.samples_small import Inputs
from torch import Tensor

from torch_pagedkv import ops
from torch_pagedkv.ops import REFERENCES
from torch_pagedkv.ops.sampling import GROUP, exponentials, group_masses, philox4x32

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = {
    "seeds": torch.int64,
    "offsets": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
}


def draw(logits: Tensor, seeds: Any, offsets: Any, **parameters: Any) -> Tensor:
    """`ops.sample` with lists, or one value for all rows; the tokens on the CPU."""
    named = {"seeds": seeds, "offsets": offsets} | parameters
    tensors = {}
    for key, value in named.items():
        values = value if isinstance(value, (list, range)) else [value] * logits.shape[0]
        tensors[key] = torch.tensor(list(values), dtype=DTYPES[key], device=logits.device)
    return ops.sample(logits, **tensors).cpu()


def support(row: Tensor, draws: int = 2000, **parameters: Any) -> set[int]:
    """The tokens that turn up when one row is drawn again and again."""
    return set(draw(row.expand(draws, -1), 11, range(draws), **parameters).tolist())


def scores(row: Tensor, seed: int, offset: int, temperature: float) -> Tensor:
    """z - log(E) in float64."""
    return row.cpu().double() / temperature - exponentials(row.shape[0], seed, offset).log()


# ---- the random stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_known_answers(word: int, expected: list[int]) -> None:
    """The reference, against the vectors published with Random123."""
    words = philox4x32(tuple(torch.tensor([word]) for _ in range(4)), (word, word))
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("offset", [0, 7, 2**32 + 5, -1])
def test_stream_has_the_reference_words(device: str, seed: int, offset: int) -> None:
    """With equal logits the token is the smallest E; removing each winner in turn shows the order of all of them."""
    row = torch.zeros(1, 261, device=device)
    order = exponentials(261, seed, offset).argsort()
    for token in order[:40].tolist():
        assert draw(row, seed, offset, min_p=1e-30).item() == token
        row[0, token] = -torch.inf


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-1, 2**32 + 5), (2**62 + 12345, 7), (-(2**63), -1)])
def test_groups_have_the_reference_words(device: str, seed: int, offset: int) -> None:
    """The same for the first heat's: groups of equal mass, in the order of their E, each with its smallest E inside."""
    row = torch.zeros(1, 41 * GROUP, device=device)
    inside = exponentials(41 * GROUP, seed, offset).view(41, GROUP).argmin(1)
    for group in exponentials(41, seed, offset, heat=1).argsort().tolist():
        assert draw(row, seed, offset).item() == group * GROUP + int(inside[group])
        row[0, group * GROUP : (group + 1) * GROUP] = -torch.inf
    assert draw(row, seed, offset).item() == -1


# ---- the distribution ------------------------------------------------------------------------------------------------


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean (normal approximation of Wilson and Hilferty)."""
    used = probabilities > 0
    assert int(counts[~used].sum()) == 0
    expected = probabilities[used] * counts.sum()
    freedom = int(used.sum()) - 1
    statistic = float(((counts[used] - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("vary", ["seeds", "offsets"])
def test_distribution(device: str, parameters: dict[str, float], vary: str) -> None:
    """40,000 draws over seeds, or over offsets, against the softmax of what is kept."""
    row = Inputs(device, 3).normal(1, 17, scale=1.5)
    z = row[0].cpu().double() / parameters.get("temperature", 1.0)
    order = z.argsort(descending=True)
    kept = order[: int(parameters.get("top_k", 17))]
    mass = z[kept].softmax(0).cumsum(0)
    kept = kept[: int((mass < parameters.get("top_p", 1.0)).sum()) + 1]
    kept = kept[z[kept].exp() >= parameters.get("min_p", 0.0) * z.max().exp()]
    probabilities = torch.zeros(17, dtype=torch.float64)
    probabilities[kept] = z[kept].softmax(0)
    n = 40_000
    stream: dict[str, Any] = {"seeds": 5, "offsets": 9, vary: range(n)}
    tokens = draw(row.expand(n, -1), **stream, **parameters)
    counts = torch.bincount(tokens, minlength=17).double()
    assert chi_square(counts, probabilities) < 4


def test_rare_tokens_of_a_large_vocabulary(device: str) -> None:
    """Half the mass in one token, the rest over 50,000: each part, and the parts of the tail, as often as due."""
    row = torch.zeros(1, 50_000, device=device)
    row[0, 123] = math.log(49_999)
    tokens = draw(row.expand(1500, -1), range(1500), 0)
    assert abs(int((tokens == 123).sum()) - 750) < 4 * math.sqrt(375)
    tail = tokens[tokens != 123]
    assert chi_square(torch.bincount(tail // 5000, minlength=10).double(), torch.full((10,), 0.1).double()) < 4


@pytest.mark.parametrize(("vocab", "draws"), [(600, 40_000), (2000, 40_000), (33_000, 4000)])
def test_distribution_over_groups(device: str, vocab: int, draws: int) -> None:
    """Groups of unlike mass, the last one short; bins of 50 entries straddle them. The largest logit rules its own."""
    row = Inputs(device, 8).normal(1, vocab, scale=1.5)
    row[0, : vocab // 3] -= 1.5
    row[0, vocab // 2] = 4 + math.log(vocab / 600)
    tokens = draw(row.expand(draws, -1), range(draws), 3, temperature=1.3)
    bins = max(50, vocab // 200)
    mass = (row[0].cpu().double() / 1.3).softmax(0)
    want = torch.zeros(-(-vocab // bins), dtype=torch.float64).index_add_(0, torch.arange(vocab) // bins, mass)
    assert chi_square(torch.bincount(tokens // bins, minlength=len(want)).double(), want) < 4


@relaxed
@given(
    vocab=st.sampled_from([1, 2, 31, 63, 64, 65, 300, 1000, 4099]),
    dtype=st.sampled_from(FLOATS),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 40, 500, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_equals_reference(
    device: str,
    vocab: int,
    dtype: torch.dtype,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    spread: float,
    seed: int,
) -> None:
    """The reference's token, or one that float32 cannot tell from it: a tie of scores, or at the edge of a kept set."""
    logits = Inputs(device, seed % 1000).normal(4, vocab, dtype=dtype, scale=spread)
    offsets = [0, 1, 2**33, -1]
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    got = draw(logits, seed, offsets, **parameters)

    def reference(nudge: float) -> Tensor:
        shifted = parameters | {"top_p": top_p * (1 + nudge) if top_p < 1 else 1.0, "min_p": min_p * (1 + nudge)}
        vectors = {key: torch.tensor([x] * 4, dtype=torch.float64) for key, x in shifted.items()}
        return REFERENCES["sample"](logits.cpu(), torch.tensor([seed] * 4), torch.tensor(offsets), **vectors)

    answers = torch.stack([reference(nudge) for nudge in (0.0, -1e-5, 1e-5)])
    for r in range(4):
        if got[r] not in answers[:, r]:
            score = scores(logits[r], seed, offsets[r], temperature)
            scale = 1e-6 * (1 + float(logits[r].abs().max()) / temperature)
            assert abs(float(score[got[r]] - score[answers[0, r]])) < scale


@relaxed
@given(
    vocab=st.sampled_from([1, 7, 255, 256, 257, 1000, 4099, 20_001]),
    dtype=st.sampled_from(FLOATS),
    temperature=st.sampled_from([0.1, 0.8, 1.0, 3.0]),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    special=st.sampled_from(["", "nan", "-inf", "mostly -inf", "inf", "wide"]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_heats_equal_reference(
    device: str, vocab: int, dtype: torch.dtype, temperature: float, spread: float, special: str, seed: int
) -> None:
    """Without filters: the reference's group and token, or ones whose scores float32 cannot tell from theirs."""
    new = Inputs(device, seed % 1000)
    logits = new.normal(3, vocab, dtype=dtype, scale=spread)
    if special == "wide":
        logits = logits * 1e3
    elif special:
        limit = {"mostly -inf": -2.0, "inf": 2.0}.get(special, 0.5)
        value = float(special.removeprefix("mostly "))
        logits = torch.where(new.normal(3, vocab) > limit, value, logits.float()).to(dtype)
    offsets = [0, 2**33, -1]
    got = draw(logits, seed, offsets, temperature=temperature)
    vectors = torch.tensor([seed] * 3), torch.tensor(offsets), torch.full((3,), temperature, dtype=torch.float64)
    want = REFERENCES["sample"](logits.cpu(), *vectors)
    for r in (got != want).nonzero().flatten().tolist():
        z = logits[r].cpu().double() / temperature
        if bool((z == torch.inf).any()):
            z = torch.where(z == torch.inf, 0.0, -torch.inf)
        group, best = int(got[r]) // GROUP, int(want[r]) // GROUP
        score = z - exponentials(vocab, seed, offsets[r]).log()
        if group != best:
            masses = group_masses(z.nan_to_num(-torch.inf, neginf=-torch.inf))
            heat = masses - exponentials(len(masses), seed, offsets[r], heat=1).log()
            assert abs(float(heat[group] - heat[best])) < 2e-6 * (1 + float(z[z.isfinite()].abs().max()))
            best = group
        inside = score[best * GROUP : (best + 1) * GROUP]
        top = inside[inside.isfinite()].max()
        assert abs(float(score[got[r]] - top)) < 1e-6 * (1 + float(z[z.isfinite()].abs().max()))


# ---- kept sets -------------------------------------------------------------------------------------------------------


def test_top_k_keeps_ties(device: str) -> None:
    row = torch.full((1, 200), -1.0, device=device)
    row[0, [5, 70, 131]] = 2.0
    row[0, [9, 64, 199]] = 1.5
    assert support(row, top_k=1) == {5, 70, 131}
    assert support(row, top_k=3) == {5, 70, 131}
    for k in (4, 5, 6):
        assert support(row, top_k=k) == {5, 70, 131, 9, 64, 199}
    for k in (0, -3, 200, 10**9):
        assert len(support(row, top_k=k)) > 100


def test_top_p_keeps_the_smallest_set_that_reaches_p(device: str) -> None:
    row = torch.full((1, 100), -torch.inf, device=device)
    row[0, [3, 50, 64, 99]] = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log()
    order = [3, 50, 64, 99]
    for p, kept in ((0.0, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4)):
        assert support(row, top_p=p) == set(order[:kept])
    assert support(row, top_p=1.0) == {3, 50, 64, 99}
    # Over what top-k left: 0.4 / 0.7 = 0.571.
    assert support(row, top_p=0.56, top_k=2) == {3}
    assert support(row, top_p=0.58, top_k=2) == {3, 50}


def test_top_p_keeps_ties(device: str) -> None:
    row = torch.zeros(1, 128, device=device)
    row[0, 64:] = -9.0
    assert support(row, top_p=0.3, draws=4000) == set(range(64))


def test_min_p(device: str) -> None:
    row = torch.full((1, 100), -20.0, device=device)
    row[0, [3, 50, 64]] = torch.tensor([0.0, -1.0, -2.0], device=device)
    assert support(row, min_p=1.0) == {3}
    assert support(row, min_p=0.36) == {3, 50}
    assert support(row, min_p=0.13) == {3, 50, 64}
    assert support(row, min_p=0.38) == {3}
    assert support(row, min_p=0.13, temperature=0.5) == {3, 50}


@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "steps", "equal"])
@pytest.mark.parametrize("vocab", [1000, 50_257])
def test_thresholds_on_many_shapes(device: str, kind: str, vocab: int) -> None:
    """No token outside the set by a sort in float64, on distributions that stress the search for the threshold."""
    new = Inputs(device, 1)
    row = new.normal(1, vocab)
    row = {"normal": row, "flat": row * 1e-3, "peaked": row * 12, "steps": row.round(), "equal": row * 0}[kind]
    sorted_row = row[0].cpu().double().sort(descending=True).values
    mass = sorted_row.softmax(0).cumsum(0)
    for k, p in ((0, 0.1), (0, 0.9), (0, 0.9999), (50, 1.0), (900, 1.0), (900, 0.5)):
        limit = sorted_row[k - 1] if k else -torch.inf
        kept = sorted_row[sorted_row >= limit]
        if p < 1:
            mass = kept.softmax(0).cumsum(0)
            limit = kept[int((mass < p * (1 + 1e-6)).sum().clamp_max(len(kept) - 1))]
        tokens = draw(row.expand(64, -1), 3, range(64), top_k=k, top_p=p)
        assert bool((row[0].cpu()[tokens].double() >= limit).all())


@pytest.mark.parametrize("kind", ["normal", "flat", "steps", "masked"])
@pytest.mark.parametrize(("top_k", "top_p"), [(50, 0.9), (256, 1.0), (257, 0.7), (0, 0.5), (0, 0.999), (3, 0.0)])
def test_large_vocabulary_equals_reference(device: str, kind: str, top_k: int, top_p: float) -> None:
    """Where few entries are kept and where many are, with thousands of ties, with most of the vocabulary masked."""
    new = Inputs(device, 7)
    logits = new.normal(3, 20_011, scale=3.0)
    if kind == "flat":
        logits *= 1e-3
    elif kind == "steps":
        logits = (logits / 3).round()
    elif kind == "masked":
        logits[:, new.permutation(20_011, 19_900)] = -torch.inf
    parameters = {"temperature": [0.8, 1.0, 2.5], "top_k": [top_k] * 3, "top_p": [top_p] * 3}
    got = draw(logits, [3, 4, 5], [0, 7, 2**40], **parameters)
    vectors = {key: torch.tensor(value, dtype=torch.float64) for key, value in parameters.items()}
    streams = torch.tensor([3, 4, 5]), torch.tensor([0, 7, 2**40])
    assert torch.equal(got, REFERENCES["sample"](logits.cpu(), *streams, **vectors))


# ---- special values --------------------------------------------------------------------------------------------------


def test_temperature_zero_is_argmax(device: str) -> None:
    logits = Inputs(device).normal(5, 333)
    logits[1, 40] = logits[1, 300] = 9.0
    logits[2, 7] = torch.nan
    logits[3, 20] = logits[3, 90] = torch.inf
    logits[4] = -torch.inf
    want = REFERENCES["argmax"](logits.cpu())
    assert torch.equal(draw(logits, 1, 2, temperature=0.0, top_k=1, top_p=0.5, min_p=0.5), want)
    assert torch.equal(ops.argmax(logits).cpu(), want)
    assert want[1] == 40
    assert want[3] == 20
    assert want[4] == -1


def test_nan_and_infinities(device: str) -> None:
    row = torch.zeros(1, 130, device=device)
    row[0, ::2] = torch.nan
    row[0, 1::4] = -torch.inf
    assert support(row) == set(range(3, 130, 4))
    row[0, [8, 77]] = torch.inf
    for parameters in ({}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}, {"temperature": 5.0}):
        assert support(row, **parameters) == {8, 77}
    for value in (torch.nan, -torch.inf):
        assert draw(torch.full((2, 70), value, device=device), 1, 2, top_k=3, top_p=0.5).tolist() == [-1, -1]
    assert draw(torch.tensor([[5.0]], device=device), 1, 2).tolist() == [0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("parameters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3, "min_p": 0.1}])
def test_the_lowest_numbers_are_no_infinities(device: str, dtype: torch.dtype, parameters: dict[str, float]) -> None:
    """Masks of the lowest finite number: drawn from where there is nothing else."""
    row = torch.full((1, 700), -torch.inf, dtype=dtype, device=device)
    row[0, [5, 300, 600]] = torch.finfo(dtype).min
    assert support(row, draws=200, **parameters) <= {5, 300, 600}
    row[0, 40] = 0.0
    assert support(row, draws=20, **parameters) == {40}


def test_temperature_that_overflows_is_the_limit(device: str) -> None:
    """A quotient past float32 leaves the argmax, as a temperature of 0 does."""
    row = torch.tensor([[1.0, 3.0, 2.0] * 30], device=device)
    for sign in (1, -1):
        assert support(sign * row, draws=20, temperature=1e-39) <= ({1} if sign == 1 else {0})


# ---- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_independent_of_the_batch(device: str, dtype: torch.dtype) -> None:
    """Each row alone, in another order, from a strided tensor, and again: the same tokens."""
    new = Inputs(device)
    logits = new.normal(40, 2 * 3001, dtype=dtype)[:, 1:3002]
    rows = 40
    seeds, offsets = new.permutation(rows, rows), new.permutation(rows, rows)
    named = {
        "temperature": torch.linspace(0, 2, rows, device=device),
        "top_k": (torch.arange(rows, device=device, dtype=torch.int32) % 5) * 20,
        "top_p": torch.linspace(0.2, 1.2, rows, device=device),
        "min_p": (torch.arange(rows, device=device) % 3) * 0.01,
    }
    together = ops.sample(logits, seeds, offsets, **named)
    assert torch.equal(together, ops.sample(logits.contiguous(), seeds, offsets, **named))
    order = new.permutation(rows, rows)
    shuffled = ops.sample(logits[order], seeds[order], offsets[order], **{key: x[order] for key, x in named.items()})
    assert torch.equal(shuffled, together[order])
    for r in range(0, rows, 7):
        one = {key: x[r : r + 1] for key, x in named.items()}
        assert ops.sample(logits[r : r + 1], seeds[r : r + 1], offsets[r : r + 1], **one) == together[r]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50_257, 128_256])
def test_independent_of_the_grid(device: str, vocab: int) -> None:
    """Few rows, which several blocks share, and as many as fill the GPU: the same tokens."""
    rows, few = 300, 5
    logits = Inputs(device, 2).normal(few, vocab, scale=3.0).repeat(rows // few, 1)
    one = torch.arange(few, device=device)
    for options in ({}, {"top_k": [50] * few, "top_p": [0.9] * few}, {"min_p": [0.05] * few}, {"top_p": [0.7] * few}):
        few_options = {key: torch.tensor(value, dtype=DTYPES[key], device=device) for key, value in options.items()}
        want = torch.cat(
            [
                ops.sample(
                    logits[r : r + 1],
                    one[r : r + 1],
                    one[r : r + 1],
                    **{k: x[r : r + 1] for k, x in few_options.items()},
                )
                for r in range(few)
            ]
        )
        for count in (few, 130, 255, rows):
            times = -(-count // few)
            got = ops.sample(
                logits[:count],
                one.repeat(times)[:count],
                one.repeat(times)[:count],
                **{key: x.repeat(times)[:count] for key, x in few_options.items()},
            )
            assert torch.equal(got, want.repeat(times)[:count])
        assert torch.equal(ops.argmax(logits), ops.argmax(logits[:few]).repeat(rows // few))


def test_streams_differ(device: str) -> None:
    row = torch.zeros(1, 5000, device=device)
    for stream in ({"seeds": range(300), "offsets": 1}, {"seeds": 1, "offsets": range(300)}):
        assert len(draw(row.expand(300, -1), **stream).unique()) > 270


# ---- argmax and errors -----------------------------------------------------------------------------------------------


@relaxed
@given(
    rows=st.integers(0, 4),
    vocab=st.sampled_from([1, 3, 15, 16, 17, 511, 512, 513, 1500, 49_152]),
    dtype=st.sampled_from(FLOATS),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 99),
)
def test_argmax(device: str, rows: int, vocab: int, dtype: torch.dtype, levels: int, seed: int) -> None:
    """Exact, with many ties, NaN and infinities strewn in."""
    new = Inputs(device, seed)
    logits = (new.normal(rows, vocab + 1).abs() * levels).round().to(dtype)[:, 1:]
    for value in (torch.nan, -torch.inf):
        logits = torch.where(new.normal(rows, vocab) > 1, value, logits.float()).to(dtype)
    assert torch.equal(ops.argmax(logits).cpu(), REFERENCES["argmax"](cpu(logits)))


def test_refuses(device: str) -> None:
    new = Inputs(device)
    logits = new.normal(2, 9)
    good: dict[str, Any] = {key: torch.ones(2, dtype=dtype, device=device) for key, dtype in DTYPES.items()}
    for change, message in [
        ({"logits": logits[0]}, r"logits: got shape \[9\], needs \[B, V\]"),
        ({"logits": logits.double()}, "logits: got float64"),
        ({"logits": logits[:, :0]}, r"logits: got shape \[2, 0\], needs 0 < V"),
        ({"logits": logits.repeat_interleave(2, 1)[:, ::2]}, "logits: got stride 2"),
        ({"seeds": good["seeds"].int()}, "seeds: got int32, needs int64"),
        ({"offsets": good["offsets"][:1]}, r"offsets: got shape \[1\]"),
        ({"temperature": good["temperature"].double()}, "temperature: got float64, needs float32"),
        ({"top_k": good["top_k"].long()}, "top_k: got int64, needs int32"),
        ({"top_p": good["top_p"].repeat(2)[::2]}, "top_p: got stride 2"),
        ({"min_p": good["min_p"].repeat(2)}, r"min_p: got shape \[4\]"),
    ]:
        with pytest.raises(RuntimeError, match=f"sample: {message}"):
            ops.sample(**({"logits": logits} | good | change))
    with pytest.raises(RuntimeError, match="argmax: logits: got int64"):
        ops.argmax(logits.long())


@pytest.mark.parametrize("value", [-0.5, math.nan])
def test_refuses_a_negative_temperature(value: float) -> None:
    with pytest.raises(RuntimeError, match=r"sample: temperature: got .* for row 1, needs 0 or more"):
        draw(torch.zeros(2, 5), 0, 0, temperature=[1.0, value])
