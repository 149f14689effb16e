"""A problem as stacked tables, and what may be taken out of it without changing the answer.

Legend: R budgets with a finite limit ("rows"); costs are divided by their limit, so that every budget is 1. A table
over k1 x k2 options is float64 [1 + R, k1, k2]: the value, then the costs; `allowed` says where it counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeprune.solve.elimination import Recipe, Scope, elimination_recipe, max_marginals
from edgeprune.solve.problem import BoolArray, FloatArray, IntArray, Problem

DOMINANCE_WORK = 1 << 24


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

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(options) for options in self.kept)

    def recipe(self) -> Recipe | None:
        return elimination_recipe(self.sizes, self.tables)

    def weighted(self, weights: FloatArray) -> dict[Scope, FloatArray]:
        """One table per scope: the weights, float64 [1 + R], times value and costs; -inf where forbidden."""
        return {
            scope: np.where(self.allowed[scope], np.tensordot(weights, table, axes=1), -np.inf)
            for scope, table in self.tables.items()
        }

    def totals(self, chosen: tuple[int, ...]) -> FloatArray:
        """float64 [1 + R]: value and scaled costs of one option per variable (numbers inside the model)."""
        columns = [picked(table, [chosen[v] for v in scope]) for scope, table in self.tables.items()]
        return np.array([math.fsum(row) for row in zip(*columns, strict=True)]) if columns else np.zeros(1 + self.rows)


def model_from_problem(problem: Problem) -> Model:
    """Factors over the same variables become one table, a pair inside a triple becomes part of it."""
    numbers = {name: i for i, name in enumerate(problem.variables)}
    limits = [(budget, limit) for budget, limit in problem.budgets.items() if math.isfinite(limit)]
    tables: dict[Scope, FloatArray] = {}
    allowed: dict[Scope, BoolArray] = {}
    for factor in sorted(problem.factors, key=lambda f: -len(f.variables)):
        unsorted = [numbers[name] for name in factor.variables]
        axes = np.argsort(unsorted)
        own = tuple(sorted(unsorted))
        stack = np.zeros((1 + len(limits), *factor.value.shape))
        stack[0] = factor.value
        for row, (budget, limit) in enumerate(limits, start=1):
            if budget in factor.cost:
                stack[row] = np.nan_to_num(factor.cost[budget] / limit, posinf=0.0)
        free = np.ones(factor.value.shape, dtype=np.bool_)
        for cost in factor.cost.values():
            free &= np.isfinite(cost)
        stack, free = stack.transpose(0, *(axes + 1)), free.transpose(axes)
        stack = np.where(free, stack, 0.0)
        wider = [scope for scope in tables if len(own) > 1 and set(own) < set(scope)]
        scope = own if own in tables or not wider else wider[0]
        if scope != own:
            stack = stack.reshape(
                len(stack), *(problem.variables[n] if numbers[n] in own else 1 for n in _names(problem, scope))
            )
            free = free.reshape(stack.shape[1:])
        tables[scope] = tables[scope] + stack if scope in tables else stack
        allowed[scope] = allowed[scope] & free if scope in allowed else free
    kept = tuple(np.arange(options, dtype=np.int64) for options in problem.variables.values())
    return Model(rows=len(limits), kept=kept, tables=tables, allowed=allowed)


def _names(problem: Problem, scope: Scope) -> list[str]:
    names = list(problem.variables)
    return [names[v] for v in scope]


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
    for table in tables.values():
        table[0] += math.fsum([*constants, -zero]) / unit / len(tables)
    return replace(model, tables=tables)


def restrict(model: Model, keep: Mapping[Scope, BoolArray]) -> Model | None:
    """Only the combinations that `keep` allows, options without a combination taken out; None: nothing is left."""
    allowed = {scope: free & keep[scope] if scope in keep else free for scope, free in model.allowed.items()}
    alive = [keep.get((v,), np.ones(k, dtype=np.bool_)).copy() for v, k in enumerate(model.sizes)]
    changed = True
    while changed:
        changed = False
        for scope, free in allowed.items():
            for axis, v in enumerate(scope):
                free = free & alive[v].reshape([-1 if i == axis else 1 for i in range(len(scope))])
            allowed[scope] = free
            for axis, v in enumerate(scope):
                usable = alive[v] & free.any(axis=tuple(i for i in range(len(scope)) if i != axis))
                changed |= bool((usable != alive[v]).any())
                alive[v] = usable
    if not all(options.any() for options in alive):
        return None
    return replace(
        model,
        kept=tuple(options[live] for options, live in zip(model.kept, alive, strict=True)),
        tables={
            s: t[np.ix_(np.ones(1 + model.rows, dtype=np.bool_), *(alive[v] for v in s))]
            for s, t in model.tables.items()
        },
        allowed={s: free[np.ix_(*(alive[v] for v in s))] for s, free in allowed.items()},
    )


def without_dominated(model: Model) -> Model:
    """Take out each option that another option of its variable replaces, whatever the other variables are.

    Option p replaces o when, with the worst case over the neighbours taken factor by factor, p allows all that o
    allows, adds no less value and no more to any cost; of two equal options the later one goes.
    """
    keep: dict[Scope, BoolArray] = {}
    for v, size in enumerate(model.sizes):
        around = [scope for scope in model.tables if v in scope]
        if size > 1 and sum(model.tables[scope].size for scope in around) * size <= DOMINANCE_WORK:
            keep[(v,)] = _undominated(model, v, around)
            model = restrict(model, {(v,): keep[(v,)]}) or model
    return model


def _undominated(model: Model, v: int, around: list[Scope]) -> BoolArray:
    size = model.sizes[v]
    alive = np.ones(size, dtype=np.bool_)
    worst = np.zeros((1 + model.rows, size, size))  # [row, o, p]: the largest loss when p stands in for o
    for scope in around:
        axis = scope.index(v)
        loss = np.moveaxis(model.tables[scope], axis + 1, 1).reshape(1 + model.rows, size, -1).copy()
        loss[0] *= -1.0
        free = np.moveaxis(model.allowed[scope], axis, 0).reshape(size, -1)
        for o in range(size):
            step = np.where(free, loss - loss[:, o : o + 1], np.inf)[:, :, free[o]]
            worst[:, o] += step.max(axis=2, initial=-np.inf)
    replaces: BoolArray = np.asarray((worst <= 0).all(axis=0))
    for o in reversed(range(size)):
        others = replaces[o] & alive
        others[o] = False
        alive[o] = not others.any()
    return alive


def above(model: Model, recipe: Recipe, weights: FloatArray, threshold: float) -> Model | None:
    """Only what some assignment with weighted sum >= threshold uses; None: there is no such assignment."""
    marginals = max_marginals(recipe, model.weighted(weights))
    return restrict(model, {scope: np.greater_equal(table, threshold) for scope, table in marginals.items()})
