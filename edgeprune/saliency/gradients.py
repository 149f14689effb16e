"""Criteria that look at first derivatives: of gates, or of the weights that go with a channel.

Legend: g the gradient, w the weights, S the parameters of a channel's slices in all members of its group (weights,
biases, norms: what surgery takes away). A weight in two slices of one channel (a layer from a stream into itself)
counts in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite

import numpy as np
import torch

from edgeprune.data import Data
from edgeprune.errors import InputError
from edgeprune.graph.structure import ModelGraph
from edgeprune.models import output_tensor
from edgeprune.quality import check_labels, is_classification, squared_difference
from edgeprune.saliency.blocks import measured_drops
from edgeprune.saliency.gates import cotangent, gate_derivatives
from edgeprune.saliency.members import from_channels, gated, slices, total_slices
from edgeprune.saliency.reading import Look, frozen, look_at
from edgeprune.saliency.registry import Saliency, Values, criterion, input_shape, input_type

Tensors = Mapping[str, torch.Tensor]  # by parameter name, each like the parameter


@criterion(
    source="Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning: 1/2N Σ_n g_n²; over "
    "coupled channels: Liu et al. 2021, Group Fisher pruning",
    data="unlabelled",
    granularity="both",
    forward="1 + (1 + blocks) / 4",
    backward="1",
)
def taylor(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats of KL(dense || pruned) that closing the channel's gate costs, ½ E[g²]; blocks measured.

    At the dense model the KL and its gradient are zero; its Hessian is the Fisher information, so that closing gate c
    costs 1/2 E[g_c²], where g_c is the derivative of u·logits with respect to the gate and u has the covariance
    diag(p) - p pᵀ (`gates.cotangent`): labels are used where there are some. An output that is no classification is
    taken as it is: the value is half its mean squared change.
    """
    look = look_at(data, seed)
    channels, count = _half_squares(graph, model, look)
    blocks = measured_drops(graph, model, look)
    return Saliency(channels=channels, blocks=blocks, unit="nats", num_samples=count)


