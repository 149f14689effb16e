"""Sessions: typed answers, and a device program that dies, hangs or talks nonsense costs one error."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.device import Device, load_device
from edgeprune.device_program import assemble
from edgeprune.errors import InputError, MeasurementError
from edgeprune.local_channel import LocalChannel
from edgeprune.measurement import Measurement, NodeTimes, Ratio, SessionHung, SessionLost, Timing
from edgeprune.transport import Session, open_session

pytestmark = pytest.mark.unit

FAULTY = """
import os, sys, time
NAME = "faulty"
def version(): return "1"
def load(path, options):
    if "crash" in path:
        print("something broke inside", flush=True)
        os.abort()
    if "hang" in path:
        time.sleep(600)
    if "refuse" in path:
        raise RuntimeError("operator Foo is not supported")
    if "nonsense" in path:
        os.write(WIRE, b"not json\\n")
    return path
def inputs(handle): return []
def outputs(handle): return []
def fill(handle, seed): pass
def run(handle):
    if "late" in handle:
        os._exit(3)
for name in sorted(os.listdir("/proc/self/fd"), key=int):
    try:
        if int(name) > 2 and "pipe" in os.readlink("/proc/self/fd/" + name):
            WIRE = int(name)
    except OSError:
        pass
"""


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    runner = tmp_path / "runner.py"
    runner.write_text(FAULTY)
    with LocalChannel(assemble({"faulty": runner}).text, "faulty") as channel:
        yield Session(channel, {}, silence_s=1.0)


def ended(session: Session) -> bool:
    assert isinstance(session.channel, LocalChannel)
    return session.channel._wire.ended


def test_crash_names_what_ran_and_the_last_words(session: Session) -> None:
    with pytest.raises(SessionLost, match="kernel 7: .* was ended by SIGABRT") as caught:
        session.load("kernel 7", Path("crash"))
    assert str(caught.value).endswith("its last words:\nsomething broke inside")
    assert ended(session)
    with pytest.raises(SessionLost):
        session.hello()


def test_crash_while_measuring_names_the_model(session: Session) -> None:
    session.load("good", Path("good"))
    session.load("bad", Path("late"))
    with pytest.raises(SessionLost, match="bad: the device program ended with exit code 3"):
        session.measure(["bad"], ["good"])
    assert session.busy_with == "bad"


def test_hang_is_ended_by_time_out(session: Session) -> None:
    begun = time.monotonic()
    with pytest.raises(SessionHung, match="slow one: no answer within 1 s"):
        session.load("slow one", Path("hang"))
    assert time.monotonic() - begun < 10
    assert ended(session)


def test_what_hangs_between_two_rounds_is_named() -> None:
    """Rounds don't tell which model runs; what the program has noted does."""
    kernel = {"name": "k", "type": "conv", "time_us": 40.0}
    spec = [{"name": "x", "dtype": "float32", "shape": [1, 4]}]
    document = {"schema": 1, "factor": 1.0, "offset_us": 2.0, "kernels": [kernel], "inputs": spec, "outputs": spec}
    with tempfile.TemporaryDirectory() as folder, open_session(load_device("null"), silence_s=2.0) as session:
        Path(folder, "m.json").write_text(json.dumps(document))
        pid = session.hello()["pid"]
        session.options["sleep_ms"] = 1.0
        session.load_all({key: Path(folder, "m.json") for key in ("a", "b")})

        def stopped(number: int) -> None:
            if number == 1:
                os.kill(pid, signal.SIGSTOP)

        endless = Timing(warmup_ms=0, burst_ms=0, min_rounds=1000, max_rounds=1000)
        with pytest.raises(SessionHung, match="^[ab]: no answer within 2 s"):
            session.measure(["a", "b"], timing=endless, on_round=stopped)
        assert session.busy_with in ("a", "b")


def test_nonsense_ends_the_session(session: Session) -> None:
    with pytest.raises(SessionLost, match="no JSON object"):
        session.load("x", Path("nonsense"))


def test_a_model_that_the_runtime_refuses_leaves_the_session_alive(session: Session) -> None:
    with pytest.raises(MeasurementError, match="odd: operator Foo is not supported") as caught:
        session.load("odd", Path("refuse"))
    assert not isinstance(caught.value, SessionLost)
    assert session.hello()["runner"] == "faulty"


def test_measuring_what_is_not_loaded(session: Session) -> None:
    with pytest.raises(MeasurementError, match="no model 'a' is loaded"):
        session.measure(["a"])


def test_nothing_stays_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_session(load_device("null")) as session:
        pid = session.hello()["pid"]
        folder = Path(session.channel.folder)
        raise KeyboardInterrupt
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_precision_that_the_device_lacks() -> None:
    with pytest.raises(InputError, match="no precision 'int8'"), open_session(load_device("null"), precision="int8"):
        pass


def test_a_file_outside_of_its_folder_is_not_fetched(session: Session, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="outside"):
        session.channel.get("/etc/hostname", tmp_path / "x", 100)


