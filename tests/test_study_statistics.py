"""A study's statistics: against loops and scipy's own tests on the raw differences, and over simulated studies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from wmtp_jax.study.statistics import (
    bootstrap_interval,
    compare,
    compare_arms,
    holm,
    smallest_effect,
    standardised_effect,
    t_interval,
    t_test,
    verdict,
    wilcoxon,
)

STUDIES = 20_000


@pytest.mark.parametrize("n", (2, 5, 8, 13))
def test_equals_an_independent_computation_on_the_raw_differences(n):
    generator = np.random.default_rng(n)
    differences = generator.normal(0.02, 0.05, n)
    found = compare(differences.tolist(), arms=4)
    test = stats.ttest_1samp(differences, 0.0)
    mean = sum(differences.tolist()) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences.tolist()) / (n - 1))
    assert (found.n, found.mean) == (n, pytest.approx(mean, rel=1e-12))
    assert found.t_p == pytest.approx(test.pvalue, rel=1e-10)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-9)
    assert (found.equivalence_low, found.equivalence_high) == pytest.approx(tuple(test.confidence_interval(0.9)), rel=1e-9)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue, rel=1e-10)
    shift, critical = found.smallest_effect / spread * math.sqrt(n), stats.t.ppf(1 - 0.05 / 4 / 2, n - 1)
    deviation = stats.chi(n - 1, scale=1 / math.sqrt(n - 1))

    def rejected(s):
        return stats.norm.sf(critical * s - shift) + stats.norm.cdf(-critical * s - shift)

    assert deviation.expect(rejected, lb=0, ub=8) == pytest.approx(0.8, abs=1e-4)
    if n < 8:
        assert found.bootstrap_low is None and found.bootstrap_high is None
    else:
        standard = spread / math.sqrt(n)
        assert mean - 3 * standard < found.bootstrap_low < mean < found.bootstrap_high < mean + 3 * standard


@pytest.mark.parametrize("differences", ([0.3, -0.1, 0.1, 0.5, 0.0, 0.2], [1, 1, 1, 1, 1], [-2, 1, 1, 3], [0, 0, 0]))
def test_wilcoxon_counts_all_signs_ties_and_zeros_included(differences):
    kept = [d for d in differences if d]
    sizes = sorted(abs(d) for d in kept)
    ranks = [sum(i + 1 for i, s in enumerate(sizes) if s == abs(d)) / sizes.count(abs(d)) for d in kept]
    middle = sum(ranks) / 2
    seen = abs(sum(r for r, d in zip(ranks, kept, strict=True) if d > 0) - middle)
    extreme = 0
    for signs in itertools.product((0, 1), repeat=len(kept)):
        extreme += abs(sum(r * s for r, s in zip(ranks, signs, strict=True)) - middle) >= seen - 1e-9
    assert wilcoxon(differences) == pytest.approx(extreme / 2 ** len(kept), rel=1e-12)


def test_wilcoxon_at_5_seeds_does_not_fall_below_six_hundredths():
    assert wilcoxon([1, 2, 3, 4, 5]) == 0.0625


def test_holm_steps_down():
    # By hand: sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, and no p falls below one before it.
    assert holm([0.03, 0.01, 0.04, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]).tolist() == [1.0, 1.0]
    assert holm([0.02]).tolist() == [0.02]
    table = np.random.default_rng(0).uniform(size=(7, 5))
    assert np.array_equal(holm(table), np.stack([holm(row) for row in table]))


def test_holm_equals_closed_testing():
    """A hypothesis is rejected where every intersection with it is rejected by Bonferroni (Marcus, Peritz and Gabriel, 1976)."""
    for p in np.random.default_rng(1).uniform(0, 0.2, size=(20, 4)):
        closed = []
        for i in range(4):
            others = [j for j in range(4) if j != i]
            sets = [(i, *more) for size in range(4) for more in itertools.combinations(others, size)]
            closed.append(min(1.0, max(len(members) * min(p[list(members)]) for members in sets)))
        assert holm(p).tolist() == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("n", (3, 5, 8))
def test_t_intervals_of_simulated_studies_cover_what_they_say(n):
    generator = np.random.default_rng(0)
    low, high = t_interval(generator.normal(0.3, 1.0, size=(STUDIES, n)))
    covered = ((low <= 0.3) & (0.3 <= high)).mean()
    assert 0.945 <= covered <= 0.955


@pytest.mark.parametrize("n", (3, 5, 8))
def test_family_wise_error_of_simulated_studies_is_kept(n):
    """Seven arms that differ in nothing from the baseline that they share."""
    generator = np.random.default_rng(1)
    baseline, arms = generator.normal(size=(STUDIES, 1, n)), generator.normal(size=(STUDIES, 7, n))
    rejected = (holm(t_test(arms - baseline)) < 0.05).any(axis=-1).mean()
    assert rejected <= 0.055


def test_the_smallest_effect_is_seen_in_four_of_five_simulated_studies():
    effect = standardised_effect(6, 0.05 / 3)
    differences = np.random.default_rng(2).normal(effect, 1.0, size=(STUDIES, 6))
    # Three standard errors of a share of 0.8 in 20,000 studies.
    assert (t_test(differences) < 0.05 / 3).mean() == pytest.approx(0.8, abs=0.0085)
    assert smallest_effect([1.0, 2.0, 4.0], arms=1) > smallest_effect([1.0, 2.0, 4.0] * 3, arms=1)


def test_differences_without_spread():
    assert t_test([0.0, 0.0, 0.0]) == 1.0 and t_test([0.5, 0.5]) == 0.0
    assert [float(v) for v in t_interval([0.5, 0.5])] == [0.5, 0.5]
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([1.0])


def test_the_bootstrap_is_the_same_every_time():
    differences = np.random.default_rng(3).normal(size=10)
    assert bootstrap_interval(differences) == bootstrap_interval(differences)


def test_arms_are_corrected_together_and_those_without_pairs_left_out():
    rows = [[-0.4, -0.5, -0.45], [0.1], [], [0.2, -0.1, 0.05]]
    found = compare_arms(rows)
    assert found[1] is None and found[2] is None
    p = [stats.ttest_1samp(rows[i], 0.0).pvalue for i in (0, 3)]
    assert found[0].p_corrected == pytest.approx(2 * p[0]) and found[3].p_corrected == pytest.approx(max(2 * p[0], p[1]))
    assert compare_arms([]) == []


def test_verdicts():
    def of(differences, d=0.1, lower=True):
        return verdict(compare_arms([differences])[0], lower_is_better=lower, difference=d)

    down = [-0.30, -0.31, -0.29, -0.32]
    assert of(down) == "better" and of(down, lower=False) == "worse"
    near = [0.01, -0.02, 0.015, -0.01]
    assert of(near) == "no difference larger than d" and of(near, d=0.005) == "not decided"
    # The two one-sided tests at 5% and the 90% interval agree on the largest d that is not yet excluded.
    shifted = [d + 0.001 for d in near]
    edge = max(abs(v) for v in stats.ttest_1samp(shifted, 0.0).confidence_interval(0.9))
    assert of(shifted, d=edge * 1.001) == "no difference larger than d" and of(shifted, d=edge * 0.999) == "not decided"
    assert of([1.0]) == "not decided" and of([]) == "not decided"
