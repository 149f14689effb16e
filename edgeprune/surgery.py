"""Make the network really smaller: cut the parameters of the eager module by a plan, drop blocks, keep it trainable."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from edgeprune.errors import SurgeryError, did_you_mean
from edgeprune.graph import Block, ModelGraph, trace
from edgeprune.graph.following import EXPECTED, Sizes, expected_sizes
from edgeprune.graph.program import Program, arguments, module_name, operator_name, shape_of
from edgeprune.graph.recording import record, uncollected
from edgeprune.graph.structure import Indices
from edgeprune.graph.tracing import exported
from edgeprune.graph.widths import Widths
from edgeprune.models import evaluating
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.weights import weights_hash

SIZE_ATTRIBUTES = {
    "weight": (("out_channels", 0), ("in_channels", 1), ("out_features", 0), ("in_features", 1), ("num_features", 0)),
    "running_mean": (("num_features", 0),),
}
"""Attributes of a module that repeat a dimension of one of its parameters."""

SIZES = frozenset(
    "shape size sizes split_size split_sizes start end length groups normalized_shape num_groups N C HxW group".split()
)
"""Arguments that are sizes of dimensions, which `_check_sizes` and the shapes of the results account for."""
ALSO_SIZED = frozenset(("slice_scatter", "native_layer_norm", "native_group_norm", "_fused_rms_norm"))
"""Operators with such arguments that `EXPECTED` says nothing about."""


class ZeroBranch(torch.nn.Module):
    """Stands where a dropped block ended: gives what the module there gave, with zeros for its tensors.

    `result` holds a `torch.Size` for every tensor; where the first size is that of the input's first dimension (the
    batch) it follows it. `zero` gives their type and device.
    """

    def __init__(self, result: Any, batch: int, zero: torch.Tensor) -> None:
        super().__init__()
        self.leaves, self.spec = tree_flatten(result, is_leaf=lambda leaf: isinstance(leaf, torch.Size))
        self.batch = batch
        self.zero: torch.Tensor
        self.register_buffer("zero", zero.new_zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever comes in: zeros."""
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)

        def zeros(shape: Any) -> Any:
            if not isinstance(shape, torch.Size):
                return shape
            follows = x is not None and shape[:1] == (self.batch,)
            return self.zero.new_zeros((x.shape[0], *shape[1:]) if follows and x is not None else shape)

        return tree_unflatten([zeros(leaf) for leaf in self.leaves], self.spec)

    def extra_repr(self) -> str:
        return ", ".join(str(tuple(leaf)) for leaf in self.leaves if isinstance(leaf, torch.Size))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which indices of every tensor stay, the channels that every group keeps, and whether each channel stays.

    `stays` counts as `ModelGraph.channel_names` does; its last entry answers for -1, an index of no group.
    """

    indices: Mapping[tuple[str, int], Indices]
    kept: Mapping[str, Indices]
    stays: npt.NDArray[np.bool_]

    def sizes(self, dims: tuple[Indices, ...]) -> tuple[int, ...]:
        """What is left of dimensions with these channels, int64 [k, size] each."""
        return tuple(int(self.stays[dim].all(axis=0).sum()) if (dim >= 0).any() else dim.shape[1] for dim in dims)


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
    dropped = [block for block in graph.blocks if block.id in plan.dropped]
    module = _cut_copy(model, cut)
    pruned = Pruned(module=module, plan=plan, example_inputs=example_inputs, origin=weights_hash(model))
    _set_attributes(module, graph, cut)
    _check(pruned, graph, cut)
    if dropped:
        pruned = replace(pruned, module=_dropped(module, dropped, graph, cut))
        _check_dropped(pruned, dropped, graph)
    return pruned


def read_plan(plan: Plan, graph: ModelGraph) -> Cut:
    """Check a plan against a graph and turn it into the indices that every tensor dimension keeps."""
    if plan.structure_hash != graph.structure_hash:
        raise SurgeryError(
            f"the plan was made for another model: structure {plan.structure_hash[:12]}, this one is "
            f"{graph.structure_hash[:12]}; prune this model to get a plan for it"
        )
    for name, form in plan.formats.items():
        if form != "dense":
            raise SurgeryError(f"the plan wants '{name}' as {form}; only dense can be applied yet")
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
    for group in graph.groups:
        gone = np.setdiff1d(np.arange(group.num_channels), kept[group.id])
        for member in group.members:
            key = (member.parameter, member.dim)
            mask = masks.setdefault(key, np.ones(len(member.channels), dtype=np.int64))
            mask[np.isin(member.channels, gone)] = 0
    indices = {key: np.flatnonzero(mask).astype(np.int64) for key, mask in masks.items() if not mask.all()}
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
    kept = np.unique(channels[positions])
    if kept[0] < 0 or np.isin(channels, kept).sum() != len(positions):
        raise SurgeryError(f"group '{group_id}' keeps positions that tear a channel apart")
    if len(kept) < group.least_channels:
        raise SurgeryError(f"group '{group_id}' keeps {len(kept)} channels, at least {group.least_channels} must stay")
    return kept


def positions_of(graph: ModelGraph, group_id: str, channels: Indices) -> tuple[int, ...]:
    """Positions along the naming dimension that belong to the given channels: what a plan stores."""
    return tuple(np.flatnonzero(np.isin(graph.group(group_id).first.channels, channels)).tolist())


def _dropped(module: torch.nn.Module, blocks: list[Block], graph: ModelGraph, cut: Cut) -> torch.nn.Module:
    """The module with other ones in the place of those that go, under all names and in plain lists too."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for block in blocks:
        for name, zeros in _zeros(module, block, graph, cut):
            memo[id(module.get_submodule(name))] = zeros
    return copy.deepcopy(module, memo)


