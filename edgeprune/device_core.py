"""Core of the device program: JSON lines in on stdin, out on stdout; it loads, runs and times models through a runner.

Runs on the device by itself (Python 3.8 or later, standard library only, nothing of edgeprune): `device_program.py`
puts it, the parts that it imports and the runners into one file. A request is `{"id", "op", ...}`; it is answered by
one line with the same id, holding `"error"` when it failed, after any number of `{"event": ...}` lines. A runner is a
module with

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
    use_cache(folder)                        optional: keep compiled models there and load them from there; a bundle's
                                             user asks for it, no measurement does
    notes(handle) -> {name: value}           optional: what the runtime told when it compiled the model: `sparse`, if it
                                             picked sparse kernels, `ran_in`, shares of it in each precision
    facts() -> {name: text}                  optional, of an NVIDIA GPU: which one, its driver
    alive()                                  optional: set by the program, to be called now and then in a long call
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import platform
import site
import sys
import types
from typing import TYPE_CHECKING, Any

from edgeprune.device_clocks import Clocks
from edgeprune.device_rounds import Rounds, burst_of_runs
from edgeprune.device_state import Tree, Watch, board_facts, cpu_facts, whole_state
from edgeprune.device_statistics import median
from edgeprune.device_store import Store

if TYPE_CHECKING:  # Python 3.8 can't subscript these at run time
    from collections.abc import Callable

    Request = dict[str, Any]
    Emit = Callable[[dict[str, Any]], None]

PROTOCOL = 1
NOTE_BYTES = 1024


class Program:
    """The loaded models of one runner and the operations on them, one method `op_<name>` each."""

    def __init__(self, runner: Any, program_hash: str, emit: Emit, store: Store | None = None) -> None:
        """`store` is where a remote device keeps its models."""
        self.runner = runner
        self.hash = program_hash
        self.emit = emit
        self.store = store
        self.paths: dict[str, str] = {}  # of the loaded models
        self.handles: dict[str, Any] = {}
        self.filled: set[str] = set()  # keys whose inputs hold random values
        self.median_us: dict[str, float] = {}  # of the runs of the last measurement
        self.tree = Tree()
        self.clocks = Clocks(self.tree)
        self.parent = os.getppid()
        self.note: Callable[[str], None] = lambda key: None  # told what runs, for whoever looks when it doesn't end
        self._busy = ""
        self.own_bursts = hasattr(runner, "burst")
        if hasattr(runner, "alive"):
            runner.alive = lambda: emit({"event": "alive", "key": self.busy})

    @property
    def busy(self) -> str:
        """Key of the model that is loaded or run right now."""
        return self._busy

    @busy.setter
    def busy(self, key: str) -> None:
        self._busy = key
        self.note(key)

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
            "cpu": cpu_facts(self.tree),
            "board": board_facts(self.tree),
            "accelerator": self.runner.facts() if hasattr(self.runner, "facts") else {},
        }

    def op_load(self, request: Request) -> dict[str, Any]:
        affinity = request["options"].get("affinity")
        if affinity and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, affinity)
        self.op_unload(request)
        handle = self.runner.load(request["path"], request["options"])
        self.handles[request["key"]] = handle
        self.paths[request["key"]] = request["path"]
        notes = self.runner.notes(handle) if hasattr(self.runner, "notes") else {}
        return {"inputs": self.runner.inputs(handle), "outputs": self.runner.outputs(handle), "notes": notes}

    def op_unload(self, request: Request) -> dict[str, Any]:
        self.filled.discard(request["key"])
        self.paths.pop(request["key"], None)
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
        bursts = {key: functools.partial(burst, self._handle(key)) for key in keys}
        for key in set(keys) - self.filled:
            self.runner.fill(self.handles[key], 0)
            self.filled.add(key)
        modelled = hasattr(self.runner, "timed_run")
        watch = None if modelled else Watch(self.tree, card=hasattr(self.runner, "facts"))
        rounds = Rounds(bursts, request, self, watch)
        answer = rounds.measure()
        self.median_us.update({key: median([t for burst in rounds.times[key] for t in burst]) for key in keys})
        answer["modelled"] = modelled
        answer["machine"], answer["slowed"] = watch.ended() if watch else ({}, [])
        return answer

    def op_state(self, request: Request) -> dict[str, Any]:
        """All that this machine tells about itself, as it is now."""
        return whole_state(self.tree)

    def op_hold_clocks(self, request: Request) -> dict[str, Any]:
        """Until the program ends, however it does."""
        return {"held": self.clocks.hold()}

    def lap(self, key: str, first: bool = False) -> None:
        if hasattr(self.runner, "lap"):
            self.runner.lap(self.handles[key], first)

    def op_many(self, request: Request) -> dict[str, Any]:
        """Requests that share one round trip: an answer each, as far as they went with `stop` at the first failure."""
        answers: list[dict[str, Any]] = []
        for one in request["requests"]:
            self.busy = str(one.get("key", ""))
            self.emit({"event": "begin", "key": self.busy or one["op"]})
            answers.append(self.answer(one))
            if request.get("stop") and "error" in answers[-1]:
                break
        return {"answers": answers}

    def op_missing(self, request: Request) -> dict[str, Any]:
        """Of these models those that have to be sent."""
        return {"missing": self.models().missing(request["keys"])}

    def op_put(self, request: Request) -> dict[str, Any]:
        """Models, whose bytes follow the line of the request."""
        loaded = {os.path.basename(os.path.dirname(path)) for path in self.paths.values()}
        self.models().put(request["models"], loaded | set(request["keep"]))
        return {}

    def op_get(self, request: Request) -> dict[str, Any]:
        """A piece of a file that `run` has written."""
        return self.models().given(request["path"], request["offset"])

    def op_bye(self, request: Request) -> dict[str, Any]:
        self.clocks.release()
        return {}

    def models(self) -> Store:
        if self.store is None:
            raise ValueError("this device opens the host's files, there is nothing to send")
        return self.store

    def answer(self, request: Request) -> dict[str, Any]:
        """What an operation answers, or why it failed."""
        try:
            self.busy = str(request.get("key", ""))
            operation = getattr(self, "op_%s" % request["op"], None)
            if operation is None:
                raise ValueError("unknown operation %r" % request["op"])
            answer: dict[str, Any] = operation(request)
        except Exception as error:  # of the runtime or of the request: whoever asked decides what it means
            plain = isinstance(error, OSError) and error.filename is None and error.strerror
            text = str(plain or error).strip() or "no message"
            answer = {"error": text[:4000], "error_type": type(error).__name__, "key": self.busy}
            if isinstance(error, OSError) and error.errno:
                answer["errno"] = error.errno
        self.busy = ""
        return answer

    def _handle(self, key: str) -> Any:
        if key not in self.handles:
            raise KeyError("no model %r is loaded" % key)
        return self.handles[key]


def _shape(spec: dict[str, Any]) -> str:
    return "%s%s" % (spec["dtype"], list(spec["shape"]))


def serve(program: Program, lines: Any, emit: Emit) -> int:
    """Answer requests until `bye` or the end of input. A request that fails is answered; the program goes on."""
    for line in lines:
        try:
            request: Request = json.loads(line)
        except ValueError as error:
            emit({"id": None, "error": "no JSON: %s" % error, "error_type": "ValueError"})
            continue
        answer = program.answer(request)
        answer["id"] = request.get("id")
        emit(answer)
        if request.get("op") == "bye":
            break
    return 0


def main(runners: dict[str, str], program_hash: str) -> int:
    """`runners` maps names to source text; the first argument of the command line picks one.

    On a remote device a folder for models follows, and how many megabytes they may take.
    """
    # where nvpmodel and others are; a login by ssh may leave them out
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the runtime prints goes to stderr and can't mix with answers

    def emit(message: dict[str, Any]) -> None:
        wire.write(json.dumps(message) + "\n")
        wire.flush()

    name = sys.argv[1]
    runner = types.ModuleType("runner_" + name)
    try:
        execute(runners[name], runner)
    except ImportError as error:
        emit({"id": None, "error": str(error), "error_type": "ImportError"})
        return 1
    store = None
    if len(sys.argv) > 2:
        store = Store(sys.argv[2], int(sys.argv[3]) << 20, sys.stdin.buffer.read)
    program = Program(runner, program_hash, emit, store)
    program.note = noted("busy")
    return serve(program, sys.stdin.buffer, emit)


def noted(path: str) -> Callable[[str], None]:
    """Writes a key into a file in the working folder, by a page of memory: it stands there even when we are killed."""
    try:
        with open(path, "w+b") as file:
            file.write(bytes(NOTE_BYTES))
            file.flush()
            page = mmap.mmap(file.fileno(), NOTE_BYTES)
    except (OSError, ValueError):  # only a courtesy
        return lambda key: None

    def note(key: str) -> None:
        page[:] = key.encode("utf-8", "replace")[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")

    return note


def execute(source: str, runner: types.ModuleType) -> None:
    """Run a runner's source; where its runtime is not found, once more with what the user has installed for himself.

    `python -I` leaves that out, and `pip install` without rights puts things there.
    """
    code = compile(source, "<%s>" % runner.__name__, "exec")
    try:
        exec(code, runner.__dict__)
    except ImportError:
        own = site.getusersitepackages()
        if own in sys.path or not os.path.isdir(own):
            raise
        site.addsitedir(own)
        exec(code, runner.__dict__)
