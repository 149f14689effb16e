"""Parts of an ONNX graph as other operators of the same values, of which ONNX Runtime has kernels in int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output)
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    flat: dict[str, str] = {}  # value to the one of two dimensions that it became
    nodes: list[onnx.NodeProto] = []
    taken: set[str] = set()

    def reshaped(name: str, output: str, shape: list[int]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{output}/shape"))
        nodes.append(helper.make_node("Reshape", [name, f"{output}/shape"], [output], name=f"{output}/reshape"))
        return output

    for node in graph.node:
        after = readers.get(node.output[0], [])
        add = after[0] if len(after) == 1 and after[0].op_type == "Add" else None
        bias = next((name for name in add.input if ranks.get(name) == 1), None) if add else None
        shape = shapes.get(add.output[0], []) if add else []
        if (
            node.op_type == "MatMul"
            and ranks.get(node.input[1]) == 2
            and add
            and bias
            and len(shape) > 1
            and all(shape)
        ):
            source = node.input[0]
            if source not in flat:
                weight = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
                flat[source] = reshaped(source, f"{source}/flat", [-1, weight.dims[0]])
            rows = f"{add.output[0]}/flat"
            nodes.append(helper.make_node("Gemm", [flat[source], node.input[1], bias], [rows], name=node.name))
            reshaped(rows, add.output[0], shape)
            taken.add(add.name)
        elif node.name not in taken:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return made


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
