"""The runtimes: one folder each, found by listing this one; third parties come in by the entry-point group below."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edgeprune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from edgeprune.engine import Calibration, Engine
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned
    from edgeprune.unit import Unit

ENTRY_POINTS = "edgeprune.backends"


class Backend(Protocol):
    """Host half of a runtime: a *module* with these names satisfies it, no class needed.

    The device half is the file at `runner_path()`. Nothing here imports the runtime before a function needs it.
    """

    name: str
    modelled: bool  # its numbers come from a formula, not from a clock
    kernels: int  # counts up when kernels are built in another way: numbers of before are of other work

    def available(self) -> str | None:
        """None when it can run here, else one line with the fix."""

    def version(self) -> str | None:
        """Of the installed runtime; None when it is missing."""

    def runner_path(self) -> Path:
        """The device half: one file, standard library and runtime only, Python 3.8."""

    def partition(self, graph: ModelGraph, precision: str) -> Sequence[Unit]:
        """The kernel instances as this runtime fuses the graph."""

    def build(self, kernel: Kernel, folder: Path) -> Path:
        """Write the small model file that the runner loads to time one kernel."""

    def export(
        self,
        pruned: Pruned,
        folder: Path,
        precision: str,
        *,
        kernels: Sequence[Kernel] = (),
        weights: str = "fp32",
        calibration: Calibration = (),
    ) -> Engine:
        """Write the engine of a pruned model, whose `kernels` are given for devices whose time is a sum over them.

        `weights` is how they are stored: `fp32`, or `fp16` where the format can; the arithmetic is in `precision`. The
        ranges of activations in int8 are found on `calibration`, batches of inputs as the model takes them.
        """


def backend_names() -> list[str]:
    shipped = {folder.parent.name for folder in Path(__file__).parent.glob("*/__init__.py")}
    return sorted(shipped | {point.name for point in metadata.entry_points(group=ENTRY_POINTS)})


def find_backend(name: str) -> Backend:
    if (Path(__file__).parent / name / "__init__.py").is_file():
        return cast(Backend, importlib.import_module(f"edgeprune.backends.{name}"))
    for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
        return cast(Backend, point.load())
    known = backend_names()
    raise InputError(f"no backend '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
