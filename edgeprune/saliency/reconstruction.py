"""Criteria that look at how well the next layer's output can do without a channel.

Legend: X [rows, D] what a convolution or linear reads (D = inputs x kernel), W [outputs, D] its weights,
H = XᵀX / rows, Y = X Wᵀ its output without the bias. An error is a share of E|Y|², so that it compares across layers;
where several layers read a group, the mean over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeprune.data import Data
from edgeprune.graph.structure import Group, ModelGraph
from edgeprune.saliency.members import from_channels, index_table, sum_indices
from edgeprune.saliency.reading import Look, Site, look_at, observe, reads, sites
from edgeprune.saliency.registry import Saliency, Values, criterion

ROWS = 8192  # of each layer's X, drawn from all samples
CHUNK = 2048  # rows that are multiplied at once
MOST_INPUTS = 6144  # D of a layer that is looked at
DAMPING = 1e-3  # of H's mean diagonal, added to it before it is inverted
NEAR = 1e-9  # what keeps the order of values that would be equal


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One contraction: H float64 [D, D], W float64 [outputs, D], `kernel` = D / inputs."""

    site: Site
    h: torch.Tensor
    w: torch.Tensor
    kernel: int


@criterion(
    source="Luo et al. 2017, ThiNet: argmin_T Σ (Σ_{j in T} x̂_j)², greedily",
    data="unlabelled",
    forward="1",
    normalise="none",
)
def thinet(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """What the channel's removal adds to the error of the next layers' output, in the order of greedy removal.

    The error of a removed set T is E|Σ_T y_c|², y_c being what channel c adds to the output: channels that cancel or
    repeat one another are seen. Each step removes the channel that leaves the least error. A channel's value is what
    its step added, at least that of the step before, so that the best channels of any number are those removed last.
    """
    layers, squares, count = _layers(graph, model, look_at(data, seed), seed)
    channels = {}
    for group in graph.groups:
        shares = [_gram(layer, group) / _energy(layer) for layer in layers[group.id]]
        shares = shares or [torch.diag(_shares(squares[group.id]))]
        channels[group.id] = _greedy(torch.stack(shares).mean(0).numpy())
    return from_channels(graph, channels, unit="share of the next layers' output", num_samples=count)


@criterion(
    source="He et al. 2017, Channel pruning: min |Y - Σ_c β_c X_c W_cᵀ|², for one channel by Hassibi et al. 1993, OBS",
    data="unlabelled",
    forward="1",
)
def reconstruction(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Least-squares error of the next layers' output without the channel, all other weights solved for anew.

    tr(W_c (H⁻¹_cc)⁻¹ W_cᵀ) over the channel's columns c of W: exact for one channel, with H damped by a thousandth of
    its mean diagonal; for several the sum leaves out what they could stand in for one another.
    """
    layers, squares, count = _layers(graph, model, look_at(data, seed), seed)
    errors: dict[str, list[Values]] = defaultdict(list)
    groups = {group.id: group for group in graph.groups}
    for layer in {layer.site.node: layer for found in layers.values() for layer in found}.values():
        inverse = _inverse(layer.h)
        for name in layer.site.inputs:
            errors[name].append((_without(layer, inverse, groups[name]) / _energy(layer)).numpy())
    channels: dict[str, Values] = {}
    for group in graph.groups:
        channels[group.id] = np.mean(errors[group.id] or [_shares(squares[group.id]).numpy()], axis=0)
    return from_channels(graph, channels, unit="share of the next layers' output", num_samples=count)


def _energy(layer: Layer) -> torch.Tensor:
    """E|Y|²."""
    return (layer.w @ layer.h * layer.w).sum().clamp_min(torch.finfo(layer.h.dtype).tiny)


def _shares(squares: torch.Tensor) -> torch.Tensor:
    return squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def _inverse(h: torch.Tensor) -> torch.Tensor:
    """Of the damped H."""
    damped = h + DAMPING * h.diagonal().mean().clamp_min(1e-30) * torch.eye(len(h), dtype=h.dtype)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return torch.linalg.inv(damped) if failed else torch.cholesky_inverse(factor)


def _layers(
    graph: ModelGraph, model: torch.nn.Module, look: Look, seed: int
) -> tuple[dict[str, list[Layer]], dict[str, torch.Tensor], int]:
    """For every group the layers that read it, and the mean squares of its channels in all that is read of it.

    Linears, 1-d and 2-d convolutions are looked at; what else reads a group counts by the mean squares alone.
    """
    shapes = {node.name: graph.parameter_shapes.get(node.parameters[0]) for node in graph.nodes if node.parameters}
    found = {site.node: site for site in sites(graph) if _is_solvable(site, shapes.get(site.node))}
    where = reads(graph)
    read: dict[str, list[tuple[str, int, Any]]] = defaultdict(list)
    for group in graph.groups:
        for r in where[group.id]:
            read[r.node].append((group.id, r.dim, r.channels))
    generator = torch.Generator().manual_seed(seed)
    each = max(1, ROWS // look.samples)
    moments: dict[str, Moment] = defaultdict(Moment)
    weights: dict[str, torch.Tensor] = {}
    groups: dict[str, int] = {}
    squares = {group.id: torch.zeros(group.num_channels, dtype=torch.float64) for group in graph.groups}

    def see(node: torch.fx.Node, arguments: Mapping[str, Any], value: torch.Tensor) -> None:
        for group, dim, indices in read.get(node.name, ()):
            rows = value.double().movedim(dim, -1).reshape(-1, value.shape[dim])
            squares[group] += sum_indices(rows.square().mean(0)[None], indices, len(squares[group]))[0]
        if node.name in found:
            x = input_rows(found[node.name].operator, arguments, each, generator)
            groups[node.name] = arguments.get("groups", 1)
            moments[node.name].add(x)
            weights[node.name] = dense_weight(arguments["weight"], groups[node.name])

    count = observe(graph, model, look, frozenset({*found, *read}), see)
    layers: dict[str, list[Layer]] = {group.id: [] for group in graph.groups}
    for name, site in found.items():
        inputs = len(next(iter(site.inputs.values())))
        h, w = _within_groups(moments[name].mean(), groups[name]), weights[name]
        for group_id in site.inputs:
            layers[group_id].append(Layer(site=site, h=h, w=w, kernel=w.shape[1] // inputs))
    return layers, squares, count


class Moment:
    """Sums XᵀX up, some rows at a time: a large D takes longer to add than to multiply."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.waiting: list[torch.Tensor] = []
        self.rows = self.waiting_rows = 0

    def add(self, x: torch.Tensor) -> None:
        """More rows: float32 [rows, D]."""
        self.waiting.append(x)
        self.waiting_rows += len(x)
        if self.waiting_rows >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        x = torch.cat(self.waiting)
        self.total = (x.T @ x).double() if self.total is None else self.total.add_(x.T @ x)
        self.rows += len(x)
        self.waiting, self.waiting_rows = [], 0

    def mean(self) -> torch.Tensor:
        """H: float64 [D, D]."""
        if self.waiting:
            self._flush()
        assert self.total is not None
        return self.total / self.rows


def _is_solvable(site: Site, shape: tuple[int, ...] | None) -> bool:
    if site.operator not in ("linear", "conv1d", "conv2d") or shape is None:
        return False
    inputs = len(next(iter(site.inputs.values())))
    return inputs * int(np.prod(shape[2:])) <= MOST_INPUTS


def input_rows(operator: str, arguments: Mapping[str, Any], each: int, generator: torch.Generator) -> torch.Tensor:
    """X float32 [rows, D]: at most `each` positions of every sample, drawn at random."""
    x: torch.Tensor = arguments["input"].detach().float()
    if operator == "linear":
        rows = x.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
    else:
        kernel, stride, padding, dilation = _window(operator, arguments)
        x = x[:, :, None] if operator == "conv1d" else x
        rows = torch.nn.functional.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
    if rows.shape[1] > each:
        rows = torch.stack([r[torch.randperm(len(r), generator=generator)[:each]] for r in rows])
    return rows.flatten(0, 1)


def _window(operator: str, arguments: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Kernel, stride, padding and dilation in two dimensions."""

    def pair(value: Any, fill: int) -> tuple[int, int]:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return (fill, values[0]) if operator == "conv1d" else (values[0], values[-1])

    kernel = pair(arguments["weight"].shape[2:], 1)
    dilation = pair(arguments["dilation"], 1)
    padding = arguments["padding"]
    if isinstance(padding, str):
        around = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        return kernel, pair(arguments["stride"], 1), (around[0], around[1]) if padding == "same" else (0, 0), dilation
    return kernel, pair(arguments["stride"], 1), pair(padding, 0), dilation


def _within_groups(h: torch.Tensor, groups: int) -> torch.Tensor:
    """H with zeros between the groups of a grouped convolution: no weight can stand in for one of another group."""
    owner = torch.arange(len(h)) // (len(h) // groups)
    return h * (owner[:, None] == owner)


def dense_weight(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """W float64 [outputs, D]; of a grouped convolution with zeros for the inputs of the other groups."""
    weight = weight.detach().double()
    if groups == 1:
        return weight.flatten(1)
    outputs, inputs = len(weight), weight.shape[1]
    dense = weight.new_zeros(outputs, groups, inputs, *weight.shape[2:])
    owner = torch.arange(outputs) // (outputs // groups)
    dense[torch.arange(outputs), owner] = weight
    return dense.flatten(1)


def _gram(layer: Layer, group: Group) -> torch.Tensor:
    """float64 [channels, channels]: E⟨y_a, y_b⟩ of what channels a and b add to the layer's output.

    Σ over outputs and columns of W_oi W_oj H_ij, i of channel a, j of b.
    """
    inputs = layer.site.inputs[group.id]
    products = layer.h * (layer.w.T @ layer.w)
    products = products.reshape(len(inputs), layer.kernel, len(inputs), layer.kernel).sum((1, 3))
    return sum_indices(sum_indices(products, inputs, group.num_channels).T, inputs, group.num_channels)


def _greedy(gram: Values) -> Values:
    """What each channel adds to 1ᵀ G 1 over the removed ones, removed one by one; ties go to the lower index."""
    added = gram.diagonal().copy()  # to the error, by removing each channel next
    values = np.zeros(len(gram))
    alive = np.ones(len(gram), dtype=bool)
    order, steps = [], []
    for _ in range(len(gram)):
        channel = int(np.argmin(np.where(alive, added, np.inf)))
        order.append(channel)
        steps.append(float(added[channel]))
        alive[channel] = False
        added += 2 * gram[channel]
    values[order] = ascending(np.array(steps))
    return values


def ascending(steps: Values) -> Values:
    """Each step at least 0 and at least the one before; a billionth apart, so that their order stays."""
    raised = np.maximum.accumulate(np.maximum(0.0, steps))
    result: Values = raised * (1 + NEAR * np.arange(len(steps)))
    return result


def _without(layer: Layer, inverse: torch.Tensor, group: Group) -> torch.Tensor:
    """float64 [channels]: tr(W_c (H⁻¹_cc)⁻¹ W_cᵀ); for a channel that the layer doesn't read, 0."""
    columns = index_table(np.repeat(layer.site.inputs[group.id], layer.kernel), group.num_channels)
    errors = torch.zeros(group.num_channels, dtype=torch.float64)
    sizes = (columns >= 0).sum(1)
    for size in torch.unique(sizes[sizes > 0]).tolist():
        chosen = torch.nonzero(sizes == size)[:, 0]
        own = columns[chosen, :size]
        blocks = inverse[own[:, :, None], own[:, None, :]]
        w = layer.w[:, own].permute(1, 2, 0)  # [channels, size, outputs]
        errors[chosen] = (w * torch.linalg.solve(blocks, w)).sum((1, 2)).clamp_min(0)
    return errors
