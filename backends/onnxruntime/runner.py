"""Device half for ONNX Runtime: standard library, onnxruntime and the numpy that it brings; Python 3.8 or later."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from typing import Any

import numpy as np
import onnxruntime as ort

NAME = "onnxruntime"
DTYPES = {"float": "float32", "float16": "float16", "double": "float64", "int64": "int64", "int32": "int32"}
DTYPES.update({"bool": "bool", "int8": "int8", "uint8": "uint8"})
NOT_COMPUTE = {"ReorderInput", "ReorderOutput", "Cast", "MemcpyToHost", "MemcpyFromHost"}
PRECISIONS = ("fp32", "int8")
TO_AND_FROM_FLOAT = {"QuantizeLinear", "DequantizeLinear"}
ADDED_LAYOUT = re.compile(r"Transpose(_token_\d+)?")
"""Names of what ONNX Runtime puts around a convolution of integers, which it runs channels last."""
COPY = re.compile(r"_token_\d+$")
"""It runs a convolution of integers as a copy of the node, named after it."""
MADE = re.compile(r"edgeprune_made(_nchwc)?")
"""What makes an input of a kernel, and is no part of it."""
PROFILED_RUNS = 24
PROFILED_US = 50e3

ort.set_default_logger_severity(3)


class Handle:
    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self.path = path
        self.options = options
        self.session = ort.InferenceSession(path, _settings(options), providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]
        self.feeds = {spec["name"]: np.zeros(spec["shape"], spec["dtype"]) for spec in inputs(self)}
        self.last: list[Any] = []
        self.run = self.session.run


def version() -> str:
    return str(ort.__version__)


def load(path: str, options: dict[str, Any]) -> Handle:
    if options["precision"] not in PRECISIONS:
        raise ValueError("precision %s is not supported; %s are" % (options["precision"], " and ".join(PRECISIONS)))
    return Handle(path, options)


def inputs(handle: Handle) -> list[dict[str, Any]]:
    return [_spec(value) for value in handle.session.get_inputs()]


def outputs(handle: Handle) -> list[dict[str, Any]]:
    return [_spec(value) for value in handle.session.get_outputs()]


def fill(handle: Handle, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for array in handle.feeds.values():
        if np.issubdtype(array.dtype, np.floating):
            array[...] = generator.standard_normal(array.shape, dtype=np.float32)
        elif array.dtype.name in ("int8", "uint8"):
            limits = np.iinfo(array.dtype)
            array[...] = generator.integers(limits.min, limits.max + 1, array.shape)
        else:
            array[...] = generator.integers(0, 2, array.shape)


def set_input(handle: Handle, index: int, data: bytes) -> None:
    array = list(handle.feeds.values())[index]
    array[...] = np.frombuffer(data, dtype=array.dtype).reshape(array.shape)


def get_output(handle: Handle, index: int) -> bytes:
    return np.ascontiguousarray(handle.last[index]).tobytes()


def run(handle: Handle) -> None:
    handle.last = handle.run(handle.names, handle.feeds)


def node_times(handle: Handle) -> dict[str, Any] | None:
    """Medians over runs of a second session that profiles: the profile of a session can be read only when it ends.

    Profiling costs microseconds a node, so the whole run is timed without it, in turn with those that are profiled.
    """
    if not handle.options.get("profile"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(handle.options)
        settings.enable_profiling = True
        settings.profile_file_prefix = os.path.join(folder, "profile")
        session = ort.InferenceSession(handle.path, settings, providers=["CPUExecutionProvider"])
        totals: list[float] = []
        while len(totals) < 4 or (len(totals) < PROFILED_RUNS and sum(totals) < PROFILED_US):
            session.run(handle.names, handle.feeds)
            begun = time.perf_counter_ns()
            handle.run(handle.names, handle.feeds)
            totals.append((time.perf_counter_ns() - begun) / 1e3)
        with open(session.end_profiling()) as file:
            events = json.load(file)
    times: dict[tuple[str, str], list[float]] = {}
    precisions: dict[tuple[str, str], str | None] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["name"][: -len("_kernel_time")], event.get("args", {}).get("op_name", ""))
            times.setdefault(node, []).append(event["dur"])
            precisions[node] = _precision(event.get("args", {}))
    nodes = [
        # the first runs are cold; times are cut to whole microseconds
        {
            "name": COPY.sub("", name),
            "type": kind,
            "time_us": _middle(durations[2:]) + 0.5,
            "compute": _computes(name, kind),
            "precision": precisions[name, kind],
        }
        for (name, kind), durations in times.items()
    ]
    return {"nodes": nodes, "total_us": _middle(totals[2:])}


def _computes(name: str, kind: str) -> bool:
    is_layout = kind in NOT_COMPUTE or (kind == "Transpose" and ADDED_LAYOUT.fullmatch(name))
    return not is_layout and not MADE.fullmatch(name)


def _precision(told: dict[str, Any]) -> str | None:
    """Of what a node works on, by the types of its inputs: one with integers of 8 bits computes in them.

    But for the way to and from float, which is what a runtime does where it has no such kernel.
    """
    kinds = {kind for described in told.get("input_type_shape", []) for kind in described}
    if kinds & {"int8", "uint8"} and told.get("op_name") not in TO_AND_FROM_FLOAT:
        return "int8"
    names = {"float": "fp32", "float16": "fp16", "double": "fp64"}
    return next((name for kind, name in names.items() if kind in kinds), next(iter(sorted(kinds)), None))


def _settings(options: dict[str, Any]) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return settings


def _spec(value: Any) -> dict[str, Any]:
    kind = value.type[len("tensor(") : -1]
    return {"name": value.name, "dtype": DTYPES.get(kind, kind), "shape": list(value.shape)}


def _middle(values: list[float]) -> float:
    return float(np.median(values))
