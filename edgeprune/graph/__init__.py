"""What pruning may do to a model: trace it, prove which dimensions shrink together, find droppable blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

from edgeprune.errors import RefusedError
from edgeprune.graph import tracing
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.coupling import Coupling, couple, prunable_shares
from edgeprune.graph.structure import Block, Group, Indices, Member, ModelGraph, Node, Refusal, Width

__all__ = ["Block", "Group", "Member", "ModelGraph", "Node", "Refusal", "Width", "analyse", "check_prunable", "trace"]


def trace(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> ModelGraph:
    """Trace a model in evaluation mode and analyse what can be pruned.

    `example_inputs` fix every shape. Raises `RefusedError` where the model can't be traced, or where nothing in it
    can be pruned; the reasons are listed.
    """
    graph = replace(analyse(tracing.export_program(model, example_inputs)), model=model)
    check_prunable(graph)
    return graph


def check_prunable(graph: ModelGraph) -> None:
    """`RefusedError` with all reasons where there is neither a group nor a block."""
    if not graph.groups and not graph.blocks:
        raise RefusedError(
            "nothing in this model can be pruned:",
            reasons=[f"{r.where or 'model'}: {r.operator}: {r.reason}" for r in graph.refused],
        )


def analyse(program: ExportedProgram) -> ModelGraph:
    """Groups, blocks and refusals of an exported program whose operators don't write into their inputs."""
    coupling = couple(program)
    names = tracing.parameter_names(program)
    shapes = {names[n.name]: tracing.shape_of(n) for n in program.graph.nodes if n.name in names}
    dtypes = {names[n.name]: str(n.meta["val"].dtype) for n in program.graph.nodes if n.name in names}
    macs_share, params_share = prunable_shares(program, coupling.groups, shapes)
    return ModelGraph(
        program=program,
        nodes=_nodes(program, coupling, names),
        groups=coupling.groups,
        blocks=find_blocks(program, coupling.groups),
        refused=coupling.refused,
        channels=coupling.channels,
        channel_names=coupling.channel_names,
        parameter_shapes=shapes,
        parameter_dtypes=dtypes,
        prunable_macs_share=macs_share,
        prunable_params_share=params_share,
    )


def _nodes(program: ExportedProgram, coupling: Coupling, names: dict[str, str]) -> tuple[Node, ...]:
    sizes = {group.id: group.num_channels for group in coupling.groups}
    nodes = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            continue
        shape = tracing.shape_of(node)
        attributes: dict[str, Any] = {}
        if node.op == "call_function":
            attributes = {k: v for k, v in tracing.arguments(node).items() if not _holds_nodes(v)}
        nodes.append(
            Node(
                name=node.name,
                operator=tracing.operator_name(node),
                inputs=tuple(n.name for n in node.all_input_nodes if n.name not in names),
                parameters=tuple(names[n.name] for n in node.all_input_nodes if n.name in names),
                shape=shape,
                widths=tuple(
                    _width(size, dim, coupling.channel_names, sizes)
                    for size, dim in zip(shape, coupling.channels.get(node.name, ()), strict=False)
                ),
                where=tracing.module_name(node),
                attributes=attributes,
            )
        )
    return tuple(nodes)


def _holds_nodes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_nodes(item) for item in value)
    return isinstance(value, torch.fx.Node)


def _width(size: int, dim: Indices, names: tuple[tuple[str, int], ...], sizes: dict[str, int]) -> Width:
    """Size of a dimension as a sum over groups; a group that repeats unevenly is counted by its average."""
    counts: dict[str, int] = {}
    for channel in dim.tolist():
        if channel >= 0:
            group = names[channel][0]
            counts[group] = counts.get(group, 0) + 1
    terms = tuple(((group,), count // sizes[group]) for group, count in counts.items() if count >= sizes[group])
    return Width(fixed=size - sum(times * sizes[group] for (group,), times in terms), terms=terms)
