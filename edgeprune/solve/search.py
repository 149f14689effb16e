"""Finding the best choice and proving it: a Lagrangian bound, what it rules out, and HiGHS for the rest.

The mixed-integer model is the local marginal polytope (Wainwright and Jordan, "Graphical models, exponential families,
and variational inference", 2008, section 4.1) with binary marginals: one binary per option, one continuous variable per
allowed combination of a pair or triple, tied to the binaries by their marginals, and one row per budget. Pairwise
latency under a budget: Shen et al., "Multi-dimensional pruning: joint channel, layer and block pruning with latency
constraint", 2024.

Before HiGHS: for multipliers w >= 0, max_x [value - sum_b w_b (cost_b - 1)] bounds every answer from above (Geoffrion,
"Lagrangean relaxation for integer programming", 1974), variable elimination gives it exactly, and its max-marginals
bound every single combination: those below the bound minus delta can't be in an answer that good. HiGHS solves what is
left; when its answer is not that good, delta grows. Where elimination would be too large, HiGHS gets the whole model.

Legend: c = float64 [1 + R] are value and costs divided by their limits; a *goal* scores an answer, more is better:
"value" is c[0] where all of c[1:] <= 1, "ratio" is -max(c[1:]).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from edgeprune.errors import EdgepruneError
from edgeprune.solve.answer import SMALLEST_GAP, Answer, Choice, inside, ratio_of, value_of
from edgeprune.solve.elimination import Recipe, maximise
from edgeprune.solve.model import (
    Model,
    above,
    model_from_problem,
    normalised,
    picked,
    restrict,
    without_dominated,
    without_rows,
)
from edgeprune.solve.problem import FloatArray, Problem

Goal: TypeAlias = Literal["value", "ratio"]
Score: TypeAlias = Callable[[Choice], float]

RATIO_TOLERANCE = 1e-6
ROUNDING = 1e-9  # slack of every comparison that takes something out
SCALE = 1000.0  # HiGHS accepts 1e-6 in absolute terms: with rows and objective of this size, 1e-9 of a budget
CUTTING_PLANES = 60
LARGEST_MULTIPLIER = 1e6
NO_GOODS = 20


@dataclass(frozen=True, kw_only=True)
class Found:
    """choice: option numbers of the problem, None: none was found; score: its score; no answer scores above bound."""

    choice: Choice | None = None
    score: float = -math.inf
    bound: float = math.inf


def search(problem: Problem, *, gap: float, deadline: float) -> Answer | None:
    """The best choice within `gap` (at least 1e-9) of the range; None when every combination is forbidden.

    deadline: in time.monotonic(); after it the best so far. EdgepruneError when it passes before there is an answer.
    """
    gap = max(gap, SMALLEST_GAP)
    model = restrict(model_from_problem(problem), {})
    if model is None:
        return None
    model = without_dominated(model)
    spread = math.fsum(float(np.ptp(table[0][model.allowed[scope]])) for scope, table in model.tables.items()) or 1.0
    free = _pursue(
        without_rows(normalised(model, 0.0, spread)),
        "value",
        lambda x: value_of(problem, x) / spread,
        gap / 100,
        _part(deadline),
    )
    if free.choice is None and free.bound == -math.inf:
        return None
    least = free
    if model.rows:
        least = _pursue(model, "ratio", lambda x: -ratio_of(problem, x), RATIO_TOLERANCE, _part(deadline))
    if free.choice is None or least.choice is None:
        raise _out_of_time()
    zero, free_value = value_of(problem, least.choice), value_of(problem, free.choice)
    best = free.bound * spread
    if best - free_value <= ROUNDING * spread * 1e-3:
        best = free_value
    value_range = max(free_value - zero, 0.0) if model.rows else spread
    answer = Answer(choice=None, upper_bound=-math.inf, least=least.choice, value_range=value_range)
    if inside(problem, free.choice) and best - free_value <= gap * value_range:
        return replace(answer, choice=free.choice, upper_bound=best)
    if least.bound < -1.0 - RATIO_TOLERANCE:
        return answer
    unit = value_range if value_range > 1e-12 * spread else spread

    def score(x: Choice) -> float:
        return (value_of(problem, x) - zero) / unit if inside(problem, x) else -math.inf

    seeds = [least.choice, free.choice]
    found = _pursue(normalised(model, zero, unit), "value", score, gap, deadline, seeds=seeds)
    if found.choice is None:
        if found.bound == -math.inf:
            return answer
        raise _out_of_time()
    return replace(answer, choice=found.choice, upper_bound=min(best, zero + unit * found.bound))


def _part(deadline: float) -> float:
    """A third of the time that is left, so that each step gets some."""
    now = time.monotonic()
    return now + (deadline - now) / 3


def _out_of_time() -> EdgepruneError:
    return EdgepruneError("the time limit passed before the solver had an answer; allow it more")


def _pursue(
    model: Model, goal: Goal, score: Score, tolerance: float, deadline: float, seeds: list[Choice] | None = None
) -> Found:
    """The best choice for the goal and a bound no more than `tolerance` above it, in the unit of the model's values."""
    best = Found()
    for seed in seeds or []:
        best = _better(best, seed, score)
    recipe = model.recipe()
    if recipe is None:
        return _merged(best, _highs(model, goal, score, tolerance / 2, deadline, 1.0), math.inf)
    for row in range(1, 1 + model.rows) if goal == "value" else ():
        weights = np.zeros(1 + model.rows)
        weights[row] = -1.0
        smaller = above(model, recipe, weights, -1.0 - ROUNDING)
        if smaller is None:
            return Found(bound=-math.inf)
        model, recipe = smaller, replace(recipe, sizes=smaller.sizes)
    bound, weights, best = _dual(model, recipe, goal, score, best, deadline)
    best = replace(best, bound=bound)
    size = max(1.0, abs(bound)) if goal == "ratio" else 1.0
    constant = float(weights[1:].sum()) if goal == "value" else 0.0  # weighted sum = score bound + constant
    tolerance, delta = tolerance * size, max(8 * tolerance * size, (best.bound - best.score) / 32)
    while best.bound - best.score > tolerance and time.monotonic() < deadline:
        whole = not best.bound - delta > best.score or delta > 64 * size
        threshold = best.score if whole else best.bound - delta
        reduced = above(model, recipe, weights, threshold + constant - ROUNDING * size)
        assert reduced is not None or best.choice is None or not whole, "the best choice was taken out"
        found = Found(bound=-math.inf)
        if reduced is not None:
            found = _highs(reduced, goal, score, tolerance / size / 2, deadline, size)
        best = _merged(best, found, threshold)
        if whole:
            break
        delta *= 6
    return best


