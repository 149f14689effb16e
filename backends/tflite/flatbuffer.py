"""A .tflite file as the objects of its schema: parsed, asked and packed again."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from edgeprune.measurement import TensorSpec

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def parsed(content: bytes) -> Any:
    """A `ModelT` that holds all values: the quantiser lays large ones behind the tables, at an offset in the file."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:  # 0 and 1 stand for none
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def packed(model: Any) -> bytes:
    """The file."""
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def kind(model: Any, operator: Any) -> str:
    """Name of an operator: CONV_2D."""
    return _operators()[model.operatorCodes[operator.opcodeIndex].builtinCode]


def dtype(tensor: Any) -> str:
    """As numpy names it: float32."""
    return _dtypes()[tensor.type]


def constant(model: Any, tensor: int, kind: type[Any]) -> Any:
    """Values of a constant tensor, flat; none where it is computed."""
    data = model.buffers[model.subgraphs[0].tensors[tensor].buffer].data
    return np.frombuffer(bytes(data) if data is not None else b"", kind)


def spec(tensor: Any) -> TensorSpec:
    """Name, dtype and shape of an input or output."""
    return TensorSpec(name=text(tensor.name), dtype=dtype(tensor), shape=tuple(int(size) for size in tensor.shape))


def text(name: Any) -> str:
    """A name, which is bytes in a file that was read."""
    return name.decode() if isinstance(name, bytes) else str(name)


def scales(tensor: Any) -> tuple[float, ...]:
    """Those of a quantised tensor: one, or one an output channel; none of any other."""
    told = tensor.quantization.scale if tensor.quantization is not None else None
    return tuple(map(float, told)) if told is not None else ()


@cache
def _operators() -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


@cache
def _dtypes() -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
