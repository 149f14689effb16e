"""The device program as a child process of this one: the device is this machine."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgeprune.errors import MeasurementError
from edgeprune.wire import Wire, died


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
        self.request = self._wire.converse

    def __enter__(self) -> LocalChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
