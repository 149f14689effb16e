"""The ONNX model of one kernel, for every runtime that reads ONNX; random weights of ordinary size, static shapes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.kernel import Kernel
from edgeprune.kernel_weights import random_weight

if TYPE_CHECKING:
    import onnx

    from edgeprune.onnx_int8 import Form

OPSET = 17
DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.float32),  # the runtime rounds by itself, where its precision hint says so
    "int8": np.dtype(np.float32),  # before `onnx_int8` turns it into integers
}
"""Precisions that are built: type of all weights and activations, inputs and outputs included."""
SPARSE_OPERATORS = ("conv", "linear")
MADE = "edgeprune_made"
"""Name of the node that makes an input, which is no part of the kernel."""


@dataclass
class _Graph:
    """Nodes, weights and inputs as they come; `value` names the tensor that the next node takes."""

    rng: np.random.Generator
    dtype: np.dtype[Any]
    makes_input: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    value: str = ""

    def input(self, name: str, shape: tuple[int, ...]) -> str:
        self.inputs.append(self.value_info(name, shape))
        return name

    def made_input(self, name: str, shape: tuple[int, ...]) -> str:
        """An input of [batch, channels, H, W] that comes out of a convolution where the graph `makes_input`."""
        if not self.makes_input or len(shape) != 4:
            return self.input(name, shape)
        from onnx import helper

        weight = self.weight((shape[1], 1, 1, 1))
        source = self.input(name, (shape[0], 1, *shape[2:]))
        self.nodes.append(helper.make_node("Conv", [source, weight], [MADE], name=MADE))
        return MADE

    def value_info(self, name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        from onnx import helper

        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.dtype), shape)

    def weight(self, shape: tuple[int, ...], scale: float = 1.0, sparse_axis: int | None = None) -> str:
        """Random values; with `sparse_axis` in the 2:4 pattern along that axis."""
        values = random_weight(self.rng, shape, scale)
        return self.constant(values if sparse_axis is None else two_of_four(values, sparse_axis))

    def constant(self, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, self.dtype), name))
        return name

    def integers(self, values: tuple[int, ...]) -> str:
        """A constant of int64: the shape that a Reshape takes."""
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> None:
        """Append a node; its output becomes `value`."""
        from onnx import helper

        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"{operator}{output}", **attributes))
        self.value = output


def write_kernel(kernel: Kernel, folder: Path, form: Form | None = None, *, makes_input: bool = False) -> Path:
    """`model_from_kernel` as a file in `folder`, named after the kernel."""
    path = folder / f"{kernel.operator}_{zlib.crc32(kernel.key.encode()):08x}.onnx"
    path.write_bytes(model_from_kernel(kernel, form=form, makes_input=makes_input).SerializeToString())
    return path


def model_from_kernel(
    kernel: Kernel, seed: int = 0, form: Form | None = None, *, makes_input: bool = False
) -> onnx.ModelProto:
    """Input `x` of shape [batch, c_in, *spatial] (`_CHANNELS_LAST`: [batch, *spatial, c_in]), output `y`.

    All of it is of the kernel's precision, float32 or float16; of int8 in the `form` that the runtime takes
    (`onnx_int8`; TensorRT's unless told). A 2:4 kernel's weights have the pattern `two_of_four`.
    `residual` (epilogue `add`) and `other` (operator `add`) have the shape of the output, `gate` (`mul`) is
    [batch, c_out, 1, 1], `key` and `value` (`attention`) are [batch, keys, channels]. With `makes_input` the
    residual of a convolution and `x` of a pool, a mean or a product have one channel, which a 1x1 convolution named
    `MADE` spreads over all: as in a network they come out of a node then, in the layout that the runtime prefers.
    `ValueError` for what can't be built.
    """
    from onnx import helper

    if kernel.precision not in DTYPES or kernel.sparsity not in ("dense", "2:4"):
        raise ValueError(
            f"{kernel.key}: {kernel.precision} {kernel.sparsity} kernels are not built yet "
            f"(supported: {', '.join(DTYPES)}; dense, 2:4)"
        )
    if kernel.sparsity == "2:4" and kernel.operator not in SPARSE_OPERATORS:
        raise ValueError(f"{kernel.key}: only {' and '.join(SPARSE_OPERATORS)} kernels have weights to make 2:4")
    graph = _Graph(rng=np.random.default_rng(seed), dtype=DTYPES[kernel.precision], makes_input=makes_input)
    _OPERATORS[kernel.operator](graph, kernel)
    for step in kernel.epilogue if kernel.operator != "attention" else ():
        _epilogue(graph, kernel, step)
    graph.nodes[-1].output[0] = "y"
    proto = helper.make_graph(
        graph.nodes,
        "kernel",
        graph.inputs,
        [graph.value_info("y", _shape_out(kernel))],
        graph.weights,
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    if kernel.precision != "int8":
        return model
    from edgeprune.onnx_int8 import TENSORRT, to_int8

    return to_int8(model, form or TENSORRT)


def two_of_four(weights: np.ndarray[Any, np.dtype[np.float32]], axis: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The weights with two of every four along `axis` (the input channels) set to zero: the two of least magnitude."""
    if weights.shape[axis] % 4:
        raise ValueError(f"2:4 takes groups of four input channels, {weights.shape[axis]} is no multiple of 4")
    moved = np.moveaxis(weights, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    least = np.argsort(np.abs(groups), axis=-1, kind="stable")[..., :2]
    kept = groups.copy()
    np.put_along_axis(kept, least, 0, axis=-1)
    return np.ascontiguousarray(np.moveaxis(kept.reshape(moved.shape), -1, axis))


def _sparse_axis(kernel: Kernel, axis: int) -> int | None:
    """The axis of the input channels where the kernel is 2:4."""
    if kernel.sparsity == "dense":
        return None
    if kernel.c_in // kernel.groups % 4:
        raise ValueError(f"{kernel.key}: 2:4 takes groups of four input channels")
    return axis


def _shape_in(kernel: Kernel, channels: int | None = None) -> tuple[int, ...]:
    channels = kernel.c_in if channels is None else channels
    if kernel.operator == "matmul":
        return (kernel.batch, kernel.groups, *kernel.spatial, channels // kernel.groups)
    if kernel.operator in _CHANNELS_LAST:
        return (kernel.batch, *kernel.spatial, channels)
    return (kernel.batch, channels, *kernel.spatial)


def _shape_out(kernel: Kernel) -> tuple[int, ...]:
    if kernel.operator == "matmul":
        return _shape_in(kernel, kernel.c_out)
    if kernel.operator == "copy":
        first, second = _two_axes(kernel)
        return (kernel.batch, second, first, kernel.c_out)
    if kernel.operator in (*_CHANNELS_LAST, "transpose"):
        return (kernel.batch, *kernel.spatial_out, kernel.c_out)
    return (kernel.batch, kernel.c_out, *kernel.spatial_out)


def _two_axes(kernel: Kernel) -> tuple[int, int]:
    """The positions of a copy as two axes, which it exchanges: were one of them 1, there would be nothing to do."""
    first, rest = kernel.spatial[0], prod(kernel.spatial[1:])
    return (first, rest) if min(first, rest) > 1 else (2, -(-first * rest // 2))


def _per_channel(kernel: Kernel) -> tuple[int, ...]:
    """The shape in which one value per output channel spreads over the output."""
    last = kernel.operator in _CHANNELS_LAST
    return (kernel.c_out,) if last else (1, kernel.c_out, *(1,) * len(kernel.spatial_out))


def _conv(graph: _Graph, kernel: Kernel) -> None:
    """Takes `bias` from the epilogue along, as exporters write it."""
    fan_in = kernel.c_in // kernel.groups
    shape = (kernel.c_out, fan_in, *kernel.window)
    weight = graph.weight(shape, 1 / sqrt(fan_in * prod(kernel.window)), _sparse_axis(kernel, 1))
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
    weight = graph.weight(shape, 1 / sqrt(kernel.c_in), _sparse_axis(kernel, 0 if kernel.spatial else 1))
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
    graph.node(operator, graph.made_input("x", _shape_in(kernel)), **attributes)


def _mean(graph: _Graph, kernel: Kernel) -> None:
    graph.node("GlobalAveragePool", graph.made_input("x", _shape_in(kernel)))


def _add(graph: _Graph, kernel: Kernel) -> None:
    graph.node("Add", graph.input("x", _shape_in(kernel)), graph.input("other", _shape_out(kernel)))


def _mul(graph: _Graph, kernel: Kernel) -> None:
    """The gate of squeeze-and-excitation: one factor per channel."""
    gate = (kernel.batch, kernel.c_out, *(1,) * len(kernel.spatial))
    graph.node("Mul", graph.made_input("x", _shape_in(kernel)), graph.input("gate", gate))


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


def _attention(graph: _Graph, kernel: Kernel) -> None:
    """As exporters write it: heads split off, scores scaled (and biased), softmax, weighted sum, heads joined."""
    queries, keys = kernel.spatial
    heads = kernel.groups
    split = {}
    for name, tokens, channels, order in (
        ("x", queries, kernel.c_in, (0, 2, 1, 3)),
        ("key", keys, kernel.c_in, (0, 2, 3, 1)),
        ("value", keys, kernel.c_out, (0, 2, 1, 3)),
    ):
        source = graph.input(name, (kernel.batch, tokens, channels))
        graph.node("Reshape", source, graph.integers((kernel.batch, tokens, heads, channels // heads)))
        graph.node("Transpose", graph.value, perm=order)
        split[name] = graph.value
    graph.node("Mul", split["x"], graph.constant(np.float32(1 / sqrt(kernel.c_in / heads))))
    graph.node("MatMul", graph.value, split["key"])
    if "add" in kernel.epilogue:
        graph.node("Add", graph.value, graph.weight((1, heads, queries, keys)))
    graph.node("Softmax", graph.value, axis=-1)
    graph.node("MatMul", graph.value, split["value"])
    graph.node("Transpose", graph.value, perm=(0, 2, 1, 3))
    graph.node("Reshape", graph.value, graph.integers(_shape_out(kernel)))


def _matmul(graph: _Graph, kernel: Kernel) -> None:
    sizes = kernel.c_in // kernel.groups, kernel.c_out // kernel.groups
    x = graph.input("x", _shape_in(kernel))
    graph.node("MatMul", x, graph.input("other", (kernel.batch, kernel.groups, *sizes)))


def _layer_norm(graph: _Graph, kernel: Kernel) -> None:
    x = graph.input("x", _shape_in(kernel))
    graph.node("LayerNormalization", x, graph.weight((kernel.c_in,)), graph.weight((kernel.c_in,)), axis=-1)


def _softmax(graph: _Graph, kernel: Kernel) -> None:
    graph.node("Softmax", graph.input("x", _shape_in(kernel)), axis=-1)


def _copy(graph: _Graph, kernel: Kernel) -> None:
    x = graph.input("x", (kernel.batch, *_two_axes(kernel), kernel.c_in))
    graph.node("Transpose", x, perm=(0, 2, 1, 3))


def _transpose(graph: _Graph, kernel: Kernel) -> None:
    rank = len(kernel.spatial)
    graph.node("Transpose", graph.input("x", _shape_in(kernel)), perm=(0, *range(2, rank + 2), 1))


_CHANNELS_LAST = ("linear", "attention", "layer_norm")

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
    "attention": _attention,
    "matmul": _matmul,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "copy": _copy,
    "transpose": _transpose,
}


def _epilogue(graph: _Graph, kernel: Kernel, step: str) -> None:
    x = graph.value
    if step == "bias":
        if not _leads_with_bias(kernel):
            graph.node("Add", x, graph.weight(_per_channel(kernel)))
    elif step == "add":
        shape = _shape_out(kernel)
        is_fused = kernel.operator == "conv" and kernel.epilogue[:2] == ("bias", "add")  # not behind an activation
        residual = graph.made_input("residual", shape) if is_fused else graph.input("residual", shape)
        graph.node("Add", x, residual)
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
