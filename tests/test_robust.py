from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune import robust

pytestmark = pytest.mark.unit


def rounds_of(rng: np.random.Generator, n: int, runs: int, phi: float, drift: float, noise: float) -> list[list[float]]:
    """Rounds whose common shift is an AR(1) series, with independent noise on each run: median 10."""
    shift = np.empty(n)
    shift[0] = rng.standard_normal()
    for i in range(1, n):
        shift[i] = phi * shift[i - 1] + math.sqrt(1 - phi * phi) * rng.standard_normal()
    values: list[list[float]] = (10 + drift * shift[:, None] + noise * rng.standard_normal((n, runs))).tolist()
    return values


@pytest.mark.parametrize(("n", "runs", "phi"), [(30, 1, 0.0), (30, 6, 0.0), (30, 6, 0.5), (60, 1, 0.5)])
def test_the_upper_bound_holds_as_often_as_it_says(n: int, runs: int, phi: float) -> None:
    rng = np.random.default_rng(1)
    held = [robust.percentile(rounds_of(rng, n, runs, phi, 0.2, 0.2)).upper >= 10 for _ in range(400)]
    assert np.mean(held) >= 0.92  # 0.95, less two standard errors of the simulation


def test_both_ends_hold_and_are_not_idle() -> None:
    rng = np.random.default_rng(2)
    found = [robust.percentile(rounds_of(rng, 40, 4, 0.3, 0.2, 0.2)) for _ in range(300)]
    assert np.mean([e.low <= 10 <= e.high for e in found]) >= 0.92
    assert np.median([e.upper - e.value for e in found]) < 0.2  # one standard deviation of a run is 0.28


def test_drift_common_to_both_cancels_in_the_ratio() -> None:
    rng = np.random.default_rng(3)
    drift = np.exp(np.cumsum(0.05 * rng.standard_normal(40)))
    dense = drift * (1 + 0.01 * rng.standard_normal(40))
    pruned = 0.7 * drift * (1 + 0.01 * rng.standard_normal(40))
    found = robust.ratio(pruned.tolist(), dense.tolist())
    assert found.low <= 0.7 <= found.high
    assert found.upper < 0.72


def test_a_tail_percentile_lies_in_the_tail() -> None:
    rounds = [[float(i) for i in range(1, 101)] for _ in range(40)]
    found = robust.percentile(rounds, 90)
    assert found.value == pytest.approx(90, abs=1)
    assert found.value <= found.upper <= 95


def test_equal_runs_are_certain() -> None:
    found = robust.percentile([[5.0, 5.0]] * 30)
    assert (found.value, found.low, found.high, found.upper) == (5.0, 5.0, 5.0, 5.0)
    assert (found.n, found.rounds) == (60, 30)


def test_too_few_rounds_say_nothing() -> None:
    found = robust.percentile([[1.0, 2.0], [1.5, 2.5]])
    assert math.isinf(found.upper)
    assert found.low == 0.0


def test_rounds_count_the_same_however_many_runs_they_hold() -> None:
    assert robust.percentile([[1.0] * 50, [2.0], [3.0]]).value == 2.0


@given(st.lists(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=5), min_size=1, max_size=20), st.floats(1, 99))
def test_bounds_enclose_the_estimate_and_scale(rounds: list[list[float]], percent: float) -> None:
    found = robust.percentile(rounds, percent)
    assert found.low <= found.value <= found.upper <= found.high
    doubled = robust.percentile([[2 * v for v in runs] for runs in rounds], percent)
    assert (doubled.value, doubled.upper) == (2 * found.value, 2 * found.upper)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        robust.percentile([])
    with pytest.raises(ValueError, match="a run in each"):
        robust.percentile([[1.0], []])
    with pytest.raises(ValueError, match="between 0 and 100"):
        robust.percentile([[1.0]], 100)
    with pytest.raises(ValueError, match="2 rounds against 1"):
        robust.ratio([1.0, 2.0], [1.0])
