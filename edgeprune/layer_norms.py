"""Whether a network has layer norms: beside these the residual stream stays in float when the rest is int8.

Asked of the traced graph, for the units whose kernels are timed, and of what is quantised: the module, or its ONNX. A
layer or RMS norm counts by its operator, or written out, as a root of a mean (`docs/precisions.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from edgeprune.fusion import LAYER_NORMS

if TYPE_CHECKING:
    import onnx
    import torch

    from edgeprune.graph import ModelGraph

T = TypeVar("T")
BETWEEN = 2
"""Operators at most between a mean and the root of it: an epsilon, a conversion."""


def has_layer_norm(graph: ModelGraph) -> bool:
    """Whether a traced graph has one."""
    nodes = {node.name: node for node in graph.nodes}
    return _among(nodes, lambda node: node.operator, lambda node: node.inputs)


def has_layer_norm_in_module(module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether a module calls one."""
    from edgeprune.graph.program import operator_name
    from edgeprune.graph.tracing import trace_program

    nodes = {node.name: node for node in trace_program(module, example_inputs).graph.nodes}
    return _among(nodes, operator_name, lambda node: (each.name for each in node.all_input_nodes))


def _among(nodes: Mapping[str, T], kind: Callable[[T], str], inputs: Callable[[T], Iterable[str]]) -> bool:
    return any(kind(node) in LAYER_NORMS | {"_fused_rms_norm"} for node in nodes.values()) or _has_root_of_mean(
        nodes, kind, inputs, frozenset({"sqrt", "rsqrt"}), ("mean", "var")
    )


def has_layer_norm_in_onnx(model: onnx.ModelProto) -> bool:
    """Whether its ONNX has one."""
    givers = {name: node for node in model.graph.node for name in node.output}
    norms = ("LayerNormalization", "RMSNormalization")
    return any(node.op_type in norms for node in model.graph.node) or _has_root_of_mean(
        givers, lambda node: node.op_type, lambda node: node.input, frozenset({"Sqrt"}), ("ReduceMean",)
    )


def _has_root_of_mean(
    givers: Mapping[str, T],
    kind: Callable[[T], str],
    inputs: Callable[[T], Iterable[str]],
    roots: frozenset[str],
    means: tuple[str, ...],
) -> bool:
    found = [node for node in givers.values() if kind(node) in roots]
    for _ in range(BETWEEN + 1):
        found = [givers[name] for node in found for name in inputs(node) if name in givers]
        if any(kind(node) in means for node in found):
            return True
    return False
