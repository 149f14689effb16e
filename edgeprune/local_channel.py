"""The device program as a child process of this one: the device is this machine."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeprune.errors import MeasurementError
from edgeprune.measurement import SessionLost
from edgeprune.wire import Wire, how_it_ended


class LocalChannel:
    """`python -I -u program.py RUNNER`, in a folder that goes with it.

    `python` is another interpreter than this one: of an environment that has only the runtime.
    """

    def __init__(self, program: str, runner: str, *, python: str = sys.executable) -> None:
        self.folder = tempfile.mkdtemp(prefix="edgeprune-")
        path = Path(self.folder, "device_program.py")
        try:
            path.write_text(program, encoding="utf-8")
            self._wire = Wire([python, "-I", "-u", str(path), runner], died, folder=self.folder)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> LocalChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ended(self) -> bool:
        """Whether the program is gone."""
        return self._wire.ended

    def request(
        self, fields: Mapping[str, Any], silence_s: float, on_event: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        return self._wire.converse(fields, silence_s, on_event)

    def put(self, paths: Sequence[Path]) -> list[str]:
        return [str(path.resolve()) for path in paths]

    def get(self, remote: str, path: Path, num_bytes: int) -> None:
        source = Path(remote).resolve()
        if not source.is_relative_to(Path(self.folder).resolve()):
            raise MeasurementError(f"the device program names a file outside of its folder: {remote}")
        shutil.copyfile(source, path)

    def close(self) -> None:
        self._wire.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def died(doing: str, code: int | None, said: str) -> SessionLost:
    """The error that a dead device program is."""
    words = f"; its last words:\n{said}" if said else ""
    return SessionLost(f"{doing}: the device program {how_it_ended(code)}{words}")
