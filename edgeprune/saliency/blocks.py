"""Criteria that look at blocks: what a residual branch adds to the stream, and what its drop changes.

The channels follow: `l2`'s share of the block's value, by the number of groups in it (`members.from_blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils._pytree import tree_map

from edgeprune.data import Data
from edgeprune.errors import InputError
from edgeprune.graph.structure import Block, ModelGraph
from edgeprune.models import output_tensor
from edgeprune.quality import difference
from edgeprune.saliency.gates import cotangent
from edgeprune.saliency.members import from_blocks
from edgeprune.saliency.reading import BATCH_SIZE, Look, frozen, look_at, observe
from edgeprune.saliency.registry import Saliency, criterion
from edgeprune.saliency.weights import l2

Difference: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DROP_PART = 0.25
"""Share of the samples that the drop of a block is measured on: each block costs a forward pass over them."""


@criterion(
    source="Men et al. 2024, ShortGPT: BI = 1 - E cos(x_i, x_i+1)",
    data="unlabelled",
    granularity="blocks",
    forward="1",
)
def block_influence(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """1 - cosine between the stream without and with the block's branch, mean over positions and samples.

    The vectors run over the channels: of x and x + f(x), or p(x) and p(x) + f(x) with a projection p.
    """
    _check(graph, "block_influence")
    places = {block.id: _add_of(graph, block) for block in graph.blocks}
    shortcuts = {shortcut for _, shortcut in places.values()}
    streams: dict[str, torch.Tensor] = {}
    sums = {block.id: torch.zeros(2, dtype=torch.float64) for block in graph.blocks}  # of 1 - cosine, of positions

    def see(node: torch.fx.Node, arguments: Mapping[str, Any], value: torch.Tensor) -> None:
        for block, (add, shortcut) in places.items():
            if add == node.name:
                angles = 1 - _cosine(streams[shortcut], value, _channel_dim(graph, add))
                sums[block] += torch.tensor([float(angles.sum()), angles.numel()], dtype=torch.float64)
        if node.name in shortcuts:
            streams[node.name] = value

    wanted = frozenset({name for place in places.values() for name in place})
    count = observe(graph, model, look_at(data, seed), wanted, see)
    blocks = {name: max(0.0, float(total / positions)) for name, (total, positions) in sums.items()}
    shares = l2(graph, model, data, seed).channels
    return from_blocks(graph, shares, blocks, unit="1 - cosine", num_samples=count)


def _add_of(graph: ModelGraph, block: Block) -> tuple[str, str]:
    """The nodes of the add behind a block's branch and of its other operand."""
    for node in graph.program.graph.nodes:
        if node.name not in block.nodes and any(source.name in block.nodes for source in node.all_input_nodes):
            (shortcut,) = (source for source in node.all_input_nodes if source.name not in block.nodes)
            return node.name, shortcut.name
    raise AssertionError(f"block {block.id} is read by nothing")


def _channel_dim(graph: ModelGraph, node: str) -> int:
    """The one dimension that channels of groups lie in; else 1 of a picture's, the last of others."""
    dims = graph.channels[node]
    found = [dim for dim, rows in enumerate(dims) if dim and (rows >= 0).any()]
    return found[0] if len(found) == 1 else (1 if len(dims) == 4 else len(dims) - 1)


def _cosine(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """float64, along `dim`; 1 where both vectors are zero, 0 where one is."""
    a, b = a.double(), b.double()
    norms = a.norm(dim=dim), b.norm(dim=dim)
    product = norms[0] * norms[1]
    return torch.where(product > 0, (a * b).sum(dim) / product, (norms[0] == norms[1]).double())


@criterion(
    source="the gate of `taylor` (Theis et al. 2018) on a branch",
    data="unlabelled",
    granularity="blocks",
    forward="1",
    backward="1",
)
def block_taylor(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats of KL(dense || dropped) to the first term that isn't zero, ½ E[g²], by a gate on the branch.

    g is the derivative of `taylor`'s u · output by the gate, a factor on the modules that the branch ends in; labels
    are used where there are some.
    """
    _check(graph, "block_taylor")
    look = look_at(data, seed)
    generator = torch.Generator().manual_seed(seed)
    gates = torch.ones(len(graph.blocks), requires_grad=True)
    total, count = torch.zeros(len(graph.blocks), dtype=torch.float64), 0

    def scaled(module: torch.nn.Module, inputs: object, output: Any, *, number: int) -> Any:
        return tree_map(lambda o: o * gates[number] if isinstance(o, torch.Tensor) else o, output)

    with frozen(model):
        hooks = [
            model.get_submodule(name).register_forward_hook(partial(scaled, number=number))
            for number, block in enumerate(graph.blocks)
            for name in block.zero_modules
        ]
        try:
            for x, y in look.batches(1):
                with torch.enable_grad():
                    output = output_tensor(model(x))
                    u = cotangent(output.detach(), labels=y, generator=generator)
                    (g,) = torch.autograd.grad((output * u).sum(), gates)
                total += g.double().square()
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    blocks = {block.id: float(value) for block, value in zip(graph.blocks, total / (2 * count), strict=True)}
    shares = l2(graph, model, data, seed).channels
    return from_blocks(graph, shares, blocks, unit="nats", num_samples=count)


@criterion(
    source="measured",
    data="unlabelled",
    granularity="blocks",
    forward="(1 + blocks) / 4",
)
def block_loss(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """Nats of KL(dense || dropped), measured with each block alone dropped."""
    _check(graph, "block_loss")
    look = look_at(data, seed)
    blocks = measured_drops(graph, model, look)
    shares = l2(graph, model, data, seed).channels
    return from_blocks(graph, shares, blocks, unit="nats", num_samples=int(np.ceil(look.samples * DROP_PART)))


def _check(graph: ModelGraph, name: str) -> None:
    if not graph.blocks:
        raise InputError(
            f"saliency '{name}': this model has no block that may be dropped; take one for channels, like l2"
        )


def measured_drops(
    graph: ModelGraph, model: torch.nn.Module, look: Look, *, moved: Difference = difference
) -> dict[str, float]:
    """`drop_costs` on a part of the samples."""
    with frozen(model):
        limit = int(np.ceil(look.samples * DROP_PART))
        return drop_costs(graph.blocks, model, look.data, seed=look.seed, views=look.views, limit=limit, moved=moved)


def drop_costs(
    blocks: tuple[Block, ...],
    model: torch.nn.Module,
    data: Data,
    *,
    seed: int,
    views: int,
    limit: int,
    moved: Difference = difference,
) -> dict[str, float]:
    """What dropping each block alone changes: the mean of `moved(dense, dropped)` (KL in nats unless told)."""
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
                    costs[block.id] += float(moved(dense, output_tensor(model(x))).sum())
                finally:
                    for hook in hooks:
                        hook.remove()
            count += len(x)
    return {name: cost / count for name, cost in costs.items()}


def _zeros(module: torch.nn.Module, inputs: object, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return type(output)(torch.zeros_like(o) if isinstance(o, torch.Tensor) else o for o in output)
