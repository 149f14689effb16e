"""Core of the device program: JSON lines in on stdin, out on stdout; it loads, runs and times models through a runner.

Runs on the device by itself (Python 3.8 or later, standard library only, nothing of edgeprune): `device_program.py`
puts it and the runners into one file. A request is `{"id", "op", ...}`; it is answered by one line with the same id,
holding `"error"` when it failed, after any number of `{"event": ...}` lines. A runner is a module with

    NAME, version()                          what it is
    load(path, options) -> handle            compile a model, allocate its tensors
    inputs(handle), outputs(handle)          [{"name", "dtype", "shape"}], dtypes as numpy names them
    fill(handle, seed)                       ordinary random values into every input
    set_input(handle, index, data)           raw little-endian bytes
    get_output(handle, index) -> bytes       of the last run
    run(handle)                              one inference, which `run` and `measure` time from outside, or
    timed_run(handle) -> microseconds        one inference that knows its own (modelled) time
    burst(handle, untimed, runs) -> [us]     optional, where a runtime can be timed from inside only, in place of `run`:
                                             at least `runs` inferences after at least `untimed` others
    node_times(handle) -> {"nodes", "total_us"} or None
    lap(handle, first)                       optional: after the cold runs, then after each turn; node times count
                                             from the first lap to the last
    unload(handle)                           optional
    notes(handle) -> {name: value}           optional: what the runtime told when it compiled the model: `sparse`, if it
                                             picked sparse kernels, `ran_in`, shares of it in each precision
    facts() -> {name: text}                  optional: the accelerator, its driver and power mode
    alive()                                  optional: set by the program, to be called now and then in a long call
"""
# ruff: noqa: B905, PTH118, PTH123, UP031

from __future__ import annotations

import functools
import gc
import json
import math
import os
import platform
import random
import sys
import time
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Python 3.8 can't subscript these at run time
    from collections.abc import Callable

    Request = dict[str, Any]
    Emit = Callable[[dict[str, Any]], None]
    Burst = Callable[[int, int], list[float]]  # (untimed runs, timed runs) -> microseconds

PROTOCOL = 1
COLD_RUNS = 8  # at most: the first runs of a model prepare weights and fill caches


