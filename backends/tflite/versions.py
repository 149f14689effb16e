"""Versions of operators: what a file needs, and the oldest runtime that has it.

A runtime looks an operator up by name and version, and refuses a file whose version it lacks. The converter writes
the versions of floats and the quantiser leaves them, so a runtime may take what it computes wrongly: TensorFlow Lite
2.14 runs a linear with float inputs and int8 weights of a scale a channel as if they had one scale, and says nothing.
`declare` writes the versions that the specification asks for, so that it refuses.

The rules and the releases are those of LiteRT's `op_version.cc` and `runtime_version.cc`
(github.com/google-ai-edge/LiteRT, tflite/converter/tools/versioning), for the operators that exports have.
"""

from __future__ import annotations

import copy
from typing import Any

from edgeprune.backends.tflite.flatbuffer import dtype, kind, scales

_INT8_FROM_2 = frozenset(
    "ADD AVERAGE_POOL_2D BATCH_MATMUL CONCATENATION DEQUANTIZE GATHER GELU LOGISTIC MAX_POOL_2D MAXIMUM MEAN MINIMUM "
    "MUL PACK PAD PADV2 RELU RELU6 RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT SLICE SOFTMAX SPLIT "
    "SQUARED_DIFFERENCE STRIDED_SLICE SUB TANH TRANSPOSE UNPACK".split()
)
"""Operators that take int8 from their second version on."""
_DIMENSIONS = {"PAD": {5: 4}, "PADV2": {5: 4}, "SLICE": {5: 5}, "TRANSPOSE": {5: 4, 6: 6}}
"""Least version for so many dimensions or more."""

_SINCE: dict[str, tuple[str, ...]] = {
    "ADD": ("1.5", "1.14", "2.4", "2.6", "2.13", "2.23"),
    "AVERAGE_POOL_2D": ("1.5", "1.14", "2.3"),
    "BATCH_MATMUL": ("2.3", "2.3", "2.4", "2.5"),
    "CAST": ("1.5", "2.7", "2.8", "2.9", "2.12", "2.15", "2.17", "2.21"),
    "CONCATENATION": ("1.5", "1.14", "2.3", "2.14", "2.21", "2.23"),
    "CONV_2D": ("1.5", "1.14", "1.14", "2.3", "2.4", "2.9", "2.11", "2.15"),
    "DEPTHWISE_CONV_2D": ("1.5", "1.12", "1.14", "2.2", "2.3", "2.3", "2.11"),
    "DEQUANTIZE": ("1.13", "1.14", "1.15", "2.2", "2.7", "2.18", "2.21", "2.22"),
    "DIV": ("1.6", "2.3"),
    "EMBEDDING_LOOKUP": ("1.13", "1.14", "1.14", "2.18", "2.21"),
    "EXP": ("1.7", "2.12"),
    "FULLY_CONNECTED": tuple("1.5 1.10 1.14 1.14 2.0 2.1 2.3 2.3 2.3 2.11 2.15 2.17 2.18 2.21".split()),
    "GATHER": ("1.6", "1.14", "1.15", "2.4", "2.5", "2.13", "2.15"),
    "GELU": ("2.9", "2.9"),
    "HARD_SWISH": ("1.15",),
    "LEAKY_RELU": ("1.13", "2.3"),
    "LOGISTIC": ("1.14", "1.14", "2.3"),
    "MAXIMUM": ("1.14", "1.14", "2.3", "2.3"),
    "MAX_POOL_2D": ("1.5", "1.14", "2.3"),
    "MEAN": ("1.6", "1.14", "2.4"),
    "MINIMUM": ("1.14", "1.14", "2.3", "2.3"),
    "MUL": ("1.5", "1.14", "1.15", "2.3", "2.6", "2.11", "2.13", "2.23"),
    "PACK": ("1.11", "1.14", "2.3", "2.13"),
    "PAD": ("1.5", "1.14", "2.4", "2.6", "2.20"),
    "PADV2": ("1.9", "1.14", "2.4", "2.6", "2.20"),
    "PRELU": ("1.8",),
    "QUANTIZE": ("1.14", "1.15", "2.7", "2.21", "2.21", "2.21"),
    "RELU": ("1.5", "2.1", "2.5"),
    "RELU6": ("1.5", "1.14", "2.5"),
    "RELU_0_TO_1": ("2.10",),
    "RESHAPE": ("1.5",),
    "RESIZE_BILINEAR": ("1.7", "1.14", "2.2", "2.5"),
    "RESIZE_NEAREST_NEIGHBOR": ("1.13", "1.14", "2.3", "2.4"),
    "RSQRT": ("1.10", "2.5", "2.15"),
    "SLICE": ("1.14", "1.14", "1.14", "2.4", "2.5", "2.14", "2.21", "2.23"),
    "SOFTMAX": ("1.5", "1.14", "2.3", "2.23"),
    "SPLIT": ("1.5", "1.14", "1.14", "2.3"),
    "SQRT": ("1.10", "2.21"),
    "SQUARE": ("1.12",),
    "SQUARED_DIFFERENCE": ("1.13", "2.5"),
    "SQUEEZE": ("1.6", "2.5"),
    "STABLEHLO_COMPOSITE": ("2.17",),
    "STRIDED_SLICE": ("1.6", "1.14", "2.1", "2.2", "2.5", "2.6", "2.14", "2.14"),
    "SUB": ("1.6", "1.14", "2.3", "2.4", "2.4"),
    "SUM": ("1.10", "1.15"),
    "TANH": ("1.14", "1.14", "2.3"),
    "TRANSPOSE": ("1.6", "1.14", "1.15", "2.3", "2.4", "2.12", "2.14.4", "2.22", "2.23"),
    "TRANSPOSE_CONV": ("1.9", "2.2", "2.3", "2.13", "2.15"),
    "UNPACK": ("1.11", "1.14", "2.2", "2.3", "2.22"),
}
"""The release of TensorFlow Lite that brought each version of an operator, the first one first."""


