"""Is the pruned network the dense one with zeros? Its calls are compared with those of the dense program."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_leaves

from edgeprune.errors import SurgeryError
from edgeprune.graph import Block, ModelGraph
from edgeprune.graph.following import EXPECTED, Sizes, expected_sizes
from edgeprune.graph.program import RECORDING, Program, arguments, module_name, operator_name, shape_of
from edgeprune.graph.recording import record
from edgeprune.graph.structure import Indices
from edgeprune.graph.tracing import exported
from edgeprune.graph.widths import Widths
from edgeprune.models import evaluating
from edgeprune.pruned import Pruned
from edgeprune.zero_branch import ZeroBranch

SIZES = frozenset(
    "shape size sizes split_size split_sizes start end length groups normalized_shape num_groups N C HxW group".split()
)
"""Arguments that are sizes of dimensions, which `_check_sizes` and the shapes of the results account for."""
ALSO_SIZED = frozenset(("slice_scatter", "native_layer_norm", "native_group_norm", "_fused_rms_norm"))
"""Operators with such arguments that `EXPECTED` says nothing about."""


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


def check_same(pruned: Pruned, graph: ModelGraph, cut: Cut) -> None:
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
            raise SurgeryError(
                f"{type(pruned.module).__name__} holds another tensor '{name}' after pruning: its code fixes a size"
            )
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
        if not isinstance(leaf, torch.fx.Node):
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
        if graph.program.tracer == RECORDING:
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


def check_dropped(pruned: Pruned, blocks: tuple[Block, ...], graph: ModelGraph) -> None:
    """Of the dense model's calls, all that the output needs outside of the blocks are left, and none of the modules
    that went."""
    gone = [name for block in blocks for name in (*block.zero_modules, *block.skipped_modules)]
    inside = frozenset().union(*(block.nodes for block in blocks))
    calls = _calls(graph.program)
    left = [n for n in calls if not any(f"{module_name(n)}.".startswith(f"{name}.") for name in gone)]
    needed = _needed(graph.program, inside)
    outside = [operator_name(node) for node in calls if node in needed]
    found = [
        operator_name(node)
        for node in _calls(_record(pruned, graph))
        if not any(kind is ZeroBranch for _, kind in (node.meta.get("nn_module_stack") or {}).values())
    ]
    if not _is_part(outside, found) or not _is_part(found, [operator_name(node) for node in left]):
        names = ", ".join(block.id or "the model" for block in blocks)
        raise SurgeryError(f"{type(pruned.module).__name__} does not do without the branches of {names}")


def _needed(program: Program, inside: frozenset[str]) -> set[torch.fx.Node]:
    """What the outputs are computed from when nothing inside is; a mask that only a dropped block reads is not."""
    needed = set[torch.fx.Node]()
    ahead = list(program.outputs)
    while ahead:
        node = ahead.pop()
        if node not in needed and node.name not in inside:
            needed.add(node)
            ahead += node.all_input_nodes
    return needed


def _is_part(part: list[str], whole: list[str]) -> bool:
    """Whether a list is another one with some entries left out."""
    rest = iter(whole)
    return all(name in rest for name in part)
