"""Which columns share a group of four: a permutation of input channels that raises what the 2:4 pattern keeps.

After Pool & Yu 2021, Channel permutations for N:M sparsity, NeurIPS 34: swaps of two columns between two groups, the
best ones first, until none raises the kept magnitude; then from a few perturbed orders again. Up to `EXACT` columns all
partitions are tried.

Legend: S [C, R] scores (magnitudes), one row a column of the weights, R its entries; a *hole* is a group without one of
its columns: with r1 ≥ r2 the largest two of the three that are left, a column y in the hole makes the group keep
Σ_r r1 + max(r2, y). So all swaps are known from one [C, C] table of holes and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch

Order = npt.NDArray[np.int64]
Table = npt.NDArray[np.float64]
M = 4
EXACT = 8
"""Columns up to which all partitions are tried: 35 of them."""
WORK = 1.5e10
"""Comparisons of one search, about: ten seconds of one core."""
SWEEP = 2e9
"""Comparisons of one table; with more entries than that allows, evenly spaced ones stand for all."""
ESCAPES = 12
"""How often the search starts again from a perturbed order, at most."""


def best_order(scores: torch.Tensor, *, seed: int = 0, work: float = WORK) -> list[int]:
    """An order of the columns of scores [R, C], C a multiple of 4: each four in turn share a group.

    Never worse than the order given, and that itself where nothing is better. Deterministic.
    """
    entries, columns = scores.shape
    if columns % M:
        raise ValueError(f"{columns} columns are no multiple of {M}")
    given = list(range(columns))
    if columns <= EXACT:
        return max((given, *partitions(given)), key=lambda order: kept(scores, order))
    step = max(1, int(np.ceil(entries * columns**2 / min(SWEEP, work / 4))))
    S = scores[::step].T.contiguous().float()
    rng = np.random.default_rng(seed)
    best, spent = _descended(S, np.arange(columns), work)
    value = kept(S.T, best.tolist())
    for _ in range(ESCAPES):
        if spent >= work:
            break
        order, more = _descended(S, _perturbed(best, rng), work - spent)
        spent += more
        if (reached := kept(S.T, order.tolist())) > value:
            best, value = order, reached
    found = _sorted(best)
    return found if kept(scores, found) > kept(scores, given) else given


def kept(scores: torch.Tensor, order: list[int]) -> float:
    """Sum of the two largest scores of every entry and group of four, in float64."""
    grouped = scores[:, order].double().reshape(len(scores), -1, M)
    return float(grouped.topk(2, dim=-1).values.sum())


def partitions(columns: list[int]) -> Iterator[list[int]]:
    """Every way to put columns into groups of four, as an order."""
    if not columns:
        yield []
        return
    first, *rest = columns
    for others in combinations(rest, M - 1):
        left = [column for column in rest if column not in others]
        for behind in partitions(left):
            yield [first, *others, *behind]


def _descended(S: torch.Tensor, order: Order, work: float) -> tuple[Order, float]:
    """The order after swaps that each raise what is kept, and the comparisons that took."""
    order = order.copy()
    columns, entries = S.shape
    table = np.empty((columns, columns))  # [x, y]: what x's group keeps with y in the place of x
    changed = np.arange(columns // M)
    spent = 0.0
    while True:
        for group in changed:
            _fill(table, S, order[M * group : M * group + M])
        spent += len(changed) * M * columns * entries
        changed = _swap(table, order)
        if not len(changed) or spent >= work:
            return order, spent


def _fill(table: Table, S: torch.Tensor, members: Order) -> None:
    """The rows of the table for the holes of one group."""
    own = S[torch.from_numpy(members)]
    for place, column in enumerate(members):
        left = torch.cat([own[:place], own[place + 1 :]])
        largest, second = left.topk(2, dim=0).values
        table[column] = (torch.maximum(S, second).sum(1) + largest.sum()).numpy()


def _swap(table: Table, order: Order) -> Order:
    """Make the best swaps between groups, none of which takes part in two, in place; gives the groups changed."""
    columns = len(order)
    group_of = np.empty(columns, dtype=np.int64)
    place_of = np.empty(columns, dtype=np.int64)
    place_of[order] = np.arange(columns)
    group_of[order] = np.arange(columns) // M
    now = table.diagonal()
    gain = table + table.T - now[:, None] - now[None, :]
    gain[group_of[:, None] >= group_of[None, :]] = 0.0  # each pair of groups once
    least = 1e-6 * max(float(now.max()), 1e-30)
    candidates = np.flatnonzero(gain.ravel() > least)
    candidates = candidates[np.argsort(-gain.ravel()[candidates], kind="stable")]
    used: set[int] = set()
    for x, y in zip(*(index.tolist() for index in np.divmod(candidates, columns)), strict=True):
        pair = {int(group_of[x]), int(group_of[y])}
        if not used & pair:
            used |= pair
            order[place_of[[x, y]]] = y, x
    return np.array(sorted(used), dtype=np.int64)


def _perturbed(order: Order, rng: np.random.Generator) -> Order:
    """A tenth of the columns, at least four, change places."""
    moved: Order = order.copy()
    places = rng.choice(len(order), size=max(M, len(order) // 10), replace=False)
    moved[places] = moved[rng.permutation(places)]
    return moved


def _sorted(order: Order) -> list[int]:
    """The same groups, ascending inside and by their first column: a plan that is diffed shows what moved."""
    groups = sorted(sorted(group) for group in order.reshape(-1, M).tolist())
    return [column for group in groups for column in group]