class Program:
    """The loaded models of one runner and the operations on them, one method `op_<name>` each."""

    def __init__(self, runner: Any, program_hash: str, emit: Emit) -> None:
        self.runner = runner
        self.hash = program_hash
        self.emit = emit
        self.handles: dict[str, Any] = {}
        self.filled: set[str] = set()  # keys whose inputs hold random values
        self.median_us: dict[str, float] = {}  # of the runs of the last measurement
        self.parent = os.getppid()
        self.busy = ""  # key of the model that is loaded or run right now
        self.own_bursts = hasattr(runner, "burst")
        if hasattr(runner, "alive"):
            runner.alive = lambda: emit({"event": "alive", "key": self.busy})

    def op_hello(self, request: Request) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "program": self.hash,
            "runner": self.runner.NAME,
            "version": self.runner.version(),
            "modelled": hasattr(self.runner, "timed_run"),
            "own_bursts": self.own_bursts,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "pid": os.getpid(),
            "cpu": cpu_facts(),
            "accelerator": self.runner.facts() if hasattr(self.runner, "facts") else {},
        }

    def op_load(self, request: Request) -> dict[str, Any]:
        affinity = request["options"].get("affinity")
        if affinity and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, affinity)
        self.op_unload(request)
        handle = self.runner.load(request["path"], request["options"])
        self.handles[request["key"]] = handle
        notes = self.runner.notes(handle) if hasattr(self.runner, "notes") else {}
        return {"inputs": self.runner.inputs(handle), "outputs": self.runner.outputs(handle), "notes": notes}

    def op_unload(self, request: Request) -> dict[str, Any]:
        self.filled.discard(request["key"])
        handle = self.handles.pop(request["key"], None)
        if handle is not None and hasattr(self.runner, "unload"):
            self.runner.unload(handle)
        return {}

    def op_run(self, request: Request) -> dict[str, Any]:
        handle = self._handle(request["key"])
        self.filled.discard(request["key"])
        wanted = self.runner.inputs(handle)
        if len(request["inputs"]) != len(wanted):
            raise ValueError("the model has %d inputs, %d were given" % (len(wanted), len(request["inputs"])))
        for index, (given, spec) in enumerate(zip(request["inputs"], wanted)):
            if given["dtype"] != spec["dtype"] or list(given["shape"]) != list(spec["shape"]):
                raise ValueError("input %d is %s, expected %s" % (index, _shape(given), _shape(spec)))
            with open(given["path"], "rb") as file:
                self.runner.set_input(handle, index, file.read())
        (getattr(self.runner, "run", None) or self.runner.timed_run)(handle)
        outputs = []
        for index, spec in enumerate(self.runner.outputs(handle)):
            path = os.path.join(request["folder"], "out%d.bin" % index)
            with open(path, "wb") as file:
                file.write(self.runner.get_output(handle, index))
            outputs.append(dict(spec, path=path))
        return {"outputs": outputs}

    def op_node_times(self, request: Request) -> dict[str, Any]:
        """Where the runner has no runs of its own for it, the nodes are those of the last measurement's runs.

        Their time is its median: what disturbs a run mostly falls between the nodes.
        """
        answer: dict[str, Any] = self.runner.node_times(self._handle(request["key"])) or {"nodes": None}
        if answer.get("total_us") is None:
            answer["total_us"] = self.median_us.get(request["key"])
        return answer

    def op_measure(self, request: Request) -> dict[str, Any]:
        keys = request["candidates"] + request["references"]
        burst = self.runner.burst if self.own_bursts else burst_of_runs(self.runner)
        bursts: dict[str, Burst] = {key: functools.partial(burst, self._handle(key)) for key in keys}
        for key in set(keys) - self.filled:
            self.runner.fill(self.handles[key], 0)
            self.filled.add(key)
        rounds = Rounds(bursts, request, self)
        answer = rounds.measure()
        self.median_us.update({key: median([t for burst in rounds.times[key] for t in burst]) for key in keys})
        answer["modelled"] = hasattr(self.runner, "timed_run")
        answer["machine"] = {} if answer["modelled"] else machine_state()
        return answer

    def lap(self, key: str, first: bool = False) -> None:
        if hasattr(self.runner, "lap"):
            self.runner.lap(self.handles[key], first)

    def op_bye(self, request: Request) -> dict[str, Any]:
        return {}

    def _handle(self, key: str) -> Any:
        if key not in self.handles:
            raise KeyError("no model %r is loaded" % key)
        return self.handles[key]


