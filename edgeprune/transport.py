"""Sessions with the device program: a child process (local) or one over there (ssh, adb), behind the same `Channel`.

A `Session` asks (`load`, `measure`, `run`, ...), a `Channel` carries one request and its answer. Tests put their own
channel behind a session; nothing else knows how the device is reached.
"""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from edgeprune.adb_link import AdbLink
from edgeprune.device import Device, check_precision
from edgeprune.device_core import PROTOCOL
from edgeprune.device_program import DeviceProgram, assemble
from edgeprune.errors import DeviceError, DeviceUnreachable, MeasurementError, RuntimeMissing
from edgeprune.installing import install_there
from edgeprune.local_channel import LocalChannel
from edgeprune.machine import printable, told
from edgeprune.measurement import HOT, ConnectionLost, Loaded, Measurement, NodeTimes, SessionLost, Timing
from edgeprune.modelled import backend_of, installed
from edgeprune.remote_channel import Link, RemoteChannel
from edgeprune.ssh_link import ssh_link
from edgeprune.wire import pause

LOG = logging.getLogger("edgeprune")
PATIENCE_SECONDS = 180.0
"""How long to look for a device again whose connection was lost; one that restarts is back within two minutes."""
LONGEST_PAUSE_SECONDS = 15.0
MOST_OUTPUT = 1 << 30  # bytes

MOST_CUTS = 5
"""In a row, with nothing measured between them, before the device counts as gone."""
Result = TypeVar("Result")

Event = Callable[[dict[str, Any]], None]


class Channel(Protocol):
    """Carries requests to one device program; files cross by `put` and `get`. `folder` is scratch space over there."""

    folder: str

    def request(self, fields: Mapping[str, Any], silence_s: float, on_event: Event) -> dict[str, Any]:
        """Send one JSON object, pass on events, give the answer. `MeasurementError` when the program dies or hangs."""

    def put(self, paths: Sequence[Path]) -> list[str]:
        """Bring files, or models with the files beside them, to the device; gives their paths there."""

    def get(self, remote: str, path: Path, num_bytes: int) -> None:
        """Fetch a file of at most `num_bytes` from the device."""

    def close(self) -> None:
        """End the program; nothing of it stays behind."""


