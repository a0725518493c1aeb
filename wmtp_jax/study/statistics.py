"""What paired differences say: intervals, tests, corrections, the effect that could have been seen, and the verdict.

Functions take the differences on the last axis, so that thousands of simulated studies go through the same code as a real one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.05  # of the tests, over all arms together
POWER = 0.8  # with which the smallest effect is seen
BOOTSTRAP_FROM = 8  # seeds; fewer give an interval that is too narrow
BOOTSTRAP_DRAWS = 10_000

VERDICTS = ("better", "worse", "no difference larger than d", "not decided")


class Comparison(NamedTuple):
    """An arm against another, from their paired differences (the arm minus the other).

    Attributes:
      n: pairs.
      mean: of the differences.
      low, high: the 95% t interval.
      t_p: two-sided p of the paired t test.
      p_corrected: the same under Holm's correction over arms; None until it is made.
      wilcoxon_p: exact two-sided p of the signed-rank test.
      equivalence_low, equivalence_high: the 90% t interval, which lies inside ±d where two one-sided tests at 5% reject.
      bootstrap_low, bootstrap_high: the 95% percentile bootstrap interval; None below `BOOTSTRAP_FROM` pairs.
      smallest_effect: see `smallest_effect`.
    """

    n: int
    mean: float
    low: float
    high: float
    t_p: float
    p_corrected: float | None
    wilcoxon_p: float
    equivalence_low: float
    equivalence_high: float
    bootstrap_low: float | None
    bootstrap_high: float | None
    smallest_effect: float


def t_interval(differences: ArrayLike, *, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """`mean ± t((1 + confidence) / 2; n - 1) s / √n`, s the sample standard deviation.

    Args:
      differences: `[..., n]`, n at least 2.

    Returns:
      low and high, `[...]` each.
    """
    from scipy.special import stdtrit

    differences = np.asarray(differences, np.float64)
    n = differences.shape[-1]
    mean, error = differences.mean(axis=-1), _standard_error(differences)
    half = stdtrit(n - 1, (1 + confidence) / 2) * error
    return mean - half, mean + half


def t_test(differences: ArrayLike) -> np.ndarray:
    """Two-sided p of the paired t test, `[...]` of differences `[..., n]`.

    Differences without any spread give 0, and 1 where all of them are 0.
    """
    from scipy.special import stdtr

    differences = np.asarray(differences, np.float64)
    mean, error = differences.mean(axis=-1), _standard_error(differences)
    flat = error == 0
    t = np.abs(mean) / np.where(flat, 1.0, error)
    p = 2 * stdtr(differences.shape[-1] - 1, -t)
    return np.where(flat, np.where(mean == 0, 1.0, 0.0), p)


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's step-down correction (Holm, 1979) over the last axis: with p sorted, `max over j ≤ i of (m - j) p[j]`, at most 1."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, axis=-1, kind="stable")
    scaled = np.take_along_axis(p, order, axis=-1) * np.arange(p.shape[-1], 0, -1)
    stepped = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0)
    corrected = np.empty_like(stepped)
    np.put_along_axis(corrected, order, stepped, axis=-1)
    return corrected


def wilcoxon(differences: ArrayLike) -> float:
    """Exact two-sided p of Wilcoxon's signed-rank test: over all 2^n signs of the ranks, those that are as far from the middle.

    Differences of 0 are left out, equal ones share their mean rank. Doubled ranks are whole numbers, so that the distribution is
    counted and not sampled.

    Args:
      differences: `[n]`.
    """
    from scipy.stats import rankdata

    differences = np.asarray(differences, np.float64)
    differences = differences[differences != 0]
    doubled = np.rint(2 * rankdata(np.abs(differences))).astype(int)
    total = int(doubled.sum())
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] = ways[rank:] + ways[: total + 1 - rank]
    positive = int(doubled[differences > 0].sum())
    tail = min(positive, total - positive)
    return float(min(1.0, 2 * ways[: tail + 1].sum() / ways.sum()))


def bootstrap_interval(differences: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Percentiles of the mean over `BOOTSTRAP_DRAWS` samples with replacement. With so few pairs it covers less than it says.

    Args:
      differences: `[n]`.
    """
    differences = np.asarray(differences, np.float64)
    n = len(differences)
    drawn = np.random.default_rng(0).integers(n, size=(BOOTSTRAP_DRAWS, n))
    low, high = np.quantile(differences[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@functools.cache
def standardised_effect(n: int, level: float, power: float = POWER) -> float:
    """The mean difference, in standard deviations of a difference, that a two-sided paired t test of this level finds with this
    power among n pairs: `power = P(T > t(1 - level / 2; n - 1))`, T noncentral t with `√n` times it. That T may also fall below
    the other limit adds less than 1e-4 at 80%."""
    from scipy.optimize import brentq
    from scipy.special import nctdtr, stdtrit

    critical = stdtrit(n - 1, 1 - level / 2)

    def short_of(effect: float) -> float:
        return 1 - nctdtr(n - 1, math.sqrt(n) * effect, critical) - power

    high = 1.0
    while short_of(high) < 0:
        high *= 2
    return float(brentq(short_of, 0.0, high))


def smallest_effect(differences: ArrayLike, *, arms: int) -> float:
    """The smallest mean difference that these n pairs show with 80% power at Holm's first level, `LEVEL / arms`."""
    differences = np.asarray(differences, np.float64)
    return standardised_effect(len(differences), LEVEL / arms) * float(differences.std(ddof=1))


def compare(differences: Sequence[float], *, arms: int) -> Comparison:
    """All there is to say about one arm's paired differences but Holm's correction.

    Args:
      differences: of the pairs that both arms have, at least 2.
      arms: that are tested together.
    """
    low, high = t_interval(differences)
    equivalence_low, equivalence_high = t_interval(differences, confidence=1 - 2 * LEVEL)
    bootstrap = bootstrap_interval(differences) if len(differences) >= BOOTSTRAP_FROM else (None, None)
    return Comparison(
        n=len(differences),
        mean=float(np.mean(differences)),
        low=float(low),
        high=float(high),
        t_p=float(t_test(differences)),
        p_corrected=None,
        wilcoxon_p=wilcoxon(differences),
        equivalence_low=float(equivalence_low),
        equivalence_high=float(equivalence_high),
        bootstrap_low=bootstrap[0],
        bootstrap_high=bootstrap[1],
        smallest_effect=smallest_effect(differences, arms=arms),
    )


def compare_arms(differences: Sequence[Sequence[float]]) -> list[Comparison | None]:
    """Several arms against the same other, corrected together; None for one with fewer than 2 pairs."""
    tested = [number for number, row in enumerate(differences) if len(row) >= 2]
    found: list[Comparison | None] = [None] * len(differences)
    single = [compare(differences[number], arms=len(tested)) for number in tested]
    corrected = holm([one.t_p for one in single]) if single else []
    for number, one, p in zip(tested, single, corrected, strict=True):
        found[number] = one._replace(p_corrected=float(p))
    return found


def verdict(comparison: Comparison | None, *, lower_is_better: bool, difference: float) -> str:
    """One of `VERDICTS`: better or worse where the corrected p is below `LEVEL`; else no difference larger than d where the 90%
    interval lies inside ±d; else not decided.

    Args:
      comparison: against the baseline.
      difference: d, the one that would matter.
    """
    if comparison is None or comparison.p_corrected is None:
        return "not decided"
    if comparison.p_corrected < LEVEL:
        return "better" if (comparison.mean < 0) == lower_is_better else "worse"
    if -difference < comparison.equivalence_low and comparison.equivalence_high < difference:
        return "no difference larger than d"
    return "not decided"


def _standard_error(differences: np.ndarray) -> np.ndarray:
    n = differences.shape[-1]
    if n < 2:
        raise ValueError(f"{n} difference(s): at least 2 are needed")
    return differences.std(axis=-1, ddof=1) / math.sqrt(n)
