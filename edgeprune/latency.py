"""An engine's latency and its ratio to another engine's, from the rounds in which both were timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import geometric_mean, median
from typing import Any

import numpy as np

from edgeprune import robust
from edgeprune.device_statistics import digits
from edgeprune.errors import UnstableError
from edgeprune.measurement import Measurement

MOST_DISTURBED = 0.5  # share of rounds


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One engine's latency in ms over `n` runs; `at` is the estimate at the budget's percentile, in ms too.

    `ratio` is to the dense engine, by round; None for the dense engine itself and where there is none.
    """

    p50_ms: float
    p90_ms: float
    n: int
    at: robust.Estimate
    ratio: robust.Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """Keys of `verify --json`."""
        document: dict[str, Any] = {
            "p50_ms": json_number(self.p50_ms),
            "p90_ms": json_number(self.p90_ms),
            "n": self.n,
            "upper_ms": json_number(self.at.upper),
        }
        if self.ratio is not None:
            document["ratio"] = json_number(self.ratio.value)
            document["ratio_ci"] = [json_number(self.ratio.low), json_number(self.ratio.high)]
            document["ratio_upper"] = json_number(self.ratio.upper)
        return document


def undisturbed_or_raise(measurement: Measurement) -> frozenset[int]:
    """The disturbed rounds, which the references tell; `UnstableError` when they are more than half, or all of a
    process's."""
    disturbed = measurement.disturbed()
    every = max(measurement.rounds.values(), key=len)
    nothing_left = any(disturbed.issuperset(own) for own in measurement.by_process(every))
    if nothing_left or len(disturbed) > MOST_DISTURBED * len(every):
        raise UnstableError(
            f"the reference kernels ran more than 15 % off their median in {len(disturbed)} of {len(every)} rounds: "
            "something else keeps the device busy; try again when it is idle"
        )
    return disturbed


def latency_of(
    measurement: Measurement,
    key: str,
    base: str | None = None,
    *,
    percentile: float = 50.0,
    without: frozenset[int] = frozenset(),
) -> Latency:
    """Percentiles in ms of one key, and its ratio to `base` by round, without the given rounds.

    Rounds of several processes stand side by side: what differs between these is no drift from round to round.
    """
    bursts = zip(measurement.rounds[key], measurement.times_us[key], strict=True)
    rounds_ms = {number: np.asarray(burst) / 1e3 for number, burst in bursts if number not in without}
    runs = np.concatenate(list(rounds_ms.values()))
    sides = [np.concatenate([rounds_ms[n] for n in side]) for side in measurement.side_by_side(rounds_ms)]
    return Latency(
        p50_ms=float(np.percentile(runs, 50)),
        p90_ms=float(np.percentile(runs, 90)),
        n=len(runs),
        at=robust.percentile([side.tolist() for side in sides], percentile),
        ratio=None if base is None else _ratio(measurement, key, base, percentile, without),
    )


def _ratio(
    measurement: Measurement, key: str, base: str, percentile: float, without: frozenset[int]
) -> robust.Estimate:
    """At p50 the median of the per-round ratios of burst medians, of rounds side by side the geometric mean. Elsewhere
    the percentile over runs of `key`, each divided by the base's median in its round, over that of the base's runs; a
    process counts as one whose median ratio is the geometric mean of those of all."""
    medians, bases = measurement.burst_medians_us(key), measurement.burst_medians_us(base)
    ratios = {n: medians[n] / bases[n] for n in (bases.keys() & medians.keys()) - without}
    sides = measurement.side_by_side(ratios)
    if percentile == 50.0:
        above, below = ([geometric_mean(us[n] for n in side) for side in sides] for us in (medians, bases))
        return robust.ratio(above, below)
    processes = measurement.by_process(ratios)
    typical = [median(ratios[n] for n in own) for own in processes]
    even = {n: geometric_mean(typical) / one for own, one in zip(processes, typical, strict=True) for n in own}
    runs, base_runs = (
        dict(zip(measurement.rounds[name], measurement.times_us[name], strict=True)) for name in (key, base)
    )
    own = robust.percentile([[t / bases[n] * even[n] for n in side for t in runs[n]] for side in sides], percentile)
    scale = robust.percentile([[t / bases[n] for n in side for t in base_runs[n]] for side in sides], percentile).value
    return replace(own, value=own.value / scale, low=own.low / scale, high=own.high / scale, upper=own.upper / scale)


def json_number(value: float | None) -> float | None:
    """For JSON, which knows no infinity."""
    return digits(value) if value is not None and math.isfinite(value) else None
