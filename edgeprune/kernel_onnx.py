"""The ONNX model of one kernel, for every runtime that reads ONNX; random weights of ordinary size, static shapes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.kernel import Kernel

if TYPE_CHECKING:
    import onnx

OPSET = 17
PRECISIONS = ("fp32",)


@dataclass
class _Graph:
    """Nodes, weights and inputs as they come; `value` names the tensor that the next node takes."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    value: str = ""

    def input(self, name: str, shape: tuple[int, ...]) -> str:
        from onnx import TensorProto, helper

        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def weight(self, shape: tuple[int, ...], scale: float = 1.0) -> str:
        drawn = self.rng.standard_normal(min(prod(shape), 1 << 16), dtype=np.float32) * np.float32(scale)
        return self.constant(np.resize(drawn, shape))  # repeated: a large layer's weights need not all differ

    def constant(self, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> None:
        """Append a node; its output becomes `value`."""
        from onnx import helper

        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"{operator}{output}", **attributes))
        self.value = output


def write_kernel(kernel: Kernel, folder: Path) -> Path:
    """`model_from_kernel` as a file in `folder`, named after the kernel."""
    path = folder / f"{kernel.operator}_{zlib.crc32(kernel.key.encode()):08x}.onnx"
    path.write_bytes(model_from_kernel(kernel).SerializeToString())
    return path


def model_from_kernel(kernel: Kernel, seed: int = 0) -> onnx.ModelProto:
    """Input `x` of shape [batch, c_in, *spatial] (linear: [batch, *spatial, c_in]) and output `y`, float32.

    `residual` (epilogue `add`) and `other` (operator `add`) have the shape of the output, `gate` (`mul`) is
    [batch, c_out, 1, 1]. `ValueError` for what can't be built.
    """
    from onnx import TensorProto, helper

    if kernel.precision not in PRECISIONS or kernel.sparsity != "dense":
        raise ValueError(
            f"{kernel.key}: {kernel.precision} {kernel.sparsity} kernels are not built yet (supported: fp32 dense)"
        )
    graph = _Graph(rng=np.random.default_rng(seed))
    _OPERATORS[kernel.operator](graph, kernel)
    for step in kernel.epilogue:
        _epilogue(graph, kernel, step)
    graph.nodes[-1].output[0] = "y"
    proto = helper.make_graph(
        graph.nodes,
        "kernel",
        graph.inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, _shape_out(kernel))],
        graph.weights,
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _shape_in(kernel: Kernel, channels: int | None = None) -> tuple[int, ...]:
    channels = kernel.c_in if channels is None else channels
    if kernel.operator == "linear":
        return (kernel.batch, *kernel.spatial, channels)
    return (kernel.batch, channels, *kernel.spatial)


def _shape_out(kernel: Kernel) -> tuple[int, ...]:
    if kernel.operator == "linear":
        return (kernel.batch, *kernel.spatial, kernel.c_out)
    return (kernel.batch, kernel.c_out, *kernel.spatial_out)


def _per_channel(kernel: Kernel) -> tuple[int, ...]:
    """The shape in which one value per output channel spreads over the output."""
    return (kernel.c_out,) if kernel.operator == "linear" else (1, kernel.c_out, *(1,) * len(kernel.spatial_out))


def _conv(graph: _Graph, kernel: Kernel) -> None:
    """Takes `bias` from the epilogue along, as exporters write it."""
    fan_in = kernel.c_in // kernel.groups
    weight = graph.weight((kernel.c_out, fan_in, *kernel.window), 1 / sqrt(fan_in * prod(kernel.window)))
    bias = [graph.weight((kernel.c_out,))] if _leads_with_bias(kernel) else []
    graph.node(
        "Conv",
        graph.input("x", _shape_in(kernel)),
        weight,
        *bias,
        kernel_shape=kernel.window,
        strides=kernel.stride,
        pads=kernel.padding * 2,
        dilations=kernel.dilation,
        group=kernel.groups,
    )


def _linear(graph: _Graph, kernel: Kernel) -> None:
    """Gemm on rows, MatMul (and Add) where positions come before the channels."""
    x = graph.input("x", _shape_in(kernel))
    shape = (kernel.c_in, kernel.c_out) if kernel.spatial else (kernel.c_out, kernel.c_in)
    weight = graph.weight(shape, 1 / sqrt(kernel.c_in))
    bias = [graph.weight((kernel.c_out,))] if _leads_with_bias(kernel) else []
    if kernel.spatial:
        graph.node("MatMul", x, weight)
        if bias:
            graph.node("Add", graph.value, *bias)
    else:
        graph.node("Gemm", x, weight, *bias, transB=1)


