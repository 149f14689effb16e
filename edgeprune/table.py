"""Latency tables: measurements of kernels on one device, read from append-only logs of JSON lines.

What counts in a row is its ratio to a reference kernel timed in the same rounds; microseconds are derived when read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from edgeprune.errors import TableError
from edgeprune.fingerprint import describe
from edgeprune.folders import cache_dir, shipped_tables
from edgeprune.kernel import Kernel
from edgeprune.table_lines import (
    FailureLine,
    FingerprintLine,
    ImportedLine,
    NetworkLine,
    RowLine,
    SessionLine,
    UnknownSchema,
    parse_line,
)

if TYPE_CHECKING:
    from edgeprune.device import Device

CONTRADICTION = 0.10
LEAST_DOUBT = 0.01
"""Rows that are more certain than this count alike: their rounds don't tell of what changes between sessions."""
STALE = 0.05


@dataclass(frozen=True, kw_only=True)
class Entry:
    """All rows of one kernel as one: medians of their ratios, by certainty. `n` and `rounds` are sums."""

    kernel: Kernel
    reference: str
    ratio: float
    ratio_ci: tuple[float, float]
    node_ratio: float | None
    spread: float
    n: int
    rounds: int
    disturbed: int
    rows: int
    origin: str

    @property
    def doubt(self) -> float:
        """Relative standard error of the ratio, as its rounds tell."""
        return doubt_of(self.ratio, self.ratio_ci, self.rounds)

    @property
    def best_ratio(self) -> float:
        """Of the compute node where the runtime tells it, else from end to end."""
        return self.ratio if self.node_ratio is None else self.node_ratio


def doubt_of(ratio: float, interval: tuple[float, float], rounds: int) -> float:
    """Relative standard error, from an interval of 95 % that is normal; wider by Student's factor for few rounds.

    One or two (of a runtime that times itself, many runs each) tell no spread.
    """
    low, high = interval
    factor = stdtrit(rounds - 1, 0.975) / 1.96 if rounds > 2 else 1.0
    return float((high - low) / (2 * 1.96 * ratio) * factor)


@dataclass(frozen=True, kw_only=True)
class NetworkEntry:
    """A whole network that was measured: the kernel of each unit, by name, and what it took, over the reference.

    `structure` is the hash of the model it was cut from; `nodes` are empty where the runtime tells no node times.
    """

    structure: str
    kernels: Mapping[str, Kernel]
    nodes: Mapping[str, float]
    reference: str
    ratio: float
    ratio_ci: tuple[float, float]
    origin: str


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """The measurements of one fingerprint. `warnings` names what was skipped, merged or stale; nothing is hidden."""

    fingerprint: str
    facts: Mapping[str, Any]
    entries: Mapping[Kernel, Entry]
    failures: Mapping[Kernel, str]
    sessions: Sequence[SessionLine]
    networks: tuple[NetworkEntry, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __contains__(self, kernel: object) -> bool:
        return kernel in self.entries

    @property
    def origin(self) -> str:
        """`modelled` as soon as one row is."""
        return "modelled" if any(entry.origin == "modelled" for entry in self) else "measured"

    @property
    def references_us(self) -> Mapping[str, float]:
        """Times of the reference kernels in the latest session, microseconds."""
        return self.sessions[-1].references if self.sessions else {}

    def look_up(self, kernel: Kernel) -> Entry:
        """`TableError` when it was not measured: nothing is interpolated, and nothing counts as 0, here."""
        if kernel in self.entries:
            return self.entries[kernel]
        if kernel in self.failures:
            raise TableError(f"kernel '{kernel.key}' could not be measured: {self.failures[kernel]}")
        raise TableError(f"kernel '{kernel.key}' is not in the table; profile it first")

    def latency_us(
        self, kernel: Kernel, *, node: bool = False, references_us: Mapping[str, float] | None = None
    ) -> float:
        """Ratio times the time of its reference: of the latest session, or as timed today (`references_us`).

        From end to end, or of the compute node alone (`node`; end to end where the runtime doesn't tell).
        """
        entry = self.look_up(kernel)
        times = self.references_us if references_us is None else references_us
        if entry.reference not in times:
            raise TableError(f"no session of the table has timed the reference '{entry.reference}'")
        return (entry.best_ratio if node else entry.ratio) * times[entry.reference]


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """Everything that stands in one or more files, before a fingerprint is chosen."""

    rows: tuple[RowLine, ...]
    failures: tuple[FailureLine, ...]
    networks: tuple[NetworkLine, ...]
    sessions: Mapping[str, SessionLine]
    fingerprints: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]
    imported: tuple[ImportedLine, ...] = ()  # never among the rows: no reference was timed beside them


