"""From an eager module to a `Program`: by recording its calls, or by `torch.export` where that does not do."""

from __future__ import annotations

import warnings

import torch
from torch.export.graph_signature import InputKind

from edgeprune.errors import RefusedError
from edgeprune.graph.program import Program, canonical_names
from edgeprune.graph.recording import NotRecorded, record


def trace_program(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> Program:
    """Trace `model` in evaluation mode, which it is set back from afterwards.

    Raises `RefusedError` with torch's own reason where the forward can't be traced (data-dependent control flow).
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()
            return _recorded(model, example_inputs) or exported(model, example_inputs)
    finally:
        for module, training in modes.items():
            module.training = training


def _recorded(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> Program | None:
    """The recording; with plain integers where the code can't take `Size`s, None where it fails all the same."""
    for sized in (True, False):
        try:
            return record(model, example_inputs, sized=sized)
        except NotRecorded:
            return None
        except Exception:  # the model's own code may raise anything; torch.export names the reason
            continue
    return None


def exported(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> Program:
    """The program as `torch.export` sees it, without where its sizes come from."""
    try:
        with torch.no_grad():
            program = torch.export.export(model, example_inputs, strict=False).run_decompositions({})
    except Exception as error:  # torch.export raises many types, user code any
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RefusedError(f"torch.export can't trace the model: {reason}") from error
    kinds = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
    tensors = {**program.constants, **program.state_dict}
    first: dict[int, str] = {}
    signature = program.graph_signature
    names = {
        spec.arg.name: first.setdefault(id(tensors.get(spec.target, spec)), str(spec.target))
        for spec in signature.input_specs
        if spec.kind in kinds and spec.target is not None
    }
    constants = {
        str(spec.target): program.constants[spec.target]
        for spec in signature.input_specs
        if spec.kind == InputKind.CONSTANT_TENSOR and spec.target is not None
    }
    inputs = tuple(str(name) for name in signature.user_inputs)
    for node, name in canonical_names(program.graph).items():
        node.name = name
    return Program(graph=program.graph, parameters=names, constants=constants, inputs=inputs, tracer="torch.export")