class Session:
    """Typed requests to the device program of one device; made by `open_session`."""

    def __init__(self, channel: Channel, options: Mapping[str, Any], *, silence_s: float = 120.0) -> None:
        """`silence_s` is how long the program may say nothing before it counts as hung and is killed."""
        self.channel = channel
        self.options = dict(options)
        self.silence_s = silence_s
        self.busy_with = ""  # what the program was last asked to run: a key, or the name of a request
        self._ids = itertools.count(1)

    def request(self, op: str, *, on_event: Event | None = None, **fields: Any) -> dict[str, Any]:
        """One request; `MeasurementError` with the device's message when it answers that it failed."""
        number = next(self._ids)
        self.busy_with = str(fields.get("key", op))

        def event(message: dict[str, Any]) -> None:
            self.busy_with = str(message.get("key", op))
            if on_event is not None:
                on_event(message)

        try:
            answer = self.channel.request({"id": number, "op": op, **fields}, self.silence_s, event)
        except SessionLost as error:
            self.busy_with = error.key or self.busy_with
            raise
        if answer.get("id") != number:
            said = printable(str(answer.get("error", ""))[:500])
            got = printable(repr(answer.get("id"))[:100])
            raise MeasurementError(f"the device program answered request {got}, not {number}: {said}")
        return self._or_raise(answer)

    def many(self, requests: Sequence[Mapping[str, Any]], *, stop: bool = False) -> list[dict[str, Any]]:
        """Several requests in one round trip; an answer each, as far as they went with `stop` at the first failure."""
        answers = self.request("many", requests=list(requests), stop=stop).get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise MeasurementError("the device program's answer to 'many' is malformed")
        failed = bool(answers) and stop and "error" in answers[-1]
        if len(answers) != len(requests) and not failed:
            raise MeasurementError(f"the device program gave {len(answers)} answers to {len(requests)} requests")
        return answers

    def _or_raise(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            self.busy_with = str(answer.get("key") or self.busy_with)
            raise MeasurementError(f"{self.busy_with}: {printable(str(answer['error'])[:4000])}")
        return answer

    def hello(self) -> dict[str, Any]:
        """What runs there: program hash, Python, platform, CPU, runtime and its version."""
        return self.request("hello")

    def state(self) -> dict[str, Any]:
        """What the device tells about itself now: `facts`, `state`, `slowed`, `slowed_before`, `packages`, disk."""
        return told(self.request("state"))

    def hold_clocks(self) -> list[str]:
        """Until the session ends, however it does; `MeasurementError` that says what to run where it isn't allowed."""
        return [str(what) for what in self.request("hold_clocks")["held"]]

    def load(self, key: str, path: Path, *, profile: bool = False, precision: str | None = None) -> Loaded:
        """Compile a model file under a name of your choice; `profile` lets `node_times` be asked for it later.

        `precision` is that of its arithmetic, the session's unless told.
        """
        (there,) = self.channel.put([path])
        return Loaded.from_json(key, self.request("load", **self._load_fields(key, there, profile, precision)))

    def load_all(
        self, models: Mapping[str, Path], *, profile: bool = False
    ) -> tuple[dict[str, Loaded], dict[str, str]]:
        """`load` for several in one round trip; what was loaded, and why the others were not."""
        self.busy_with = "load"
        there = self.channel.put(list(models.values()))
        fields = [
            {"op": "load", **self._load_fields(key, path, profile)} for key, path in zip(models, there, strict=True)
        ]
        loaded, failed = dict[str, Loaded](), dict[str, str]()
        for key, answer in zip(models, self.many(fields), strict=True):
            try:
                loaded[key] = Loaded.from_json(key, self._or_raise(answer))
            except MeasurementError as error:
                failed[key] = str(error)
        return loaded, failed

    def _load_fields(self, key: str, path: str, profile: bool, precision: str | None = None) -> dict[str, Any]:
        options = {**self.options, "profile": profile, **({"precision": precision} if precision else {})}
        return {"key": key, "path": path, "options": options}

    def unload(self, *keys: str) -> None:
        self.many([{"op": "unload", "key": key} for key in keys])

    def run(self, key: str, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One inference of a loaded model on these arrays, in the order of its inputs; gives its outputs in order."""
        with tempfile.TemporaryDirectory(prefix="edgeprune-run-") as scratch:
            paths = [Path(scratch, f"in{index}.bin") for index in range(len(inputs))]
            for array, path in zip(inputs, paths, strict=True):
                path.write_bytes(np.ascontiguousarray(array).tobytes())
            given = [
                {"path": there, "dtype": array.dtype.name, "shape": list(array.shape)}
                for array, there in zip(inputs, self.channel.put(paths), strict=True)
            ]
            answer = self.request("run", key=key, inputs=given, folder=self.channel.folder)
            outputs = answer.get("outputs")
            if not isinstance(outputs, list):
                raise MeasurementError(f"{key}: the device program's answer to 'run' is malformed")
            return [self._output(key, index, spec, Path(scratch)) for index, spec in enumerate(outputs)]

    def _output(self, key: str, index: int, spec: Mapping[str, Any], scratch: Path) -> np.ndarray[Any, Any]:
        path = scratch / f"out{index}.bin"
        try:
            dtype, shape = np.dtype(spec["dtype"]), tuple(map(int, spec["shape"]))
            num_bytes = dtype.itemsize * math.prod(shape)
            if dtype.hasobject or not 0 <= num_bytes <= MOST_OUTPUT:
                raise ValueError(f"{num_bytes} bytes of {dtype}")
            self.channel.get(str(spec["path"]), path, num_bytes)
            array: np.ndarray[Any, Any] = np.fromfile(path, dtype=dtype).reshape(shape)
            return array
        except (KeyError, TypeError, ValueError) as error:
            raise MeasurementError(f"{key}: output {index} is malformed: {error}") from None

    def node_times(self, key: str) -> NodeTimes | None:
        """Time of each executed node of a model loaded with `profile=True` (after it was measured), or None where the
        runtime doesn't tell."""
        return NodeTimes.from_json(self.request("node_times", key=key))

    def node_times_of(self, keys: Sequence[str]) -> dict[str, NodeTimes]:
        """`node_times` of several models in one round trip; without those of which the runtime doesn't tell."""
        answers = self.many([{"op": "node_times", "key": key} for key in keys], stop=True)
        told = [(key, NodeTimes.from_json(self._or_raise(answer))) for key, answer in zip(keys, answers, strict=False)]
        return {key: times for key, times in told if times is not None}

    def measure(
        self,
        candidates: Sequence[str],
        references: Sequence[str] = (),
        *,
        timing: Timing = HOT,
        anchors: Mapping[str, str] | None = None,
        seed: int = 0,
        on_round: Callable[[int], None] | None = None,
    ) -> Measurement:
        """Time loaded models in hot bursts, interleaved in random order, until their medians are certain enough.

        `anchors` names for a candidate the reference that its ratio is taken to; the first one unless told.
        """
        anchors = dict(anchors or (dict.fromkeys(candidates, references[0]) if references else {}))

        def event(message: dict[str, Any]) -> None:
            if on_round is not None and message.get("event") == "round":
                on_round(int(message["round"]))

        answer = self.request(
            "measure",
            on_event=event,
            candidates=list(candidates),
            references=list(references),
            anchors=anchors,
            timing=timing.to_json(),
            seed=seed,
        )
        return Measurement.from_json(answer, references, anchors, timing.burst_percentile)


def through_cuts(run: Callable[[float], Result]) -> Result:
    """What `run` gives, which opens a session and is started again where the connection to the device was lost.

    It is told how long to look for the device.
    """
    for attempt in range(MOST_CUTS):
        try:
            return run(PATIENCE_SECONDS if attempt else 0.0)
        except ConnectionLost as error:
            LOG.warning("%s; trying again", error)
    return run(PATIENCE_SECONDS)


@contextmanager
def open_session(
    device: Device,
    *,
    precision: str | None = None,
    silence_s: float | None = None,
    wait_s: float = 0.0,
    patience_s: float = 0.0,
) -> Iterator[Session]:
    """Start the device program with the device's runner; ends it, whatever happens inside the `with` block.

    A remote device is ours alone meanwhile. `DeviceError` where somebody else measures it, after waiting `wait_s` for
    that to end, and where it can't be reached, after trying for `patience_s`; `RuntimeMissing` where its runtime is not
    there.
    """
    precision = precision or device.precisions[0]
    check_precision(device, precision)
    # a remote device tells itself what it lacks
    backend = backend_of(device, only_to_time=True) if device.remote else installed(device, only_to_time=True)
    program = assemble({device.backend: backend.runner_path()})
    options = {
        "threads": device.threads,
        "streams": device.streams,
        "hint": device.hint,
        "affinity": list(device.affinity) if device.affinity else None,
        "precision": precision,
        **device.options,
    }
    with _channel(device, program, wait_s, patience_s) as channel:
        session = Session(channel, options, silence_s=device.timeout_s if silence_s is None else silence_s)
        if isinstance(channel, RemoteChannel):
            _greet(session, channel, device, program)
        if device.lock_clocks and not device.modelled:
            session.hold_clocks()
        yield session


def _channel(device: Device, program: DeviceProgram, wait_s: float, patience_s: float) -> LocalChannel | RemoteChannel:
    """Tries for `patience_s` to reach the device, in growing intervals."""
    if not device.remote or device.roofline is not None:  # a formula needs no device
        return LocalChannel(program.text, device.backend)
    begun, pause_s = time.monotonic(), 1.0
    while True:
        try:
            channel = _remote(device, program, wait_s)
            _held.add(device.name)
            return channel
        except (DeviceUnreachable, ConnectionLost) as error:
            left = patience_s - (time.monotonic() - begun)
            if left <= 0:
                raise DeviceUnreachable(str(error)) from error
            LOG.info("device '%s' does not answer; trying again for %.0f s", device.name, left)
            pause(min(pause_s, left))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_SECONDS)


_held: set[str] = set()
"""Devices that this process has measured: it waits where somebody has taken one of them in between."""


def _remote(device: Device, program: DeviceProgram, wait_s: float) -> RemoteChannel:
    def on_wait(holder: str) -> None:
        LOG.info("waiting for device '%s': it is being measured by %s", device.name, holder)

    long = wait_s == math.inf or device.name in _held
    link: Link = ssh_link(device) if device.transport == "ssh" else AdbLink(device)
    return RemoteChannel(device, link, program, device.backend, wait_s=None if long else wait_s, on_wait=on_wait)


def _greet(session: Session, channel: RemoteChannel, device: Device, program: DeviceProgram) -> None:
    """Whether it is our program that answers, and whether its runtime is there."""
    answer = channel.request({"id": 0, "op": "hello"}, session.silence_s, lambda message: None)
    if answer.get("error_type") == "ImportError":
        said = printable(str(answer.get("error"))[:500])
        raise RuntimeMissing(
            f"device '{device.name}' has no runtime for {device.backend} that {channel.executable} (Python "
            f"{channel.python}) could import: {said}",
            fix=install_there(device.backend, device, python=channel.python, machine=device.arch or ""),
        )
    if "error" in answer:
        raise RuntimeMissing(f"device '{device.name}': {printable(str(answer['error'])[:1000])}")
    if answer.get("protocol") != PROTOCOL or answer.get("program") != program.hash:
        raise DeviceError(f"device '{device.name}' answers as another version of the device program")
