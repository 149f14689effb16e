"""Device half for OpenVINO: standard library, openvino and the numpy that it brings; Python 3.8 or later."""
# ruff: noqa: B905, RUF007

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov

NAME = "openvino"
MADE = "edgeprune_made"
"""What makes an input of a kernel, and is no part of it."""
NOT_COMPUTE = {"Parameter", "Input", "Result", "Output", "Const", "Constant", "Reorder", "Convert"}
HINTS = {"latency": "LATENCY", "throughput": "THROUGHPUT"}
LONG_US = 200.0
COARSE_US = 2.0
PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
"""What OpenVINO is asked to compute in; int8 lives in the model, and the rest of it stays fp32."""
CAPABILITIES = {"fp16": "FP16", "bf16": "BF16", "int8": "INT8"}
TOLD = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}

_core = ov.Core()


class Handle:
    def __init__(self, compiled: Any, named: set[str] | None) -> None:
        """`named` are the nodes of the file, of a model that is profiled."""
        self.compiled = compiled
        self.profiled = named is not None
        self.covers = {} if named is None else _covers(compiled.get_runtime_model(), named)
        self.precisions = {} if named is None else _precisions(compiled.get_runtime_model())
        self.request = compiled.create_infer_request()
        self.infer = self.request.infer
        self.runs = 0
        self.laps: list[tuple[int, dict[str, float]]] = []  # [(runs so far, {node: total microseconds so far})]


def version() -> str:
    return str(ov.get_version())


def use_cache(folder: str) -> None:
    """Keep what is compiled in `folder`, and load it from there: of the same content, version, CPU and configuration.

    A core-wide property, which no option of a device sets: what lies in the folder is run without a hash of ours.
    """
    _core.set_property({"CACHE_DIR": folder})


def load(path: str, options: dict[str, Any]) -> Handle:
    """`path` names the .xml file; its .bin lies beside it."""
    device, precision = options.get("device", "CPU"), options["precision"]
    known = _core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if precision in CAPABILITIES and CAPABILITIES[precision] not in known:
        raise ValueError("this %s does not compute in %s; it tells %s" % (device, precision, ", ".join(known)))
    config = {
        # OpenVINO computes in bf16 by itself where the CPU can: fp32 has to be asked for
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": str(options["threads"]),
        "NUM_STREAMS": str(options["streams"]),
        "PERFORMANCE_HINT": HINTS[options["hint"]],
        "PERF_COUNT": "YES" if options.get("profile") else "NO",
    }
    if device != "CPU":  # GPU and NPU know no threads of their own
        settable = {str(name) for name in _core.get_property(device, "SUPPORTED_PROPERTIES")}
        config = {name: value for name, value in config.items() if name in settable}
    model = _core.read_model(path)
    named = {node.get_friendly_name() for node in model.get_ordered_ops()} if options.get("profile") else None
    return Handle(_core.compile_model(model, device, config), named)


def _precisions(runtime_model: Any) -> dict[str, str]:
    """Executed node to the precision that it computes in."""
    found = {}
    for node in runtime_model.get_ordered_ops():
        info = node.rt_info
        if "runtimePrecision" in info:
            told = str(info["runtimePrecision"].value)
            found[node.get_friendly_name()] = TOLD.get(told, told)
    return found


def _covers(runtime_model: Any, named: set[str]) -> dict[str, list[str]]:
    """Executed node to the nodes of the file that went into it.

    Those that OpenVINO made anew (a layer norm becomes three) and that give their result to one node only work for it.
    """
    covers: dict[str, list[str]] = {}
    for node in reversed(runtime_model.get_ordered_ops()):
        info = node.rt_info
        originals = str(info["originalLayersNames"].value).split(",") if "originalLayersNames" in info else []
        found = [name for name in originals if name in named]
        if not found:
            readers = {
                port.get_node().get_friendly_name() for out in node.outputs() for port in out.get_target_inputs()
            }
            found = covers.get(readers.pop(), []) if len(readers) == 1 else []
        covers[node.get_friendly_name()] = found
    return covers


