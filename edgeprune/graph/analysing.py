"""From a traced program to its graph: dimensions that shrink together, blocks that may be dropped, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from edgeprune.errors import RefusedError
from edgeprune.graph import tracing
from edgeprune.graph.atoms import Atoms
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.coupling import Coupling, propagate, prunable_shares, read_groups
from edgeprune.graph.following import attributes_of_layers, follow
from edgeprune.graph.program import RECORDING, Program, arguments, module_name, operator_name, shape_of
from edgeprune.graph.recording import uncollected
from edgeprune.graph.rules import Dims
from edgeprune.graph.structure import Attribute, ModelGraph, Node, SizeRule
from edgeprune.graph.widths import Widths


def trace(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> ModelGraph:
    """Trace a model in evaluation mode and analyse what can be pruned.

    `example_inputs` fix every shape. Raises `RefusedError` where the model can't be traced, or where nothing in it
    can be pruned; the reasons are listed.
    """
    graph = replace(analyse(tracing.trace_program(model, example_inputs)), model=model)
    check_prunable(graph)
    return graph


def check_prunable(graph: ModelGraph) -> None:
    """`RefusedError` with all reasons where there is neither a group nor a block."""
    if not graph.groups and not graph.blocks:
        raise RefusedError(
            "nothing in this model can be pruned:",
            reasons=[f"{r.where or 'model'}: {r.operator}: {r.reason}" for r in graph.refused],
        )


def analyse(program: Program) -> ModelGraph:
    """Groups, blocks and refusals of a traced program."""
    with uncollected():
        return _analyse(program)


def _analyse(program: Program) -> ModelGraph:
    atoms = Atoms()
    dims = propagate(program, atoms)
    coupling, attributes = _followed(program, atoms, dims)
    names = program.parameters
    placeholders = [node for node in program.graph.nodes if node.name in names]
    shapes = {names[n.name]: shape_of(n) for n in placeholders}
    dtypes = {names[n.name]: str(n.meta["val"].dtype) for n in placeholders}
    macs_share, params_share = prunable_shares(program, coupling.groups, shapes)
    return ModelGraph(
        program=program,
        nodes=_nodes(program, coupling),
        groups=coupling.groups,
        blocks=find_blocks(program, coupling.groups),
        refused=coupling.refused,
        channels=coupling.channels,
        parameter_shapes=shapes,
        parameter_dtypes=dtypes,
        prunable_macs_share=macs_share,
        prunable_params_share=params_share,
        attributes=attributes,
    )


def _followed(
    program: Program, atoms: Atoms, dims: Mapping[Any, Dims]
) -> tuple[Coupling, Mapping[Attribute, SizeRule]]:
    """The groups that the model's Python code can follow; what it fixes is fixed here, and read again."""
    while True:
        coupling = read_groups(atoms, dims)
        followed = follow(program, coupling)
        if not followed.refused:
            if program.tracer != RECORDING:
                return coupling, attributes_of_layers(program, coupling)
            return coupling, followed.attributes
        for group, refusal in followed.refused.items():
            atoms.fix(coupling.roots[group], refusal)


def _nodes(program: Program, coupling: Coupling) -> tuple[Node, ...]:
    widths = Widths(coupling.groups)
    names = program.parameters
    nodes = []
    for node in program.graph.nodes:
        if node.name in names:
            continue
        attributes: dict[str, Any] = {}
        if node.op == "call_function":
            attributes = {k: v for k, v in arguments(node).items() if not _holds_nodes(v)}
        nodes.append(
            Node(
                name=node.name,
                operator=operator_name(node),
                inputs=tuple(n.name for n in node.all_input_nodes if n.name not in names),
                parameters=tuple(names[n.name] for n in node.all_input_nodes if n.name in names),
                shape=shape_of(node),
                widths=tuple(map(widths.of, coupling.channels.get(node.name, ()))),
                where=module_name(node),
                attributes=attributes,
            )
        )
    return tuple(nodes)


def _holds_nodes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_nodes(item) for item in value)
    return isinstance(value, torch.fx.Node)
