"""The traced program: a graph of ATen operators with static shapes in which no operator's write is seen by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from edgeprune.graph.sizes import Comparison, integers

RECORDING = "recording"


@dataclass(frozen=True, kw_only=True)
class Program:
    """`graph` has one placeholder for every parameter, buffer, constant and input, then the calls, then the output.

    `parameters`: placeholder name to qualified name, for parameters and buffers and for the tensors that Python code
    of the model holds beside them (`constants`, by that name). A tensor with several names (tied weights) goes by the
    first, as in `Module.named_parameters`. `inputs`: placeholder names of the model's own inputs, in order.
    `comparisons` are the sizes that Python code compared; `results` what modules return that return no single tensor,
    by qualified name, with nodes for tensors; `tracer` names what made the trace.
    """

    graph: torch.fx.Graph
    parameters: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    tracer: str = RECORDING
    results: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def module(self) -> torch.fx.GraphModule:
        """The graph as a module that takes parameters, constants and inputs in the order of the placeholders."""
        return torch.fx.GraphModule(torch.nn.Module(), self.graph)

    @property
    def outputs(self) -> tuple[torch.fx.Node, ...]:
        """The nodes that the model returns, in order."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return tuple(node for node in output.args[0] if isinstance(node, torch.fx.Node))


def writes_in_place(node: torch.fx.Node) -> bool:
    """Whether the node is an ATen operator that writes into its first argument (`relu_`)."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def operator_name(node: torch.fx.Node) -> str:
    """`conv2d` for `aten.conv2d.default`, `relu` for `aten.relu_.default`."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return str(name).rstrip("_") if writes_in_place(node) else str(name)


def module_name(node: torch.fx.Node) -> str:
    """Qualified name of the module whose forward called the operator; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [value[0] for value in stack.values()]
    return str(names[-1]).split("@")[0] if names else ""


def shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    """Static shape of the node's (first) tensor; () where it has none."""
    value: Any = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def arguments(node: torch.fx.Node) -> Mapping[str, Any]:
    """All arguments of an ATen call by name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): value for i, value in enumerate(node.args)}
    values = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    values.update({argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)})
    return {**values, **node.kwargs}


def canonical_names(graph: torch.fx.Graph) -> dict[torch.fx.Node, str]:
    """`conv2d`, `conv2d_1`, ... for every call that is read, by how often its operator came before.

    The same for all tracers of a model, so that what one of them names is found in the graph of another.
    """
    seen: dict[str, int] = {}
    names = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.users:
            base = operator_name(node)
            times = seen.get(base, 0)
            seen[base] = times + 1
            names[node] = f"{base}_{times}" if times else base
    return names


def integer_slots(node: torch.fx.Node) -> dict[str, list[int]]:
    """Argument name to the places of its integers among all integers of an ATen call (`meta["sizes"]`)."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found: dict[str, list[int]] = {}
    count = 0
    for name, value in [*((schema[i].name, value) for i, value in enumerate(node.args)), *node.kwargs.items()]:
        size = len(list(integers(value)))
        found[name] = list(range(count, count + size))
        count += size
    return found