def inputs(handle: Handle) -> list[dict[str, Any]]:
    return [_spec(port) for port in handle.compiled.inputs]


def outputs(handle: Handle) -> list[dict[str, Any]]:
    return [_spec(port) for port in handle.compiled.outputs]


def fill(handle: Handle, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for tensor in handle.request.input_tensors:
        if np.issubdtype(tensor.data.dtype, np.floating):
            tensor.data[...] = generator.standard_normal(tensor.data.shape, dtype=np.float32)
        elif tensor.data.dtype.name in ("int8", "uint8"):
            limits = np.iinfo(tensor.data.dtype)
            tensor.data[...] = generator.integers(limits.min, limits.max + 1, tensor.data.shape)
        else:
            tensor.data[...] = generator.integers(0, 2, tensor.data.shape)


def set_input(handle: Handle, index: int, data: bytes) -> None:
    array = handle.request.input_tensors[index].data
    array[...] = np.frombuffer(data, dtype=array.dtype).reshape(array.shape)


def get_output(handle: Handle, index: int) -> bytes:
    return np.ascontiguousarray(handle.request.output_tensors[index].data).tobytes()


def run(handle: Handle) -> None:
    handle.runs += 1
    handle.infer(share_outputs=True)


def lap(handle: Handle, first: bool) -> None:
    if first:
        handle.laps = []
    if handle.profiled:
        handle.laps.append((handle.runs, {name: us * handle.runs for (name, _), us in _averages(handle).items()}))


def node_times(handle: Handle) -> dict[str, Any] | None:
    """Time of each node over the laps of the last measurement.

    OpenVINO counts averages over all runs of a model, in whole microseconds. The cold first runs, many times as long,
    are taken out again. Differences of laps are robust against a disturbance but coarse, by a few microseconds: a long
    node gets the median of its laps; a short one the average over all of them, unless that is far above the median of
    quarters. Half a microsecond is the least. A model whose nodes all work in place (a concatenation) has none.
    """
    if not handle.profiled:
        return None
    if not handle.laps:
        handle.laps = [(0, {})]
    if len(handle.laps) < 2:
        lap(handle, False)
    nodes = []
    for name, kind in _averages(handle):
        time_us = _typical([(runs, total.get(name, 0.0)) for runs, total in handle.laps])
        nodes.append(
            {
                "name": name,
                "type": kind,
                "time_us": max(time_us, 0.5),
                "compute": kind not in NOT_COMPUTE and name != MADE,
                "covers": handle.covers.get(name, []),
                "precision": handle.precisions.get(name),
            }
        )
    return {"nodes": nodes, "total_us": None}


def _typical(laps: list[tuple[int, float]]) -> float:
    average = _difference(laps[0], laps[-1])
    if average < LONG_US:
        laps = [laps[len(laps) * part // 4] for part in range(4)] + laps[-1:]
    robust = float(np.median([_difference(before, after) for before, after in zip(laps, laps[1:]) if after != before]))
    return robust if average >= LONG_US or average > 1.03 * robust + COARSE_US else average


def _difference(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / max(after[0] - before[0], 1)


def _averages(handle: Handle) -> dict[tuple[str, str], float]:
    """Half a microsecond is added to what was cut. Below one a node says NOT_RUN.

    What is fused or works in place has no kernel and takes no time; a transposition has none either, and does.
    """
    return {
        (info.node_name, info.node_type): info.real_time.total_seconds() * 1e6 + 0.5
        for info in handle.request.get_profiling_info()
        if info.real_time.total_seconds() > 0 or not info.exec_type.startswith(("undef", "unknown"))
    }


def unload(handle: Handle) -> None:
    handle.infer = handle.request = handle.compiled = None


def _spec(port: Any) -> dict[str, Any]:
    return {
        "name": port.get_any_name() if port.get_names() else port.get_node().get_friendly_name(),
        "dtype": np.dtype(port.get_element_type().to_dtype()).name,
        "shape": list(port.get_shape()),
    }
