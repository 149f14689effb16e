"""Bookkeeping of coupling: an *atom* is one index of one dimension; atoms that must live or die together are united."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgeprune.graph.structure import Indices, Refusal

FREE = -1
"""An index that no group can claim: batch, height, a constant."""


def no_atoms(size: int) -> Indices:
    """A dimension without atoms."""
    return np.full(size, FREE, dtype=np.int64)


@dataclass
class Atoms:
    """A union-find over atoms, the atoms that must stay with the reason, and where parameters' atoms begin."""

    parent: list[int] = field(default_factory=list)
    fixed: dict[int, Refusal] = field(default_factory=dict)
    dims: dict[tuple[str, int], Indices] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)

    def of_parameter(self, name: str, shape: tuple[int, ...]) -> tuple[Indices, ...]:
        """The atoms of every dimension of a parameter or buffer; the same ones each time it is read."""
        for dim, size in enumerate(shape):
            if (name, dim) not in self.dims:
                start = len(self.parent)
                self.parent.extend(range(start, start + size))
                self.dims[name, dim] = np.arange(start, start + size, dtype=np.int64)
        return tuple(self.dims[name, dim] for dim in range(len(shape)))

    def find(self, atom: int) -> int:
        """Representative of an atom's class."""
        parent = self.parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def roots(self, atoms: Indices) -> Indices:
        """Representatives, index by index; `FREE` stays `FREE`."""
        return np.array([self.find(a) if a != FREE else FREE for a in atoms.tolist()], dtype=np.int64)

    def unite(self, a: Indices, b: Indices, refusal: Refusal) -> Indices:
        """Tie two dimensions index by index and give the merged one.

        Where one side is an atom and the other is free, the atom can't be removed: it is fixed for `refusal`.
        """
        if len(a) != len(b):
            raise ValueError(f"dimensions of {len(a)} and {len(b)} indices can't be tied")
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            if x == FREE and y == FREE:
                continue
            if x == FREE or y == FREE:
                self.fixed.setdefault(max(x, y), refusal)
                continue
            p, q = self.find(x), self.find(y)
            if p != q:
                self.parent[max(p, q)] = min(p, q)
        return np.where(a == FREE, b, a)

    def tie(self, atoms: Indices) -> None:
        """Make one class of all given atoms."""
        first = self.find(int(atoms[0]))
        for atom in atoms.tolist()[1:]:
            root = self.find(atom)
            low, high = min(first, root), max(first, root)
            self.parent[high] = low
            first = low

    def fix(self, atoms: Indices, refusal: Refusal) -> None:
        """State that these atoms must stay, and why; the first reason given is kept."""
        for atom in atoms.tolist():
            if atom != FREE:
                self.fixed.setdefault(atom, refusal)

    def reasons(self) -> dict[int, Refusal]:
        """Class representative to the reason why the class must stay."""
        found: dict[int, Refusal] = {}
        for atom, refusal in self.fixed.items():
            found.setdefault(self.find(atom), refusal)
        return found
