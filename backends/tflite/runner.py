"""Device half for LiteRT: standard library, ai_edge_litert (or tflite_runtime) and numpy; Python 3.8 or later.

Options: `threads`; `xnnpack` (true unless told), false for LiteRT's own kernels.

LiteRT's Python interface tells no times of operators. The C interface in the same wheel does (`LiteRtProfiler`, with
the operators of XNNPACK inside); it is not stable yet, so only versions that were looked at are asked.
"""
# ruff: noqa: B905

from __future__ import annotations

import ctypes
import functools
import os
import time
from typing import Any

import numpy as np

NAME = "tflite"
PROFILED_VERSIONS = ("2.3.",)
PROFILED_RUNS = 24
PROFILED_US = 50e3
OPERATOR_EVENTS = (2, 8)  # of LiteRT itself, of a delegate; others tell of the run as a whole
PROFILE = ("runtime_options_string", b"enable_profiling = true\n")
CPU, WRITE = 1, 1
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
CONTRACTIONS = (*WEIGHTED, "BATCH_MATMUL")
WEIGHTED_TAGS = ("Convolution", "Fully Connected", *WEIGHTED)  # of XNNPACK, and of LiteRT's own kernels
PRECISIONS = {"float32": "fp32", "int8": "int8"}

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
        self.path = path
        self.options = options
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
    """A runtime that lacks an operator in the version of the file names both; what this one is, is said here."""
    if options["precision"] not in PRECISIONS.values():
        supported = " and ".join(PRECISIONS.values())
        raise ValueError("precision %s is not supported; %s are" % (options["precision"], supported))
    if not os.path.isfile(path):
        raise ValueError("no such file: %s" % path)
    try:
        return Handle(path, options)
    except (RuntimeError, ValueError) as fault:
        said = str(fault).strip().split("\n")[0]
        if not said.startswith("Didn't find op"):
            raise
        raise ValueError("%s %s is too old for this file: %s" % (_runtime.__name__, version(), said)) from None


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
        elif dtype == np.int8:
            values = generator.integers(-128, 128, shape)
        else:
            values = generator.integers(0, 2, shape)
        handle.interpreter.set_tensor(details["index"], values.astype(dtype))


def set_input(handle: Handle, index: int, data: bytes) -> None:
    details = handle.inputs[index]
    array = np.frombuffer(data, dtype=details["dtype"]).reshape(details["shape"])
    handle.interpreter.set_tensor(details["index"], array)


def get_output(handle: Handle, index: int) -> bytes:
    return bytes(handle.interpreter.get_tensor(handle.outputs[index]["index"]).tobytes())


def notes(handle: Handle) -> dict[str, Any]:
    """`ran_in`, the share of the operators in each precision: one computes in the type of its tensors, or the file
    doesn't load. `contractions`, how many convolutions, linears and products of each: `int8`, `fp32`, or `int8 weights`
    where floats come in and go out (they are made integers inside)."""
    found, contractions = [], []
    for operator in handle.interpreter._get_ops_details():
        if operator["op_name"] == "DELEGATE":
            continue
        found += [_precision(handle, tensor) for tensor in operator["outputs"][:1]]
        if operator["op_name"] in CONTRACTIONS:
            data, weight = (_precision(handle, tensor) for tensor in operator["inputs"][:2])
            contractions.append("int8 weights" if (data, weight) == ("fp32", "int8") else data)
    told = [precision for precision in found if precision]
    if not told:
        return {}
    answer = {"ran_in": {name: told.count(name) / len(told) for name in sorted(set(told))}}
    known = [name for name in contractions if name]
    if known:
        answer["contractions"] = {name: known.count(name) for name in sorted(set(known))}
    return answer


def _precision(handle: Handle, tensor: Any) -> str | None:
    return PRECISIONS.get(np.dtype(handle.interpreter._get_tensor_details(int(tensor), 0)["dtype"]).name)


def run(handle: Handle) -> None:
    handle.invoke()


