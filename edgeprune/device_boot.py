"""First half of what runs on a remote device: it takes the lock, fetches the device program at need and guards it.

Runs there by itself (Python 3.8 or later, standard library only, nothing of edgeprune), read from stdin by the one
line that the remote command is (`remote_channel.LOADER`). Talk on stdin and stdout, each line of ours after the host's
nonce, since a login shell may print something of its own before:

    <-  {"nonce", "folder", "client", "who", "wait_s", "runner", "cache_mb", "program": {"sha256", "size"}}
    ->  {"waiting": holder} now and then, while somebody else measures this device
    ->  {"error", "kind"} and the end, or {"have", "folder", "scratch", "boot_id", "python", "executable"}
    <-  the program's bytes, where it was not there already
    ->  {"stored": true}, or {"error", "kind"} and the end
        from here on stdin and stdout are the program's
    ->  {"event": "ended", "key"} when the program ended before its work: what it was busy with

The lock is a `flock` on a file in the folder: it goes with the last process that holds it, however that ends. The guard
holds it as well as the program, and ends the program when the host is gone, even while it hangs in a runtime.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    import ctypes
    import fcntl
except ImportError:  # a Python that was built without them: said in `boot`
    ctypes = fcntl = None  # type: ignore[assignment]

PROGRAMS_KEPT = 8
LONGEST_LINE = 1 << 16
GONE = getattr(select, "POLLRDHUP", 0)
GRACE_SECONDS = 0.5
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h


class Stop(Exception):
    """Why it can't go on: `kind` is `python`, `folder`, `busy` or `program`."""

    def __init__(self, kind: str, text: str) -> None:
        Exception.__init__(self, text)
        self.kind = kind


def read_line() -> bytes:
    """One line of stdin, byte by byte: what follows belongs to the program."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte or len(line) > LONGEST_LINE:
            os._exit(9)
        line += byte
    return line


def read_bytes(size: int) -> bytes:
    parts = []
    while size:
        chunk = os.read(0, min(size, 1 << 20))
        if not chunk:
            os._exit(9)
        parts.append(chunk)
        size -= len(chunk)
    return b"".join(parts)


def made(folder: str) -> str:
    """The folder, private, with what it needs inside."""
    folder = os.path.abspath(os.path.expanduser(folder))
    for part in ("", "programs", "models"):
        make(os.path.join(folder, part))
    return folder


def make(folder: str) -> None:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise Stop("folder", "cannot write %s: %s" % (folder, error.strerror)) from None


def locked(folder: str, config: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> int:
    """The lock's descriptor, once nobody else has it; a session of the same client that was cut off is ended."""
    try:
        lock = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Stop("folder", "cannot write %s: %s" % (folder, error.strerror)) from None
    os.set_inheritable(lock, True)
    begun, told = time.monotonic(), 0.0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            forget_owner(folder)
            return lock
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise Stop("folder", "cannot lock %s: %s" % (folder, error.strerror)) from None
        holder = owner_of(folder)
        ours = holder.get("client") == config["client"]
        if ours:
            end(holder.get("pids", []))
        spent = time.monotonic() - begun
        who = str(holder.get("who", "another process"))[:200]
        if config["wait_s"] is not None and spent >= max(config["wait_s"], 10.0 if ours else 0.0):
            raise Stop("busy", who)
        if not told or time.monotonic() - told > 5:
            say({"waiting": who})
            told = time.monotonic()
        if hung_up(0.1 if spent < 2 else 0.5):
            os._exit(9)


def owner_of(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, "owner")) as file:
            owner = json.loads(file.read(LONGEST_LINE))
        return owner if isinstance(owner, dict) else {}
    except (OSError, ValueError):
        return {}


def forget_owner(folder: str) -> None:
    """Who held the lock before: its processes may be others by now."""
    with suppress(OSError):
        os.remove(os.path.join(folder, "owner"))


def end(pids: list[int]) -> None:
    """Kill the processes of a session, and what they have started."""
    for pid in pids:
        for kill in (os.kill, os.killpg):
            try:
                kill(int(pid), signal.SIGKILL)
            except (OSError, ValueError, OverflowError):
                continue


def hung_up(seconds: float) -> bool:
    """Whether whoever reads and writes us is gone; waits that long for it."""
    poll = select.poll()
    poll.register(0, GONE)
    return bool(poll.poll(seconds * 1000))


