"""Which dimensions must shrink together: propagate atoms through the program, then read the groups off the classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from edgeprune.graph.atoms import FREE, Atoms, distinct, is_free, no_atoms
from edgeprune.graph.program import Program, arguments, integer_slots, module_name, operator_name, shape_of
from edgeprune.graph.rules import RULES, Call, Dims, unknown
from edgeprune.graph.sizes import Expression
from edgeprune.graph.structure import Group, Indices, Member, Refusal

CONTRACTIONS = frozenset("conv1d conv2d conv3d linear conv_transpose1d conv_transpose2d conv_transpose3d".split())
Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Groups and refusals, and for every node and dimension the channels of each index, int64 [k, size] (-1: none).

    A channel's number counts through the groups in their order. `roots` are the atoms of every group, int64
    [1, channels].
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    channels: Mapping[str, Dims]
    roots: Mapping[str, Indices]


def propagate(program: Program, atoms: Atoms) -> dict[torch.fx.Node, Dims]:
    """Apply every operator's rule in program order; gives the atoms of every node's dimensions."""
    placeholders: dict[torch.fx.Node, str] = {}
    dims: dict[torch.fx.Node, Dims] = {}
    data = set(program.inputs)
    for node in program.graph.nodes:
        if any(source.name in data for source in node.all_input_nodes):
            data.add(node.name)
        if node.op == "placeholder":
            shape = shape_of(node)
            name = program.parameters.get(node.name)
            if name is None:
                dims[node] = tuple(no_atoms(size) for size in shape)
            else:
                placeholders[node] = name
                dims[node] = atoms.of_parameter(name, shape)
            if name is not None and name in program.constants:
                for dim in dims[node]:
                    atoms.fix(dim, Refusal(operator="constant", where=name, reason="it is no parameter and no buffer"))
        elif node.op == "output":
            _keep_outputs(node, dims, atoms)
        else:
            dims[node] = _apply_rule(node, dims, placeholders, atoms, is_data=node.name in data)
    return dims


def _apply_rule(
    node: torch.fx.Node,
    dims: dict[torch.fx.Node, Dims],
    placeholders: dict[torch.fx.Node, str],
    atoms: Atoms,
    *,
    is_data: bool,
) -> Dims:
    value = node.meta.get("val")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    shapes = tuple(tuple(map(int, t.shape)) if isinstance(t, torch.Tensor) else () for t in tensors)
    call = Call(
        operator=operator_name(node),
        where=module_name(node),
        arguments=arguments(node),
        shapes=shapes,
        tensors=tuple(node.all_input_nodes),
        dims=dims,
        parameters=placeholders,
        atoms=atoms,
        is_data=is_data,
        sizes=_expressions(node),
    )
    result = RULES.get(call.operator, unknown)(call)
    outputs = result if isinstance(result, list) else [result]
    found = tuple(tuple(dim.shape[1] for dim in output) for output in outputs)
    assert found == shapes, f"rule of {call.operator} at {call.where}: {found}, expected {shapes}"
    return result  # type: ignore[no-any-return]


def _expressions(node: torch.fx.Node) -> dict[str, list[Expression]]:
    expressions = node.meta.get("sizes")
    if expressions is None:
        return {}
    return {name: [expressions[i] for i in places] for name, places in integer_slots(node).items()}


def _keep_outputs(node: torch.fx.Node, dims: Mapping[torch.fx.Node, Dims], atoms: Atoms) -> None:
    for source in node.all_input_nodes:
        reason = Refusal(operator="output", where=module_name(source), reason="the model's output keeps its shape")
        for dim in dims[source]:
            atoms.fix(dim, reason)


def read_groups(atoms: Atoms, dims: Mapping[torch.fx.Node, Dims]) -> Coupling:
    """Groups from what is known of the atoms: classes that touch the same parameter dimensions form one."""
    atoms.settle()
    groups, refused, ordered = _groups(atoms)
    table = np.full(atoms.count + 1, FREE, dtype=np.int64)
    every = np.concatenate([np.zeros(0, dtype=np.int64), *ordered])
    table[every] = np.arange(len(every))
    found: dict[int, Indices] = {}
    kept = []

    def channels(dim: Indices) -> Indices:
        if id(dim) not in found:
            kept.append(dim)
            found[id(dim)] = dim[:1] if is_free(dim) else _without_empty(table[atoms.roots(dim)])
        return found[id(dim)]

    of_nodes = {
        node.name: tuple(map(channels, of_node[0] if isinstance(of_node, list) else of_node))
        for node, of_node in dims.items()
    }
    roots = {group.id: own[None] for group, own in zip(groups, ordered, strict=True)}
    return Coupling(groups=groups, refused=refused, channels=of_nodes, roots=roots)


def _without_empty(rows: Indices) -> Indices:
    used = (rows != FREE).any(axis=1)
    used[0] |= not used.any()
    result: Indices = rows[used]
    return result


def _groups(atoms: Atoms) -> tuple[tuple[Group, ...], tuple[Refusal, ...], list[Indices]]:
    """Groups, refusals, and for each group the representatives of its channels in order.

    A group is named by its smallest dimension that no group before it is named by: behind a concatenation, and for
    the two factors of a product, they share the smallest.
    """
    while True:
        roots = {key: atoms.roots(dim) for key, dim in atoms.dims.items()}
        classes, refused = _classes(atoms, roots)
        if not _fix_torn_products(atoms, roots, classes):
            break
    statistics = [atoms.roots(dim).ravel() for dim in atoms.statistics]
    changing = distinct(np.concatenate([np.zeros(0, dtype=np.int64), *statistics]))
    groups: list[Group] = []
    ordered: list[Indices] = []
    table = np.full(atoms.count + 1, FREE, dtype=np.int64)
    taken: dict[str, int] = {}
    for keys, members in classes:
        if len(members) < 2:  # a single channel can't shrink
            continue
        naming = next((key for key in keys if _name(key) not in taken), keys[0])
        times = taken[_name(naming)] = taken.get(_name(naming), 0) + 1
        along = roots[naming].T.ravel()
        present, first = np.unique(along[np.isin(along, members)], return_index=True)
        order = present[np.argsort(first)]
        group_id = _name(naming) if times == 1 else f"{_name(naming)}#{times}"
        changes = bool(np.isin(order, changing).any())
        groups.append(_group(group_id, keys, order, roots, atoms.roles, table, changes_statistics=changes))
        ordered.append(order)
    return tuple(groups), (*refused, *_all_or_nothing(atoms, roots, groups)), ordered


def _all_or_nothing(atoms: Atoms, roots: Mapping[Key, Indices], groups: list[Group]) -> Iterator[Refusal]:
    """Outputs of contractions that could only go as a whole."""
    cut = {(member.parameter, member.dim) for group in groups for member in group.members}
    for key in sorted(key for key, role in atoms.roles.items() if role == "producer" and key not in cut):
        own = roots[key][roots[key] != FREE]
        if len(own) > 1 and (atoms.reason[own] < 0).all():
            yield Refusal(
                operator="group", where=key[0], reason="its channels live or die together, with those they meet"
            )


def _fix_torn_products(
    atoms: Atoms, roots: Mapping[Key, Indices], classes: list[tuple[tuple[Key, ...], Indices]]
) -> bool:
    """Where two groups meet, each channel of one must meet each of the other: else one of them has to stay.

    Otherwise a dimension could lose all its indices, or lose a number that depends on which channels are kept.
    """
    table = np.full(atoms.count + 1, FREE, dtype=np.int64)
    for number, (_, members) in enumerate(classes):
        table[members] = number
    torn = False
    for (name, _), rows in sorted(roots.items()):
        if len(rows) < 2:
            continue
        columns = np.unique(rows, axis=1)
        numbers = np.sort(table[columns], axis=0)
        kinds, inverse = np.unique(numbers, axis=1, return_inverse=True)
        for i, kind in enumerate(kinds.T.tolist()):
            meeting = [number for number in kind if number != FREE]
            count = int((inverse.ravel() == i).sum())
            if len(meeting) > 1 and count != prod(len(classes[number][1]) for number in meeting):
                smallest = min(meeting, key=lambda number: (len(classes[number][1]), number))
                reason = "its channels meet those of another group only in part"
                atoms.fix(classes[smallest][1][None], Refusal(operator="group", where=name, reason=reason))
                torn = True
    return torn


def _name(key: Key) -> str:
    return f"{key[0]}:{key[1]}"


def _classes(
    atoms: Atoms, roots: Mapping[Key, Indices]
) -> tuple[list[tuple[tuple[Key, ...], Indices]], tuple[Refusal, ...]]:
    """Classes that may go, by the dimensions they touch and by what they share columns with; and what may not go."""
    keys = sorted(roots)
    pairs = [rows[[i, j]] for rows in roots.values() for i in range(len(rows)) for j in range(i + 1, len(rows))]
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *(roots[key].ravel() for key in keys)])
    of_key = np.repeat(np.arange(len(keys)), [roots[key].size for key in keys])
    touches = distinct((flat * len(keys) + of_key)[flat != FREE])  # root and key in one number
    root, key_number = np.divmod(touches, max(1, len(keys)))
    signature = np.zeros(atoms.count, dtype=np.uint64)  # of the keys that a root touches
    np.add.at(signature, root, np.random.default_rng(0).integers(1, 2**63, len(keys), dtype=np.uint64)[key_number])
    keys_of: dict[int, list[Key]] = defaultdict(list)
    roots_of: dict[int, Indices] = {}
    present = distinct(root)
    _, kind = np.unique(signature[present], return_inverse=True)
    ordered = present[np.argsort(kind, kind="stable")]
    for number, own in enumerate(np.split(ordered, np.cumsum(np.bincount(kind))[:-1])):
        if len(own):
            low, high = np.searchsorted(root, (own[0], own[0] + 1))
            keys_of[number] = [keys[i] for i in key_number[low:high].tolist()]
            roots_of[number] = own
    partners = _partners(pairs)
    classes = []
    for number, touched in sorted(keys_of.items(), key=lambda item: item[1]):
        if any(atoms.roles.get(key) == "producer" for key in touched):
            own = roots_of[number]
            members = own[atoms.reason[own] < 0]
            classes += [(tuple(touched), part) for part in _apart(members, partners)]
    return classes, _refused(atoms)


def _refused(atoms: Atoms) -> tuple[Refusal, ...]:
    """Why what a contraction produces must stay, where it must, each reason once."""
    refused: dict[int, None] = {}
    for key in sorted(key for key, role in atoms.roles.items() if role == "producer"):
        rows = atoms.roots(atoms.dims[key], whole=True)
        for number in distinct(atoms.reason[rows[rows != FREE]]).tolist():
            if number >= 0:
                refused.setdefault(number)
    return tuple(atoms.refusals[number] for number in refused)


def _partners(pairs: list[Indices]) -> dict[int, set[int]]:
    """Atoms that meet in a column."""
    partners: dict[int, set[int]] = defaultdict(set)
    if pairs:
        together = np.concatenate(pairs, axis=1)
        together = np.unique(together[:, (together != FREE).all(axis=0)], axis=1)
        for a, b in together.T.tolist():
            partners[a].add(b)
            partners[b].add(a)
    return partners


def _apart(members: Indices, partners: Mapping[int, set[int]]) -> list[Indices]:
    """Two factors of one product are different groups, also where they touch the same dimensions."""
    if not len(members):
        return []
    if not partners or partners.keys().isdisjoint(members.tolist()):
        return [members]
    parts: list[list[int]] = []
    for root in members.tolist():
        own = partners.get(root, set())
        part = next((part for part in parts if own.isdisjoint(part)), None)
        if part is None:
            parts.append([root])
        else:
            part.append(root)
    return [np.array(part, dtype=np.int64) for part in parts]


def _group(
    group_id: str,
    keys: tuple[Key, ...],
    order: Indices,
    roots: Mapping[Key, Indices],
    roles: Mapping[Key, str],
    table: Indices,
    *,
    changes_statistics: bool,
) -> Group:
    """`table` is -1 for every atom, and again afterwards."""
    table[order] = np.arange(len(order))
    members = tuple(
        Member(
            parameter=name,
            dim=dim,
            channels=table[roots[name, dim]].max(axis=0),
            role=roles.get((name, dim), "per_channel"),
        )
        for name, dim in keys
    )
    table[order] = FREE
    return Group(id=group_id, num_channels=len(order), members=members, changes_statistics=changes_statistics)


def prunable_shares(
    program: Program, groups: tuple[Group, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[float, float]:
    """Share of the MACs, and of the parameters, of convolutions and linears with a prunable dimension."""
    prunable = {member.parameter for group in groups for member in group.members}
    macs, params = [0, 0], {False: set[str](), True: set[str]()}
    for node in program.graph.nodes:
        if operator_name(node) not in CONTRACTIONS:
            continue
        weight = program.parameters.get(arguments(node)["weight"].name)
        if weight is None:
            continue
        shape, out = shapes[weight], shape_of(node)
        per_output = prod(shape[1:])
        macs[weight in prunable] += prod(out) * per_output
        params[weight in prunable].add(weight)
    counts = {flag: sum(prod(shapes[name]) for name in weights) for flag, weights in params.items()}
    return macs[True] / max(1, sum(macs)), counts[True] / max(1, sum(counts.values()))
