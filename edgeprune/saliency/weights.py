"""Criteria that look at the weights alone.

Of a group that couples several layers every producer and consumer counts the same: a channel has a share of the
layer's norm in each, and its value is the mean of these shares, so that the values of a group sum to 1. Across layers,
the same share of the weights is worth the same, however wide or large the layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from edgeprune.data import Data
from edgeprune.graph.structure import Group, Member, ModelGraph
from edgeprune.saliency.members import contractions, from_channels, index_table, mean_of_shares, producers, slice_sums
from edgeprune.saliency.registry import Saliency, Values, criterion

SHARE = "share of a layer"


@criterion(source="the baseline that a criterion must beat")
def random(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Uniform numbers, divided by the group's number of channels.

    Blocks are worth what `l2` counts for them, with one uniform number for the layer that no group reaches.
    """
    channels = {}
    for group in sorted(graph.groups, key=lambda g: g.id):
        generator = np.random.default_rng([seed, *group.id.encode()])
        channels[group.id] = generator.random(group.num_channels) / group.num_channels
    rest = {b.id: float(np.random.default_rng([seed, *f"block {b.id}".encode()]).random()) for b in graph.blocks}
    return from_channels(graph, channels, unit=SHARE, rest=rest)


@criterion(source="Li et al. 2017, Pruning filters for efficient ConvNets: Σ |w|", normalise="layers")
def l1(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Sum of magnitudes of the channel's slices, as a share of its layer's; producers and consumers."""
    return _of_shares(graph, model, torch.abs)


@criterion(
    source="magnitude pruning: Han et al. 2015, Learning both weights and connections; squared, by channel",
    normalise="layers",
)
def l2(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Sum of squares of the channel's slices, as a share of its layer's; producers and consumers.

    For every producer and consumer the sum of squares of a channel's slice is divided by that of all the group's
    slices; the channel's value is the mean over these members. A block is worth what is inside of it: its channels, the
    blocks within, and 1 (one whole layer) where it has contractions that no group inside reaches, as in attention whose
    heads are refused.
    """
    return _of_shares(graph, model, torch.square)


def _of_shares(graph: ModelGraph, model: torch.nn.Module, energy: Callable[[torch.Tensor], torch.Tensor]) -> Saliency:
    channels = {}
    for group in graph.groups:
        channels[group.id] = mean_of_shares(
            slice_sums(energy(weight_of(model, member)), member, group) for member in contractions(group)
        )
    return from_channels(graph, channels, unit=SHARE, rest={block.id: 1.0 for block in graph.blocks})


def weight_of(model: torch.nn.Module, member: Member) -> torch.Tensor:
    """float64, as it lies in the model."""
    return model.get_parameter(member.parameter).detach().double()


@criterion(source="He et al. 2019, Filter pruning via geometric median: Σ_j |x - x_j|₂", normalise="layers")
def fpgm(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Sum of distances from the channel's filter to all filters of its layer, as a share of the layer's; producers.

    The filter near the geometric median is what the others can stand in for. A channel of several rows (a head) is one
    long filter.
    """
    channels = {}
    for group in graph.groups:
        channels[group.id] = mean_of_shares(_distances(model, member, group) for member in producers(group))
    return from_channels(graph, channels, unit=SHARE, rest={block.id: 1.0 for block in graph.blocks})


def _distances(model: torch.nn.Module, member: Member, group: Group) -> torch.Tensor:
    rows = weight_of(model, member).movedim(member.dim, 0)
    rows = torch.cat([rows.reshape(len(rows), -1), rows.new_zeros(1, rows[0].numel())])  # row -1: none
    filters = rows[index_table(member.channels, group.num_channels)].flatten(1)
    return torch.cdist(filters, filters).sum(1)


@criterion(source="Lee et al. 2021, Layer-adaptive sparsity for magnitude-based pruning: w_u² / Σ_{v ≥ u} w_v²")
def lamp(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """The channel's share of the weights (`l2`), divided by the shares of all channels that are worth no less.

    In (0, 1], 1 for the best channel of every group. The score was made to be ranked over all layers; as a sum over
    channels, which the solver takes it for, it isn't derived from anything.
    """
    shares = l2(graph, model, data, seed).channels
    channels = {name: _lamp(values) for name, values in shares.items()}
    return from_channels(graph, channels, unit="LAMP score")


def _lamp(values: Values) -> Values:
    ordered = np.sort(values)
    at_least = np.append(np.cumsum(ordered[::-1])[::-1], 0.0)  # [i]: the sum of ordered[i:]
    rest = at_least[np.searchsorted(ordered, values, side="left")]
    scores: Values = np.divide(values, rest, out=np.zeros_like(values), where=rest > 0)
    return scores
