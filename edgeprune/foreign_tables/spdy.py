"""SPDY: text, `base` and `prunable` with the time of the whole network, then per layer lines of `seconds sparsity`."""

from __future__ import annotations

from edgeprune.errors import TableError
from edgeprune.foreign_tables.cells import Cell, Coordinate, number

UNIT = "s"
ASSUMED: dict[str, str] = {}
WHOLE = ("base", "prunable")


def read(text: str, file: str, precision: str) -> list[Cell]:
    """Cells named `layer1.0.conv1@0.5586`, the sparsity as written, and `base` and `prunable`."""
    cells = []
    layer = ""
    for place, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) == 1 and not _is_number(words[0]):
            layer = words[0]
        elif layer in WHOLE and len(words) == 1:
            cells.append(Cell(name=layer, value=number(words[0], layer, file)))
        elif layer and layer not in WHOLE and len(words) == 2 and _is_number(words[1]):
            sparsity = float(words[1])
            if not 0 <= sparsity <= 1:
                raise TableError(f"expected a sparsity from 0 to 1, found {words[1]}", file=file, place=place)
            name = f"{layer}@{words[1]}"
            where: dict[str, Coordinate] = {"layer": layer, "density": round(1 - sparsity, 9)}
            cells.append(Cell(name=name, value=number(words[0], name, file), family="network", coordinates=where))
        else:
            raise TableError(f"expected a layer or 'seconds sparsity', found {line[:80]!r}", file=file, place=place)
    if not cells:
        raise TableError("expected 'base', a time, then layers with lines of 'seconds sparsity'", file=file)
    return cells


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