def _check_dropped(pruned: Pruned, blocks: list[Block], graph: ModelGraph) -> None:
    """Of the dense model's calls, all outside of the blocks are left, and none of the modules that went."""
    gone = [name for block in blocks for name in (block.zero_module, *block.skipped_modules)]
    inside = frozenset().union(*(block.nodes for block in blocks))
    calls = _calls(graph.program)
    left = [n for n in calls if not any(f"{module_name(n)}.".startswith(f"{name}.") for name in gone)]
    outside = [operator_name(node) for node in calls if node.name not in inside]
    found = [
        operator_name(node)
        for node in _calls(_record(pruned, graph))
        if not any(kind is ZeroBranch for _, kind in (node.meta.get("nn_module_stack") or {}).values())
    ]
    if not _is_part(outside, found) or not _is_part(found, [operator_name(node) for node in left]):
        names = ", ".join(block.id or "the model" for block in blocks)
        raise SurgeryError(f"{type(pruned.module).__name__} does not do without the branches of {names}")


def _is_part(part: list[str], whole: list[str]) -> bool:
    """Whether a list is another one with some entries left out."""
    rest = iter(whole)
    return all(name in rest for name in part)


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
    for name in (block.zero_module, *block.skipped_modules):
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
    for dim in range(tensor.dim()):
        indices = cut.indices.get((qualified, dim))
        if indices is not None:
            smaller = smaller.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    if smaller.shape == tensor.shape:
        return tensor
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    return smaller


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