def table_path(device: Device, precision: str) -> Path:
    """The user's file for a device; may not exist yet."""
    return cache_dir() / "latency_tables" / device.name / f"{device.backend}_{precision}.jsonl"


def shipped_path(device: Device, precision: str) -> Path:
    """The file that comes with edgeprune; may not exist."""
    return shipped_tables() / device.name / f"{device.backend}_{precision}.jsonl"


def table_paths(device: Device, precision: str, fingerprint: str, *, allow_other: bool = False) -> list[Path]:
    """The user's file, and before it the one that comes with edgeprune if it was measured on this fingerprint.

    With `allow_other` also if it was not, where the user has no file yet. Else its rows are those of other machines,
    which is no fault of the user's.
    """
    own, shipped = table_path(device, precision), shipped_path(device, precision)
    if not shipped.is_file():
        return [own]
    is_here = f'"fingerprint":"{fingerprint}"'.encode() in shipped.read_bytes()
    return [shipped, own] if is_here or (allow_other and not own.exists()) else [own]


def read_table(
    paths: Path | Iterable[Path], fingerprint: str | None = None, *, allow_other: bool = False
) -> LatencyTable:
    """The rows of one fingerprint (that of the latest session unless told) of one or more files, missing ones left out.

    `TableError` where there are rows, and all of another fingerprint, unless `allow_other` asks for just these.
    """
    listed = [paths] if isinstance(paths, Path) else list(paths)
    file = read_lines(path for path in listed if path.exists())
    known = {row.fingerprint for row in file.rows}
    warnings = list(file.warnings)
    latest = max(file.sessions.values(), key=lambda s: s.started, default=None)
    other = latest.fingerprint if latest and latest.fingerprint in known else next(iter(known), "")
    if fingerprint is None:
        fingerprint = other
    elif known and fingerprint not in known:
        theirs = describe(file.fingerprints[other]) if other in file.fingerprints else f"fingerprint {other}"
        message = f"the table was measured on {theirs}, which is not this device (fingerprint {fingerprint})"
        if not allow_other:
            raise TableError(f"{message}; ask for it with --allow-other-table, or profile anew", file=listed[0])
        warnings.append(message)
        fingerprint = other
    return select(replace(file, warnings=tuple(warnings)), fingerprint)


def read_lines(paths: Iterable[Path]) -> TableFile:
    """Every good line; a bad one is named by file and line in `warnings` and skipped.

    Rows of a session or fingerprint that is defined in another schema alone are skipped with it.
    """
    rows: list[RowLine] = []
    failures: list[FailureLine] = []
    networks: list[NetworkLine] = []
    imported: list[ImportedLine] = []
    foreign: set[str] = set()  # sessions and fingerprints of another schema
    sessions: dict[str, SessionLine] = {}
    fingerprints: dict[str, Mapping[str, Any]] = {}
    warnings: list[str] = []
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TableError(f"cannot be read: {error.strerror}", file=path) from None
        for number, text in enumerate(content.split(b"\n"), 1):
            if not text.strip():
                continue
            try:
                line = parse_line(text)
            except ValueError as error:
                warnings.append(f"{path}:{number}: skipped, {error}")
                if isinstance(error, UnknownSchema):
                    foreign.add(error.name)
                continue
            if isinstance(line, RowLine):
                rows.append(line)
            elif isinstance(line, FailureLine):
                failures.append(line)
            elif isinstance(line, NetworkLine):
                networks.append(line)
            elif isinstance(line, ImportedLine):
                imported.append(line)
            elif isinstance(line, FingerprintLine):
                fingerprints[line.hash] = line.facts
            elif line.id not in sessions or line.rounds >= sessions[line.id].rounds:
                sessions[line.id] = line
    foreign -= {*sessions, *fingerprints}
    known = [row for row in rows if not {row.session, row.fingerprint} & foreign]
    if len(known) < len(rows):
        warnings.append(f"{len(rows) - len(known)} rows skipped: their session or fingerprint is of another schema")
    return TableFile(
        rows=tuple(known),
        failures=tuple(failure for failure in failures if not {failure.session, failure.fingerprint} & foreign),
        networks=tuple(network for network in networks if not {network.session, network.fingerprint} & foreign),
        imported=tuple(imported),
        sessions=sessions,
        fingerprints=fingerprints,
        warnings=tuple(warnings),
    )


