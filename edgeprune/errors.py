"""Every error that edgeprune raises on purpose; the command line prints its message and ends with its exit code.

    EdgepruneError          1  failure
    ├── UsageError          2  a command line that doesn't parse
    ├── InputError          2  a value or a file that isn't what it should be
    │   ├── TableError      2  a latency table: corrupt, stale, of another machine
    │   └── WeightsError    2  weights that don't fit the model, or hold code
    ├── BudgetError         3  the budget can't be met
    ├── DeviceError         4  the device can't be reached, or somebody else measures it
    │   └── DeviceUnreachable 4  no answer from it just now; it may come back
    ├── RuntimeMissing      5  a runtime or package is missing; the message holds the line that installs it
    ├── UnstableError       6  too noisy for the asked confidence
    ├── QualityError        7  the quality gate failed
    ├── MeasurementError    1  the device program failed
    ├── RefusedError        1  nothing in the model can be pruned; `reasons` says why
    ├── StorageError        1  disk full, folder not writable
    ├── SurgeryError        1  a plan that doesn't fit the model
    ├── TamperedError       1  a file of a bundle isn't the one of its manifest
    ├── InternalError       1  a bug: an exception of no other kind reached the command line
    └── Interrupted       130  Ctrl-C or SIGTERM; what was measured is saved

A message says what was asked, what was found and what to do. A caller's bad argument is a `ValueError`, our own bug an
`assert`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import ClassVar


class EdgepruneError(Exception):
    """Base of the tree; `kind` and `exit_code` are what other programs read."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "failure"


class UsageError(EdgepruneError):
    exit_code = 2
    kind = "usage"


class InputError(EdgepruneError):
    """`file` and `place` (a line number, a key) come before the message: `devices.yaml:12: ...`."""

    exit_code = 2
    kind = "input"

    def __init__(self, message: str, *, file: Path | str | None = None, place: int | str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.place = place

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.place) if part is not None)
        return f"{where}: {self.args[0]}" if where else str(self.args[0])


class TableError(InputError):
    kind = "table"


class WeightsError(InputError):
    kind = "weights"


class BudgetError(EdgepruneError):
    exit_code = 3
    kind = "budget"


class DeviceError(EdgepruneError):
    exit_code = 4
    kind = "device"


class DeviceUnreachable(DeviceError):
    """Worth another try: a network that is down, a device that starts again."""

    kind = "device-unreachable"


class RuntimeMissing(EdgepruneError):
    """`fix` says what installs it, where the message doesn't."""

    exit_code = 5
    kind = "runtime-missing"

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix

    def __str__(self) -> str:
        return "; ".join(filter(None, [self.args[0], self.fix]))


class UnstableError(EdgepruneError):
    exit_code = 6
    kind = "unstable"


class QualityError(EdgepruneError):
    exit_code = 7
    kind = "quality"


class MeasurementError(EdgepruneError):
    kind = "measurement"


class RefusedError(EdgepruneError):
    kind = "refused"

    def __init__(self, message: str, *, reasons: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)

    def __str__(self) -> str:
        return "\n  ".join([*self.args, *self.reasons])


class StorageError(EdgepruneError):
    kind = "storage"

    @classmethod
    def from_os(cls, path: Path | str, error: OSError) -> StorageError:
        return cls(f"cannot write {path}: {error.strerror or error}")


class SurgeryError(EdgepruneError):
    kind = "surgery"


class TamperedError(EdgepruneError):
    kind = "tampered"


class InternalError(EdgepruneError):
    kind = "internal"


class Interrupted(EdgepruneError):
    exit_code = 130
    kind = "interrupted"

    def __init__(self, message: str = "interrupted; what was measured is saved") -> None:
        super().__init__(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or `""`."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def install_line(extra: str) -> str:
    """The line that installs one of the extras of pyproject.toml."""
    return f"pip install 'edgeprune[{extra}]'"


def not_installed(modules: Iterable[str], extra: str) -> str | None:
    """`onnx, onnxslim not installed: pip install 'edgeprune[onnx]'`; None where all of them are here.

    Packages are called as their modules, with dashes.
    """
    missing = [module.replace("_", "-") for module in modules if util.find_spec(module) is None]
    return f"{', '.join(missing)} not installed: {install_line(extra)}" if missing else None
