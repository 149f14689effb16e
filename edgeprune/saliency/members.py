"""From tensors to channels: what belongs to each channel of a group, and what blocks and channels owe one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from edgeprune.graph.coupling import CONTRACTIONS
from edgeprune.graph.structure import Group, Indices, Member, ModelGraph
from edgeprune.saliency.registry import Saliency, Values

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def contractions(group: Group) -> list[Member]:
    """Producers and consumers, or all members where there is neither."""
    return [m for m in group.members if m.role != "per_channel"] or list(group.members)


def producers(group: Group) -> list[Member]:
    """Producers, or `contractions` where there is none."""
    return [m for m in group.members if m.role == "producer"] or contractions(group)


def gated(group: Group) -> list[Member]:
    """The members where a channel's gate sits: consumers, else producers, else the rest."""
    for role in ("consumer", "producer", "per_channel"):
        members = [m for m in group.members if m.role == role and not m.parameter.endswith(STATISTICS)]
        if members:
            return members
    raise AssertionError(f"group {group.id} has no parameter")


def slices(group: Group) -> list[Member]:
    """All parameters of the group: what goes with a channel."""
    return [m for m in group.members if not m.parameter.endswith(STATISTICS)]


def closing(group: Group) -> list[Member]:
    """The members whose slices, set to zero, close a channel: its consumers; without any, all that makes it."""
    return [m for m in group.members if m.role == "consumer"] or slices(group)


def by_channel(values: torch.Tensor, member: Member, group: Group) -> torch.Tensor:
    """[N, indices of the member's dimension] summed to [N, channels]; indices of no channel are left out."""
    return sum_indices(values, member.channels, group.num_channels)


def sum_indices(values: torch.Tensor, channels: Indices, count: int) -> torch.Tensor:
    """[N, indices] summed to [N, count]: index i goes to `channels[i]`, or nowhere where that is -1."""
    own = torch.from_numpy(np.flatnonzero(channels >= 0))
    to = torch.from_numpy(channels[channels >= 0])
    return values.new_zeros(len(values), count).index_add_(1, to, values[:, own])


def slice_sums(tensor: torch.Tensor, member: Member, group: Group) -> torch.Tensor:
    """float64 [channels]: the sum over each channel's slice of a tensor that is shaped like the member's parameter."""
    rows = tensor.detach().double().movedim(member.dim, 0)
    return by_channel(rows.reshape(len(rows), -1).sum(1)[None], member, group)[0]


def total_slices(tensors: Mapping[str, torch.Tensor], members: Iterable[Member], group: Group) -> torch.Tensor:
    """float64 [channels]: `slice_sums` over several members."""
    total = torch.zeros(group.num_channels, dtype=torch.float64)
    for member in members:
        total += slice_sums(tensors[member.parameter], member, group)
    return total


def index_table(channels: Indices, count: int) -> torch.Tensor:
    """int64 [count, most indices of a channel]: the indices of every channel, -1 behind the last."""
    sizes = np.bincount(channels[channels >= 0], minlength=count)
    table = np.full((count, max(1, int(sizes.max(initial=0)))), -1, dtype=np.int64)
    for channel in range(count):
        table[channel, : sizes[channel]] = np.flatnonzero(channels == channel)
    return torch.from_numpy(table)


def mean_of_shares(members: Iterable[torch.Tensor]) -> Values:
    """The mean over members [channels] of what each channel has of the member's sum."""
    shares = [values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) for values in members]
    mean: Values = torch.stack(shares).mean(0).numpy()
    return mean


def from_channels(
    graph: ModelGraph,
    channels: Mapping[str, Values],
    *,
    unit: str,
    num_samples: int = 0,
    rest: Mapping[str, float] | None = None,
) -> Saliency:
    """Values of channels, and blocks worth what is inside of them (`block_sums`).

    A layer that no group reaches is worth `rest[block]`; unless told, as much as an average group.
    """
    if rest is None:
        layer = float(np.mean([values.sum() for values in channels.values()])) if channels else 1.0
        rest = {block.id: layer for block in graph.blocks}
    return Saliency(channels=channels, blocks=block_sums(graph, channels, rest), unit=unit, num_samples=num_samples)


def block_sums(graph: ModelGraph, channels: Mapping[str, Values], rest: Mapping[str, float]) -> dict[str, float]:
    """Each block's channels, the blocks within it, and `rest[block]` where no group inside reaches all contractions."""
    sums: dict[str, float] = {}
    for block in sorted(graph.blocks, key=lambda block: len(block.nodes)):
        within = [other for other in graph.blocks if other.within == block.id]
        own = block.nodes.difference(*(other.nodes for other in within))
        reached = {member.parameter for group in block.inside for member in graph.group(group).members}
        nodes = [node for node in graph.nodes if node.name in own and node.operator in CONTRACTIONS]
        sums[block.id] = (
            sum(float(channels[group].sum()) for group in block.inside if graph.block_of[group] == block.id)
            + sum(sums[other.id] for other in within)
            + (rest[block.id] if any(reached.isdisjoint(node.parameters) for node in nodes) else 0.0)
        )
    return sums


def from_blocks(
    graph: ModelGraph, shares: Mapping[str, Values], blocks: Mapping[str, float], *, unit: str, num_samples: int
) -> Saliency:
    """Values of blocks, and channels worth a part of their smallest block's.

    `shares` sum to 1 in a group: a channel gets its share of the block's value, divided by the groups inside the block.
    A group in no block takes the place of an average block.
    """
    outside = float(np.mean(list(blocks.values())))
    inside = {block.id: max(1, len(block.inside)) for block in graph.blocks}
    channels = {}
    for group in graph.groups:
        block = graph.block_of.get(group.id)
        worth = outside if block is None else blocks[block] / inside[block]
        channels[group.id] = shares[group.id] * worth
    return Saliency(channels=channels, blocks=blocks, unit=unit, num_samples=num_samples)