def select(file: TableFile, fingerprint: str) -> LatencyTable:
    """The rows of one fingerprint, several of one kernel as one entry; what contradicts stands in `warnings`."""
    warnings = list(file.warnings)
    by_kernel: dict[Kernel, list[RowLine]] = {}
    for row in file.rows:
        if row.fingerprint == fingerprint:
            by_kernel.setdefault(Kernel.from_json(row.kernel), []).append(row)
    entries = {}
    for kernel, rows in by_kernel.items():
        rows = list({(row.session, row.median_us, row.n): row for row in rows}.values())  # a file merged with itself
        ratios = [row.reference_ratio for row in rows]
        apart = max(row.ratio_ci[0] for row in rows) > min(row.ratio_ci[1] for row in rows)
        if apart and max(ratios) > (1 + CONTRADICTION) * min(ratios):
            range_ = f"{min(ratios):.4g} to {max(ratios):.4g}"
            warnings.append(
                f"kernel '{kernel.key}': {len(rows)} rows contradict each other, {range_}; the median counts"
            )
        entries[kernel] = _merge(kernel, rows)
        if left_out := len(rows) - entries[kernel].rows:
            warnings.append(f"kernel '{kernel.key}': {left_out} rows of another reference or origin left out")
    failures = {Kernel.from_json(f.kernel): f.reason for f in file.failures if f.fingerprint == fingerprint}
    sessions = [session for session in file.sessions.values() if session.fingerprint == fingerprint]
    return LatencyTable(
        fingerprint=fingerprint,
        facts=file.fingerprints.get(fingerprint, {}),
        entries=entries,
        failures={kernel: reason for kernel, reason in failures.items() if kernel not in entries},
        sessions=sorted(sessions, key=lambda session: session.started),
        networks=tuple(network_entries(n for n in file.networks if n.fingerprint == fingerprint)),
        warnings=tuple(warnings),
    )


def network_entries(lines: Iterable[NetworkLine]) -> Iterator[NetworkEntry]:
    """Each line once; of a file merged with itself too."""
    for line in dict.fromkeys(line.to_line() for line in lines):
        found = NetworkLine.model_validate_json(line)
        yield NetworkEntry(
            structure=found.structure,
            kernels={unit.name: Kernel.from_json(unit.kernel) for unit in found.units},
            nodes={unit.name: unit.node_ratio for unit in found.units if unit.node_ratio is not None},
            reference=found.reference,
            ratio=found.reference_ratio,
            ratio_ci=found.ratio_ci,
            origin=found.origin,
        )


def _merge(kernel: Kernel, rows: Sequence[RowLine]) -> Entry:
    latest = rows[-1]
    rows = [row for row in rows if row.reference == latest.reference and row.origin == latest.origin]
    told = [row for row in rows if row.node_ratio is not None]
    return Entry(
        kernel=kernel,
        reference=latest.reference,
        ratio=_median([row.reference_ratio for row in rows], rows),
        ratio_ci=(_median([row.ratio_ci[0] for row in rows], rows), _median([row.ratio_ci[1] for row in rows], rows)),
        node_ratio=_median([row.node_ratio or 0.0 for row in told], told) if told else None,
        spread=_median([row.spread for row in rows], rows),
        n=sum(row.n for row in rows),
        rounds=sum(row.rounds for row in rows),
        disturbed=sum(row.disturbed for row in rows),
        rows=len(rows),
        origin=latest.origin,
    )


def _median(values: Sequence[float], rows: Sequence[RowLine]) -> float:
    """Weighted by how certain each row is: one that other work hit in every round counts little beside a quiet one.

    The least value up to which half of all weight lies; where that is exactly half, the mean of it and the next.
    """
    doubts = [max(LEAST_DOUBT, doubt_of(row.reference_ratio, row.ratio_ci, row.rounds)) for row in rows]
    order = np.argsort(values, kind="stable")
    weights = (1 / np.square(doubts))[order]
    below = np.cumsum(weights) / weights.sum()
    first, next_ = (int(np.searchsorted(below, 0.5 + shift)) for shift in (-1e-9, 1e-9))
    ordered = np.asarray(values)[order]
    return float((ordered[first] + ordered[next_]) / 2)


def staleness(table: LatencyTable) -> list[str]:
    """One warning for each reference that ran differently in the latest session than in those before."""
    if len(table.sessions) < 2:
        return []
    warnings = []
    for name, today in table.references_us.items():
        before = [s.references[name] for s in table.sessions[:-1] if name in s.references]
        change = today / float(np.median(before)) - 1 if before else 0.0
        if abs(change) > STALE:
            warnings.append(
                f"stale: the {name} reference runs {abs(change):.0%} {'slower' if change > 0 else 'faster'} than in "
                f"{len(before)} earlier session{'s' * (len(before) > 1)}; the rows of those are scaled by ratio"
            )
    return warnings


def with_warnings(table: LatencyTable, warnings: Iterable[str]) -> LatencyTable:
    return replace(table, warnings=(*table.warnings, *warnings))


def without_networks(table: LatencyTable) -> LatencyTable:
    """Kernels alone: what whole networks teach takes time to learn, and says nothing about what to measure."""
    return replace(table, networks=())
