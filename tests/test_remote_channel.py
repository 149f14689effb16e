"""Remote devices but for the network: the lock, the models' cache, files, and a device that answers what it likes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune import remote_channel, wire
from edgeprune.device_store import Store
from edgeprune.errors import DeviceError, EdgepruneError, MeasurementError, StorageError
from edgeprune.measurement import SessionHung, SessionLost, Timing
from edgeprune.remote_channel import RemoteChannel, Sent
from tests.remote_devices import Here, channel, far, interpreters, null_program, session

pytestmark = [pytest.mark.contract, pytest.mark.timed]

SPEC = [{"name": "x", "dtype": "float32", "shape": [1, 4]}]
QUICK = Timing(warmup_ms=0, burst_ms=0, min_rounds=2, max_rounds=2)


def model(folder: Path, name: str = "m", time_us: float = 40.0, padding: int = 0) -> Path:
    """A model of the null device that takes so long, and has so many bytes more."""
    kernel = {"name": "k", "type": "conv", "time_us": time_us}
    document = {"schema": 1, "factor": 1.0, "offset_us": 2.0, "kernels": [kernel], "inputs": SPEC, "outputs": SPEC}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document) + " " * padding)
    return path


def runs(pid: int) -> bool:
    """Whether a process is more than an entry that nobody has asked after yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def there(tmp_path: Path) -> Iterator[RemoteChannel]:
    with channel(far(tmp_path / "far")) as opened:
        yield opened


@pytest.mark.parametrize(("version", "python"), interpreters(), ids=lambda value: str(value))
def test_the_whole_conversation(version: str, python: str | None, tmp_path: Path) -> None:
    """Sent over, started, answered; under every Python that a device may have."""
    if python is None:
        pytest.skip(f"no Python {version} under ~/.pyenv/versions")
    program = null_program()
    device = far(tmp_path / "far", python=python)
    with channel(device, program) as opened:
        asking = session(opened)
        hello = asking.hello()
        assert (hello["program"], hello["python"]) == (program.hash, opened.python)
        loaded, failed = asking.load_all({"a": model(tmp_path, "a"), "b": model(tmp_path, "b", 60.0)})
        assert (list(loaded), failed) == (["a", "b"], {})
        measured = asking.measure(["b"], ["a"], timing=QUICK)
        assert measured.ratio("b").value == pytest.approx(62 / 42)
        assert asking.node_times_of(["a", "b"])["b"].compute_us == 60.0
        (output,) = asking.run("a", [np.ones((1, 4), np.float32)])
        assert output.tolist() == [[0.0] * 4]
        asking.unload("a", "b")
    assert {path.name for path in (tmp_path / "far").iterdir()} == {"programs", "models", "lock", "owner", "scratch"}
    assert (tmp_path / "far").stat().st_mode & 0o777 == 0o700


def test_program_and_models_are_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, device, path = null_program(), far(tmp_path / "far"), model(tmp_path)
    asked: list[str] = []
    real = RemoteChannel._ask

    def ask(self: RemoteChannel, fields: Any, *rest: Any) -> Any:
        asked.append(fields["op"])
        return real(self, fields, *rest)

    monkeypatch.setattr(RemoteChannel, "_ask", ask)
    for _ in range(2):
        with channel(device, program) as opened:
            session(opened).load("a", path)
    assert asked == ["missing", "put", "missing"]
    (stored,) = (tmp_path / "far" / "programs").iterdir()
    stored.write_text("damaged")
    with channel(device, program) as opened:
        assert opened.put([path]) == [str(tmp_path / "far" / "models" / Sent.of(path).key / "model.json")]
    assert stored.read_text() == program.text


def test_files_beside_a_model_go_with_it(there: RemoteChannel, tmp_path: Path) -> None:
    (tmp_path / "net.xml").write_text("<net/>")
    (tmp_path / "net.bin").write_bytes(b"weights")
    (tmp_path / "net.onnx").write_bytes(b"the same once more")
    (stored,) = there.put([tmp_path / "net.xml"])
    assert sorted(path.name for path in Path(stored).parent.iterdir()) == ["model.bin", "model.xml"]
    assert Path(stored).with_suffix(".bin").read_bytes() == b"weights"
    (tmp_path / "net.bin").write_bytes(b"others")
    assert there.put([tmp_path / "net.xml"]) != [stored]


