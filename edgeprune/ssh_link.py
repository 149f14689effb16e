"""The way to a device through the system's `ssh`: its config, agent, jump hosts and known hosts; one connection.

The connection is a master (`ssh -M -N -f`) with its socket in a private folder; each session is a channel of it, so
that nothing is negotiated twice. It goes when this process ends, or when nothing has used it for a while. There is no
way to give a password, and a host key is never accepted here.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgeprune.device import Device
from edgeprune.errors import DeviceError, DeviceUnreachable
from edgeprune.machine import printable
from edgeprune.measurement import ConnectionLost, SessionLost
from edgeprune.remote_channel import quoted

CONNECT_SECONDS = 15
PERSIST_SECONDS = 300
ALIVE_COUNT = 3
OPTIONS = (
    "BatchMode=yes",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
    "LogLevel=INFO",
)
LOST = 255  # what ssh ends with when it is not the remote command that did

_links: dict[tuple[object, ...], SshLink] = {}
_lock = threading.Lock()


def ssh_link(device: Device) -> SshLink:
    """The link to a device, which all its sessions share, and with it the connection."""
    where = (device.name, device.host, device.user, device.port, device.ssh_config)
    with _lock:
        if where not in _links:
            _links[where] = SshLink(device)
        return _links[where]


class SshLink:
    """A connection that is made when it is first needed, and again when it is gone."""

    def __init__(self, device: Device) -> None:
        assert device.host is not None
        self.host = device.host
        self.device = device.name
        self.timeout_s = device.timeout_s
        self._where = _where(device)
        self._folder: Path | None = None
        self._lock = threading.Lock()

    @property
    def socket(self) -> Path:
        """Of the master; short, since a path to a socket has at most about 100 characters."""
        if self._folder is None:
            short = "/tmp" if os.access("/tmp", os.W_OK) else None
            self._folder = Path(tempfile.mkdtemp(prefix="ep-", dir=short))
            atexit.register(self.close)
        return self._folder / "s"

    def command(self, words: Sequence[str]) -> list[str]:
        with self._lock:
            if not self.connected():
                self._connect()
        return ["ssh", *self._options(), "-o", "ControlMaster=no", "-T", "--", self.host, quoted(words)]

    def connected(self) -> bool:
        """Whether the connection stands, as far as this side knows."""
        return self.socket.exists() and self._control("check") == 0

    def close(self) -> None:
        """End the connection."""
        if self._folder is not None:
            if self.socket.exists():
                self._control("exit")
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
            with suppress(Exception):
                atexit.unregister(self.close)

    def explain(self, doing: str, code: int | None, said: str) -> SessionLost | None:
        if code is not None and 0 <= code != LOST:
            return None
        if code == LOST and self.connected():
            return SessionLost(f"{doing}: the device program was ended from outside, or never started: {said}")
        last = said.splitlines()[-1] if said else "ssh was ended"
        return ConnectionLost(f"{doing}: the connection to device '{self.device}' ({self.host}) is lost: {last}")

    def _options(self) -> list[str]:
        alive = max(1, min(10, int(self.timeout_s / (ALIVE_COUNT + 1))))
        told = [*OPTIONS, f"ServerAliveInterval={alive}", f"ServerAliveCountMax={ALIVE_COUNT}"]
        return [*self._where, *(word for option in told for word in ("-o", option)), "-S", str(self.socket)]

    def _connect(self) -> None:
        """`DeviceUnreachable` where there is no answer, `DeviceError` where the answer is no."""
        with suppress(OSError):
            self.socket.unlink()
        options = [
            *self._options(),
            *("-o", f"StrictHostKeyChecking={self._host_key_checking()}"),
            *("-o", f"ConnectTimeout={CONNECT_SECONDS}"),
            *("-o", "ExitOnForwardFailure=no"),
            *("-o", f"ControlPersist={PERSIST_SECONDS}"),
        ]
        command = ["ssh", *options, "-M", "-N", "-f", "-T", "--", self.host]
        said = self.socket.with_name("said")
        # to a file: the master that stays in the background would keep a pipe open
        with said.open("wb") as out:
            try:
                code = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    timeout=4 * CONNECT_SECONDS,
                    check=False,
                    start_new_session=True,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
            except FileNotFoundError:
                raise DeviceError(
                    f"device '{self.device}' is reached by ssh, which is not installed: "
                    "apt-get install openssh-client, or what your system calls it"
                ) from None
        if code != 0:
            text = printable(said.read_text(errors="replace"))[-2000:].strip()
            raise self._failure(text if code is not None else f"no answer within {4 * CONNECT_SECONDS} s\n{text}")

    def _host_key_checking(self) -> str:
        """As the user's config has it, but never without."""
        found = re.search(r"^stricthostkeychecking (\S+)$", self._effective(), re.MULTILINE)
        told = found.group(1) if found else "yes"
        return told if told == "accept-new" else "yes"

    def _effective(self) -> str:
        """What ssh makes of the destination: `ssh -G`."""
        command = ["ssh", *self._where, "-G", "--", self.host]
        with suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(
                command, capture_output=True, text=True, timeout=10, check=False, stdin=subprocess.DEVNULL
            ).stdout
        return ""

    def _control(self, order: str) -> int:
        command = ["ssh", *self._where, "-S", str(self.socket), "-O", order, "--", self.host]
        with suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=10,
                check=False,
            ).returncode
        return -1

    def _failure(self, said: str) -> DeviceError:
        """What ssh's last words mean, and what to do."""
        by_hand = quoted(["ssh", *self._where, self.host])
        last = said.splitlines()[-1] if said else "ssh said nothing"
        tried = f"device '{self.device}' can't be reached: `{by_hand}` said: {last}"
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
            return DeviceError(
                f"device '{self.device}': the host key of {self.host} is another one than before. Either it was "
                "installed anew, or somebody stands in between. Where you know that it is right: "
                f"{self._forget()}, then `{by_hand}` once, to see and accept the new one"
            )
        if "Host key verification failed" in said or "host key is known" in said:
            return DeviceError(
                f"device '{self.device}': the host key of {self.host} is not known here, and edgeprune accepts none by "
                f"itself. Connect once by hand, compare its fingerprint, and accept it: {by_hand}"
            )
        if "Permission denied" in said or "Too many authentication failures" in said:
            return DeviceError(
                f"{tried}; there is no way to give a password here: install a key (ssh-copy-id {self.host}), or load "
                "it into the agent (ssh-add)"
            )
        if "Could not resolve hostname" in said:
            return DeviceUnreachable(f"{tried}; set 'host' in its entry of devices.yaml, or 'Host' in ~/.ssh/config")
        return DeviceUnreachable(
            f"{tried}; is it on, on this network, and does sshd run there? 'host', 'port' and 'user' in its entry of "
            "devices.yaml, or ~/.ssh/config, say where it is"
        )

    def _forget(self) -> str:
        found = dict(
            line.split(" ", 1) for line in self._effective().splitlines() if line.startswith(("hostname ", "port "))
        )
        name, port = found.get("hostname", self.host), found.get("port", "22")
        return quoted(["ssh-keygen", "-R", name if port == "22" else f"[{name}]:{port}"])


def _where(device: Device) -> list[str]:
    """The destination's part of a command line."""
    words = []
    if device.ssh_config:
        words += ["-F", str(Path(device.ssh_config).expanduser())]
    if device.user:
        words += ["-l", device.user]
    if device.port:
        words += ["-p", str(device.port)]
    return words
