"""Percentiles with confidence bounds for runs that are not independent.

Runs of one burst share its caches, its clock and its disturbances, and neighbouring rounds drift together: the round,
not the run, is what was sampled. Pure functions of numbers, in whatever unit they come.

The bound is that of Korn & Graubard (1998, "Confidence intervals for proportions with small expected number of
positive counts estimated from survey data", Survey Methodology 24) applied to the distribution function, as Woodruff
(1952) does: the rounds' spread of the share of runs below the percentile gives an effective number of independent runs
m, and the binomial (Clopper-Pearson) interval for m runs gives the rank at which the bound is read off.

Legend: q the percentile as a share, x its estimate, F_r(x) share of the runs of round r that are <= x, n rounds,
V variance of the mean of F_r(x), rho the lag-1 autocorrelation of F_r(x), m effective runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]
LEAST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`low` and `high` are the ends of the two-sided interval, `upper` is the one-sided bound, at one confidence.

    `math.inf` (or 0 for `low`) where the rounds are too few to say; `n` counts runs, `rounds` rounds.
    """

    value: float
    low: float
    high: float
    upper: float
    n: int
    rounds: int


def percentile(rounds: Sequence[Sequence[float]], percent: float = 50.0, confidence: float = 0.95) -> Estimate:
    """A percentile over all runs; `rounds[r]` holds those of round r, rounds in time order, each counting the same."""
    if not rounds or not all(len(runs) for runs in rounds):
        raise ValueError("a percentile needs at least one round, and a run in each")
    if not 0 < percent < 100:
        raise ValueError(f"a percentile lies between 0 and 100, not at {percent}")
    q = percent / 100
    values = np.concatenate([np.asarray(runs, dtype=np.float64) for runs in rounds])
    weights = np.concatenate([np.full(len(runs), 1 / len(runs) / len(rounds)) for runs in rounds])
    order = np.argsort(values, kind="stable")
    values, ranks = values[order], np.cumsum(weights[order])
    x = middle_of(values, ranks, q)
    m = _effective_runs(rounds, x, q)

    def at(level: float, missing: float) -> float:
        if not 0 < level < 1:
            return missing
        return float(values[min(int(np.searchsorted(ranks, level - 1e-12)), len(values) - 1)])

    both = (1 + confidence) / 2
    return Estimate(
        value=x,
        low=at(1 - _level(1 - q, m, both), 0.0),
        high=at(_level(q, m, both), math.inf),
        upper=at(_level(q, m, confidence), math.inf),
        n=len(values),
        rounds=len(rounds),
    )


def ratio(numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Median over rounds of the ratios of two series of per-round values, with its bounds."""
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} rounds against {len(denominator)}")
    return percentile([[a / b] for a, b in zip(numerator, denominator, strict=True)], 50.0, confidence)


def middle_of(values: FloatArray, ranks: FloatArray, q: float) -> float:
    """The q-quantile of sorted values with cumulative weights; the mean of two where the rank falls between them."""
    index = int(np.searchsorted(ranks, q - 1e-12))
    following = min(index + 1, len(values) - 1)
    if abs(ranks[index] - q) < 1e-9:
        return float((values[index] + values[following]) / 2)
    return float(values[index])


def _effective_runs(rounds: Sequence[Sequence[float]], x: float, q: float) -> float:
    """m = q (1 - q) / V, corrected for estimating V from n rounds (Korn & Graubard); 0 below three rounds.

    Where every round is a single number, V is known but for rho: m = n (1 - rho) / (1 + rho).
    """
    n, total = len(rounds), sum(len(runs) for runs in rounds)
    if n < LEAST_ROUNDS:
        return 0.0
    shares = np.array([np.mean(np.asarray(runs) <= x) for runs in rounds])
    spread = float(shares.var(ddof=1))
    if spread == 0.0:  # every round alike, as a formula gives them: all runs count
        return float(total)
    centred = shares - shares.mean()
    rho = float(np.dot(centred[1:], centred[:-1]) / np.dot(centred, centred)) + 1 / n  # the estimate is biased down
    independent = n * (1 - min(max(0.0, rho), 0.9)) / (1 + min(max(0.0, rho), 0.9))
    if total == n:
        return independent
    freedom = max(1.0, independent - 1)
    correction = float(special.ndtri(0.95) / special.stdtrit(freedom, 0.95)) ** 2
    return float(min(q * (1 - q) / spread * independent * correction, total))


def _level(q: float, m: float, confidence: float) -> float:
    """The least observed share of m runs whose Clopper-Pearson lower limit reaches q; 1 when m runs can't show it."""
    if m <= 0 or q ** max(m, 1e-9) > 1 - confidence:
        return 1.0
    low, high = q, 1.0
    for _ in range(50):
        share = (low + high) / 2
        limit = special.betaincinv(share * m, m - share * m + 1, 1 - confidence)  # the beta quantile
        low, high = (low, share) if limit >= q else (share, high)
    return high
