"""A problem as stacked tables, and what may be taken out of it.

Legend: R budgets with a finite limit ("rows"); costs are divided by their limit, so that every budget is 1. A table
over k1 x k2 options is float64 [1 + R, k1, k2]: the value, then the costs; `allowed` says where it counts. *Numbers*
are options counted inside the model, a `Choice` counts them in the problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from edgeprune.solve.elimination import Recipe, Scope, elimination_recipe
from edgeprune.solve.problem import BoolArray, FloatArray, IntArray, Problem

Choice: TypeAlias = tuple[int, ...]  # one option per variable, in the order of Problem.variables
Numbers: TypeAlias = tuple[int, ...]  # the same, counted inside the model


def picked(table: FloatArray, at: Sequence[int] | Sequence[IntArray]) -> FloatArray:
    """float64 [1 + R] or [1 + R, n]: value and costs of one combination, or of n."""
    place: tuple[Any, ...] = (slice(None), *at)
    return np.asarray(table[place], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Model:
    """kept: per variable the options' numbers in the problem, int64 [k]. tables and allowed have the same scopes."""

    rows: int
    kept: tuple[IntArray, ...]
    tables: Mapping[Scope, FloatArray]
    allowed: Mapping[Scope, BoolArray]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(options) for options in self.kept)

    def recipe(self, largest_sum: int | None = None) -> Recipe | None:
        return elimination_recipe(self.sizes, self.tables, largest_sum)

    def weighted(self, weights: FloatArray) -> dict[Scope, FloatArray]:
        """One table per scope: the weights, float64 [1 + R], times value and costs; -inf where forbidden."""
        found = {}
        for scope, table in self.tables.items():
            found[scope] = (weights @ table.reshape(len(table), -1)).reshape(table.shape[1:])
            if not self.allowed[scope].all():
                found[scope][~self.allowed[scope]] = -np.inf
        return found

    def totals(self, numbers: Numbers) -> FloatArray:
        """float64 [1 + R]: value and scaled costs of one option per variable."""
        columns = [picked(table, [numbers[v] for v in scope]) for scope, table in self.tables.items()]
        return np.array([math.fsum(row) for row in zip(*columns, strict=True)]) if columns else np.zeros(1 + self.rows)

    def permits(self, numbers: Numbers) -> bool:
        """Whether no forbidden combination is among them."""
        return all(bool(free[tuple(numbers[v] for v in scope)]) for scope, free in self.allowed.items())

    def choice(self, numbers: Numbers) -> Choice:
        return tuple(int(options[n]) for options, n in zip(self.kept, numbers, strict=True))

    def numbers(self, choice: Choice) -> Numbers | None:
        """The choice inside the model; None where one of its options was taken out."""
        found = self.nearest(choice)
        return found if self.choice(found) == tuple(choice) else None

    def nearest(self, choice: Choice) -> Numbers:
        """The choice inside the model, with the next option for each that was taken out."""
        pairs = zip(self.kept, choice, strict=True)
        return tuple(min(int(np.searchsorted(options, o)), len(options) - 1) for options, o in pairs)


