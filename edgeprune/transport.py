"""Sessions with the device program: one child process (local), later ssh and adb, all behind the same small `Channel`.

A `Session` asks (`load`, `measure`, `run`, ...), a `Channel` carries one request and its answer. Tests put their own
channel behind a session; nothing else knows how the device is reached.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgeprune.device import Device, check_precision
from edgeprune.device_program import assemble
from edgeprune.errors import MeasurementError, RuntimeMissing
from edgeprune.local_channel import LocalChannel
from edgeprune.measurement import HOT, Loaded, Measurement, NodeTimes, SessionLost, TensorSpec, Timing
from edgeprune.modelled import backend_of

if TYPE_CHECKING:
    from edgeprune.device import Device

__all__ = [
    "Channel",
    "Loaded",
    "Measurement",
    "NodeTimes",
    "Session",
    "SessionLost",
    "TensorSpec",
    "Timing",
    "open_session",
]

SILENCE_SECONDS = 120.0
"""How long the device program may say nothing while a request runs before it counts as hung and is killed."""

Event = Callable[[dict[str, Any]], None]


class Channel(Protocol):
    """Carries requests to one device program; files cross by `put` and `get`. `folder` is scratch space over there."""

    folder: str

    def request(self, fields: Mapping[str, Any], silence_s: float, on_event: Event) -> dict[str, Any]:
        """Send one JSON object, pass on events, give the answer. `MeasurementError` when the program dies or hangs."""

    def put(self, path: Path) -> str:
        """Bring a file, or a model with the files beside it, to the device; gives its path there."""

    def get(self, remote: str, path: Path) -> None:
        """Fetch a file from the device."""

    def close(self) -> None:
        """End the program; nothing of it stays behind."""


class Session:
    """Typed requests to the device program of one device; made by `open_session`."""

    def __init__(self, channel: Channel, options: Mapping[str, Any], *, silence_s: float = SILENCE_SECONDS) -> None:
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

        answer = self.channel.request({"id": number, "op": op, **fields}, self.silence_s, event)
        if answer.get("id") != number:
            said = str(answer.get("error", ""))[:500]
            raise MeasurementError(f"the device program answered request {answer.get('id')!r}, not {number}: {said}")
        if "error" in answer:
            self.busy_with = str(answer.get("key") or self.busy_with)
            raise MeasurementError(f"{self.busy_with}: {answer['error']}")
        return answer

    def hello(self) -> dict[str, Any]:
        """What runs there: program hash, Python, platform, CPU, runtime and its version."""
        return self.request("hello")

    def put(self, path: Path) -> str:
        return self.channel.put(path)

    def load(self, key: str, path: Path, *, profile: bool = False, precision: str | None = None) -> Loaded:
        """Compile a model file under a name of your choice; `profile` lets `node_times` be asked for it later.

        `precision` is that of its arithmetic, the session's unless told.
        """
        options = {**self.options, "profile": profile, **({"precision": precision} if precision else {})}
        answer = self.request("load", key=key, path=self.put(path), options=options)
        return Loaded.from_json(key, answer)

    def unload(self, key: str) -> None:
        self.request("unload", key=key)

    def run(self, key: str, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One inference of a loaded model on these arrays, in the order of its inputs; gives its outputs in order."""
        with tempfile.TemporaryDirectory(prefix="edgeprune-run-") as scratch:
            given = []
            for index, array in enumerate(inputs):
                path = Path(scratch, f"in{index}.bin")
                path.write_bytes(np.ascontiguousarray(array).tobytes())
                given.append({"path": self.put(path), "dtype": array.dtype.name, "shape": list(array.shape)})
            answer = self.request("run", key=key, inputs=given, folder=self.channel.folder)
            return [self._output(key, index, spec, Path(scratch)) for index, spec in enumerate(answer["outputs"])]

    def _output(self, key: str, index: int, spec: Mapping[str, Any], scratch: Path) -> np.ndarray[Any, Any]:
        path = scratch / f"out{index}.bin"
        self.channel.get(str(spec["path"]), path)
        try:
            array: np.ndarray[Any, Any] = np.fromfile(path, dtype=np.dtype(spec["dtype"])).reshape(spec["shape"])
            return array
        except (TypeError, ValueError) as error:
            raise MeasurementError(f"{key}: output {index} is malformed: {error}") from None

    def node_times(self, key: str) -> NodeTimes | None:
        """Time of each executed node of a model loaded with `profile=True` (after it was measured), or None where the
        runtime doesn't tell."""
        return NodeTimes.from_json(self.request("node_times", key=key))

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


@contextmanager
def open_session(
    device: Device, *, precision: str | None = None, silence_s: float = SILENCE_SECONDS
) -> Iterator[Session]:
    """Start the device program with the device's runner; ends it, whatever happens inside the `with` block."""
    precision = precision or device.precisions[0]
    check_precision(device, precision)
    backend = backend_of(device, only_to_time=True)
    missing = backend.available()
    if missing is not None:
        raise RuntimeMissing(missing)
    program = assemble({device.backend: backend.runner_path()})
    options = {
        "threads": device.threads,
        "streams": device.streams,
        "hint": device.hint,
        "affinity": list(device.affinity) if device.affinity else None,
        "precision": precision,
        **device.options,
    }
    with LocalChannel(program.text, device.backend) as channel:
        session = Session(channel, options, silence_s=silence_s)
        yield session
