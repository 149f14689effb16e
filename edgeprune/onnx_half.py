"""An ONNX model in half precision: weights, constants and activations; inputs and outputs stay float32, with a Cast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import EdgepruneError

if TYPE_CHECKING:
    import onnx

LARGEST = 65504.0  # of half precision
_STAYS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}
"""Operators with inputs that ONNX wants as float32 whatever the data is: region of interest, scales."""


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which all that was float32 inside is float16; names of nodes, inputs and outputs stay.

    `EdgepruneError` where a weight is too large for half precision, or the result is no valid ONNX.
    """
    import onnx

    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    kept = set(_inputs_that_stay(graph))
    scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in graph.initializer:
        if tensor.name not in kept:
            _halve(tensor, up=tensor.name in scales)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and not kept.intersection(node.output):
                _halve(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
            elif attribute.type == onnx.AttributeProto.GRAPH:
                raise EdgepruneError(f"{node.name}: {node.op_type} holds a graph of its own; not made half precision")
    del graph.value_info[:]
    _cast_at_the_border(graph)
    try:
        onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise EdgepruneError(f"the model can't be made half precision: {str(error).splitlines()[0]}") from None
    return half


def halve_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large constants are stored as float16, each behind a Cast that widens it; the arithmetic stays."""
    import onnx
    from onnx import helper

    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            name = tensor.name
            _halve(tensor)
            tensor.name = f"{name}/half"
            cast = helper.make_node("Cast", [tensor.name], [name], name=f"{name}/widened", to=onnx.TensorProto.FLOAT)
            casts.append(cast)
    nodes = [*graph.node]
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    onnx.checker.check_model(half)
    return half


def _inputs_that_stay(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        for index in _STAYS_FLOAT.get(node.op_type, ()):
            if index < len(node.input) and node.input[index]:
                yield node.input[index]


def _halve(tensor: onnx.TensorProto, *, up: bool = False) -> None:
    """In place. `up`: to the next larger half, so that a scale still reaches the largest value, and none is 0.

    The ends of float32's range, with which transformers mask, become the ends of half precision's.
    """
    from onnx import TensorProto, numpy_helper

    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    values = np.where(np.abs(values) == np.finfo(np.float32).max, np.copysign(np.float32(LARGEST), values), values)
    finite = np.abs(values[np.isfinite(values)])  # masks hold -inf
    if finite.size and finite.max() > LARGEST:
        raise EdgepruneError(f"{tensor.name}: {finite.max():g} is more than half precision holds, {LARGEST:g}")
    half = values.astype(np.float16)
    if up:
        half = np.where(half < values, np.nextafter(half, np.float16(np.inf)), half)
    tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))


def _cast_at_the_border(graph: onnx.GraphProto) -> None:
    from onnx import TensorProto, helper

    inputs = [v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    outputs = [v.name for v in graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    inner = {name: f"{name}/half" for name in (*inputs, *outputs)}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    nodes = [*graph.node]
    to_half = [
        helper.make_node("Cast", [name], [inner[name]], name=f"{name}/to_half", to=TensorProto.FLOAT16)
        for name in inputs
    ]
    to_float = [
        helper.make_node("Cast", [inner[name]], [name], name=f"{name}/to_float", to=TensorProto.FLOAT)
        for name in outputs
    ]
    del graph.node[:]
    graph.node.extend([*to_half, *nodes, *to_float])
