"""Sizes of dimensions as functions of the groups' widths."""

from __future__ import annotations

from math import prod

import numpy as np

from edgeprune.graph.structure import Group, Indices, Width


class Widths:
    """Reads the width of a dimension off its channels; the same channels are read once."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self.names = [group.id for group in groups]  # channels are numbered through the groups in this order
        numbers = [np.full(group.num_channels, i, dtype=np.int64) for i, group in enumerate(groups)]
        self.group_of = np.concatenate([*numbers, np.array([-1], dtype=np.int64)])
        self.sizes = {group.id: group.num_channels for group in groups}
        self.known: dict[int, tuple[Indices, Width]] = {}

    def of(self, channels: Indices) -> Width:
        """The width of a dimension with these channels, int64 [k, size].

        A group that repeats unevenly is counted by its average.
        """
        if id(channels) not in self.known:
            self.known[id(channels)] = channels, self._width(channels)
        return self.known[id(channels)][1]

    def torn(self, channels: Indices) -> tuple[str, ...]:
        """The groups of which these indices do not hold every channel equally often."""
        columns, counts = np.unique(np.sort(channels, axis=0), axis=1, return_counts=True)
        groups = self.group_of[columns]
        found: dict[str, None] = {}
        for kind in np.unique(groups, axis=1).T:
            own = (groups == kind[:, None]).all(axis=0)
            term = [self.names[i] for i in kind.tolist() if i >= 0]
            if term and (own.sum() != prod(self.sizes[group] for group in term) or len(set(counts[own])) > 1):
                found.update(dict.fromkeys(term))
        return tuple(found)

    def _width(self, channels: Indices) -> Width:
        groups = np.sort(self.group_of[channels], axis=0)
        if (groups == -1).all():
            return Width(fixed=channels.shape[1])
        columns, counts = np.unique(groups, axis=1, return_counts=True)
        terms = []
        for column, count in zip(columns.T.tolist(), counts.tolist(), strict=True):
            term = tuple(self.names[i] for i in column if i >= 0)
            full = prod(self.sizes[group] for group in term)
            if term and count >= full:
                terms.append((term, count // full))
        terms.sort()
        fixed = channels.shape[1] - sum(times * prod(self.sizes[g] for g in term) for term, times in terms)
        return Width(fixed=fixed, terms=tuple(terms))