def program_path(folder: str, wanted: dict[str, Any]) -> str:
    return os.path.join(folder, "programs", "%s.py" % wanted["sha256"])


def has_program(path: str, wanted: dict[str, Any]) -> bool:
    """Whether it is there, byte for byte."""
    try:
        with open(path, "rb") as file:
            found = hashlib.sha256(file.read(int(wanted["size"]) + 1)).hexdigest()
        os.utime(path)
    except OSError:
        return False
    return bool(found == wanted["sha256"])


def store_program(path: str, data: bytes, wanted: dict[str, Any]) -> None:
    """Whole or not at all; of older ones the last few stay."""
    if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
        raise Stop("program", "the device program arrived damaged")
    programs = os.path.dirname(path)
    try:
        for old in sorted(os.listdir(programs), key=lambda name: age(os.path.join(programs, name)))[PROGRAMS_KEPT:]:
            os.remove(os.path.join(programs, old))
        with open(path + ".new", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError as error:
        raise Stop("folder", "cannot write %s: %s" % (path, error.strerror)) from None


def age(path: str) -> float:
    try:
        return -os.stat(path).st_mtime
    except OSError:
        return 0.0


def boot_id() -> str | None:
    """Another one after every start of the device."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read(100).strip()
    except OSError:
        return None


def guard(command: list[str], folder: str, config: dict[str, Any]) -> int:
    """Run the program until it ends or the host is gone; gives its exit code, 128 + n where signal n ended it."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        start(command, os.path.join(folder, "scratch"), parent)
    owner = {"who": config["who"], "client": config["client"], "pids": [parent, child]}
    with suppress(OSError), open(os.path.join(folder, "owner"), "w") as file:  # only a courtesy to others
        file.write(json.dumps(owner))
    poll = select.poll()
    poll.register(0, GONE)
    poll.register(woken, select.POLLIN)
    left = None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            end([child])
            farewell(os.path.join(folder, "scratch", "busy"))
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if left is not None and time.monotonic() > left:
            end([child])
        for descriptor, _ in poll.poll(100 if left else None):
            if descriptor == woken:
                os.read(woken, 4096)
            elif left is None:  # it hears the end of its input as well, unless it is busy
                left = time.monotonic() + GRACE_SECONDS
                poll.unregister(0)


def farewell(note: str) -> None:
    """Tell what the program was busy with when it ended, where it was."""
    with suppress(OSError):
        with open(note, "rb") as file:
            key = file.read(1024).rstrip(b"\0").decode("utf-8", "replace")
        if key:
            os.write(1, ("\n%s\n" % json.dumps({"event": "ended", "key": key})).encode())


def start(command: list[str], scratch: str, parent: int) -> None:
    """Become the program, in a process group of its own that dies with the guard."""
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with suppress(AttributeError, OSError):  # else the program looks for its parent itself, between bursts
            ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(9)
        os.chdir(scratch)
        os.execv(command[0], command)
    finally:
        os._exit(9)


def boot() -> int:
    config = json.loads(read_line())

    def say(message: dict[str, Any]) -> None:
        data = ("\n%s %s\n" % (config["nonce"], json.dumps(message))).encode()
        while data:
            data = data[os.write(1, data) :]

    try:
        if sys.version_info < (3, 8) or fcntl is None:
            raise Stop("python", "%s is Python %s" % (sys.executable, platform.python_version()))
        folder = made(config["folder"])
        lock = locked(folder, config, say)
        scratch = os.path.join(folder, "scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        make(scratch)
        path, wanted = program_path(folder, config["program"]), config["program"]
        have = has_program(path, wanted)
        say(
            {
                "have": have,
                "folder": folder,
                "scratch": scratch,
                "boot_id": boot_id(),
                "python": platform.python_version(),
                "executable": sys.executable,
            }
        )
        if not have:
            store_program(path, read_bytes(int(wanted["size"])), wanted)
            say({"stored": True})
    except Stop as stop:
        say({"error": str(stop), "kind": stop.kind})
        return 1
    command = [sys.executable, "-I", "-u", path, config["runner"], folder, str(config["cache_mb"])]
    try:
        return guard(command, folder, config)
    finally:
        os.close(lock)


if __name__ == "__main__":
    sys.exit(boot())
