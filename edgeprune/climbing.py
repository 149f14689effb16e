"""From a network that fits to better ones, where tables tell its cost only around a point.

A trust region (Conn, Gould and Toint, "Trust-region methods", 2000): the tables around the point are solved for
options near its own. An answer that really fits is the next point, and the region grows; one that does not makes it
smaller. The smallest region moves one variable alone, where tables to first order are exact.

Legend: options = {variable: option}, of one set of variables throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from edgeprune.solve import Factor, Problem, Solution, solve

Options: TypeAlias = Mapping[str, int]

STEPS = 32
"""Regions tried at most; each answer taken is worth more than the one before, so it ends without a limit too."""


def climbed(
    start: Options,
    tabulated: Callable[[Options], Problem],
    fits: Callable[[Options], bool],
    gone: Collection[str] = (),
) -> Solution:
    """The most valuable options found that fit, from a start that does.

    tabulated(options): the problem with the costs around them; its values hold everywhere. fits(options): whether they
    are inside every budget, by the whole prediction. gone: variables whose option 0 takes something out altogether: it
    is near to any other option. The gap of the answer is that of the whole problem tabulated around it, infinite where
    the tables promise a better one that does not fit.
    """
    best, problem = start, tabulated(start)
    radius = widest = max(problem.variables.values()) - 1
    for _ in range(STEPS):
        if radius == 0:
            found = _one_moved(problem, best, fits)
            if found is None:
                break
        else:
            solution = solve(within(problem, best, radius, gone), start=[best])
            if not _is_better(solution, problem, best):
                radius = 0  # nothing by more than the solver's gap
                continue
            if not fits(solution.choice):
                radius //= 2
                continue
            found = solution.choice
        best, radius = found, min(max(1, 2 * radius), widest)
        problem = tabulated(best)
    return _as_answer(solve(problem, start=[best]), problem, best)


def _is_better(solution: Solution, problem: Problem, options: Options) -> bool:
    return solution.feasible and solution.value > problem.value_of(options)


def _as_answer(whole: Solution, problem: Problem, options: Options) -> Solution:
    """The options as the answer; the bound is that of the whole problem around them where that has no better one."""
    cost = problem.cost_of(options)
    answer = replace(whole, feasible=True, choice=dict(options), value=problem.value_of(options), cost=cost)
    if not whole.feasible or _is_better(whole, problem, options):
        answer = replace(answer, upper_bound=math.inf, gap=math.inf, status="stopped")
    return answer


def within(problem: Problem, at: Options, radius: int, gone: Collection[str] = ()) -> Problem:
    """The problem with all options forbidden whose number is further than the radius from that of `at`."""
    budget, forbidding = next(iter(problem.budgets)), []
    for name, count in problem.variables.items():
        numbers = np.arange(count)
        is_far = np.abs(numbers - at[name]) > radius
        if name in gone:
            is_far &= (numbers > 0) & (at[name] > 0)
        if is_far.any():
            cost = {budget: np.where(is_far, np.inf, 0.0)}
            forbidding.append(Factor(variables=(name,), value=np.zeros(count), cost=cost))
    return replace(problem, factors=[*problem.factors, *forbidding])


def _one_moved(problem: Problem, at: Options, fits: Callable[[Options], bool]) -> Options | None:
    """The most valuable options that fit and differ from `at` in one variable; None where none is worth more."""
    least = problem.value_of(at)
    better = [(problem.value_of(options), options) for options in _neighbours(problem, at)]
    better = sorted((pair for pair in better if pair[0] > least), key=lambda pair: -pair[0])
    return next((options for _, options in better if fits(options)), None)


def _neighbours(problem: Problem, at: Options) -> Iterator[Options]:
    """Options that differ from `at` in one variable and are inside the budgets, by the tables."""
    for name, count in problem.variables.items():
        for option in range(count):
            options = {**at, name: option}
            costs = problem.cost_of(options)
            if option != at[name] and all(costs[budget] <= limit for budget, limit in problem.budgets.items()):
                yield options
