"""Finding the best choice and proving it: a Lagrangian bound, what it rules out, answers near it, HiGHS for the rest.

For multipliers w >= 0, max_x [value - sum_b w_b (cost_b - 1)] bounds every answer from above, variable elimination
gives it exactly (`dual`), and its max-marginals bound every single combination: those below a score that is reached
can't be in a better answer. In what is left (the *core*) `polish` looks for answers that use up the budgets. Where the
gap is still too large, HiGHS solves cores (`program`): first only what may score nearly as high as the bound; when the
answer is not that good, more. Where elimination would be too large, HiGHS gets the whole model. Pairwise latency
under a budget: Shen et al., "Multi-dimensional pruning: joint channel, layer and block pruning with latency
constraint", 2024.

Legend: c = float64 [1 + R] are value and costs divided by their limits; a *goal* scores an answer, more is better:
"value" is c[0] where all of c[1:] <= 1, "ratio" is -max(c[1:]).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeprune.errors import EdgepruneError
from edgeprune.solve.answer import SMALLEST_GAP, Answer, cost_of, inside, ratio_of, value_of
from edgeprune.solve.coarse import core
from edgeprune.solve.dominance import without_dominated
from edgeprune.solve.dual import Dual, Found, Goal, Score, constant, lagrangian
from edgeprune.solve.model import Choice, Model, model_from_problem, normalised, restrict, without_rows
from edgeprune.solve.polish import LARGEST_WORK, polished
from edgeprune.solve.problem import Problem

if TYPE_CHECKING:
    from edgeprune.solve.program import Highs

RATIO_TOLERANCE = 1e-6
ROUNDING = 1e-9  # slack of every comparison that takes something out
NO_GOODS = 20
POLISHINGS = 10
LABELS = 1 << 17  # of a beam, times variables
FEW_LABELS, MANY_LABELS = 1 << 12, 1 << 14
SEEN = 8  # choices that an answer passes on: the last cuts; each one costs its evaluation at the next limit


@dataclass(frozen=True, kw_only=True)
class Effort:
    """tolerance: of bound - score, in the unit of the model's values. enough: a score to stop at (inf: none).

    deadline: in time.monotonic(). highs: opens what solves a program.
    """

    tolerance: float
    deadline: float
    highs: Callable[[], AbstractContextManager[Highs]]
    enough: float = math.inf


def searched(
    problem: Problem,
    *,
    gap: float,
    deadline: float,
    highs: Callable[[], AbstractContextManager[Highs]],
    start: Sequence[Choice] = (),
) -> Answer | None:
    """The best choice within `gap` (at least 1e-9) of the range; None when every combination is forbidden.

    deadline: in time.monotonic(); after it the best so far. start: choices to begin with, inside the budgets or not.
    EdgepruneError when the deadline passes before there is an answer.
    """
    gap = max(gap, SMALLEST_GAP)
    model = restrict(model_from_problem(problem), {})
    if model is None:
        return None
    model = without_dominated(model)
    start = [x for x in start if all(cost < math.inf for cost in cost_of(problem, x).values())]
    spread = math.fsum(_span(model, scope) for scope in model.tables) or 1.0
    effort = Effort(tolerance=gap / 100, deadline=_part(deadline), highs=highs)
    free, _ = _pursue(
        without_rows(normalised(model, 0.0, spread)), "value", lambda x: value_of(problem, x) / spread, effort, start
    )
    if free.choice is None and free.bound == -math.inf:
        return None
    least, seen = free, list(start)
    if model.rows:
        effort = replace(effort, tolerance=RATIO_TOLERANCE, deadline=_part(deadline), enough=-1.0)
        least, seen = _pursue(model, "ratio", lambda x: -ratio_of(problem, x), effort, start)
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

    effort = Effort(tolerance=gap, deadline=deadline, highs=highs)
    seeds = list(dict.fromkeys([least.choice, free.choice, *start, *seen]))
    found, seen = _pursue(normalised(model, zero, unit), "value", score, effort, seeds)
    if found.choice is None:
        if found.bound == -math.inf:
            return answer
        raise _out_of_time()
    bound = min(best, zero + unit * found.bound)
    return replace(answer, choice=found.choice, upper_bound=bound, seen=tuple(seen[-SEEN:]))


def _span(model: Model, scope: tuple[int, ...]) -> float:
    values = model.tables[scope][0][model.allowed[scope]]
    return float(values.max() - values.min())


def _part(deadline: float) -> float:
    """A third of the time that is left, so that each step gets some."""
    now = time.monotonic()
    return now + (deadline - now) / 3


def _out_of_time() -> EdgepruneError:
    return EdgepruneError("the time limit passed before the solver had an answer; allow it more")


def _pursue(
    model: Model, goal: Goal, score: Score, effort: Effort, seeds: Sequence[Choice]
) -> tuple[Found, list[Choice]]:
    """The best choice for the goal, a bound no more than the tolerance above it, and other choices that were met."""
    best = Found()
    for seed in seeds:
        best = best.better(seed, score)
    dual = lagrangian(model, goal, score, best, seeds, effort.tolerance, effort.deadline)
    best = dual.best
    if best.bound == -math.inf:
        return best, []
    if not dual.settled or best.bound == math.inf:
        with effort.highs() as highs:
            found = _highs(model, goal, score, effort, effort.tolerance / 2, 1.0, highs)
        return _merged(best, found, math.inf), list(dual.seen)
    size = max(1.0, abs(best.bound)) if goal == "ratio" else 1.0
    effort = replace(effort, tolerance=effort.tolerance * size)
    if goal == "value" and model.rows:
        best = _polish(model, score, effort, dual)
    seen = [*dual.seen, *([best.choice] if best.choice is not None else [])]
    if not _is_done(best, effort):
        with effort.highs() as highs:
            best = _close(model, goal, score, effort, replace(dual, best=best), size, highs)
    return best, seen


def _is_done(best: Found, effort: Effort) -> bool:
    return (
        best.bound - best.score <= effort.tolerance or best.score >= effort.enough or time.monotonic() > effort.deadline
    )


def _polish(model: Model, score: Score, effort: Effort, dual: Dual) -> Found:
    """Better answers next to the Lagrangian maximum, and a lower bound where none can be much better.

    What may score above the floor is looked at: first near the maximum, then all that is better than the best there is,
    with more labels as long as the bound is not down to it.
    """
    best, top, offset = dual.best, dual.best.bound, constant(dual.weights, "value")
    spare = effort.tolerance / 8
    room = top - best.score if best.score > -math.inf else 1.0
    width = min(FEW_LABELS, max(128, LABELS // len(model.sizes)))
    for _ in range(POLISHINGS):
        if _is_done(best, effort):
            break
        floor = max(top - room, best.score + spare)
        found = core(model, dual.weights, floor + offset - ROUNDING, dual.anchor(model))
        if found.model is None:
            best = replace(best, bound=max(best.score, min(best.bound, floor)))
            room *= 2
            continue
        if found.recipe is None or found.recipe.work > LARGEST_WORK:
            room /= 2
            continue
        before = best.score
        offered, bound = polished(found.model, found.recipe, dual.weights, floor, spare=spare, width=width)
        for numbers in offered:
            best = best.better(found.model.choice(numbers), score)
        best = replace(best, bound=max(best.score, min(best.bound, max(floor, bound))))
        if best.score == -math.inf:
            room *= 4
        elif best.score > before:
            room = top - best.score
        elif width < MANY_LABELS:
            width *= 4
        else:
            break
    return best


def _close(model: Model, goal: Goal, score: Score, effort: Effort, dual: Dual, size: float, highs: Highs) -> Found:
    """HiGHS on cores: first what scores nearly as high as the bound, then more, until the best is proven."""
    best, tolerance = dual.best, effort.tolerance
    anchor, delta = dual.anchor(model), max(8 * tolerance, (dual.best.bound - dual.best.score) / 32)
    while not _is_done(best, effort):
        whole = not best.bound - delta > best.score + tolerance / 2 or delta > 64 * size
        threshold = best.bound - delta
        if whole:
            threshold = best.score + tolerance / 2 if best.score > -math.inf else -math.inf
        found = core(model, dual.weights, threshold + constant(dual.weights, goal) - ROUNDING * size, anchor)
        answer = Found(bound=-math.inf)
        if found.model is not None:
            answer = _highs(found.model, goal, score, effort, tolerance / size / 4, size, highs)
        best = _merged(best, answer, threshold)
        if whole:
            break
        delta *= 6
    return best


def _merged(best: Found, found: Found, threshold: float) -> Found:
    """`found` searched only what may score above the threshold (inf: everything)."""
    bound = found.bound if threshold == math.inf else max(found.bound, threshold)
    better = found if found.score > best.score else best
    return replace(better, bound=max(better.score, min(best.bound, bound)))


def _highs(model: Model, goal: Goal, score: Score, effort: Effort, rel_gap: float, size: float, highs: Highs) -> Found:
    """HiGHS on the model. A choice that its tolerance lets through, but is outside a budget, is cut off one by one."""
    from edgeprune.solve.program import SCALE, program_of  # scipy.optimize takes a third of a second to import

    program = program_of(model, goal, size)
    found = Found(bound=math.inf)
    for _ in range(NO_GOODS):
        left = effort.deadline - time.monotonic()
        if left <= 0:
            return found
        reply = highs(program, rel_gap, left)
        if reply.status == 2:
            return replace(found, bound=found.score)
        if reply.bound is not None and math.isfinite(reply.bound):
            dual = -reply.bound / SCALE
            found = replace(found, bound=min(found.bound, dual - 1.0 if goal == "value" else dual * size))
        if reply.x is None:
            return found
        numbers = program.chosen(reply.x)
        found = found.better(model.choice(numbers), score)
        if found.choice is not None or reply.status == 1:
            break
        program = program.without(numbers)
    return found
