"""Device half for OpenVINO: standard library, openvino and the numpy that it brings; Python 3.8 or later."""

import numpy as np
import openvino as ov

NAME = "openvino"
NOT_COMPUTE = {"Parameter", "Input", "Result", "Output", "Const", "Constant", "Reorder", "Convert"}
HINTS = {"latency": "LATENCY", "throughput": "THROUGHPUT"}
LONG_US = 200.0
PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}

_core = ov.Core()


class Handle:
    def __init__(self, compiled, profiled):
        self.compiled = compiled
        self.profiled = profiled
        self.request = compiled.create_infer_request()
        self.infer = self.request.infer
        self.runs = 0
        self.laps = []  # [(runs so far, {node: total microseconds so far})]


def version():
    return ov.get_version()


def load(path, options):
    """`path` names the .xml file; its .bin lies beside it."""
    config = {
        # OpenVINO computes in bf16 by itself where the CPU can: fp32 has to be asked for
        "INFERENCE_PRECISION_HINT": PRECISIONS[options["precision"]],
        "INFERENCE_NUM_THREADS": str(options["threads"]),
        "NUM_STREAMS": str(options["streams"]),
        "PERFORMANCE_HINT": HINTS[options["hint"]],
        "PERF_COUNT": "YES" if options.get("profile") else "NO",
    }
    return Handle(_core.compile_model(path, options.get("device", "CPU"), config), bool(options.get("profile")))


def inputs(handle):
    return [_spec(port) for port in handle.compiled.inputs]


def outputs(handle):
    return [_spec(port) for port in handle.compiled.outputs]


def fill(handle, seed):
    generator = np.random.default_rng(seed)
    for tensor in handle.request.input_tensors:
        if np.issubdtype(tensor.data.dtype, np.floating):
            tensor.data[...] = generator.standard_normal(tensor.data.shape, dtype=np.float32)
        else:
            tensor.data[...] = generator.integers(0, 2, tensor.data.shape)


def set_input(handle, index, data):
    array = handle.request.input_tensors[index].data
    array[...] = np.frombuffer(data, dtype=array.dtype).reshape(array.shape)


def get_output(handle, index):
    return np.ascontiguousarray(handle.request.output_tensors[index].data).tobytes()


def run(handle):
    handle.runs += 1
    handle.infer(share_outputs=True)


def lap(handle, first):
    if first:
        handle.laps = []
    if handle.profiled:
        handle.laps.append((handle.runs, {name: us * handle.runs for (name, _), us in _averages(handle).items()}))


def node_times(handle):
    """Time of each node over the laps of the last measurement.

    OpenVINO counts averages over all runs of a model, in whole microseconds. The cold first runs, many times as long,
    are taken out again. The difference of two laps is robust against a disturbance but coarse, by a few microseconds:
    a long node gets the median of its laps, a short one the average over all of them.
    """
    if not handle.profiled:
        return None
    if not handle.laps:
        handle.laps = [(0, {})]
    if len(handle.laps) < 2:
        lap(handle, False)
    nodes = []
    for name, kind in _averages(handle):
        laps = [(runs, total.get(name, 0.0)) for runs, total in handle.laps]
        time_us = _difference(laps[0], laps[-1])
        if time_us >= LONG_US:
            time_us = float(np.median([_difference(before, after) for before, after in zip(laps, laps[1:])]))
        compute = kind not in NOT_COMPUTE
        nodes.append({"name": name, "type": kind, "time_us": max(time_us, 0.0), "compute": compute})
    return {"nodes": nodes, "total_us": None}


def _difference(before, after):
    return (after[1] - before[1]) / max(after[0] - before[0], 1)


def _averages(handle):
    """Half a microsecond is added to what was cut."""
    executed = ov.ProfilingInfo.Status.EXECUTED
    return {
        (info.node_name, info.node_type): info.real_time.total_seconds() * 1e6 + 0.5
        for info in handle.request.get_profiling_info()
        if info.status == executed
    }


def unload(handle):
    handle.infer = handle.request = handle.compiled = None


def _spec(port):
    return {
        "name": port.get_any_name() if port.get_names() else port.get_node().get_friendly_name(),
        "dtype": np.dtype(port.get_element_type().to_dtype()).name,
        "shape": list(port.get_shape()),
    }