def _leads_with_bias(kernel: Kernel) -> bool:
    return kernel.epilogue[:1] == ("bias",) and kernel.operator in ("conv", "linear")


def _pool(graph: _Graph, kernel: Kernel) -> None:
    operator = {"max_pool": "MaxPool", "avg_pool": "AveragePool"}[kernel.operator]
    attributes: dict[str, Any] = {"kernel_shape": kernel.window, "strides": kernel.stride}
    attributes["pads"] = kernel.padding * 2
    if kernel.operator == "avg_pool":
        attributes["count_include_pad"] = 1
        if any(d != 1 for d in kernel.dilation):
            raise ValueError(f"{kernel.key}: an average pool has no dilation")
    elif kernel.dilation:
        attributes["dilations"] = kernel.dilation
    graph.node(operator, graph.input("x", _shape_in(kernel)), **attributes)


def _mean(graph: _Graph, kernel: Kernel) -> None:
    graph.node("GlobalAveragePool", graph.input("x", _shape_in(kernel)))


def _add(graph: _Graph, kernel: Kernel) -> None:
    graph.node("Add", graph.input("x", _shape_in(kernel)), graph.input("other", _shape_out(kernel)))


def _mul(graph: _Graph, kernel: Kernel) -> None:
    """The gate of squeeze-and-excitation: one factor per channel."""
    gate = (kernel.batch, kernel.c_out, *(1,) * len(kernel.spatial))
    graph.node("Mul", graph.input("x", _shape_in(kernel)), graph.input("gate", gate))


def _affine(graph: _Graph, kernel: Kernel) -> None:
    graph.node("Mul", graph.input("x", _shape_in(kernel)), graph.weight(_per_channel(kernel)))
    graph.node("Add", graph.value, graph.weight(_per_channel(kernel)))


def _activation(graph: _Graph, kernel: Kernel) -> None:
    if not kernel.epilogue:
        raise ValueError(f"{kernel.key}: an activation names itself in the epilogue")
    graph.value = graph.input("x", _shape_in(kernel))


def _cat(graph: _Graph, kernel: Kernel) -> None:
    half = kernel.c_in // 2
    if not half:
        raise ValueError(f"{kernel.key}: one channel can't be joined from two inputs")
    parts = [graph.input("x", _shape_in(kernel, half)), graph.input("other", _shape_in(kernel, kernel.c_in - half))]
    graph.node("Concat", *parts, axis=1)


_OPERATORS = {
    "conv": _conv,
    "linear": _linear,
    "max_pool": _pool,
    "avg_pool": _pool,
    "mean": _mean,
    "add": _add,
    "mul": _mul,
    "affine": _affine,
    "activation": _activation,
    "cat": _cat,
}


def _epilogue(graph: _Graph, kernel: Kernel, step: str) -> None:
    x = graph.value
    if step == "bias":
        if not _leads_with_bias(kernel):
            graph.node("Add", x, graph.weight(_per_channel(kernel)))
    elif step == "add":
        graph.node("Add", x, graph.input("residual", _shape_out(kernel)))
    elif step == "relu6":
        graph.node("Clip", x, graph.constant(np.float32(0)), graph.constant(np.float32(6)))
    elif step == "silu":
        graph.node("Sigmoid", x)
        graph.node("Mul", x, graph.value)
    elif step == "gelu":
        graph.node("Div", x, graph.constant(np.float32(sqrt(2))))
        graph.node("Erf", graph.value)
        graph.node("Add", graph.value, graph.constant(np.float32(1)))
        graph.node("Mul", x, graph.value)
        graph.node("Mul", graph.value, graph.constant(np.float32(0.5)))
    elif step == "hardsigmoid":
        graph.node("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    elif step in _PLAIN:
        graph.node(_PLAIN[step], x)
    else:
        raise ValueError(f"{kernel.key}: unknown epilogue {step!r}")


_PLAIN = {"relu": "Relu", "sigmoid": "Sigmoid", "hardswish": "HardSwish"}
