"""pass@k against exact fractions, against counting subsets, and against simulation."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from wmtp_jax.evaluation.pass_at_k import mean_pass_at_k, pass_at_k


def test_closed_form():
    for n in range(51):
        for c in range(n + 1):
            for k in range(n + 1):
                assert pass_at_k(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))), (n, c, k)


def test_counts_subsets_with_a_correct_sample():
    for n, c, k in [(5, 2, 3), (6, 1, 2), (7, 3, 4), (4, 4, 1), (4, 0, 4)]:
        subsets = list(itertools.combinations(range(n), k))
        solved = sum(any(sample < c for sample in subset) for subset in subsets)
        assert pass_at_k(n, c, k) == solved / len(subsets)


def test_unbiased_where_first_k_of_n_is_only_noisier():
    # One sample solves the problem with p = 0.2, so pass@3 = 1 - 0.8³ = 0.488. 20,000 trials: standard error 0.0024.
    rng = random.Random(0)
    estimates = [pass_at_k(10, sum(rng.random() < 0.2 for _ in range(10)), 3) for _ in range(20_000)]
    assert abs(sum(estimates) / len(estimates) - 0.488) < 0.01


def test_large_counts_and_numpy_integers():
    assert pass_at_k(np.int64(10_000), np.int32(1), 100) == pytest.approx(0.01, abs=1e-15)
    assert isinstance(pass_at_k(np.int64(5), np.int64(2), np.int64(1)), float)


@pytest.mark.parametrize(
    ("n", "c", "k", "says"),
    [
        (3, 1, 4, "k <= n"),
        (3, 4, 1, "c <= n"),
        (-1, 0, 0, "n must not be negative"),
        (3, -1, 1, "c must not be negative"),
        (3, 1, -1, "k must not be negative"),
        (True, 1, 1, "n must be an integer"),
        (3, False, 1, "c must be an integer"),
        (3, 1, 1.0, "k must be an integer"),
        (3, "1", 1, "c must be an integer"),
        (3, np.bool_(True), 1, "c must be an integer"),
    ],
)
def test_bad_counts(n, c, k, says):
    with pytest.raises(ValueError, match=says):
        pass_at_k(n, c, k)


def test_mean_is_over_problems():
    # 1 of 2 and 1 of 4 correct, k = 2: (1 + 1/2) / 2. The pooled counts (2 of 6) would give 3/5.
    assert mean_pass_at_k([(2, 1), (4, 1)], 2).mean == 0.75


@pytest.mark.parametrize(
    ("solved", "problems", "low", "high"),
    # Wilson (1927) at 95%, by hand: (p + z²/2P ± z sqrt(p (1 - p)/P + z²/4P²)) / (1 + z²/P), z = 1.959964.
    [(0, 164, 0.0, 0.022887), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (164, 164, 0.977113, 1.0)],
)
def test_wilson_interval(solved, problems, low, high):
    result = mean_pass_at_k([(1, int(i < solved)) for i in range(problems)], 1)
    assert result.problems == problems
    assert result.mean == pytest.approx(solved / problems, abs=1e-15)
    # The published intervals (Newcombe 1998, table I) have four digits.
    assert (result.low, result.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_interval_covers():
    # Problems whose difficulty is uniform have mean pass@1 = 1/2. Conservative: at least 95% of 400 trials, less 4 σ.
    rng = random.Random(1)
    covered = 0
    for _ in range(400):
        counts = []
        for _ in range(50):
            difficulty = rng.random()
            counts.append((5, sum(rng.random() < difficulty for _ in range(5))))
        result = mean_pass_at_k(counts, 1)
        assert 0 <= result.low <= result.mean <= result.high <= 1
        covered += result.low <= 0.5 <= result.high
    assert covered / 400 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)


def test_bad_mean():
    with pytest.raises(ValueError, match="one problem or more"):
        mean_pass_at_k([], 1)
    with pytest.raises(ValueError, match="k <= n"):
        mean_pass_at_k([(3, 1), (1, 1)], 2)
    with pytest.raises(ValueError, match="confidence"):
        mean_pass_at_k([(3, 1)], 1, confidence=1.0)
