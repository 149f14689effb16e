"""Measures kernels on a device, batch by batch, each on disk when it is done; goes on when the session is lost."""

from __future__ import annotations

import logging
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgeprune
from edgeprune.backends import Backend
from edgeprune.device_statistics import digits
from edgeprune.errors import DeviceError, DeviceUnreachable, Interrupted, MeasurementError, StorageError
from edgeprune.fingerprint import fingerprint_of
from edgeprune.kernel import Kernel
from edgeprune.measurement import ConnectionLost, Loaded, Measurement, NodeTimes, SessionHung, SessionLost, Timing
from edgeprune.modelled import backend_of
from edgeprune.precision import refusal, shares_of
from edgeprune.references import COMPUTE, MEMORY, load_references
from edgeprune.table import doubt_of
from edgeprune.table_lines import FailureLine, FingerprintLine, RowLine, SessionLine
from edgeprune.table_log import TableLog
from edgeprune.transport import MOST_CUTS, PATIENCE_SECONDS, open_session

if TYPE_CHECKING:
    from edgeprune.device import Device

LOG = logging.getLogger("edgeprune")
BATCH = 8
STARTS = 3  # of the device program, before it counts as gone
MOST_LOST_REFERENCES = 2  # in a row
DOUBTFUL = 0.05  # relative standard error from which on a kernel is measured again
MOST_LOOKS = 3
MAX_DISTURBED = 0.5  # share of rounds above which a batch is measured once more

Progress = Callable[[int, int], None]
"""Called with the number of kernels done and the number to do."""


