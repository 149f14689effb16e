"""Where edgeprune keeps its files, and how it writes them: whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from edgeprune.errors import StorageError

DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


def cache_dir() -> Path:
    """Measured tables: `$EDGEPRUNE_CACHE_DIR`, else the platform's cache folder. May not exist yet."""
    return Path(os.environ.get("EDGEPRUNE_CACHE_DIR") or platformdirs.user_cache_dir("edgeprune", appauthor=False))


def shipped_tables() -> Path:
    """The tables that come with edgeprune, or those of `$EDGEPRUNE_SHIPPED_TABLES`; an empty folder leaves them out."""
    return Path(os.environ.get("EDGEPRUNE_SHIPPED_TABLES") or Path(__file__).with_name("latency_tables"))


def config_dir() -> Path:
    """The user's devices.yaml: `$EDGEPRUNE_CONFIG_DIR`, else the platform's config folder. May not exist yet."""
    return Path(os.environ.get("EDGEPRUNE_CONFIG_DIR") or platformdirs.user_config_dir("edgeprune", appauthor=False))


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside it, then rename: a reader sees the old file or the new one."""
    path = path.resolve()
    temporary = _name_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise StorageError.from_os(path, error) from error
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill; on success it takes the name `path`, on any exception it is removed.

    A folder already at `path` stays whole until the new one is: it is renamed aside, then removed.
    """
    path = path.resolve()
    temporary = _name_beside(path)
    try:
        with _storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        yield temporary
        with _storage_errors(path):
            _take_name(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise StorageError.from_os(path, error) from error
        raise


def _take_name(new: Path, path: Path) -> None:
    if not path.is_dir():
        new.rename(path)
        return
    old = _name_beside(path)
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.from_os(path, error) from error


def check_writable(folder: Path) -> None:
    """`StorageError` where nothing can be written into `folder`, made if missing: before a long run, not after."""
    probe = _name_beside(folder.resolve() / "probe")
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
