"""What a device program answers: loaded models, timings and the statistics that the host forms of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from edgeprune.errors import MeasurementError
from edgeprune.machine import printable


class SessionLost(MeasurementError):
    """The device program died, hung or answered nonsense; its session is over, another one may be opened.

    `key` is what it was at, where that is known better than from what it said last.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class SessionHung(SessionLost):
    """It said nothing for too long while it could be reached, and was killed: what it ran is to blame."""


class ConnectionLost(SessionLost):
    """The way to the device is cut, or the device was restarted: nothing that ran is to blame."""

    exit_code = 4
    kind = "device"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output; `dtype` is numpy's name, e.g. `float32`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that the device program has compiled."""

    key: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What the runtime told: `sparse`, whether it picked a sparse implementation."""

    @classmethod
    def from_json(cls, key: str, answer: Mapping[str, Any]) -> Loaded:
        try:
            notes = dict(answer.get("notes") or {})
            return cls(key=key, inputs=_specs(answer["inputs"]), outputs=_specs(answer["outputs"]), notes=notes)
        except (KeyError, TypeError, ValueError) as error:
            raise MeasurementError(f"{key}: the device program's answer to 'load' is malformed: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long to measure. A turn is `untimed_runs`, then at least `min_runs` timed ones and at least `burst_ms`.

    It stops after `min_rounds` once the 95 % interval of every candidate's median over rounds is within ±`tolerance`
    (relative) of it, or at `max_rounds` or `max_seconds`. `settle_alone` lets candidates that are certain drop out.
    A burst is represented by its `burst_percentile`.
    """

    warmup_ms: float = 200.0
    burst_ms: float = 10.0
    untimed_runs: int = 2
    min_runs: int = 4
    min_rounds: int = 10
    max_rounds: int = 60
    max_seconds: float = 60.0
    tolerance: float = 0.01
    settle_alone: bool = False
    burst_percentile: float = 50.0
    regime: str = "hot"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def shared_by(self, processes: int) -> Timing:
        """For each of several processes whose measurements are joined: together as long and as certain as this."""
        return replace(
            self,
            min_rounds=math.ceil(self.min_rounds / processes),
            max_rounds=math.ceil(self.max_rounds / processes),
            max_seconds=self.max_seconds / processes,
            tolerance=self.tolerance * processes**0.5,
        )


HOT = Timing()
"""For whole models."""

KERNELS = Timing(
    warmup_ms=10.0,
    burst_ms=5.0,
    min_rounds=5,
    max_rounds=8,
    max_seconds=30.0,
    tolerance=0.015,
    settle_alone=True,
    burst_percentile=25.0,
)
"""For kernels in batches: many, each of them for a tenth of a second.

The lower quartile of a burst, because other work on the machine hits a kernel of a millisecond far more often than the
reference, which fits between two time slices: with both cores twice overloaded, ratios of medians of two sessions were
up to 47 % apart (90th percentile), those of quartiles 11 %.
"""