class Profiler:
    """One device, its session (opened again when it is lost) and the references loaded in it."""

    def __init__(self, device: Device, precision: str, timing: Timing, wait_s: float = 0.0) -> None:
        """`wait_s` is how long to wait for somebody else who measures a remote device."""
        self.device = device
        self.wait_s = wait_s
        self.precision = precision
        self.timing = timing
        self.backend: Backend = backend_of(device, only_to_time=True)
        self.id = secrets.token_hex(4)
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.references: tuple[str, ...] = ()
        self.reference_us: dict[str, list[float]] = {COMPUTE: [], MEMORY: []}
        self.batches = 0
        self.looks: Counter[Kernel] = Counter()
        self.suspects: set[Kernel] = set()  # a session was lost while they ran
        self.machine: dict[str, Any] | None = None  # what the device told about itself when the first one began
        self.slowed: dict[str, None] = {}  # what slowed it down so far
        self.cuts = 0  # of the connection, since something was measured

    def __enter__(self) -> Profiler:
        self.outer = ExitStack()
        self.folder = Path(self.outer.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-kernels-")))
        try:
            self._open()
        except BaseException:
            self.outer.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.inner.close()
        finally:
            self.outer.close()

    def _open(self, patience_s: float = 0.0) -> None:
        self.inner = ExitStack()
        opened = open_session(self.device, precision=self.precision, wait_s=self.wait_s, patience_s=patience_s)
        self.session = self.inner.enter_context(opened)
        self.boot_id = getattr(self.session.channel, "boot_id", None)
        self.fingerprint = fingerprint_of(self.device, self.precision, self.session.hello(), self.timing.regime)
        self.references = ()

    def release(self) -> None:
        """Leave the device to others until `reopen`."""
        self.inner.close()

    def reopen(self) -> None:
        """Go on in a new process, with nothing loaded; `DeviceError` where none starts any more."""
        boot_id = self.boot_id
        for left in reversed(range(STARTS)):
            self.inner.close()
            try:
                self._open(PATIENCE_SECONDS)
                break
            except (DeviceUnreachable, MeasurementError) as error:
                if not left or not isinstance(error, SessionLost):
                    raise DeviceError(f"device '{self.device.name}' has gone: {error}") from error
        if self.boot_id != boot_id:
            LOG.warning("device '%s' was started anew", self.device.name)

    def measure(self, kernels: Sequence[Kernel], log: TableLog, on_progress: Progress) -> None:
        """All kernels, in batches that mix sizes as they come; one that loses the session twice costs itself alone.

        Those whose rounds were too far apart come once more at the end, up to `MOST_LOOKS` times in all.
        """
        self.write_fingerprint(log)
        queue = _batches(kernels)
        done, total = 0, len(kernels)
        doubtful: list[Kernel] = []
        on_progress(done, total)
        try:
            while queue:
                batch = queue.pop(0)
                try:
                    doubtful += self._batch(batch, log)
                except MeasurementError as error:
                    again = self._blame(batch, error, log)
                    queue[:0] = again
                    if isinstance(error, SessionLost):
                        self._go_on(error, log)
                    else:
                        self.session.unload(*(kernel.key for kernel in batch))
                    done -= sum(map(len, again))
                done += len(batch)
                if not queue:  # another time, when whoever disturbed them may have gone
                    queue, total, doubtful = _batches(doubtful), total + len(doubtful), []
                on_progress(done, total)
        except KeyboardInterrupt:
            saved = min(done, len(kernels))
            raise Interrupted(f"interrupted; {saved} of {len(kernels)} kernels are saved in {log.path}") from None
        except (DeviceError, MeasurementError, StorageError) as error:
            if done >= len(kernels) and not isinstance(error, StorageError):
                LOG.warning("%s; all kernels are measured, some might have been more certain", error)
                return
            saved = min(done, len(kernels))
            told = f"{saved} of {len(kernels)} kernels are saved in {log.path}; run it again to go on"
            raise type(error)(f"{error}; {told}") from error

    def _go_on(self, error: SessionLost, log: TableLog) -> None:
        """A new session after one that was lost; it may be under another fingerprint, in another power mode say."""
        self.cuts += isinstance(error, ConnectionLost)
        if self.cuts > MOST_CUTS:
            raise error
        LOG.warning("%s", error)
        before = self.fingerprint
        self.reopen()
        if self.fingerprint != before:
            LOG.warning("device '%s' is not as it was: rows from now on have another fingerprint", self.device.name)
            self.write_fingerprint(log)

    def write_fingerprint(self, log: TableLog) -> None:
        """What the lines that follow belong to."""
        log.append([FingerprintLine(hash=self.fingerprint.short_hash, facts=dict(self.fingerprint.facts))])

    def load_references(self) -> tuple[str, ...]:
        """Load the reference kernels where this session has not yet; gives their keys."""
        if self.machine is None and not self.device.modelled:
            told = self.session.state()
            self.machine = {name: told[name] for name in ("facts", "state", "packages") if told.get(name)}
        if not self.references:
            self.references = load_references(self.session, self.device, self.precision, self.folder)
        return self.references

    def note_references(self, measured: Measurement) -> SessionLine:
        """Add what the references took, and what slowed the device, to this session's; gives the line that says so."""
        self.slowed.update(dict.fromkeys(measured.slowed))
        for name in self.references:
            self.reference_us[name] += list(measured.bursts_us(name).values())
        return self._session_line()

    def _blame(self, batch: list[Kernel], error: MeasurementError, log: TableLog) -> list[list[Kernel]]:
        """Write down whom it failed with; gives the batches to try again.

        A session that is lost may be nobody's fault: the kernel that ran gets a second try, alone. One that hung does
        not: it would take as long again.
        """
        if isinstance(error, ConnectionLost):
            return [batch]
        busy_with = self.session.busy_with
        guilty = [kernel for kernel in batch if kernel.key == busy_with or len(batch) == 1]
        if busy_with in ("load", "measure", "node_times", "unload", "many") and not guilty:
            return [[kernel] for kernel in batch]
        if not guilty or busy_with in (COMPUTE, MEMORY, "state"):  # the program itself: no kernel is to blame
            self.cuts += 1
            if self.cuts > MOST_LOST_REFERENCES or not isinstance(error, SessionLost):
                raise error
            return [batch]
        rest = [kernel for kernel in batch if kernel != guilty[0]]
        others = [rest] if rest else []
        if isinstance(error, SessionLost) and not isinstance(error, SessionHung) and guilty[0] not in self.suspects:
            self.suspects.add(guilty[0])
            return [*others, guilty[:1]]
        log.append([self._failure(guilty[0], str(error))])
        return others

    def _batch(self, batch: Sequence[Kernel], log: TableLog) -> list[Kernel]:
        """Measures a batch; gives the kernels that are to be measured again."""
        self.load_references()
        loaded = self._loaded(batch, log)
        if not loaded:
            return []
        measured, nodes = self._time(list(loaded))
        session = self.note_references(measured)
        lines = [self._line(kernel, measured, nodes.get(kernel.key), loaded[kernel]) for kernel in loaded]
        log.append([session, *lines])
        self.cuts = 0
        try:
            self.session.unload(*(kernel.key for kernel in loaded))
        except SessionLost as error:  # they are measured: a new session has nothing loaded
            self._go_on(error, log)
        for path in self.folder.iterdir():
            path.unlink()
        self.looks.update(loaded.keys())
        vague = {kernel for kernel, line in zip(loaded, lines, strict=True) if _is_vague(line)}
        return [kernel for kernel in loaded if kernel in vague and self.looks[kernel] < MOST_LOOKS]

    def _loaded(self, batch: Sequence[Kernel], log: TableLog) -> dict[Kernel, Loaded]:
        """Build and load what can be; what can't is written down."""
        paths, failed = dict[str, Path](), dict[str, str]()
        for kernel in batch:
            try:
                paths[kernel.key] = self.backend.build(kernel, self.folder)
            except ValueError as error:
                failed[kernel.key] = str(error)
        loaded, refused = self.session.load_all(paths, profile=True) if paths else ({}, {})
        failed.update(refused)
        log.append([self._failure(kernel, failed[kernel.key]) for kernel in batch if kernel.key in failed])
        return {kernel: loaded[kernel.key] for kernel in batch if kernel.key in loaded}

    def _time(self, kernels: Sequence[Kernel]) -> tuple[Measurement, dict[str, NodeTimes]]:
        """Once more where the references say that most rounds were disturbed."""
        keys = [kernel.key for kernel in kernels]
        for _ in range(2):
            self.batches += 1
            measured = self.session.measure(keys, self.references, timing=self.timing, seed=self.batches)
            rounds = len(measured.rounds[self.references[0]])
            if len(measured.disturbed()) <= MAX_DISTURBED * rounds:
                break
        return measured, self.session.node_times_of(keys)

    def _line(
        self, kernel: Kernel, measured: Measurement, nodes: NodeTimes | None, loaded: Loaded
    ) -> RowLine | FailureLine:
        """The row of a kernel, or why it is none: it ran in another precision."""
        ran_in = shares_of(nodes) or loaded.notes.get("ran_in")
        if (reason := refusal(kernel, ran_in)) is not None:
            return self._failure(kernel, reason)
        statistics = statistics_of(kernel.key, measured)
        return RowLine(
            kernel=kernel.to_json(),
            fingerprint=self.fingerprint.short_hash,
            session=self.id,
            node_us=digits(nodes.within(statistics["median_us"])) if nodes else None,
            device_us=digits(nodes.device_us) if nodes and nodes.device_us else None,
            sparse=loaded.notes.get("sparse"),
            ran_in=None if kernel.precision == "fp32" else ran_in,
            clock_mhz=measured.machine.get("clock_mhz"),
            gpu_clock_mhz=measured.machine.get("gpu_clock_mhz"),
            temperature_c=measured.machine.get("temperature_c"),
            **statistics,
        )

    def _failure(self, kernel: Kernel, reason: str) -> FailureLine:
        return FailureLine(
            kernel=kernel.to_json(), fingerprint=self.fingerprint.short_hash, session=self.id, reason=reason[:1000]
        )

    def _session_line(self) -> SessionLine:
        return SessionLine(
            id=self.id,
            fingerprint=self.fingerprint.short_hash,
            started=self.started,
            device=self.device.name,
            references={name: digits(float(np.median(values))) for name, values in self.reference_us.items()},
            rounds=len(self.reference_us[COMPUTE]),
            edgeprune=edgeprune.__version__,
            machine=self.machine or None,
            slowed=list(self.slowed) or None,
        )


def _batches(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    return [list(kernels[i : i + BATCH]) for i in range(0, len(kernels), BATCH)]


def _is_vague(line: RowLine | FailureLine) -> bool:
    return isinstance(line, RowLine) and doubt_of(line.reference_ratio, line.ratio_ci, line.rounds) > DOUBTFUL


def statistics_of(key: str, measured: Measurement) -> dict[str, Any]:
    """The fields of a row that say how long it took: of all rounds but the disturbed, where three others remain."""
    disturbed = measured.disturbed()
    mine = set(measured.rounds[key])
    without = disturbed if len(mine - disturbed) >= 3 else frozenset()
    ratio = measured.ratio(key, without=without)
    runs = measured.runs_us(key, without)
    median = float(np.median([us for n, us in measured.bursts_us(key).items() if n not in without]))
    p90, p99 = (max(median, float(value)) for value in np.percentile(runs, (90, 99)))
    value = digits(ratio.value)
    return {
        "n": len(runs),
        "median_us": digits(median),
        "p90_us": digits(p90),
        "p99_us": digits(p99),
        "spread": digits(ratio.spread),
        "reference": measured.anchors[key],
        "reference_ratio": value,
        "ratio_ci": (min(digits(ratio.low), value), max(digits(ratio.high), value)),
        "rounds": ratio.rounds,
        "disturbed": len(mine & disturbed),
        "origin": "modelled" if measured.modelled else "measured",
    }
