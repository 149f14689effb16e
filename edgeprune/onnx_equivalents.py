"""Parts of an ONNX graph as other operators of the same values, of which ONNX Runtime has kernels in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def gemms_for_linears(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which a MatMul by a weight and the Add of its bias are one Gemm, of two dimensions, between reshapes.

    ONNX Runtime makes them so itself, but before it looks for integers, and then it finds a bias that is none.
    """
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output)
    }
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [value] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    rows_of: dict[str, str] = {}  # value to what it is in two dimensions
    nodes: list[onnx.NodeProto] = []
    taken: set[str] = set()  # outputs of the adds

    def reshape(name: str, output: str, shape: list[int]) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{output}/shape_of_gemm"))
        inputs = [name, f"{output}/shape_of_gemm"]
        nodes.append(helper.make_node("Reshape", inputs, [output], name=f"{output}/reshape_of_gemm"))

    for node in graph.node:
        if node.output[0] in taken:
            continue
        found = _bias_behind(node, readers, constants)
        shape = shapes.get(found[0].output[0], []) if found else []
        if found is None or len(shape) < 2 or not all(shape):
            nodes.append(node)
            continue
        add, bias = found
        source, weight = node.input
        if source not in rows_of:
            rows_of[source] = f"{source}/rows_of_gemm"
            reshape(source, rows_of[source], [-1, constants[weight][0]])
        rows = f"{add.output[0]}/rows_of_gemm"
        nodes.append(helper.make_node("Gemm", [rows_of[source], weight, bias], [rows], name=node.name))
        reshape(rows, add.output[0], shape)
        rows_of[add.output[0]] = rows
        taken.add(add.output[0])
    del graph.node[:]
    graph.node.extend(nodes)
    given = {name for node in nodes for name in node.output}
    kept = [value for value in graph.value_info if value.name in given]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    return made


def _bias_behind(
    node: onnx.NodeProto, readers: Mapping[str, Sequence[Any]], constants: Mapping[str, Sequence[int]]
) -> tuple[onnx.NodeProto, str] | None:
    """The Add behind a MatMul by a weight, and the name of its bias, where nothing else reads what is between."""
    if node.op_type != "MatMul" or len(constants.get(node.input[1], ())) != 2:
        return None
    after = readers.get(node.output[0], ())
    if len(after) != 1 or getattr(after[0], "op_type", "") != "Add":
        return None
    width = [constants[node.input[1]][1]]
    bias = next((name for name in after[0].input if constants.get(name) == width), None)
    return (after[0], bias) if bias else None


def pools_for_means(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which a mean over height and width is a GlobalAveragePool, which ONNX Runtime computes in integers;
    of ReduceMean it has no such kernel."""
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.input)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        given = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        axes = sorted(int(axis) % 4 for axis in numpy_helper.to_array(given)) if given is not None else []
        if axes != [2, 3] or ranks.get(node.input[0]) != 4:
            nodes.append(node)
            continue
        kept = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
        pooled = node.output[0] if kept else f"{node.output[0]}/pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if not kept:
            nodes.append(helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{node.name}/flat", axis=1))
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)
    return made
