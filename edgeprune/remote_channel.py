"""The device program on another machine, behind a `Link` that runs one command there: ssh, or adb with a Python there.

All goes over that command's stdin and stdout: the first half of the program (`device_boot.py`), then the program itself
where it is not there yet, requests, and models by what is in them. Nothing is installed and no port is opened.
"""

from __future__ import annotations

import base64
import binascii
import getpass
import hashlib
import json
import os
import secrets
import shlex
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from edgeprune.device import Device
from edgeprune.device_program import DeviceProgram
from edgeprune.errors import DeviceError, MeasurementError, StorageError
from edgeprune.machine import printable
from edgeprune.measurement import SessionLost
from edgeprune.wire import Wire, died

BOOT = Path(__file__).with_name("device_boot.py")
LOADER = "import os;exec(b''.join(iter(lambda:os.read(0,1)or os._exit(9),bytes(1))))"
"""What the remote command runs: the text on stdin, up to a zero byte."""
ABANDONED: deque[str] = deque(maxlen=64)
"""Sessions that this process has given up. Where one of them still holds a device that has not noticed, it is ended."""
BOOT_SECONDS = 60.0
FOLDERS = {"ssh": "~/.cache/edgeprune", "adb": "/data/local/tmp/edgeprune"}
MOST_PREAMBLE = 1 << 16  # bytes that a login shell may print before us
BESIDE = {".xml": (".bin",), ".onnx": (".json", ".onnx.data")}
"""Files that belong to a model: OpenVINO's weights; modelled times of the null device; weights beside ONNX."""
SENT_AT_ONCE = 1 << 20


class Link(Protocol):
    """A way to run commands on a device."""

    def command(self, words: Sequence[str]) -> list[str]:
        """What to run here, so that `words` run there; `DeviceUnreachable` and `DeviceError` tell what was tried."""

    def explain(self, doing: str, code: int | None, said: str) -> SessionLost | None:
        """Why the command ended, where that has to do with the way to the device."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A model as it goes over: `key` is the hash of all of it, files are (suffix, path, size, sha256)."""

    key: str
    files: tuple[tuple[str, Path, int, str], ...]

    @classmethod
    def of(cls, path: Path) -> Sent:
        suffix = path.suffix
        others = [path.with_name(path.stem + other) for other in BESIDE.get(suffix, ())]
        files = []
        for file in [path, *(other for other in others if other.is_file())]:
            data = file.read_bytes()
            files.append((file.name[len(path.stem) :], file, len(data), hashlib.sha256(data).hexdigest()))
        listed = json.dumps([(suffix, sha256) for suffix, _, _, sha256 in files])
        return cls(key=hashlib.sha256(listed.encode()).hexdigest(), files=tuple(files))

    def to_json(self) -> dict[str, Any]:
        files = [{"suffix": suffix, "size": size, "sha256": sha256} for suffix, _, size, sha256 in self.files]
        return {"key": self.key, "files": files}

    def payload(self) -> Iterator[bytes]:
        for _, path, size, _ in self.files:
            with path.open("rb") as file:
                while chunk := file.read(SENT_AT_ONCE):
                    size -= len(chunk)
                    yield chunk
            if size:
                raise MeasurementError(f"{path} changed while it was sent")


