"""Derivatives with respect to gates, sample by sample.

Legend: N samples, w a weight, x the input of a contraction, p = softmax of the dense model's logits; a *gate* is a
factor on one channel at the inputs of its contractions, 1 in the dense model, 0 when the channel is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch

from edgeprune.graph.structure import ModelGraph
from edgeprune.models import output_tensor
from edgeprune.quality import check_labels, is_classification
from edgeprune.saliency.members import by_channel, gated
from edgeprune.saliency.reading import BATCH_SIZE, Look, frozen

Gates: TypeAlias = dict[tuple[str, int], torch.Tensor]  # (parameter, dimension) to float64 [N, indices]


def gate_derivatives(
    graph: ModelGraph, model: torch.nn.Module, look: Look, *, with_labels: bool = True, squared: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """For every group float64 [N, channels], batch by batch: d(u · output) / d gate.

    u is `cotangent`'s, or `squared_cotangent`'s.

    It sums x · ∂/∂x over the inputs x of all contractions that read the channel (which equals w · ∂/∂w over their
    slices); a group that none reads is gated at its producers' outputs.
    """
    if not graph.groups:
        return
    generator = torch.Generator().manual_seed(look.seed)
    with frozen(model):
        reader = GateReader(graph, model)
        size = BATCH_SIZE if reader.tells_samples_apart(next(look.data.batches(2))[0]) else 1
        for x, y in look.batches(size):
            labels = y if with_labels else None
            u = partial(cotangent, labels=labels, generator=generator)
            found = reader.derivatives(x, partial(squared_cotangent, generator=generator) if squared else u)
            yield {
                group.id: torch.stack([by_channel(found[m.parameter, m.dim], m, group) for m in gated(group)]).sum(0)
                for group in graph.groups
            }


def cotangent(output: torch.Tensor, *, labels: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """u, like `output`, with the covariance diag(p) - p pᵀ.

    With labels the gradient of the cross entropy, without u = √p (r - √p ⟨√p, r⟩), r normal, which varies less than
    drawing labels from p. An output that is no classification is taken as it is: u = r / √elements.
    """
    if is_classification(output) and labels is not None:
        check_labels(labels, output.shape[1])
        return output.softmax(1) - torch.nn.functional.one_hot(labels, output.shape[1])
    if not is_classification(output):
        return squared_cotangent(output, generator=generator)
    r = torch.randn(output.shape, generator=generator)
    root = output.softmax(1).sqrt()
    centred: torch.Tensor = r - root * (root * r).sum(1, keepdim=True)
    return root * centred


def squared_cotangent(output: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """u, like `output`, for which E[(u · v)²] is the mean of v², for logits the mean of (v - mean of v)²."""
    r = torch.randn(output.shape, generator=generator)
    if is_classification(output):
        r = r - r.mean(1, keepdim=True)
    return r / float(output[0].numel() ** 0.5)


class GateReader:
    """Reads the gates of all groups in one forward and one backward pass.

    At a convolution (one group) or linear module that is called with the channels as they lie in its weight, batches
    are read from the module's input. Elsewhere the weight's gradient is read, which tells samples apart only one at a
    time: `by_weight` lists these parameters.
    """

    def __init__(self, graph: ModelGraph, model: torch.nn.Module) -> None:
        self.model = model
        self.by_input: dict[str, tuple[torch.nn.Module, int]] = {}
        self.by_weight: list[tuple[str, int]] = []
        for member in {(m.parameter, m.dim): m for g in graph.groups for m in gated(g)}.values():
            owner = member.parameter.rpartition(".")[0]
            channel_dim = input_dim(model.get_submodule(owner))
            places = [node.where for node in graph.nodes if member.parameter in node.parameters]
            if member.role == "consumer" and member.dim == 1 and channel_dim is not None and places == [owner]:
                self.by_input[member.parameter] = (model.get_submodule(owner), channel_dim)
            else:
                self.by_weight.append((member.parameter, member.dim))

    def tells_samples_apart(self, x: torch.Tensor) -> bool:
        """Whether a batch can be read at once: every input that is read keeps the batch as its first dimension."""
        if self.by_weight or len(x) < 2:
            return False
        inputs: dict[str, torch.Tensor] = {}
        try:
            with self._capturing(inputs), torch.no_grad():
                self.model(x)
        except RuntimeError:  # a batch size written into the model's code
            return False
        return all(len(value) == len(x) for value in inputs.values())

    @contextmanager
    def _capturing(self, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
        hooks = [m.register_forward_pre_hook(_capture(inputs, name)) for name, (m, _) in self.by_input.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def derivatives(self, x: torch.Tensor, u: Callable[[torch.Tensor], torch.Tensor]) -> Gates:
        """For every gated (parameter, dimension) float64 [N, indices]: d(output · u) / d gate."""
        inputs: dict[str, torch.Tensor] = {}
        weights = {name: self.model.get_parameter(name).requires_grad_(True) for name, _ in self.by_weight}
        try:
            with self._capturing(inputs), torch.enable_grad():
                output = output_tensor(self.model(x))
                found = torch.autograd.grad(
                    (output * u(output.detach())).sum(), [*inputs.values(), *weights.values()], materialize_grads=True
                )
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        of_inputs = dict(zip(inputs, found, strict=False))
        of_weights = dict(zip(weights, found[len(inputs) :], strict=True))
        gates: Gates = {}
        for name, value in inputs.items():
            dim = self.by_input[name][1]
            product = (value.detach() * of_inputs[name]).movedim(dim, -1)
            gates[name, 1] = product.reshape(len(x), -1, product.shape[-1]).sum(1, dtype=torch.float64)
        for name, dim in self.by_weight:
            product = (weights[name].detach() * of_weights[name]).movedim(dim, 0)
            gates[name, dim] = product.flatten(1).sum(1).double()[None]
        return gates


def _capture(inputs: dict[str, torch.Tensor], name: str) -> Callable[[torch.nn.Module, Any], Any]:
    """A forward pre-hook that keeps the module's input, as a copy: what others read or overwrite stays apart."""

    def hook(module: torch.nn.Module, arguments: Any) -> Any:
        x = arguments[0]
        inputs[name] = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        return (inputs[name], *arguments[1:])

    return hook


def input_dim(module: torch.nn.Module) -> int | None:
    """The dimension of the module's input that its weight's dimension 1 contracts."""
    if isinstance(module, torch.nn.Linear):
        return -1
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d) and module.groups == 1:
        return 1
    return None
