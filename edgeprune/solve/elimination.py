"""Exact maximisation of a sum of tables by variable elimination (max-sum on a bucket tree).

Eliminating a variable joins the tables that hold it and maximises it out; the message goes to the bucket of the next
variable of its scope. Work and memory are those of the largest join, so chains with residuals (joins of two to four
variables) take milliseconds. Dechter, "Bucket elimination: a unifying framework for reasoning", 1999.

Legend: a scope is an ascending tuple of variable numbers; a table over it has one axis per variable; -inf forbids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from edgeprune.solve.problem import FloatArray

Scope: TypeAlias = tuple[int, ...]
Tables: TypeAlias = Mapping[Scope, FloatArray]

LARGEST_JOIN = 1 << 20
LARGEST_SUM = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """In which order to eliminate: pure data, good for any numbers on the same scopes.

    sizes: options per variable. order: variables, first eliminated first. joins: {variable: scope of its bucket}.
    parents: {variable: the variable whose bucket takes its message, None at a root}.
    homes: {scope of a table: the variable whose bucket it is added to}.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    joins: Mapping[int, Scope]
    parents: Mapping[int, int | None]
    homes: Mapping[Scope, int]


def elimination_recipe(sizes: Sequence[int], scopes: Iterable[Scope]) -> Recipe | None:
    """Greedy order by the size of the join (ties: the smallest number); None where a join would grow too large."""
    scopes = list(scopes)
    neighbours: dict[int, set[int]] = {v: set() for v in range(len(sizes))}
    for scope in scopes:
        for v in scope:
            neighbours[v].update(scope)
            neighbours[v].discard(v)
    order: list[int] = []
    joins: dict[int, Scope] = {}
    total = 0
    while neighbours:
        size, v = min((sizes[v] * math.prod(sizes[u] for u in near), v) for v, near in neighbours.items())
        total += size
        if size > LARGEST_JOIN or total > LARGEST_SUM:
            return None
        near = neighbours.pop(v)
        for u in near:
            neighbours[u].update(near)
            neighbours[u] -= {u, v}
        order.append(v)
        joins[v] = tuple(sorted(near | {v}))
    rank = {v: i for i, v in enumerate(order)}
    parents = {v: min((u for u in join if u != v), key=rank.__getitem__, default=None) for v, join in joins.items()}
    homes = {scope: min(scope, key=rank.__getitem__) for scope in scopes}
    return Recipe(sizes=tuple(sizes), order=tuple(order), joins=joins, parents=parents, homes=homes)


def _spread(recipe: Recipe, table: FloatArray, scope: Scope, join: Scope) -> FloatArray:
    """The table with axes of length 1 for the variables of the join that it does not hold."""
    return table.reshape([recipe.sizes[v] if v in scope else 1 for v in join])


def _upward(recipe: Recipe, tables: Tables) -> tuple[dict[int, FloatArray], dict[int, FloatArray]]:
    """{variable: joined table [its join]} and {variable: message [its join without it]}."""
    joined = {v: np.zeros([recipe.sizes[u] for u in recipe.joins[v]]) for v in recipe.order}
    messages: dict[int, FloatArray] = {}
    for scope, table in tables.items():
        home = recipe.homes[scope]
        joined[home] += _spread(recipe, table, scope, recipe.joins[home])
    for v in recipe.order:
        join, parent = recipe.joins[v], recipe.parents[v]
        messages[v] = joined[v].max(axis=join.index(v))
        if parent is not None:
            joined[parent] += _spread(recipe, messages[v], tuple(u for u in join if u != v), recipe.joins[parent])
    return joined, messages


def _total(recipe: Recipe, messages: Mapping[int, FloatArray]) -> float:
    return float(sum(float(messages[v]) for v in recipe.order if recipe.parents[v] is None))


def maximise(recipe: Recipe, tables: Tables) -> tuple[float, tuple[int, ...]]:
    """The largest sum of the tables and an assignment that has it; ties go to the smallest option. -inf: forbidden."""
    joined, messages = _upward(recipe, tables)
    chosen: dict[int, int] = {}
    for v in reversed(recipe.order):
        at = tuple(slice(None) if u == v else chosen[u] for u in recipe.joins[v])
        chosen[v] = int(np.argmax(joined[v][at]))
    return _total(recipe, messages), tuple(chosen[v] for v in range(len(recipe.sizes)))


def max_marginals(recipe: Recipe, tables: Tables) -> dict[Scope, FloatArray]:
    """For each table's scope and each variable: the largest sum with that combination of options; -inf: none."""
    joined, messages = _upward(recipe, tables)
    total = _total(recipe, messages)
    full: dict[int, FloatArray] = {}
    for v in reversed(recipe.order):
        join, parent = recipe.joins[v], recipe.parents[v]
        if parent is None:
            full[v] = joined[v] + (total - float(messages[v]) if total > -math.inf else -math.inf)
            continue
        rest = tuple(u for u in join if u != v)
        above = full[parent].max(axis=tuple(i for i, u in enumerate(recipe.joins[parent]) if u not in rest))
        with np.errstate(invalid="ignore"):
            outside = above - messages[v]
        outside[np.isnan(outside)] = -np.inf
        full[v] = joined[v] + _spread(recipe, outside, rest, join)
    wanted: dict[Scope, int] = {**recipe.homes, **{(v,): v for v in recipe.order}}
    return {
        scope: full[home].max(axis=tuple(i for i, u in enumerate(recipe.joins[home]) if u not in scope))
        for scope, home in wanted.items()
    }
