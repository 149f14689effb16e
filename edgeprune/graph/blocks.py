"""Residual branches that may be dropped: f of x + f(x), proven from the program's edges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from edgeprune.graph.program import Program, module_name, operator_name, shape_of
from edgeprune.graph.structure import Block, Group

ZERO_PRESERVING = frozenset("dropout feature_dropout clone contiguous mul view reshape permute transpose relu".split())
"""Operators that turn zeros into zeros, so that a branch may end in them."""

Nodes = frozenset[torch.fx.Node]


def find_blocks(program: Program, groups: tuple[Group, ...]) -> tuple[Block, ...]:
    """Every residual branch that one module ends and nothing outside reads; branches around others are left out."""
    parameters = set(program.parameters)
    ancestors = _ancestors(program, parameters)
    modules = _modules(program)
    found: list[tuple[Block, Nodes]] = []
    for node in program.graph.nodes:
        if operator_name(node) != "add" or len(node.all_input_nodes) != 2:
            continue
        for branch in _branches(node, ancestors):
            block = _block(node, *branch, modules, parameters)
            if block is not None:
                found.append((block, branch[1]))
                break
    innermost = [(b, nodes) for b, nodes in found if not any(other < nodes for _, other in found)]
    named = _unique_ids([block for block, _ in innermost])
    return tuple(_with_groups(block, program, groups) for block in named)


def _ancestors(program: Program, parameters: set[str]) -> dict[torch.fx.Node, Nodes]:
    """For every node all it is computed from, itself included, parameters left out."""
    found: dict[torch.fx.Node, Nodes] = {}
    for node in program.graph.nodes:
        if node.name in parameters:
            continue
        above = [found[source] for source in node.all_input_nodes if source in found]
        found[node] = frozenset({node}).union(*above)
    return found


def _branches(add: torch.fx.Node, ancestors: dict[torch.fx.Node, Nodes]) -> Iterable[tuple[torch.fx.Node, Nodes]]:
    """(end, nodes) of each operand that may be f: the side with more contractions first, x itself never."""
    a, b = add.all_input_nodes
    if a not in ancestors or b not in ancestors or shape_of(a) != shape_of(b):
        return
    sides = [(end, ancestors[end] - ancestors[other]) for end, other in ((a, b), (b, a))]
    counts = [sum(operator_name(n) in ("conv2d", "linear") for n in nodes) for _, nodes in sides]
    if counts[0] == counts[1]:
        return
    for count, (end, nodes) in sorted(zip(counts, sides, strict=True), key=lambda pair: -pair[0]):
        closed = all(user in nodes or user is add for node in nodes for user in node.users)
        entries = {source for node in nodes for source in node.all_input_nodes if source in ancestors} - nodes
        if count and closed and len(entries) == 1:
            other = b if end is a else a
            if entries <= ancestors[other]:
                yield end, nodes


def _modules(program: Program) -> dict[str, list[torch.fx.Node]]:
    """Qualified module name to the nodes that it and its sub-modules call."""
    nodes: dict[str, list[torch.fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function":
            for value in (node.meta.get("nn_module_stack") or {}).values():
                nodes[str(value[0])].append(node)
    return nodes


def _block(
    add: torch.fx.Node,
    end: torch.fx.Node,
    nodes: Nodes,
    modules: dict[str, list[torch.fx.Node]],
    parameters: set[str],
) -> Block | None:
    inside = {name for name, called in modules.items() if nodes.issuperset(called)}
    shared = {name.split("@")[0] for name in modules if name not in inside}
    largest = {name for name in inside if "@" not in name and name not in shared and not _held(name, inside)}
    last = end
    while operator_name(last) in ZERO_PRESERVING and not _ends(last, largest, modules):
        data = [source for source in last.all_input_nodes if source in nodes]
        if len(data) != 1:
            return None
        last = data[0]
    ending = sorted(name for name in largest if modules[name][-1] is last)
    if not ending:
        return None
    zero = ending[0]
    return Block(
        id=module_name(add),
        zero_module=zero,
        skipped_modules=tuple(sorted(largest - {zero})),
        shape=shape_of(last),
        inside=(),
        nodes=frozenset(node.name for node in nodes),
    )


def _ends(node: torch.fx.Node, largest: set[str], modules: dict[str, list[torch.fx.Node]]) -> bool:
    return any(modules[name][-1] is node for name in largest)


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


def _with_groups(block: Block, program: Program, groups: tuple[Group, ...]) -> Block:
    """Add the groups all of whose parameters are read inside the block only."""
    names = program.parameters
    outside, inside = set[str](), set[str]()
    for node in program.graph.nodes:
        read = {names[source.name] for source in node.all_input_nodes if source.name in names}
        (inside if node.name in block.nodes else outside).update(read)
    own = inside - outside
    return replace(block, inside=tuple(g.id for g in groups if all(member.parameter in own for member in g.members)))
