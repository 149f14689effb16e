"""NViT: JSON nested as EMB_e: QK_heads_d: V_d: MLP_h: seconds, one transformer block each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from edgeprune.errors import TableError
from edgeprune.foreign_tables.cells import Cell, number
from edgeprune.foreign_tables.documents import load_json

UNIT = "s"
ASSUMED: dict[str, str] = {}
NUMBER = "([0-9]{1,9})"
LEVELS = (f"EMB_{NUMBER}", f"QK_{NUMBER}_{NUMBER}", f"V_{NUMBER}", f"MLP_{NUMBER}")
AXES = ("embedding", "heads", "qk", "v", "mlp")


def fits(document: object) -> bool:
    """Whether a JSON document looks like this format."""
    return isinstance(document, Mapping) and bool(document) and str(next(iter(document))).startswith("EMB_")


def read(text: str, file: str, precision: str) -> list[Cell]:
    """Cells named `EMB_256/QK_1_16/V_16/MLP_128`."""
    document = load_json(text, file)
    return [
        Cell(name="/".join(path), value=value, family="block", coordinates=dict(zip(AXES, at, strict=True)))
        for path, at, value in _walk(document, (), (), file)
    ]


def _walk(
    node: Any, path: tuple[str, ...], at: tuple[int, ...], file: str
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], float | None]]:
    if len(path) == len(LEVELS):
        yield path, at, number(node, "/".join(path), file)
        return
    if not isinstance(node, Mapping):
        raise TableError(f"expected keys {LEVELS[len(path)]}", file=file, place="/".join(path) or None)
    for key, child in node.items():
        match = re.fullmatch(LEVELS[len(path)], key)
        if match is None:
            raise TableError(f"expected a key {LEVELS[len(path)]}, found {key[:80]!r}", file=file, place="/".join(path))
        yield from _walk(child, (*path, key), (*at, *map(int, match.groups())), file)
