"""Criteria that look at second derivatives: two backward passes.

Legend: H the Hessian of the mean loss, g its gradient, w the weights, S the parameters of a channel's slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgeprune.data import Data
from edgeprune.errors import InputError
from edgeprune.graph.structure import ModelGraph
from edgeprune.models import output_tensor
from edgeprune.quality import is_classification
from edgeprune.saliency.gradients import (
    check_classifies,
    cross_entropy,
    differentiable,
    gradients,
    mean_gradient,
    over_slices,
)
from edgeprune.saliency.members import from_channels
from edgeprune.saliency.reading import look_at
from edgeprune.saliency.registry import Saliency, criterion

PROBES = 4
"""Random directions a batch: each costs a backward pass."""


@criterion(
    source="Yu et al. 2022, Hessian-aware pruning and optimal neural implant: tr(H_S) / 2p · |w_S|²; trace by "
    "Hutchinson 1990",
    data="unlabelled",
    forward="1",
    backward=f"1 + {PROBES} through the gradient",
)
def hessian(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats by the mean curvature of the channel's slices: tr(H_S) / 2p · |w_S|², p their number of weights.

    The trace is estimated as E[v_Sᵀ (H v)_S] over random signs v. H is that of the cross entropy with labels; without,
    of KL(dense || ·), which is the Fisher information; of half the mean square for other outputs. A negative trace
    counts as 0.
    """
    generator = torch.Generator().manual_seed(seed)
    with differentiable(graph, model) as parameters, _twice_differentiable():
        traces = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        count = 0
        for x, y in look_at(data, seed).batches():
            g = gradients(_loss(output_tensor(model(x)), y), parameters, create_graph=True)
            for _ in range(PROBES):
                signs = [torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1 for p in parameters.values()]
                along = sum((a * v).sum() for a, v in zip(g, signs, strict=True))
                assert isinstance(along, torch.Tensor)
                found = torch.autograd.grad(along, [*parameters.values()], retain_graph=True, materialize_grads=True)
                for name, hv, v in zip(parameters, found, signs, strict=True):
                    traces[name] += hv.double() * v
            count += len(x)
        squares = {name: p.detach().double().square() for name, p in parameters.items()}
        sizes = {name: torch.ones_like(p, dtype=torch.float64) for name, p in parameters.items()}
    trace, energy, number = (over_slices(graph, tensors) for tensors in (traces, squares, sizes))
    channels = {
        name: (trace[name] / (count * PROBES)).clip(min=0) / (2 * number[name].clip(min=1)) * energy[name]
        for name in trace
    }
    return from_channels(graph, channels, unit="nats", num_samples=count)


def _loss(output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Summed over the samples; its Hessian at the dense model is what matters."""
    if is_classification(output):
        return cross_entropy(output, labels)
    return (output - output.detach()).flatten(1).square().mean(1).sum() / 2


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention spelled out, since its fused kernels have no second derivative; `InputError` for what else has none."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        reason = str(error).split("\n")[0]
        raise InputError(
            f"this saliency takes second derivatives: {reason}; take one that doesn't, like fisher"
        ) from None


@criterion(
    source="Wang et al. 2020, Picking winning tickets before training by preserving gradient flow (GraSP): -θ ⊙ H g, "
    "turned round, at temperature 1",
    data="labels",
    forward="2",
    backward="2 + 1 through the gradient",
)
def grasp(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Gradient flow |g|² that is lost without the channel's slices, to first order: Σ_S w · (H g).

    Where it is negative, the flow grows without the channel, which is worth 0 then.
    """
    check_classifies(graph, "grasp")
    look = look_at(data, seed)
    with differentiable(graph, model) as parameters, _twice_differentiable():
        mean, count = mean_gradient(model, parameters, look)
        products = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for x, y in look.batches():
            g = gradients(cross_entropy(output_tensor(model(x)), y), parameters, create_graph=True)
            along = sum((a * mean[name].to(a.dtype)).sum() for name, a in zip(parameters, g, strict=True))
            assert isinstance(along, torch.Tensor)
            for name, hg in zip(parameters, gradients(along, parameters), strict=True):
                products[name] += hg.double() * parameters[name].detach() / count
    channels = over_slices(graph, products, lambda values: values.clamp_min(0))
    return from_channels(graph, channels, unit="gradient flow", num_samples=count)
