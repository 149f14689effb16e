"""A table as CSV or Parquet: one row a kernel, every column's unit in its name."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from edgeprune.errors import RuntimeMissing, TableError, install_line
from edgeprune.kernel import Kernel
from edgeprune.table_listing import Item, Listing

KERNEL = tuple(field.name for field in fields(Kernel))
LISTS = {"spatial": "x", "window": "x", "stride": "x", "padding": "x", "dilation": "x", "parts": "+", "epilogue": "+"}
"""Fields of a kernel that hold several values, and what stands between these in one cell."""
NUMBERS: dict[str, type[float] | type[int]] = {
    **dict.fromkeys(("latency_us", "node_us", "ratio", "ratio_low", "ratio_high", "spread"), float),
    **dict.fromkeys(("n", "rounds", "disturbed"), int),
}
TEXTS = ("reference", "origin", "flags", "fingerprint")
INTEGERS = ("c_in", "c_out", "batch", "groups")


def records(listing: Listing) -> list[dict[str, Any]]:
    """One flat record an item, the same keys in each; None where nothing is known."""
    return [_record(item, listing.fingerprint) for item in listing.items]


def _record(item: Item, fingerprint: str) -> dict[str, Any]:
    kernel: dict[str, Any] = dict.fromkeys(KERNEL)
    if item.kernel is not None:
        for name in KERNEL:
            value = getattr(item.kernel, name)
            kernel[name] = LISTS[name].join(map(str, value)) if name in LISTS else value
    low, high = item.ratio_ci or (None, None)
    numbers = {"ratio_low": low, "ratio_high": high} | {
        name: getattr(item, name) for name in NUMBERS if not name.startswith("ratio_")
    }
    texts = {
        "reference": item.reference,
        "origin": item.origin,
        "flags": "; ".join(item.flags) or None,
        "fingerprint": fingerprint,
    }
    return {"name": item.name, **kernel, **{name: numbers[name] for name in NUMBERS}, **texts}


def to_csv(listing: Listing) -> str:
    """With a header line; an empty cell where nothing is known."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["name", *KERNEL, *NUMBERS, *TEXTS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(listing))
    return stream.getvalue()


def to_parquet(listing: Listing) -> bytes:
    """The same columns, typed; fingerprint and facts are in the file's metadata. `RuntimeMissing` without pyarrow."""
    import json

    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise RuntimeMissing(f"pyarrow is missing: {install_line('parquet')}") from None

    def kind(name: str) -> Any:
        if name in INTEGERS or NUMBERS.get(name) is int:
            return pyarrow.int64()
        return pyarrow.float64() if name in NUMBERS else pyarrow.string()

    names: Sequence[str] = ["name", *KERNEL, *NUMBERS, *TEXTS]
    facts = {"fingerprint": listing.fingerprint, "facts": dict(listing.facts), "origin": listing.origin}
    schema = pyarrow.schema([(name, kind(name)) for name in names], metadata={"edgeprune": json.dumps(facts)})
    try:
        table = pyarrow.Table.from_pylist(records(listing), schema=schema)
    except (OverflowError, pyarrow.ArrowInvalid) as error:
        raise TableError(f"'{listing.name}' holds a number that Parquet can't: {error}") from None
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
