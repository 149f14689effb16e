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

        A group of which only some channels are there, or some more often, is counted by its average (`uneven`).
        """
        if id(channels) not in self.known:
            self.known[id(channels)] = channels, self._width(channels)
        return self.known[id(channels)][1]

    def _width(self, channels: Indices) -> Width:
        order = np.argsort(self.group_of[channels], axis=0, kind="stable")
        columns, counts = np.unique(np.take_along_axis(channels, order, axis=0), axis=1, return_counts=True)
        kinds, kind_of = np.unique(self.group_of[columns], axis=1, return_inverse=True)
        terms = []
        uneven = False
        for i, kind in enumerate(kinds.T.tolist()):
            term = tuple(self.names[group] for group in kind if group >= 0)
            own = counts[kind_of.ravel() == i]
            full = prod(self.sizes[group] for group in term)
            if not term:
                continue
            uneven = uneven or len(own) != full or len(set(own.tolist())) > 1
            if own.sum() >= full:
                terms.append((term, int(own.sum()) // full))
        terms.sort()
        fixed = channels.shape[1] - sum(times * prod(self.sizes[g] for g in term) for term, times in terms)
        touched = {self.names[group] for group in np.unique(self.group_of[channels]).tolist() if group >= 0}
        return Width(fixed=fixed, terms=tuple(terms), uneven=tuple(sorted(touched)) if uneven else ())