def test_oldest_models_make_room_but_not_those_in_use(tmp_path: Path) -> None:
    """16 MB, models of 5: the fourth drives out the one that was used least lately; a loaded one stays."""
    paths = [model(tmp_path, f"m{n}", time_us=n + 1, padding=5 << 20) for n in range(6)]
    with channel(far(tmp_path / "far", cache_mb=16)) as opened:
        asking = session(opened)
        asking.load("first", paths[0])
        for path in paths[1:3]:
            opened.put([path])
            time.sleep(0.01)
        opened.put([paths[1]])  # used again
        opened.put([paths[3]])
        here = {path.name for path in (tmp_path / "far" / "models").iterdir()}
        assert here == {Sent.of(paths[n]).key for n in (0, 1, 3)}
        assert asking.measure(["first"], timing=QUICK).percentile_us("first") == 3.0
        opened.put(paths)  # more than there is room for: what was asked for together stays together
        assert len(list((tmp_path / "far" / "models").iterdir())) == 6


def test_a_full_disk_over_there_is_said_and_the_talk_goes_on(tmp_path: Path) -> None:
    """The bytes that can't be kept are taken off the line, so that the next request is understood."""
    with channel(far(tmp_path / "far")) as opened:
        session(opened).hello()
        models = tmp_path / "far" / "models"
        models.rmdir()
        models.write_text("a file where the folder should be, since nobody is refused anything as root")
        with pytest.raises(StorageError, match="device 'far': cannot write .*models: .*; free some space there"):
            opened.put([model(tmp_path, padding=3 << 20)])
        assert session(opened).hello()["runner"] == "null"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "far").write_text("")
    with pytest.raises(StorageError, match="cannot write .*far/?: .*; free some space there, or set 'folder'"):
        channel(far(tmp_path / "far"))


def test_an_interpreter_that_is_not_there_is_said(tmp_path: Path) -> None:
    device = far(tmp_path / "far", python="no-such-python")
    with pytest.raises(DeviceError, match="can't run 'no-such-python' .*No such file.*set 'python' in its entry") as no:
        RemoteChannel(device, Here("/usr/bin/env"), null_program(), "null")
    assert no.value.exit_code == 4


def test_a_device_is_measured_by_one_at_a_time(tmp_path: Path) -> None:
    device = far(tmp_path / "far")
    with channel(device):
        with pytest.raises(DeviceError, match=f"is being measured by process {os.getpid()} of .*since.*--wait"):
            channel(device)
        told: list[str] = []
        with pytest.raises(DeviceError, match="is being measured by"):
            channel(device, wait_s=0.5, on_wait=told.append)
        assert len(told) == 1
    channel(device, wait_s=None).close()


def test_what_this_process_left_behind_is_ended(tmp_path: Path) -> None:
    """As after a cut that the device has not noticed: the network is down, its side of the connection stands."""
    device = far(tmp_path / "far", options={})
    first = channel(device)
    pid = session(first).hello()["pid"]
    remote_channel.ABANDONED.append(first._client)
    with channel(device, wait_s=0.0) as second:
        assert session(second).hello()["pid"] != pid
    assert not runs(pid)
    assert first._wire.ended
    first.close()


def test_lock_goes_with_the_process(tmp_path: Path) -> None:
    device = far(tmp_path / "far")
    with channel(device) as opened:
        os.kill(session(opened).hello()["pid"], signal.SIGKILL)
        with pytest.raises(SessionLost, match="hello: the device program was ended by SIGKILL"):
            session(opened).hello()
        channel(device, wait_s=5.0).close()


def test_a_program_whose_host_is_gone_ends_even_while_it_hangs(tmp_path: Path) -> None:
    with channel(far(tmp_path / "far")) as opened:
        asking = session(opened, sleep_ms=600_000)
        pid = asking.hello()["pid"]
        asking.load("slow", model(tmp_path))
        asking.silence_s = 0.3
        with pytest.raises(SessionHung, match="slow: no answer within 0.3 s"):
            asking.measure(["slow"], timing=QUICK)
    deadline = time.monotonic() + 20
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(pid)


