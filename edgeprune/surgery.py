"""Make the network really smaller: cut the parameters of the eager module by a plan, drop blocks, keep it trainable."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from edgeprune.comparing import Cut, check_dropped, check_same
from edgeprune.errors import SurgeryError, did_you_mean
from edgeprune.graph import Block, Group, ModelGraph, trace
from edgeprune.graph.ordering import moved_indices, why_not_ordered
from edgeprune.graph.program import shape_of
from edgeprune.graph.recording import uncollected
from edgeprune.graph.structure import Indices
from edgeprune.pattern import check_formats, mask_by_magnitude
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.weights import weights_hash
from edgeprune.zero_branch import ZeroBranch

SIZE_ATTRIBUTES = {
    "weight": (("out_channels", 0), ("in_channels", 1), ("out_features", 0), ("in_features", 1), ("num_features", 0)),
    "running_mean": (("num_features", 0),),
}
"""Attributes of a module that repeat a dimension of one of its parameters."""

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element to integers of that size: numpy moves those of any dtype."""


def apply(
    plan: Plan,
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    *,
    graph: ModelGraph | None = None,
) -> Pruned:
    """Cut a copy of `model` by `plan`; the model itself is left as it is.

    `graph` saves tracing the model again. Raises `SurgeryError` where the plan was made for another structure, names
    what is not there, or where Python code of the model hard-wires a size (with file and line) or computes with one.
    """
    graph = graph or trace(model, example_inputs)
    with uncollected():
        return _apply(plan, model, example_inputs, graph)


def _apply(plan: Plan, model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], graph: ModelGraph) -> Pruned:
    cut = read_plan(plan, graph)
    dropped = graph.outermost(plan.dropped)
    with ThreadPoolExecutor(max_workers=1) as pool:  # hashing leaves the interpreter free
        origin = pool.submit(weights_hash, model)
        module = _cut_copy(model, cut)
        check_formats(plan.formats, {n: tuple(p.shape) for n, p in module.named_parameters(remove_duplicate=False)})
        mask_by_magnitude(module, plan.formats)
        pruned = Pruned(module=module, plan=plan, example_inputs=example_inputs, origin=origin.result())
    _set_attributes(module, graph, cut)
    check_same(pruned, graph, cut)
    if dropped:
        pruned = replace(pruned, module=_dropped(module, dropped, graph, cut))
        check_dropped(pruned, dropped, graph)
    return pruned


def read_plan(plan: Plan, graph: ModelGraph) -> Cut:
    """Check a plan against a graph and turn it into the indices that every tensor dimension keeps."""
    if plan.structure_hash != graph.structure_hash:
        raise SurgeryError(
            f"the plan was made for another model: structure {plan.structure_hash[:12]}, this one is "
            f"{graph.structure_hash[:12]}; prune this model to get a plan for it"
        )
    known = {group.id for group in graph.groups}
    for name in plan.kept:
        if name not in known:
            raise SurgeryError(f"the plan names group '{name}', which the model lacks{did_you_mean(name, known)}")
    block_ids = {block.id for block in graph.blocks}
    for name in plan.dropped:
        if name not in block_ids:
            raise SurgeryError(f"the plan drops block '{name}', which the model lacks{did_you_mean(name, block_ids)}")
    kept = {group.id: _kept_channels(plan, graph, group.id) for group in graph.groups}
    masks: dict[tuple[str, int], Indices] = {}
    places: dict[tuple[str, int], Indices] = {}  # the index that comes to each place, where a plan orders channels
    for group in graph.groups:
        is_ordered = bool((np.diff(kept[group.id]) < 0).any())
        gone = np.setdiff1d(np.arange(group.num_channels), kept[group.id])
        for member in group.members:
            key = (member.parameter, member.dim)
            mask = masks.setdefault(key, np.ones(len(member.channels), dtype=np.int64))
            mask[np.isin(member.channels, gone)] = 0
            if is_ordered:
                place = places.setdefault(key, np.arange(len(mask), dtype=np.int64))
                own = member.channels >= 0
                place[own] = moved_indices(member.channels, kept[group.id], group.num_channels)[own]
    indices = {
        key: places[key][mask == 1] if key in places else np.flatnonzero(mask).astype(np.int64)
        for key, mask in masks.items()
        if key in places or not mask.all()
    }
    parts = [np.isin(np.arange(group.num_channels), kept[group.id]) for group in graph.groups]
    return Cut(indices=indices, kept=kept, stays=np.concatenate([*parts, np.array([True])]))


