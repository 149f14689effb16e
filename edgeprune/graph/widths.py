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
        size = channels.shape[1]
        if len(channels) == 1 and (channels[0] < 0).all():
            return Width(fixed=size)
        kinds = self._kinds(channels)
        terms = []
        uneven = False
        for kind, own in kinds.items():
            term = tuple(self.names[group] for group in kind)
            full = prod(self.sizes[group] for group in term)
            total = int(own.sum())
            uneven = uneven or len(own) != full or bool((own != own[0]).any())
            if total >= full:
                terms.append((term, total // full))
        terms.sort()
        fixed = size - sum(times * prod(self.sizes[g] for g in term) for term, times in terms)
        touched = {self.names[group] for kind in kinds for group in kind}
        return Width(fixed=fixed, terms=tuple(terms), uneven=tuple(sorted(touched)) if uneven else ())

    def _kinds(self, channels: Indices) -> dict[tuple[int, ...], Indices]:
        """Groups that meet in columns, to how often each of their channels (or pairs of channels) is there."""
        base = len(self.group_of)
        code = np.zeros(channels.shape[1], dtype=np.int64)
        for row in np.sort(channels, axis=0) if len(channels) > 1 else channels:
            code = code * base + (row + 1)
        codes, counts = np.unique(code, return_counts=True)
        groups = []
        for _ in range(len(channels)):
            groups.append(self.group_of[codes % base - 1])
            codes = codes // base
        kind = np.stack(groups[::-1])
        if len(kind) == 1:
            found: dict[tuple[int, ...], Indices] = {}
            for group in np.unique(kind[0]).tolist():
                if group >= 0:
                    found[(group,)] = counts[kind[0] == group]
            return found
        kinds, inverse = np.unique(np.sort(kind, axis=0), axis=1, return_inverse=True)
        return {
            tuple(group for group in column if group >= 0): counts[inverse.ravel() == i]
            for i, column in enumerate(kinds.T.tolist())
            if max(column) >= 0
        }
