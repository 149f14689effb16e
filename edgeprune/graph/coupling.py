"""Which dimensions must shrink together: propagate atoms through the program, then read the groups off the classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch.export import ExportedProgram

from edgeprune.graph import tracing
from edgeprune.graph.atoms import FREE, Atoms, no_atoms
from edgeprune.graph.rules import RULES, Call, Dims, unknown
from edgeprune.graph.structure import Group, Indices, Member, Refusal

CONTRACTIONS = ("conv1d", "conv2d", "conv3d", "linear")


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Groups and refusals, and for every node and dimension the channel of each index (-1: none).

    A channel number counts through `channel_names`, pairs of group id and channel within the group.
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    channels: Mapping[str, Dims]
    channel_names: tuple[tuple[str, int], ...]


def couple(program: ExportedProgram) -> Coupling:
    """Prove which channels of the program live or die together; refuse, with the reason, what can't be proven."""
    atoms = Atoms()
    dims = propagate(program, atoms)
    groups, refused, number = _groups(atoms)
    names = tuple((group.id, channel) for group in groups for channel in range(group.num_channels))
    channels = {
        node.name: tuple(
            np.array([number.get(root, FREE) for root in atoms.roots(dim).tolist()], dtype=np.int64) for dim in of_node
        )
        for node, of_node in dims.items()
    }
    return Coupling(groups=groups, refused=refused, channels=channels, channel_names=names)


def propagate(program: ExportedProgram, atoms: Atoms) -> dict[torch.fx.Node, Dims]:
    """Apply every operator's rule in program order; gives the atoms of every node's dimensions."""
    parameters, constants = tracing.parameter_names(program), tracing.constant_names(program)
    placeholders: dict[torch.fx.Node, str] = {}
    dims: dict[torch.fx.Node, Dims] = {}
    for node in program.graph.nodes:
        shape = tracing.shape_of(node)
        if node.op == "placeholder":
            name = parameters.get(node.name)
            if name is None:
                dims[node] = tuple(no_atoms(size) for size in shape)
            else:
                placeholders[node] = name
                dims[node] = atoms.of_parameter(name, shape)
            if name in constants:
                for dim in dims[node]:
                    atoms.fix(dim, Refusal(operator="constant", where=name, reason="it is no parameter and no buffer"))
        elif node.op == "output":
            _keep_outputs(program, node, dims, atoms)
        else:
            dims[node] = _apply_rule(node, shape, dims, placeholders, atoms)
    return dims


def _apply_rule(
    node: torch.fx.Node,
    shape: tuple[int, ...],
    dims: dict[torch.fx.Node, Dims],
    placeholders: dict[torch.fx.Node, str],
    atoms: Atoms,
) -> Dims:
    call = Call(
        operator=tracing.operator_name(node),
        where=tracing.module_name(node),
        arguments=tracing.arguments(node),
        shape=shape,
        tensors=tuple(node.all_input_nodes),
        dims=dims,
        parameters=placeholders,
        atoms=atoms,
    )
    result = RULES.get(call.operator, unknown)(call)
    assert tuple(len(dim) for dim in result) == shape, f"rule of {call.operator} at {call.where}: {shape}"
    return result


def _keep_outputs(
    program: ExportedProgram, node: torch.fx.Node, dims: Mapping[torch.fx.Node, Dims], atoms: Atoms
) -> None:
    for source in node.all_input_nodes:
        reason = Refusal(
            operator="output",
            where=tracing.module_name(source),
            reason="the model's output keeps its shape",
        )
        for dim in dims[source]:
            atoms.fix(dim, reason)


def _groups(atoms: Atoms) -> tuple[tuple[Group, ...], tuple[Refusal, ...], dict[int, int]]:
    """Classes that touch the same parameter dimensions form a group; also the channel number of each class.

    A group is named by its smallest dimension that no group before it is named by: behind a concatenation they share
    the smallest.
    """
    touched: dict[int, list[tuple[str, int]]] = defaultdict(list)
    roots = {key: atoms.roots(dim) for key, dim in atoms.dims.items()}
    for key in sorted(roots):
        for root in np.unique(roots[key]).tolist():
            touched[root].append(key)
    reasons = atoms.reasons()
    classes: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    refused: dict[Refusal, None] = {}
    for root, keys in touched.items():
        if not any(atoms.roles.get(key) == "producer" for key in keys):
            continue
        if root in reasons:
            refused.setdefault(reasons[root])
        else:
            classes[tuple(keys)].append(root)
    groups: list[Group] = []
    number: dict[int, int] = {}
    taken: set[tuple[str, int]] = set()
    for signature in sorted(classes):
        own = set(classes[signature])
        if len(own) < 2:  # a single channel can't shrink
            continue
        naming = next((key for key in signature if key not in taken), None)
        if naming is None:
            reason = "each of its dimensions names another group already"
            refused.setdefault(Refusal(operator="group", where=signature[0][0], reason=reason))
            continue
        order = [root for root in dict.fromkeys(roots[naming].tolist()) if root in own]
        start = len(number)
        number.update({root: start + i for i, root in enumerate(order)})
        groups.append(_group(naming, signature, order, roots, atoms))
        taken.add(naming)
    return tuple(groups), tuple(refused), number


def _group(
    naming: tuple[str, int],
    keys: tuple[tuple[str, int], ...],
    order: list[int],
    roots: Mapping[tuple[str, int], Indices],
    atoms: Atoms,
) -> Group:
    local = {root: i for i, root in enumerate(order)}
    members = tuple(
        Member(
            parameter=name,
            dim=dim,
            channels=np.array([local.get(root, FREE) for root in roots[name, dim].tolist()], dtype=np.int64),
            role=atoms.roles.get((name, dim), "per_channel"),
        )
        for name, dim in keys
    )
    return Group(id=f"{naming[0]}:{naming[1]}", num_channels=len(order), members=members)


def prunable_shares(
    program: ExportedProgram, groups: tuple[Group, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[float, float]:
    """Share of the MACs, and of the parameters, of convolutions and linears with a prunable dimension."""
    prunable = {member.parameter for group in groups for member in group.members}
    names = tracing.parameter_names(program)
    macs, params = [0, 0], {False: set[str](), True: set[str]()}
    for node in program.graph.nodes:
        if tracing.operator_name(node) not in CONTRACTIONS:
            continue
        weight = names.get(tracing.arguments(node)["weight"].name)
        if weight is None:
            continue
        shape, out = shapes[weight], tracing.shape_of(node)
        per_output = prod(shape[1:])
        macs[weight in prunable] += prod(out) * per_output
        params[weight in prunable].add(weight)
    counts = {flag: sum(prod(shapes[name]) for name in weights) for flag, weights in params.items()}
    return macs[True] / max(1, sum(macs)), counts[True] / max(1, sum(counts.values()))