class RemoteChannel:
    """A `Channel` to the device program on a device behind a `Link`, whose lock it holds until it is closed."""

    def __init__(
        self,
        device: Device,
        link: Link,
        program: DeviceProgram,
        runner: str,
        *,
        wait_s: float | None = 0.0,
        on_wait: Callable[[str], None] = lambda holder: None,
    ) -> None:
        """`wait_s` is how long to wait for somebody else who measures the device, None as long as it takes."""
        self._device = device
        self._client = secrets.token_hex(8)
        self._link = link
        command = link.command([device.python, "-I", "-u", "-c", LOADER])
        self._wire = Wire(command, self._died)
        self.request = self._wire.converse
        self._booted = False
        try:
            answer = self._boot(program, runner, wait_s, on_wait)
            self.folder, self.home = _text(answer, "scratch"), _text(answer, "folder")
            self.python, self.executable = _text(answer, "python"), _text(answer, "executable")
            self.boot_id = str(answer.get("boot_id"))[:100]
        except BaseException:
            self._wire.kill()
            self.close()
            raise
        self._booted = True

    def __enter__(self) -> RemoteChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, paths: Sequence[Path]) -> list[str]:
        """Two round trips for all of them, one where all are there."""
        models = {path: Sent.of(path) for path in paths}
        keys = sorted({model.key for model in models.values()})
        missing = self._ask({"op": "missing", "keys": keys}).get("missing")
        if not isinstance(missing, list) or not set(map(str, missing)) <= set(keys):
            raise MeasurementError("the device program's answer to 'missing' is malformed")
        if missing:
            sent = {model.key: model for model in models.values() if model.key in missing}
            listed = [model.to_json() for model in sent.values()]
            payload = (chunk for model in sent.values() for chunk in model.payload())
            self._ask({"op": "put", "models": listed, "keep": keys}, payload)
        place = PurePosixPath(self.home, "models")
        return [str(place / model.key / f"model{model.files[0][0]}") for model in models.values()]

    def get(self, remote: str, path: Path, num_bytes: int) -> None:
        """At most `num_bytes`, whatever it says."""
        if PurePosixPath(remote).parent != PurePosixPath(self.folder):
            raise MeasurementError(f"the device program names a file outside of its folder: {printable(remote)}")
        with path.open("wb") as file:
            while True:
                answer = self._ask({"op": "get", "path": remote, "offset": file.tell()})
                try:
                    data, size = base64.b64decode(answer["data"], validate=True), int(answer["size"])
                except (KeyError, TypeError, ValueError, binascii.Error):
                    raise MeasurementError("the device program's answer to 'get' is malformed") from None
                if size > num_bytes or file.tell() + len(data) > size:
                    raise MeasurementError(f"the device program sends {size} bytes where {num_bytes} are expected")
                file.write(data)
                if file.tell() == size:
                    return
                if not data:
                    raise MeasurementError("the device program sends less than it says")

    def close(self) -> None:
        ABANDONED.append(self._client)
        self._wire.close()

    def _ask(self, fields: Mapping[str, Any], payload: Iterable[bytes] = ()) -> dict[str, Any]:
        answer = self._wire.converse({"id": 0, **fields}, self._device.timeout_s, payload=payload)
        if "error" in answer:
            said = printable(str(answer["error"])[:500])
            if answer.get("errno") is not None:
                raise StorageError(f"device '{self._device.name}': {said}; free some space there, or lower cache_mb")
            raise MeasurementError(said)
        return answer

    def _boot(
        self, program: DeviceProgram, runner: str, wait_s: float | None, on_wait: Callable[[str], None]
    ) -> dict[str, Any]:
        nonce = secrets.token_hex(8)
        data = program.text.encode()
        config = {
            "nonce": nonce,
            "folder": self._device.folder or FOLDERS[self._device.transport],
            "client": self._client,
            "abandoned": list(ABANDONED),
            "who": who(),
            "wait_s": wait_s,
            "runner": runner,
            "cache_mb": self._device.cache_mb,
            "program": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)},
        }
        self._wire.send(BOOT.read_bytes() + b"\0" + json.dumps(config).encode() + b"\n", "start", BOOT_SECONDS)
        while "waiting" in (answer := self._boot_answer(nonce)):
            on_wait(printable(str(answer["waiting"])[:200]))
        if answer.get("have") is False:
            self._wire.send(data, "start", self._device.timeout_s)
            stored = self._boot_answer(nonce)
            if stored.get("stored") is not True:
                raise MeasurementError(f"device '{self._device.name}' did not take the device program")
        return answer

    def _boot_answer(self, nonce: str) -> dict[str, Any]:
        """The next line that starts with the nonce: a login shell may print others, but not without end."""
        start, seen = nonce.encode() + b" ", 0
        while not (line := self._wire.line("start", BOOT_SECONDS)).startswith(start):
            seen += len(line) + 1
            if seen > MOST_PREAMBLE:
                raise DeviceError(
                    f"device '{self._device.name}' answers something else than edgeprune's program, such as "
                    f"{printable(line[:80].decode(errors='replace'))!r}: does its login shell print without end?"
                )
        answer = self._wire.parsed(line[len(start) :], "start")
        if "error" in answer:
            raise self._refusal(str(answer.get("kind")), printable(str(answer["error"])[:500]))
        return answer

    def _refusal(self, kind: str, text: str) -> Exception:
        name = self._device.name
        if kind == "busy":
            return DeviceError(
                f"device '{name}' is being measured by {text}: two at a time would disturb each other; try again when "
                "it has ended (`profile`, `prune` and `fit` wait with --wait)"
            )
        if kind == "folder":
            return StorageError(f"device '{name}': {text}; free some space there, or set 'folder' in its entry")
        if kind == "python":
            return DeviceError(f"device '{name}': {text}; set 'python' in its entry to one of 3.8 or later")
        return MeasurementError(f"device '{name}': {text}")

    def _died(self, doing: str, code: int | None, said: str) -> SessionLost:
        lost = self._link.explain(doing, code, said)
        if lost is not None:
            return lost
        if code is not None and code > 128:
            code = 128 - code
        if not self._booted and code in (126, 127):
            raise DeviceError(
                f"device '{self._device.name}' can't run '{self._device.python}' ({said or 'no such command'}): "
                "set 'python' in its entry to an interpreter of 3.8 or later there"
            )
        return died(doing, code, said)


def who() -> str:
    """This process, as others are told who holds a device."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"process {os.getpid()} of {user}@{socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def quoted(words: Sequence[str]) -> str:
    """One line for the shell over there."""
    return shlex.join(words)


def _text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str) or not 0 < len(value) < 4096 or printable(value) != value:
        raise MeasurementError(f"the device's first answer has no proper '{name}'")
    return value
