"""Residual branches that may be dropped: f of x + f(x), proven from the program's edges.

Two branches lie one in the other or apart: each is a region with one way out, its add. Consecutive branches on one
trunk, x1 = x + a(x) and x2 = x1 + m(x1), are two blocks and no third: with both dropped x2 is x, exactly, and without
one of them the other stays a branch. Of branches that are added to one another first, x + (a(x) + m(x)), each is a
block within that of the sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from edgeprune.graph.program import Program, module_name, operator_name, shape_of
from edgeprune.graph.structure import Block, Group

ZERO_PRESERVING = frozenset("dropout feature_dropout clone contiguous mul view reshape permute transpose relu".split())
"""Operators that turn zeros into zeros, so that a branch may end in them."""

SUMS = frozenset(("add", "sub", "cat"))
"""Operators that turn zeros into zeros where all of their tensors are."""

Nodes = frozenset[torch.fx.Node]


def find_blocks(program: Program, groups: tuple[Group, ...]) -> tuple[Block, ...]:
    """Every residual branch whose modules make it zero and that nothing outside reads, in program order of the adds.

    So a branch comes before those that hold it.
    """
    parameters = set(program.parameters)
    ancestors = _ancestors(program, parameters)
    modules = _modules(program)
    found: list[Block] = []
    sums = set[torch.fx.Node]()
    for node in reversed(program.graph.nodes):
        if operator_name(node) != "add" or len(node.all_input_nodes) != 2:
            continue
        for end, nodes in _branches(node, ancestors, is_branch=node in sums):
            block = _block(node, end, nodes, modules)
            if block is not None:
                found.append(block)
                sums.add(end)
                if node not in sums:
                    break
    readers = _readers(program)
    named = [_with_groups(block, readers, groups) for block in _unique_ids(found[::-1])]
    return tuple(replace(block, within=_within(block, named)) for block in named)


def _within(block: Block, blocks: list[Block]) -> str | None:
    around = [other for other in blocks if block.nodes < other.nodes]
    return min(around, key=lambda other: len(other.nodes)).id if around else None


def _ancestors(program: Program, parameters: set[str]) -> dict[torch.fx.Node, Nodes]:
    """For every node all it is computed from, itself included, parameters left out."""
    found: dict[torch.fx.Node, Nodes] = {}
    for node in program.graph.nodes:
        if node.name in parameters:
            continue
        above = [found[source] for source in node.all_input_nodes if source in found]
        found[node] = frozenset({node}).union(*above)
    return found


def _branches(
    add: torch.fx.Node, ancestors: dict[torch.fx.Node, Nodes], *, is_branch: bool
) -> Iterable[tuple[torch.fx.Node, Nodes]]:
    """(end, nodes) of each operand that may be f: the side with more contractions first, x itself never.

    Beside p(x), with a projection p, f reads x alone; beside x itself it may read more (a mask, positions, a memory).
    Where the sum `is_branch` itself, both of its operands are.
    """
    a, b = add.all_input_nodes
    if a not in ancestors or b not in ancestors or shape_of(a) != shape_of(b):
        return
    sides = [(end, _own(ancestors[end] - ancestors[other], add, ancestors), other) for end, other in ((a, b), (b, a))]
    counts = [sum(operator_name(n) in ("conv2d", "linear") for n in nodes) for _, nodes, _ in sides]
    if counts[0] == counts[1] and not is_branch:
        return
    for count, (end, nodes, other) in sorted(zip(counts, sides, strict=True), key=lambda pair: -pair[0]):
        entries = {source for node in nodes for source in node.all_input_nodes if source in ancestors} - nodes
        if count and (is_branch or other in entries or (len(entries) == 1 and entries <= ancestors[other])):
            yield end, nodes


def _own(nodes: Nodes, add: torch.fx.Node, order: Iterable[torch.fx.Node]) -> Nodes:
    """Those of the nodes that nothing but `add` needs: what others read too (positions, masks) is an input of f."""
    place = {node: i for i, node in enumerate(order)}
    own = set[torch.fx.Node]()
    for node in sorted(nodes, key=place.__getitem__, reverse=True):
        if all(user in own or user is add for user in node.users):
            own.add(node)
    return frozenset(own)


def _modules(program: Program) -> dict[str, list[torch.fx.Node]]:
    """Qualified module name to the nodes that it and its sub-modules call."""
    nodes: dict[str, list[torch.fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function":
            for value in (node.meta.get("nn_module_stack") or {}).values():
                nodes[str(value[0])].append(node)
    return nodes


def _block(
    add: torch.fx.Node, end: torch.fx.Node, nodes: Nodes, modules: dict[str, list[torch.fx.Node]]
) -> Block | None:
    inside = {name for name, called in modules.items() if nodes.issuperset(called)}
    shared = {name.split("@")[0] for name in modules if name not in inside}
    largest = {name for name in inside if "@" not in name and name not in shared and not _held(name, inside)}
    zero = _zero_modules(end, nodes, {modules[name][-1]: name for name in sorted(largest, reverse=True)})
    if zero is None:
        return None
    return Block(
        id=module_name(add),
        zero_modules=zero,
        skipped_modules=tuple(sorted(largest.difference(zero))),
        shape=shape_of(end),
        inside=(),
        nodes=frozenset(node.name for node in nodes),
    )


def _zero_modules(node: torch.fx.Node, nodes: Nodes, ending: dict[torch.fx.Node, str]) -> tuple[str, ...] | None:
    """The modules whose zeros make this node zero, None where that is unproven; `ending`: last node to its module."""
    if node in ending:
        return (ending[node],)
    data = [source for source in node.all_input_nodes if source in nodes]
    operator = operator_name(node)
    if operator in ZERO_PRESERVING and len(data) == 1:
        return _zero_modules(data[0], nodes, ending)
    if operator not in SUMS or not data or not _sums_only(node, nodes):
        return None
    found = [_zero_modules(source, nodes, ending) for source in data]
    if any(names is None for names in found):
        return None
    return tuple(sorted({name for names in found for name in names or ()}))


def _sums_only(node: torch.fx.Node, nodes: Nodes) -> bool:
    """Whether all that the operator sums or concatenates is of the branch: no number, parameter or trunk among it."""
    terms = node.args[0] if operator_name(node) == "cat" else node.args[:2]
    return isinstance(terms, (list, tuple)) and all(term in nodes for term in terms)


def _held(name: str, by: set[str]) -> bool:
    """Whether one of the modules that hold this one is among those."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in by for i in range(1, len(parts)))


def _unique_ids(blocks: list[Block]) -> list[Block]:
    """Blocks of one module are numbered `layer:0`, `layer:1` in program order."""
    count: dict[str, int] = defaultdict(int)
    for block in blocks:
        count[block.id] += 1
    number: dict[str, int] = defaultdict(int)
    named = []
    for block in blocks:
        if count[block.id] > 1:
            named.append(replace(block, id=f"{block.id}:{number[block.id]}"))
            number[block.id] += 1
        else:
            named.append(block)
    return named


def _with_groups(block: Block, readers: dict[str, frozenset[str]], groups: tuple[Group, ...]) -> Block:
    """Add the groups all of whose parameters are read inside the block only."""
    inside = (g.id for g in groups if all(readers[member.parameter] <= block.nodes for member in g.members))
    return replace(block, inside=tuple(inside))


def _readers(program: Program) -> dict[str, frozenset[str]]:
    """Parameter to the names of the nodes that read it."""
    readers: dict[str, set[str]] = {name: set() for name in program.parameters.values()}
    for node in program.graph.nodes:
        if node.name in program.parameters:
            readers[program.parameters[node.name]].update(user.name for user in node.users)
    return {name: frozenset(users) for name, users in readers.items()}
