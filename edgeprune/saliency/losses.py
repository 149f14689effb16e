"""Criteria that measure: how far the answers move when channels are closed, in nats of KL(dense || closed).

A channel is closed by zeros in the slices that read it; one that only matmuls read, in all that makes it. Statistics of
norms stay as they are, so that for a group that `changes_statistics` this comes near to pruning but isn't the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.func import functional_call

from edgeprune.data import Data
from edgeprune.graph.structure import Group, Indices, ModelGraph
from edgeprune.models import output_tensor
from edgeprune.quality import difference
from edgeprune.saliency.gradients import taylor
from edgeprune.saliency.members import closing
from edgeprune.saliency.reading import Look, frozen, look_at
from edgeprune.saliency.reconstruction import ascending
from edgeprune.saliency.registry import Saliency, Values, criterion

PART = 0.25
"""Share of the samples that losses are measured on."""
CHUNKS = 8
"""Of a group's channels: each is closed at once."""
DEPTHS = (0.25, 0.5, 0.75)
"""Shares of a group's channels, the least valuable first, that are closed for its curve."""
LOSS_BATCH = 32


@criterion(
    source="measured; the oracle of Molchanov et al. 2017, over chunks of channels",
    data="unlabelled",
    granularity="both",
    forward=f"{CHUNKS} a group / 4, + those of `taylor`",
    backward="1",
)
def loss_change(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats that the answers move when the channel is closed, measured over chunks of channels; blocks measured.

    A group's channels are closed in at most 8 chunks of near `taylor` value, each alone; a chunk's channels share what
    was measured by their `taylor` values. In groups of up to 8 channels each is measured by itself.
    """
    first = taylor(graph, model, data, seed)
    measured = Measured(graph, model, look_at(data, seed))
    channels = {}
    for group in graph.groups:
        values = np.zeros(group.num_channels)
        order = np.argsort(first.channels[group.id], kind="stable")
        for chunk in np.array_split(order, min(CHUNKS, group.num_channels)):
            values[chunk] = measured.loss(group, chunk) * _shares(first.channels[group.id][chunk])
        channels[group.id] = values
    return Saliency(channels=channels, blocks=first.blocks, unit="nats", num_samples=first.num_samples)


@criterion(
    source="measured at depths, channels in the order of Theis et al. 2018",
    data="unlabelled",
    granularity="both",
    forward=f"{len(DEPTHS)} a group / 4, + those of `taylor`",
    backward="1",
)
def loss_curve(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats that the answers move with a quarter, half, three quarters of a group closed, made convex; blocks measured.

    Sums of `taylor` underrate deep cuts, whose channels stand in for one another until none is left. The channels close
    in `taylor`'s order; what each depth adds is shared by `taylor`'s values, and behind the last depth these go on at
    its rate. A channel is worth at least what those before it are: so the values' sums are the measured curve where it
    is convex, and above it where it bends down.
    """
    first = taylor(graph, model, data, seed)
    measured = Measured(graph, model, look_at(data, seed))
    channels = {}
    for group in graph.groups:
        order = np.argsort(first.channels[group.id], kind="stable")
        depths = _depths(group.num_channels)
        losses = [measured.loss(group, order[:depth]) for depth in depths]
        channels[group.id] = np.zeros(group.num_channels)
        channels[group.id][order] = curve_values(first.channels[group.id][order], depths, losses)
    return Saliency(channels=channels, blocks=first.blocks, unit="nats", num_samples=first.num_samples)


def _depths(count: int) -> list[int]:
    """Numbers of channels, ascending, from 1 to all but one."""
    return sorted({min(count - 1, max(1, round(count * share))) for share in DEPTHS})


def curve_values(values: Values, depths: Sequence[int], losses: Sequence[float]) -> Values:
    """What each of the channels, in ascending order of `values`, is worth by the losses at these depths."""
    steps = np.zeros(len(values))
    rate, start, before = 1.0, 0, 0.0
    for depth, loss in zip(depths, losses, strict=True):
        part = values[start:depth]
        added = max(0.0, loss - before)
        steps[start:depth] = added * _shares(part)
        rate = added / part.sum() if part.sum() > 0 else rate
        start, before = depth, loss
    steps[start:] = rate * values[start:]
    return ascending(steps)


def _shares(values: Values) -> Values:
    """Summing to 1; equal where all are 0."""
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), 1 / max(1, len(values)))


class Measured:
    """The dense answers on a part of the samples, and how far they move when channels are closed."""

    def __init__(self, graph: ModelGraph, model: torch.nn.Module, look: Look) -> None:
        self.model = model
        with torch.no_grad(), frozen(model):
            batches = [x for x, _ in look.batches(LOSS_BATCH, part=PART)]
            self.batches = [(x, output_tensor(model(x))) for x in batches]
        self.count = sum(len(x) for x in batches)

    def loss(self, group: Group, channels: Indices) -> float:
        """Mean of `quality.difference` with these channels of a group closed."""
        state = closed(self.model, group, channels)
        with torch.no_grad(), frozen(self.model):
            moved = [
                float(difference(dense, output_tensor(functional_call(self.model, state, (x,)))).sum())
                for x, dense in self.batches
            ]
        return sum(moved) / self.count


def closed(model: torch.nn.Module, group: Group, channels: Indices) -> dict[str, torch.Tensor]:
    """The parameters that close channels of a group: copies with zeros in their slices."""
    state: dict[str, torch.Tensor] = {}
    for member in closing(group):
        weight = state.get(member.parameter)
        if weight is None:
            weight = state[member.parameter] = model.get_parameter(member.parameter).detach().clone()
        gone = np.flatnonzero(np.isin(member.channels, channels))
        weight.index_fill_(member.dim, torch.from_numpy(gone), 0.0)
    return state
