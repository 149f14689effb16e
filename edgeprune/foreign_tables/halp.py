"""HALP and MDP: a convolution is `batch_cin_cout_fmap_kernel_stride[_groups]`, its latency in ms.

The key says nothing of padding, precision or what is fused: padding is taken as kernel // 2, as in ResNets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgeprune.errors import TableError
from edgeprune.foreign_tables.cells import Cell, number
from edgeprune.foreign_tables.documents import load_json
from edgeprune.kernel import Kernel

UNIT = "ms"
ASSUMED = {"padding": "kernel // 2", "epilogue": "none"}
KEY = re.compile(r"[0-9]{1,9}(_[0-9]{1,9}){5,6}")


def fits(document: object) -> bool:
    """Whether a JSON document looks like this format."""
    return isinstance(document, Mapping) and bool(document) and KEY.fullmatch(str(next(iter(document)))) is not None


def read(text: str, file: str, precision: str) -> list[Cell]:
    """Cells of a JSON object {key: latency}. `TableError` for another key."""
    document = load_json(text, file)
    if not isinstance(document, Mapping):
        raise TableError("expected a JSON object of keys and latencies", file=file)
    return [_cell(str(key), number(value, str(key), file), file, precision) for key, value in document.items()]


def _cell(key: str, value: float | None, file: str, precision: str) -> Cell:
    if not KEY.fullmatch(key):
        raise TableError("expected a key batch_cin_cout_fmap_kernel_stride[_groups] of integers", file=file, place=key)
    batch, c_in, c_out, fmap, window, stride, *rest = map(int, key.split("_"))
    groups = rest[0] if rest else 1
    try:
        kernel = Kernel(
            operator="conv",
            c_in=c_in,
            c_out=c_out,
            batch=batch,
            spatial=(fmap, fmap),
            window=(window, window),
            stride=(stride, stride),
            padding=(window // 2, window // 2),
            dilation=(1, 1),
            groups=groups,
            precision=precision,
        )
        if min(window, stride) < 1:
            raise ValueError(f"sizes must be at least 1: kernel {window}, stride {stride}")
    except ValueError as error:
        raise TableError(str(error), file=file, place=key) from None
    family = f"b{batch} {fmap}x{fmap} k{window} s{stride}"
    if kernel.is_depthwise:
        return Cell(name=key, value=value, kernel=kernel, family=f"{family} depthwise", coordinates={"channels": c_in})
    family = f"{family} g{groups}" if groups > 1 else family
    return Cell(name=key, value=value, kernel=kernel, family=family, coordinates={"c_in": c_in, "c_out": c_out})
