"""Two tables side by side: two machines, two versions of a runtime, two days."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import TableError
from edgeprune.table_listing import Item, Listing

QUANTITIES: Mapping[str, Callable[[Item], float | None]] = {
    "latency": lambda item: item.latency_us,
    "node": lambda item: item.node_us,
    "ratio": lambda item: item.ratio,
}
"""What `compare` takes of an item: us from end to end, us of the compute node, ratio to the reference kernel."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One kernel in both tables; `ratio` is second over first."""

    name: str
    first: float
    second: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`pairs` with the largest change first, up or down alike. Median, percentiles and spread are of their ratios.

    `spread`: 1.4826 times the median absolute deviation, relative to the median.
    """

    quantity: str
    pairs: tuple[Pair, ...]
    median: float
    p5: float
    p95: float
    spread: float
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    references: Mapping[str, float]  # second over first, of the reference kernels' times


def compare(first: Listing, second: Listing, quantity: str = "latency") -> Difference:
    """Kernel by kernel, second over first. `TableError` where no kernel stands in both."""
    of = QUANTITIES[quantity]
    a, b = ({item.name: of(item) for item in listing.items} for listing in (first, second))
    pairs = []
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if x and y:  # a node may have run for 0 us, or not be told
            pairs.append(Pair(name=name, first=x, second=y, ratio=y / x))
    if not pairs:
        raise TableError(
            f"'{first.name}' and '{second.name}' have no kernel in common of which both tell the {quantity}"
        )
    ratios = np.array([pair.ratio for pair in pairs])
    median = float(np.median(ratios))
    p5, p95 = (float(value) for value in np.percentile(ratios, (5, 95)))
    common = first.references_us.keys() & second.references_us.keys()
    return Difference(
        quantity=quantity,
        pairs=tuple(sorted(pairs, key=lambda pair: (-max(pair.ratio, 1 / pair.ratio), pair.name))),
        median=median,
        p5=p5,
        p95=p95,
        spread=float(1.4826 * np.median(np.abs(ratios - median)) / median),
        only_first=tuple(name for name in a if name not in b),
        only_second=tuple(name for name in b if name not in a),
        references={name: second.references_us[name] / first.references_us[name] for name in sorted(common)},
    )