def _better(best: Found, x: Choice, score: Score) -> Found:
    new = score(x)
    return replace(best, choice=x, score=new) if new > best.score else best


def _merged(best: Found, found: Found, threshold: float) -> Found:
    """`found` searched only what may score above the threshold (inf: everything)."""
    bound = found.bound if threshold == math.inf else max(found.bound, threshold)
    better = found if found.score > best.score else best
    return replace(better, bound=max(better.score, min(best.bound, bound)))


def _dual(
    model: Model, recipe: Recipe, goal: Goal, score: Score, best: Found, deadline: float
) -> tuple[float, FloatArray, Found]:
    """The least Lagrangian bound by Kelley's cutting planes: (bound, weights of value and costs, best choice seen).

    Goal "value": min over w >= 0 of max_x [c0 - w(c - 1)]; "ratio": min over w >= 0, sum 1, of max_x [-wc].
    """
    rows = model.rows
    value = goal == "value"
    weights = np.concatenate([[1.0 if value else 0.0], np.zeros(rows) if value else np.full(rows, -1.0 / max(rows, 1))])
    bound, kept, cuts = math.inf, weights, []
    for _ in range(CUTTING_PLANES if rows else 1):
        top, chosen = maximise(recipe, model.weighted(weights))
        if top == -math.inf:
            return -math.inf, weights, best
        if value:
            top -= float(weights[1:].sum())
        best = _better(best, _original(model, chosen), score)
        if top < bound:
            bound, kept = top, weights
        totals = model.totals(chosen)
        cuts.append(totals)
        if rows == 0 or (rows == 1 and not value) or time.monotonic() > deadline:
            break
        lower, multipliers = _master(np.array(cuts), value=value)
        if bound - lower <= 1e-7 * max(1.0, abs(bound)):
            break
        weights = np.concatenate([weights[:1], -multipliers])
    return bound, kept, best


def _master(cuts: FloatArray, *, value: bool) -> tuple[float, FloatArray]:
    """min theta with theta >= score of each cut at w: (theta, w float64 [R])."""
    rows = cuts.shape[1] - 1
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


def _original(model: Model, chosen: Choice) -> Choice:
    return tuple(int(options[o]) for options, o in zip(model.kept, chosen, strict=True))


