"""Measure bundles again: one against its budget (`verify BUNDLE`), or several side by side (`bench BUNDLE...`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.budget import Budget, parse_budget
from edgeprune.bundle import PLAN, REBUILD, Bundle, read_bundle, translated
from edgeprune.bundle_engine import check_version, differences
from edgeprune.device import Device, check_modelled, load_device, with_clocks
from edgeprune.engine import Engine
from edgeprune.errors import InputError, MeasurementError
from edgeprune.fingerprint import Fingerprint
from edgeprune.measurement import Timing
from edgeprune.plan_json import Plan
from edgeprune.verifying import (
    CONFIRM,
    DENSE,
    PRUNED,
    Verification,
    decide,
    measure_pair,
    on_todays_clock,
    time_engines,
    verification_of,
)


def verify_bundle(
    path: Path | str,
    *,
    budget: str | Budget | None = None,
    percentile: float | None = None,
    device: Device | None = None,
    allow_modelled: bool = False,
    lock_clocks: bool = False,
    timing: Timing = CONFIRM,
) -> Verification:
    """Check a bundle's files, its engine's outputs, and its latency on this device against a budget.

    Budget and percentile are those of the manifest unless told, the device too, whose clocks are held where its entry
    or `lock_clocks` says so. The verdict is as in `verify`.
    """
    started = time.perf_counter()
    bundle = read_bundle(path)
    device = with_clocks(check_modelled(device_for(bundle, device), allow_modelled), held=lock_clocks)
    recorded = _recorded(bundle)
    budget = budget if budget is not None else recorded.get("budget")
    wanted = parse_budget(budget) if isinstance(budget, str) else budget
    if wanted is not None and wanted.kind == "ratio" and bundle.dense is None:
        raise InputError(f"{path} holds no dense engine, so no ratio can be measured; give a budget like 8ms")
    differs: list[str] = []

    def check(hello: Mapping[str, Any]) -> None:
        differs[:] = check_device(bundle, device, hello)

    with explained(bundle, differs):
        result = measure_pair(
            bundle.engine,
            bundle.dense,
            device=device,
            expected=() if device.modelled else bundle.samples(),
            timing=timing,
            percentile=percentile if percentile is not None else float(recorded.get("percentile", 50.0)),
            on_hello=check,
        )
    plan = Plan.from_json(bundle.folder / PLAN)
    same = plan.is_empty and (bundle.dense is None or bundle.dense.precision == bundle.engine.precision)
    result = decide(result, wanted, batch=_batch(bundle.engine), same=same)
    seconds = {"verify": time.perf_counter() - started}
    return replace(_named(result, bundle), differences=tuple(differs), seconds=seconds)


def check_device(bundle: Bundle, device: Device, hello: Mapping[str, Any]) -> tuple[str, ...]:
    """What is not as it was where the manifest's latency was measured, before anything of the bundle is loaded.

    `hello` is the device program's answer. `RuntimeMissing` where the runtime is older than the least one that reads
    the engine.
    """
    with translated(bundle.folder):
        if device.roofline is None:
            check_version(bundle.document["runtime"], str(hello["version"]))
    return tuple(differences(bundle.document["fingerprint"], hello))


@contextmanager
def explained(bundle: Bundle, differs: Sequence[str]) -> Iterator[None]:
    """An engine that does not load or run where it was not made: the runtime's words, and what is not as it was."""
    try:
        yield
    except MeasurementError as error:
        if not differs:
            raise
        told = "\n  ".join(differs)
        hint = f"{bundle.folder / REBUILD} makes the bundle again for what is here"
        raise MeasurementError(f"{error}\n  {told}\n  {hint}") from error


