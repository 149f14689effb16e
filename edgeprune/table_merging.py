"""Several table files as one, and a file without what no reader needs: told line by line, written whole or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune.errors import TableError
from edgeprune.folders import write_atomically
from edgeprune.table import read_lines, select
from edgeprune.table_lines import (
    FailureLine,
    FingerprintLine,
    ImportedLine,
    Line,
    NetworkLine,
    RowLine,
    SessionLine,
    UnknownSchema,
    parse_line,
)
from edgeprune.table_listing import checked_lines
from edgeprune.table_log import locked


@dataclass(frozen=True, kw_only=True)
class Read:
    """One line of a file; `line` is None where it can't be read, and `fault` says why."""

    path: Path
    number: int  # from 1
    text: bytes  # without its end
    line: Line | None
    fault: str = ""

    @property
    def place(self) -> str:
        return f"{self.path}:{self.number}"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `merge` wrote and what it left out or doubts. `unreadable` and `contradicting` name places and kernels."""

    out: Path
    lines: Mapping[str, int]  # of each input file, blank ones not counted
    written: int
    duplicates: int
    unreadable: tuple[str, ...]
    contradicting: tuple[str, ...]
    undefined: tuple[str, ...]  # sessions and fingerprints that rows name and no line defines
    fingerprints: Mapping[str, int]  # rows of each


def read_raw(paths: Sequence[Path]) -> list[Read]:
    """Every line that isn't blank, as it stands; what hangs on a header of another schema is unreadable with it.

    `TableError` for a file that can't be read.
    """
    lines = []
    foreign: set[str] = set()
    for path in paths:
        try:
            texts = path.read_bytes().split(b"\n")
        except OSError as error:
            raise TableError(f"cannot be read: {error.strerror}", file=path) from None
        for number, text in enumerate(texts, 1):
            if text.strip():
                try:
                    lines.append(Read(path=path, number=number, text=text, line=parse_line(text)))
                except ValueError as error:
                    lines.append(Read(path=path, number=number, text=text, line=None, fault=str(error)))
                    foreign |= {error.name} if isinstance(error, UnknownSchema) else set()
    foreign -= {read.line.id for read in lines if isinstance(read.line, SessionLine)}
    foreign -= {read.line.hash for read in lines if isinstance(read.line, FingerprintLine)}
    return [_without(read, foreign) for read in lines] if foreign else lines


def _without(read: Read, foreign: set[str]) -> Read:
    line = read.line
    if isinstance(line, RowLine | FailureLine | NetworkLine) and {line.session, line.fingerprint} & foreign:
        return replace(read, line=None, fault="its session or fingerprint is of another schema")
    return read


def merge(paths: Sequence[Path], out: Path, *, force: bool = False) -> Merged:
    """Concatenate files: each line once, unreadable ones left out and named, the sources untouched.

    Rows that contradict each other all stay: readers take their median and say so. `TableError` where `out` exists
    (unless `force`), a file is no table, or imported entries would come to stand beside measured rows.
    """
    _check(out, force)
    for path in paths:
        checked_lines([path])
    with locked(out) if out.exists() else nullcontext():
        lines = read_raw(paths)
        good, texts = _merged(lines)
        write_atomically(out, b"".join(text + b"\n" for text in texts))
    file = read_lines([out])
    doubts = (warning for fingerprint in _fingerprints(good) for warning in select(file, fingerprint).warnings)
    return Merged(
        out=out,
        lines={str(path): sum(read.path == path for read in lines) for path in paths},
        written=len(texts),
        duplicates=len(good) - len(texts),
        unreadable=tuple(f"{read.place}: {read.fault}" for read in lines if read.line is None),
        contradicting=tuple(dict.fromkeys(doubts)),
        undefined=_undefined(good),
        fingerprints=_fingerprints(good),
    )


def _merged(lines: Iterable[Read]) -> tuple[list[Read], list[bytes]]:
    """The readable lines, and what of them is written: each once, of several the last, as a reader would take it."""
    good = [read for read in lines if read.line is not None]
    if len({isinstance(read.line, ImportedLine) for read in good if isinstance(read.line, RowLine | ImportedLine)}) > 1:
        raise TableError("imported entries and measured rows are kept in files of their own: nothing compares them")
    return good, [*dict.fromkeys(read.text.strip() for read in reversed(good))][::-1]


def _check(out: Path, force: bool) -> None:
    if out.exists() and not (force and out.is_file()):
        raise TableError("exists already; name another file, or --force to replace it", file=out)


def _fingerprints(lines: Iterable[Read]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for read in {read.text.strip(): read for read in lines}.values():
        if isinstance(read.line, RowLine | ImportedLine):
            counts[read.line.fingerprint] = counts.get(read.line.fingerprint, 0) + 1
    return counts


def _undefined(lines: Iterable[Read]) -> tuple[str, ...]:
    defined: set[str] = set()
    used: dict[str, None] = {}
    for read in lines:
        line = read.line
        if isinstance(line, SessionLine):
            defined.add(f"session {line.id}")
            used[f"fingerprint {line.fingerprint}"] = None
        elif isinstance(line, RowLine | FailureLine | NetworkLine):
            used |= {f"session {line.session}": None, f"fingerprint {line.fingerprint}": None}
        elif isinstance(line, ImportedLine):
            used[f"fingerprint {line.fingerprint}"] = None
        elif line is not None and line.type == "fingerprint":
            defined.add(f"fingerprint {line.hash}")
    return tuple(name for name in used if name not in defined)


KINDS = {
    "duplicates": "lines that stand in the file again",
    "superseded": "sessions that come again with more rounds, failures of kernels that were measured since",
    "replaced": "rows of kernels that a later session measured again",
    "unreadable": "lines that are torn, corrupt or of another schema",
}
"""What `gc` can drop. The first two change nothing that is read; `replaced` does, where sessions differ."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Lines of each kind found, which kinds were dropped, and how many lines stay."""

    path: Path
    found: Mapping[str, int]
    dropped: tuple[str, ...]
    kept: int