def _highs(model: Model, goal: Goal, score: Score, rel_gap: float, deadline: float, size: float) -> Found:
    """HiGHS on the model. A choice that its tolerance lets through, but is outside a budget, is cut off one by one."""
    program = _program(model, goal, size)
    found = Found(bound=math.inf)
    for _ in range(NO_GOODS):
        left = deadline - time.monotonic()
        if left <= 0:
            return found
        options: Any = {"mip_rel_gap": rel_gap, **({"time_limit": left} if left < math.inf else {})}
        result: Any = milp(**program.arguments(), options=options)
        if result.status in (3, 4):
            result = milp(**program.arguments(), options=options | {"presolve": False})
        if result.status == 2:
            return replace(found, bound=found.score)
        if result.status not in (0, 1):
            raise EdgepruneError(f"HiGHS failed: {result.message}")
        if result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
            dual = -result.mip_dual_bound / SCALE
            found = replace(found, bound=min(found.bound, dual - 1.0 if goal == "value" else dual * size))
        if result.x is None:
            return found
        chosen = program.chosen(result.x)
        found = _better(found, _original(model, chosen), score)
        if found.choice is not None or result.status == 1:
            break
        program = program.without(chosen)
    return found


@dataclass(frozen=True, kw_only=True)
class _Program:
    """The arguments of scipy's milp; `starts`: the first binary of each variable."""

    objective: FloatArray
    matrix: sparse.csr_array
    lower: FloatArray
    upper: FloatArray
    integral: FloatArray
    column_bounds: Bounds
    starts: tuple[int, ...]

    def arguments(self) -> dict[str, Any]:
        return {
            "c": self.objective,
            "integrality": self.integral,
            "bounds": self.column_bounds,
            "constraints": LinearConstraint(self.matrix, self.lower, self.upper),
        }

    def chosen(self, x: FloatArray) -> Choice:
        return tuple(int(np.argmax(x[a:b])) for a, b in zip(self.starts, self.starts[1:], strict=False))

    def without(self, chosen: Choice) -> _Program:
        """One more row: not all of these options."""
        row = np.zeros((1, self.matrix.shape[1]))
        row[0, [a + o for a, o in zip(self.starts, chosen, strict=False)]] = 1.0
        return replace(
            self,
            matrix=sparse.csr_array(sparse.vstack([self.matrix, sparse.csr_array(row)])),
            lower=np.append(self.lower, -np.inf),
            upper=np.append(self.upper, len(chosen) - 1.0),
        )


def _program(model: Model, goal: Goal, size: float) -> _Program:
    """The local marginal polytope with binary marginals.

    Columns: one binary per option, variables in order; then one continuous column per allowed combination of each pair
    and triple; last one column that is 1 (goal "value": the objective's offset) or the ratio (goal "ratio").
    Rows: the options of a variable sum to 1; the combinations with an option sum to its binary; one row per budget.
    """
    starts = tuple(np.concatenate([[0], np.cumsum(model.sizes)]).tolist())
    combinations = {s: np.argwhere(free) for s, free in model.allowed.items() if len(s) > 1}
    columns = starts[-1] + sum(len(c) for c in combinations.values()) + 1
    weights = np.zeros((1 + model.rows, columns))
    entries: list[tuple[Any, Any, Any]] = []  # (row, column, coefficient)
    height = len(model.sizes)
    for v, size_v in enumerate(model.sizes):
        entries.append((np.full(size_v, v), starts[v] + np.arange(size_v), np.ones(size_v)))
        if (v,) in model.tables:
            weights[:, starts[v] : starts[v + 1]] = model.tables[(v,)]
    right = [np.ones(height)]
    column = starts[-1]
    for scope, at in combinations.items():
        own = column + np.arange(len(at))
        weights[:, own] = picked(model.tables[scope], list(at.T))
        for axis, v in enumerate(scope):
            options = np.arange(model.sizes[v])
            entries.append((height + at[:, axis], own, np.ones(len(at))))
            entries.append((height + options, starts[v] + options, -np.ones(len(options))))
            right.append(np.zeros(len(options)))
            height += len(options)
        column += len(at)
    rows = SCALE * weights[1:] / (1.0 if goal == "value" else size)
    rows[:, -1] = 0.0 if goal == "value" else -SCALE
    objective = -SCALE * weights[0] if goal == "value" else np.zeros(columns)
    objective[-1] = -SCALE if goal == "value" else SCALE
    row, col, coefficient = (np.concatenate(part) for part in zip(*entries, strict=True))
    ties = sparse.coo_array((coefficient, (row, col)), shape=(height, columns))
    equal = np.concatenate(right)
    upper, lower = np.ones(columns), np.zeros(columns)
    lower[-1], upper[-1] = (1.0, 1.0) if goal == "value" else (-np.inf, np.inf)
    return _Program(
        objective=objective,
        matrix=sparse.csr_array(sparse.vstack([ties, sparse.csr_array(rows)])),
        lower=np.concatenate([equal, np.full(model.rows, -np.inf)]),
        upper=np.concatenate([equal, np.full(model.rows, SCALE if goal == "value" else 0.0)]),
        integral=(np.arange(columns) < starts[-1]).astype(np.float64),
        column_bounds=Bounds(lower, upper),
        starts=starts,
    )
