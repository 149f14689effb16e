"""Devices over adb, against a *synthetic* adb: no phone and no board was asked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from edgeprune.adb_link import AdbLink
from edgeprune.device import Device
from edgeprune.errors import DeviceError, DeviceUnreachable
from edgeprune.kernel import Kernel
from edgeprune.profiling import profile
from edgeprune.transport import open_session

pytestmark = pytest.mark.contract


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that the synthetic adb reaches."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = Path(__file__).with_name("synthetic_adb.py").read_text().split("\n", 1)[1]
    (tools / "adb").write_text(f"#!{sys.executable}\n{script}")
    (tools / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return Device(
        name="board",
        transport="adb",
        serial="board",
        backend="null",
        python=sys.executable,
        folder=str(tmp_path / "far"),
        timeout_s=20.0,
    )


def test_synthetic_adb_profiles(board: Device, tmp_path: Path) -> None:
    kernels = [Kernel(operator="linear", c_in=8 * n, c_out=64) for n in range(1, 4)]
    assert len(profile(kernels, board, table_path=tmp_path / "t.jsonl")) == 3


def test_words_reach_the_shell_over_there_as_words(board: Device) -> None:
    *before, line = AdbLink(board).command([sys.executable, "-c", "print('$HOME; `id`')"])
    assert before == ["adb", "-s", "board", "shell", "-T"]
    assert line == f"{sys.executable} -c 'print('\"'\"'$HOME; `id`'\"'\"')'"


def test_what_belongs_to_termux_runs_as_termux(board: Device) -> None:
    python = "/data/data/com.termux/files/usr/bin/python"
    words = AdbLink(board.model_copy(update={"python": python})).command([python, "-I"])
    assert words[-1] == f"run-as com.termux {python} -I"


@pytest.mark.parametrize(
    ("state", "error", "says"),
    [
        ("device unauthorized.", DeviceError, "unlock it and accept"),
        ("device offline", DeviceError, "restart it"),
        ("more than one device/emulator", DeviceError, "set 'serial'"),
        ("no devices/emulators found", DeviceUnreachable, "USB debugging"),
    ],
)
def test_unreachable_says_what_to_do(
    state: str, error: type[DeviceError], says: str, board: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHETIC_ADB_STATE", state)
    match = f"device 'board' can't be reached: `adb -s board get-state` said: .*{says}"
    with pytest.raises(error, match=match) as no, open_session(board):
        pass
    assert no.value.exit_code == 4


def test_adb_that_is_not_installed(board: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("adb") is None
    with pytest.raises(DeviceError, match="adb, which is not installed: apt-get install adb"), open_session(board):
        pass