def collect(path: Path, drop: Iterable[str] = (), *, wait_s: float = 0.0) -> Collected:
    """Drop lines of the asked kinds from a file; without any just count them. Nothing is dropped unasked."""
    asked = tuple(kind for kind in KINDS if kind in set(drop))
    checked_lines([path])
    if not asked:
        lines = read_raw([path])
        return Collected(path=path, found=_count(_verdicts(lines)), dropped=(), kept=len(lines))
    with locked(path, wait_s=wait_s):
        lines = read_raw([path])
        verdicts = _verdicts(lines)
        kept = [read.text for read, verdict in zip(lines, verdicts, strict=True) if verdict not in asked]
        if len(kept) < len(lines):
            write_atomically(path, b"".join(text + b"\n" for text in kept))
    return Collected(path=path, found=_count(verdicts), dropped=asked, kept=len(kept))


def _count(verdicts: Iterable[str | None]) -> dict[str, int]:
    listed = list(verdicts)
    return {kind: listed.count(kind) for kind in KINDS}


def _verdicts(lines: Sequence[Read]) -> list[str | None]:
    """For each line the kind it is of, None where it is needed."""
    starts = {read.line.id: read.line.started for read in lines if isinstance(read.line, SessionLine)}
    fullest: dict[str, int] = {}  # of a session id
    latest: dict[tuple[str, str], str] = {}  # session that measured a kernel last, by start
    for read in lines:
        line = read.line
        if isinstance(line, SessionLine):
            fullest[line.id] = max(line.rounds, fullest.get(line.id, 0))
        elif isinstance(line, RowLine):
            old = latest.setdefault(_key(line), line.session)
            if starts.get(line.session, "") >= starts.get(old, ""):
                latest[_key(line)] = line.session
    last = {read.text.strip(): index for index, read in enumerate(lines)}  # the last of several counts
    verdicts: list[str | None] = []
    for index, read in enumerate(lines):
        line, verdict = read.line, None
        if line is None:
            verdict = "unreadable"
        elif index < last[read.text.strip()]:
            verdict = "duplicates"
        elif (isinstance(line, SessionLine) and line.rounds < fullest[line.id]) or (
            isinstance(line, FailureLine) and _key(line) in latest
        ):
            verdict = "superseded"
        elif isinstance(line, RowLine) and line.session != latest[_key(line)]:
            verdict = "replaced"
        verdicts.append(verdict)
    return verdicts


def _key(line: RowLine | FailureLine) -> tuple[str, str]:
    return line.fingerprint, repr(sorted(line.kernel.items()))
