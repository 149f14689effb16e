"""Verify: the exported engine, measured beside the dense one, inside the budget or not.

*Met* means: the one-sided 95 % upper bound of the budget's percentile lies inside the budget, in one fresh run after
the choice was fixed. For a ratio the bound is that of the per-round ratio to dense.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune import parity, robust
from edgeprune.budget import Budget, parse_budget
from edgeprune.device import Device
from edgeprune.device_statistics import digits
from edgeprune.engine import Engine
from edgeprune.errors import UnstableError
from edgeprune.fingerprint import fingerprint_of
from edgeprune.measurement import Measurement, Timing, joined
from edgeprune.references import load_references
from edgeprune.transport import Session, open_session, through_cuts

if TYPE_CHECKING:
    import torch

DENSE = "dense"
PRUNED = "pruned"
CONFIRM = Timing(min_rounds=30, max_rounds=240, max_seconds=30.0, tolerance=0.005)
"""30 rounds; more, for at most half a minute, where the ratio to dense is not known to 0.5 % yet."""
MOST_DISTURBED = 0.5  # share of rounds
MOST_UNCERTAIN = 0.05  # relative distance from an estimate inside the budget to a bound outside of it

OnHello = Callable[[Mapping[str, Any]], None]


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
            "p50_ms": _number(self.p50_ms),
            "p90_ms": _number(self.p90_ms),
            "n": self.n,
            "upper_ms": _number(self.at.upper),
        }
        if self.ratio is not None:
            document["ratio"] = _number(self.ratio.value)
            document["ratio_ci"] = [_number(self.ratio.low), _number(self.ratio.high)]
            document["ratio_upper"] = _number(self.ratio.upper)
        return document


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was measured and whether it is inside the budget. Latencies are *measured*, or *modelled* (`origin`).

    `met` is None without a budget. `why` says what decided. `loaded` is the order in which each process loaded the two
    engines. `predicted_ms`, `attempts`, `quality`, `bundle`, `differences` (to where a bundle's manifest was measured)
    and `seconds` are filled in by whoever knows them (`dataclasses.replace`).
    """

    model: str = ""
    device: str
    percentile: float = 50.0
    budget: str | None = None
    budget_ms: float | None = None
    met: bool | None = None
    why: str = ""
    origin: str
    predicted_ms: float | None = None
    predicted_error_ms: float | None = None
    dense: Latency | None
    pruned: Latency
    parity: parity.Parity | None = None
    references_us: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 0
    disturbed_rounds: int = 0
    loaded: tuple[tuple[str, ...], ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    attempts: tuple[Mapping[str, Any], ...] = ()
    quality: Mapping[str, Any] = field(default_factory=dict)
    bundle: str | None = None
    differences: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document of `fit`, `verify` and `bench --json`."""
        return {
            "model": self.model,
            "device": self.device,
            "percentile": self.percentile,
            "budget": self.budget,
            "budget_ms": _number(self.budget_ms),
            "met": self.met,
            "why": self.why,
            "origin": self.origin,
            "predicted_ms": _number(self.predicted_ms),
            "predicted_error_ms": _number(self.predicted_error_ms),
            "dense": self.dense.to_json() if self.dense else None,
            "pruned": self.pruned.to_json(),
            "parity": self.parity.to_json() if self.parity else None,
            "rounds": self.rounds,
            "disturbed_rounds": self.disturbed_rounds,
            "loaded": [list(order) for order in self.loaded],
            "references_us": {name: _number(value) for name, value in self.references_us.items()},
            "attempts": list(self.attempts),
            "quality": dict(self.quality),
            "bundle": self.bundle,
            "differences": list(self.differences),
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
        }


def verify(
    engine: Engine,
    *,
    dense: torch.nn.Module | Engine | None,
    budget: str | Budget | None = None,
    percentile: float = 50.0,
    pictures: Sequence[torch.Tensor] = (),
    timing: Timing = CONFIRM,
) -> Verification:
    """Check an engine's outputs against torch, then measure it beside the dense engine on its device.

    `engine` is what `export` gave. `dense` may be the dense module, which is then exported too, or its engine.
    `pictures` are batches for the parity check beside random inputs. `QualityError` when the outputs are off,
    `UnstableError` when the noise allows no answer.
    """
    device = engine.device
    if device is None or engine.pruned is None:
        raise ValueError("verify takes an engine as `export` gives it, with its device and torch module")
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    started = time.perf_counter()
    with ExitStack() as stack:
        if dense is not None and not isinstance(dense, Engine):
            from edgeprune.exporting import export_dense

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-dense-")))
            dense = export_dense(
                dense,
                engine.pruned.example_inputs,
                device,
                folder / DENSE,
                precision=engine.precision,
                calibration=engine.calibration,
            )
        expected: tuple[parity.Sample, ...] = ()
        if not device.modelled:
            expected = parity.samples(engine.pruned, pictures=pictures, calibration=engine.calibration)
        result = measure_pair(engine, dense, device=device, expected=expected, timing=timing, percentile=percentile)
    same = engine.pruned.plan.is_empty and (dense is None or dense.precision == engine.precision)
    batch = int(engine.inputs[0].shape[0]) if engine.inputs and engine.inputs[0].shape else 1
    result = decide(result, budget, batch=batch, same=same)
    return replace(result, seconds={"verify": time.perf_counter() - started})


def measure_pair(
    engine: Engine,
    dense: Engine | None,
    *,
    device: Device,
    expected: Sequence[parity.Sample] = (),
    timing: Timing = CONFIRM,
    percentile: float = 50.0,
    on_hello: OnHello = lambda hello: None,
) -> Verification:
    """Parity, then the latency of an engine, and of the dense one beside it, interleaved; no verdict."""
    engines = {PRUNED: engine} if dense is None else {DENSE: dense, PRUNED: engine}
    samples = {PRUNED: expected}
    timed = time_engines(engines, device, engine.precision, expected=samples, timing=timing, on_hello=on_hello)
    return verification_of(timed, PRUNED, DENSE if dense else None, percentile=percentile)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Engines that were timed beside the session references.

    `loaded` is the order in which each process loaded them, `parity` that of the engines for which samples were given.
    """

    device: Device
    measurement: Measurement
    loaded: tuple[tuple[str, ...], ...]
    parity: Mapping[str, parity.Parity]
    fingerprint: Mapping[str, Any]


def time_engines(
    engines: Mapping[str, Engine],
    device: Device,
    precision: str,
    *,
    expected: Mapping[str, Sequence[parity.Sample]],
    timing: Timing,
    on_hello: OnHello = lambda hello: None,
) -> Timed:
    """All engines and the two session references interleaved in one process, then, loaded in the opposite order, in
    another: the same file loaded twice into one process is 1 to 2 % faster the second time on some runtimes.

    `on_hello` hears what the device tells of itself before anything is loaded there, and may refuse it by raising.
    """
    keys = tuple(engines)

    def first(patience_s: float) -> tuple[Mapping[str, Any], Mapping[str, parity.Parity], Measurement]:
        with open_session(device, precision=precision, patience_s=patience_s) as session:
            hello = session.hello()
            on_hello(hello)
            orders = load_orders(keys, hello)
            _load(session, engines, orders[0])
            checked = {
                key: parity.check_parity(session, key, engines[key], samples)
                for key, samples in expected.items()
                if samples
            }
            share = timing.shared_by(len(orders))
            return hello, checked, measure_engines(session, device, precision, keys, share)

    hello, checked, measured = through_cuts(first)
    orders = load_orders(keys, hello)
    parts = [measured]
    rounds = max(map(len, measured.rounds.values()))  # as many, so that none of the orders counts more
    same = replace(timing.shared_by(len(orders)), min_rounds=rounds, max_rounds=rounds)
    for seed, order in enumerate(orders[1:], 1):

        def again(patience_s: float, seed: int = seed, order: tuple[str, ...] = order) -> Measurement:
            with open_session(device, precision=precision, patience_s=patience_s) as session:
                _load(session, engines, order)
                return measure_engines(session, device, precision, keys, same, seed=seed)

        parts.append(through_cuts(again))
    return Timed(
        device=device,
        measurement=joined(parts),
        loaded=orders,
        parity=checked,
        fingerprint=fingerprint_of(device, precision, hello, timing.regime).facts,
    )


def load_orders(keys: tuple[str, ...], hello: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """As given and the other way round; the first alone where no two engines share a process, or a formula tells times.

    `hello` is the device program's answer.
    """
    alone = len(keys) < 2 or hello.get("own_bursts") or hello["modelled"]
    return (keys,) if alone else (keys, keys[::-1])


def _load(session: Session, engines: Mapping[str, Engine], order: Iterable[str]) -> None:
    """Each in its own precision: a pruned engine in int8 may be measured beside a dense one in fp32."""
    for key in order:
        session.load(key, engines[key].path, precision=engines[key].precision)


def measure_engines(
    session: Session, device: Device, precision: str, keys: Sequence[str], timing: Timing, *, seed: int = 0
) -> Measurement:
    """Time loaded engines and the two session references, interleaved; ratios settle against the first key."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-references-") as folder:
        references = load_references(session, device, precision, Path(folder))
        first, *others = keys
        anchors = {first: references[0], **dict.fromkeys(others, first)}
        return session.measure(list(keys), references, timing=timing, anchors=anchors, seed=seed)


def verification_of(timed: Timed, key: str, base: str | None, *, percentile: float) -> Verification:
    """What was measured of one engine and the dense one (`base`) beside it; `UnstableError` where it was too noisy."""
    measurement = timed.measurement
    disturbed = undisturbed_or_raise(measurement)
    return Verification(
        device=timed.device.name,
        percentile=percentile,
        origin="modelled" if measurement.modelled else "measured",
        dense=latency(measurement, base, percentile=percentile, without=disturbed) if base else None,
        pruned=latency(measurement, key, base, percentile=percentile, without=disturbed),
        parity=timed.parity.get(key),
        references_us={name: measurement.percentile_us(name) for name in measurement.references},
        rounds=max(len(numbers) for numbers in measurement.rounds.values()),
        disturbed_rounds=len(disturbed),
        loaded=tuple(tuple(each for each in order if each in (key, base)) for order in timed.loaded),
        fingerprint=timed.fingerprint,
    )


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


def latency(
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


def decide(result: Verification, budget: Budget | None, *, batch: int = 1, same: bool = False) -> Verification:
    """The verdict on a measurement; `same` says that the pruned network is the dense one (an empty plan).

    `UnstableError` when the estimate is inside the budget and the bound, more than 5 % above it, is not.
    """
    if budget is None:
        return result
    ratio = result.pruned.ratio
    if budget.kind == "ratio" and (ratio is None or result.dense is None):
        raise ValueError("a ratio budget needs the dense engine measured beside the pruned one")
    limit_ms = budget.limit_ms(result.dense.at.value if result.dense else None, batch)
    tested, limit, unit = (ratio, budget.value, "x") if budget.kind == "ratio" else (result.pruned.at, limit_ms, " ms")
    assert tested is not None
    inside = tested.upper <= limit or (same and budget.kind == "ratio" and limit >= 1)
    if not inside and tested.value <= limit and tested.upper > tested.value * (1 + MOST_UNCERTAIN):
        raise UnstableError(
            f"p{result.percentile:g} is {tested.value:.4g}{unit}, inside the budget of {limit:.4g}{unit}, but known "
            f"only to be at most {tested.upper:.4g}{unit} after {result.rounds} rounds: too noisy to say; "
            "try again when the device is idle, or measure longer"
        )
    slower = ratio is not None and not same and ratio.upper > 1
    modelled = "modelled " if result.origin == "modelled" else ""
    why = f"{modelled}p{result.percentile:g} is at most {tested.upper:.4g}{unit} (95 %), the budget {limit:.4g}{unit}"
    if slower and ratio is not None:
        bound = f"{modelled}{ratio.value:.4g}x, at most {ratio.upper:.4g}x (95 %)"
        why = f"not shown to be faster than the dense engine: {bound}"
    return replace(result, budget=str(budget), budget_ms=limit_ms, met=inside and not slower, why=why)


def on_todays_clock(us: float, then: Mapping[str, float], now: Mapping[str, float]) -> float:
    """A predicted time moved from the clock of the references `then` to that of `now`: by the geometric mean of their
    ratios. References that only one of the two knows don't count; without any the time stays."""
    changes = [math.log(now[name] / then[name]) for name in then.keys() & now.keys()]
    return us * math.exp(sum(changes) / len(changes)) if changes else us


def _number(value: float | None) -> float | None:
    """For JSON, which knows no infinity."""
    return digits(value) if value is not None and math.isfinite(value) else None
