"""Once-for-All and ProxylessNAS: YAML of blocks, `expanded_conv-input:HxWxC-output:HxWxC-expand:E-...: {mean: ms}`.

A block is no kernel of ours: entries keep their names and add up to a network (`additive_model`).
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeprune.errors import TableError
from edgeprune.foreign_tables.cells import Cell, number
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
    parts = [part.partition(":")[::2] for part in name.split("-")]
    grid = {key: int(given) for key, given in parts if key in GRID and given.isascii() and given.isdigit()}
    family = "-".join(f"{key}:{given}" if given else key for key, given in parts if key not in GRID)
    return Cell(name=name, value=value, family=family, coordinates=grid)
