"""Verify: the exported engine, measured beside the dense one, inside the budget or not.

*Met* means: the one-sided 95 % upper bound of the budget's percentile lies inside the budget, in one fresh run after
the choice was fixed. For a ratio the bound is that of the per-round ratio to dense.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune import parity, robust
from edgeprune.budget import Budget, parse_budget
from edgeprune.device import Device
from edgeprune.engine import Engine
from edgeprune.errors import UnstableError
from edgeprune.fingerprint import fingerprint_of
from edgeprune.measurement import Measurement, Timing
from edgeprune.profiling import load_references
from edgeprune.transport import Session, open_session

if TYPE_CHECKING:
    import torch

DENSE = "dense"
PRUNED = "pruned"
CONFIRM = Timing(min_rounds=30, max_rounds=240, max_seconds=30.0, tolerance=0.005)
"""30 rounds; more, for at most half a minute, where the ratio to dense is not known to 0.5 % yet."""
MOST_DISTURBED = 0.5  # share of rounds
MOST_UNCERTAIN = 0.05  # relative distance from an estimate inside the budget to a bound outside of it


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
            "p50_ms": _digits(self.p50_ms),
            "p90_ms": _digits(self.p90_ms),
            "n": self.n,
            "upper_ms": _digits(self.at.upper),
        }
        if self.ratio is not None:
            document["ratio"] = _digits(self.ratio.value)
            document["ratio_ci"] = [_digits(self.ratio.low), _digits(self.ratio.high)]
            document["ratio_upper"] = _digits(self.ratio.upper)
        return document


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was measured and whether it is inside the budget. Latencies are *measured*, or *modelled* (`origin`).

    `met` is None without a budget. `why` says what decided. `predicted_ms`, `attempts`, `quality`, `bundle` and
    `seconds` are filled in by whoever knows them (`dataclasses.replace`).
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
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    attempts: tuple[Mapping[str, Any], ...] = ()
    quality: Mapping[str, Any] = field(default_factory=dict)
    bundle: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document of `fit`, `verify` and `bench --json`."""
        return {
            "model": self.model,
            "device": self.device,
            "percentile": self.percentile,
            "budget": self.budget,
            "budget_ms": _digits(self.budget_ms),
            "met": self.met,
            "why": self.why,
            "origin": self.origin,
            "predicted_ms": _digits(self.predicted_ms),
            "predicted_error_ms": _digits(self.predicted_error_ms),
            "dense": self.dense.to_json() if self.dense else None,
            "pruned": self.pruned.to_json(),
            "parity": self.parity.to_json() if self.parity else None,
            "rounds": self.rounds,
            "disturbed_rounds": self.disturbed_rounds,
            "references_us": {name: _digits(value) for name, value in self.references_us.items()},
            "attempts": list(self.attempts),
            "quality": dict(self.quality),
            "bundle": self.bundle,
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
                dense, engine.pruned.example_inputs, device, folder / DENSE, precision=engine.precision
            )
        expected = () if device.modelled else parity.samples(engine.pruned, pictures=pictures)
        result = measure_pair(engine, dense, device=device, expected=expected, timing=timing, percentile=percentile)
    same = engine.pruned.plan.is_empty
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
) -> Verification:
    """Parity, then the latency of an engine, and of the dense one beside it, interleaved in one process; no verdict."""
    engines = {PRUNED: engine} if dense is None else {DENSE: dense, PRUNED: engine}
    with open_session(device, precision=engine.precision) as session:
        for key, one in engines.items():
            session.load(key, one.path)
        checked = parity.check_parity(session, PRUNED, engine, expected) if expected else None
        measurement = measure_engines(session, device, engine.precision, tuple(engines), timing)
        facts = fingerprint_of(device, engine.precision, session.hello(), timing.regime).facts
    disturbed = undisturbed_or_raise(measurement)
    return Verification(
        device=device.name,
        percentile=percentile,
        origin="modelled" if measurement.modelled else "measured",
        dense=latency(measurement, DENSE, percentile=percentile, without=disturbed) if dense else None,
        pruned=latency(measurement, PRUNED, DENSE if dense else None, percentile=percentile, without=disturbed),
        parity=checked,
        references_us={key: measurement.percentile_us(key) for key in measurement.references},
        rounds=max(len(numbers) for numbers in measurement.rounds.values()),
        disturbed_rounds=len(disturbed),
        fingerprint=facts,
    )


def measure_engines(
    session: Session, device: Device, precision: str, keys: Sequence[str], timing: Timing
) -> Measurement:
    """Time loaded engines and the two session references, interleaved; ratios settle against the first key."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-references-") as folder:
        references = load_references(session, device, precision, Path(folder))
        first, *others = keys
        anchors = {first: references[0], **dict.fromkeys(others, first)}
        return session.measure(list(keys), references, timing=timing, anchors=anchors)


def undisturbed_or_raise(measurement: Measurement) -> frozenset[int]:
    """The disturbed rounds, which the references tell; `UnstableError` when they are more than half."""
    disturbed = measurement.disturbed()
    total = max(len(numbers) for numbers in measurement.rounds.values())
    if len(disturbed) > MOST_DISTURBED * total:
        raise UnstableError(
            f"the reference kernels ran more than 15 % off their median in {len(disturbed)} of {total} rounds: "
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
    """Percentiles in ms of one key, and its ratio to `base` by round, without the given rounds."""
    bursts = zip(measurement.rounds[key], measurement.times_us[key], strict=True)
    rounds_ms = {number: np.asarray(burst) / 1e3 for number, burst in bursts if number not in without}
    runs = np.concatenate(list(rounds_ms.values()))
    ratio = None
    if base is not None:
        ratio = _ratio(measurement, key, base, percentile, without)
    return Latency(
        p50_ms=float(np.percentile(runs, 50)),
        p90_ms=float(np.percentile(runs, 90)),
        n=len(runs),
        at=robust.percentile([burst.tolist() for burst in rounds_ms.values()], percentile),
        ratio=ratio,
    )


def _ratio(
    measurement: Measurement, key: str, base: str, percentile: float, without: frozenset[int]
) -> robust.Estimate:
    """At p50 the median of the per-round ratios of burst medians. Elsewhere the percentile over runs of `key`, each
    divided by the base's median in its round, over the same percentile of the base's own runs."""
    bases = measurement.burst_medians_us(base)
    numbers = sorted((bases.keys() & measurement.burst_medians_us(key).keys()) - without)
    if percentile == 50.0:
        medians = measurement.burst_medians_us(key)
        return robust.ratio([medians[n] for n in numbers], [bases[n] for n in numbers])
    above, below = (
        dict(zip(measurement.rounds[name], measurement.times_us[name], strict=True)) for name in (key, base)
    )
    own = robust.percentile([[t / bases[n] for t in above[n]] for n in numbers], percentile)
    scale = robust.percentile([[t / bases[n] for t in below[n]] for n in numbers], percentile).value
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


def _digits(value: float | None) -> float | None:
    """Six digits are more than any clock here gives; JSON knows no infinity."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
