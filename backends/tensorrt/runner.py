"""Device half for TensorRT through `trtexec`: standard library only, Python 3.8 or later; its parts are beside it.

A burst is a `trtexec` process of its own and timed from inside: the time of a run is trtexec's *Latency*, H2D + GPU
compute + D2H. What differs between 8.5, 8.6, 10.x and 11.x is read off `trtexec --help`.

Options: `cuda_graph` (true), `warmup_ms` (200, of every burst), `burst_ms` (300, at least this much of timed runs),
`verbose` (false: sparse tactics of 10.x are told only then), `build_timeout_s` (1800), `run_timeout_s` (120).
"""

# ruff: noqa: B905

from __future__ import annotations

import math
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import time
from typing import Any

from edgeprune.backends.tensorrt.runner_onnx import read_onnx
from edgeprune.backends.tensorrt.runner_output import (
    failure,
    last_words,
    layers_by_name,
    parse_profile,
    parse_times,
    parse_version,
    read_json,
    sparse_layers,
)

NAME = "tensorrt"
OLDEST = (8, 5, 0)
PLACES = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
FORMATS = {"float32": "f", "float16": "e", "float64": "d", "int32": "i", "int64": "q", "int8": "b", "uint8": "B"}
FORMATS["bool"] = "?"
PRECISIONS = ("fp32", "fp16", "int8")
WEAKLY_TYPED = {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8", "--fp16"]}
"""What 8.x takes tensors of other types with; around integers a network is half precision."""
MOST_RUNS = 1000


class Trtexec:
    """One `trtexec`: where it is, its version (major, minor, patch) and the flags that its help names."""

    def __init__(self, path: str, version: tuple[int, ...], flags: frozenset[str]) -> None:
        self.path, self.version, self.flags = path, version, flags

    def one_of(self, *flags: str) -> list[str]:
        """The first of the flags (with or without `=value`) that this version knows, or none."""
        return [flag for flag in flags if flag.partition("=")[0] in self.flags][:1]


class Handle:
    """One engine, in a folder of its own."""

    def __init__(self, folder: str, options: dict[str, Any], model: dict[str, Any]) -> None:
        self.folder, self.options, self.model = folder, options, model
        self.engine = os.path.join(folder, "model.engine")
        self.layers = os.path.join(folder, "layers.json")
        self.sparse: list[str] | None = None  # layers with a sparse implementation; None: trtexec didn't tell
        self.given: dict[int, str] = {}  # index of an input to the file with its values
        self.typical_ms = 0.0
        self.compute_ms: list[float] = []  # of the timed runs so far
        self.outputs: dict[str, list[float]] = {}


def alive() -> None:
    """Replaced by the program: keeps whoever waits from giving up while an engine is built."""


def find_trtexec() -> str | None:
    """`$TRTEXEC`, else the one on the PATH, else where JetPack and the archives put it."""
    named = os.environ.get("TRTEXEC")
    candidates = [named] if named else [shutil.which("trtexec"), *PLACES]
    return next((path for path in candidates if path and os.access(path, os.X_OK) and os.path.isfile(path)), None)


_found: dict[str, Trtexec] = {}


def trtexec() -> Trtexec:
    """`RuntimeError` where there is none, or none whose flags are known."""
    path = find_trtexec()
    if path is None:
        raise RuntimeError("no trtexec: not $TRTEXEC, not on the PATH, not %s" % ", ".join(PLACES))
    if path not in _found:
        try:
            done = subprocess.run(
                [path, "--help"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise RuntimeError("%s --help: %s" % (path, error)) from None
        text = done.stdout.decode(errors="replace")
        number = parse_version(text)
        flags = frozenset(re.findall(r"--[A-Za-z]\w*", text))
        if number is None or "--loadEngine" not in flags:
            raise RuntimeError("%s --help tells no version of TensorRT or no flags: %s" % (path, last_words(text)))
        if number < OLDEST:
            raise RuntimeError("%s is TensorRT %s; 8.5 is the oldest supported" % (path, ".".join(map(str, number))))
        _found[path] = Trtexec(path, number, flags)
    return _found[path]


def version() -> str:
    return ".".join(map(str, trtexec().version))


def facts() -> dict[str, str]:
    """GPU and driver where there is `nvidia-smi`; what board it is and its power mode the program itself tells."""
    names = ("gpu", "compute_capability", "driver", "clocks_max_graphics")
    query = "--query-gpu=name,compute_cap,driver_version,clocks.max.graphics"
    answer = _first_line(_ask("nvidia-smi", query, "--format=csv,noheader"))
    told = dict(zip(names, (part.strip() for part in answer.split(","))))
    return {name: text for name, text in told.items() if text and not re.search("not supported|n/a", text.lower())}


def load(path: str, options: dict[str, Any]) -> Handle:
    """Build the engine of an ONNX file: engines load only where they were built."""
    program = trtexec()
    model = read_onnx(path)
    handle = Handle(tempfile.mkdtemp(prefix="engine-", dir=os.getcwd()), options, model)
    try:
        log = _run(build_arguments(program, handle, path), "building the engine", options.get("build_timeout_s", 1800))
        if not os.path.isfile(handle.engine) or not os.path.getsize(handle.engine):
            raise RuntimeError("trtexec says that it passed, but wrote no engine")
        handle.sparse = sparse_layers(log)
    except BaseException:
        unload(handle)
        raise
    return handle


def build_arguments(program: Trtexec, handle: Handle, path: str) -> list[str]:
    """Precision lives in the ONNX: strongly typed from 10.x on; 8.x takes other tensors with `--fp16` or `--int8`."""
    options = handle.options
    if options["precision"] not in PRECISIONS:
        raise ValueError("precision %s is not supported; %s are" % (options["precision"], ", ".join(PRECISIONS)))
    arguments = ["--onnx=" + path, "--saveEngine=" + handle.engine, "--exportLayerInfo=" + handle.layers]
    arguments += ["--profilingVerbosity=detailed", "--noTF32", "--sparsity=enable"]
    arguments += ["--timingCacheFile=" + os.path.join(os.getcwd(), "timing.cache")]
    arguments += program.one_of("--skipInference", "--buildOnly")
    if program.version[0] < 11:
        typed = program.one_of("--stronglyTyped")
        arguments += typed or WEAKLY_TYPED[options["precision"]]
    return arguments + (["--verbose"] if options.get("verbose") else [])


def run_arguments(program: Trtexec, handle: Handle, iterations: int, warmup_ms: float) -> list[str]:
    """11.x leaves transfers out, spins and uses CUDA graphs unless told otherwise; before, all was the reverse."""
    arguments = ["--loadEngine=" + handle.engine, "--iterations=%d" % iterations, "--warmUp=%d" % warmup_ms]
    arguments += ["--duration=0", *program.one_of("--includeDataTransfers")]
    if "--noSpinWait" not in program.flags:
        arguments.append("--useSpinWait")
    graph, defaults_to_graph = handle.options.get("cuda_graph", True), "--noCudaGraph" in program.flags
    if graph != defaults_to_graph:
        arguments.append("--useCudaGraph" if graph else "--noCudaGraph")
    if handle.given:
        names = [spec["name"] for spec in handle.model["inputs"]]
        arguments.append("--loadInputs=" + ",".join("%s:%s" % (names[i], at) for i, at in sorted(handle.given.items())))
    return arguments


def inputs(handle: Handle) -> list[dict[str, Any]]:
    specs: list[dict[str, Any]] = handle.model["inputs"]
    return specs


def outputs(handle: Handle) -> list[dict[str, Any]]:
    specs: list[dict[str, Any]] = handle.model["outputs"]
    return specs


def notes(handle: Handle) -> dict[str, Any]:
    return {"sparse": None if handle.sparse is None else bool(handle.sparse), "sparse_layers": handle.sparse}


def fill(handle: Handle, seed: int) -> None:
    """Random values between -1 and 1, all of int8's, 0 or 1 for other integers."""
    generator = random.Random(seed)
    for index, spec in enumerate(inputs(handle)):
        count, kind = math.prod(spec["shape"]), FORMATS[spec["dtype"]]
        few = [_drawn(generator, kind) for _ in range(min(count, 4096))]
        set_input(handle, index, struct.pack("<%d%s" % (count, kind), *(few * (count // len(few) + 1))[:count]))


def _drawn(generator: random.Random, kind: str) -> float:
    if kind in "fed":
        return generator.uniform(-1, 1)
    return generator.randint(*((-128, 127) if kind == "b" else (0, 1)))


def set_input(handle: Handle, index: int, data: bytes) -> None:
    spec = inputs(handle)[index]
    wanted = math.prod(spec["shape"]) * struct.calcsize(FORMATS[spec["dtype"]])
    if len(data) != wanted:
        raise ValueError("input %s takes %d bytes, %d were given" % (spec["name"], wanted, len(data)))
    handle.given[index] = os.path.join(handle.folder, "in%d.bin" % index)
    with open(handle.given[index], "wb") as file:
        file.write(data)


def run(handle: Handle) -> None:
    """One inference for its outputs. trtexec prints them with six digits."""
    path = os.path.join(handle.folder, "output.json")
    arguments = [*run_arguments(trtexec(), handle, 1, 0), "--exportOutput=" + path]
    _run(arguments, "running the engine", handle.options.get("run_timeout_s", 120))
    try:
        handle.outputs = {str(entry["name"]): entry["values"] for entry in read_json(path)}
    except (KeyError, TypeError) as error:
        raise RuntimeError("trtexec's outputs are not in the documented form: %r" % error) from None


def get_output(handle: Handle, index: int) -> bytes:
    spec = outputs(handle)[index]
    values, kind = handle.outputs.get(spec["name"]), FORMATS[spec["dtype"]]
    if values is None or len(values) != math.prod(spec["shape"]):
        raise RuntimeError("trtexec told no output %s of shape %s" % (spec["name"], spec["shape"]))
    cast = float if kind in "fed" else bool if kind == "?" else int
    return struct.pack("<%d%s" % (len(values), kind), *map(cast, values))


def burst(handle: Handle, untimed: int, runs: int) -> list[float]:
    """Host latency of each timed run in microseconds; trtexec warms up for longer than `untimed` runs take."""
    options = handle.options
    enough = math.ceil(options.get("burst_ms", 300) / handle.typical_ms) if handle.typical_ms else 1
    count = max(runs, min(enough, MOST_RUNS))
    path = os.path.join(handle.folder, "times.json")
    warmup_ms = max(options.get("warmup_ms", 200), 2 * untimed * handle.typical_ms)
    # two more: the first after the warm-up may count as one of it
    arguments = [*run_arguments(trtexec(), handle, count + 2, warmup_ms), "--exportTimes=" + path]
    _run(arguments, "timing the engine", options.get("run_timeout_s", 120))
    latency_ms, compute_ms = parse_times(read_json(path))
    if len(latency_ms) < runs:
        raise RuntimeError("trtexec told the times of %d runs, %d were asked for" % (len(latency_ms), runs))
    handle.typical_ms = sorted(latency_ms)[len(latency_ms) // 2]
    handle.compute_ms += compute_ms[-count:]
    return [round(time_ms * 1e3, 3) for time_ms in latency_ms[-count:]]


def node_times(handle: Handle) -> dict[str, Any] | None:
    """Medians of a run of its own: a profiled engine waits after every layer."""
    if not handle.options.get("profile"):
        return None
    program = trtexec()
    path = os.path.join(handle.folder, "profile.json")
    arguments = run_arguments(program, handle, 50, handle.options.get("warmup_ms", 200))
    arguments += ["--dumpProfile", "--exportProfile=" + path]
    arguments += ["--separateProfileRun"] if program.version[0] < 11 else []
    _run(arguments, "profiling the engine", handle.options.get("run_timeout_s", 120))
    nodes = parse_profile(read_json(path), layers_by_name(handle.layers), handle.model["nodes"])
    middle = sorted(handle.compute_ms)[len(handle.compute_ms) // 2] if handle.compute_ms else None
    return {"nodes": nodes, "total_us": None, "device_us": None if middle is None else middle * 1e3}


def unload(handle: Handle) -> None:
    shutil.rmtree(handle.folder, ignore_errors=True)


def _run(arguments: list[str], doing: str, timeout_s: float) -> str:
    """Run trtexec; its log. `RuntimeError` with its own words when it fails, hangs, crashes or doesn't say `PASSED`."""
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryFile(dir=os.getcwd()) as log:
        child = subprocess.Popen(
            [trtexec().path, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while child.poll() is None:
                if time.monotonic() > deadline:
                    raise RuntimeError("trtexec was still %s after %g s and was ended" % (doing, timeout_s))
                try:
                    child.wait(min(5.0, timeout_s))
                except subprocess.TimeoutExpired:
                    alive()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")
    if child.returncode or "&&&& FAILED" in text or "&&&& PASSED" not in text:
        raise RuntimeError("%s failed: %s" % (doing, failure(text, child.returncode)))
    return text


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _first_line(text: str) -> str:
    return text.strip().strip("\0").splitlines()[0].strip() if text.strip() else ""
