"""The solver against brute force on small problems and against plain HiGHS on middle ones.

    python -m benchmarks.solver_oracle                 # 2,000 problems; exit code 1 and the seeds where they disagree
    python -m benchmarks.solver_oracle --seeds 17 18   # these again

Problems are drawn by number: trees, cycles, ladders, chains with residual links, triples; blocks whose variables are
gone (option 0) together; none to three budgets; whole and real numbers; forbidden combinations. Each goes through one
of the solver's ways, forced by small limits: elimination, cells of options, HiGHS on the whole. Agreement means:
feasible exactly when the oracle finds a point, no value above the oracle's, no bound below it, the gap that was asked
for.
"""

from __future__ import annotations

import argparse
import collections
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.solver_plain import plain
from edgeprune.solve import Factor, Problem, Solution, coarse, elimination, solve

FloatArray = npt.NDArray[np.float64]
PROBLEMS = 2000
SHARE_SMALL = 0.75
GAP = 1e-5
STRUCTURES = ("tree", "cycle", "ladder", "residual", "triples", "loose")
WAYS = ("as it comes", "elimination", "cells", "whole")
TOLERANCE = 2e-6
"""What HiGHS may be off by, as a share of the range of values."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=PROBLEMS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="*", help="these problems only")
    options = parser.parse_args()
    seeds = options.seeds or range(options.first, options.first + options.count)
    started, wrong, told = time.monotonic(), 0, collections.Counter[str]()
    for seed in seeds:
        fault, kind = disagreement(seed)
        told.update(kind)
        if fault:
            wrong += 1
            print(f"seed {seed} ({', '.join(kind)}): {fault}", flush=True)
    print(f"{len(seeds)} problems, {wrong} disagree, {time.monotonic() - started:.0f} s")
    print(", ".join(f"{kind} {count}" for kind, count in sorted(told.items())))
    return 1 if wrong else 0


def disagreement(seed: int) -> tuple[str, list[str]]:
    """(what is wrong, empty: nothing; the problem's kinds)."""
    rng = np.random.default_rng(seed)
    small = bool(rng.random() < SHARE_SMALL)
    structure, way = str(rng.choice(STRUCTURES)), str(rng.choice(WAYS))
    problem, kinds = draw(rng, structure, small)
    oracle = "brute force" if small else "plain HiGHS"
    with forced(way):
        solution = solve(problem, gap=GAP, in_process=True)
    best, span = by_brute_force(problem) if small else by_highs(problem)
    kinds = [structure, way, oracle, *kinds, "feasible" if best is not None else "not feasible"]
    return _fault(problem, solution, best, span, exact=small), kinds


def _fault(problem: Problem, solution: Solution, best: float | None, span: float, *, exact: bool) -> str:
    slack = (1e-12 if exact else TOLERANCE) * max(span, 1e-300)
    if solution.feasible and any(cost > problem.budgets[b] for b, cost in problem.cost_of(solution.choice).items()):
        return "the answer is over a budget"
    if best is None:
        return "" if not solution.feasible or not exact else "feasible, but the oracle finds none"
    if not solution.feasible:
        return f"the oracle finds {best:.6g}, the solver none ({solution.status})"
    if solution.value != problem.value_of(solution.choice):
        return "the value is not that of the choice"
    if exact and solution.value > best + slack:
        return f"value {solution.value!r} above the best there is, {best!r}"
    if solution.upper_bound < best - slack:
        return f"upper bound {solution.upper_bound!r} below {best!r}"
    if solution.gap > GAP:
        return f"gap {solution.gap:.2g} ({solution.status})"
    return ""


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Small limits, so that small problems take the ways of large ones."""
    package: Any = sys.modules["edgeprune.solve"]
    small = package.LARGEST
    kept = (elimination.LARGEST_JOIN, elimination.LARGEST_SUM, coarse.MOST_CELLS)
    try:
        if way != "as it comes":
            package.LARGEST = 0
        if way == "whole":
            elimination.LARGEST_JOIN = 1
        if way == "cells":
            elimination.LARGEST_SUM, coarse.MOST_CELLS, coarse.FEWEST_CELLS = 150, 3, 2
        yield
    finally:
        package.LARGEST = small
        elimination.LARGEST_JOIN, elimination.LARGEST_SUM, coarse.MOST_CELLS = kept
        coarse.FEWEST_CELLS = 8


def draw(rng: np.random.Generator, structure: str, small: bool) -> tuple[Problem, list[str]]:
    """A problem, and words for what is special about it."""
    count = int(rng.integers(3, 7)) if small else int(rng.integers(8, 16))
    sizes = [int(rng.integers(1, 5 if small else 7)) for _ in range(count)]
    budgets = int(rng.integers(0, 4))
    whole, forbids, blocks = (bool(rng.random() < share) for share in (0.5, 0.3, 0.5))
    factors = [_factor(rng, scope, sizes, budgets, whole, forbids) for scope in scopes_of(structure, count, rng)]
    if blocks:
        factors += _ties(sizes, budgets, rng)
    limits = {}
    for b in range(budgets):
        tables = [factor.cost[f"b{b}"] for factor in factors if f"b{b}" in factor.cost]
        most = sum(float(np.max(table, where=table < np.inf, initial=0.0)) for table in tables)
        limit = most * float(rng.uniform(0.1, 0.9))
        limits[f"b{b}"] = max(1.0, np.floor(limit)) if whole else max(0.1, limit)
    variables = {f"v{i}": size for i, size in enumerate(sizes)}
    kinds = [f"{budgets} budgets", *["whole numbers"] * whole, *["forbidden"] * forbids, *["option 0"] * blocks]
    return Problem(variables=variables, budgets=limits, factors=factors), kinds


def scopes_of(structure: str, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    line: list[tuple[int, ...]] = [(i, i + 1) for i in range(count - 1)]
    single: list[tuple[int, ...]] = [(i,) for i in range(count)]
    if structure == "tree":
        return single + [(int(rng.integers(0, i)), i) for i in range(1, count)]
    if structure == "cycle":
        return [*single, *line, (count - 1, 0)]
    if structure == "ladder":
        return [*line, *((i, i + 2) for i in range(count - 2))]
    if structure == "residual":
        return [*single, *line, *((i, i + 3) for i in range(0, count - 3, 2))]
    if structure == "triples":
        return [*single, *((i, i + 1, i + 2) for i in range(0, count - 2, 2)), *line[::2]]
    return [*single[::2], *line[::3]]


def _factor(
    rng: np.random.Generator, scope: tuple[int, ...], sizes: list[int], budgets: int, whole: bool, forbids: bool
) -> Factor:
    shape = tuple(sizes[v] for v in scope)
    value = rng.integers(-3, 10, shape).astype(np.float64) if whole else rng.normal(0.5, 1.0, shape)
    if len(scope) == 1 and rng.random() < 0.7:
        value = np.sort(value)
    cost: dict[str, Any] = {}
    for b in range(budgets):
        table = rng.integers(0, 9, shape).astype(np.float64) if whole else rng.gamma(2.0, 1.0, shape)
        for axis in range(len(scope) if rng.random() < 0.7 else 0):
            table = np.sort(table, axis=axis)
        if forbids and len(scope) > 1:
            table[rng.random(shape) < 0.1] = np.inf
        cost[f"b{b}"] = table
    return Factor(variables=tuple(f"v{v}" for v in scope), value=value, cost=cost)


def _ties(sizes: list[int], budgets: int, rng: np.random.Generator) -> Iterator[Factor]:
    """Neighbours that are gone together: option 0 of both, or of none."""
    for i in range(0, len(sizes) - 1, 3):
        if budgets and sizes[i] > 1 and sizes[i + 1] > 1:
            table = np.zeros((sizes[i], sizes[i + 1]))
            table[0, 1:] = table[1:, 0] = np.inf
            gain = np.array([0.0] + [float(rng.integers(0, 5))] * (sizes[i] - 1))
            yield Factor(variables=(f"v{i}", f"v{i + 1}"), value=np.zeros_like(table), cost={"b0": table})
            yield Factor(variables=(f"v{i}",), value=gain)


def by_brute_force(problem: Problem) -> tuple[float | None, float]:
    """(the best value inside the budgets, None: there is none; the range of values): every combination at once."""
    names = {name: i for i, name in enumerate(problem.variables)}
    shape = tuple(problem.variables.values())
    value, costs = np.zeros(shape), {b: np.zeros(shape) for b in problem.budgets}
    for factor in problem.factors:
        numbers = [names[name] for name in factor.variables]
        for total, table in [(value, factor.value), *((costs[b], t) for b, t in factor.cost.items())]:
            moved = np.transpose(table, np.argsort(numbers))
            total += moved.reshape([shape[v] if v in numbers else 1 for v in range(len(shape))])
    near = np.ones(shape, dtype=np.bool_)
    for b, limit in problem.budgets.items():
        near &= costs[b] <= limit * (1 + 1e-9)
    span = float(value.max() - value.min())
    places = np.argwhere(near)
    for place in places[np.argsort(-value[near], kind="stable")]:
        choice = dict(zip(problem.variables, place.tolist(), strict=True))
        if all(cost <= problem.budgets[b] for b, cost in problem.cost_of(choice).items()):
            return problem.value_of(choice), span
    return None, span


def by_highs(problem: Problem) -> tuple[float | None, float]:
    """The same by mixed-integer programming; a point that HiGHS lets through its tolerance does not count."""
    span = math.fsum(float(np.ptp(factor.value)) for factor in problem.factors)
    found = plain(problem, gap=1e-9, limit_s=60.0)
    if found["value"] is None:
        return None, span
    choice = found["choice"]
    if any(cost > problem.budgets[b] for b, cost in problem.cost_of(choice).items()):
        return None, span
    return problem.value_of(choice), span


if __name__ == "__main__":
    sys.exit(main())
