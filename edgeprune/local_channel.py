"""The device program as a child process of this one: the device is this machine."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeprune.errors import MeasurementError
from edgeprune.measurement import SessionLost

MAX_LINE = 64 << 20
TAIL_BYTES = 4000


class LocalChannel:
    """`python -I -u program.py RUNNER` in a process group of its own, so that a Ctrl-C here is ours to handle.

    `python` is another interpreter than this one: of an environment that has only the runtime.
    """

    def __init__(self, program: str, runner: str, *, python: str = sys.executable) -> None:
        self.folder = tempfile.mkdtemp(prefix="edgeprune-")
        self._tail = b""
        self._buffer = bytearray()
        path = Path(self.folder, "device_program.py")
        try:
            path.write_text(program, encoding="utf-8")
            self._process = subprocess.Popen(
                [python, "-I", "-u", str(path), runner],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.folder,
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(self._stderr, selectors.EVENT_READ)

    def __enter__(self) -> LocalChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(
        self, fields: Mapping[str, Any], silence_s: float, on_event: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        doing = str(fields.get("key", fields["op"]))
        try:
            self._stdin.write(json.dumps(fields).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            raise self._died(doing) from None
        while True:
            message = self._message(doing, silence_s)
            if "event" not in message:
                return message
            doing = str(message.get("key", doing))
            on_event(message)

    def put(self, path: Path) -> str:
        return str(path.resolve())

    def get(self, remote: str, path: Path) -> None:
        source = Path(remote).resolve()
        if not source.is_relative_to(Path(self.folder).resolve()):
            raise MeasurementError(f"the device program names a file outside of its folder: {remote}")
        shutil.copyfile(source, path)

    def close(self) -> None:
        with suppress(OSError):
            self._stdin.close()  # the end of its input lets it leave
        try:
            self._process.wait(0.5)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._kill()
        self._selector.close()
        self._stdout.close()
        self._stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _message(self, doing: str, silence_s: float) -> dict[str, Any]:
        line = self._line(doing, silence_s)
        try:
            message = json.loads(line, parse_constant=_no_constant)
        except ValueError as error:
            message = error
        if not isinstance(message, dict):
            self._kill()
            raise SessionLost(f"{doing}: the device program answered no JSON object: {line[:200]!r}")
        return message

    def _line(self, doing: str, silence_s: float) -> bytes:
        """The next line of its stdout, while its stderr is drained; an answer may come in many pieces."""
        deadline = time.monotonic() + silence_s
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                return line
            searched = len(self._buffer)
            if searched > MAX_LINE:
                self._kill()
                raise SessionLost(f"{doing}: the device program's answer is longer than {MAX_LINE >> 20} MiB")
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                self._kill()
                raise SessionLost(f"{doing}: no answer within {silence_s:g} s; the device program was ended")
            for key, _ in ready:
                deadline = self._read(key.fileobj, doing, deadline, silence_s)

    def _read(self, stream: Any, doing: str, deadline: float, silence_s: float) -> float:
        chunk = os.read(stream.fileno(), 1 << 16)
        if stream is self._stderr:
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
            if not chunk:
                self._selector.unregister(stream)
            return deadline
        if not chunk:
            raise self._died(doing)
        self._buffer += chunk
        return time.monotonic() + silence_s

    def _died(self, doing: str) -> SessionLost:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._kill()
        with suppress(OSError, ValueError):
            os.set_blocking(self._stderr.fileno(), False)
            self._tail = (self._tail + (self._stderr.read() or b""))[-TAIL_BYTES:]
        code = self._process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        said = self._tail.decode(errors="replace").strip()
        return SessionLost(f"{doing}: the device program {how}" + (f"; its last words:\n{said}" if said else ""))

    def _kill(self) -> None:
        """The whole group: a runtime may have started processes of its own."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
