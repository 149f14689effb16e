"""From an eager module to an ATen program with static shapes in which no operator writes into its input."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from edgeprune.errors import RefusedError

SHARING = frozenset("dropout feature_dropout alpha_dropout feature_alpha_dropout getitem".split())
"""Operators whose output may share memory with their input although their schema does not say so."""


def export_program(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> ExportedProgram:
    """Trace `model` in evaluation mode with `torch.export`.

    Raises `RefusedError` with torch's own reason where the forward can't be traced (data-dependent control flow).
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model.eval(), example_inputs, strict=False)
            return program if _is_functional(program) else program.run_decompositions({})
    except Exception as error:  # torch.export raises many types, user code any
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RefusedError(f"torch.export can't trace the model: {reason}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def _is_functional(program: ExportedProgram) -> bool:
    """Rewire `y = op_(x)` so that what reads x afterwards reads y; False where x shares memory with another value."""
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not writes_in_place(node):
            continue
        target = node.args[0]
        if target.op != "call_function" or _may_share(target):
            return False
        if any(_may_share(user) for user in target.users if user is not node):
            return False
        later = False
        for other in program.graph.nodes:
            if other is node:
                later = True
            elif later and target in other.all_input_nodes:
                other.replace_input_with(target, node)
    return True


def _may_share(node: torch.fx.Node) -> bool:
    """Whether the node's output may share memory with its input (`view`, `chunk`, `dropout` in evaluation mode)."""
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    return aliases or operator_name(node) in SHARING


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


def parameter_names(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name to qualified name, for parameters, buffers and lifted constants.

    A tensor that has several names (tied weights) goes by the first, as in `Module.named_parameters`.
    """
    kinds = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
    tensors: dict[str, Any] = {**program.constants, **program.state_dict}
    first: dict[int, str] = {}
    return {
        spec.arg.name: first.setdefault(id(tensors.get(spec.target, spec)), str(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None
    }


def constant_names(program: ExportedProgram) -> frozenset[str]:
    """Names of the tensors that Python code of the model holds beside its parameters and buffers."""
    specs = program.graph_signature.input_specs
    return frozenset(str(spec.target) for spec in specs if spec.kind == InputKind.CONSTANT_TENSOR)


def user_inputs(program: ExportedProgram) -> tuple[str, ...]:
    """Placeholder names of the model's own inputs, in order."""
    return tuple(str(name) for name in program.graph_signature.user_inputs)


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
