"""The way to a device through `adb`: a board with Linux, or a phone, that has a Python which adb's shell may start.

`adb shell -T` carries stdin, stdout and the exit code as they are (its protocol of 2016, `shell_v2`). What belongs to
Termux runs as Termux does, by `run-as`, which Android allows for builds of it that can be debugged.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from edgeprune.device import Device
from edgeprune.errors import DeviceError, DeviceUnreachable
from edgeprune.machine import printable
from edgeprune.measurement import ConnectionLost, SessionLost
from edgeprune.remote_channel import quoted

TERMUX = "/data/data/com.termux/"
ANSWER_SECONDS = 20
STATES = {
    "unauthorized": "unlock it and accept this computer's key",
    "offline": "plug it in again, or restart it",
    "no permissions": "this user may not open its USB port: udev rules (developer.android.com/studio/run/device)",
}


class AdbLink:
    """A `Link` of `adb`, whose server holds the connection."""

    def __init__(self, device: Device) -> None:
        self.device = device.name
        self._adb = ["adb", *(("-s", device.serial) if device.serial else ())]
        self._as_termux = device.python.startswith(TERMUX)

    def command(self, words: Sequence[str]) -> list[str]:
        self._check()
        return [*self._adb, "shell", "-T", quoted([*(("run-as", "com.termux") if self._as_termux else ()), *words])]

    def explain(self, doing: str, code: int | None, said: str) -> SessionLost | None:
        """adb ends with 1 or 255 when the device is gone, and says so."""
        if code is not None and code >= 0 and self._state()[0] == 0:
            return None
        last = said.splitlines()[-1] if said else "adb was ended"
        return ConnectionLost(f"{doing}: the connection to device '{self.device}' (adb) is lost: {last}")

    def _check(self) -> None:
        code, said = self._state()
        if code == 0:
            return
        tried = f"device '{self.device}' can't be reached: `{quoted([*self._adb, 'get-state'])}` said: {said}"
        for word, advice in STATES.items():
            if word in said:
                raise DeviceError(f"{tried}; {advice}")
        if "more than one device" in said:
            raise DeviceError(f"{tried}; set 'serial' in its entry of devices.yaml (`adb devices` lists them)")
        raise DeviceUnreachable(f"{tried}; is it plugged in, with USB debugging on? `adb devices` lists what is there")

    def _state(self) -> tuple[int, str]:
        """Exit code and last line of `adb get-state`."""
        try:
            done = subprocess.run(
                [*self._adb, "get-state"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=ANSWER_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 1, f"no answer within {ANSWER_SECONDS} s"
        except FileNotFoundError:
            raise DeviceError(
                f"device '{self.device}' is reached by adb, which is not installed: apt-get install adb, or the "
                "platform tools of developer.android.com"
            ) from None
        lines = printable(done.stdout[-4000:].decode(errors="replace")).strip().splitlines()
        said = lines[-1] if lines else "nothing"
        return (done.returncode if said == "device" else done.returncode or 1), said
