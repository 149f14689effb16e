"""Answers that use up the budgets, next to the Lagrangian maximum, and how good one there can be at most.

At multipliers w each assignment loses a part of the Lagrangian maximum, the sum over the variables, roots of the bucket
tree first, of what the option chosen loses against the best one there. Completed by best options from there on, every
partial assignment is a whole one with known loss and costs. Such labels are carried from the roots to the leaves while
their losses, at a few multiples of w, leave room for a score above the floor. Under one budget a label goes where
another one with the same options still asked for has no larger cost and a value no lower than by a step; the steps add
up to what an answer may have been missed by (Nemhauser and Ullmann, "Discrete dynamic programming and capital
allocation", 1969, with values rounded as by Ibarra and Kim, "Fast approximation algorithms for the knapsack and sum of
subset problems", 1975). Under several budgets those stay that lose least of those with nearly the same costs.

Legend: K labels (partial assignments), k options, R budgets, J multiples. loss [J, K], cost [R, K]: of the completed
assignment; loss[0] is that at w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.solve.elimination import Recipe
from edgeprune.solve.model import Model, Numbers
from edgeprune.solve.problem import BoolArray, FloatArray, IntArray

LARGEST_WORK = 1 << 23
"""Entries of all joins together, which are held whole here."""
MULTIPLES = (1.0, 1.05, 0.95, 1.25, 0.8)
LARGEST_MULTIPLES = 1 << 20
"""Entries of all joins up to which more than the first multiple is held."""
MOST_CELLS = 1 << 40
OFFERED = 8
ROUNDING = 1e-11


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

    def at(self, places: IntArray | BoolArray) -> _Labels:
        live = {v: options[places] for v, options in self.live.items()}
        return _Labels(loss=self.loss[:, places], cost=self.cost[:, places], live=live)

    def value(self, weights: FloatArray) -> FloatArray:
        """Of the completed assignments, float64 [K], below what the Lagrangian maximum would be at no loss."""
        return np.asarray(-self.loss[0] - weights[1:] @ (self.cost - 1.0), dtype=np.float64)


def polished(
    model: Model, recipe: Recipe, weights: FloatArray, floor: float, *, spare: float = 0.0, width: int = 4096
) -> tuple[list[Numbers], float]:
    """A few assignments inside the budgets, largest value first, and a bound.

    No assignment of the model inside the budgets has a value above the larger of `floor` and the bound. spare: what the
    bound may be too high by for fewer labels. width: labels that are carried on, about; more are not, and the bound
    says so.
    """
    multiples = MULTIPLES if recipe.work <= LARGEST_MULTIPLES else MULTIPLES[:1]
    buckets = [_buckets(model, recipe, _times(weights, m), costs=m == 1.0) for m in multiples]
    roots = [v for v in recipe.order if recipe.parents[v] is None]
    tops = [sum(float(own[v].best_weight) for v in roots) for own in buckets]
    tops = [top - float(_times(weights, m)[1:].sum()) for m, top in zip(multiples, tops, strict=True)]
    rooms = np.array(tops)[:, None] - floor
    cost = np.sum([buckets[0][v].best_cost for v in roots], axis=0).reshape(model.rows, 1)
    labels = _Labels(loss=np.zeros((len(tops), 1)), cost=cost, live={})
    order = _downward(recipe)
    last_use = {u: v for v in order for u in recipe.joins[v][1:]}
    steps: list[tuple[int, IntArray, IntArray]] = []
    bound, missed, step = -np.inf, 0.0, max(spare, ROUNDING) / len(order)
    for v in order:
        labels, before, option = _extended(labels, [own[v] for own in buckets], recipe.joins[v], rooms)
        live = {u: options for u, options in labels.live.items() if last_use.get(u, v) != v}
        labels = _Labels(loss=labels.loss, cost=labels.cost, live=live)
        kept, coarse = np.arange(len(option)), 0.0
        if model.rows == 1 and len(option) > 1:
            kept, coarse = _undominated(labels, recipe.sizes, weights, step, width)
        missed += coarse
        if len(kept) > width:
            few = kept[_spread_out(labels.loss[0, kept], labels.cost[:, kept], width)]
            lost = np.setdiff1d(kept, few, assume_unique=True)
            bound, kept = max(bound, tops[0] - float(labels.loss[0, lost].min(initial=np.inf))), few
        steps.append((v, before[kept], option[kept]))
        labels = labels.at(kept)
    inside = np.flatnonzero((labels.cost <= 1.0 + 1e-12).all(axis=0))
    value = labels.value(weights)[inside]
    bound = min(max(bound, tops[0] + float(value.max(initial=-np.inf)) + missed), *tops, np.inf) + ROUNDING
    first = inside[np.argsort(-value, kind="stable")][:OFFERED]
    return [_traced(steps, int(label)) for label in first], bound


def _times(weights: FloatArray, multiple: float) -> FloatArray:
    return np.concatenate([weights[:1], multiple * weights[1:]])


def _downward(recipe: Recipe) -> list[int]:
    """Each variable behind its parent, subtree by subtree, small ones first: few options are asked for at a time."""
    children: dict[int | None, list[int]] = {}
    size = dict.fromkeys(recipe.order, 1)
    for v in recipe.order:
        parent = recipe.parents[v]
        children.setdefault(parent, []).append(v)
        if parent is not None:
            size[parent] += size[v]
    found, waiting = [], sorted(children.get(None, []), key=lambda v: (-size[v], v))
    while waiting:
        v = waiting.pop()
        found.append(v)
        waiting += sorted(children.get(v, []), key=lambda u: (-size[u], u))
    return found


def _buckets(model: Model, recipe: Recipe, weights: FloatArray, *, costs: bool) -> dict[int, _Bucket]:
    rows = model.rows if costs else 0
    weight = {v: np.zeros(recipe.shape(join)) for v, join in recipe.joins.items()}
    cost = {v: np.zeros((rows, *table.shape)) for v, table in weight.items()}
    for scope, table in model.weighted(weights).items():
        home = recipe.homes[scope]
        weight[home] += recipe.part(home, table, scope)
        for row in range(rows):
            cost[home][row] += recipe.part(home, model.tables[scope][1 + row], scope)
    found = {}
    for v in recipe.order:
        rest, parent = recipe.joins[v][1:], recipe.parents[v]
        best = weight[v].argmax(axis=0)
        best_weight = np.take_along_axis(weight[v], best[None], axis=0)[0]
        best_cost = np.take_along_axis(cost[v], np.broadcast_to(best, (rows, 1, *best.shape)), axis=1)[:, 0]
        found[v] = _Bucket(weight=weight[v], cost=cost[v], best_weight=best_weight, best_cost=best_cost)
        if parent is not None:
            weight[parent] += recipe.part(parent, best_weight, rest)
            for row in range(rows):
                cost[parent][row] += recipe.part(parent, best_cost[row], rest)
    return found


def _extended(
    labels: _Labels, buckets: list[_Bucket], join: tuple[int, ...], rooms: FloatArray
) -> tuple[_Labels, IntArray, IntArray]:
    """Every label with every option of one more variable, where all losses leave room; (labels, before, option)."""
    v, *rest = join
    at: tuple[Any, ...] = tuple(labels.live[u] for u in rest)
    every: tuple[Any, ...] = (slice(None), *at)
    first = buckets[0].weight[every] if rest else buckets[0].weight[:, None]
    with np.errstate(invalid="ignore"):
        added = np.broadcast_to(buckets[0].best_weight[at] - first, (first.shape[0], labels.loss.shape[1]))
        option, before = np.nonzero(labels.loss[0] + added < rooms[0])
    above: tuple[Any, ...] = tuple(options[before] for options in at)
    place: tuple[Any, ...] = (option, *above)
    with np.errstate(invalid="ignore"):
        loss = np.stack([b.best_weight[above] - b.weight[place] for b in buckets]) + labels.loss[:, before]
    rows, stack, stack_above = len(labels.cost), (slice(None), *place), (slice(None), *above)
    best_cost = buckets[0].best_cost[stack_above].reshape(rows, -1)
    cost = labels.cost[:, before] + buckets[0].cost[stack] - best_cost
    live = {u: options[before] for u, options in labels.live.items()} | {v: option}
    kept = np.flatnonzero((loss < rooms).all(axis=0))
    return _Labels(loss=loss, cost=cost, live=live).at(kept), before[kept], option[kept]


def _undominated(
    labels: _Labels, sizes: tuple[int, ...], weights: FloatArray, step: float, width: int
) -> tuple[IntArray, float]:
    """(the labels without those that others replace, what a value may have got lower by); one budget."""
    value, cost = labels.value(weights), labels.cost[0]
    code = np.zeros(len(value), dtype=np.int64)
    for v, options in labels.live.items():
        code = code * sizes[v] + options
        code = np.unique(code, return_inverse=True)[1]
    kept, top = np.arange(len(value)), float(value.max())
    step = max(step, (top - float(value.min())) / MOST_CELLS)
    while True:
        cell = np.floor((top - value[kept]) / step).astype(np.int64)
        key = code[kept] * (int(cell.max()) + 1) + cell
        order = np.lexsort((cost[kept], key))
        first = np.concatenate([[True], np.diff(key[order]) > 0])
        smaller = kept[order[first]]  # by options still asked for, then by falling value: the least cost of each cell
        rank = np.unique(cost[smaller], return_inverse=True)[1] - code[smaller] * len(smaller)
        lowest = np.minimum.accumulate(rank)
        smaller = smaller[np.concatenate([[True], rank[1:] < lowest[:-1]])]
        kept = smaller
        if len(kept) <= width or int(cell.max()) == 0:
            return np.sort(kept), step
        step *= 2


def _spread_out(loss: FloatArray, cost: FloatArray, width: int) -> IntArray:
    """Of labels with nearly the same costs those that lose least: their places, about `width` of them."""
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
