"""In which order the kept channels of a group may lie: any, where every tensor lays them out in equal strides.

A permutation of a group's channels is a change of names: made in all tensors alike it changes no output. It can be made
where each dimension holds all channels of the group, index i of channel c at start + c · stride + offset_i. Then every
operator between treats them alike. Behind a slice, a shuffle, or where two groups share an index, it isn't made.
"""

from __future__ import annotations

import numpy as np

from edgeprune.graph.structure import Group, Indices, ModelGraph


def why_not_ordered(graph: ModelGraph, group: Group) -> str | None:
    """Why the channels of a group stay in their order; None where they may lie in any other."""
    starts = np.cumsum([0, *(each.num_channels for each in graph.groups)])
    place = [each.id for each in graph.groups].index(group.id)
    first, last = int(starts[place]), int(starts[place + 1])
    for node, dims in graph.channels.items():
        for dim, rows in enumerate(dims):
            own = (rows >= first) & (rows < last)
            if not own.any():
                continue
            where = f"dimension {dim} of {graph.program.parameters.get(node, node)}"
            if ((rows >= 0) & own.any(axis=0)).sum(axis=0).max() > 1:
                return f"its channels share the indices of {where} with another group's"
            channels = np.where(own, rows - first, -1).max(axis=0)
            table = indices_of(channels, group.num_channels)
            if table is None or not _is_even(table):
                return f"its channels don't lie in equal strides in {where}"
    return None


def indices_of(channels: Indices, count: int) -> Indices | None:
    """int64 [count, indices of a channel], ascending, where every channel has as many; else None."""
    own = np.flatnonzero(channels >= 0)
    if len(own) % count or (np.bincount(channels[own], minlength=count) != len(own) // count).any():
        return None
    return own[np.argsort(channels[own], kind="stable")].reshape(count, -1).astype(np.int64)


def _is_even(table: Indices) -> bool:
    offsets = table - table[:, :1]
    strides = np.diff(table[:, 0])
    return bool((offsets == offsets[0]).all() and (len(strides) == 0 or (strides == strides[0]).all()))


def moved_indices(channels: Indices, kept: Indices, count: int) -> Indices:
    """int64 [size]: the index that comes to each place when kept[j] comes to where the j-th smallest of them lies.

    `channels` are those of a dimension's indices, -1 for none, which stay where they are.
    """
    table = indices_of(channels, count)
    assert table is not None, "an order that why_not_ordered refuses"
    places: Indices = np.arange(len(channels), dtype=np.int64)
    places[table[np.sort(kept)]] = table[kept]
    return places
