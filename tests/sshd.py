"""A real sshd on 127.0.0.1 with keys, port and config folder of its own, and the environments that play devices."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.device import Device

ROOT = Path(__file__).parent.parent
KEYGEN = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "")


def sshd_path() -> str | None:
    """Where the server is; None where it is not installed."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def why_not() -> str | None:
    """What a test of ssh needs and isn't here."""
    if sshd_path() is None:
        return "no sshd: apt-get install openssh-server"
    return None if shutil.which("ssh") else "no ssh: apt-get install openssh-client"


def device_python(name: str) -> Path | None:
    """The interpreter of a device environment (`make test-devices`), or None where it was not made."""
    folder = Path(os.environ.get("EDGEPRUNE_TEST_DEVICES") or ROOT / ".devices")
    python = folder / name / "bin" / "python"
    return python.absolute() if python.exists() else None


@dataclass
class Sshd:
    """A server that runs; `device(...)` gives an entry that is reached through it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    config: Path
    known_hosts: Path
    config_text: str
    made: list[Path] = field(default_factory=list)

    def device(self, name: str = "far", **changes: Any) -> Device:
        """A device of its own: every folder has its lock."""
        fields: dict[str, Any] = {
            "name": name,
            "transport": "ssh",
            "host": "edgeprune-test",
            "ssh_config": str(self.config),
            "backend": "null",
            "folder": str(self.folder / "devices" / name),
            "timeout_s": 20.0,
        }
        return Device(**(fields | changes))

    def forget_host_key(self) -> None:
        """As if this host had never been met."""
        self.known_hosts.write_text("")

    def know_host_key(self) -> None:
        key = (self.folder / "host_key.pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key[0]} {key[1]}\n")

    def cut(self) -> int:
        """Kill the connections that stand, on the side of the device, as a reboot does; gives how many."""
        connections = children(self.process.pid)
        for child in connections:
            for pid in [*children(child), child]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        return len(connections)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def children(pid: int) -> list[int]:
    """Of a process, started by its main thread; none once it has ended."""
    told = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in told.read_text().split()] if told.exists() else []


@contextlib.contextmanager
def running_sshd(folder: Path) -> Iterator[Sshd]:
    """Start the server with keys and a config in `folder`, which only we can read; ends it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for key in ("host_key", "user_key"):
        subprocess.run([*KEYGEN, "-f", str(folder / key)], check=True, timeout=30)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "authorized_keys").chmod(0o600)
    port = _free_port()
    server = folder / "sshd_config"
    server.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "UsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nMaxStartups 100\nLogLevel ERROR\n"
    )
    client = folder / "ssh_config"
    text = (
        f"Host edgeprune-test\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/user_key\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n"
    )
    client.write_text(text)
    with contextlib.suppress(FileExistsError, PermissionError):  # where privileged sshd keeps an empty folder
        Path("/run/sshd").mkdir(mode=0o755)
    process = subprocess.Popen([str(sshd_path()), "-D", "-e", "-f", str(server)], stderr=subprocess.DEVNULL)
    sshd = Sshd(folder, port, process, client, folder / "known_hosts", text)
    sshd.know_host_key()
    try:
        _wait_for(port, process)
        yield sshd
    finally:
        sshd.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("sshd did not start")
        time.sleep(0.05)
