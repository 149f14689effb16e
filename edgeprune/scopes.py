"""Scopes: over what the channels compete. Global and isomorphic are solved (`choosing`), the baselines are bisected.

uniform: every group keeps the same share of its channels. local: every layer is judged by itself, each group keeps the
fewest channels that hold the same share of its own value, so values need not compare across layers. Neither drops
blocks. The share is found by bisection on what is predicted, among those at which some width changes; where a latency
is not monotone, a larger share may be inside too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprune.constraints import Options
from edgeprune.saliency import Saliency

Scope: TypeAlias = Literal["global", "local", "uniform", "isomorphic"]
SCOPES = ("global", "local", "uniform", "isomorphic")
BISECTED = ("local", "uniform")
ROUNDING = 1e-9
FloatArray = npt.NDArray[np.float64]


def shares_of(scope: str, options: Options, saliency: Saliency) -> dict[str, FloatArray]:
    """For every group the share that each of its widths holds, ascending to at most 1: of channels, or of value."""
    found = {}
    for group, widths in options.items():
        values = saliency.channels[group]
        kept = np.cumsum(np.sort(values)[::-1])
        if scope == "uniform" or not kept[-1] > 0:
            kept = np.arange(1.0, len(values) + 1)
        found[group] = kept[np.array(widths) - 1] / kept[-1]
    return found


def widths_at(share: float, options: Options, shares: Mapping[str, FloatArray]) -> dict[str, int]:
    """Every group's least width that holds the share; its largest where none does."""
    found = {}
    for group, widths in options.items():
        index = int(np.searchsorted(shares[group], share * (1 - ROUNDING)))
        found[group] = widths[min(index, len(widths) - 1)]
    return found


def largest_share(
    scope: str, options: Options, saliency: Saliency, is_inside: Callable[[Mapping[str, int]], bool]
) -> tuple[float, dict[str, int]] | None:
    """The largest share whose widths are inside, and these; None where the least widths aren't."""
    shares = shares_of(scope, options, saliency)
    steps = np.unique(np.concatenate([np.zeros(1), *shares.values()]))
    low, high = 0, len(steps)  # the first is inside, no step at `high` or above is looked at
    if not is_inside(widths_at(0.0, options, shares)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if is_inside(widths_at(float(steps[middle]), options, shares)):
            low = middle
        else:
            high = middle
    share = float(steps[low])
    return share, widths_at(share, options, shares)