def declare(model: Any) -> None:
    """Raise the version of each operator to what is used of it, in place; none is lowered."""
    codes: dict[tuple[int, int], int] = {}
    made: list[Any] = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            old = model.operatorCodes[operator.opcodeIndex]
            version = max(old.version, needed(model, graph, operator))
            key = operator.opcodeIndex, version
            if key not in codes:
                codes[key] = len(made)
                made.append(copy.copy(old))
                made[-1].version = version
            operator.opcodeIndex = codes[key]
    model.operatorCodes = made


def needed(model: Any, graph: Any, operator: Any) -> int:
    """Least version of an operator that computes what this one is to compute."""
    name = kind(model, operator)
    inputs = [graph.tensors[index] for index in operator.inputs if index >= 0]
    if not inputs:
        return 1
    dimensions = len(inputs[0].shape) if inputs[0].shape is not None else 0
    least = max((version for many, version in _DIMENSIONS.get(name, {}).items() if dimensions >= many), default=1)
    if name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
        return max(least, _contraction(name, operator, inputs))
    if name == "EMBEDDING_LOOKUP" and len(scales(inputs[1])) > 1:
        return 4
    if name == "DEQUANTIZE" and dtype(inputs[0]) == "float16":
        return 3
    if name == "DEQUANTIZE" and len(scales(inputs[0])) > 1:
        return 5
    if name == "MUL" and _grows(graph, operator, inputs):
        return 3
    return max(least, 2 if name in _INT8_FROM_2 and dtype(inputs[0]) == "int8" else 1)


def _contraction(name: str, operator: Any, inputs: list[Any]) -> int:
    data, weight = inputs[:2]
    integers, hybrid = dtype(data) == "int8", dtype(data) == "float32" and dtype(weight) == "int8"
    many = len(scales(weight)) > 1
    if name == "FULLY_CONNECTED":
        options = operator.builtinOptions
        rows = 5 if options is not None and options.keepNumDims else 1
        biased = sum(index >= 0 for index in operator.inputs) > 2
        sparse = 8 if weight.sparsity is not None else 1
        return max(rows, 1 if biased else 6, 4 if integers else 1, (12 if many else 3) if hybrid else 1, sparse)
    if name == "DEPTHWISE_CONV_2D":
        options = operator.builtinOptions
        wide = max(options.dilationWFactor, options.dilationHFactor) > 1 if options is not None else False
        return max(2 if wide else 1, 3 if integers else 1, (6 if many else 4) if hybrid else 1)
    grouped = data.shape[3] != weight.shape[3]
    return max(6 if grouped else 1, 3 if integers else 1, (5 if many else 2) if hybrid else 1)


def _grows(graph: Any, operator: Any, inputs: list[Any]) -> bool:
    """Whether a product of integers is scaled up, by one or more."""
    told = [scales(tensor) for tensor in [*inputs, graph.tensors[operator.outputs[0]]]]
    return all(told) and dtype(inputs[0]) == "int8" and told[0][0] * told[1][0] / told[2][0] >= 1


def least_runtime(model: Any) -> tuple[str, str] | None:
    """The oldest TensorFlow Lite that has every operator in its version, and the operator that asks for it.

    `("2.17", "FULLY_CONNECTED version 12")`; None where an operator is not known here.
    """
    least, asks = "0", ""
    for graph in model.subgraphs:
        for operator in graph.operators:
            name, version = kind(model, operator), model.operatorCodes[operator.opcodeIndex].version
            since = _SINCE.get(name, ())
            if version > len(since):
                return None
            if _parts(since[version - 1]) > _parts(least):
                least, asks = since[version - 1], f"{name} version {version}"
    return least, asks


def _parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