def bench(
    paths: Sequence[Path | str],
    *,
    device: Device | None = None,
    allow_modelled: bool = False,
    lock_clocks: bool = False,
    timing: Timing = CONFIRM,
    percentile: float = 50.0,
) -> tuple[Verification, ...]:
    """Time the engines of all bundles, pruned and dense, interleaved on one device (`time_engines`); no verdict.

    Dense engines with the same bytes are timed once. `lock_clocks` holds the device's clocks meanwhile. `InputError`
    when the bundles are for different devices.
    """
    started = time.perf_counter()
    bundles = [read_bundle(path) for path in paths]
    if not bundles:
        raise InputError("bench takes at least one bundle")
    device = with_clocks(check_modelled(_one_device(bundles, device), allow_modelled), held=lock_clocks)
    dense_keys: dict[str, str] = {}
    engines: dict[str, Engine] = {}
    pairs = []
    for number, bundle in enumerate(bundles):
        base = None
        if bundle.dense is not None and bundle.manifest.dense is not None:
            identity = " ".join(sorted(bundle.manifest.files[name].sha256 for name in bundle.manifest.dense.files))
            base = dense_keys.setdefault(identity, f"{DENSE}{number}")
            engines.setdefault(base, bundle.dense)
        engines[f"{PRUNED}{number}"] = bundle.engine
        pairs.append((f"{PRUNED}{number}", base))
    samples = {
        key: () if device.modelled else bundle.samples() for (key, _), bundle in zip(pairs, bundles, strict=True)
    }
    differs: list[tuple[str, ...]] = []

    def check(hello: Mapping[str, Any]) -> None:
        differs[:] = [check_device(bundle, device, hello) for bundle in bundles]

    precision = bundles[0].engine.precision
    timed = time_engines(engines, device, precision, expected=samples, timing=timing, on_hello=check)
    results = [verification_of(timed, key, base, percentile=percentile) for key, base in pairs]
    seconds = {"bench": time.perf_counter() - started}
    return tuple(
        replace(_named(result, bundle), differences=differences, seconds=seconds)
        for result, bundle, differences in zip(results, bundles, differs, strict=True)
    )


def _named(result: Verification, bundle: Bundle) -> Verification:
    """With what the manifest knows; a prediction made for this very device is moved to the clock of this run."""
    recorded = _recorded(bundle)
    predicted = error = None
    known = bundle.document.get("fingerprint") or {}
    if recorded.get("predicted_ms") and Fingerprint(facts=known) == Fingerprint(facts=_plain(result.fingerprint)):
        then = {str(name): float(value) for name, value in recorded.get("references_us", {}).items()}
        predicted = on_todays_clock(float(recorded["predicted_ms"]), then, result.references_us)
        if recorded.get("predicted_error_ms"):
            error = on_todays_clock(float(recorded["predicted_error_ms"]), then, result.references_us)
    return replace(
        result,
        model=bundle.model,
        bundle=str(bundle.folder),
        predicted_ms=predicted,
        predicted_error_ms=error,
        quality=bundle.document.get("quality") or {},
        attempts=tuple(bundle.document.get("attempts") or ()),
    )


def _recorded(bundle: Bundle) -> Mapping[str, Any]:
    recorded = bundle.document.get("latency")
    return recorded if isinstance(recorded, Mapping) else {}


def _plain(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """As JSON gives it back: lists in the place of tuples."""
    import json

    plain: Mapping[str, Any] = json.loads(json.dumps(facts))
    return plain


def device_for(bundle: Bundle, device: Device | None) -> Device:
    """A bundle says which device it is for; how that is reached is only taken from one's own devices.yaml.

    Else a bundle from elsewhere could name a host, a file of ssh's options and a program to start there.
    """
    if device is None:
        told = bundle.manifest.device
        if not told.remote:
            return told
        device = load_device(told.name, allow_modelled=True).model_copy(update={"lock_clocks": told.lock_clocks})
    if device.backend != bundle.engine.backend:
        raise InputError(
            f"{bundle.folder} holds an engine for {bundle.engine.backend}, device '{device.name}' runs {device.backend}"
        )
    return device


def _one_device(bundles: Sequence[Bundle], device: Device | None) -> Device:
    chosen = device_for(bundles[0], device)
    for bundle in bundles:
        if device is None and device_for(bundle, None) != chosen:
            raise InputError(
                f"{bundle.folder} is for device '{bundle.manifest.device.name}', {bundles[0].folder} for "
                f"'{chosen.name}': bench compares bundles of one device"
            )
        device_for(bundle, chosen)
        if bundle.engine.precision != bundles[0].engine.precision:
            raise InputError(
                f"{bundle.folder} computes in {bundle.engine.precision}, not {bundles[0].engine.precision}"
            )
    return chosen


def _batch(engine: Engine) -> int:
    return int(engine.inputs[0].shape[0]) if engine.inputs and engine.inputs[0].shape else 1
