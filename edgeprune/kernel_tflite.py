"""The TFLite file of one kernel: the operators that `litert_torch` makes of it, channels last as inside a network.

Weights are those of the kernel's ONNX model with the same seed, so that the two compute the same.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from pathlib import Path

import numpy as np

from edgeprune.kernel import Kernel
from edgeprune.kernel_weights import random_weight
from edgeprune.tflite_file import TfliteFile
from edgeprune.tflite_int8 import to_int8

PRECISIONS = ("fp32", "int8")
EPSILON = 1e-5  # of a layer norm
SAME, VALID = 0, 1  # paddings of the schema


@dataclass
class _Graph:
    """The file as it grows; `value` is the tensor that the next operator takes."""

    rng: np.random.Generator
    file: TfliteFile = field(default_factory=TfliteFile)
    value: int = 0

    def input(self, name: str, shape: tuple[int, ...]) -> int:
        self.value = self.file.input(name, shape)
        return self.value

    def weight(self, shape: tuple[int, ...], scale: float = 1.0, order: tuple[int, ...] = ()) -> int:
        """Drawn in torch's `shape`, stored with its axes in `order`."""
        drawn = random_weight(self.rng, shape, scale)
        return self.file.constant(np.ascontiguousarray(drawn.transpose(order)) if order else drawn)

    def number(self, value: float) -> int:
        return self.file.constant(np.array(value, np.float32))

    def node(self, code: str, *inputs: int, shape: tuple[int, ...] | None = None, **options: object) -> int:
        """Append an operator whose output, of the first input's shape unless told, becomes `value`."""
        self.value = self.file.operator(code, inputs, self.file.shape(inputs[0]) if shape is None else shape, **options)
        return self.value

    def reshape(self, value: int, shape: tuple[int, ...]) -> int:
        return self.node("RESHAPE", value, self.file.integers(shape), shape=shape, newShape=list(shape))

    def transpose(self, value: int, order: tuple[int, ...]) -> int:
        shape = self.file.shape(value)
        return self.node("TRANSPOSE", value, self.file.integers(order), shape=tuple(shape[axis] for axis in order))

    def mean(self, value: int, axes: tuple[int, ...], *, keep: bool) -> int:
        shape = self.file.shape(value)
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(shape) if keep or axis not in axes)
        return self.node("MEAN", value, self.file.integers(axes), shape=kept, keepDims=keep)


def write_kernel(kernel: Kernel, folder: Path) -> Path:
    """`bytes_from_kernel` as a file in `folder`, named after the kernel."""
    path = folder / f"{kernel.operator}_{zlib.crc32(kernel.key.encode()):08x}.tflite"
    path.write_bytes(bytes_from_kernel(kernel))
    return path


def bytes_from_kernel(kernel: Kernel, seed: int = 0) -> bytes:
    """Input `x` of shape [batch, *spatial, c_in], output `y`, float32, or int8 through and through (`tflite_int8`).

    `residual` (epilogue `add`) and `other` (operator `add`) have the shape of the output, `gate` (`mul`) is
    [batch, 1, 1, c_out], `key` and `value` (`attention`) are [batch, keys, channels]. `matmul` takes
    [batch, groups, spatial, c_in / groups]; `softmax` and `transpose` take channels first: they stand where a network
    is not channels last. A window over one axis slides over the second of two. `ValueError` for what can't be built.
    """
    if kernel.precision not in PRECISIONS or kernel.sparsity != "dense":
        raise ValueError(
            f"{kernel.key}: {kernel.precision} {kernel.sparsity} kernels are not built yet "
            f"(supported: {', '.join(PRECISIONS)}; dense)"
        )
    if len(kernel.window) == 1:
        kernel = _over_two_axes(kernel)
    graph = _Graph(rng=np.random.default_rng(seed))
    _OPERATORS[kernel.operator](graph, kernel)
    for step in kernel.epilogue if kernel.operator != "attention" else ():
        _epilogue(graph, kernel, step)
    if kernel.precision == "int8":
        to_int8(graph.file)
    return graph.file.to_bytes({"y": graph.value})


