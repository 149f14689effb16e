"""Looking at a model while it runs: which samples, and the activations of every channel, found index by index.

Activations are read in the traced program, so that what a contraction reads of a channel is known behind any reshape,
split or concatenation. The program has static shapes: samples come in batches of the traced size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeAlias

import numpy as np
import torch

from edgeprune.attention import computed
from edgeprune.data import Batch, Data
from edgeprune.graph.coupling import CONTRACTIONS
from edgeprune.graph.program import writes_in_place
from edgeprune.graph.structure import Indices, ModelGraph, Node
from edgeprune.models import evaluating
from edgeprune.saliency.registry import input_shape

BATCH_SIZE = 8
READERS = CONTRACTIONS | frozenset(
    "matmul mm bmm mv dot bilinear addmm baddbmm einsum deform_conv2d scaled_dot_product_attention".split()
)
"""Operators that may sum over channels: what they read is what a channel is worth by its activations."""
See: TypeAlias = Callable[[torch.fx.Node, Mapping[str, Any], Any], None]  # (call, its arguments by name, its result)


@dataclass(frozen=True, kw_only=True)
class Look:
    """The calibration samples that a criterion looks at: `samples` of them, in `views` crops of each picture."""

    data: Data
    samples: int
    views: int
    seed: int

    def batches(self, size: int = BATCH_SIZE, *, part: float = 1.0) -> Iterator[Batch]:
        """Batches (x, y), of all samples or of the first `part` of them."""
        return self.data.batches(size, views=self.views, seed=self.seed, limit=ceil(self.samples * part))


def look_at(data: Data, seed: int) -> Look:
    """All but the quarter of the data that is left to judge a later repair by (`Data.hold_out`)."""
    _, rest = data.hold_out()
    samples, views = rest.calibration_views()
    return Look(data=rest, samples=samples, views=views, seed=seed)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
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


class Observer(torch.fx.Interpreter):
    """Runs the traced program and shows the calls that are `wanted` to `see`."""

    def __init__(self, graph: ModelGraph, wanted: frozenset[str], see: See) -> None:
        super().__init__(graph.program.module, garbage_collect_values=True)
        self.wanted, self.see = wanted, see

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value; an operator that writes into its argument gets a copy to write into."""
        if n.op != "call_function":
            value = super().run_node(n)
            if n.name in self.wanted:
                self.see(n, {}, value)
            return value
        fetched, kwargs = self.fetch_args_kwargs_from_env(n)
        args: list[Any] = list(fetched)
        if writes_in_place(n):
            args[0] = args[0].clone()
        value = n.target(*args, **kwargs)  # type: ignore[operator]
        if n.name in self.wanted:
            self.see(n, _by_name(n, args, kwargs), value)
        return value


def _by_name(node: torch.fx.Node, args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    values = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    values.update({argument.name: value for argument, value in zip(schema.arguments, args, strict=False)})
    return {**values, **kwargs}


def observe(
    graph: ModelGraph, model: torch.nn.Module, look: Look, wanted: frozenset[str], see: See, *, part: float = 1.0
) -> int:
    """Run the program with the model's tensors over the samples; gives how many.

    Samples that don't fill a batch of the traced size are left out; are there fewer than one batch in all, they are
    repeated.
    """
    size = input_shape(graph)[0]
    state: dict[str, torch.Tensor] = {**graph.program.constants, **dict(model.named_buffers(remove_duplicate=False))}
    state |= dict(model.named_parameters(remove_duplicate=False))
    observer = Observer(graph, wanted, see)
    count = 0
    with torch.no_grad(), evaluating(model):
        for x, _ in look.batches(size, part=part):
            if len(x) < size and count:
                break
            full = torch.cat([x] * ceil(size / len(x)))[:size]
            observer.run(*_placeholders(graph, state, full))
            count += len(x)
    return count


def _placeholders(graph: ModelGraph, state: Mapping[str, torch.Tensor], x: torch.Tensor) -> Iterator[torch.Tensor]:
    names = graph.program.parameters
    for node in graph.program.graph.nodes:
        if node.op == "placeholder":
            yield state[names[node.name]].detach() if node.name in names else x


@dataclass(frozen=True, kw_only=True)
class Read:
    """Dimension `dim` of what node `node` gives: index i is of the group's channel `channels[i]`, of none where -1."""

    node: str
    dim: int
    channels: Indices


def reads(graph: ModelGraph) -> dict[str, list[Read]]:
    """For every group the tensors that contractions read its channels in; where there is none, the first with them."""
    reached = computed(graph)
    active = [node.name for node in graph.nodes if node.name in reached]
    shapes = {node.name: node.shape for node in graph.nodes}
    sources = {name for node in graph.nodes if _sums_over_channels(node, shapes) for name in node.inputs}
    found: dict[str, list[Read]] = {group.id: [] for group in graph.groups}
    for name in active:
        for group, read in channels_at(graph, name) if name in sources else ():
            found[group].append(read)
    unread = {group for group, own in found.items() if not own}
    for name in active if unread else ():
        for group, read in channels_at(graph, name):
            if group in unread:
                found[group].append(read)
                unread.remove(group)
    return found


def _sums_over_channels(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether it is a contraction, and no depthwise one."""
    if node.operator not in READERS:
        return False
    groups = int(node.attributes.get("groups", 1))
    return groups == 1 or groups != shapes[node.inputs[0]][1]


def channels_at(graph: ModelGraph, node: str) -> Iterator[tuple[str, Read]]:
    """(group, where its channels lie) of what a node gives."""
    sizes = [group.num_channels for group in graph.groups]
    starts = np.cumsum([0, *sizes])[:-1]
    group_of = np.append(np.repeat(np.arange(len(sizes)), sizes), -1)  # the last entry answers -1: none
    for dim, rows in enumerate(graph.channels.get(node, ())):
        of_group = group_of[rows]
        for number in np.unique(of_group[of_group >= 0]).tolist():
            channels = np.where(of_group == number, rows - starts[number], -1).max(axis=0)
            yield graph.groups[number].id, Read(node=node, dim=dim, channels=channels.astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Site:
    """A convolution or linear that reads channels of groups: `inputs[group]` are those of its input's indices."""

    node: str
    operator: str
    inputs: Mapping[str, Indices]


def sites(graph: ModelGraph) -> list[Site]:
    """Every convolution (depthwise ones apart) and linear that reads a channel of a group from its activations."""
    active = computed(graph)
    nodes = {node.name: node for node in graph.program.graph.nodes}
    shapes = {node.name: node.shape for node in graph.nodes}
    found = []
    for node in graph.nodes:
        if node.operator not in CONTRACTIONS or node.name not in active or not _sums_over_channels(node, shapes):
            continue
        source: Any = nodes[node.name].args[0]
        if source.name not in active:
            continue
        dim = len(graph.channels[source.name]) - 1 if node.operator == "linear" else 1
        inputs = {group: read.channels for group, read in channels_at(graph, source.name) if read.dim == dim}
        if inputs:
            found.append(Site(node=node.name, operator=node.operator, inputs=inputs))
    return found
