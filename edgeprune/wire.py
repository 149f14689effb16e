"""Lines of JSON to and from a child process. What comes back is not trusted: its sizes and its silence are limited."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from threading import Event as Flag
from typing import IO, Any

from edgeprune.machine import printable
from edgeprune.measurement import SessionHung, SessionLost

MAX_LINE = 64 << 20
MAX_TALK = 256 << 20  # bytes of all events and the answer to one request
TAIL_BYTES = 4000
SLICE_SECONDS = 0.25
FAREWELL_SECONDS = 3.0

CANCELLED: ContextVar[Flag | None] = ContextVar("CANCELLED", default=None)
"""Of a thread that isn't the main one and so hears no Ctrl-C: when it is set, waiting ends by a KeyboardInterrupt."""

Explain = Callable[[str, int | None, str], SessionLost]
"""(what ran, exit code, last words) → the error that a dead process is."""


class Wire:
    """A child process in a session of its own, so that a Ctrl-C here is ours to handle."""

    def __init__(self, command: Sequence[str], explain: Explain, *, folder: Path | str | None = None) -> None:
        """It runs in `folder`, where it may note in a file `busy` what it is at; else it says so when it ends."""
        self._explain = explain
        self._note = Path(folder, "busy") if folder else None
        self._tail = b""
        self._buffer = bytearray()
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        self._stderr: IO[bytes] = self._process.stderr
        os.set_blocking(self._stdin.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(self._stderr, selectors.EVENT_READ)

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def converse(
        self,
        fields: Mapping[str, Any],
        silence_s: float,
        on_event: Callable[[dict[str, Any]], None] = lambda message: None,
        payload: Iterable[bytes] = (),
    ) -> dict[str, Any]:
        """Send one request, and bytes that belong to it; pass on events, give the answer."""
        doing = str(fields.get("key", fields["op"]))
        self.send(json.dumps(fields).encode() + b"\n", doing, silence_s)
        for chunk in payload:
            self.send(chunk, doing, silence_s)
        talked = 0
        while True:
            line = self.line(doing, silence_s)
            talked += len(line) + 1
            if not line and talked <= MAX_TALK:
                continue  # in front of what is said when a program has ended
            message = self.parsed(line, doing)
            if "event" not in message:
                return message
            if talked > MAX_TALK:
                self.kill()
                raise SessionLost(f"{doing}: the device program talks without end; it was ended")
            doing = str(message.get("key", doing))
            on_event(message)

    def send(self, data: bytes, doing: str, silence_s: float) -> None:
        """Write all of it; a process that takes nothing for `silence_s` counts as hung."""
        view = memoryview(data)
        self._selector.register(self._stdin, selectors.EVENT_WRITE)
        try:
            deadline = time.monotonic() + silence_s
            while view:
                for stream in self._ready(doing, deadline, silence_s):
                    if stream is not self._stdin:
                        self._read(stream, doing)
                        continue
                    with suppress(BlockingIOError):
                        view = view[os.write(self._stdin.fileno(), view[: 1 << 16]) :]
                        deadline = time.monotonic() + silence_s
        except BrokenPipeError:
            raise self._died(doing) from None
        finally:
            with suppress(KeyError, ValueError):
                self._selector.unregister(self._stdin)

    def line(self, doing: str, silence_s: float) -> bytes:
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
                self.kill()
                raise SessionLost(f"{doing}: the device program's answer is longer than {MAX_LINE >> 20} MiB")
            for stream in self._ready(doing, deadline, silence_s):
                if self._read(stream, doing):
                    deadline = time.monotonic() + silence_s

    def parsed(self, line: bytes, doing: str) -> dict[str, Any]:
        """The JSON object of a line; anything else ends the process."""
        try:
            message = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            message = error
        if not isinstance(message, dict):
            self.kill()
            raise SessionLost(f"{doing}: the device program answered no JSON object: {line[:200]!r}")
        return message

    def kill(self) -> None:
        """The whole group: a runtime may have started processes of its own."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """The end of its input lets it leave; half a second later it is made to."""
        with suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(0.5)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.kill()
        self._selector.close()
        self._stdout.close()
        self._stderr.close()

    def last_words(self) -> str:
        """What it wrote to stderr of late, as far as it was read."""
        return printable(self._tail.decode(errors="replace")).strip()

    def _ready(self, doing: str, deadline: float, silence_s: float) -> list[Any]:
        """Streams that can be read or written; waits for one, at most until the deadline."""
        cancelled = CANCELLED.get()
        while True:
            if cancelled is not None and cancelled.is_set():
                raise KeyboardInterrupt
            left = deadline - time.monotonic()
            ready = self._selector.select(max(0.0, left if cancelled is None else min(left, SLICE_SECONDS)))
            if ready and time.monotonic() <= deadline:
                return [key.fileobj for key, _ in ready]
            if time.monotonic() > deadline:
                key = self._noted() or self._farewell()
                self.kill()
                text = f"{key or doing}: no answer within {silence_s:g} s; the device program was ended"
                raise SessionHung(text, key=key)

    def _read(self, stream: Any, doing: str) -> bool:
        """Take what is there; whether it was a part of an answer."""
        chunk = os.read(stream.fileno(), 1 << 16)
        if stream is self._stderr:
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
            if not chunk:
                self._selector.unregister(stream)
            return False
        if not chunk:
            raise self._died(doing)
        self._buffer += chunk
        if len(self._buffer) > MAX_LINE + MAX_TALK:  # also while we are sending, when nobody looks for lines
            self.kill()
            raise SessionLost(f"{doing}: the device program talks without end; it was ended")
        return True

    def _died(self, doing: str) -> SessionLost:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.kill()
        with suppress(OSError, ValueError):
            os.set_blocking(self._stderr.fileno(), False)
            self._tail = (self._tail + (self._stderr.read() or b""))[-TAIL_BYTES:]
        key = self._noted()
        lost = self._explain(key or doing, self._process.returncode, self.last_words())
        lost.key = key
        return lost

    def _noted(self) -> str:
        """What it has written down that it is at."""
        if self._note is None:
            return ""
        with suppress(OSError), self._note.open("rb") as file:
            return printable(file.read(1024).rstrip(b"\0").decode(errors="replace"))
        return ""

    def _farewell(self) -> str:
        """End its input and hear what its guard says that it was at."""
        with suppress(OSError, KeyError, ValueError):
            self._selector.unregister(self._stdin)
        with suppress(OSError):
            self._stdin.close()
        deadline, heard = time.monotonic() + FAREWELL_SECONDS, bytes(self._buffer)
        os.set_blocking(self._stdout.fileno(), False)
        while (left := deadline - time.monotonic()) > 0 and len(heard) < MAX_LINE:
            if not [key for key, _ in self._selector.select(left) if key.fileobj is self._stdout]:
                continue
            if not (chunk := self._stdout.read(1 << 16)):
                break
            heard += chunk
        for line in reversed(heard.splitlines()):
            with suppress(ValueError, RecursionError, AttributeError):
                message = json.loads(line)
                if message.get("event") == "ended":
                    return printable(str(message.get("key", ""))[:1024])
        return ""


def pause(seconds: float) -> None:
    """Sleep, unless this thread is cancelled."""
    cancelled = CANCELLED.get()
    if cancelled is None:
        time.sleep(seconds)
    elif cancelled.wait(seconds):
        raise KeyboardInterrupt


def died(doing: str, code: int | None, said: str) -> SessionLost:
    """The error that a dead device program is; `said` are its last words."""
    words = f"; its last words:\n{said}" if said else ""
    return SessionLost(f"{doing}: the device program {how_it_ended(code)}{words}")


def how_it_ended(code: int | None) -> str:
    """`was ended by SIGABRT` or `ended with exit code 3`; a negative code is a signal's."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
