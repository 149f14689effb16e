"""Exact maximisation of a sum of tables by variable elimination (max-sum on a bucket tree).

Eliminating a variable joins the tables that hold it and maximises it out; the message goes to the bucket of the next
variable of its scope. Dechter, "Bucket elimination: a unifying framework for reasoning", 1999. A join is never held
whole: its parts are added and reduced slab by slab, so that memory is that of the messages, work that of the joins.

Legend: a scope is an ascending tuple of variable numbers; a table over it has one axis per variable; -inf forbids. The
join of variable v has v first, then the rest ascending; a *part* of it has axes of length 1 for what it doesn't hold.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from edgeprune.solve.problem import FloatArray

Scope: TypeAlias = tuple[int, ...]
Tables: TypeAlias = Mapping[Scope, FloatArray]

LARGEST_JOIN = 1 << 30
LARGEST_MESSAGE = 1 << 23
LARGEST_SUM = 1 << 25
SLAB = 1 << 15
"""Entries that are added and reduced at once: both buffers stay in the second-level cache."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """In which order to eliminate: pure data, good for any numbers on the same scopes.

    sizes: options per variable. order: variables, first eliminated first. joins: {variable: scope of its bucket, the
    variable first}. parents: {variable: the variable whose bucket takes its message, None at a root}.
    homes: {scope of a table: the variable whose bucket it is added to}. work: entries of all joins.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    joins: Mapping[int, Scope]
    parents: Mapping[int, int | None]
    homes: Mapping[Scope, int]
    work: int

    def shape(self, scope: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.sizes[v] for v in scope)

    def part(self, v: int, table: FloatArray, scope: Scope) -> FloatArray:
        """The table as a part of the join of v."""
        ordered = np.ascontiguousarray(np.moveaxis(table, scope.index(v), 0)) if v in scope else table
        return ordered.reshape([self.sizes[u] if u in scope else 1 for u in self.joins[v]])


def elimination_recipe(sizes: Sequence[int], scopes: Iterable[Scope], largest_sum: int | None = None) -> Recipe | None:
    """Greedy order by the size of the join (ties: the smallest number); None where the joins would grow too large."""
    scopes, largest_sum = list(scopes), LARGEST_SUM if largest_sum is None else largest_sum
    neighbours: dict[int, set[int]] = {v: set() for v in range(len(sizes))}
    for scope in scopes:
        for v in scope:
            neighbours[v].update(scope)
            neighbours[v].discard(v)
    joint = {v: sizes[v] * math.prod(sizes[u] for u in near) for v, near in neighbours.items()}
    heap = [(size, v) for v, size in joint.items()]
    heapq.heapify(heap)
    joins: dict[int, Scope] = {}
    work = 0
    while heap:
        size, v = heapq.heappop(heap)
        if v in joins or size != joint[v]:
            continue
        work += size
        if size > LARGEST_JOIN or size > LARGEST_MESSAGE * sizes[v] or work > largest_sum:
            return None
        near = neighbours.pop(v)
        joins[v] = (v, *sorted(near))
        for u in near:
            neighbours[u] |= near
            neighbours[u] -= {u, v}
            joint[u] = sizes[u] * math.prod(sizes[n] for n in neighbours[u])
            heapq.heappush(heap, (joint[u], u))
    rank = {v: i for i, v in enumerate(joins)}
    parents = {v: min(join[1:], key=rank.__getitem__, default=None) for v, join in joins.items()}
    homes = {scope: min(scope, key=rank.__getitem__) for scope in scopes}
    return Recipe(sizes=tuple(sizes), order=tuple(joins), joins=joins, parents=parents, homes=homes, work=work)


