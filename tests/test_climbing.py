"""Better networks near one that fits, by tables that are right around a point only, beside trying every network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from edgeprune.climbing import Options, climbed, within
from edgeprune.solve import Factor, Problem

pytestmark = pytest.mark.unit

WIDTHS = range(1, 9)
NAMES = ("a", "b", "c", "d")
Cost = Callable[[dict[str, int]], float]


def joined(width: dict[str, int]) -> float:
    """Three branches beside one another, and a layer of d channels that reads all of them."""
    return width["a"] + width["b"] + width["c"] + (width["a"] + width["b"] + width["c"]) * width["d"]


def penalised(width: dict[str, int]) -> float:
    """A sum over layers that gets slower as a whole where it is large."""
    total = sum(width.values()) + width["a"] * width["b"] + width["c"] * width["d"]
    return total * (1 + total / 100)


def peak(width: dict[str, int]) -> float:
    """The largest of all, of which no single one takes anything away while another one is as large."""
    return max(width.values())


def widths_of(options: Options) -> dict[str, int]:
    return {name: WIDTHS[options[name]] for name in NAMES}


def problem_around(cost: Cost, limit: float, worth: dict[str, float], options: Options) -> Problem:
    """What moving each pair of neighbours alone from here adds to the cost."""
    here, point = cost(widths_of(options)), widths_of(options)
    factors = [Factor(variables=("(here)",), value=np.zeros(1), cost={"us": np.array([here])})]
    for one, two in (NAMES[:2], NAMES[2:]):
        table = np.array([[cost(point | {one: a, two: b}) - here for b in WIDTHS] for a in WIDTHS])
        factors.append(Factor(variables=(one, two), value=np.zeros_like(table), cost={"us": table}))
    for name in NAMES:
        factors.append(Factor(variables=(name,), value=worth[name] * np.sqrt(np.array(WIDTHS))))
    return Problem(variables={**dict.fromkeys(NAMES, len(WIDTHS)), "(here)": 1}, budgets={"us": limit}, factors=factors)


@pytest.mark.parametrize("cost", [joined, penalised, peak])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_comes_near_the_best_of_all_from_the_least(cost: Cost, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    worth = dict(zip(NAMES, rng.uniform(1.0, 2.0, 4).tolist(), strict=True))
    least, most = cost(dict.fromkeys(NAMES, 1)), cost(dict.fromkeys(NAMES, 8))
    limit = least + share * (most - least)
    start = {**dict.fromkeys(NAMES, 0), "(here)": 0}
    fits = [w for w in product(WIDTHS, repeat=4) if cost(dict(zip(NAMES, w, strict=True))) <= limit]
    best = max(sum(worth[name] * w**0.5 for name, w in zip(NAMES, own, strict=True)) for own in fits)

    found = climbed(start, lambda at: problem_around(cost, limit, worth, at), lambda at: cost(widths_of(at)) <= limit)
    value = sum(worth[name] * width**0.5 for name, width in widths_of(found.choice).items())
    assert cost(widths_of(found.choice)) <= limit
    assert found.value == pytest.approx(value)
    assert 0.97 * best <= value <= best * (1 + 1e-12)
    for name, width in widths_of(found.choice).items():
        raised = [widths_of(found.choice) | {name: wider} for wider in range(width + 1, 9)]
        assert all(cost(own) > limit for own in raised), "nothing more fits by widening one of them"


def test_what_stays_the_same_is_proven_for_the_tables_around_it() -> None:
    """With costs that add up the tables hold everywhere, and so does the proof."""
    worth = {"a": 1.0, "b": 2.0, "c": 1.5, "d": 0.5}

    def add(width: dict[str, int]) -> float:
        return float(sum(width.values()))

    def tabulated(options: Options) -> Problem:
        return problem_around(add, 12.0, worth, options)

    found = climbed({**dict.fromkeys(NAMES, 0), "(here)": 0}, tabulated, lambda at: add(widths_of(at)) <= 12.0)
    best = max(
        sum(worth[name] * w**0.5 for name, w in zip(NAMES, own, strict=True))
        for own in product(WIDTHS, repeat=4)
        if sum(own) <= 12
    )
    assert found.gap <= 1e-4 and found.value == pytest.approx(best, rel=1e-4)


def test_what_does_not_fit_together_is_taken_alone() -> None:
    """Each one may be wider than 1, no two of them: the tables around the start offer all four."""
    worth = dict(zip(NAMES, (1.0, 3.0, 2.0, 1.0), strict=True))

    def crowded(width: dict[str, int]) -> float:
        return 1.0 + 9.0 * (sum(w > 1 for w in width.values()) > 1)

    start = {**dict.fromkeys(NAMES, 0), "(here)": 0}
    found = climbed(start, lambda at: problem_around(crowded, 5.0, worth, at), lambda at: crowded(widths_of(at)) <= 5.0)
    assert widths_of(found.choice) == {"a": 1, "b": 8, "c": 1, "d": 1}


def test_tables_that_promise_what_does_not_fit_prove_nothing() -> None:
    worth = dict.fromkeys(NAMES, 1.0)
    start = {**dict.fromkeys(NAMES, 2), "(here)": 0}
    found = climbed(start, lambda at: problem_around(joined, 100.0, worth, at), lambda at: at == start)
    assert found.choice == start and found.value == pytest.approx(4 * 3**0.5)
    assert found.gap == np.inf and found.status == "stopped"


def test_near_means_few_options_away_and_gone_is_near_to_all() -> None:
    problem = Problem(
        variables={"inside": 6, "outside": 6},
        budgets={"us": 100.0},
        factors=[Factor(variables=(name,), value=np.arange(6.0)) for name in ("inside", "outside")],
    )

    def allowed(at: Options) -> dict[str, list[int]]:
        near = within(problem, at, 1, gone=["inside"])
        return {
            name: [o for o in range(6) if near.cost_of({**at, name: o})["us"] < np.inf] for name in problem.variables
        }

    assert allowed({"inside": 3, "outside": 3}) == {"inside": [0, 2, 3, 4], "outside": [2, 3, 4]}
    assert allowed({"inside": 0, "outside": 0}) == {"inside": [0, 1, 2, 3, 4, 5], "outside": [0, 1]}