@criterion(
    source="`taylor` with the squared change of the output in the place of the KL, by random projections of it "
    "(Hutchinson 1990)",
    data="unlabelled",
    granularity="both",
    forward="1 + (1 + blocks) / 4",
    backward="1",
)
def taylor_output(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Half the mean squared change of the output (logits) that closing the channel's gate costs; blocks measured.

    ½ E[g_c²], g_c the derivative of u · output by the gate, u random with the covariance 1 / classes, less what moves
    all logits alike. Where the model is sure of a sample KL sees no change until the answer is lost, and a few unsure
    samples decide; logits move on all of them.
    """
    look = look_at(data, seed)
    channels, count = _half_squares(graph, model, look, squared=True)
    blocks = measured_drops(graph, model, look, moved=squared_difference)
    return Saliency(channels=channels, blocks=blocks, unit="half squared change of an output", num_samples=count)


def _half_squares(
    graph: ModelGraph, model: torch.nn.Module, look: Look, *, squared: bool = False
) -> tuple[dict[str, Values], int]:
    """½ E[g²] by the gates, and over how many samples."""
    sums = {group.id: torch.zeros(group.num_channels, dtype=torch.float64) for group in graph.groups}
    count = 0
    for batch in gate_derivatives(graph, model, look, squared=squared):
        for name, g in batch.items():
            sums[name] += g.square().sum(0)
        count += len(next(iter(batch.values()), ()))
    channels = {name: (total / (2 * count)).numpy() for name, total in sums.items()}
    return channels, count or int(np.ceil(look.samples / 4))


@criterion(
    source="Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient inference: Θ_TE = "
    "|Σ ∂C/∂z · z|, without the mean over positions, and its normalisation Θ / √Σ Θ²",
    data="labels",
    forward="1",
    backward="1",
    normalise="euclid",
)
def taylor_activation(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """First-order change of the cross entropy when the activations are zero: E|Σ a · ∂L/∂a|, by sample.

    Σ runs over positions and over all contractions that read the channel.
    """
    sums = {group.id: torch.zeros(group.num_channels, dtype=torch.float64) for group in graph.groups}
    count = 0
    check_classifies(graph, "taylor_activation")
    for batch in gate_derivatives(graph, model, look_at(data, seed)):
        for name, g in batch.items():
            sums[name] += g.abs().sum(0)
        count += len(next(iter(batch.values())))
    channels = {name: (total / count).numpy() for name, total in sums.items()}
    return from_channels(graph, channels, unit="nats", num_samples=count)


@criterion(
    source="Molchanov et al. 2019, Importance estimation for neural network pruning: the square root of (Σ g w)²",
    data="labels",
    forward="1",
    backward="1",
)
def taylor_weight(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """First-order change of the mean cross entropy without the channel's slices: |Σ_S g w|."""
    channels, count = _first_order(graph, model, look_at(data, seed), "taylor_weight")
    return from_channels(graph, channels, unit="nats", num_samples=count)


@criterion(
    source="Molchanov et al. 2019, Importance estimation for neural network pruning: (Σ_S g w)²",
    data="labels",
    forward="1",
    backward="1",
)
def taylor_squared(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Squared first-order change of the mean cross entropy without the channel's slices: (Σ_S g w)²."""
    channels, count = _first_order(graph, model, look_at(data, seed), "taylor_squared")
    return from_channels(graph, {n: v**2 for n, v in channels.items()}, unit="nats²", num_samples=count)


def _first_order(graph: ModelGraph, model: torch.nn.Module, look: Look, name: str) -> tuple[dict[str, Values], int]:
    check_classifies(graph, name)
    with differentiable(graph, model) as parameters:
        g, count = mean_gradient(model, parameters, look)
        products = {name: g[name] * p.detach() for name, p in parameters.items()}
    return over_slices(graph, products, torch.abs), count


@criterion(source="Lee et al. 2019, SNIP: |g w| / Σ |g w|", data="labels", forward="1", backward="1")
def snip(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Connection sensitivity: Σ_S |g w|, as a share of that of all prunable weights."""
    check_classifies(graph, "snip")
    with differentiable(graph, model) as parameters:
        g, count = mean_gradient(model, parameters, look_at(data, seed))
        products = {name: (g[name] * p.detach()).abs() for name, p in parameters.items()}
    total = sum(float(product.sum()) for product in products.values()) or 1.0
    channels = {name: values / total for name, values in over_slices(graph, products).items()}
    return from_channels(graph, channels, unit="share of the model", num_samples=count)


@criterion(
    source="LeCun et al. 1990, Optimal brain damage: ½ h_kk w_k², h the diagonal of the Fisher information",
    data="unlabelled",
    forward="1, sample by sample",
    backward="1",
)
def fisher(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats that the channel's slices cost by the diagonal of the Fisher information: ½ Σ_S E[g²] w².

    g is that of `taylor`, with labels where there are some. Unlike `taylor` it leaves out how the weights of one
    channel act together.
    """
    generator = torch.Generator().manual_seed(seed)
    with differentiable(graph, model) as parameters:
        squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        count = 0
        for x, y in look_at(data, seed).batches(1):
            output = output_tensor(model(x))
            u = cotangent(output.detach(), labels=y, generator=generator)
            for name, g in zip(parameters, gradients((output * u).sum(), parameters), strict=True):
                squares[name] += g.double().square()
            count += 1
        products = {name: squares[name] * p.detach().square() / (2 * count) for name, p in parameters.items()}
    return from_channels(graph, over_slices(graph, products), unit="nats", num_samples=count)


@criterion(
    source="Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic flow: "
    "w · ∂R/∂w with R = 1ᵀ Π|w| 1, in one shot",
    forward="1, one sample of ones",
    backward="1, one sample of ones",
)
def synflow(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Share of the flow 1ᵀ Π|w| 1 that goes through the channel: Σ |w| ∂R/∂|w| over the slices that read it, over R.

    R is the sum of the outputs for an input of ones, with every parameter's magnitude; batch norms keep their variance
    and lose their mean. Computed in float64. All that reads a channel carries what all that makes it does, so consumers
    alone are counted.
    """
    if not input_type(graph).is_floating_point:
        raise InputError("saliency 'synflow' sends ones through the model, which takes integers: take another, like l2")
    shape = input_shape(graph)
    with frozen(model):
        parameters = {name: p.detach().double().abs().requires_grad_() for name, p in model.named_parameters()}
        buffers = {
            name: torch.zeros_like(b) if name.endswith("running_mean") else b for name, b in model.named_buffers()
        }
        state = {**parameters, **{n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}}
        with torch.enable_grad():
            output = torch.func.functional_call(model, state, (torch.ones(shape, dtype=torch.float64),))
            total = output_tensor(output).sum()
            found = gradients(total, parameters)
    flow = float(total.detach())
    if not isfinite(flow) or flow <= 0:
        raise InputError(f"saliency 'synflow': the flow through this model is {flow:g}; take another one")
    products = {name: p.detach() * g / flow for (name, p), g in zip(parameters.items(), found, strict=True)}
    channels: dict[str, Values] = {
        group.id: total_slices(products, gated(group), group).clamp_min(0).numpy() for group in graph.groups
    }
    return from_channels(graph, channels, unit="share of the flow")


@contextmanager
def differentiable(graph: ModelGraph, model: torch.nn.Module) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The parameters of all groups, asking for gradients; no other does."""
    names = {member.parameter for group in graph.groups for member in slices(group)}
    with frozen(model):
        found = {name: p for name, p in model.named_parameters() if name in names and p.is_floating_point()}
        for p in found.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            yield found


def gradients(value: torch.Tensor, parameters: Tensors, *, create_graph: bool = False) -> tuple[torch.Tensor, ...]:
    """Of a scalar by every parameter, zeros where it doesn't depend on one."""
    return torch.autograd.grad(value, [*parameters.values()], create_graph=create_graph, materialize_grads=True)


def mean_gradient(model: torch.nn.Module, parameters: Tensors, look: Look) -> tuple[dict[str, torch.Tensor], int]:
    """Of the mean cross entropy over all samples: float64, and how many samples."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    count = 0
    for x, y in look.batches():
        for name, g in zip(parameters, gradients(cross_entropy(output_tensor(model(x)), y), parameters), strict=True):
            total[name] += g
        count += len(x)
    return {name: value / count for name, value in total.items()}, count


def cross_entropy(output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Summed over the samples; without labels against the model's own answer, whose gradient is zero here and whose
    Hessian is the Fisher information."""
    if labels is None:
        return -(output.detach().softmax(1) * output.log_softmax(1)).sum()
    check_labels(labels, output.shape[1])
    return torch.nn.functional.cross_entropy(output, labels, reduction="sum")


def check_classifies(graph: ModelGraph, name: str) -> None:
    """`InputError` unless the model's output is [N, classes]."""
    value = graph.program.outputs[0].meta["val"]
    if not is_classification(value):
        shape = " x ".join(map(str, value.shape))
        raise InputError(f"saliency '{name}' needs logits, N x classes; this model gives {shape}: take taylor")


def over_slices(
    graph: ModelGraph, tensors: Tensors, last: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> dict[str, Values]:
    """For every group float64 [channels]: Σ_S of the tensors, and `last` of that."""
    channels: dict[str, Values] = {}
    for group in graph.groups:
        own = [member for member in slices(group) if member.parameter in tensors]
        channels[group.id] = last(total_slices(tensors, own, group)).numpy()
    return channels
