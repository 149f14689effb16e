"""How models are timed: hot bursts that take turns, in random order, until their medians are certain enough.

Runs on the device (Python 3.8 or later, standard library only): `device_core` has it pasted in. `program` is its
`Program`, which holds what is loaded, hears what runs and tells events.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from typing import TYPE_CHECKING, Any

from edgeprune.device_state import Watch
from edgeprune.device_statistics import median, quantile

if TYPE_CHECKING:  # Python 3.8 can't subscript these at run time
    from collections.abc import Callable, Mapping

    Burst = Callable[[int, int], list[float]]  # (untimed runs, timed runs) -> microseconds

COLD_RUNS = 8  # at most: the first runs of a model prepare weights and fill caches


class Rounds:
    """Hot bursts of all candidates and references, interleaved in random order, round by round."""

    def __init__(self, bursts: Mapping[str, Burst], request: dict[str, Any], program: Any, watch: Watch | None) -> None:
        self.bursts = bursts
        self.program = program
        self.watch = watch
        self.candidates: list[str] = request["candidates"]
        self.references: list[str] = request["references"]
        self.anchors: dict[str, str] = request["anchors"]
        self.timing: dict[str, Any] = request["timing"]
        self.random = random.Random(request["seed"])
        self.times: dict[str, list[list[float]]] = {key: [] for key in bursts}
        self.rounds: dict[str, list[int]] = {key: [] for key in bursts}
        self.burst_runs: dict[str, int] = {}

    def measure(self) -> dict[str, Any]:
        started = time.perf_counter()
        gc.disable()
        try:
            for key in self.bursts:
                self.program.busy = key
                self.program.emit({"event": "warmup", "key": key})
                self.warm_up(key)
            stopped_by = self.play(started)
        finally:
            gc.enable()
        return {
            "times_us": self.times,
            "rounds": self.rounds,
            "seconds": round(time.perf_counter() - started, 4),
            "stopped_by": stopped_by,
        }

    def warm_up(self, key: str) -> None:
        """Run for `warmup_ms`, and size the bursts: runs that fill `burst_ms`, at least `min_runs`.

        A runner with bursts of its own warms up in each of them.
        """
        burst, timing = self.bursts[key], self.timing
        times = burst(timing["untimed_runs"], timing["min_runs"]) if self.program.own_bursts else burst(0, 1)
        spent_us = math.inf if self.program.own_bursts else 0.0
        while spent_us < timing["warmup_ms"] * 1e3 or len(times) < timing["untimed_runs"]:
            if len(times) == COLD_RUNS:
                self.program.lap(key, first=True)
            begun = time.perf_counter()
            times += burst(0, 1)
            # a modelled run may take no time at all by the clock: its own time counts as well
            spent_us += max((time.perf_counter() - begun) * 1e6, times[-1])
        if len(times) <= COLD_RUNS:
            self.program.lap(key, first=True)
        typical = max(median(times[-100:]), 0.1)
        wanted = math.ceil(self.timing["burst_ms"] * 1e3 / typical)
        self.burst_runs[key] = min(max(self.timing["min_runs"], wanted), 1000)

    def play(self, started: float) -> str:
        timing = self.timing
        for number in range(timing["max_rounds"]):
            order = [key for key in self.candidates if not (timing["settle_alone"] and self.certain(key))]
            if not order or (number >= timing["min_rounds"] and all(self.certain(key) for key in order)):
                return "confidence"
            if number and self.spent_seconds(started) > timing["max_seconds"]:
                return "seconds"
            order += self.references
            self.random.shuffle(order)
            for key in order:
                self.turn(key, number)
            if self.watch is not None:
                self.watch.now_and_then()
            self.program.emit({"event": "round", "round": number})
        return "rounds"

    def spent_seconds(self, started: float) -> float:
        """Since the start; with bursts of the runner's own the time in them, without what it takes to start them."""
        if self.program.own_bursts:
            return sum(sum(burst) for bursts in self.times.values() for burst in bursts) / 1e6
        return time.perf_counter() - started

    def turn(self, key: str, number: int) -> None:
        if self.program.parent and os.getppid() != self.program.parent:
            os._exit(1)  # whoever asked is gone
        self.program.busy = key
        self.times[key].append(self.bursts[key](self.timing["untimed_runs"], self.burst_runs[key]))
        self.rounds[key].append(number)
        self.program.lap(key)

    def certain(self, key: str) -> bool:
        """Whether the 95 % interval of the median over rounds is within the tolerance, judged by its spread."""
        share = self.timing["burst_percentile"] / 100
        values = [quantile(burst, share) for burst in self.times[key]]
        if len(values) < self.timing["min_rounds"]:
            return False
        anchor = self.anchors.get(key)
        if anchor is not None:
            scale = dict(zip(self.rounds[anchor], (quantile(burst, share) for burst in self.times[anchor])))
            values = [value / scale[number] for value, number in zip(values, self.rounds[key])]
        middle = median(values)
        deviation = 1.4826 * median([abs(value - middle) for value in values])
        # the standard error of a median of n normal values is 1.2533 sigma / sqrt(n)
        half = 1.96 * 1.2533 * deviation / math.sqrt(len(values))
        return half <= float(self.timing["tolerance"]) * middle


def burst_of_runs(runner: Any) -> Callable[[Any, int, int], list[float]]:
    """A burst made of single runs, timed from outside unless they know their own (modelled) time."""
    timed = modelled_run(runner) if hasattr(runner, "timed_run") else clocked_run(runner)

    def burst(handle: Any, untimed: int, runs: int) -> list[float]:
        for _ in range(untimed):
            timed(handle)
        return [round(timed(handle), 2) for _ in range(runs)]

    return burst


def clocked_run(runner: Any) -> Callable[[Any], float]:
    run, clock = runner.run, time.perf_counter_ns

    def timed(handle: Any) -> float:
        begun = clock()
        run(handle)
        return (clock() - begun) / 1e3

    return timed


def modelled_run(runner: Any) -> Callable[[Any], float]:
    timed_run = runner.timed_run

    def timed(handle: Any) -> float:
        return float(timed_run(handle))

    return timed
