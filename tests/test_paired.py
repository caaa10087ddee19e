"""Paired tests against values known from elsewhere."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

from torch_pagedkv.evals import paired


def test_sign_test_is_mcnemars_exact_one() -> None:
    """8 changes for the better, 2 for the worse: 2 * (1 + 10 + 45) / 1024."""
    variant = [1] * 8 + [0] * 2 + [1] * 30 + [0] * 10
    baseline = [0] * 8 + [1] * 2 + [1] * 30 + [0] * 10
    got = paired.compare(variant, baseline)
    assert (got.test, got.samples, got.different, got.better, got.worse) == ("sign", 50, 10, 8, 2)
    assert got.p == pytest.approx(2 * 56 / 1024, abs=1e-12)
    assert got.difference == pytest.approx(6 / 50)
    # sum of squares 10, less 50 * 0.12 ** 2, by 49, by 50
    assert got.stderr == pytest.approx(math.sqrt((10 - 0.72) / 49 / 50))


def test_t_test() -> None:
    """Differences 1, 2, 3, 4: mean 2.5, standard error 0.6455, t = 3.873 at 3 degrees of freedom."""
    got = paired.compare([1.5, 2.5, 3.5, 4.5], [0.5] * 4)
    assert (got.test, got.better, got.worse) == ("t", None, None)
    assert got.difference == 2.5
    assert got.stderr == pytest.approx(math.sqrt(5 / 3 / 4))
    # the t distribution with 3 degrees of freedom in closed form
    t = 2.5 / got.stderr
    x = t / math.sqrt(3)
    tail = 0.5 - (math.atan(x) + x / (1 + x * x)) / math.pi
    assert got.p == pytest.approx(2 * tail, rel=1e-9)
    assert paired.compare([2.0, 2.0], [1.0, 1.0]).p == 0.0


def test_weighted_pairs_are_ratios_of_sums() -> None:
    variant = [[-10.0, 4], [-30.0, 10], [-6.0, 2]]
    baseline = [[-11.0, 4], [-30.5, 10], [-6.5, 2]]
    got = paired.compare(variant, baseline)
    assert got.test == "t"
    assert got.difference == pytest.approx(2.0 / 16)
    residuals = [1.0 - 0.125 * 4, 0.5 - 0.125 * 10, 0.5 - 0.125 * 2]
    spread = sum(r * r for r in residuals) / 2
    assert got.stderr == pytest.approx(math.sqrt(3 * spread) / 16)
    with pytest.raises(ValueError, match="weights"):
        paired.compare(variant, [[-11.0, 4], [-30.5, 10], [-6.5, 3]])


def test_equal_runs_and_single_samples() -> None:
    same = paired.compare([0.5, 1.5], [0.5, 1.5])
    assert (same.different, same.difference, same.stderr, same.p) == (0, 0.0, 0.0, 1.0)
    right = paired.compare([1, 0, 1], [1, 0, 1])
    assert (right.test, right.p) == ("sign", 1.0)
    single = paired.compare([-3.5], [-3.0])
    assert math.isnan(single.p) and math.isnan(single.stderr) and single.difference == -0.5


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_samples_must_match(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="same number"):
        paired.compare(a, b)
