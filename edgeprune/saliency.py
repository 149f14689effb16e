"""The value of every channel and every block: one function a criterion, registered by name. Higher = keep, never < 0.

Legend: N samples, w a weight, x the input of a contraction, p = softmax of the dense model's logits; a *gate* is a
factor on one channel at the inputs of its contractions, 1 in the dense model, 0 when the channel is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.data import Data, synthetic
from edgeprune.errors import InputError, did_you_mean
from edgeprune.graph.coupling import CONTRACTIONS
from edgeprune.graph.structure import Block, Group, Member, ModelGraph
from edgeprune.models import evaluating, output_tensor
from edgeprune.quality import check_labels, difference, is_classification

Values: TypeAlias = npt.NDArray[np.float64]
Gates: TypeAlias = dict[tuple[str, int], torch.Tensor]  # (parameter, dimension) to float64 [N, indices]


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """`channels[group id]` float64 [num_channels], `blocks[block id]`, in `unit`.

    A block's value is what its drop costs as a whole, blocks within it included. `is_synthetic` tells that the samples
    were random.
    """

    channels: Mapping[str, Values]
    blocks: Mapping[str, float]
    criterion: str = ""
    unit: str = ""
    num_samples: int = 0
    is_synthetic: bool = False


Criterion: TypeAlias = Callable[[ModelGraph, torch.nn.Module, Data, int], Saliency]  # (graph, dense model, data, seed)
CRITERIA: dict[str, Criterion] = {}
BATCH_SIZE = 8


def criterion(function: Criterion) -> Criterion:
    """Register a criterion under its function's name."""
    CRITERIA[function.__name__] = function
    return function


def score(name: str, graph: ModelGraph, model: torch.nn.Module, data: Data | None = None, *, seed: int = 0) -> Saliency:
    """The values that criterion `name` gives the channels and blocks of the dense `model`, which is left as it is.

    Without data the criteria that look at samples get random ones of the shape that was traced.
    """
    if name not in CRITERIA:
        raise InputError(f"no saliency '{name}'{did_you_mean(name, CRITERIA)} (known: {', '.join(sorted(CRITERIA))})")
    if data is None:
        data = synthetic(_input_shape(graph), seed=seed)
    values = CRITERIA[name](graph, model, data, seed)
    return replace(values, criterion=name, is_synthetic=values.num_samples > 0 and data.is_synthetic)


def _input_shape(graph: ModelGraph) -> tuple[int, ...]:
    user = set(graph.program.inputs)
    shapes = [tuple(n.meta["val"].shape) for n in graph.program.graph.nodes if n.name in user]
    if len(shapes) != 1:
        raise InputError(f"the model has {len(shapes)} inputs; name a saliency that needs no data, like l2")
    return shapes[0]


@criterion
def random(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Uniform numbers, divided by the group's number of channels: the baseline that a criterion must beat.

    Blocks are worth what `l2` counts for them, with one uniform number for the layer that no group reaches.
    """
    channels = {}
    for group in sorted(graph.groups, key=lambda g: g.id):
        generator = np.random.default_rng([seed, *group.id.encode()])
        channels[group.id] = generator.random(group.num_channels) / group.num_channels
    rest = {b.id: float(np.random.default_rng([seed, *f"block {b.id}".encode()]).random()) for b in graph.blocks}
    return Saliency(channels=channels, blocks=_block_sums(graph, channels, rest), unit="share of a layer")


@criterion
def l2(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Sum of squares of the channel's slices, as a share of its layer's.

    For every producer and consumer the sum of squares of a channel's slice is divided by that of all the group's
    slices; the channel's value is the mean over these members. So the values of a group sum to 1: across layers, the
    same share of the weights is worth the same, however wide or large the layer. A block is worth what is inside of it:
    its channels, the blocks within, and 1 (one whole layer) where it has contractions that no group inside reaches, as
    in attention whose heads are refused.
    """
    channels = {}
    for group in graph.groups:
        shares = []
        for member in _contractions(group):
            weight = model.get_parameter(member.parameter).detach().double().movedim(member.dim, 0).flatten(1)
            energy = _by_channel(weight.square().sum(1)[None], member, group)[0]
            shares.append(energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny))
        channels[group.id] = torch.stack(shares).mean(0).numpy()
    rest = {block.id: 1.0 for block in graph.blocks}
    return Saliency(channels=channels, blocks=_block_sums(graph, channels, rest), unit="share of a layer")


