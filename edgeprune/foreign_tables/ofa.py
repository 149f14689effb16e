"""Once-for-All and ProxylessNAS: YAML of blocks, `expanded_conv-input:HxWxC-output:HxWxC-expand:E-...: {mean: ms}`.

A block is no kernel of ours: entries keep their names and add up to a network (`additive_model`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgeprune.errors import TableError
from edgeprune.foreign_tables.cells import Cell, Coordinate, number
from edgeprune.foreign_tables.documents import load_yaml

UNIT = "ms"
ASSUMED: dict[str, str] = {}
GRID = ("expand", "kernel")


def read(text: str, file: str, precision: str) -> list[Cell]:
    """Cells of {name: {mean: latency, ...}}; other statistics beside `mean` are left alone."""
    document = load_yaml(text, file)
    if not isinstance(document, Mapping) or not document:
        raise TableError("expected a mapping of block names to {mean: latency}", file=file)
    cells = []
    for name, entry in document.items():
        if not isinstance(name, str) or "input:" not in name:
            found = repr(str(name)[:80])
            raise TableError(f"expected a name like 'Conv-input:HxWxC-output:HxWxC', found {found}", file=file)
        if not isinstance(entry, Mapping) or "mean" not in entry:
            raise TableError(f"expected {{mean: latency}}, found {str(entry)[:80]!r}", file=file, place=name)
        cells.append(_cell(name, number(entry["mean"], name, file)))
    return cells


def _cell(name: str, value: float | None) -> Cell:
    """Blocks that differ in expansion and kernel size alone are a family."""
    grid: dict[str, Coordinate] = {}
    parts = []
    for part in name.split("-"):
        key, _, given = part.partition(":")
        if key in GRID and key not in grid and re.fullmatch("[0-9]{1,9}", given):
            grid[key] = int(given)
            part = f"{key}:*"
        parts.append(part)
    return Cell(name=name, value=value, family="-".join(parts), coordinates=grid)
