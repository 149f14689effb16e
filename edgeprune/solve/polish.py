"""Answers that use up the budgets, next to the Lagrangian maximum.

At multipliers w each assignment loses a part of the Lagrangian maximum, the sum over the variables, roots of the bucket
tree first, of what the option chosen loses against the best one there. Completed by best options from there on, every
partial assignment is a whole one with known loss and costs. A beam of them is carried from the roots to the leaves:
loss below a limit, and of those with nearly the same costs the ones that lose least.

Legend: K labels (partial assignments), k options, R budgets. loss [K], cost [R, K]: of the completed assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.solve.elimination import Recipe
from edgeprune.solve.model import Model, Numbers
from edgeprune.solve.problem import FloatArray, IntArray

LARGEST_WORK = 1 << 23
"""Entries of all joins together, which are held whole here."""
LABELS = 1 << 17
"""Labels times variables."""
OFFERED = 8


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """Joined weights [k, ...] and costs [R, k, ...] of a variable and all below it, and the best over its options."""

    weight: FloatArray
    cost: FloatArray
    best_weight: FloatArray
    best_cost: FloatArray


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """`live`: options [K] of the variables that are still asked for."""

    loss: FloatArray
    cost: FloatArray
    live: dict[int, IntArray]


def polished(model: Model, recipe: Recipe, weights: FloatArray, most_loss: float) -> list[Numbers]:
    """Assignments inside the budgets with a Lagrangian loss below `most_loss`, largest value first; a few at most."""
    buckets = _buckets(model, recipe, weights)
    roots = [v for v in recipe.order if recipe.parents[v] is None]
    start = np.sum([buckets[v].best_cost for v in roots], axis=0).reshape(model.rows, 1)
    labels = _Labels(loss=np.zeros(1), cost=start, live={})
    last_use = _last_uses(recipe)
    width = min(4096, max(128, LABELS // len(recipe.order)))
    steps: list[tuple[int, IntArray, IntArray]] = []
    for v in reversed(recipe.order):
        labels, before, option = _extended(labels, buckets[v], recipe.joins[v][1:], most_loss, width)
        steps.append((v, before, option))
        live = {u: options[before] for u, options in labels.live.items()} | {v: option}
        labels = _Labels(
            loss=labels.loss, cost=labels.cost, live={u: o for u, o in live.items() if last_use.get(u, v) != v}
        )
    inside = np.flatnonzero((labels.cost <= 1.0 + 1e-12).all(axis=0))
    value = -labels.loss - weights[1:] @ labels.cost
    first = inside[np.argsort(-value[inside], kind="stable")][:OFFERED]
    return [_traced(steps, int(label)) for label in first]


def _last_uses(recipe: Recipe) -> dict[int, int]:
    """{variable: the last one, from the roots on, whose join holds it}; the recipe's own order settles the rest."""
    last = {}
    for v in reversed(recipe.order):
        for u in recipe.joins[v][1:]:
            last[u] = v
    return last


def _buckets(model: Model, recipe: Recipe, weights: FloatArray) -> dict[int, _Bucket]:
    weight = {v: np.zeros(recipe.shape(join)) for v, join in recipe.joins.items()}
    cost = {v: np.zeros((model.rows, *table.shape)) for v, table in weight.items()}
    for scope, table in model.weighted(weights).items():
        home = recipe.homes[scope]
        weight[home] += recipe.part(home, table, scope)
        for row in range(model.rows):
            cost[home][row] += recipe.part(home, model.tables[scope][1 + row], scope)
    found = {}
    for v in recipe.order:
        rest, parent = recipe.joins[v][1:], recipe.parents[v]
        best = weight[v].argmax(axis=0)
        best_weight = np.take_along_axis(weight[v], best[None], axis=0)[0]
        best_cost = np.take_along_axis(cost[v], np.broadcast_to(best, (model.rows, 1, *best.shape)), axis=1)[:, 0]
        found[v] = _Bucket(weight=weight[v], cost=cost[v], best_weight=best_weight, best_cost=best_cost)
        if parent is not None:
            weight[parent] += recipe.part(parent, best_weight, rest)
            for row in range(model.rows):
                cost[parent][row] += recipe.part(parent, best_cost[row], rest)
    return found


def _extended(
    labels: _Labels, bucket: _Bucket, rest: tuple[int, ...], most_loss: float, width: int
) -> tuple[_Labels, IntArray, IntArray]:
    """Every label with every option of one more variable, at most `width` of them; (labels, label before, option)."""
    at: tuple[Any, ...] = tuple(labels.live[u] for u in rest)
    one: tuple[Any, ...] = (slice(None), *at)
    two: tuple[Any, ...] = (slice(None), *one)
    weight, best_weight = bucket.weight[one], bucket.best_weight[at]
    cost, best_cost = bucket.cost[two], bucket.best_cost[one]
    if not rest:
        weight, cost = weight[:, None], cost[:, :, None]
    with np.errstate(invalid="ignore"):
        loss = labels.loss + (np.reshape(best_weight, -1) - weight)
    option, before = np.nonzero(loss < most_loss)
    loss_of = loss[option, before]
    cost_of = (labels.cost - best_cost.reshape(len(cost), -1))[:, before] + cost[:, option, before if rest else 0]
    kept = _spread_out(loss_of, cost_of, width)
    own = _Labels(loss=loss_of[kept], cost=cost_of[:, kept], live=labels.live)
    return own, before[kept], option[kept]


def _spread_out(loss: FloatArray, cost: FloatArray, width: int) -> IntArray:
    """Of labels with nearly the same costs those that lose least: their places, about `width` of them."""
    if len(loss) <= width:
        return np.arange(len(loss))
    bins = max(2, int((width // 2) ** (1 / max(1, len(cost)))))
    cell = np.zeros(len(loss), dtype=np.int64)
    for row in cost:
        low, high = float(row.min()), float(row.max())
        step = max((high - low) / bins, 1e-300)
        cell = cell * bins + np.minimum((row - low) / step, bins - 1).astype(np.int64)
    order = np.lexsort((loss, cell))
    first = np.concatenate([[True], cell[order][1:] != cell[order][:-1]])
    starts = np.flatnonzero(first)
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return np.sort(order[place < max(1, width // len(starts))])


def _traced(steps: list[tuple[int, IntArray, IntArray]], label: int) -> Numbers:
    found = {}
    for v, before, option in reversed(steps):
        found[v] = int(option[label])
        label = int(before[label])
    return tuple(found[v] for v in range(len(found)))
