"""Clocks are held while something is measured and go back whatever ends the program; machines are *synthetic*."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.cli import main
from edgeprune.device_clocks import Clocks
from edgeprune.device_state import Tree
from tests.synthetic_machines import JETSON, Machine, path_with, program
from tests.test_bundle import make

pytestmark = [pytest.mark.unit, pytest.mark.timed]

GOVERNOR = "sys/devices/system/cpu/cpufreq/policy%d/scaling_governor"
CPUS = Machine(files={GOVERNOR % 0: "schedutil\n", GOVERNOR % 1: "powersave\n", GOVERNOR % 2: "performance\n"})
SMI = """
echo "$@" >> CALLS
case "$1" in -L) echo GPU 0;; --query-gpu=*) echo 2520;; -lgc) exit LOCK;; esac
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with `sudo -n` that needs no password, and a folder of its own for the lock."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "sudo", 'shift; exec "$@"')
    monkeypatch.setenv("PATH", path_with(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def governors(root: Path) -> list[str]:
    return [(root / (GOVERNOR % index)).read_text().strip() for index in range(3)]


def test_governors_are_set_and_put_back(folder: Path) -> None:
    root = CPUS.written(folder)
    clocks = Clocks(Tree(str(root)))
    assert clocks.hold() == ["cpufreq governor performance"]
    assert governors(root) == ["performance"] * 3
    assert clocks.hold() == []  # they are held already
    clocks.release()
    assert governors(root) == ["schedutil", "powersave", "performance"]
    clocks.release()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_they_go_back_when_the_program_is_killed(folder: Path, how: signal.Signals) -> None:
    root = CPUS.written(folder)
    script = (
        "import sys, time; from edgeprune.device_clocks import Clocks; from edgeprune.device_state import Tree\n"
        f"clocks = Clocks(Tree({str(root)!r})); print(clocks.hold(), flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    assert child.stdout is not None and b"performance" in child.stdout.readline()
    assert governors(root) == ["performance"] * 3
    os.killpg(child.pid, how)  # the guard is in a session of its own
    child.wait(30)
    child.stdout.close()
    deadline = time.monotonic() + 30
    while governors(root) != ["schedutil", "powersave", "performance"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert governors(root) == ["schedutil", "powersave", "performance"]


def test_a_jetson_by_jetson_clocks(folder: Path) -> None:
    calls = folder / "calls"
    program(folder / "bin" / "jetson_clocks", f'echo "$1" >> {calls}; test "$1" = --store && touch "$2"; exit 0')
    clocks = Clocks(Tree(str(JETSON.written(folder))))
    assert clocks.hold() == ["jetson_clocks"]
    assert calls.read_text() == "--store\n\n"
    clocks.release()
    assert calls.read_text() == "--store\n\n--restore\n"
    assert not list(folder.glob("edgeprune-clocks-*[!k]"))  # what was stored is gone, the lock stays


def test_a_card_by_nvidia_smi(folder: Path) -> None:
    calls = folder / "calls"
    program(folder / "bin" / "nvidia-smi", SMI.replace("CALLS", str(calls)).replace("LOCK", "0"))
    clocks = Clocks(Tree(str(folder / "none")))
    assert clocks.hold() == ["nvidia-smi -lgc 2520"]
    clocks.release()
    assert [line for line in calls.read_text().splitlines() if "gc" in line] == ["-lgc 2520,2520", "-rgc"]


def test_without_rights_nothing_stays_changed_and_the_line_to_run_is_told(folder: Path) -> None:
    calls = folder / "calls"
    root = CPUS.written(folder)
    program(folder / "bin" / "nvidia-smi", SMI.replace("CALLS", str(calls)).replace("LOCK", "4"))
    with pytest.raises(
        RuntimeError, match=r"can't be held \(exit code 4\): run `sudo nvidia-smi -lgc 2520,2520` there"
    ):
        Clocks(Tree(str(root))).hold()
    assert governors(root) == ["schedutil", "powersave", "performance"]
    program(folder / "bin" / "jetson_clocks", "echo Error: Need to be root; exit 1")
    with pytest.raises(
        RuntimeError, match=r"\(Error: Need to be root\): run `sudo jetson_clocks --store && sudo jetson"
    ):
        Clocks(Tree(str(root))).hold()


def test_a_machine_whose_clocks_nobody_sets(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no jetson_clocks, no NVIDIA card, no cpufreq"):
        Clocks(Tree(str(folder / "none"))).hold()


def test_two_runs_do_not_undo_one_another(folder: Path) -> None:
    tree = Tree(str(CPUS.written(folder)))
    first, second = Clocks(tree), Clocks(tree, wait_s=0.1)
    first.hold()
    with pytest.raises(RuntimeError, match="another run holds the clocks"):
        second.hold()
    first.release()
    second.hold()
    second.release()
    assert governors(Path(tree.root)) == ["schedutil", "powersave", "performance"]


@pytest.mark.integration
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_bundle_is_measured_with_held_clocks(
    command: str, folder: Path, require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in of `jetson_clocks`; each of the two processes that measure holds them and puts them back."""
    require("onnxruntime")
    monkeypatch.setenv("TMPDIR", str(folder))
    bundle = make(folder / "net", "host-onnxruntime", budget=None).folder
    calls = folder / "calls"
    program(folder / "bin" / "jetson_clocks", f'echo "$1" >> {calls}; test "$1" = --store && touch "$2"; exit 0')
    fast = ["--duration-s", "1", "--warmup-ms", "1", "--min-iters", "8"]
    measured = (0, 6)  # or found too noisy, which is no matter here
    assert main([command, str(bundle), *fast]) in measured and not calls.exists()
    assert main([command, str(bundle), "--lock-clocks", *fast]) in measured
    wanted, deadline = 2 * "--store\n\n--restore\n", time.monotonic() + 30
    while calls.read_text() != wanted and time.monotonic() < deadline:  # the guard undoes it after the program's end
        time.sleep(0.05)
    assert calls.read_text() == wanted
