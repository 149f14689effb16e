"""Appending to a latency table so that no kill loses a finished measurement, one writer at a time."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from edgeprune.errors import StorageError, TableError
from edgeprune.table_lines import Line

LOG = logging.getLogger("edgeprune")


class TableLog:
    """An open table; each `append` is on disk when it returns."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.saved = 0  # lines
        self._descriptor = descriptor

    def append(self, lines: Iterable[Line]) -> None:
        """One write of whole lines, then fsync. `StorageError` tells what is saved; no torn line stays behind."""
        texts = [line.to_line() for line in lines]
        data = "".join(texts).encode()
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(28, "No space left on device")
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            kept = f"{self.saved} lines of this run are saved; free some space and run it again"
            raise StorageError(f"cannot write {self.path}: {error.strerror or error} ({kept})") from error
        self.saved += len(texts)


@contextmanager
def open_log(path: Path, *, wait_s: float = 0.0) -> Iterator[TableLog]:
    """Lock the table, mend a torn last line, open it for appending; `locked` says what it raises."""
    with locked(path, wait_s=wait_s):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StorageError.from_os(path, error) from error
        try:
            _mend(path, descriptor)
            yield TableLog(path, descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Be the only writer of the table: a lock on a file beside it, which goes with the process that holds it.

    `TableError` names that process after waiting `wait_s` for it, `math.inf` as long as it takes.
    """
    lock = FileLock(path.with_name(path.name + ".lock"))
    owner = path.with_name(path.name + ".owner")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, owner, wait_s)
    except Timeout:
        waited = f" (waited {wait_s:g} s)" if wait_s else ""
        advice = "try again when it has ended (`profile`, `prune`, `fit` and `table gc` wait with --wait)"
        raise TableError(f"is being written by {_holder(owner)}{waited}; {advice}", file=path) from None
    except OSError as error:
        raise StorageError.from_os(path, error) from error
    try:
        with suppress(OSError):  # only a courtesy to others
            owner.write_text(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def _acquire(lock: FileLock, owner: Path, wait_s: float) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait_s:
            raise
        LOG.info("waiting for the table: it is being written by %s", _holder(owner))
        lock.acquire(timeout=-1 if wait_s == math.inf else wait_s)


def _holder(owner: Path) -> str:
    try:
        return owner.read_text().strip()[:200] or "another process"
    except OSError:
        return "another process"


def _mend(path: Path, descriptor: int) -> None:
    """A kill may have left half a line: end it, so that reading names and skips just that one."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        try:
            os.write(descriptor, b"\n")
        except OSError as error:
            raise StorageError.from_os(path, error) from error
