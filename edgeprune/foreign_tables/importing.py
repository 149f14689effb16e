"""Import: a foreign file becomes a table file of its own, with its name and hash as what its numbers belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from edgeprune.errors import TableError, did_you_mean
from edgeprune.fingerprint import Fingerprint
from edgeprune.folders import write_atomically
from edgeprune.foreign_tables import halp, nvit, ofa, plain_csv, spdy
from edgeprune.foreign_tables.cells import Cell, Flag, check
from edgeprune.kernel import BYTES_PER_ELEMENT
from edgeprune.table_lines import UNIT_US, FingerprintLine, ImportedLine

FORMATS: Mapping[str, ModuleType] = {"halp": halp, "ofa": ofa, "nvit": nvit, "spdy": spdy, "csv": plain_csv}
MOST_BYTES = 256 << 20
PICKLE = (
    "is a pickle, which can hold code and is never read; where you trust it, write it as JSON yourself: "
    'python -c \'import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], "rb")), open(sys.argv[2], "w"))\' '
    "table.pkl table.json"
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was read. `kernels` counts the entries that name a kernel of ours; the others are named only."""

    format: str
    unit: str
    fingerprint: str
    facts: Mapping[str, Any]
    entries: int
    kernels: int
    flags: tuple[Flag, ...]
    out: Path


def import_table(
    file: Path, out: Path, *, format: str | None = None, unit: str | None = None, precision: str = "fp32"
) -> Imported:
    """Read `file`, write `out` (which must not exist). The unit is that of the format unless told.

    `TableError` with the place for what can't be read; cells that are negative, missing or contradicting are flagged
    and left out, those that fall where they should rise are flagged and kept, holes are flagged and stay holes.
    """
    if out.exists():
        raise TableError("exists already; imported entries get a file of their own", file=out)
    _check_options(format, unit, precision)
    content, text = _content(file)
    name = format or _detect(file, text)
    reader = FORMATS[name]
    cells: Sequence[Cell] = reader.read(text, str(file), precision)
    kept, flags = check(cells)
    if not kept:
        raise TableError(f"holds no latency that can be imported ({len(flags)} flagged)", file=file)
    if reader is plain_csv:
        if unit not in (None, stated := plain_csv.unit(text, str(file))):
            raise TableError(f"its column says {stated}, --unit {unit}", file=file, place=1)
        unit = stated
    unit = unit or str(reader.UNIT)
    facts = {
        "backend": "imported",
        "version": name,
        "source": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "unit": unit,
        "precision": precision,
        "assumed": reader.ASSUMED,
    }
    fingerprint = Fingerprint(facts=facts).short_hash
    doubts: dict[str, list[str]] = {}
    for flag in flags:
        doubts.setdefault(flag.name, []).append(f"{flag.kind}: {flag.detail}")
    lines = [_line(cell, fingerprint, unit, doubts.get(cell.name), file).to_line() for cell in kept.values()]
    write_atomically(out, "".join([FingerprintLine(hash=fingerprint, facts=facts).to_line(), *lines]))
    return Imported(
        format=name,
        unit=unit,
        fingerprint=fingerprint,
        facts=facts,
        entries=len(kept),
        kernels=sum(cell.kernel is not None for cell in kept.values()),
        flags=tuple(flags),
        out=out,
    )


def _line(cell: Cell, fingerprint: str, unit: str, flags: list[str] | None, file: Path) -> ImportedLine:
    document = {
        "name": cell.name,
        "kernel": cell.kernel.to_json() if cell.kernel else None,
        "fingerprint": fingerprint,
        "value": cell.value,
        "unit": unit,
        "flags": flags,
    }
    try:
        return ImportedLine.model_validate(document)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in fault["loc"])
        shown = ascii(cell.name[:80])
        raise TableError(f"entry {shown} can't be kept, {where}: {fault['msg']}", file=file) from None


def _check_options(format: str | None, unit: str | None, precision: str) -> None:
    for value, known, what in (
        (format, FORMATS, "format"),
        (unit, UNIT_US, "unit"),
        (precision, BYTES_PER_ELEMENT, "precision"),
    ):
        if value is not None and value not in known:
            raise TableError(f"no {what} '{value}'{did_you_mean(value, known)} (known: {', '.join(known)})")


def _content(file: Path) -> tuple[bytes, str]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise TableError(f"is larger than {MOST_BYTES >> 20} MiB", file=file)
        content = file.read_bytes()
    except OSError as error:
        raise TableError(f"cannot be read: {error.strerror}", file=file) from None
    if content[:1] == b"\x80" or file.suffix in (".pkl", ".pickle"):
        raise TableError(PICKLE, file=file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TableError("is not text; expected JSON, YAML, CSV or SPDY's text", file=file) from None
    if not text.strip():
        raise TableError("is empty", file=file)
    return content, text


def _detect(file: Path, text: str) -> str:
    """By suffix, JSON by its first key."""
    by_suffix = {".csv": "csv", ".yaml": "ofa", ".yml": "ofa", ".txt": "spdy"}
    if file.suffix in by_suffix:
        return by_suffix[file.suffix]
    if text.lstrip()[:1] == "{":
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        if halp.fits(document):
            return "halp"
        if nvit.fits(document):
            return "nvit"
    raise TableError(f"which format is this? Say it with --format: {', '.join(FORMATS)}", file=file)
