"""Bookkeeping of coupling: which indices of which dimensions live or die together.

An *atom* is a decision: it lives or dies as a whole. A dimension of a tensor is an int64 array [k, size]: the index i
lives if and only if all atoms in column i live (-1: no atom there). Most dimensions have one row; two where a
projection's features are, say, heads x width: the feature (h, w) lives if head h and width w both do. Such a *product*
comes up when an atom for each feature turns out to be two decisions; the atom is then *split*, everywhere at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgeprune.graph.structure import Indices, Refusal

Number = TypeVar("Number", bound=np.integer[Any])
FREE = -1
"""An index that no atom decides on: batch, height, a constant."""
_LAST = np.iinfo(np.int64).max
_MOST_FACTORS = 6


@lru_cache(maxsize=4096)
def no_atoms(size: int) -> Indices:
    """A dimension without atoms; read-only, one object a size."""
    dim = np.full((1, size), FREE, dtype=np.int64)
    dim.setflags(write=False)
    return dim


def is_free(dim: Indices) -> bool:
    """Whether no index of the dimension has an atom."""
    return not dim.size or bool(dim[0, 0] == FREE and (dim == FREE).all())


def distinct(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """The different ones, ascending, [n]; by sorting, several times as fast as `numpy.unique` for many integers."""
    ordered = np.sort(values)
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def concatenated(dims: list[Indices]) -> Indices:
    """Dimensions one after the other."""
    rows = max(len(dim) for dim in dims)
    return np.concatenate([_padded(dim, rows) for dim in dims], axis=1)


def _padded(dim: Indices, rows: int) -> Indices:
    if len(dim) == rows:
        return dim
    return np.concatenate([dim, np.full((rows - len(dim), dim.shape[1]), FREE, dtype=np.int64)])


@dataclass
class Atoms:
    """A union-find over atoms with splits, the atoms that must stay with the reason, and the parameters' dimensions."""

    parent: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    factors: Indices = field(default_factory=lambda: np.zeros((0, _MOST_FACTORS), dtype=np.int64))
    reason: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    count: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    numbers: dict[Refusal, int] = field(default_factory=dict)
    dims: dict[tuple[str, int], Indices] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    statistics: list[Indices] = field(default_factory=list)
    settled: Indices | None = None

    def new(self, size: int) -> Indices:
        """A dimension of fresh atoms, one an index: int64 [1, size]."""
        start, self.count = self.count, self.count + size
        self.settled = None
        if self.count > len(self.parent):
            room = max(1024, self.count * 2)
            grown = np.arange(room, dtype=np.int64)
            grown[:start] = self.parent[:start]
            factors = np.full((room, _MOST_FACTORS), FREE, dtype=np.int64)
            factors[:start] = self.factors[:start]
            reason = np.full(room, -1, dtype=np.int32)
            reason[:start] = self.reason[:start]
            self.parent, self.factors, self.reason = grown, factors, reason
        return np.arange(start, self.count, dtype=np.int64)[None]

    def of_parameter(self, name: str, shape: tuple[int, ...]) -> tuple[Indices, ...]:
        """The atoms of every dimension of a parameter or buffer; the same ones each time it is read."""
        for dim, size in enumerate(shape):
            if (name, dim) not in self.dims:
                self.dims[name, dim] = self.new(size)
        return tuple(self.dims[name, dim] for dim in range(len(shape)))

    def roots(self, dim: Indices, *, whole: bool = False) -> Indices:
        """The dimension in its canonical form: representatives, splits carried out, sorted, each once a column.

        Atoms that must stay are left out beside others, unless `whole`.
        """
        if is_free(dim):
            return dim[:1]
        rows = self._carried_out(dim) if self.settled is None else self._looked_up(dim, self.settled)
        if len(rows) == 1:
            return rows
        rows = _each_once(rows)
        several = (rows != FREE).sum(axis=0) > 1
        if several.any() and not whole:  # what must stay decides nothing beside what need not
            fixed = (rows != FREE) & (self.reason[np.where(rows == FREE, 0, rows)] >= 0)
            all_fixed = fixed.sum(axis=0) == (rows != FREE).sum(axis=0)
            rows = np.where(fixed & several & ~all_fixed, FREE, rows)
            rows[1:, several & all_fixed] = FREE
            rows = _pushed_up(rows)
        used = (rows != FREE).any(axis=1)
        used[0] = True
        result: Indices = rows[used]
        return result

    def settle(self) -> None:
        """Carry out all splits once for many readings; the next union or split undoes it."""
        if self.settled is None and self.count:
            self.settled = self.roots(np.arange(self.count, dtype=np.int64)[None], whole=True)

    @staticmethod
    def _looked_up(dim: Indices, settled: Indices) -> Indices:
        rows: Indices = np.where(dim == FREE, FREE, settled[:, dim]).reshape(-1, dim.shape[1])
        return rows if len(rows) == 1 else rows[(rows != FREE).any(axis=1)]

    def _carried_out(self, dim: Indices) -> Indices:
        """The representatives with their splits carried out, in no order."""
        rows = self._find(dim)
        while True:
            split = (rows != FREE) & (self.factors[rows, 0] != FREE)
            if not split.any():
                return rows
            parts = self.factors[np.where(split, rows, 0)]  # [k, size, most factors]
            more = [np.where(split, parts[..., i], FREE) for i in range(_MOST_FACTORS)]
            rows = np.concatenate([np.where(split, FREE, rows), *(row for row in more if (row != FREE).any())])
            rows = _each_once(self._find(rows))
            rows = rows[(rows != FREE).any(axis=1)]

    def _find(self, rows: Indices) -> Indices:
        free = rows == FREE
        found = self.parent[np.where(free, 0, rows)] if self.count else rows
        while True:
            above = self.parent[found] if self.count else found
            if (above == found).all():
                break
            found = self.parent[above]
        return np.where(free, FREE, found)

    def unite(self, a: Indices, b: Indices, refusal: Refusal) -> Indices:
        """State that index i of one dimension lives when index i of the other does; gives the common dimension.

        Where one side has atoms and the other none, the atoms must stay, for `refusal`.
        """
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"dimensions of {a.shape[1]} and {b.shape[1]} indices can't be tied")
        if a is b or (a.shape == b.shape and (a == b).all()):
            return a
        joined = self._joined(a, b)
        if joined is None:
            joined = self._joined(b, a)
        if joined is not None:
            return joined
        before = b""
        while True:
            left, right = self.roots(a), self.roots(b)
            rows = max(len(left), len(right))
            left, right = _padded(left, rows), _padded(right, rows)
            differ = (left != right).any(axis=0)
            one_free = differ & ((left[0] == FREE) | (right[0] == FREE))
            self.fix(left[:, one_free], refusal)
            self.fix(right[:, one_free], refusal)
            todo = differ & ~one_free
            if not todo.any():
                free = left[0] == FREE
                return np.where(free[None], right, left)
            state = left.tobytes() + right.tobytes()
            if state == before:  # no step leads on: all that differs must stay
                for atom in distinct(np.concatenate([left[:, todo], right[:, todo]]).ravel()).tolist():
                    if atom != FREE:
                        self.fix(np.array([[atom]], dtype=np.int64), refusal)
                return left
            before = state
            self.settled = None
            self._unite_columns(left[:, todo], right[:, todo], refusal)

    def _joined(self, fresh: Indices, other: Indices) -> Indices | None:
        """The common dimension where one is of atoms that nothing is known of yet, a parameter's mostly; else None."""
        start, stop = int(fresh[0, 0]), int(fresh[0, -1]) + 1
        if len(fresh) > 1 or start < 0 or stop - start != fresh.shape[1] or is_free(other):
            return None
        own = fresh[0]
        if (own[1:] - own[:-1] != 1).any() or (self.parent[start:stop] != own).any():
            return None
        if (self.factors[start:stop, 0] != FREE).any() or (self.reason[start:stop] >= 0).any():
            return None
        self.settled = None
        rows = self.roots(other)
        if (rows[0] == FREE).any() or ((rows >= start) & (rows < stop)).any():
            return None
        if len(rows) == 1 and rows.max() < start:  # the least of a class represents it
            self.parent[start:stop] = rows[0]
        elif len(rows) > 1 and (rows[1] != FREE).all() and len(rows) <= _MOST_FACTORS:
            self.factors[start:stop, : len(rows)] = rows.T
        else:
            return None
        return rows

    def _unite_columns(self, left: Indices, right: Indices, refusal: Refusal) -> None:
        """One step towards equal columns: what both have is put aside, the rest is merged, split or fixed."""
        left, right = left.copy(), right.copy()
        for i in range(len(left)):  # common atoms
            same = (left[i] != FREE) & (right == left[i]).any(axis=0)
            right[(right == left[i]) & same] = FREE
            left[i][same] = FREE
        left, right = _pushed_up(left), _pushed_up(right)
        n_left, n_right = (left != FREE).sum(axis=0), (right != FREE).sum(axis=0)
        inside = (n_left == 0) | (n_right == 0)  # one side asks for more: that must always be there
        if inside.any():
            self.fix(left[:, inside], refusal)
            self.fix(right[:, inside], refusal)
        split = ~inside & ((n_left == 1) ^ (n_right == 1))
        alike = ~inside & (n_left == n_right)
        rest = ~inside & ~split & ~alike
        if split.any():
            single = np.where(n_left == 1, left[0], right[0])[split]
            product = np.where(n_left == 1, right, left)[:, split]
            self._split(single, product)
        elif alike.any():
            self._pair(left[:, alike], right[:, alike])
        elif rest.any():
            self.fix(left[:, rest], refusal)
            self.fix(right[:, rest], refusal)

    def _pair(self, left: Indices, right: Indices) -> None:
        """Merge products of equally many atoms factor by factor: those that vary alike, else in their order."""
        order = list(range(len(right)))
        if len(left) > 1:
            patterns = [_pattern(row) for row in right]
            for i, row in enumerate(left):
                own = _pattern(row)
                j = next((j for j in range(i, len(right)) if (patterns[order[j]] == own).all()), i)
                order[i], order[j] = order[j], order[i]
        for i, j in enumerate(order):
            both = (left[i] != FREE) & (right[j] != FREE)
            self._merge(left[i][both], right[j][both])

    def _split(self, single: Indices, product: Indices) -> None:
        """From now on each of these atoms is the product beside it; of several for one atom the first counts."""
        single, first = np.unique(single, return_index=True)
        product = product[:, first]
        inside = (product == single).any(axis=0)
        assert not inside.any(), "an atom that is part of its own product was put aside"
        targets = distinct(product[product != FREE])
        clash = np.isin(single, targets)  # a product may not hold an atom that is split in the same step
        if clash.all():
            clash[0] = False
        single, product = single[~clash], product[:, ~clash]
        self.factors[single, : len(product)] = product.T
        for row in product:
            heir = (row != FREE) & (self.reason[single] >= 0)
            known = heir & (self.reason[np.where(heir, row, 0)] < 0)
            self.reason[row[known]] = self.reason[single[known]]

    def _merge(self, a: Indices, b: Indices) -> None:
        """Make one class of a[i] and b[i], for every i."""
        high, low = np.maximum(a, b), np.minimum(a, b)
        if len(distinct(high)) == len(high) and not np.isin(high, low).any():
            self.parent[high] = low
            heir = (self.reason[high] >= 0) & (self.reason[low] < 0)
            self.reason[low[heir]] = self.reason[high[heir]]
            return
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            p, q = self._root(x), self._root(y)
            if p != q:
                p, q = min(p, q), max(p, q)
                self.parent[q] = p
                if self.reason[p] < 0:
                    self.reason[p] = self.reason[q]

    def _root(self, atom: int) -> int:
        while self.parent[atom] != atom:
            atom = int(self.parent[atom])
        return atom

    def fix(self, dim: Indices, refusal: Refusal) -> None:
        """State that these atoms must stay, and why; the first reason given is kept."""
        if is_free(dim):
            return
        number = self.numbers.setdefault(refusal, len(self.refusals))
        if number == len(self.refusals):
            self.refusals.append(refusal)
        rows = self.roots(dim)
        atoms = rows[rows != FREE]
        atoms = atoms[self.reason[atoms] < 0]
        self.reason[atoms] = number

    def must_stay(self, atom: int) -> Refusal | None:
        """Why the class of this representative must stay, None if it need not."""
        number = int(self.reason[atom])
        return self.refusals[number] if number >= 0 else None

    def divided(self, dim: Indices, shape: tuple[int, ...], refusal: Refusal) -> list[Indices]:
        """A dimension seen as several, outermost first: the indices of `dim` under `shape`.

        A row that varies along one of the new dimensions goes there. One that varies along several becomes a product.
        """
        result = [np.zeros((0, size), dtype=np.int64) for size in shape]

        def add(axis: int, row: Indices) -> None:
            result[axis] = np.concatenate([result[axis], row.reshape(1, -1)])

        for row in self.roots(dim):
            if (row == FREE).all():
                continue
            cube = row.reshape(shape)
            varies = [i for i in range(len(shape)) if (cube != cube.take([0], axis=i)).any()]
            if len(varies) > 1:
                fresh = {axis: self.new(shape[axis]) for axis in varies}
                product = np.concatenate([_spread(new, axis, shape) for axis, new in fresh.items()])
                self.unite(row[None], product, refusal)
                for axis, new in fresh.items():
                    add(axis, new[0])
                continue
            axis = varies[0] if varies else next((i for i, size in enumerate(shape) if size > 1), 0)
            index: list[int | slice] = [0] * len(shape)
            index[axis] = slice(None)
            add(axis, cube[tuple(index)])
        return [dim if len(dim) else no_atoms(size) for dim, size in zip(result, shape, strict=True)]


