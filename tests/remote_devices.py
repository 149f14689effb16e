"""Devices without a network: the remote command runs on this machine; ssh would only start it in another way."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.backends import find_backend
from edgeprune.device import Device
from edgeprune.device_program import DeviceProgram, assemble
from edgeprune.measurement import SessionLost
from edgeprune.remote_channel import RemoteChannel
from edgeprune.transport import Session


class Here:
    """A link that runs the words as they are, after `before`."""

    def __init__(self, *before: str) -> None:
        self.before = before

    def command(self, words: Sequence[str]) -> list[str]:
        return [*self.before, *words]

    def explain(self, doing: str, code: int | None, said: str) -> SessionLost | None:
        return None


def null_program() -> DeviceProgram:
    return assemble({"null": find_backend("null").runner_path()})


def far(folder: Path, **changes: Any) -> Device:
    """A remote null device whose files are in `folder`."""
    fields: dict[str, Any] = {
        "name": "far",
        "transport": "ssh",
        "host": "nowhere",
        "backend": "null",
        "python": sys.executable,
        "folder": str(folder),
        "timeout_s": 20.0,
    }
    return Device(**(fields | changes))


def channel(device: Device, program: DeviceProgram | None = None, **how: Any) -> RemoteChannel:
    return RemoteChannel(device, Here(), program or null_program(), device.backend, **how)


def session(channel: RemoteChannel, **options: Any) -> Session:
    return Session(channel, {"precision": "fp32", "threads": 1, **options}, silence_s=20.0)


def interpreters() -> list[tuple[str, str | None]]:
    """(version, interpreter) of those that the device program is tested under; None where there is none here.

    `EDGEPRUNE_TEST_PYTHONS` names others, separated by colons.
    """
    if named := os.environ.get("EDGEPRUNE_TEST_PYTHONS"):
        return [(path, path) for path in named.split(":")]
    homes = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    found: list[tuple[str, str | None]] = []
    for version in ("3.8", "3.10", "3.12"):
        here = sorted(homes.glob(f"{version}.*/bin/python"))
        found.append((version, str(here[-1]) if here else None))
    return found