def _kept_channels(plan: Plan, graph: ModelGraph, group_id: str) -> Indices:
    group = graph.group(group_id)
    if group_id not in plan.kept:
        return np.arange(group.num_channels, dtype=np.int64)
    channels = group.first.channels
    positions = np.array(plan.kept[group_id], dtype=np.int64)
    if not len(positions):
        raise SurgeryError(f"group '{group_id}' keeps nothing, at least {group.least_channels} must stay")
    if positions.max() >= len(channels):
        raise SurgeryError(
            f"group '{group_id}' keeps position {positions.max()}, but the dimension has only {len(channels)}"
        )
    found, first = np.unique(channels[positions], return_index=True)
    kept: Indices = found[np.argsort(first)]
    if found[0] < 0 or len(np.unique(positions)) < len(positions) or np.isin(channels, found).sum() != len(positions):
        raise SurgeryError(f"group '{group_id}' keeps positions that tear a channel apart")
    if (np.diff(positions) < 0).any():
        _check_order(graph, group, kept, positions)
    if len(kept) < group.least_channels:
        raise SurgeryError(f"group '{group_id}' keeps {len(kept)} channels, at least {group.least_channels} must stay")
    return kept


def _check_order(graph: ModelGraph, group: Group, kept: Indices, positions: Indices) -> None:
    if why := why_not_ordered(graph, group):
        raise SurgeryError(f"the plan puts the channels of group '{group.id}' in another order, but {why}")
    if tuple(positions.tolist()) != ordered_positions_of(graph, group.id, kept):
        raise SurgeryError(f"group '{group.id}' keeps positions that tear a channel apart")


def positions_of(graph: ModelGraph, group_id: str, channels: Indices) -> tuple[int, ...]:
    """Positions along the naming dimension that belong to the given channels, ascending: what a plan stores."""
    return tuple(np.flatnonzero(np.isin(graph.group(group_id).first.channels, channels)).tolist())


def ordered_positions_of(graph: ModelGraph, group_id: str, channels: Indices) -> tuple[int, ...]:
    """The same for channels that are to lie in the order given."""
    group = graph.group(group_id)
    first = group.first.channels
    places = moved_indices(first, channels, group.num_channels)
    return tuple(places[np.isin(first, channels)].tolist())


def _dropped(module: torch.nn.Module, blocks: tuple[Block, ...], graph: ModelGraph, cut: Cut) -> torch.nn.Module:
    """The module with other ones in the place of those that go, under all names and in plain lists too."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for block in blocks:
        for name, zeros in _zeros(module, block, graph, cut):
            memo[id(module.get_submodule(name))] = zeros
    return copy.deepcopy(module, memo)


def _zeros(module: torch.nn.Module, block: Block, graph: ModelGraph, cut: Cut) -> Iterator[tuple[str, torch.nn.Module]]:
    """Each module of the block gives zeros of the shape that its output has between the pruned layers.

    New ones: were it to hand its input on, an in-place operator behind it would write into the trunk.
    """

    def size(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.shape
        if not isinstance(value, torch.fx.Node):
            return value
        channels = graph.channels.get(value.name)
        return value.meta["val"].shape if channels is None else torch.Size(cut.sizes(channels))

    batch = int(graph.nodes[0].shape[0]) if graph.nodes and graph.nodes[0].shape else 1
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    last = {node.name: node for node in graph.program.graph.nodes}
    for name in (*block.zero_modules, *block.skipped_modules):
        inside = [n for n in graph.nodes if n.name in block.nodes and f"{n.where}.".startswith(f"{name}.")]
        result = graph.program.results.get(name, last[inside[-1].name])
        source = last[inside[0].name].all_input_nodes
        own = next((shape_of(node)[0] for node in source if shape_of(node)), batch)
        zeros = ZeroBranch(tree_map(size, result, is_leaf=_is_node), own, like)
        _keep_attributes(module.get_submodule(name), zeros)
        yield name, zeros


def _keep_attributes(old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Other code may read the plain attributes of the module that goes (`self.attn.q_stride`)."""
    for name, value in vars(old).items():
        if not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple)):
            vars(new).setdefault(name, value)