class Rounds:
    """Hot bursts of all candidates and references, interleaved in random order, round by round."""

    def __init__(self, bursts: dict[str, Burst], request: Request, program: Program) -> None:
        self.bursts = bursts
        self.program = program
        self.candidates: list[str] = request["candidates"]
        self.references: list[str] = request["references"]
        self.anchors: dict[str, str] = request["anchors"]
        self.timing: dict[str, Any] = request["timing"]
        self.random = random.Random(request["seed"])
        self.times: dict[str, list[list[float]]] = {key: [] for key in bursts}
        self.rounds: dict[str, list[int]] = {key: [] for key in bursts}
        self.burst_runs: dict[str, int] = {}

    def measure(self) -> dict[str, Any]:
        started = time.perf_counter()
        gc.disable()
        try:
            for key in self.bursts:
                self.program.busy = key
                self.program.emit({"event": "warmup", "key": key})
                self.warm_up(key)
            stopped_by = self.play(started)
        finally:
            gc.enable()
        return {
            "times_us": self.times,
            "rounds": self.rounds,
            "seconds": round(time.perf_counter() - started, 4),
            "stopped_by": stopped_by,
        }

    def warm_up(self, key: str) -> None:
        """Run for `warmup_ms`, and size the bursts: runs that fill `burst_ms`, at least `min_runs`.

        A runner with bursts of its own warms up in each of them.
        """
        burst, timing = self.bursts[key], self.timing
        times = burst(timing["untimed_runs"], timing["min_runs"]) if self.program.own_bursts else burst(0, 1)
        spent_us = math.inf if self.program.own_bursts else 0.0
        while spent_us < timing["warmup_ms"] * 1e3 or len(times) < timing["untimed_runs"]:
            if len(times) == COLD_RUNS:
                self.program.lap(key, first=True)
            begun = time.perf_counter()
            times += burst(0, 1)
            # a modelled run may take no time at all by the clock: its own time counts as well
            spent_us += max((time.perf_counter() - begun) * 1e6, times[-1])
        if len(times) <= COLD_RUNS:
            self.program.lap(key, first=True)
        typical = max(median(times[-100:]), 0.1)
        wanted = math.ceil(self.timing["burst_ms"] * 1e3 / typical)
        self.burst_runs[key] = min(max(self.timing["min_runs"], wanted), 1000)

    def play(self, started: float) -> str:
        timing = self.timing
        for number in range(timing["max_rounds"]):
            order = [key for key in self.candidates if not (timing["settle_alone"] and self.certain(key))]
            if not order or (number >= timing["min_rounds"] and all(self.certain(key) for key in order)):
                return "confidence"
            if number and self.spent_seconds(started) > timing["max_seconds"]:
                return "seconds"
            order += self.references
            self.random.shuffle(order)
            for key in order:
                self.turn(key, number)
            self.program.emit({"event": "round", "round": number})
        return "rounds"

    def spent_seconds(self, started: float) -> float:
        """Since the start; with bursts of the runner's own the time in them, without what it takes to start them."""
        if self.program.own_bursts:
            return sum(sum(burst) for bursts in self.times.values() for burst in bursts) / 1e6
        return time.perf_counter() - started

    def turn(self, key: str, number: int) -> None:
        if self.program.parent and os.getppid() != self.program.parent:
            os._exit(1)  # whoever asked is gone
        self.program.busy = key
        self.times[key].append(self.bursts[key](self.timing["untimed_runs"], self.burst_runs[key]))
        self.rounds[key].append(number)
        self.program.lap(key)

    def certain(self, key: str) -> bool:
        """Whether the 95 % interval of the median over rounds is within the tolerance, judged by its spread."""
        share = self.timing["burst_percentile"] / 100
        values = [quantile(burst, share) for burst in self.times[key]]
        if len(values) < self.timing["min_rounds"]:
            return False
        anchor = self.anchors.get(key)
        if anchor is not None:
            scale = dict(zip(self.rounds[anchor], (quantile(burst, share) for burst in self.times[anchor])))
            values = [value / scale[number] for value, number in zip(values, self.rounds[key])]
        middle = median(values)
        deviation = 1.4826 * median([abs(value - middle) for value in values])
        # the standard error of a median of n normal values is 1.2533 sigma / sqrt(n)
        half = 1.96 * 1.2533 * deviation / math.sqrt(len(values))
        return half <= float(self.timing["tolerance"]) * middle


def burst_of_runs(runner: Any) -> Callable[[Any, int, int], list[float]]:
    """A burst made of single runs, timed from outside unless they know their own (modelled) time."""
    timed = modelled_run(runner) if hasattr(runner, "timed_run") else clocked_run(runner)

    def burst(handle: Any, untimed: int, runs: int) -> list[float]:
        for _ in range(untimed):
            timed(handle)
        return [round(timed(handle), 2) for _ in range(runs)]

    return burst


def clocked_run(runner: Any) -> Callable[[Any], float]:
    run, clock = runner.run, time.perf_counter_ns

    def timed(handle: Any) -> float:
        begun = clock()
        run(handle)
        return (clock() - begun) / 1e3

    return timed


