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
from typing import TYPE_CHECKING, Any

from edgeprune import parity
from edgeprune.budget import Budget, parse_budget
from edgeprune.device import Device
from edgeprune.engine import Engine
from edgeprune.errors import UnstableError
from edgeprune.fingerprint import fingerprint_of
from edgeprune.latency import Latency, json_number, latency_of, undisturbed_or_raise
from edgeprune.measurement import Measurement, Timing, joined
from edgeprune.references import load_references
from edgeprune.transport import Session, open_session, through_cuts

if TYPE_CHECKING:
    import torch

DENSE = "dense"
PRUNED = "pruned"
CONFIRM = Timing(min_rounds=30, max_rounds=240, max_seconds=30.0, tolerance=0.005)
"""30 rounds; more, for at most half a minute, where the ratio to dense is not known to 0.5 % yet."""
MOST_UNCERTAIN = 0.05  # relative distance from an estimate inside the budget to a bound outside of it

OnHello = Callable[[Mapping[str, Any]], None]


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
            "budget_ms": json_number(self.budget_ms),
            "met": self.met,
            "why": self.why,
            "origin": self.origin,
            "predicted_ms": json_number(self.predicted_ms),
            "predicted_error_ms": json_number(self.predicted_error_ms),
            "dense": self.dense.to_json() if self.dense else None,
            "pruned": self.pruned.to_json(),
            "parity": self.parity.to_json() if self.parity else None,
            "rounds": self.rounds,
            "disturbed_rounds": self.disturbed_rounds,
            "loaded": [list(order) for order in self.loaded],
            "references_us": {name: json_number(value) for name, value in self.references_us.items()},
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
        dense=latency_of(measurement, base, percentile=percentile, without=disturbed) if base else None,
        pruned=latency_of(measurement, key, base, percentile=percentile, without=disturbed),
        parity=timed.parity.get(key),
        references_us={name: measurement.percentile_us(name) for name in measurement.references},
        rounds=max(len(numbers) for numbers in measurement.rounds.values()),
        disturbed_rounds=len(disturbed),
        loaded=tuple(tuple(each for each in order if each in (key, base)) for order in timed.loaded),
        fingerprint=timed.fingerprint,
    )


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