def _block_sums(graph: ModelGraph, channels: Mapping[str, Values], rest: Mapping[str, float]) -> dict[str, float]:
    """Each block's channels, the blocks within it, and `rest[block]` where no group inside reaches all contractions."""
    sums: dict[str, float] = {}
    for block in sorted(graph.blocks, key=lambda block: len(block.nodes)):
        within = [other for other in graph.blocks if other.within == block.id]
        own = block.nodes.difference(*(other.nodes for other in within))
        reached = {member.parameter for group in block.inside for member in graph.group(group).members}
        contractions = [node for node in graph.nodes if node.name in own and node.operator in CONTRACTIONS]
        sums[block.id] = (
            sum(float(channels[group].sum()) for group in block.inside if graph.block_of[group] == block.id)
            + sum(sums[other.id] for other in within)
            + (rest[block.id] if any(reached.isdisjoint(node.parameters) for node in contractions) else 0.0)
        )
    return sums


@criterion
def taylor(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats of KL(dense || pruned) that a channel's removal costs, to the first term that isn't zero; blocks measured.

    At the dense model the KL and its gradient are zero; its Hessian is the Fisher information, so that closing gate c
    costs 1/2 E[g_c²], where g_c is the derivative of u·logits with respect to the gate and u has the covariance
    diag(p) - p pᵀ: with labels u is the gradient of the cross entropy, without u = √p (r - √p ⟨√p, r⟩), r normal, which
    varies less than drawing labels from p. An output that is no classification is taken as it is: u = r / √elements,
    and the value is half the mean squared change of the output. (The Fisher criterion: Theis et al., "Faster gaze
    prediction with dense networks and Fisher pruning", 2018; over coupled channels: Liu et al., "Group Fisher pruning
    for practical network compression", ICML 2021.)

    A quarter of the data is left to judge a later repair by (`Data.hold_out`).

    g_c sums x · ∂/∂x over the inputs x of all contractions that read the channel (which equals w · ∂/∂w over their
    slices); a group that none reads is gated at its producers' outputs.
    """
    _, data = data.hold_out()
    samples, views = data.calibration_views()
    sums = {group.id: torch.zeros(group.num_channels, dtype=torch.float64) for group in graph.groups}
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with _frozen(model):
        gates = _GateReader(graph, model)
        size = BATCH_SIZE if gates.tells_samples_apart(next(data.batches(2))[0]) else 1
        for x, y in data.batches(size, views=views, seed=seed, limit=samples):
            derivatives = gates.derivatives(x, partial(_cotangent, labels=y, generator=generator))
            for group in graph.groups:
                closed = [_by_channel(derivatives[m.parameter, m.dim], m, group) for m in _gated(group)]
                sums[group.id] += torch.stack(closed).sum(0).square().sum(0)
            count += len(x)
        blocks = drop_costs(graph.blocks, model, data, seed=seed, views=views, limit=ceil(samples / 4))
    return Saliency(
        channels={name: (total / (2 * count)).numpy() for name, total in sums.items()},
        blocks=blocks,
        unit="nats",
        num_samples=count,
    )


def drop_costs(
    blocks: tuple[Block, ...], model: torch.nn.Module, data: Data, *, seed: int, views: int, limit: int
) -> dict[str, float]:
    """What dropping each block alone changes: mean over the samples of `quality.difference` (KL in nats)."""
    costs = dict.fromkeys((block.id for block in blocks), 0.0)
    count = 0
    if not blocks:
        return costs
    with torch.no_grad():
        for x, _ in data.batches(BATCH_SIZE, views=views, seed=seed, limit=limit):
            dense = output_tensor(model(x))
            for block in blocks:
                hooks = [model.get_submodule(name).register_forward_hook(_zeros) for name in block.zero_modules]
                try:
                    costs[block.id] += float(difference(dense, output_tensor(model(x))).sum())
                finally:
                    for hook in hooks:
                        hook.remove()
            count += len(x)
    return {name: cost / count for name, cost in costs.items()}


def _zeros(module: torch.nn.Module, inputs: object, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return type(output)(torch.zeros_like(o) if isinstance(o, torch.Tensor) else o for o in output)


def _cotangent(output: torch.Tensor, *, labels: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """u of `taylor`, like `output`."""
    if is_classification(output) and labels is not None:
        check_labels(labels, output.shape[1])
        return output.softmax(1) - torch.nn.functional.one_hot(labels, output.shape[1])
    r = torch.randn(output.shape, generator=generator)
    if not is_classification(output):
        return r / float(output[0].numel() ** 0.5)
    root = output.softmax(1).sqrt()
    centred: torch.Tensor = r - root * (root * r).sum(1, keepdim=True)
    return root * centred


def _contractions(group: Group) -> list[Member]:
    """Producers and consumers, or all members where there is neither."""
    return [m for m in group.members if m.role != "per_channel"] or list(group.members)


def _gated(group: Group) -> list[Member]:
    """The members where the gate sits: consumers, else producers, else the rest."""
    for role in ("consumer", "producer", "per_channel"):
        members = [
            m for m in group.members if m.role == role and not m.parameter.endswith(("running_mean", "running_var"))
        ]
        if members:
            return members
    raise AssertionError(f"group {group.id} has no parameter")


def _by_channel(values: torch.Tensor, member: Member, group: Group) -> torch.Tensor:
    """[N, indices of the member's dimension] summed to [N, channels]; indices of no channel are left out."""
    own = torch.from_numpy(np.flatnonzero(member.channels >= 0))
    channels = torch.from_numpy(member.channels[member.channels >= 0])
    return values.new_zeros(len(values), group.num_channels).index_add_(1, channels, values[:, own])


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode with no parameter asking for a gradient, and back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


class _GateReader:
    """Derivatives with respect to gates, sample by sample.

    At a convolution (one group) or linear module that is called with the channels as they lie in its weight, batches
    are read from the module's input. Elsewhere the weight's gradient is read, which tells samples apart only one at a
    time: `by_weight` lists these parameters.
    """

    def __init__(self, graph: ModelGraph, model: torch.nn.Module) -> None:
        self.model = model
        self.by_input: dict[str, tuple[torch.nn.Module, int]] = {}
        self.by_weight: list[tuple[str, int]] = []
        for member in {(m.parameter, m.dim): m for g in graph.groups for m in _gated(g)}.values():
            owner = member.parameter.rpartition(".")[0]
            channel_dim = _input_dim(model.get_submodule(owner))
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

    def derivatives(self, x: torch.Tensor, cotangent: Callable[[torch.Tensor], torch.Tensor]) -> Gates:
        """For every gated (parameter, dimension) float64 [N, indices]: d(output · cotangent) / d gate."""
        inputs: dict[str, torch.Tensor] = {}
        weights = {name: self.model.get_parameter(name).requires_grad_(True) for name, _ in self.by_weight}
        try:
            with self._capturing(inputs), torch.enable_grad():
                output = output_tensor(self.model(x))
                found = torch.autograd.grad(
                    (output * cotangent(output.detach())).sum(),
                    [*inputs.values(), *weights.values()],
                    materialize_grads=True,
                )
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        gradients = dict(zip([*inputs, *weights], found, strict=True))
        gates: Gates = {}
        for name, value in inputs.items():
            dim = self.by_input[name][1]
            product = (value.detach() * gradients[name]).movedim(dim, -1)
            gates[name, 1] = product.reshape(len(x), -1, product.shape[-1]).sum(1, dtype=torch.float64)
        for name, dim in self.by_weight:
            product = (weights[name].detach() * gradients[name]).movedim(dim, 0)
            gates[name, dim] = product.flatten(1).sum(1).double()[None]
        return gates


def _capture(inputs: dict[str, torch.Tensor], name: str) -> Callable[[torch.nn.Module, Any], Any]:
    """A forward pre-hook that keeps the module's input, as a copy: what others read or overwrite stays apart."""

    def hook(module: torch.nn.Module, arguments: Any) -> Any:
        x = arguments[0]
        inputs[name] = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        return (inputs[name], *arguments[1:])

    return hook


def _input_dim(module: torch.nn.Module) -> int | None:
    """The dimension of the module's input that its weight's dimension 1 contracts."""
    if isinstance(module, torch.nn.Linear):
        return -1
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d) and module.groups == 1:
        return 1
    return None