def modelled_run(runner: Any) -> Callable[[Any], float]:
    timed_run = runner.timed_run

    def timed(handle: Any) -> float:
        return float(timed_run(handle))

    return timed


def median(values: list[float]) -> float:
    return quantile(values, 0.5)


def quantile(values: list[float], share: float) -> float:
    """With linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def cpu_facts() -> dict[str, Any]:
    """What tells one kind of CPU from another; what can't be read is left out."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    lines = (_read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    info = {name.strip(): value.strip() for name, value in pairs}
    names = {"vendor_id": "vendor", "cpu family": "family", "model": "model", "stepping": "stepping"}
    names.update({"model name": "name", "CPU implementer": "vendor", "CPU part": "model", "CPU variant": "stepping"})
    facts.update({ours: info[theirs] for theirs, ours in names.items() if theirs in info})
    facts["flags"] = sorted((info.get("flags") or info.get("Features") or "").split())
    facts["caches"] = _caches()
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        facts["governor"] = governor.strip()
    return facts


def machine_state() -> dict[str, float]:
    """`clock_mhz`, the mean of the cores' clocks, and `temperature_c`, of the hottest zone, where they can be read."""
    cores = "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq"
    clocks = [number / 1e3 for number in _numbers(cores, os.cpu_count() or 1)]
    if not clocks:
        lines = (_read("/proc/cpuinfo") or "").splitlines()
        clocks = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    heat = [number / 1e3 for number in _numbers("/sys/class/thermal/thermal_zone%d/temp", 32)]
    state = {"clock_mhz": round(sum(clocks) / len(clocks), 1)} if clocks else {}
    if heat:
        state["temperature_c"] = max(heat)
    return state


def _numbers(path: str, count: int) -> list[float]:
    """What stands in the files `path % 0`, `path % 1`, ... as far as they can be read."""
    found = []
    for index in range(count):
        try:
            found.append(float(_read(path % index) or ""))
        except ValueError:
            continue
    return found


def _caches() -> dict[str, str]:
    """`{"L1d": "48K", "L2": "1024K", ...}` of the first core."""
    caches = {}
    for index in range(8):
        folder = "/sys/devices/system/cpu/cpu0/cache/index%d/" % index
        level, kind, size = (_read(folder + name) for name in ("level", "type", "size"))
        if level and kind and size:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind.strip(), "")
            caches["L" + level.strip() + suffix] = size.strip()
    return caches


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None


def _shape(spec: dict[str, Any]) -> str:
    return "%s%s" % (spec["dtype"], list(spec["shape"]))


def serve(program: Program, lines: Any, emit: Emit) -> int:
    """Answer requests until `bye` or the end of input. A request that fails is answered; the program goes on."""
    for line in lines:
        request: Request = {}
        try:
            request = json.loads(line)
            program.busy = str(request.get("key", ""))
            operation = getattr(program, "op_%s" % request["op"], None)
            if operation is None:
                raise ValueError("unknown operation %r" % request["op"])
            answer = operation(request)
        except Exception as error:  # of the runtime or of the request: whoever asked decides what it means
            text = str(error).strip() or "no message"
            answer = {"error": text[:4000], "error_type": type(error).__name__, "key": program.busy}
        answer["id"] = request.get("id")
        emit(answer)
        if request.get("op") == "bye":
            break
    return 0


def main(runners: dict[str, str], program_hash: str) -> int:
    """`runners` maps names to source text; the first argument of the command line picks one."""
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the runtime prints goes to stderr and can't mix with answers

    def emit(message: dict[str, Any]) -> None:
        wire.write(json.dumps(message) + "\n")
        wire.flush()

    name = sys.argv[1]
    runner = types.ModuleType("runner_" + name)
    try:
        exec(compile(runners[name], "<runner %s>" % name, "exec"), runner.__dict__)
    except ImportError as error:
        emit({"id": None, "error": str(error), "error_type": "ImportError"})
        return 1
    return serve(Program(runner, program_hash, emit), sys.stdin, emit)
