"""CSV with a header: a column latency_us, latency_ms or latency_s, beside it `name`, the fields of a kernel, or both.

`edgeprune table export csv` writes this. Fields of a kernel that are left out have their defaults.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from edgeprune.errors import TableError
from edgeprune.foreign_tables.cells import Cell, Coordinate, number
from edgeprune.kernel import Kernel
from edgeprune.table_export import INTEGERS, KERNEL, LISTS

ASSUMED: dict[str, str] = {}
LATENCIES = {"latency_us": "us", "latency_ms": "ms", "latency_s": "s"}


def unit(text: str, file: str) -> str:
    """Of the latency column. `TableError` where there isn't exactly one."""
    try:
        header = next(csv.reader(io.StringIO(text)), [])
    except csv.Error as error:
        raise TableError(f"not CSV: {error}", file=file, place=1) from None
    found = [LATENCIES[name] for name in map(str.strip, header) if name in LATENCIES]
    if len(found) != 1:
        raise TableError(
            f"expected one column of {', '.join(LATENCIES)}, found {', '.join(header)[:200]}", file=file, place=1
        )
    return found[0]


def read(text: str, file: str, precision: str) -> list[Cell]:
    """Columns of other names are left alone."""
    column = next(name for name, given in LATENCIES.items() if given == unit(text, file))
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    if len(set(header)) < len(header):
        raise TableError("a column stands here twice", file=file, place=1)
    if not {"name", "operator"} & set(header):
        raise TableError("expected a column 'name' or 'operator'", file=file, place=1)
    reader.fieldnames = header
    cells = []
    try:
        for record in reader:
            cells.append(_cell(record, column, file, reader.line_num, precision))
    except csv.Error as error:
        raise TableError(f"not CSV: {error}", file=file, place=reader.line_num) from None
    return cells


def _cell(record: dict[str, Any], column: str, file: str, place: int, precision: str) -> Cell:
    if None in record or None in record.values():
        raise TableError("a row of another length than the header", file=file, place=place)
    try:
        kernel = _kernel({name: record[name].strip() for name in KERNEL if record.get(name, "").strip()}, precision)
    except ValueError as error:
        raise TableError(str(error), file=file, place=place) from None
    name = record.get("name", "").strip() or (kernel.key if kernel else "")
    if not name:
        raise TableError("a row with neither a name nor a kernel", file=file, place=place)
    value = number(record[column], name, f"{file}:{place}")
    if kernel is None:
        return Cell(name=name, value=value)
    where: dict[str, Coordinate] = {"channels": kernel.c_in}
    if kernel.sizes[2] != 1 or kernel.operator == "linear":
        where = {"c_in": kernel.c_in, "c_out": kernel.c_out}
    family = kernel.resized((1, 1, 1)).key
    return Cell(name=name, value=value, kernel=kernel, family=family, coordinates=where)


def _kernel(given: dict[str, str], precision: str) -> Kernel | None:
    if "operator" not in given:
        return None
    document: dict[str, Any] = {"precision": precision}
    for name, text in given.items():
        if name in INTEGERS:
            document[name] = int(text)
        elif name in LISTS:
            parts = text.split(LISTS[name])
            document[name] = parts if name == "epilogue" else [int(part) for part in parts]
        else:
            document[name] = text
    return Kernel.from_json(document)
