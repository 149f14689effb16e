"""Cells of a foreign table and what is wrong with them, whatever the format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

from edgeprune.errors import TableError
from edgeprune.kernel import Kernel

MOST_HOLES = 10_000
"""Holes of one family that are named; of more only the number is told."""

Coordinate = int | float | str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number as it stands in the source; `value` is None where the source has none.

    Cells of a `family` make a grid over `coordinates`; latency should rise with those that are numbers.
    """

    name: str
    value: float | None
    kernel: Kernel | None = None
    family: str = ""
    coordinates: Mapping[str, Coordinate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """`negative`, `missing`, `contradicting`: not imported. `not monotone`: imported so. `hole`: not in the source."""

    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}{': ' if self.detail else ''}{self.detail}"


KINDS = ("negative", "missing", "contradicting", "not monotone", "hole")


def number(value: object, name: str, file: object) -> float | None:
    """A number of JSON, YAML or text; None for null, an empty text, NaN, infinity. `TableError` for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        result = float(value)
    except (ValueError, OverflowError):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise TableError(f"expected a latency at '{name}', found {shown}", file=str(file)) from None
    return result if math.isfinite(result) else None


def check(cells: Iterable[Cell]) -> tuple[dict[str, Cell], list[Flag]]:
    """The cells that can be imported, by name, and every flag: of those left out, of those kept, of holes."""
    kept: dict[str, Cell] = {}
    flags: list[Flag] = []
    contradicting = set()
    seen: dict[str, float | None] = {}
    listed = list(cells)
    for cell in listed:
        if cell.name in seen and seen[cell.name] != cell.value:
            contradicting.add(cell.name)
        seen[cell.name] = cell.value
    for cell in {cell.name: cell for cell in listed}.values():
        if cell.name in contradicting:
            values = ", ".join(str(other.value) for other in listed if other.name == cell.name)
            flags.append(Flag(kind="contradicting", name=cell.name, detail=values))
        elif cell.value is None:
            flags.append(Flag(kind="missing", name=cell.name, detail="no number"))
        elif cell.value <= 0:
            flags.append(Flag(kind="negative", name=cell.name, detail=f"{cell.value:g}"))
        else:
            kept[cell.name] = cell
    families: dict[str, list[Cell]] = {}
    for cell in kept.values():
        if cell.coordinates:
            families.setdefault(cell.family, []).append(cell)
    present = {(cell.family, tuple(cell.coordinates.values())) for cell in listed}
    for family, members in families.items():
        flags += _falls(members)
        flags += _holes(family, members, present)
    return kept, flags


def _falls(cells: Sequence[Cell]) -> Iterator[Flag]:
    """Cells that are faster than their neighbour at the next smaller number of one coordinate."""
    for axis in cells[0].coordinates:
        lines: dict[tuple[Coordinate, ...], list[tuple[float, Cell]]] = {}
        for cell in cells:
            at = cell.coordinates[axis]
            if not isinstance(at, str):
                rest = tuple(value for name, value in cell.coordinates.items() if name != axis)
                lines.setdefault(rest, []).append((at, cell))
        for line in lines.values():
            ordered = [cell for _, cell in sorted(line, key=lambda pair: pair[0])]
            for low, high in pairwise(ordered):
                assert low.value is not None and high.value is not None
                if high.value < low.value:
                    detail = f"{1 - high.value / low.value:.1%} faster than {low.name}, of less {axis}"
                    yield Flag(kind="not monotone", name=high.name, detail=detail)


def _holes(family: str, cells: Sequence[Cell], present: set[tuple[str, tuple[Coordinate, ...]]]) -> Iterator[Flag]:
    """Combinations of the coordinates that occur which are not in the source."""
    names = list(cells[0].coordinates)
    values = [sorted({cell.coordinates[name] for cell in cells}, key=lambda v: (str(type(v)), v)) for name in names]
    count = math.prod(map(len, values)) - len(cells)
    if count > MOST_HOLES:
        yield Flag(kind="hole", name=family, detail=f"{count} of {count + len(cells)} combinations are not there")
        return
    for at in product(*values) if count else ():
        if (family, at) not in present:
            where = ", ".join(f"{name}={value}" for name, value in zip(names, at, strict=True))
            yield Flag(kind="hole", name=f"{family}[{where}]")
