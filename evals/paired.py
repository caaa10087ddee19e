"""Is a variant different from the baseline? Tests on pairs of samples, which see less than the standard errors do.

Two runs over the same samples share most of their noise: what counts is how the pairs differ, not how far two means lie
apart. Three kinds of values are told apart:

- 0 and 1 (right or wrong): the exact sign test on the pairs that differ, which is McNemar's;
- other numbers (log-likelihoods): Student's t on the differences;
- pairs (log-likelihood, weight) of perplexities: the same t on the differences of the log-likelihoods, and the change
  of the perplexity in per cent, with its standard error as a ratio of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: a value of a sample: a number, or a log-likelihood and the number of words, bytes or tokens it is of
Value = float | Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline on the same samples.

    Attributes:
        test: "sign" or "t".
        samples: pairs.
        different: pairs whose two values are not equal.
        better, worse: pairs where the variant's value is higher, lower ("sign" only).
        difference: mean of variant - baseline; of weighted log-likelihoods the sum over the weights' sum.
        stderr: its standard error; 0 where no pair differs, nan for a single pair.
        p: probability of a difference as large if there were none; 1 where no pair differs, nan where it cannot be
            told (a single pair).
    """

    test: str
    samples: int
    different: int
    better: int | None
    worse: int | None
    difference: float
    stderr: float
    p: float


def compare(variant: Sequence[Value], baseline: Sequence[Value]) -> Comparison:
    """The comparison of two runs' values, sample by sample.

    Raises:
        ValueError: no samples, or not the same number of them, or weights that differ.
    """
    if len(variant) != len(baseline) or not variant:
        raise ValueError(f"got {len(variant)} and {len(baseline)} samples, needs the same number, one at least")
    weights = [1.0] * len(variant)
    if isinstance(variant[0], Sequence):
        weights, others = ([_part(value, 1) for value in values] for values in (variant, baseline))
        if weights != others:
            raise ValueError("the samples of the two runs have different weights: they are not the same samples")
    a, b = ([_part(value, 0) for value in values] for values in (variant, baseline))
    differences = [x - y for x, y in zip(a, b)]
    count, total = len(differences), math.fsum(weights)
    mean = math.fsum(differences) / total
    # of a ratio of sums; with equal weights, the usual standard error of a mean
    residuals = [d - mean * w for d, w in zip(differences, weights)]
    spread = math.fsum(r * r for r in residuals) / (count - 1) if count > 1 else math.nan
    stderr = math.sqrt(spread * count) / total
    different = sum(d != 0 for d in differences)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if set(a) | set(b) <= {0.0, 1.0} and all(w == 1 for w in weights):
        return Comparison("sign", count, different, better, worse, mean, stderr, sign_test(better, worse))
    return Comparison("t", count, different, None, None, mean, stderr, t_test(differences))


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of so many changes one way and the other, were both equally likely; exact."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of differences with this mean, were their expectation 0."""
    from scipy.stats import ttest_1samp

    if not any(differences):
        return 1.0
    if len(differences) < 2:
        return math.nan
    if len(set(differences)) == 1:
        return 0.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def _part(value: Value, index: int) -> float:
    return float(value[index]) if isinstance(value, Sequence) else float(value)
