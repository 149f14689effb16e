"""Criteria that look at activations: what contractions (convolution, linear, matmul) read of a channel.

Where several contractions read it, the mean over the tensors that they read; where a channel has several indices in one
of them, the mean over these too. Nothing needs labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from edgeprune.data import Data
from edgeprune.graph.structure import Group, ModelGraph
from edgeprune.saliency.members import from_channels, index_table, sum_indices
from edgeprune.saliency.reading import Look, Read, look_at, observe, reads, sites
from edgeprune.saliency.registry import Saliency, Values, criterion

SOURCE = "Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient inference: activation"
RANK_PART = 0.25
"""Share of the samples that ranks are averaged over: they hardly differ between samples, and each costs an SVD."""
Statistic: TypeAlias = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@criterion(source=f"{SOURCE} mean", data="unlabelled", forward="1", normalise="sum")
def activation_mean(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Mean magnitude of the channel's activations; behind a ReLU, their mean."""
    means, count = _means(graph, model, look_at(data, seed), lambda x: (x.abs(),))
    channels = {name: np.mean([read[0] for read in found], axis=0) for name, found in means.items()}
    return from_channels(graph, channels, unit="activation", num_samples=count)


@criterion(source=f"{SOURCE} standard deviation, squared", data="unlabelled", forward="1", normalise="sum")
def activation_variance(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Variance of the channel's activations over samples and positions."""
    means, count = _means(graph, model, look_at(data, seed), lambda x: (x, x.square()))
    channels = {}
    for name, found in means.items():
        channels[name] = np.mean([np.maximum(0.0, square - mean**2) for mean, square in found], axis=0)
    return from_channels(graph, channels, unit="activation²", num_samples=count)


@criterion(
    source="Hu et al. 2016, Network trimming: APoZ = Σ [a = 0] / (N M)", data="unlabelled", forward="1", normalise="sum"
)
def apoz(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Share of the channel's activations that are not zero: 1 - APoZ."""
    means, count = _means(graph, model, look_at(data, seed), lambda x: (x != 0,))
    channels = {name: np.mean([read[0] for read in found], axis=0) for name, found in means.items()}
    return from_channels(graph, channels, unit="share not zero", num_samples=count)


def _means(
    graph: ModelGraph, model: torch.nn.Module, look: Look, statistic: Statistic
) -> tuple[dict[str, list[Values]], int]:
    """For every group, and every tensor that is read of it, the mean of each statistic: float64 [statistics, channels].

    A statistic is a tensor like what it is of.
    """
    wanted = _by_node(reads(graph))
    groups = {group.id: group for group in graph.groups}
    totals: dict[tuple[str, str, int], torch.Tensor] = {}

    def see(node: torch.fx.Node, arguments: Mapping[str, Any], value: torch.Tensor) -> None:
        for group, read in wanted[node.name]:
            rows = [s.double().movedim(read.dim, -1).reshape(-1, value.shape[read.dim]) for s in statistic(value)]
            count = torch.full((value.shape[read.dim],), len(rows[0]), dtype=torch.float64)
            sums = torch.stack([*(r.sum(0) for r in rows), count])
            key = (group, read.node, read.dim)
            totals[key] = totals.get(key, 0.0) + sum_indices(sums, read.channels, groups[group].num_channels)

    count = observe(graph, model, look, frozenset(wanted), see)
    means: dict[str, list[Values]] = defaultdict(list)
    for (group, _, _), total in totals.items():
        means[group].append((total[:-1] / total[-1].clamp_min(1)).numpy())
    return means, count


def _by_node(found: Mapping[str, list[Read]]) -> dict[str, list[tuple[str, Read]]]:
    nodes: dict[str, list[tuple[str, Read]]] = defaultdict(list)
    for group, where in found.items():
        for read in where:
            nodes[read.node].append((group, read))
    return nodes


@criterion(
    source="Lin et al. 2020, HRank: Σ_n rank(o(n))",
    data="unlabelled",
    forward="1/4, with an SVD a map",
    normalise="sum",
)
def hrank(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Mean rank of the channel's feature map over the samples.

    The map of a picture's channel is height x width, averaged over its indices; of tokens and features it is
    positions x indices (a head's tokens x head_dim; 1 or 0 for a single feature).
    """
    wanted = _by_node(reads(graph))
    groups = {group.id: group for group in graph.groups}
    totals: dict[tuple[str, str, int], torch.Tensor] = {}
    seen: dict[tuple[str, str, int], int] = defaultdict(int)

    def see(node: torch.fx.Node, arguments: Mapping[str, Any], value: torch.Tensor) -> None:
        for group, read in wanted[node.name]:
            ranks = _ranks(value, read, groups[group])
            key = (group, read.node, read.dim)
            totals[key] = totals.get(key, 0.0) + ranks.sum(0)
            seen[key] += len(ranks)

    count = observe(graph, model, look_at(data, seed), frozenset(wanted), see, part=RANK_PART)
    found: dict[str, list[Values]] = defaultdict(list)
    for key, total in totals.items():
        found[key[0]].append((total / seen[key]).numpy())
    channels: dict[str, Values] = {name: np.mean(ranks, axis=0) for name, ranks in found.items()}
    return from_channels(graph, channels, unit="rank", num_samples=count)


def _ranks(value: torch.Tensor, read: Read, group: Group) -> torch.Tensor:
    """float64 [N, channels]."""
    if value.dim() == 4 and read.dim == 1:
        ranks = torch.linalg.matrix_rank(value.float()).double()
        indices = sum_indices(torch.ones_like(ranks), read.channels, group.num_channels)
        mean: torch.Tensor = sum_indices(ranks, read.channels, group.num_channels) / indices.clamp_min(1)
        return mean
    rows = value.float().movedim(read.dim, -1)
    rows = rows.reshape(len(rows) if rows.dim() > 1 else 1, -1, rows.shape[-1])
    padded = torch.cat([rows, rows.new_zeros(*rows.shape[:2], 1)], dim=2)  # index -1: zeros, which add no rank
    maps = padded[:, :, index_table(read.channels, group.num_channels)].transpose(1, 2)
    rank: torch.Tensor = torch.linalg.matrix_rank(maps).double()
    return rank


@criterion(
    source="Sun et al. 2024, A simple and effective pruning approach for LLMs (Wanda): |W_ij| · |X_j|₂",
    data="unlabelled",
    forward="1",
    normalise="sum",
)
def wanda(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Magnitudes of the weights that read the channel, times the root mean square of what they read.

    Summed over all contractions that read it. A group that only matmuls read has weights of 1.
    """
    found = {site.node: site for site in sites(graph)}
    read = {group for site in found.values() for group in site.inputs}
    others = {group: where for group, where in reads(graph).items() if group not in read}
    squares: dict[str, list[torch.Tensor]] = {}
    strengths: dict[str, torch.Tensor] = {}

    def see(node: torch.fx.Node, arguments: Mapping[str, Any], value: torch.Tensor) -> None:
        if node.name not in found:
            return
        x, dim = arguments["input"], -1 if found[node.name].operator == "linear" else 1
        rows = x.double().movedim(dim, -1).reshape(-1, x.shape[dim])
        strengths[node.name] = weights_by_input(found[node.name].operator, arguments)
        new = [rows.square().sum(0), torch.tensor(float(len(rows)), dtype=torch.float64)]
        old = squares.get(node.name)
        squares[node.name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    look = look_at(data, seed)
    count = observe(graph, model, look, frozenset(found), see)
    channels = {group.id: np.zeros(group.num_channels) for group in graph.groups}
    for name, site in found.items():
        total, rows = squares[name]
        scores = strengths[name] * (total / rows).sqrt()
        for group, indices in site.inputs.items():
            channels[group] += sum_indices(scores[None], indices, len(channels[group]))[0].numpy()
    if others:
        means, _ = _means(graph, model, look, lambda x: (x.square(),))
        channels |= {group: np.sqrt([read[0] for read in means[group]]).mean(axis=0) for group in others}
    return from_channels(graph, channels, unit="activation x weight", num_samples=count)


def weights_by_input(operator: str, arguments: Mapping[str, Any]) -> torch.Tensor:
    """float64 [inputs]: the sum of magnitudes of all weights that read each input index of a contraction."""
    weight: torch.Tensor = arguments["weight"].detach().double().abs()
    if "transpose" in operator:
        return weight.flatten(1).sum(1)  # [inputs, outputs / groups, ...]
    groups = arguments.get("groups", 1)
    parts = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return parts.sum((1, 3)).flatten()
