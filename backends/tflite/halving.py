"""Weights in half precision: half the file, the same arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeprune.backends.tflite.flatbuffer import WEIGHTED, constant, kind


def halve(model: Any) -> None:
    """Store the weights of contractions in half precision, in place, each behind an operator that widens it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    widened: dict[int, int] = {}
    before = []
    for operator in graph.operators:
        if kind(model, operator) not in WEIGHTED:
            continue
        weight = operator.inputs[1]
        tensor = graph.tensors[weight]
        if model.buffers[tensor.buffer].data is None or tensor.type != schema.TensorType.FLOAT32:
            continue
        if weight not in widened:
            widened[weight] = len(graph.tensors)
            before.append(_widening(model, weight, len(graph.tensors)))
        operator.inputs = [operator.inputs[0], widened[weight], *operator.inputs[2:]]
    graph.operators = [*before, *graph.operators]
    used = {tensor.buffer for tensor in graph.tensors} | {entry.buffer for entry in model.metadata or ()}
    for index, buffer in enumerate(model.buffers):
        if index not in used:
            buffer.data = None


def _widening(model: Any, weight: int, widened: int) -> Any:
    """Halves the constant `weight`; gives the operator that makes the new tensor `widened` of it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    tensor, half, wide = graph.tensors[weight], schema.TensorT(), schema.TensorT()
    values = constant(model, weight, np.float32).astype(np.float16)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(buffer)
    half.name, half.shape, half.type = tensor.name, tensor.shape, schema.TensorType.FLOAT16
    half.buffer = len(model.buffers) - 1
    wide.name, wide.shape, wide.type = tensor.name, tensor.shape, schema.TensorType.FLOAT32
    graph.tensors[weight] = half
    graph.tensors.append(wide)
    operator = schema.OperatorT()
    operator.opcodeIndex = _code(model, "DEQUANTIZE")
    operator.inputs, operator.outputs = [weight], [widened]
    operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
    operator.builtinOptions = schema.DequantizeOptionsT()
    return operator


def _code(model: Any, name: str) -> int:
    from ai_edge_litert import schema_py_generated as schema

    wanted = getattr(schema.BuiltinOperator, name)
    for index, code in enumerate(model.operatorCodes):
        if code.builtinCode == wanted:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = wanted, min(wanted, 127), 3
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
