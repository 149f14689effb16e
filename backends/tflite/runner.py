"""Device half for LiteRT: standard library, ai_edge_litert (or tflite_runtime) and numpy; Python 3.8 or later.

Options: `threads`; `xnnpack` (true unless told), false for LiteRT's own kernels.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

NAME = "tflite"

try:
    import ai_edge_litert as _runtime
    from ai_edge_litert import interpreter as _interpreter
except ImportError as _newer:
    try:
        import tflite_runtime as _runtime
        from tflite_runtime import interpreter as _interpreter
    except ImportError as _older:
        raise ImportError("no LiteRT (%s; %s): pip install 'edgeprune[litert]'" % (_newer, _older)) from None


class Handle:
    def __init__(self, path: str, options: dict[str, Any]) -> None:
        resolvers = _interpreter.OpResolverType
        resolver = resolvers.AUTO if options.get("xnnpack", True) else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self.interpreter = _interpreter.Interpreter(
            model_path=path, num_threads=options["threads"], experimental_op_resolver_type=resolver
        )
        self.interpreter.allocate_tensors()
        self.inputs = self.interpreter.get_input_details()
        self.outputs = self.interpreter.get_output_details()
        self.invoke = self.interpreter.invoke


def version() -> str:
    return str(_runtime.__version__)


def load(path: str, options: dict[str, Any]) -> Handle:
    if options["precision"] != "fp32":
        raise ValueError("precision %s is not supported; fp32 is" % options["precision"])
    if not os.path.isfile(path):
        raise ValueError("no such file: %s" % path)
    return Handle(path, options)


def inputs(handle: Handle) -> list[dict[str, Any]]:
    return [_spec(details) for details in handle.inputs]


def outputs(handle: Handle) -> list[dict[str, Any]]:
    return [_spec(details) for details in handle.outputs]


def fill(handle: Handle, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for details in handle.inputs:
        shape, dtype = details["shape"], details["dtype"]
        if np.issubdtype(dtype, np.floating):
            values = generator.standard_normal(shape, dtype=np.float32)
        else:
            values = generator.integers(0, 2, shape)
        handle.interpreter.set_tensor(details["index"], values.astype(dtype))


def set_input(handle: Handle, index: int, data: bytes) -> None:
    details = handle.inputs[index]
    array = np.frombuffer(data, dtype=details["dtype"]).reshape(details["shape"])
    handle.interpreter.set_tensor(details["index"], array)


def get_output(handle: Handle, index: int) -> bytes:
    return bytes(handle.interpreter.get_tensor(handle.outputs[index]["index"]).tobytes())


def run(handle: Handle) -> None:
    handle.invoke()


def node_times(handle: Handle) -> dict[str, Any] | None:
    return None  # its Python interface tells no times of operators


def unload(handle: Handle) -> None:
    handle.invoke = handle.interpreter = None


def _spec(details: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": details["name"],
        "dtype": np.dtype(details["dtype"]).name,
        "shape": [int(size) for size in details["shape"]],
    }
