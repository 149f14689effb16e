"""Profile: measure on a device what is missing in its latency table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.fingerprint import Fingerprint, fingerprint_of
from edgeprune.kernel import Kernel
from edgeprune.measurement import KERNELS, Timing
from edgeprune.profiler import Profiler, Progress
from edgeprune.table import LatencyTable, read_table, staleness, table_paths, with_warnings
from edgeprune.table import table_path as default_path
from edgeprune.table_log import open_log
from edgeprune.transport import open_session

if TYPE_CHECKING:
    from edgeprune.device import Device


def profile(
    kernels: Iterable[Kernel],
    device: Device,
    *,
    precision: str | None = None,
    table_path: Path | None = None,
    on_progress: Progress | None = None,
    allow_other: bool = False,
    retry_failed: bool = False,
    timing: Timing = KERNELS,
    wait_s: float = 0.0,
) -> LatencyTable:
    """Measure the kernels that the table lacks; gives the table with its warnings.

    Kernels are of the table's `precision`, or fp32: what the runtime has no kernels for in it. One that can't be built,
    loaded or run, or that the runtime computed in another precision, is remembered as a failure and skipped (tried
    again with `retry_failed`). Without `table_path` the rows that come with edgeprune and those in the user's cache
    count. A `table_path` in which all rows are of another fingerprint is a `TableError`; `allow_other` takes it as it
    is and measures nothing. Where another process writes the table: `TableError` that names it, after waiting `wait_s`
    for it (`math.inf`: as long as it takes); what it measured is not measured again; `DeviceError` likewise where
    somebody else measures a remote device. A connection that is lost is made again. `Interrupted` after a Ctrl-C: what
    was measured is in the table, the next run goes on.
    """
    precision = precision or device.precisions[0]
    wanted = list(dict.fromkeys(kernels))
    for kernel in wanted:
        if kernel.precision not in (precision, "fp32"):
            raise ValueError(f"kernel '{kernel.key}' is not of the precision {precision}")
    path = table_path or default_path(device, precision)
    with Profiler(device, precision, timing, wait_s) as profiler:
        fingerprint = profiler.fingerprint
        other = allow_other or table_path is None  # in the cache a runtime's next version just gets rows of its own
        table = _read(device, precision, table_path, fingerprint, allow_other=other)
        if allow_other and table.fingerprint != fingerprint.short_hash and len(table):
            return table
        missing = missing_kernels(_own(table, fingerprint), wanted, retry_failed)
        if not missing:
            return table
        if device.remote:  # whoever writes the table may wait for the device: never hold that and wait for the table
            profiler.release()
        with open_log(path, wait_s=wait_s) as log:
            if wait_s:
                table = _read(device, precision, table_path, fingerprint, allow_other=other)
                missing = missing_kernels(_own(table, fingerprint), wanted, retry_failed)
            if missing:
                if device.remote:
                    profiler.reopen()
                profiler.measure(missing, log, on_progress or (lambda done, total: None))
    table = _read(device, precision, table_path, fingerprint, allow_other=False)
    return with_warnings(table, [*staleness(table), *slowed_warnings(device, profiler.slowed)])


def known_table(device: Device, precision: str) -> LatencyTable:
    """What is in the device's table for the device as it is today; measures nothing."""
    with open_session(device, precision=precision) as session:
        fingerprint = fingerprint_of(device, precision, session.hello())
    return _own(_read(device, precision, None, fingerprint, allow_other=True), fingerprint)


def slowed_warnings(device: Device, reasons: Iterable[str]) -> list[str]:
    """One warning, or none."""
    listed = "; ".join(reasons)
    if not listed:
        return []
    return [
        f"device '{device.name}' was slowed down while it was measured ({listed}): ratios to the references hold as "
        f"long as both were slowed alike, microseconds don't; see edgeprune doctor --device {device.name}"
    ]


def _read(
    device: Device, precision: str, path: Path | None, fingerprint: Fingerprint, *, allow_other: bool
) -> LatencyTable:
    known = fingerprint.short_hash
    paths = [path] if path else table_paths(device, precision, known, allow_other=allow_other)
    table = read_table(paths, known, allow_other=allow_other)
    if table.fingerprint == fingerprint.short_hash and not table.facts:  # its line is damaged, but the device is here
        return replace(table, facts=dict(fingerprint.facts))
    return table


def _own(table: LatencyTable, fingerprint: Fingerprint) -> LatencyTable:
    """The table, or an empty one where its rows are another device's, or no session timed what they are ratios to."""
    usable = table.fingerprint == fingerprint.short_hash and table.sessions
    return table if usable else read_table((), fingerprint.short_hash)


def missing_kernels(table: LatencyTable, wanted: Iterable[Kernel], retry_failed: bool = False) -> list[Kernel]:
    """Those that were not measured; what failed counts as measured unless it is to be tried again."""
    return [k for k in wanted if k not in table and (retry_failed or k not in table.failures)]
