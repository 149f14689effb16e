"""The Lagrangian bound: min over w >= 0 of max_x [value - sum_b w_b (cost_b - 1)], by Kelley's cutting planes.

Each maximiser is a cut, and so is any other assignment: those of a coarser problem or of another budget start the
search next to its end. Geoffrion, "Lagrangean relaxation for integer programming", 1974; Kelley, "The cutting-plane
method for solving convex programs", 1960.

Legend: c = float64 [1 + R] are value and costs divided by their limits. Weights are those of value and costs, so w is
their negative: goal "value" has (1, -w), goal "ratio" (0, -w) with w of sum 1, which bounds -max(c[1:]).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np

from edgeprune.solve.coarse import narrowed, near_maximum, rounding_of, sampled
from edgeprune.solve.elimination import Recipe, maximise
from edgeprune.solve.model import Choice, Model, Numbers
from edgeprune.solve.problem import FloatArray

Goal: TypeAlias = Literal["value", "ratio"]
Score: TypeAlias = Callable[[Choice], float]

CUTTING_PLANES = 60
LARGEST_MULTIPLIER = 1e6
FLAT = 1e-9
"""The dual is solved when bound and cutting planes differ by no more, in the unit of the score."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """choice: option numbers of the problem, None: none was found; score: its score; no answer scores above bound."""

    choice: Choice | None = None
    score: float = -math.inf
    bound: float = math.inf

    def better(self, choice: Choice, score: Score) -> Found:
        new = score(choice)
        return replace(self, choice=choice, score=new) if new > self.score else self


@dataclass(frozen=True, kw_only=True)
class Dual:
    """The best answer seen and its bound, the weights that give it, and every choice that was met on the way.

    settled: the bound is that of the weights; where false, no elimination was small enough.
    """

    best: Found
    weights: FloatArray
    seen: dict[Choice, FloatArray] = field(default_factory=dict)
    settled: bool = True

    def anchor(self, model: Model) -> Numbers:
        """Of what was seen, the assignment with the largest weighted sum that is inside the model."""
        inside = {choice: totals for choice, totals in self.seen.items() if model.numbers(choice) is not None}
        if not inside:
            return (0,) * len(model.sizes)
        return model.nearest(max(inside, key=lambda choice: float(self.weights @ inside[choice])))


def constant(weights: FloatArray, goal: Goal) -> float:
    """Weighted sum minus score bound: the budgets' share, limits being 1."""
    return float(weights[1:].sum()) if goal == "value" else 0.0


def lagrangian(
    model: Model, goal: Goal, score: Score, best: Found, seeds: Iterable[Choice], tolerance: float, deadline: float
) -> Dual:
    """The least Lagrangian bound, or one that is within the tolerance of the best score.

    `seeds` are choices to begin with. Where the model is too large to be eliminated, a sample of its options goes
    first. A bound of -inf: everything is forbidden.
    """
    seen = {}
    for choice in seeds:
        numbers = model.numbers(choice)
        if numbers is not None and model.permits(numbers):
            seen[choice] = model.totals(numbers)
            best = best.better(choice, score)
    state = Dual(best=best, weights=_first_weights(model.rows, goal), seen=seen)
    recipe = model.recipe()
    if recipe is None:
        small = sampled(model, [model.nearest(choice) for choice in seen])
        if small is None:
            return replace(state, settled=False)
        coarse = lagrangian(small, goal, score, best, seen, tolerance, deadline)
        state = replace(state, best=replace(coarse.best, bound=math.inf), seen=coarse.seen)
    return _cut(model, recipe, goal, score, state, tolerance, deadline)


def _first_weights(rows: int, goal: Goal) -> FloatArray:
    value = goal == "value"
    return np.concatenate([[float(value)], np.zeros(rows) if value else np.full(rows, -1.0 / max(rows, 1))])


