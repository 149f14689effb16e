"""Choose one option per variable under budgets, with a proven bound; free of torch.

docs/solver.md has the problem, the file format and an example.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeprune.errors import did_you_mean
from edgeprune.solve.answer import solution
from edgeprune.solve.enumeration import LARGEST, enumerated
from edgeprune.solve.model import Choice
from edgeprune.solve.problem import Factor, Problem, Solution
from edgeprune.solve.search import searched

if TYPE_CHECKING:
    from edgeprune.solve.program import Highs

__all__ = ["Factor", "Problem", "Solution", "front", "solve"]


def solve(
    problem: Problem,
    *,
    time_limit_s: float | None = None,
    gap: float = 1e-4,
    in_process: bool = False,
    start: Sequence[Mapping[str, int]] = (),
) -> Solution:
    """Maximise the sum of the factors' values subject to every budget.

    time_limit_s: seconds of search; None (the default): until it is proven, so that the same problem gives the same
        answer each time.
    gap: stop when (upper_bound - value) / (unconstrained best value - value of the least-cost answer) is at most
        this, or 1e-9 if that is larger.
    in_process: run HiGHS, where it is needed, in this process, where it can't be interrupted; by default it runs in a
        child process, which Ctrl-C kills.
    start: choices {variable: option} that are known, of similar limits for instance; inside the budgets or not.

    A budget is met when the correctly rounded float64 sum of the costs is at most its limit, with no tolerance.
    An answer that can't be is no error: see `Solution.status`. ValueError for a bad argument, EdgepruneError when the
    time limit passes before there is any answer or the child process dies.
    """
    known = [_option_numbers(problem, choice) for choice in start]
    return _solved(problem, time_limit_s, gap, in_process, known)[0]


def front(
    problem: Problem,
    budgets: Sequence[Mapping[str, float]],
    *,
    time_limit_s: float | None = None,
    gap: float = 1e-4,
    in_process: bool = False,
) -> list[Solution]:
    """The problem at each of these limits, in the order given; each one starts from what the one before has met.

    An entry replaces the limits that it names. Every answer has its own proof; time_limit_s is that of each.
    """
    found: list[Solution] = []
    known: Sequence[Choice] = ()
    for limits in budgets:
        for name in limits:
            if name not in problem.budgets:
                raise ValueError(f"unknown budget {name!r}{did_you_mean(name, problem.budgets)}")
        own = replace(problem, budgets={**problem.budgets, **limits})
        answer, seen = _solved(own, time_limit_s, gap, in_process, known)
        known = seen or known
        found.append(answer)
    return found


def _solved(
    problem: Problem, time_limit_s: float | None, gap: float, in_process: bool, start: Sequence[Choice]
) -> tuple[Solution, tuple[Choice, ...]]:
    """The solution, and choices that are worth a start at other limits."""
    if not (gap >= 0 and math.isfinite(gap)):
        raise ValueError(f"gap is {gap!r}; expected a number of at least 0")
    if time_limit_s is not None and not time_limit_s > 0:
        raise ValueError(f"time_limit_s is {time_limit_s!r}; expected None or a number above 0")
    started = time.perf_counter()
    if math.prod(problem.variables.values()) <= LARGEST:
        answer = enumerated(problem)
    else:
        answer = searched(
            problem,
            gap=gap,
            deadline=time.monotonic() + (time_limit_s or math.inf),
            highs=_highs_here if in_process else _highs_in_child,
            start=start,
        )
    found = solution(problem, answer, gap=gap, seconds=time.perf_counter() - started)
    return found, () if answer is None else answer.seen


def _option_numbers(problem: Problem, choice: Mapping[str, int]) -> Choice:
    """The choice in the order of the variables; ValueError for one that is not of this problem."""
    for name, options in problem.variables.items():
        if not 0 <= choice.get(name, -1) < options:
            raise ValueError(f"start: variable {name!r} has option {choice.get(name)!r}; expected 0 to {options - 1}")
    return tuple(int(choice[name]) for name in problem.variables)


@contextmanager
def _highs_here() -> Iterator[Highs]:
    from edgeprune.solve.program import run_highs  # scipy.optimize takes a third of a second to import

    yield run_highs


@contextmanager
def _highs_in_child() -> Iterator[Highs]:
    from edgeprune.solve.child import highs_in_child

    with highs_in_child() as highs:
        yield highs