def node_times(handle: Handle) -> dict[str, Any] | None:
    """Times of a second instance of the model, which profiles; convolutions and linears by the name of their weight.

    XNNPACK keeps the order of the file's operators, and makes one of its own of each that has a weight; LiteRT's own
    kernels, which a sparse weight is left to, are called like the operators. None where
    that is not so, for a version whose C interface isn't known, and for a kernel alone: it takes as long as the whole,
    which is known finer than to a microsecond.
    """
    known = str(_runtime.__version__).startswith(PROFILED_VERSIONS) and _runtime.__name__ == "ai_edge_litert"
    weights = _weights(handle.interpreter) if known else []
    if not handle.options.get("profile") or not handle.options.get("xnnpack", True) or len(weights) < 2:
        return None
    runs = _profile(handle.path, handle.options["threads"])
    tags = [tag for tag, _ in runs[0]]
    named = dict(zip((i for i, tag in enumerate(tags) if tag.startswith(WEIGHTED_TAGS)), weights))
    if len(named) != len(weights) or sum(tag.startswith(WEIGHTED_TAGS) for tag in tags) != len(weights):
        return None
    times = np.sort([[us for _, us in run] for run in runs[2:]], axis=0)  # the first runs are cold
    typical = times[: -(-3 * len(times) // 4)].mean(axis=0) + 0.5  # times are cut to whole microseconds
    nodes = [
        {"name": named.get(i, "%d/%s" % (i, tag)), "type": tag, "time_us": float(us), "compute": True}
        for i, (tag, us) in enumerate(zip(tags, typical))
    ]
    return {"nodes": nodes, "total_us": None}


def _weights(interpreter: Any) -> list[str]:
    """Names of the weights of convolutions and linears, in the order of the file."""
    operators = interpreter._get_ops_details()
    found = [operator["inputs"][1] for operator in operators if operator["op_name"] in WEIGHTED]
    return [str(interpreter._get_tensor_details(int(tensor), 0)["name"]) for tensor in found]


class _Layout(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_uint32), ("sizes", ctypes.c_int32 * 8), ("strides", ctypes.c_uint32 * 8)]


class _Type(ctypes.Structure):
    _fields_ = [("element", ctypes.c_int), ("layout", _Layout)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", ctypes.c_uint64 * 6),
        ("metadata", ctypes.c_uint64 * 2),
        ("source", ctypes.c_int),
    ]


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_keep = _DELETER(lambda address: None)  # the texts of options are Python's own


@functools.lru_cache(None)
def _library() -> Any:
    return ctypes.CDLL(os.path.join(os.path.dirname(_runtime.__file__), "libLiteRt.so"))


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError("%s answered %d" % (name, status))


def _made(name: str, *arguments: Any, kind: Any = ctypes.c_void_p) -> Any:
    """What a function of the C interface puts into its last argument."""
    made = kind()
    _call(name, *arguments, ctypes.byref(made))
    return made


@functools.lru_cache(None)
def _environment() -> Any:
    return _made("LiteRtCreateEnvironment", 0, None)


def _profile(path: str, threads: int) -> list[list[tuple[str, int]]]:
    """Operators with their times in microseconds, in the order in which they ran, for each of a few runs."""
    environment, options = _environment(), _made("LiteRtCreateOptions")
    _call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
    for name, text in (PROFILE, ("xnnpack", b"num_threads = %d\n" % threads)):
        opaque = _made("LiteRtCreateOpaqueOptions", name.encode(), ctypes.c_char_p(text), _keep)
        _call("LiteRtAddOpaqueOptions", options, opaque)
    model = _made("LiteRtCreateModelFromFile", environment, path.encode())
    compiled = _made("LiteRtCreateCompiledModel", environment, model, options)
    buffers = [_buffers(environment, model, compiled, kind) for kind in ("Input", "Output")]
    profiler = _made("LiteRtCompiledModelGetProfiler", compiled)
    runs: list[list[tuple[str, int]]] = []
    begun = time.perf_counter()
    while len(runs) < 6 or (len(runs) < PROFILED_RUNS and (time.perf_counter() - begun) * 1e6 < PROFILED_US):
        _call("LiteRtResetProfiler", profiler)
        _call("LiteRtStartProfiler", profiler)
        sizes = [(ctypes.c_size_t(len(array)), array) for array in buffers]
        _call("LiteRtRunCompiledModel", compiled, ctypes.c_size_t(0), *sizes[0], *sizes[1])
        _call("LiteRtStopProfiler", profiler)
        count = _made("LiteRtGetNumProfilerEvents", profiler, kind=ctypes.c_int).value
        events = (_Event * count)()
        _call("LiteRtGetProfilerEvents", profiler, count, events)
        runs.append([(e.tag.decode(), e.elapsed_us) for e in events if e.kind in OPERATOR_EVENTS])
    for array in buffers:
        for buffer in array:
            _library().LiteRtDestroyTensorBuffer(ctypes.c_void_p(buffer))
    for name, thing in (("CompiledModel", compiled), ("Model", model), ("Options", options)):
        getattr(_library(), "LiteRtDestroy" + name)(thing)
    return runs


def _buffers(environment: Any, model: Any, compiled: Any, kind: str) -> Any:
    """Memory for the inputs, with ordinary random values, or for the outputs."""
    first = ctypes.c_size_t(0)
    signature = _made("LiteRtGetModelSignature", model, first)
    count = _made("LiteRtGetNumSignature%ss" % kind, signature, kind=ctypes.c_size_t).value
    array = (ctypes.c_void_p * count)()
    for number in range(count):
        index = ctypes.c_size_t(number)
        tensor = _made("LiteRtGetSignature%sTensorByIndex" % kind, signature, index)
        described = _made("LiteRtGetRankedTensorType", tensor, kind=_Type)
        needs = _made("LiteRtGetCompiledModel%sBufferRequirements" % kind, compiled, first, index)
        buffer = _made("LiteRtCreateManagedTensorBufferFromRequirements", environment, ctypes.byref(described), needs)
        size = _made("LiteRtGetTensorBufferPackedSize", buffer, kind=ctypes.c_size_t).value
        address = ctypes.c_void_p()
        _call("LiteRtLockTensorBuffer", buffer, ctypes.byref(address), WRITE)
        values = np.zeros(size, np.uint8)
        if described.element == 1:  # float32
            values = np.random.default_rng(number).standard_normal(size // 4, dtype=np.float32)
        ctypes.memmove(address, values.ctypes.data, size)
        _call("LiteRtUnlockTensorBuffer", buffer)
        array[number] = buffer
    return array


def unload(handle: Handle) -> None:
    handle.invoke = handle.interpreter = None


def _spec(details: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": details["name"],
        "dtype": np.dtype(details["dtype"]).name,
        "shape": [int(size) for size in details["shape"]],
    }
