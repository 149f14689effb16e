"""What a search hands back, and the exact judgement of a choice by the problem's own tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeprune.solve.model import Choice
from edgeprune.solve.problem import Problem, Solution, Status

SMALLEST_GAP = 1e-9


@dataclass(frozen=True, kw_only=True)
class Answer:
    """choice: the best inside the budgets, None if there is none. upper_bound: in the unit of the values.

    least: the least-cost answer. value_range: unconstrained best value - value of the least-cost answer;
    where no budget has a finite limit, the sum of the tables' spans. seen: choices worth a start at other limits.
    """

    choice: Choice | None
    upper_bound: float
    least: Choice
    value_range: float
    seen: tuple[Choice, ...] = ()


def named(problem: Problem, x: Choice) -> dict[str, int]:
    return dict(zip(problem.variables, x, strict=True))


def value_of(problem: Problem, x: Choice) -> float:
    return problem.value_of(named(problem, x))


def cost_of(problem: Problem, x: Choice) -> dict[str, float]:
    return problem.cost_of(named(problem, x))


def inside(problem: Problem, x: Choice) -> bool:
    """Whether every cost, correctly rounded, is at most its limit, and below infinity."""
    costs = cost_of(problem, x).items()
    return all(cost <= problem.budgets[budget] and cost < math.inf for budget, cost in costs)


def ratio_of(problem: Problem, x: Choice) -> float:
    """The largest cost/limit of the budgets with a finite limit; 0 where there is none."""
    costs = cost_of(problem, x)
    return max((costs[b] / limit for b, limit in problem.budgets.items() if limit < math.inf), default=0.0)


def solution(problem: Problem, answer: Answer | None, *, gap: float, seconds: float) -> Solution:
    """The answer in the words of the problem; None: every combination is forbidden."""
    if answer is None:
        cost = dict.fromkeys(problem.budgets, math.inf)
        return Solution(
            feasible=False,
            choice={},
            value=-math.inf,
            cost=cost,
            upper_bound=-math.inf,
            gap=math.inf,
            least_ratio=math.inf,
            status="forbidden",
            seconds=seconds,
        )
    chosen = answer.least if answer.choice is None else answer.choice
    choice, value = named(problem, chosen), value_of(problem, chosen)
    bound, reached, status = -math.inf, math.inf, "over budget"
    if answer.choice is not None:
        bound = max(answer.upper_bound, value)
        reached = (bound - value) / answer.value_range if answer.value_range > 0 else float(bound > value)
        status = "solved" if reached <= max(gap, SMALLEST_GAP) else "stopped"
    words: Status = status  # type: ignore[assignment]
    return Solution(
        feasible=answer.choice is not None,
        choice=choice,
        value=value,
        cost=problem.cost_of(choice),
        upper_bound=bound,
        gap=reached,
        least_ratio=ratio_of(problem, answer.least),
        status=words,
        seconds=seconds,
    )