def test_what_hangs_between_two_rounds_is_named(tmp_path: Path) -> None:
    """Rounds don't tell which model runs; the program's note does, when its guard has ended it."""
    with channel(far(tmp_path / "far")) as opened:
        asking = session(opened, sleep_ms=1.0)
        pid = asking.hello()["pid"]
        asking.load_all({"a": model(tmp_path, "a"), "b": model(tmp_path, "b")})
        asking.silence_s = 2.0

        def stopped(number: int) -> None:
            if number == 1:
                os.kill(pid, signal.SIGSTOP)

        with pytest.raises(SessionHung, match="^[ab]: no answer within 2 s") as hung:
            asking.measure(["a", "b"], timing=replace(QUICK, min_rounds=1000, max_rounds=1000), on_round=stopped)
        assert asking.busy_with in ("a", "b")
        assert hung.value.key == asking.busy_with
        assert not runs(pid)


def test_a_crash_between_two_rounds_is_named(tmp_path: Path) -> None:
    with channel(far(tmp_path / "far")) as opened:
        asking = session(opened, sleep_ms=1.0)
        pid = asking.hello()["pid"]
        asking.load_all({"a": model(tmp_path, "a"), "b": model(tmp_path, "b")})

        def killed(number: int) -> None:
            if number == 1:
                os.kill(pid, signal.SIGSEGV)

        with pytest.raises(SessionLost, match="^[ab]: the device program was ended by SIGSEGV"):
            asking.measure(["a", "b"], timing=replace(QUICK, min_rounds=1000, max_rounds=1000), on_round=killed)
        assert asking.busy_with in ("a", "b")


def test_a_chatty_login_shell_is_read_over(tmp_path: Path) -> None:
    device = far(tmp_path / "far")
    chatty = Here("/bin/sh", "-c", 'echo "Welcome to Jetson"; echo; exec "$@"', "sh")
    with RemoteChannel(device, chatty, null_program(), "null") as opened:
        assert session(opened).hello()["runner"] == "null"
    endless = Here("/bin/sh", "-c", "yes welcome", "sh")
    with pytest.raises(DeviceError, match="answers something else .* 'welcome'.*login shell"):
        RemoteChannel(device, endless, null_program(), "null")


LIAR = """
import json, os, sys
text = b"".join(iter(lambda: os.read(0, 1), bytes(1)))
config = json.loads(sys.stdin.readline())
say = lambda message: print(config["nonce"], json.dumps(message), flush=True)
boot = {"have": True, "folder": "/f", "scratch": "/f/scratch", "boot_id": "1", "python": "3.11", "executable": "/p"}
"""


