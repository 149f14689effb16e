"""Tables by name, and what stands in one as a flat list: measured or modelled rows, or imported ones, never both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune.device import load_device, load_devices
from edgeprune.errors import InputError, TableError, did_you_mean
from edgeprune.fingerprint import describe
from edgeprune.folders import cache_dir, shipped_tables
from edgeprune.kernel import Kernel
from edgeprune.table import TableFile, read_lines, select, shipped_path, staleness, table_path
from edgeprune.table_lines import ImportedLine

IMPORTED = "imported"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One kernel or named entry with its latency in microseconds; the rest is None for an imported one."""

    name: str  # the kernel's key, or the entry's name in its source
    kernel: Kernel | None
    latency_us: float
    origin: str
    node_us: float | None = None
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None
    reference: str | None = None
    spread: float | None = None
    n: int | None = None
    rounds: int | None = None
    disturbed: int | None = None
    value: float | None = None  # as imported, in `unit`
    unit: str | None = None
    flags: Sequence[str] = ()

    @property
    def best_us(self) -> float:
        """Of the compute node alone where the runtime tells it, else from end to end."""
        return self.latency_us if self.node_us is None else self.node_us


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All items of one fingerprint. `others` counts the items of the other fingerprints of the same files."""

    name: str
    paths: tuple[Path, ...]
    fingerprint: str
    facts: Mapping[str, Any]
    items: tuple[Item, ...]
    failures: Mapping[str, str]  # kernel's key: reason
    sessions: int
    references_us: Mapping[str, float]
    others: Mapping[str, int]
    warnings: tuple[str, ...] = field(default=())

    @property
    def origin(self) -> str:
        """`measured`, `modelled`, `imported`; `empty` where there is nothing."""
        origins = {item.origin for item in self.items}
        return next((word for word in (IMPORTED, "modelled", "measured") if word in origins), "empty")

    @property
    def description(self) -> str:
        """What it was measured on, in words."""
        if self.origin == IMPORTED:
            return f"{self.facts.get('version')} table {self.facts.get('source')}"
        return describe(self.facts) if self.facts else f"fingerprint {self.fingerprint} (not defined in the file)"


def find_tables(name: str) -> tuple[Path, ...]:
    """The files that a name means: a path, a device (shipped and user's tables, every precision) or a name of `list`.

    `InputError` where it is none of these, `TableError` for a device that has no table yet.
    """
    if name.endswith(".jsonl") or name.startswith((".", "/")):
        return (Path(name),)
    devices = load_devices()
    if name in devices or any(name in device.aliases for device in devices.values()):
        device = load_device(name)
        places = [place(device, p) for p in device.precisions for place in (shipped_path, table_path)]
        if not any(path.exists() for path in places):
            raise TableError(f"device '{name}' has no table yet; measure one: edgeprune profile --device {name}")
        return tuple(path for path in places if path.exists())
    listed = {path.with_suffix("").relative_to(root).as_posix(): path for root in _roots() for path in _files(root)}
    if name in listed:
        return tuple(path for path in (root / f"{name}.jsonl" for root in _roots()) if path.exists())
    if Path(name).exists():
        return (Path(name),)
    hint = did_you_mean(name, [*devices, *listed])
    raise InputError(f"'{name}' is neither a file nor a device of devices.yaml nor a table of `table list`{hint}")


def read_listing(name: str) -> Listing:
    """The table that `name` means; `NAME@HASH` takes that fingerprint (its first digits), else the latest session's.

    `TableError` for a file that can't be read or holds no line of a table.
    """
    match = None if Path(name).exists() else re.fullmatch(r"(.+)@([0-9a-f]{1,12})", name)
    bare, wanted = match.groups() if match else (name, "")
    paths = find_tables(bare)
    file = checked_lines(paths)
    counts = _counts(file)
    fingerprint = _choose(bare, file, counts, wanted)
    others = {other: count for other, count in counts.items() if other != fingerprint}
    listing = Listing(
        name=bare,
        paths=paths,
        fingerprint=fingerprint,
        facts=file.fingerprints.get(fingerprint, {}),
        items=(),
        failures={},
        sessions=0,
        references_us={},
        others=others,
        warnings=file.warnings,
    )
    imported = any(line.fingerprint == fingerprint for line in file.imported)
    return _imported(listing, file) if imported else _measured(listing, file)


def checked_lines(paths: Sequence[Path]) -> TableFile:
    """`read_lines`, but `TableError` for a file that is missing, or of which no line is one of a table."""
    for path in paths:
        if not path.exists():
            raise TableError("there is no such file", file=path)
    file = read_lines(paths)
    good = (file.rows, file.failures, file.networks, file.sessions, file.fingerprints, file.imported)
    if file.warnings and not any(good):
        raise TableError(f"none of its lines can be read as a latency table's ({file.warnings[0]})", file=paths[0])
    return file


@dataclass(frozen=True, kw_only=True)
class Known:
    """One file of `table list`; `fault` says why it can't be read."""

    name: str
    place: str  # yours or shipped
    path: Path
    kernels: int = 0
    failures: int = 0
    fingerprints: int = 0
    origin: str = "empty"
    latest: str | None = None  # UTC, ISO 8601
    description: str = ""
    warnings: int = 0
    fault: str | None = None


def list_tables() -> list[Known]:
    """Every table of the user's cache and those that come with edgeprune; one that can't be read is listed as that."""
    found = []
    for root, place in zip(_roots(), ("shipped", "yours"), strict=True):
        for path in _files(root):
            known = Known(name=path.with_suffix("").relative_to(root).as_posix(), place=place, path=path)
            try:
                found.append(_known(known))
            except TableError as error:
                found.append(replace(known, fault=str(error)))
    return found


def _known(known: Known) -> Known:
    listing = read_listing(str(known.path))
    file = read_lines(listing.paths)
    return replace(
        known,
        kernels=len(listing.items),
        failures=len(listing.failures),
        fingerprints=len(listing.others) + bool(listing.items),
        origin=listing.origin,
        latest=max((session.started for session in file.sessions.values()), default=None),
        description=listing.description if listing.items else "",
        warnings=len(listing.warnings),
    )


def _roots() -> tuple[Path, Path]:
    return shipped_tables(), cache_dir() / "latency_tables"


def _files(root: Path) -> Iterator[Path]:
    yield from sorted(path for path in root.rglob("*.jsonl") if path.is_file())


def _counts(file: TableFile) -> dict[str, int]:
    counts: dict[str, int] = {}
    for fingerprint in (*(row.fingerprint for row in file.rows), *(line.fingerprint for line in file.imported)):
        counts[fingerprint] = counts.get(fingerprint, 0) + 1
    return counts


def _choose(name: str, file: TableFile, counts: Mapping[str, int], wanted: str) -> str:
    if wanted:
        fitting = [fingerprint for fingerprint in counts if fingerprint.startswith(wanted)]
        if len(fitting) != 1:
            have = ", ".join(counts) or "none"
            raise TableError(f"'{name}' has {len(fitting)} fingerprints that start with '{wanted}' (it has: {have})")
        return fitting[0]
    sessions = [session for session in file.sessions.values() if session.fingerprint in counts]
    if sessions:
        return max(sessions, key=lambda session: session.started).fingerprint
    return next(iter(counts), "")


def _imported(listing: Listing, file: TableFile) -> Listing:
    by_name: dict[str, dict[float, ImportedLine]] = {}
    for line in file.imported:
        if line.fingerprint == listing.fingerprint:
            by_name.setdefault(line.name, {})[line.latency_us] = line
    warnings = [
        f"'{name}': left out, {len(lines)} lines contradict each other"
        for name, lines in by_name.items()
        if len(lines) > 1
    ]
    items = (
        Item(
            name=line.name,
            kernel=None if line.kernel is None else Kernel.from_json(line.kernel),
            latency_us=line.latency_us,
            origin=IMPORTED,
            value=line.value,
            unit=line.unit,
            flags=tuple(line.flags or ()),
        )
        for lines in by_name.values()
        if len(lines) == 1
        for line in lines.values()
    )
    return replace(listing, items=tuple(items), warnings=(*listing.warnings, *warnings))


def _measured(listing: Listing, file: TableFile) -> Listing:
    table = select(file, listing.fingerprint)
    warnings = [*table.warnings, *staleness(table)]
    items = []
    for entry in sorted(table, key=lambda entry: entry.kernel):
        clock = table.references_us.get(entry.reference)
        if clock is None:
            warnings.append(f"kernel '{entry.kernel.key}': left out, no session has timed '{entry.reference}'")
            continue
        items.append(
            Item(
                name=entry.kernel.key,
                kernel=entry.kernel,
                latency_us=entry.ratio * clock,
                node_us=None if entry.node_ratio is None else entry.node_ratio * clock,
                origin=entry.origin,
                ratio=entry.ratio,
                ratio_ci=entry.ratio_ci,
                reference=entry.reference,
                spread=entry.spread,
                n=entry.n,
                rounds=entry.rounds,
                disturbed=entry.disturbed,
            )
        )
    return replace(
        listing,
        items=tuple(items),
        failures={kernel.key: reason for kernel, reason in table.failures.items()},
        sessions=len(table.sessions),
        references_us=table.references_us,
        warnings=tuple(warnings),
    )