def _cut(
    model: Model, recipe: Recipe | None, goal: Goal, score: Score, state: Dual, tolerance: float, deadline: float
) -> Dual:
    rows, value = model.rows, goal == "value"
    best, seen, kept = state.best, dict(state.seen), state.weights
    bound, weights, settled = math.inf, state.weights, True
    if seen and rows > (0 if value else 1):
        _, weights = _next_weights(seen, goal)
    for _ in range(CUTTING_PLANES if rows else 1):
        top, choice = _top(model, recipe, weights, seen)
        if top == -math.inf:
            return Dual(best=replace(best, bound=-math.inf), weights=weights, seen=seen)
        if top - constant(weights, goal) < bound:
            bound, kept = top - constant(weights, goal), weights
        known = choice is None or choice in seen
        if choice is not None and not known:
            numbers = model.numbers(choice)
            assert numbers is not None
            seen[choice] = model.totals(numbers)
            best = best.better(choice, score)
        settled = choice is not None or bound < math.inf
        if known or (rows == 1 and not value) or rows == 0 or time.monotonic() > deadline:
            break
        lower, following = _next_weights(seen, goal)
        if bound - lower <= FLAT * max(1.0, abs(bound)) or bound - best.score <= tolerance:
            break
        weights = following
    return Dual(best=replace(best, bound=bound), weights=kept, seen=seen, settled=settled)


def _top(
    model: Model, recipe: Recipe | None, weights: FloatArray, seen: dict[Choice, FloatArray]
) -> tuple[float, Choice | None]:
    """No less than the largest weighted sum, and a choice that has it or nearly; (inf, None): it can't be bounded."""
    if recipe is not None:
        tables = model.weighted(weights)
        top, numbers = maximise(recipe, tables)
        return top + rounding_of(tables), model.choice(numbers)
    if not seen:
        return math.inf, None
    start = max(seen, key=lambda choice: float(weights @ seen[choice]))
    anchor = near_maximum(model, weights, model.nearest(start))
    reached = float(weights @ model.totals(anchor))
    found = narrowed(model, weights, reached - 1e-9 * max(1.0, abs(reached)), anchor)
    if found.model is None or found.recipe is None:
        return max(reached, found.bound), model.choice(anchor)
    tables = found.model.weighted(weights)
    top, numbers = maximise(found.recipe, tables)
    return max(top, reached) + rounding_of(tables), found.model.choice(numbers)


def _next_weights(seen: dict[Choice, FloatArray], goal: Goal) -> tuple[float, FloatArray]:
    """Where the upper envelope of the cuts is lowest: (its height, the weights there)."""
    cuts = np.array(list(seen.values()))
    lower, multipliers = _crossing(cuts) if goal == "value" and cuts.shape[1] == 2 else _master(cuts, goal)
    return lower, np.concatenate([[float(goal == "value")], -multipliers])


def _crossing(cuts: FloatArray) -> tuple[float, FloatArray]:
    """For one budget: the lowest point over all crossings of two cuts, value - w (cost - 1)."""
    value, slope = cuts[:, 0], 1.0 - cuts[:, 1]
    falling, rising = slope < 0, slope >= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = (value[falling][:, None] - value[rising]) / (slope[rising] - slope[falling][:, None])
    last = 0.0 if rising.any() else LARGEST_MULTIPLIER
    candidates = np.append(np.clip(crossings[np.isfinite(crossings)], 0.0, LARGEST_MULTIPLIER), [0.0, last])
    heights = (value + slope * candidates[:, None]).max(axis=1)
    lowest = int(np.argmin(heights))
    return float(heights[lowest]), candidates[lowest : lowest + 1]


def _master(cuts: FloatArray, goal: Goal) -> tuple[float, FloatArray]:
    """min theta with theta >= score of each cut at w, by linear programming: (theta, w float64 [R])."""
    from scipy.optimize import linprog  # slow to import

    rows, value = cuts.shape[1] - 1, goal == "value"
    slopes = -(cuts[:, 1:] - 1.0) if value else -cuts[:, 1:]
    result = linprog(
        np.concatenate([[1.0], np.zeros(rows)]),
        A_ub=np.hstack([-np.ones((len(cuts), 1)), slopes]),
        b_ub=-cuts[:, 0] if value else np.zeros(len(cuts)),
        A_eq=None if value else np.concatenate([[0.0], np.ones(rows)])[None],
        b_eq=None if value else [1.0],
        bounds=[(None, None), *[(0.0, LARGEST_MULTIPLIER if value else 1.0)] * rows],
    )
    if result.x is None:
        return math.inf, np.zeros(rows)
    return float(result.x[0]), np.maximum(result.x[1:], 0.0)