@dataclass(frozen=True, kw_only=True)
class NodeTimes:
    """Time of each executed node, and of the whole run (`total_us`), typical over the same runs.

    `compute_us` sums the nodes that compute; layout changes and copies of inputs and outputs are left out.
    """

    nodes: tuple[Mapping[str, Any], ...]
    """{"name", "type", "time_us", "compute": bool} and, where the runtime tells it, "covers": names of the nodes of
    the file that went into this one, and "precision" that it computes in"""
    total_us: float
    device_us: float | None = None
    """median of the accelerator's compute time in the measured runs, without transfers, where it is told"""

    @property
    def compute_us(self) -> float:
        return float(sum(node["time_us"] for node in self.nodes if node["compute"]))

    def within(self, median_us: float) -> float:
        """Compute time in a run whose median, from end to end, is `median_us`.

        Both a disturbed average of node times and a disturbed median only come out too long, and the nodes' share of
        the median leaves out what the runtime adds around them, so the lesser of the two counts.
        """
        every = sum(node["time_us"] for node in self.nodes)
        return min(self.compute_us, median_us * min(1.0, self.compute_us / every)) if every else 0.0

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> NodeTimes | None:
        """`MeasurementError` unless every node has a name, a type and a time."""
        if answer.get("nodes") is None:
            return None
        device_us = answer.get("device_us")
        try:
            return cls(
                nodes=tuple(map(_node, answer["nodes"])),
                total_us=_time_us(answer["total_us"]),
                device_us=None if device_us is None else _time_us(device_us),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MeasurementError(f"the device program's answer to 'node_times' is malformed: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Every timed run: `times_us[key][burst][run]`; `rounds[key][burst]` is the number of that burst's round.

    With `settle_alone` a candidate has fewer bursts than the references. `anchors` names the reference to which the
    ratio of a candidate is taken.
    """

    times_us: Mapping[str, Sequence[Sequence[float]]]
    rounds: Mapping[str, Sequence[int]]
    references: tuple[str, ...] = ()
    anchors: Mapping[str, str] = field(default_factory=dict)
    modelled: bool = False
    seconds: float = 0.0
    stopped_by: str = "confidence"  # or "rounds", "seconds"
    burst_percentile: float = 50.0
    machine: Mapping[str, float] = field(default_factory=dict)
    """`clock_mhz`, `gpu_clock_mhz` and `power_w` right after the last round, `temperature_c` the hottest in between,
    where the device tells them."""
    slowed: tuple[str, ...] = ()
    """What slowed the device down meanwhile, in its words: heat, a power limit, under-voltage."""
    processes: tuple[int, ...] = (0,)
    """The first round of every process, where the measurements of several were joined."""

    @classmethod
    def from_json(
        cls,
        answer: Mapping[str, Any],
        references: Sequence[str],
        anchors: Mapping[str, str],
        burst_percentile: float = 50.0,
    ) -> Measurement:
        """`MeasurementError` unless every time is a finite, positive number."""
        try:
            times = {
                str(key): [list(map(float, burst)) for burst in bursts] for key, bursts in answer["times_us"].items()
            }
            rounds = {str(key): list(map(int, numbers)) for key, numbers in answer["rounds"].items()}
            if {key: len(bursts) for key, bursts in times.items()} != {key: len(n) for key, n in rounds.items()}:
                raise ValueError("bursts and rounds differ in number")
            if not all(bursts and all(bursts) for bursts in times.values()):
                raise ValueError("a burst without runs")
            if not all(0 < time < float("inf") for bursts in times.values() for burst in bursts for time in burst):
                raise ValueError("a time that is not positive")
            return cls(
                times_us=times,
                rounds=rounds,
                references=tuple(references),
                anchors=dict(anchors),
                modelled=bool(answer["modelled"]),
                seconds=float(answer["seconds"]),
                stopped_by=str(answer["stopped_by"]),
                burst_percentile=burst_percentile,
                machine={str(name): float(value) for name, value in answer.get("machine", {}).items()},
                slowed=tuple(printable(str(reason)[:200], keep="") for reason in list(answer.get("slowed", ()))[:20]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MeasurementError(f"the device program's answer to 'measure' is malformed: {error}") from None

    def burst_medians_us(self, key: str) -> dict[int, float]:
        """Round → median of the burst of `key` in it."""
        return {n: float(np.median(burst)) for n, burst in zip(self.rounds[key], self.times_us[key], strict=True)}

    def bursts_us(self, key: str) -> Mapping[int, float]:
        """Round → `burst_percentile` of the burst of `key` in it: what ratios are taken of."""
        return self._bursts_us[key]

    @cached_property
    def _bursts_us(self) -> Mapping[str, Mapping[int, float]]:
        """Of all keys: those of the references are asked for with every other."""
        return {
            key: {
                n: float(np.percentile(burst, self.burst_percentile))
                for n, burst in zip(self.rounds[key], bursts, strict=True)
            }
            for key, bursts in self.times_us.items()
        }

    def runs_us(self, key: str, without: frozenset[int] = frozenset()) -> np.ndarray[Any, np.dtype[np.float64]]:
        """All single runs of `key`, float64 [n], but for those of the rounds `without`."""
        kept = [b for n, b in zip(self.rounds[key], self.times_us[key], strict=True) if n not in without]
        return np.concatenate([np.asarray(burst, np.float64) for burst in kept]) if kept else np.empty(0)

    def percentile_us(self, key: str, percentile: float = 50.0) -> float:
        """A percentile over all single runs."""
        return float(np.percentile(self.runs_us(key), percentile))

    def ratio(self, key: str, base: str | None = None, without: frozenset[int] = frozenset()) -> Ratio:
        """Median of the per-round ratios of `key` to `base` (its anchor unless told), with a 95 % interval."""
        base = base or self.anchors.get(key) or self.references[0]
        bases = self.bursts_us(base)
        values = [v / bases[n] for n, v in self.bursts_us(key).items() if n in bases and n not in without]
        return Ratio.of(values)

    def by_process(self, rounds: Iterable[int]) -> list[list[int]]:
        """The rounds of each process, ascending."""
        ends = (*self.processes[1:], math.inf)
        ordered = sorted(rounds)
        return [
            [number for number in ordered if first <= number < end]
            for first, end in zip(self.processes, ends, strict=True)
        ]

    def side_by_side(self, rounds: Iterable[int]) -> list[tuple[int, ...]]:
        """The first round of every process together, then their second ones, as far as all have one."""
        return list(zip(*self.by_process(rounds), strict=False))

    def disturbed(self, tolerance: float = 0.15) -> frozenset[int]:
        """Rounds in which a reference, and only a reference is asked, is further than `tolerance` from its median.

        The median is that of the round's process: a machine that runs slower all along in one of them disturbs nothing.
        """
        bad: set[int] = set()
        for key in self.references:
            bursts = self.bursts_us(key)
            for numbers in self.by_process(bursts):
                middle = float(np.median([bursts[n] for n in numbers])) if numbers else 0.0
                bad |= {n for n in numbers if abs(bursts[n] / middle - 1) > tolerance}
        return frozenset(bad)


def joined(parts: Sequence[Measurement]) -> Measurement:
    """One measurement of the same models out of several, in processes one after the other; rounds are numbered on."""
    times: dict[str, list[Sequence[float]]] = {key: [] for key in parts[0].times_us}
    rounds: dict[str, list[int]] = {key: [] for key in parts[0].rounds}
    starts = [0]
    for part in parts:
        for key in times:
            times[key] += part.times_us[key]
            rounds[key] += [starts[-1] + number for number in part.rounds[key]]
        starts.append(1 + max(max(numbers) for numbers in rounds.values()))
    return replace(
        parts[-1],
        times_us=times,
        rounds=rounds,
        seconds=sum(part.seconds for part in parts),
        processes=tuple(starts[:-1]),
        slowed=tuple(dict.fromkeys(reason for part in parts for reason in part.slowed)),
    )


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A median over rounds and its 95 % confidence interval; `spread` is the rounds' robust relative deviation."""

    value: float
    low: float
    high: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """The interval is normal, from the median absolute deviation: order statistics say nothing below six rounds."""
        if not values:
            raise MeasurementError("every round was disturbed: nothing to take a ratio of")
        middle = float(np.median(values))
        deviation = 1.4826 * float(np.median(np.abs(np.asarray(values) - middle)))
        half = 1.96 * 1.2533 * deviation / len(values) ** 0.5
        spread = deviation / middle
        return cls(value=middle, low=middle - half, high=middle + half, spread=spread, rounds=len(values))


def _node(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """One node, of which only what is known is kept."""
    node = {
        "name": str(entry["name"]),
        "type": str(entry["type"]),
        "time_us": _time_us(entry["time_us"]),
        "compute": bool(entry["compute"]),
    }
    if entry.get("covers") is not None:
        node["covers"] = [str(name) for name in entry["covers"]]
    if entry.get("precision") is not None:
        node["precision"] = str(entry["precision"])
    return node


def _time_us(value: Any) -> float:
    time_us = float(value)
    if not 0 <= time_us < math.inf:
        raise ValueError(f"{time_us} us")
    return time_us


def _specs(entries: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=str(e["name"]), dtype=np.dtype(e["dtype"]).name, shape=tuple(int(size) for size in e["shape"]))
        for e in entries
    )
