"""Device half for TensorRT's Python module: standard library, tensorrt (or tensorrt_rtx) and the NVIDIA driver.

Python 3.8 or later. A run is what a caller waits for: inputs to the GPU, inference, outputs back. The driver is called
through ctypes: it is there wherever a GPU is, and no package has to match its version.

Option: `device_index` (0).
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import re
import struct
from typing import Any

try:
    import tensorrt as trt
except ImportError:
    import tensorrt_rtx as trt

NAME = "tensorrt_python"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "UINT8": "uint8"}
DTYPES["BOOL"] = "bool"
FORMATS = {"float32": "f", "float16": "e", "int32": "i", "int64": "q", "int8": "b", "uint8": "B", "bool": "?"}
NOT_COMPUTE = ("Reformat", "NoOp", "Constant")
PRECISIONS = ("fp32", "fp16", "int8")
TYPES = {"int8": "int8", "half": "fp16", "fp16": "fp16", "float": "fp32", "fp32": "fp32"}
"""Words of a tensor's `Format/Datatype` that name its type."""
PROFILED_RUNS = 50


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what TensorRT says: errors for messages, the rest for which tactics it picked."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(text)
        self.lines = [*self.lines[-5000:], text]


class Layers(trt.IProfiler):  # type: ignore[misc]
    """Milliseconds of each layer, run by run."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.times_ms: dict[str, list[float]] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.times_ms.setdefault(layer_name, []).append(ms)


class Driver:
    """The few functions of the CUDA driver that are needed; each raises with the driver's own words."""

    def __init__(self, library: Any, device_index: int) -> None:
        self.library = library
        self("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuDeviceGet", ctypes.byref(device), device_index)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the one that TensorRT uses
        self("cuCtxSetCurrent", context)
        self.device = device

    def __call__(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            words = text.value.decode() if text.value else "unknown error"
            raise RuntimeError("%s failed: %s (CUDA error %d)" % (function, words, code))

    def made(self, function: str, *arguments: Any) -> Any:
        """What a function writes through its first argument: an address or a handle."""
        value = ctypes.c_void_p()
        self(function, ctypes.byref(value), *arguments)
        return value


_driver: dict[int, Driver] = {}


def driver(device_index: int = 0) -> Driver:
    if device_index not in _driver:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError("no NVIDIA driver: %s" % error) from None
        _driver[device_index] = Driver(library, device_index)
    return _driver[device_index]


class Tensor:
    """One input or output: pinned memory here, memory on the GPU."""

    def __init__(self, cuda: Any, name: str, dtype: str, shape: list[int], is_input: bool) -> None:
        self.name, self.dtype, self.shape, self.is_input = name, dtype, shape, is_input
        self.num_bytes = math.prod(shape) * struct.calcsize(FORMATS[dtype])
        self.host = cuda.made("cuMemHostAlloc", ctypes.c_size_t(max(self.num_bytes, 1)), 0)
        self.device = cuda.made("cuMemAlloc_v2", ctypes.c_size_t(max(self.num_bytes, 1)))

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": self.shape}


class Handle:
    """An engine with its context, stream and tensors."""

    def __init__(self, cuda: Any, engine: Any, log: Any, onnx_names: list[str], options: dict[str, Any]) -> None:
        self.cuda, self.engine, self.log, self.onnx_names, self.options = cuda, engine, log, onnx_names, options
        self.context = new_context(engine)
        self.stream = cuda.made("cuStreamCreate", 0)
        self.tensors = [Tensor(cuda, *described) for described in tensors_of(engine)]
        bind(self.context, self.tensors)
        self.execute = self.context.execute_async_v3


def version() -> str:
    edition = "rtx " if trt.__name__ == "tensorrt_rtx" else ""
    return edition + str(trt.__version__)


def facts() -> dict[str, str]:
    cuda = driver()
    name, major, minor, driver_version = ctypes.create_string_buffer(128), *(ctypes.c_int() for _ in range(3))
    cuda("cuDeviceGetName", name, 128, cuda.device)
    cuda("cuDeviceGetAttribute", ctypes.byref(major), 75, cuda.device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda("cuDeviceGetAttribute", ctypes.byref(minor), 76, cuda.device)
    cuda("cuDriverGetVersion", ctypes.byref(driver_version))
    capability = "%d.%d" % (major.value, minor.value)
    return {"gpu": name.value.decode(), "compute_capability": capability, "cuda": str(driver_version.value)}


def load(path: str, options: dict[str, Any]) -> Handle:
    """Build the engine of an ONNX file: engines load only where they were built."""
    with open(path, "rb") as file:
        data = file.read()
    log = Log()
    plan, names = serialized(data, options["precision"], log)
    cuda = driver(int(options.get("device_index", 0)))
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError("the engine can't be loaded: %s" % said(log))
    return Handle(cuda, engine, log, names, options)


def serialized(data: bytes, precision: str, log: Any, capability: str | None = None) -> tuple[Any, list[str]]:
    """The engine of an ONNX model as bytes, and the names of its nodes.

    Precision lives in the ONNX: strongly typed from 10.x on; 8.x takes half-precision or int8 tensors with a flag.
    `capability` (`SM86`, TensorRT for RTX alone) builds for a GPU that need not be here.
    """
    if precision not in PRECISIONS:
        raise ValueError("precision %s is not supported; %s are" % (precision, ", ".join(PRECISIONS)))
    builder = trt.Builder(log)
    kinds = trt.NetworkDefinitionCreationFlag.__members__
    kind = kinds.get("STRONGLY_TYPED", kinds.get("EXPLICIT_BATCH"))
    network = builder.create_network(1 << int(kind) if kind is not None else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(data) or not network.num_outputs:  # some bytes that are no ONNX count as an empty one
        raise ValueError("TensorRT can't read the ONNX: %s" % said(log))
    names = [network.get_layer(index).name for index in range(network.num_layers)]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if "STRONGLY_TYPED" not in kinds and precision != "fp32":
        config.set_flag(trt.BuilderFlag.__members__["FP16"])  # around integers too
        if precision == "int8":
            config.set_flag(trt.BuilderFlag.__members__["INT8"])
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[capability], 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT can't build the engine: %s" % said(log))
    return plan, names


def said(log: Any) -> str:
    words = "; ".join(dict.fromkeys(log.errors[:3])) or "it gave no reason"
    lower = words.lower()
    return ("out of memory: " if "outofmemory" in lower or "out of memory" in lower else "") + words


def new_context(engine: Any) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise RuntimeError("the engine gives no execution context; the GPU may be out of memory")
    return context


def tensors_of(engine: Any) -> list[tuple[str, str, list[int], bool]]:
    """(name, dtype, shape, whether it goes in) of each."""
    described = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise ValueError("tensor %s is %s, which is not supported" % (name, kind))
        goes_in = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        described.append((name, DTYPES[kind], list(engine.get_tensor_shape(name)), goes_in))
    return described


def bind(context: Any, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not context.set_tensor_address(tensor.name, tensor.device.value):
            raise RuntimeError("TensorRT takes no address for tensor %s" % tensor.name)


def inputs(handle: Handle) -> list[dict[str, Any]]:
    return [tensor.spec() for tensor in handle.tensors if tensor.is_input]


def outputs(handle: Handle) -> list[dict[str, Any]]:
    return [tensor.spec() for tensor in handle.tensors if not tensor.is_input]


def notes(handle: Handle) -> dict[str, Any]:
    layers = sparse_layers("\n".join(handle.log.lines))
    return {"sparse": None if layers is None else bool(layers), "sparse_layers": layers}


def fill(handle: Handle, seed: int) -> None:
    """Random values between -1 and 1, all of int8's, 0 or 1 for other integers."""
    generator = random.Random(seed)
    for index, spec in enumerate(inputs(handle)):
        count, kind = math.prod(spec["shape"]), FORMATS[spec["dtype"]]
        few = [_drawn(generator, kind) for _ in range(min(count, 4096))]
        set_input(handle, index, struct.pack("<%d%s" % (count, kind), *(few * (count // len(few) + 1))[:count]))


def _drawn(generator: random.Random, kind: str) -> float:
    if kind in "fe":
        return generator.uniform(-1, 1)
    return generator.randint(*((-128, 127) if kind == "b" else (0, 1)))


def set_input(handle: Handle, index: int, data: bytes) -> None:
    tensor = [tensor for tensor in handle.tensors if tensor.is_input][index]
    if len(data) != tensor.num_bytes:
        raise ValueError("input %s takes %d bytes, %d were given" % (tensor.name, tensor.num_bytes, len(data)))
    ctypes.memmove(tensor.host, data, len(data))


def get_output(handle: Handle, index: int) -> bytes:
    tensor = [tensor for tensor in handle.tensors if not tensor.is_input][index]
    return ctypes.string_at(tensor.host, tensor.num_bytes)


def run(handle: Handle) -> None:
    cuda, stream = handle.cuda, handle.stream
    for tensor in handle.tensors:
        if tensor.is_input:
            cuda("cuMemcpyHtoDAsync_v2", tensor.device, tensor.host, ctypes.c_size_t(tensor.num_bytes), stream)
    if not handle.execute(stream.value):
        raise RuntimeError("inference failed: %s" % said(handle.log))
    for tensor in handle.tensors:
        if not tensor.is_input:
            cuda("cuMemcpyDtoHAsync_v2", tensor.host, tensor.device, ctypes.c_size_t(tensor.num_bytes), stream)
    cuda("cuStreamSynchronize", stream)


def node_times(handle: Handle) -> dict[str, Any] | None:
    """Medians over runs of a second, profiled context; compute time between two events, unprofiled."""
    if not handle.options.get("profile"):
        return None
    device_us = 1e3 * middle([_compute_ms(handle) for _ in range(PROFILED_RUNS)])
    layers, context = Layers(), new_context(handle.engine)
    context.profiler = layers
    bind(context, handle.tensors)
    for _ in range(PROFILED_RUNS):
        if not context.execute_async_v3(handle.stream.value):
            raise RuntimeError("the profiled inference failed: %s" % said(handle.log))
        handle.cuda("cuStreamSynchronize", handle.stream)
    told = told_of_layers(handle.engine)
    nodes = [
        node_of(name, middle(times[2:] or times), told.get(name, {}), handle.onnx_names)
        for name, times in layers.times_ms.items()
    ]
    return {"nodes": nodes, "total_us": None, "device_us": device_us}


def _compute_ms(handle: Handle) -> float:
    cuda, elapsed = handle.cuda, ctypes.c_float()
    begun, ended = cuda.made("cuEventCreate", 0), cuda.made("cuEventCreate", 0)
    cuda("cuEventRecord", begun, handle.stream)
    handle.execute(handle.stream.value)
    cuda("cuEventRecord", ended, handle.stream)
    cuda("cuEventSynchronize", ended)
    cuda("cuEventElapsedTime", ctypes.byref(elapsed), begun, ended)
    for event in (begun, ended):
        cuda("cuEventDestroy_v2", event)
    return elapsed.value


def told_of_layers(engine: Any) -> dict[str, dict[str, Any]]:
    """Type and metadata of each layer by name; nothing where the inspector tells names alone."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return {layer["Name"]: layer for layer in json.loads(text)["Layers"] if isinstance(layer, dict)}
    except (KeyError, TypeError, ValueError):
        return {}


def node_of(name: str, time_ms: float, told: dict[str, Any], onnx_names: list[str]) -> dict[str, Any]:
    kind = str(told.get("LayerType", "Reformat" if name.startswith("Reformatting CopyNode") else ""))
    parts = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(told.get("Metadata", "")))
    parts = parts or [part.strip() for part in re.split(r" \+ | \|\| |[(),\[\]{}]+ ?", name)]
    covers = [part for part in dict.fromkeys(parts) if part in set(onnx_names)]
    node = {"name": name, "type": kind, "time_us": time_ms * 1e3, "compute": kind not in NOT_COMPUTE, "covers": covers}
    return dict(node, precision=precision_of(told))


def precision_of(layer: dict[str, Any]) -> str | None:
    """Of a layer: the type of its first input, as `Format/Datatype` says it (`Thirty-two wide ... Int8 format`)."""
    try:
        words = re.findall(r"[a-z0-9]+", str(layer["Inputs"][0]["Format/Datatype"]).lower())
    except (KeyError, IndexError, TypeError):
        return None  # the inspector told names alone
    return next((TYPES[word] for word in words if word in TYPES), None)


def sparse_layers(log: str) -> list[str] | None:
    """Layers that run a sparse implementation, as TensorRT says when it builds: in the words of 8.x, or of 10.x."""
    found = re.search(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)", log)
    found = found or re.search(r"\(Sparsity\) Chose \d+ layer\(s\) using sparse tactics:?(.*)", log)
    if found is None:
        return None
    names = [name.strip() for name in found.group(1).split(", ") if name.strip()]
    chosen = re.search(r"\(Sparsity\) Chose (\d+) layer", found.group(0))
    return names or ["?"] * int(chosen.group(1) if chosen else 0)


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def unload(handle: Handle) -> None:
    for tensor in handle.tensors:
        handle.cuda("cuMemFreeHost", tensor.host)
        handle.cuda("cuMemFree_v2", tensor.device)
    handle.cuda("cuStreamDestroy_v2", handle.stream)
    handle.execute = handle.context = handle.engine = None