def _shape_in(kernel: Kernel, channels: int | None = None) -> tuple[int, ...]:
    return (kernel.batch, *kernel.spatial, kernel.c_in if channels is None else channels)


def _shape_out(kernel: Kernel) -> tuple[int, ...]:
    if kernel.operator == "matmul":
        return (kernel.batch, kernel.groups, *kernel.spatial, kernel.c_out // kernel.groups)
    return (kernel.batch, *kernel.spatial_out, kernel.c_out)


def _conv(graph: _Graph, kernel: Kernel) -> None:
    """Takes `bias` along, zeros where there is none."""
    if len(kernel.window) != 2:
        raise ValueError(f"{kernel.key}: LiteRT is given convolutions over one or two axes")
    x = graph.input("x", _shape_in(kernel))
    fan_in, depthwise = kernel.c_in // kernel.groups, kernel.is_depthwise
    scale = 1 / sqrt(fan_in * prod(kernel.window))
    weight = graph.weight((kernel.c_out, fan_in, *kernel.window), scale, (1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
    bias = _leading_bias(graph, kernel)
    padding = _padding(kernel)
    if padding == VALID and any(kernel.padding):
        x = _pad(graph, x, kernel.padding)
    graph.node(
        "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D",
        x,
        weight,
        bias,
        shape=_shape_out(kernel),
        padding=padding,
        strideH=kernel.stride[0],
        strideW=kernel.stride[1],
        dilationHFactor=kernel.dilation[0],
        dilationWFactor=kernel.dilation[1],
        **({"depthMultiplier": kernel.c_out // kernel.c_in} if depthwise else {}),
    )


def _over_two_axes(kernel: Kernel) -> Kernel:
    """The same over two axes, of which the first is 1, as the converter turns it."""
    return replace(
        kernel,
        spatial=(1, *kernel.spatial),
        window=(1, *kernel.window),
        stride=(1, *kernel.stride),
        padding=(0, *kernel.padding),
        dilation=(1, *kernel.dilation),
    )


def _padding(kernel: Kernel) -> int:
    """SAME where that is what the kernel pads: TFLite puts what an odd total leaves over at the end."""
    for size, out, k, s, p, d in zip(
        *(kernel.spatial, kernel.spatial_out, kernel.window, kernel.stride, kernel.padding, kernel.dilation),
        strict=True,
    ):
        total = max((out - 1) * s + d * (k - 1) + 1 - size, 0)
        if out != -(-size // s) or total != 2 * p:
            return VALID
    return SAME if any(kernel.padding) else VALID


def _pad(graph: _Graph, x: int, padding: tuple[int, ...], value: float = 0.0) -> int:
    """Explicit padding on both sides of the middle axes."""
    batch, *sizes, channels = graph.file.shape(x)
    padded = (batch, *(size + 2 * p for size, p in zip(sizes, padding, strict=True)), channels)
    amounts = graph.file.integers([(0, 0), *((p, p) for p in padding), (0, 0)])
    if value:
        return graph.node("PADV2", x, amounts, graph.number(value), shape=padded)
    return graph.node("PAD", x, amounts, shape=padded)


def _leading_bias(graph: _Graph, kernel: Kernel) -> int:
    if kernel.epilogue[:1] == ("bias",):
        return graph.weight((kernel.c_out,))
    return graph.file.constant(np.zeros(kernel.c_out, np.float32))


def _linear(graph: _Graph, kernel: Kernel) -> None:
    x = graph.input("x", _shape_in(kernel))
    shape, order = ((kernel.c_in, kernel.c_out), (1, 0)) if kernel.spatial else ((kernel.c_out, kernel.c_in), ())
    weight = graph.weight(shape, 1 / sqrt(kernel.c_in), order)
    graph.node("FULLY_CONNECTED", x, weight, _leading_bias(graph, kernel), shape=_shape_out(kernel), keepNumDims=True)


def _pool(graph: _Graph, kernel: Kernel) -> None:
    """A padded average counts the zeros, as torch's does: the padding has to be explicit."""
    if len(kernel.window) != 2 or any(d != 1 for d in kernel.dilation):
        raise ValueError(f"{kernel.key}: LiteRT pools over two axes, without dilation")
    x = graph.input("x", _shape_in(kernel))
    largest = kernel.operator == "max_pool"
    padding = _padding(kernel) if largest else VALID
    if padding == VALID and any(kernel.padding):
        x = _pad(graph, x, kernel.padding, -np.inf if largest else 0.0)
    graph.node(
        "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D",
        x,
        shape=_shape_out(kernel),
        padding=padding,
        strideH=kernel.stride[0],
        strideW=kernel.stride[1],
        filterHeight=kernel.window[0],
        filterWidth=kernel.window[1],
    )


def _mean(graph: _Graph, kernel: Kernel) -> None:
    graph.mean(graph.input("x", _shape_in(kernel)), tuple(range(1, len(kernel.spatial) + 1)), keep=True)


def _add(graph: _Graph, kernel: Kernel) -> None:
    graph.node("ADD", graph.input("x", _shape_in(kernel)), graph.input("other", _shape_in(kernel)))


def _mul(graph: _Graph, kernel: Kernel) -> None:
    """The gate of squeeze-and-excitation: one factor per channel."""
    x = graph.input("x", _shape_in(kernel))
    graph.node("MUL", x, graph.input("gate", (kernel.batch, *(1,) * len(kernel.spatial), kernel.c_out)))


def _affine(graph: _Graph, kernel: Kernel) -> None:
    graph.node("MUL", graph.input("x", _shape_in(kernel)), graph.weight((kernel.c_out,)))
    graph.node("ADD", graph.value, graph.weight((kernel.c_out,)))


def _activation(graph: _Graph, kernel: Kernel) -> None:
    if not kernel.epilogue:
        raise ValueError(f"{kernel.key}: an activation names itself in the epilogue")
    graph.input("x", _shape_in(kernel))


def _cat(graph: _Graph, kernel: Kernel) -> None:
    half = kernel.c_in // 2
    if not half:
        raise ValueError(f"{kernel.key}: one channel can't be joined from two inputs")
    parts = [graph.input("x", _shape_in(kernel, half)), graph.input("other", _shape_in(kernel, kernel.c_in - half))]
    shape = _shape_in(kernel)
    graph.node("CONCATENATION", *parts, shape=shape, axis=len(shape) - 1)


def _attention(graph: _Graph, kernel: Kernel) -> None:
    """Queries and keys are scaled by half the scale each, as torch takes its attention apart."""
    (queries, keys), heads, batch = kernel.spatial, kernel.groups, kernel.batch
    width, width_out = kernel.c_in // heads, kernel.c_out // heads
    half = graph.number(width**-0.25)
    query, key, value = (
        graph.reshape(graph.input(name, (batch, tokens, heads * size)), (batch, tokens, heads, size))
        for name, tokens, size in (("x", queries, width), ("key", keys, width), ("value", keys, width_out))
    )
    query = graph.node("MUL", graph.transpose(query, (0, 2, 1, 3)), half)
    key = graph.transpose(graph.node("MUL", key, half), (0, 2, 3, 1))
    value = graph.transpose(value, (0, 2, 1, 3))
    scores = _batch_matmul(graph, query, key)
    if "add" in kernel.epilogue:
        scores = graph.node("ADD", scores, graph.weight((1, heads, queries, keys)))
    _batch_matmul(graph, graph.node("SOFTMAX", scores, beta=1.0), value)
    graph.reshape(graph.transpose(graph.value, (0, 2, 1, 3)), _shape_out(kernel))


def _batch_matmul(graph: _Graph, first: int, second: int) -> int:
    """Of [batch, groups, m, k] and [batch, groups, k, n]: as one batch, and taken apart again."""
    batch, groups, m, k = graph.file.shape(first)
    n = graph.file.shape(second)[-1]
    first = graph.reshape(first, (batch * groups, m, k))
    second = graph.reshape(second, (batch * groups, k, n))
    return graph.reshape(graph.node("BATCH_MATMUL", first, second, shape=(batch * groups, m, n)), (batch, groups, m, n))


def _matmul(graph: _Graph, kernel: Kernel) -> None:
    sizes = kernel.c_in // kernel.groups, kernel.c_out // kernel.groups
    x = graph.input("x", (kernel.batch, kernel.groups, *kernel.spatial, sizes[0]))
    _batch_matmul(graph, x, graph.input("other", (kernel.batch, kernel.groups, *sizes)))


def _layer_norm(graph: _Graph, kernel: Kernel) -> None:
    """Over rows: x * r - m * r with m the mean of a row and r one over its deviation.

    No scale and shift: the converter moves them into the linear layer that follows.
    """
    source = graph.input("x", _shape_in(kernel))
    rows, column = (1, kernel.batch * prod(kernel.spatial), kernel.c_in), (1, kernel.batch * prod(kernel.spatial), 1)
    x = graph.reshape(source, rows)
    mean = graph.mean(x, (0, 2), keep=False)
    squares = graph.node("SQUARED_DIFFERENCE", x, graph.reshape(mean, column))
    variance = graph.mean(squares, (0, 2), keep=False)
    inverse = graph.node("RSQRT", graph.node("ADD", variance, graph.number(EPSILON)))
    moved = graph.node("MUL", inverse, mean)
    shift = graph.node("SUB", graph.number(0.0), moved, shape=graph.file.shape(moved))
    scaled = graph.node("MUL", x, graph.reshape(inverse, column))
    graph.reshape(graph.node("ADD", scaled, graph.reshape(shift, column)), _shape_in(kernel))


def _softmax(graph: _Graph, kernel: Kernel) -> None:
    graph.node("SOFTMAX", graph.input("x", (kernel.batch, kernel.c_in, *kernel.spatial)), beta=1.0)


def _copy(graph: _Graph, kernel: Kernel) -> None:
    """Exchanges two axes of positions; were one of them 1, there would be nothing to do."""
    first, rest = kernel.spatial[0], prod(kernel.spatial[1:])
    axes = (first, rest) if min(first, rest) > 1 else (2, -(-first * rest // 2))
    graph.transpose(graph.input("x", (kernel.batch, *axes, kernel.c_in)), (0, 2, 1, 3))


def _transpose(graph: _Graph, kernel: Kernel) -> None:
    rank = len(kernel.spatial)
    graph.transpose(graph.input("x", (kernel.batch, kernel.c_in, *kernel.spatial)), (0, *range(2, rank + 2), 1))


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
        if kernel.operator not in ("conv", "linear") or kernel.epilogue[0] != "bias":
            graph.node("ADD", x, graph.weight((graph.file.shape(x)[-1],)))
    elif step == "add":
        graph.node("ADD", x, graph.file.input("residual", graph.file.shape(x)))
    elif step in _CLAMPS:
        if not graph.file.fuse(_CLAMPS[step]):
            graph.node(_CLAMPS[step], x)
    elif step == "silu":
        graph.node("MUL", x, graph.node("LOGISTIC", x))
    elif step == "hardsigmoid":
        graph.node("ADD", x, graph.number(3.0))
        graph.file.fuse("RELU6")
        graph.node("MUL", graph.value, graph.number(1 / 6))
    elif step in _PLAIN:
        graph.node(_PLAIN[step], x)
    else:
        raise ValueError(f"{kernel.key}: unknown epilogue {step!r}")


_CLAMPS = {"relu": "RELU", "relu6": "RELU6"}
_PLAIN = {"sigmoid": "LOGISTIC", "hardswish": "HARD_SWISH", "gelu": "GELU"}