def _check(pruned: Pruned, graph: ModelGraph, cut: Cut) -> None:
    """The pruned model must call the same operators, on the sizes that the cut leaves and with the same numbers.

    A number that is derived from a size in Python (`x * x.shape[1] ** -0.5`) would change with it, and the pruned
    network would compute something else than the dense one with zeros.
    """
    program = _record(pruned, graph)
    kept = {group: len(channels) for group, channels in cut.kept.items()}
    sizes = Sizes(channels=graph.channels, widths=Widths(graph.groups))
    same: dict[Any, Any] = {}
    for before, after in zip_longest(_calls(graph.program), _calls(program)):
        names = [operator_name(node) if node is not None else "nothing" for node in (before, after)]
        if names[0] != names[1]:
            raise _differs(pruned, after or before, f"calls {names[1]} after pruning, {names[0]} before")
        expected = cut.sizes(graph.channels[before.name])
        if shape_of(after) != expected:
            raise _differs(pruned, after, f"gives {names[1]} of shape {shape_of(after)} after pruning, not {expected}")
        _check_sizes(pruned, before, after, sizes, kept)
        numbers = [_numbers(node) for node in (before, after)]
        if numbers[0] != numbers[1]:
            was = f"{names[0]}{numbers[0]} before, {numbers[1]} after"
            raise _differs(pruned, after, f"computes with a size that pruning changes: {was}")
        if [same.get(s, s) for s in _sources(before, graph.program)] != _sources(after, program):
            raise _differs(pruned, after, f"gives {names[1]} another tensor after pruning than before")
        same[before] = after
    for name, tensor in graph.program.constants.items():
        if name not in program.constants or not _equal(tensor, program.constants[name]):
            kind = type(pruned.module).__name__
            raise SurgeryError(f"{kind} holds another tensor '{name}' after pruning: its code fixes a size")
    found, wanted = ([shape_of(node) for node in p.outputs] for p in (program, graph.program))
    if found != wanted:
        raise SurgeryError(f"{type(pruned.module).__name__} gives {found} after pruning, {wanted} before")


def _calls(program: Program) -> list[torch.fx.Node]:
    """All calls but `contiguous`, which torch leaves out where the layout is right already."""
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return [node for node in calls if operator_name(node) != "contiguous"]


def _check_sizes(pruned: Pruned, before: Any, after: Any, sizes: Sizes, kept: Mapping[str, int]) -> None:
    """Integers that are sizes must be those of the kept channels (`num_groups` of a norm shows in no shape)."""
    values = arguments(after)
    for (name, i), expected in expected_sizes(before, sizes, kept).items():
        found = values[name] if isinstance(values[name], int) else values[name][i]
        if found not in (expected, -1):
            raise _differs(
                pruned, after, f"calls {operator_name(after)} with {name} {found} after pruning, not {expected}"
            )


def _differs(pruned: Pruned, node: Any, what: str) -> SurgeryError:
    source = node.meta.get("source", "") or module_name(node)
    return SurgeryError(
        f"{type(pruned.module).__name__} {what}{f', at {source}' if source else ''}: its code fixes a size"
    )


def _numbers(node: Any) -> list[Any]:
    """What an operator is told beside tensors, in order; the sizes of dimensions, which may change, left out."""
    operator = operator_name(node)
    sized = operator in EXPECTED or operator in ALSO_SIZED
    given = [value for name, value in arguments(node).items() if not (sized and name in SIZES)]
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, (int, float, complex, str))]


def _sources(node: Any, program: Program) -> list[Any]:
    """The tensors that a call reads: calls, qualified names of parameters, places of inputs."""
    found: list[Any] = []
    for leaf in tree_leaves((node.args, node.kwargs)):
        if not _is_node(leaf):
            continue
        while leaf.op == "call_function" and operator_name(leaf) == "contiguous":
            leaf = leaf.args[0]
        if leaf.op == "placeholder":
            found.append(program.parameters.get(leaf.name) or program.inputs.index(leaf.name))
        else:
            found.append(leaf)
    return found


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same elements, nan being itself."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _record(pruned: Pruned, graph: ModelGraph) -> Program:
    """Trace the pruned model; Python code that hard-wires a size shows itself here, with file and line."""
    kind = type(pruned.module).__name__
    try:
        if graph.program.tracer == "recording":
            with evaluating(pruned.module):
                return record(pruned.module, pruned.example_inputs, sized=False)
        return exported(pruned.module, pruned.example_inputs)
    except Exception as error:  # the model's own code may raise anything
        own = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/torch/" not in f.filename and "/edgeprune/" not in f.filename
        ]
        place = f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
        reason = str(error).strip().split("\n")[0]
        raise SurgeryError(f"{kind} does not run after pruning{place}: its code fixes a size: {reason}") from error