def _pushed_up(columns: Indices) -> Indices:
    """The atoms of every column first, in ascending order."""
    ordered = np.sort(np.where(columns == FREE, _LAST, columns), axis=0)
    return np.where(ordered == _LAST, FREE, ordered)


def _each_once(rows: Indices) -> Indices:
    """The atoms of every column in ascending order, each once."""
    rows = _pushed_up(rows)
    again = (rows[1:] == rows[:-1]) & (rows[1:] != FREE)
    if again.any():
        rows[1:][again] = FREE
        rows = _pushed_up(rows)
    return rows


def _pattern(row: Indices) -> Indices:
    """Numbers that say which entries of a row are equal, by first appearance."""
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    result: Indices = np.argsort(np.argsort(first))[inverse]
    return result


def _spread(dim: Indices, axis: int, shape: tuple[int, ...]) -> Indices:
    """A dimension repeated over the others of `shape`, all flattened: int64 [k, product of shape]."""
    view = [len(dim), *([1] * len(shape))]
    view[axis + 1] = shape[axis]
    wide: Indices = np.broadcast_to(dim.reshape(view), (len(dim), *shape)).reshape(len(dim), -1)
    return wide


def merged(dims: list[Indices]) -> Indices:
    """Several dimensions seen as one, outermost first: an index lives if it does in each of them."""
    shape = tuple(dim.shape[1] for dim in dims)
    rows = [_spread(dim, axis, shape) for axis, dim in enumerate(dims) if not is_free(dim)]
    return np.concatenate(rows) if rows else no_atoms(int(np.prod(shape)))
