"""The backend of a device: its runtime's, or that runtime where the device is not this machine or only a data sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeprune.backends import Backend, find_backend
from edgeprune.errors import RuntimeMissing

if TYPE_CHECKING:
    from edgeprune.device import Device
    from edgeprune.engine import Calibration, Engine
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned
    from edgeprune.roofline import Roofline
    from edgeprune.unit import Unit


def backend_of(device: Device, *, only_to_time: bool = False) -> Backend:
    """Who partitions, builds and exports for a device.

    With `only_to_time` the engines of a device with a roofline are lists of kernels, for which its runtime need not be
    installed; any other device's are whole.
    """
    runtime = find_backend(device.backend)
    if device.roofline is None:
        return cast(Backend, Remote(runtime=runtime)) if device.remote else runtime
    return cast(Backend, Modelled(runtime=runtime, roofline=device.roofline, engines=not only_to_time))


def installed(device: Device, *, only_to_time: bool = False, engines_in: Iterable[str] = ()) -> Backend:
    """`backend_of` a device; `RuntimeMissing`, with the line that installs it, where something for it is missing.

    `engines_in` are the precisions in which engines of networks will be written: int8 takes a quantiser.
    """
    backend = backend_of(device, only_to_time=only_to_time)
    writes = device.roofline is None or not only_to_time
    runtime = find_backend(device.backend)
    told = [backend.available(), *(packages_missing(runtime, precision) for precision in engines_in if writes)]
    for missing in filter(None, told):
        raise RuntimeMissing(missing)
    return backend


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A `Backend` whose runtime runs on another machine: here it only builds and exports, as the runtime's own does."""

    runtime: Backend

    def available(self) -> str | None:
        """What models can't be written without; whether the runtime is over there, only the device can tell."""
        return packages_missing(self.runtime)

    def __getattr__(self, name: str) -> Any:
        """All else."""
        return getattr(self.runtime, name)


def packages_missing(runtime: Backend, precision: str = "fp32") -> str | None:
    """What a runtime's engines in a precision can't be written without and isn't here, with the line that installs it.

    Kernels take no more than engines in fp32, in any precision.
    """
    asked: Callable[[str], str | None] | None = getattr(runtime, "missing_packages", None)
    return runtime.available() if asked is None else asked(precision)


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
        return packages_missing(self.runtime) if self.engines else None

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
        **form: str,
    ) -> Engine:
        """The runtime's engine, with the times of its kernels beside it in model.json; `form` as of any runtime."""
        from edgeprune.backends import null

        times = null.export(pruned, folder, precision, kernels=kernels, roofline=self.roofline)
        if not self.engines:
            return replace(times, backend=self.name)
        how: dict[str, Any] = {"weights": weights, "calibration": calibration, **form}
        engine = self.runtime.export(pruned, folder, precision, **how)
        return replace(engine, files=(*engine.files, times.path), notes={**engine.notes, "latency": "modelled"})


def _null() -> Backend:
    return find_backend("null")