class Fake:
    """A channel in memory: answers of a function, nothing else."""

    folder = "/there"

    def __init__(self, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self.answer = answer
        self.asked: list[Mapping[str, Any]] = []

    def request(
        self, fields: Mapping[str, Any], silence_s: float, on_event: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        self.asked.append(fields)
        on_event({"event": "round", "round": 4})
        return {"id": fields["id"], **self.answer(fields)}

    def put(self, paths: Sequence[Path]) -> list[str]:
        return [f"/there/{path.name}" for path in paths]

    def get(self, remote: str, path: Path, num_bytes: int) -> None:
        path.write_bytes(np.arange(4, dtype=np.float32).tobytes())

    def close(self) -> None: ...


def test_requests_as_they_go_out() -> None:
    fake = Fake(lambda fields: {"inputs": [{"name": "x", "dtype": "float32", "shape": [1, 4]}], "outputs": []})
    loaded = Session(fake, {"threads": 2}).load("a", Path("m.onnx"), profile=True)
    assert fake.asked[0]["path"] == "/there/m.onnx"
    assert fake.asked[0]["options"] == {"threads": 2, "profile": True}
    assert loaded.inputs[0].shape == (1, 4)


def test_run_gives_arrays() -> None:
    fake = Fake(lambda fields: {"outputs": [{"path": "/there/out0.bin", "dtype": "float32", "shape": [2, 2]}]})
    (output,) = Session(fake, {}).run("a", [np.ones((1, 4), np.float32)])
    assert output.tolist() == [[0, 1], [2, 3]]
    assert fake.asked[0]["inputs"][0]["dtype"] == "float32"


def test_several_are_loaded_in_one_round_trip() -> None:
    """What one of them fails with is its own."""
    answers = [{"inputs": [], "outputs": []}, {"error": "operator Foo\x1b[2J", "key": "b"}]
    fake = Fake(lambda fields: {"answers": answers})
    loaded, failed = Session(fake, {}).load_all({"a": Path("a.onnx"), "b": Path("b.onnx")}, profile=True)
    assert [one["op"] for one in fake.asked] == ["many"]
    assert [one["path"] for one in fake.asked[0]["requests"]] == ["/there/a.onnx", "/there/b.onnx"]
    assert list(loaded) == ["a"]
    assert failed == {"b": "b: operator Foo?[2J"}  # nothing that moves a terminal's cursor


@pytest.mark.parametrize("answers", [None, [1, 2], [{}], [{}, {}, {}]])
def test_malformed_answers_to_many_are_refused(answers: object) -> None:
    with pytest.raises(MeasurementError, match="malformed|gave . answers to 2"):
        Session(Fake(lambda fields: {"answers": answers}), {}).unload("a", "b")


@pytest.mark.parametrize(
    "spec",
    [
        {"path": "/there/o", "dtype": "object", "shape": [1]},
        {"path": "/there/o", "dtype": "float32", "shape": [1 << 40]},
        {"path": "/there/o", "dtype": "float32", "shape": [-1]},
        {"path": "/there/o", "dtype": "float32", "shape": [3]},
        {"dtype": "float32", "shape": [4]},
    ],
)
def test_malformed_outputs_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(MeasurementError, match="output 0 is malformed"):
        Session(Fake(lambda fields: {"outputs": [spec]}), {}).run("a", [])


@pytest.mark.parametrize(
    "node", [{}, {"name": "a", "type": "b", "time_us": -1, "compute": True}, {"name": "a", "time_us": 1}, 7]
)
def test_malformed_nodes_are_refused(node: object) -> None:
    with pytest.raises(MeasurementError, match="malformed"):
        Session(Fake(lambda fields: {"nodes": [node], "total_us": 1.0}), {}).node_times("a")


def test_rounds_are_told_while_they_run() -> None:
    answer = {"times_us": {"a": [[1.0]]}, "rounds": {"a": [0]}, "modelled": True, "seconds": 1, "stopped_by": "rounds"}
    told: list[int] = []
    measured = Session(Fake(lambda fields: answer), {}).measure(["a"], on_round=told.append)
    assert told == [4]
    assert measured.modelled


@pytest.mark.parametrize(
    "change",
    [
        {"times_us": {"a": [[-1.0]]}},
        {"times_us": {"a": [[]]}},
        {"times_us": {"a": [["fast"]]}},
        {"times_us": {"a": []}},
        {"rounds": {"a": [0, 1]}},
        {"rounds": None},
    ],
)
def test_malformed_times_are_refused(change: dict[str, Any]) -> None:
    answer = {"times_us": {"a": [[1.0]]}, "rounds": {"a": [0]}, "modelled": True, "seconds": 1, "stopped_by": "rounds"}
    with pytest.raises(MeasurementError, match="malformed"):
        Session(Fake(lambda fields: answer | change), {}).measure(["a"])


def test_ratio_and_disturbed_rounds() -> None:
    times = {"a": [[10.0] * 3, [10.4] * 3, [30.0] * 3, [9.6] * 3], "ref": [[5.0], [5.2], [9.0], [4.8]]}
    measured = Measurement(times_us=times, rounds={"a": [0, 1, 2, 3], "ref": [0, 1, 2, 3]}, references=("ref",))
    assert measured.disturbed() == {2}
    assert measured.ratio("a", without=measured.disturbed()).value == pytest.approx(2.0)
    assert len(measured.runs_us("a", measured.disturbed())) == 9
    assert measured.percentile_us("ref", 50) == pytest.approx(5.1)
    with pytest.raises(MeasurementError):
        Ratio.of([])


def test_compute_time_leaves_layout_changes_out() -> None:
    nodes = [
        {"name": "r", "type": "Reorder", "time_us": 10.0, "compute": False},
        {"name": "c", "type": "Convolution", "time_us": 30.0, "compute": True},
    ]
    times = NodeTimes(nodes=tuple(nodes), total_us=45.0)
    assert times.compute_us == 30.0
    assert times.within(44.0) == 30.0
    assert times.within(36.0) == pytest.approx(27.0)  # the average of the nodes was disturbed


def test_options_reach_the_runner() -> None:
    device = Device(name="n", backend="null", options={"noise": 0.5, "seed": 3})
    with open_session(device) as session:
        assert session.options["noise"] == 0.5
        assert session.options["threads"] == 1
    assert Timing().to_json()["warmup_ms"] == 200.0
