"""pass@k: the chance that at least one of k samples solves a problem, and its mean over problems."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple


class PassAtK(NamedTuple):
    """Mean pass@k over `problems` problems, with its confidence interval, all as fractions of 1."""

    mean: float
    low: float
    high: float
    problems: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k from n samples, c of them correct (arXiv 2107.03374, equation 1).

        pass@k = 1 - C(n - c, k) / C(n, k)

    the chance that a random subset of k of the n samples holds a correct one. Computed in integers and rounded once,
    so it is the float nearest to the exact value. k = 0 gives 0.

    Raises:
      ValueError: an argument is no integer or negative, or k > n, or c > n.
    """
    n, c, k = _count("n", n), _count("c", c), _count("k", k)
    if k > n:
        raise ValueError(f"pass@k needs k <= n: k = {k}, n = {n} samples")
    if c > n:
        raise ValueError(f"pass@k needs c <= n: c = {c} correct, n = {n} samples")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int, *, confidence: float = 0.95) -> PassAtK:
    """Returns the mean of pass@k over problems and a confidence interval for it.

    The interval is Wilson's score interval for a mean m over P problems: the values μ with

        |m - μ| <= z sqrt(μ (1 - μ) / P)

    where z is the normal quantile. A variable in [0, 1] with mean μ has variance μ (1 - μ) at most, so the interval is
    Wilson's own where every problem scores 0 or 1 (one sample each), and wider than needed where scores lie between.
    Unlike a bootstrap over problems it needs no seed and does not shrink to a point when no problem is solved. It is
    about other problems of the same kind; two runs on the same problems are better compared problem by problem.

    Args:
      counts: (n, c) for each problem: samples drawn, samples correct.
      k: samples allowed a problem; no problem may have fewer.
      confidence: coverage of the interval, between 0 and 1, both excluded.

    Raises:
      ValueError: there is no problem, `confidence` is out of range, or `pass_at_k` refuses a problem's counts.
    """
    if not counts:
        raise ValueError("mean pass@k needs one problem or more")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, both excluded; it is {confidence}")
    problems = len(counts)
    mean = math.fsum(pass_at_k(n, c, k) for n, c in counts) / problems
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    # The roots of (m - μ)² = z² μ (1 - μ) / P.
    shrink = 1 + z * z / problems
    center = (mean + z * z / (2 * problems)) / shrink
    half_width = z * math.sqrt(mean * (1 - mean) / problems + (z / (2 * problems)) ** 2) / shrink
    # Rounding must not put the mean outside its own interval at 0 and 1, where one end is the mean.
    return PassAtK(mean, min(max(0.0, center - half_width), mean), max(min(1.0, center + half_width), mean), problems)


def _count(name: str, value: int) -> int:
    """Returns `value` as an int; numpy integers are welcome, booleans and floats are not."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer; it is {value!r}")
    value = operator.index(value)
    if value < 0:
        raise ValueError(f"{name} must not be negative; it is {value}")
    return value
