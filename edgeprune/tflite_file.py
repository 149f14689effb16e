"""A TFLite file, written operator by operator: the flatbuffer itself, with the schema that `ai_edge_litert` ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

IDENTIFIER = b"TFL3"
VERSION = 3  # of the schema
NONE = -1  # an optional input that is not there
_TYPES = {"float32": "FLOAT32", "float16": "FLOAT16", "int32": "INT32", "int64": "INT64", "int8": "INT8"}
_OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GELU": "GeluOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "RESHAPE": "ReshapeOptions",
    "SOFTMAX": "SoftmaxOptions",
    "SQUARED_DIFFERENCE": "SquaredDifferenceOptions",
    "SUB": "SubOptions",
    "TRANSPOSE": "TransposeOptions",
}
"""Table of options of an operator; one that isn't here has none."""

_VERSIONS = {"CONV_2D": 6, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 5, "TRANSPOSE": 4}
"""The least version of an operator that knows what is used of it here, where that is not 1: grouped convolutions,
dilated depthwise ones, rows that stay rows, tensors of five dimensions."""

_FUSING = frozenset({"ADD", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MUL", "SUB"})
"""What takes a clamp after it into itself."""


_INT8_FROM_2 = frozenset(
    "ADD AVERAGE_POOL_2D BATCH_MATMUL CONCATENATION GELU LOGISTIC MAX_POOL_2D MEAN MUL PAD PADV2 RELU RELU6 SOFTMAX "
    "SQUARED_DIFFERENCE SUB".split()
)
"""Operators that know int8 from their second version on."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """value = scale (integer - zero); several scales are those of the indices of `axis`."""

    scales: tuple[float, ...]
    zero: int = 0
    axis: int = 0


@dataclass
class TfliteFile:
    """Tensors, constants and operators as they come; a tensor is known by its index."""

    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[Array | None] = field(default_factory=lambda: [None])
    operators: list[tuple[str, Any]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32") -> int:
        self.inputs.append(self._tensor(name, shape, dtype))
        return self.inputs[-1]

    def constant(self, array: Array) -> int:
        self.buffers.append(array)
        return self._tensor(f"w{len(self.tensors)}", array.shape, array.dtype.name, len(self.buffers) - 1)

    def integers(self, values: Sequence[int] | Sequence[Sequence[int]]) -> int:
        """A constant of int32: a shape, axes, an order or paddings."""
        return self.constant(np.array(values, np.int32))

    def operator(self, code: str, inputs: Sequence[int], shape: Sequence[int], **options: Any) -> int:
        """Append an operator; gives its output, of the type of its first input. Options are named as in the schema."""
        from ai_edge_litert import schema_py_generated as schema

        made = schema.OperatorT()
        made.inputs = list(inputs)
        made.outputs = [self._tensor(f"v{len(self.tensors)}", shape, self.tensors[inputs[0]].dtype)]
        if code in _OPTIONS:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, _OPTIONS[code])
            made.builtinOptions = getattr(schema, f"{_OPTIONS[code]}T")()
            for name, value in options.items():
                assert hasattr(made.builtinOptions, name), f"{code} has no option {name}"
                setattr(made.builtinOptions, name, value)
        else:
            assert not options, f"{code} has no options"
        self.operators.append((code, made))
        return int(made.outputs[0])

    def fuse(self, activation: str) -> bool:
        """Make the last operator clamp its output (`RELU`, `RELU6`); False where it can't."""
        from ai_edge_litert import schema_py_generated as schema

        if not self.operators or self.operators[-1][0] not in _FUSING:
            return False
        made = self.operators[-1][1]
        if made.builtinOptions.fusedActivationFunction != schema.ActivationFunctionType.NONE:
            return False
        made.builtinOptions.fusedActivationFunction = getattr(schema.ActivationFunctionType, activation)
        return True

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(self.tensors[tensor].shape)

    def to_bytes(self, outputs: Mapping[str, int]) -> bytes:
        """The whole file; `outputs` names tensors."""
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema

        for name, tensor in outputs.items():
            self.tensors[tensor].name = name
        codes = list(dict.fromkeys(code for code, _ in self.operators))
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors = [_packed(tensor) for tensor in self.tensors]
        graph.inputs, graph.outputs = self.inputs, list(outputs.values())
        graph.operators = [made for _, made in self.operators]
        for code, made in self.operators:
            made.opcodeIndex = codes.index(code)
        model = schema.ModelT()
        model.version, model.description = VERSION, "edgeprune"
        quantised = any(tensor.quantisation for tensor in self.tensors)
        model.operatorCodes = [_operator_code(code, 2 if quantised and code in _INT8_FROM_2 else 1) for code in codes]
        model.subgraphs = [graph]
        model.buffers = [_buffer(array) for array in self.buffers]
        builder = flatbuffers.Builder(1024 + sum(array.nbytes for array in self.buffers if array is not None))
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _tensor(self, name: str, shape: Sequence[int], dtype: str, buffer: int = 0) -> int:
        self.tensors.append(Tensor(name=name, shape=tuple(shape), dtype=dtype, buffer=buffer))
        return len(self.tensors) - 1


@dataclass
class Tensor:
    """One tensor; of a constant `buffer` is the place of its values, else 0."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: int
    quantisation: Quantisation | None = None


def _packed(tensor: Tensor) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    made = schema.TensorT()
    made.name, made.shape, made.buffer = tensor.name, list(tensor.shape), tensor.buffer
    made.type = getattr(schema.TensorType, _TYPES[tensor.dtype])
    if tensor.quantisation is not None:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale = list(tensor.quantisation.scales)
        made.quantization.zeroPoint = [tensor.quantisation.zero] * len(tensor.quantisation.scales)
        made.quantization.quantizedDimension = tensor.quantisation.axis
    return made


def _operator_code(code: str, least: int) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    made = schema.OperatorCodeT()
    made.builtinCode = getattr(schema.BuiltinOperator, code)
    made.deprecatedBuiltinCode = min(made.builtinCode, 127)  # one byte, which old readers look at
    made.version = max(_VERSIONS.get(code, 1), least)
    return made


def _buffer(array: Array | None) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    made = schema.BufferT()
    if array is not None:
        made.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    return made
