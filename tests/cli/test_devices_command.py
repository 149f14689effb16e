"""`edgeprune devices` and `doctor --device` at the command line, on this machine and over a real ssh to it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeprune.cli import main
from edgeprune.device_state import Tree, board_facts
from edgeprune.errors import MeasurementError
from edgeprune.transport import open_session
from tests.backends.test_trtexec_double import double
from tests.sshd import Sshd, running_sshd, why_not
from tests.synthetic_machines import program

pytestmark = [pytest.mark.integration, pytest.mark.timed]

__all__ = ["double"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


def test_a_preset_is_added_shown_and_removed(capsys: Capture, folders: Path) -> None:
    assert main(["devices", "add", "jetson", "--host", "me@orin", "--set", "power_mode=MAXN"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# {folders}/config/devices.yaml\njetson:\n") and "  host: me@orin\n" in shown
    assert "power_mode: MAXN" in shown and "roofline" not in shown
    assert shown.endswith("# next: edgeprune doctor --device jetson\n")
    assert main(["devices", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["devices"]}
    assert (rows["jetson"]["at_hand"], rows["jetson"]["modelled"], rows["jetson"]["host"]) == (True, False, "me@orin")
    assert (rows["jetson-orin-nano"]["at_hand"], rows["jetson-orin-nano"]["allow_modelled"]) == (False, True)
    assert main(["devices", "list"]) == 0
    listed = capsys.readouterr().out
    assert "jetson                measured  ssh        tensorrt on me@orin" in listed
    assert "edgeprune devices add jetson-orin-nano --host USER@HOST, or modelled from its data sheet" in listed
    assert main(["devices", "remove", "jetson", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == "jetson"
    assert main(["devices", "show", "jetson"]) == 0
    assert "# no way to it yet: edgeprune devices add jetson --host USER@HOST" in capsys.readouterr().out
    assert main(["devices", "show", "jetson", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["own"], entry["entry"]["power_mode"], entry["entry"]["sparse"]) == (False, "15W", True)


def test_faults_are_one_line_and_exit_code_2(capsys: Capture) -> None:
    assert main(["devices", "add", "jetson", "--host", "-oProxyCommand=ls"]) == 2
    assert "error: device 'jetson' was not written" in capsys.readouterr().err
    assert main(["devices", "add", "jetson", "--set", "threads"]) == 2
    assert "--set takes key=value" in capsys.readouterr().err
    assert main(["devices", "remove", "jetson"]) == 2
    assert main(["devices", "probe", "jetson"]) == 4
    assert "edgeprune devices add jetson --host USER@HOST" in capsys.readouterr().err
    assert main(["doctor", "--self-test"]) == 2


def test_the_doctor_of_a_preset_says_what_to_set(capsys: Capture) -> None:
    assert main(["doctor", "--device", "jetson"]) == 4
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("BROKEN   entry  jetson-orin-nano: ssh, no host, tensorrt, fp16; ")
    assert "edgeprune devices add jetson --host USER@HOST" in line


def test_this_machine_is_probed_and_tested(capsys: Capture, require: object) -> None:
    require("openvino")  # type: ignore[operator]
    assert main(["devices", "probe", "host-openvino"]) == 0
    assert "runtime openvino" in capsys.readouterr().out
    assert main(["doctor", "--device", "host-openvino", "--self-test", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"entry", "reached", "runtime openvino", "disk", "builds", "computes", "times", "precision"} <= set(checks)
    assert "GFLOPS" in checks["times"]["found"] and checks["precision"]["found"] == "100% fp32"
    assert checks["table fp32"]["fix"] == "nothing is measured yet: edgeprune profile --device host-openvino"


def test_tensorrt_against_a_double_of_trtexec(capsys: Capture, double: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Jetson's owner would see; every number comes from the double's formula."""
    double(dialect="10.3")  # type: ignore[operator]
    orin = [
        "--like",
        "host-tensorrt",
        "--set",
        "sparse=true",
        "--set",
        "options.burst_ms=1",
        "--set",
        "options.warmup_ms=1",
    ]
    assert main(["devices", "add", "orin", *orin]) == 0
    capsys.readouterr()
    code = main(["doctor", "--device", "orin", "--self-test", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["runtime tensorrt"]["found"].startswith("10.3") and "fp16" in checks["builds"]["found"]
    assert "of the time of the dense conv 256>256" in str(checks["2:4"]), checks["2:4"]
    assert code in (0, 1)
    monkeypatch.setenv("TRTEXEC", "/none")
    assert main(["doctor", "--device", "orin"]) == 5
    assert "no trtexec" in capsys.readouterr().out


def test_over_ssh(capsys: Capture, sshd: Sshd, folders: Path) -> None:
    """The same questions, and what goes wrong on the way with the line that mends it."""
    settings = [f"ssh_config={sshd.config}", f"folder={folders}/far", "power_mode=15W"]
    pairs = [word for pair in settings for word in ("--set", pair)]
    assert main(["devices", "add", "far", "--like", "null", "--host", "edgeprune-test", *pairs]) == 0
    capsys.readouterr()
    assert main(["devices", "probe", "far", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["kernel"] and told["runtimes"]["null"]["version"] == "1"
    assert main(["doctor", "--device", "far"]) == 0
    shown = capsys.readouterr().out
    assert "entry" in shown and "ssh, edgeprune-test, null" in shown
    assert "differs  power mode" in shown and "sudo nvpmodel -m ID" in shown
    sshd.forget_host_key()
    from edgeprune.ssh_link import _links

    for link in list(_links.values()):
        link.close()
    try:
        assert main(["doctor", "--device", "far"]) == 4
        assert "the host key of edgeprune-test is not known here" in capsys.readouterr().out
    finally:
        sshd.know_host_key()
    assert main(["devices", "add", "far", "--set", "python=python3.none"]) == 0
    capsys.readouterr()
    assert main(["doctor", "--device", "far"]) == 4
    assert "set 'python' in its entry to an interpreter of 3.8 or later" in capsys.readouterr().out


def test_clocks_go_back_when_the_connection_is_cut(sshd: Sshd, folders: Path, require: object) -> None:
    """A stand-in of `jetson_clocks` writes down its calls; the cut kills sshd and the device program over there."""
    require("openvino")  # type: ignore[operator]
    calls, there = folders / "calls", folders / "there"
    there.mkdir()
    program(there / "jetson_clocks", f'echo "$1" >> {calls}; test "$1" = --store && touch "$2"; exit 0')
    program(there / "sudo", 'shift; exec "$@"')
    program(there / "python", f'PATH="{there}:$PATH" exec "{sys.executable}" "$@"')
    device = sshd.device("clocked", backend="openvino", python=str(there / "python"), lock_clocks=True)
    with pytest.raises(MeasurementError), open_session(device) as session:
        assert session.hello()["board"] == board_facts(Tree())
        assert calls.read_text() == "--store\n\n"
        assert sshd.cut() > 0
        session.hello()
    assert within(30, lambda: calls.read_text() == "--store\n\n--restore\n")
    with open_session(device):  # and they are held again
        pass
    assert within(30, lambda: calls.read_text() == 2 * "--store\n\n--restore\n")


def within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()