def liar(tmp_path: Path, answer: str) -> RemoteChannel:
    """A device whose program is these lines of Python."""
    script = tmp_path / "liar.py"
    script.write_text(LIAR + answer)
    device = far(tmp_path / "far", timeout_s=10.0)
    return RemoteChannel(device, Here(sys.executable, str(script)), null_program(), "null")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("say([1])", "no JSON object"),
        ("print(config['nonce'], '{' * 100000, flush=True)", "no JSON object"),
        ("say({'have': True})", "no proper 'scratch'"),
        ("say({**boot, 'scratch': 'a\\x1b[2Jb'})", "no proper 'scratch'"),
        ("say({'error': 'a\\x1b[2Jb', 'kind': 'odd'})", r"a\?\[2Jb"),
        ("say({**boot, 'have': False}); say({'no': 1}); sys.stdin.read()", "did not take the device program"),
        ("sys.exit(3)", "ended with exit code 3"),
    ],
)
def test_a_device_that_lies_from_the_start(answer: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match=error):
        liar(tmp_path, answer)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("garbage", "no JSON object"),
        ('{"id": 7}', "answered request 7, not 1"),
        ('{"id": "\\u001b[2J"}', r"answered request '.x1b\[2J', not 1"),
        ('{"id": 1, "answers": NaN}', "no JSON object"),
        ("[" * 100000, "no JSON object"),
        ("x" * 3000, "no JSON object"),
        ("y" * 300_000, "longer than"),
        ('{"event": "alive"}', "talks without end"),
    ],
)
def test_a_device_that_answers_what_it_likes(
    answer: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_LINE", 200_000)
    monkeypatch.setattr(wire, "MAX_TALK", 200_000)
    script = f"say(boot)\nsys.stdin.readline()\nwhile True: print({answer!r}, flush=True)"
    with liar(tmp_path, script) as opened, pytest.raises(MeasurementError, match=error):
        session(opened).hello()


@pytest.mark.parametrize(
    ("path", "given", "error"),
    [
        ("/etc/passwd", {}, "outside of its folder: /etc/passwd"),
        ("/f/scratch/../../etc/passwd", {}, "outside of its folder"),
        ("/f/scratch/o", {"size": 1 << 60, "data": ""}, "sends 1152921504606846976 bytes where 16 are expected"),
        ("/f/scratch/o", {"size": 4, "data": "QUFBQUFBQUE="}, "sends 4 bytes where 16 are expected"),
        ("/f/scratch/o", {"size": 16, "data": ""}, "less than it says"),
        ("/f/scratch/o", {"size": 16, "data": "!"}, "malformed"),
        ("/f/scratch/o", {}, "malformed"),
    ],
)
def test_files_that_a_device_gives(path: str, given: dict[str, Any], error: str, tmp_path: Path) -> None:
    script = f"say(boot)\nwhile sys.stdin.readline(): print({json.dumps(given | {'id': 0})!r}, flush=True)"
    with liar(tmp_path, script) as opened, pytest.raises(MeasurementError, match=error):
        opened.get(path, tmp_path / "out", 16)
    assert not (tmp_path / "out").exists() or (tmp_path / "out").stat().st_size <= 16


def test_a_model_that_a_device_did_not_have_to_ask_for(tmp_path: Path) -> None:
    script = """say(boot)\nsys.stdin.readline()\nprint('{"id": 0, "missing": ["../../etc/passwd"]}', flush=True)"""
    with liar(tmp_path, script) as opened, pytest.raises(MeasurementError, match="'missing' is malformed"):
        opened.put([model(tmp_path)])


def test_a_device_that_reads_nothing(tmp_path: Path) -> None:
    """What is sent to it fits into no buffer."""
    script = "say(boot)\nimport time\ntime.sleep(60)"
    with liar(tmp_path, script) as opened:
        asking = session(opened)
        asking.silence_s = 0.5
        with pytest.raises(SessionHung, match="no answer within 0.5 s"):
            asking.request("hello", padding="x" * 4_000_000)


@pytest.mark.parametrize("key", ["../models", "", "a" * 63, "A" * 64, "a" * 64 + "\n", "a/" * 32])
def test_a_store_takes_names_that_are_hashes_only(key: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    store = Store(str(tmp_path), 1 << 20, lambda size: b"x" * size)
    with pytest.raises(ValueError, match="is no name of a model"):
        store.place(key)


@pytest.mark.parametrize("suffix", ["/../../x", "..", ".a/b", ".json\n", ".a.b.c.d"])
def test_a_store_takes_suffixes_of_models_only(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    store = Store(str(tmp_path), 1 << 20, lambda size: b"x" * size)
    files = [{"suffix": suffix, "size": 3, "sha256": "0" * 64}]
    with pytest.raises(ValueError, match="is no suffix of a model"):
        store.put([{"key": "a" * 64, "files": files}], set())
    assert list((tmp_path / "models").iterdir()) == []


def test_a_store_gives_its_own_files_only(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "scratch" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "scratch" / "out").write_text("o")
    store = Store(str(tmp_path), 1 << 20, lambda size: b"")
    assert store.given(str(tmp_path / "scratch" / "out"), 0) == {"size": 1, "data": "bw=="}
    for path in ("secret", "scratch/link", "scratch/../secret", "/etc/passwd"):
        with pytest.raises(ValueError, match="is outside of"):
            store.given(str(tmp_path / path), 0)
