"""The backend of a device: its runtime's, or that runtime timed by a roofline where the device is not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgeprune.backends import Backend, find_backend

if TYPE_CHECKING:
    from edgeprune.device import Device
    from edgeprune.engine import Calibration, Engine
    from edgeprune.fusion import Unit
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned
    from edgeprune.roofline import Roofline


def backend_of(device: Device, *, only_to_time: bool = False) -> Backend:
    """Who partitions, builds and exports for a device.

    With `only_to_time` the engines of a device with a roofline are lists of kernels, for which its runtime need not be
    installed; any other device's are whole.
    """
    runtime = find_backend(device.backend)
    if device.roofline is None:
        return runtime
    return cast(Backend, Modelled(runtime=runtime, roofline=device.roofline, engines=not only_to_time))


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """A `Backend` that partitions and exports as `runtime` does; a roofline tells the times of its kernels."""

    runtime: Backend
    roofline: Roofline
    engines: bool = True
    modelled: bool = True

    @property
    def name(self) -> str:
        """That of the runtime."""
        return self.runtime.name

    def available(self) -> str | None:
        """What the runtime's engines can't be written without; to run them here is not needed."""
        if not self.engines:
            return None
        missing: str | None = getattr(self.runtime, "missing_packages", self.runtime.available)()
        return missing

    def version(self) -> str | None:
        """Of the formula."""
        return _null().version()

    def runner_path(self) -> Path:
        """The null device's: it tells times and computes nothing."""
        return _null().runner_path()

    def partition(self, graph: ModelGraph, precision: str) -> Sequence[Unit]:
        """As the runtime fuses the graph."""
        return self.runtime.partition(graph, precision)

    def build(self, kernel: Kernel, folder: Path) -> Path:
        """The time of one kernel."""
        from edgeprune.backends import null

        return null.build(kernel, folder, self.roofline)

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
        """The runtime's engine, with the times of its kernels beside it in model.json."""
        from edgeprune.backends import null

        times = null.export(pruned, folder, precision, kernels=kernels, roofline=self.roofline)
        if not self.engines:
            return replace(times, backend=self.name)
        engine = self.runtime.export(pruned, folder, precision, weights=weights, calibration=calibration)
        return replace(engine, files=(*engine.files, times.path), notes={**engine.notes, "latency": "modelled"})


def _null() -> Backend:
    return find_backend("null")
