"""Choose one option per variable under budgets, with a proven bound; free of torch.

docs/solver.md has the problem, the file format and an example.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeprune.solve.answer import solution
from edgeprune.solve.enumeration import LARGEST, enumerated
from edgeprune.solve.problem import Factor, Problem, Solution
from edgeprune.solve.search import search

if TYPE_CHECKING:
    from edgeprune.solve.program import Highs

__all__ = ["Factor", "Problem", "Solution", "solve"]


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
    in_process: run HiGHS in this process, where it can't be interrupted; by default it runs in a child process, which
        Ctrl-C kills. Small problems (up to 4096 combinations) are enumerated here in either case.

    A budget is met when the correctly rounded float64 sum of the costs is at most its limit, with no tolerance.
    An answer that can't be is no error: see `Solution.status`. ValueError for a bad argument, EdgepruneError when the
    time limit passes before there is any answer or the child process dies.
    """
    if not (gap >= 0 and math.isfinite(gap)):
        raise ValueError(f"gap is {gap!r}; expected a number of at least 0")
    if time_limit_s is not None and not time_limit_s > 0:
        raise ValueError(f"time_limit_s is {time_limit_s!r}; expected None or a number above 0")
    started = time.perf_counter()
    if math.prod(problem.variables.values()) <= LARGEST:
        answer = enumerated(problem)
    else:
        answer = search(
            problem,
            gap=gap,
            deadline=time.monotonic() + (time_limit_s or math.inf),
            highs=_highs_here if in_process else _highs_in_child,
            start=[tuple(choice[name] for name in problem.variables) for choice in start],
        )
    return solution(problem, answer, gap=gap, seconds=time.perf_counter() - started)


@contextmanager
def _highs_here() -> Iterator[Highs]:
    from edgeprune.solve.program import run_highs  # scipy.optimize takes a third of a second to import

    yield run_highs


@contextmanager
def _highs_in_child() -> Iterator[Highs]:
    from edgeprune.solve.child import highs_in_child

    with highs_in_child() as highs:
        yield highs
