"""Reads inputs, outputs and names of nodes off an ONNX file, without its package. A part of the runner."""

from __future__ import annotations

import os
from typing import Any, Iterator

ELEMENT_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}


def read_onnx(path: str) -> dict[str, Any]:
    """Inputs, outputs and names of the nodes of an ONNX file, off its protobuf: nothing else is needed of it."""
    with open(path, "rb") as file:
        data = memoryview(file.read())
    try:
        graph = _part(data, 7)
        parts = [(number, value) for number, value in _fields(graph) if number in (1, 5, 11, 12)]
        weights = {_text(value, 8) for number, value in parts if number == 5}
        model = {
            "inputs": [spec for spec in (_spec(v) for n, v in parts if n == 11) if spec["name"] not in weights],
            "outputs": [_spec(value) for number, value in parts if number == 12],
            "nodes": [_text(value, 3) for number, value in parts if number == 1],
        }
    except (ValueError, IndexError, KeyError, TypeError):
        raise ValueError("not an ONNX model with static shapes: %s" % os.path.basename(path)) from None
    return model


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: an int, or the bytes of what is nested or fixed."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            if key & 7 != 2:
                raise ValueError("not protobuf")
            size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _spec(value_info: Any) -> dict[str, Any]:
    tensor = _part(_part(value_info, 2), 1)
    shape = [_part(dim, 1) for number, dim in _fields(_part(tensor, 2)) if number == 1]
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError("a dimension without a size")
    return {"name": _text(value_info, 1), "dtype": ELEMENT_TYPES[_part(tensor, 1)], "shape": shape}


def _part(data: Any, number: int) -> Any:
    for found, value in _fields(data):
        if found == number:
            return value
    raise KeyError(number)


def _text(data: Any, number: int) -> str:
    return next((bytes(value).decode() for found, value in _fields(data) if found == number), "")
