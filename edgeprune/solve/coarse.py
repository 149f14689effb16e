"""Elimination over thousands of options: options are taken together to cells, and only cells that matter are split.

The table of a cell holds the largest entry of what is in it, so that the max-marginals of cells bound those of their
options from above. What stays below a score that is reached already goes; the rest gets finer cells, until single
options are few enough to be eliminated exactly. Before that, each table hands to its single variables what it says next
to a good assignment (a reparametrisation; Wainwright and Jordan 2008, section 8.4.1 has the name): what is left in the
tables of several variables is small near that assignment, and so is what a cell gives away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.solve import elimination
from edgeprune.solve.elimination import Recipe, Scope, Tables, elimination_recipe, max_marginals, maximise
from edgeprune.solve.model import Model, Numbers, restrict
from edgeprune.solve.problem import BoolArray, FloatArray, IntArray

WORK = (1 << 23, 1 << 26, 1 << 29)
"""Entries an elimination over cells may have; the next where cells of the one before rule out too little."""
PROGRESS = 0.9
MOST_CELLS = 1 << 9
FEWEST_CELLS = 8
WINDOWS = 4


@dataclass(frozen=True, kw_only=True)
class Narrowed:
    """What may still reach the threshold (None: nothing), and the largest weighted sum that anything has.

    recipe: of the model, None where it is still too large for exact elimination.
    """

    model: Model | None
    recipe: Recipe | None
    bound: float


def rounding_of(tables: Tables) -> float:
    """How far a sum of one entry of each table may be off in float64, in any order of summation, generously."""
    largest = sum(
        float(np.abs(table, where=table > -np.inf, out=np.zeros_like(table)).max()) for table in tables.values()
    )
    return 4 * float(np.finfo(np.float64).eps) * (len(tables) + 8) * largest


def anchored(tables: Tables, at: Numbers) -> dict[Scope, FloatArray]:
    """The same sums; tables of several variables hand to those of one what they say with the others at `at`."""
    found: dict[Scope, FloatArray] = {(v,): table.copy() for (v, *others), table in tables.items() if not others}
    for scope, table in tables.items():
        if len(scope) == 1:
            continue
        place = tuple(at[v] for v in scope)
        corner = float(table[place]) if table[place] > -np.inf else 0.0
        rest = table.copy()
        for axis, v in enumerate(scope):
            line = table[tuple(slice(None) if i == axis else place[i] for i in range(len(scope)))] - corner
            line = np.where(line > -np.inf, line, 0.0)
            found[(v,)] = found[(v,)] + line if (v,) in found else line
            rest -= line.reshape([-1 if i == axis else 1 for i in range(len(scope))])
        found[scope] = rest
    return found


def _cells(sizes: Sequence[int], count: int) -> list[IntArray]:
    """Per variable the first option of each cell; option 0, which may mean "gone", is a cell of its own."""
    found = []
    for size in sizes:
        even = 1 + np.floor(np.arange(count - 1) * (size - 1) / (count - 1)).astype(np.int64)
        found.append(np.arange(size) if size <= count else np.concatenate([[0], even]))
    return found


def _finest(sizes: Sequence[int], scopes: Tables, work: int) -> tuple[list[IntArray], Recipe] | None:
    """The finest cells that can be eliminated within the work."""
    count = MOST_CELLS
    while count >= FEWEST_CELLS:
        recipe = elimination_recipe([min(size, count) for size in sizes], scopes, work)
        if recipe is not None:
            return _cells(sizes, count), recipe
        count = count * 3 // 4
    return None


def _gathered(tables: Tables, starts: Sequence[IntArray], sizes: Sequence[int]) -> dict[Scope, FloatArray]:
    """The largest entry of each combination of cells."""
    found = {}
    for scope, table in tables.items():
        for axis, v in enumerate(scope):
            if len(starts[v]) < sizes[v]:
                table = np.maximum.reduceat(table, starts[v], axis=axis)
        found[scope] = table
    return found


def narrowed(model: Model, weights: FloatArray, threshold: float, anchor: Numbers) -> Narrowed:
    """Take out options that no assignment with a weighted sum of at least `threshold` has, as few passes as needed.

    `bound` is at least the largest weighted sum of all assignments that reach the threshold, -inf where none does.
    """
    bound = np.inf
    for work in WORK:
        while (recipe := model.recipe()) is None:
            tables = anchored(model.weighted(weights), anchor)
            cells = _finest(model.sizes, tables, work)
            if cells is None:
                break
            starts, coarse = cells
            marginals = max_marginals(coarse, _gathered(tables, starts, model.sizes))
            first = marginals[(coarse.order[-1],)]
            bound = min(bound, float(first.max()) + rounding_of(tables))
            keep: dict[Scope, BoolArray] = {
                (v,): np.repeat(marginals[(v,)] >= threshold, np.diff([*start, size]))
                for v, (start, size) in enumerate(zip(starts, model.sizes, strict=True))
            }
            smaller, choice = restrict(model, keep), model.choice(anchor)
            if smaller is None:
                return Narrowed(model=None, recipe=None, bound=-np.inf)
            stalled = sum(smaller.sizes) > PROGRESS * sum(model.sizes)
            model, anchor = smaller, smaller.nearest(choice)
            if stalled:
                break
        if recipe is not None:
            break
    return Narrowed(model=model, recipe=model.recipe(), bound=bound)


def sampled(model: Model, keep: Sequence[Numbers]) -> Model | None:
    """Some options of each variable, evenly spread and those of `keep`, so few that elimination is exact."""
    count = MOST_CELLS
    while count >= FEWEST_CELLS:
        masks: dict[Scope, BoolArray] = {}
        for v, size in enumerate(model.sizes):
            mask = np.zeros(size, dtype=np.bool_)
            mask[np.unique(np.append(np.round(np.linspace(0, size - 1, min(count, size))), 1 % size)).astype(int)] = (
                True
            )
            mask[[numbers[v] for numbers in keep]] = True
            masks[(v,)] = mask
        smaller = restrict(model, masks)
        if smaller is not None and smaller.recipe(elimination.LARGEST_SUM // 2) is not None:
            return smaller
        count //= 2
    return None


def _window(model: Model, around: Numbers) -> Model | None:
    """Options next to those of an assignment (and option 0), as many as can be eliminated quickly."""
    radius = MOST_CELLS
    while radius >= 2:
        keep: Mapping[Scope, BoolArray] = {
            (v,): (np.abs(np.arange(size) - around[v]) <= radius * size // MOST_CELLS // 2 + 1) | (np.arange(size) == 0)
            for v, size in enumerate(model.sizes)
        }
        smaller = restrict(model, keep)
        if smaller is not None and smaller.recipe(elimination.LARGEST_SUM // 2) is not None:
            return smaller
        radius //= 2
    return None


def near_maximum(model: Model, weights: FloatArray, start: Numbers) -> Numbers:
    """An assignment whose weighted sum is large: exact within a window that moves along, from a start."""
    best, score = start, float(weights @ model.totals(start))
    for _ in range(WINDOWS):
        window = _window(model, best)
        recipe = None if window is None else window.recipe()
        if window is None or recipe is None:
            break
        _, found = maximise(recipe, window.weighted(weights))
        numbers = model.numbers(window.choice(found))
        assert numbers is not None
        new = float(weights @ model.totals(numbers))
        if not new > score:
            break
        best, score = numbers, new
    return best


def core(model: Model, weights: FloatArray, threshold: float, anchor: Numbers) -> Narrowed:
    """Only the combinations that some assignment with a weighted sum of at least the threshold uses.

    Where elimination stays too large, only what cells of options could tell.
    """
    found = narrowed(model, weights, threshold, anchor)
    if found.model is None or found.recipe is None:
        return found
    tables = found.model.weighted(weights)
    marginals = max_marginals(found.recipe, tables)
    slack = rounding_of(tables)
    bound = min(found.bound, float(marginals[(0,)].max()) + slack) if marginals else found.bound
    smaller = restrict(found.model, {scope: table >= threshold - slack for scope, table in marginals.items()})
    return Narrowed(model=smaller, recipe=None if smaller is None else smaller.recipe(), bound=bound)