def _projections(parts: Sequence[FloatArray], shape: tuple[int, ...], keeps: Sequence[Scope]) -> list[FloatArray]:
    """For each tuple of kept axes: the maximum over the other axes of the sum of the parts."""
    results = [np.full([shape[axis] for axis in keep], -np.inf) for keep in keeps]
    along = 1 + int(np.argmax(shape[1:])) if len(shape) > 1 else 0
    step = max(1, SLAB * shape[along] // math.prod(shape))
    slab_shape = list(shape)
    for start in range(0, shape[along], step):
        window = slice(start, min(start + step, shape[along]))
        slab_shape[along] = window.stop - start
        slabs = [part[_at(along, window)] if part.shape[along] > 1 else part for part in parts]
        slab = slabs[0] if slabs else np.zeros(slab_shape)
        for other in slabs[1:]:
            slab = slab + other
        if list(slab.shape) != slab_shape:
            slab = np.broadcast_to(slab, slab_shape)
        for result, keep in zip(results, keeps, strict=True):
            reduced = slab.max(axis=tuple(axis for axis in range(len(shape)) if axis not in keep))
            if along in keep:
                result[_at(keep.index(along), window)] = reduced
            else:
                np.maximum(result, reduced, out=result)
    return results


def _at(axis: int, window: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, window)


def _merged(parts: Sequence[FloatArray]) -> list[FloatArray]:
    """The same sum with as few parts as can be without one that is larger than those there are."""
    merged: list[FloatArray] = []
    for part in sorted(parts, key=lambda part: -part.size):
        for i, wider in enumerate(merged):
            if all(a in (1, b) for a, b in zip(part.shape, wider.shape, strict=True)):
                merged[i] = wider + part
                break
        else:
            merged.append(part)
    return merged


def _upward(recipe: Recipe, tables: Tables) -> tuple[dict[int, list[FloatArray]], dict[int, FloatArray]]:
    """{variable: parts of its join} and {variable: message, over its join without it}."""
    parts: dict[int, list[FloatArray]] = {v: [] for v in recipe.order}
    messages: dict[int, FloatArray] = {}
    for scope, table in tables.items():
        home = recipe.homes[scope]
        parts[home].append(recipe.part(home, table, scope))
    for v in recipe.order:
        join, parent = recipe.joins[v], recipe.parents[v]
        parts[v] = _merged(parts[v])
        (messages[v],) = _projections(parts[v], recipe.shape(join), [tuple(range(1, len(join)))])
        if parent is not None:
            parts[parent].append(recipe.part(parent, messages[v], join[1:]))
    return parts, messages


def _total(recipe: Recipe, messages: Mapping[int, FloatArray]) -> float:
    return math.fsum(float(messages[v]) for v in recipe.order if recipe.parents[v] is None)


def maximise(recipe: Recipe, tables: Tables) -> tuple[float, tuple[int, ...]]:
    """The largest sum of the tables and an assignment that has it; ties go to the smallest option. -inf: forbidden."""
    parts, messages = _upward(recipe, tables)
    chosen: dict[int, int] = {}
    for v in reversed(recipe.order):
        column = np.zeros(recipe.sizes[v])
        for part in parts[v]:
            rest = zip(recipe.joins[v][1:], part.shape[1:], strict=True)
            place: tuple[Any, ...] = (slice(None), *(0 if size == 1 else chosen[u] for u, size in rest))
            column = column + part[place]
        chosen[v] = int(np.argmax(column))
    return _total(recipe, messages), tuple(chosen[v] for v in range(len(recipe.sizes)))


def max_marginals(recipe: Recipe, tables: Tables) -> dict[Scope, FloatArray]:
    """For each table's scope and each variable: the largest sum with that combination of options; -inf: none."""
    parts, messages = _upward(recipe, tables)
    total = _total(recipe, messages)
    asked: dict[int, list[Scope]] = {v: [(v,)] for v in recipe.order}
    for scope, home in recipe.homes.items():
        if scope != (home,):
            asked[home].append(scope)
    for v, parent in recipe.parents.items():
        if parent is not None:
            asked[parent].append(recipe.joins[v][1:])
    found: dict[Scope, FloatArray] = {}
    for v in reversed(recipe.order):
        join = recipe.joins[v]
        above = found[join[1:]] if join[1:] else np.array(total)
        with np.errstate(invalid="ignore"):
            outside = np.asarray(above - messages[v])
        outside = np.where(np.isnan(outside), -np.inf, outside)
        keeps = [scope for scope in dict.fromkeys(asked[v]) if scope not in found]
        axes = [tuple(sorted(join.index(u) for u in scope)) for scope in keeps]
        whole = _merged([*parts[v], outside.reshape([1, *recipe.shape(join[1:])])])
        for scope, kept, table in zip(keeps, axes, _projections(whole, recipe.shape(join), axes), strict=True):
            order = [join[axis] for axis in kept]
            found[scope] = table.transpose([order.index(u) for u in scope])
    wanted: dict[Scope, int] = {**recipe.homes, **{(v,): v for v in recipe.order}}
    return {scope: found[scope] for scope in wanted}