def _is_node(value: Any) -> bool:
    return isinstance(value, torch.fx.Node)


def _cut_copy(model: torch.nn.Module, cut: Cut) -> torch.nn.Module:
    """A copy of the model with every cut parameter and buffer replaced, one object for all its names."""
    memo: dict[int, Any] = {}
    shapes: list[tuple[str, str, torch.Size]] = []
    for path, owner in model.named_modules():
        for registry in (owner._parameters, owner._buffers):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                smaller = memo.get(id(tensor))
                if smaller is None:
                    smaller = _cut(tensor, f"{path}.{name}" if path else name, cut)
                    if smaller is tensor:
                        continue
                    memo[id(tensor)] = smaller
                shapes.append((path, name, tensor.shape))
        for value in vars(owner).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach())  # torch copies no results of a computation
    try:
        module = copy.deepcopy(model, memo).eval()
    except Exception as error:  # the model's own classes may raise anything
        raise SurgeryError(f"{type(model).__name__} can't be copied: {error}") from error
    for path, name, before in shapes:
        owner = module.get_submodule(path)
        _resize_attributes(owner, name, before, getattr(owner, name).shape)
    return module


def _cut(tensor: torch.Tensor, qualified: str, cut: Cut) -> torch.Tensor:
    smaller = tensor.detach()
    taken = [(dim, cut.indices[qualified, dim]) for dim in range(tensor.dim()) if (qualified, dim) in cut.indices]
    if not taken:
        return tensor
    for dim, indices in taken:
        smaller = _taken(smaller, dim, indices)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    return smaller


def _taken(tensor: torch.Tensor, dim: int, indices: Indices) -> torch.Tensor:
    """The tensor at `indices` of a dimension; by numpy where it can, in a quarter of `index_select`'s time."""
    words = WORDS.get(tensor.element_size())
    if tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg() or words is None:
        return tensor.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    taken = tensor.view(words).numpy().take(indices, axis=dim)
    return torch.from_numpy(taken).view(tensor.dtype)


def _resize_attributes(owner: torch.nn.Module, name: str, before: torch.Size, after: torch.Size) -> None:
    """Attributes that only repeat a dimension of a parameter, and that no forward reads."""
    for attribute, dim in SIZE_ATTRIBUTES.get(name, ()):
        if dim < len(before) and getattr(owner, attribute, None) == before[dim]:
            setattr(owner, attribute, after[dim])


def _set_attributes(module: torch.nn.Module, graph: ModelGraph, cut: Cut) -> None:
    """Set the integers that the forward reads and that change with the widths."""
    kept = {group: len(channels) for group, channels in cut.kept.items()}
    for (path, name, index), rule in graph.attributes.items():
        owner = module.get_submodule(path)
        if not hasattr(owner, name):
            continue
        value = rule.at(kept)
        if index is not None:
            items = list(getattr(owner, name))
            items[index] = value
            vars(owner)[name] = type(getattr(owner, name))(items)
        else:
            vars(owner)[name] = value
        if name == "groups" and hasattr(owner, "in_channels") and isinstance(owner.weight, torch.Tensor):
            sizes = owner.weight.shape[0], owner.weight.shape[1] * value
            first, second = sizes if getattr(owner, "transposed", False) else sizes[::-1]
            vars(owner).update(in_channels=first, out_channels=second)