def model_from_problem(problem: Problem) -> Model:
    """Factors over the same variables become one table, a pair inside a triple becomes part of it."""
    numbers = {name: i for i, name in enumerate(problem.variables)}
    sizes = tuple(problem.variables.values())
    limits = [(budget, limit) for budget, limit in problem.budgets.items() if math.isfinite(limit)]
    tables: dict[Scope, FloatArray] = {}
    allowed: dict[Scope, BoolArray] = {}
    triples: dict[Scope, Scope] = {}
    for factor in sorted(problem.factors, key=lambda f: -len(f.variables)):
        unsorted = [numbers[name] for name in factor.variables]
        axes = tuple(int(axis) for axis in np.argsort(unsorted))
        own = tuple(sorted(unsorted))
        scope = own if own in tables else triples.get(own, own)
        shape = tuple(sizes[v] if v in own else 1 for v in scope)
        if scope not in tables:
            tables[scope] = np.zeros((1 + len(limits), *(sizes[v] for v in scope)))
            allowed[scope] = np.ones(tables[scope].shape[1:], dtype=np.bool_)
            if len(scope) == 3:
                for out in range(3):
                    triples.setdefault(scope[:out] + scope[out + 1 :], scope)
        tables[scope][0] += factor.value.transpose(axes).reshape(shape)
        for row, (budget, limit) in enumerate(limits, start=1):
            if budget in factor.cost:
                tables[scope][row] += (factor.cost[budget] / limit).transpose(axes).reshape(shape)
        for cost in factor.cost.values():
            free = np.isfinite(cost)
            if not free.all():
                allowed[scope] &= free.transpose(axes).reshape(shape)
    for scope, table in tables.items():
        table[:, ~allowed[scope]] = 0.0
    kept = tuple(np.arange(options, dtype=np.int64) for options in sizes)
    return Model(rows=len(limits), kept=kept, tables=tables, allowed=allowed)


def without_rows(model: Model) -> Model:
    """The same values and forbidden combinations, no budgets."""
    return replace(model, rows=0, tables={scope: table[:1] for scope, table in model.tables.items()})


def normalised(model: Model, zero: float, unit: float) -> Model:
    """Values (value - zero) / unit, the constant shared out so that no table carries a large one."""
    tables = {scope: table.copy() for scope, table in model.tables.items()}
    constants = []
    for scope, table in tables.items():
        constants.append(float(table[0][model.allowed[scope]].min()))
        table[0] = (table[0] - constants[-1]) / unit
    share = math.fsum([*constants, -zero]) / unit / max(1, len(tables))
    for table in tables.values():
        table[0] += share
    return replace(model, tables=tables)


def restrict(model: Model, keep: Mapping[Scope, BoolArray]) -> Model | None:
    """Only the combinations that `keep` allows, options without a combination taken out; None: nothing is left."""
    allowed = {scope: free & keep[scope] if scope in keep else free for scope, free in model.allowed.items()}
    alive = [np.array(keep.get((v,), np.ones(k, dtype=np.bool_))) for v, k in enumerate(model.sizes)]
    waiting = {scope for scope, free in allowed.items() if not free.all()}
    touching: dict[int, list[Scope]] = {v: [] for v in range(len(alive))}
    for scope in allowed:
        for v in scope:
            touching[v].append(scope)
    waiting.update(scope for v, options in enumerate(alive) if not options.all() for scope in touching[v])
    while waiting:
        for scope in sorted(waiting):
            waiting.discard(scope)
            free = allowed[scope]
            for axis, v in enumerate(scope):
                if not alive[v].all():
                    free = free & alive[v].reshape([-1 if i == axis else 1 for i in range(len(scope))])
            allowed[scope] = free
            for axis, v in enumerate(scope):
                usable = alive[v] & free.any(axis=tuple(i for i in range(len(scope)) if i != axis))
                if (usable != alive[v]).any():
                    alive[v] = usable
                    waiting.update(touching[v])
    if not all(options.any() for options in alive):
        return None
    places = [np.flatnonzero(options) for options in alive]
    whole = [len(place) == k for place, k in zip(places, model.sizes, strict=True)]
    tables, free_of = {}, {}
    for scope, table in model.tables.items():
        intact = all(whole[v] for v in scope)
        at = np.ix_(*(places[v] for v in scope))
        stack: tuple[Any, ...] = (slice(None), *at)
        tables[scope] = table if intact else np.ascontiguousarray(table[stack])
        free_of[scope] = allowed[scope] if intact else allowed[scope][at]
    kept = tuple(options[place] for options, place in zip(model.kept, places, strict=True))
    return replace(model, kept=kept, tables=tables, allowed=free_of)
