"""Measure bundles again: one against its budget (`verify BUNDLE`), or several side by side (`bench BUNDLE...`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.budget import Budget, parse_budget
from edgeprune.bundle import PLAN, Bundle, read_bundle
from edgeprune.device import Device, check_modelled
from edgeprune.engine import Engine
from edgeprune.errors import InputError
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
    timing: Timing = CONFIRM,
) -> Verification:
    """Check a bundle's files, its engine's outputs, and its latency on this device against a budget.

    Budget and percentile are those of the manifest unless told, the device too. The verdict is as in `verify`.
    """
    started = time.perf_counter()
    bundle = read_bundle(path)
    device = check_modelled(_device_for(bundle, device), allow_modelled)
    recorded = _recorded(bundle)
    budget = budget if budget is not None else recorded.get("budget")
    wanted = parse_budget(budget) if isinstance(budget, str) else budget
    if wanted is not None and wanted.kind == "ratio" and bundle.dense is None:
        raise InputError(f"{path} holds no dense engine, so no ratio can be measured; give a budget like 8ms")
    result = measure_pair(
        bundle.engine,
        bundle.dense,
        device=device,
        expected=() if device.modelled else bundle.samples(),
        timing=timing,
        percentile=percentile if percentile is not None else float(recorded.get("percentile", 50.0)),
    )
    plan = Plan.from_json(bundle.folder / PLAN)
    same = plan.is_empty and (bundle.dense is None or bundle.dense.precision == bundle.engine.precision)
    result = decide(result, wanted, batch=_batch(bundle.engine), same=same)
    return replace(_named(result, bundle), seconds={"verify": time.perf_counter() - started})


def bench(
    paths: Sequence[Path | str],
    *,
    device: Device | None = None,
    allow_modelled: bool = False,
    timing: Timing = CONFIRM,
    percentile: float = 50.0,
) -> tuple[Verification, ...]:
    """Time the engines of all bundles, pruned and dense, interleaved on one device (`time_engines`); no verdict.

    Dense engines with the same bytes are timed once. `InputError` when the bundles are for different devices.
    """
    started = time.perf_counter()
    bundles = [read_bundle(path) for path in paths]
    if not bundles:
        raise InputError("bench takes at least one bundle")
    device = check_modelled(_one_device(bundles, device), allow_modelled)
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
    timed = time_engines(engines, device, bundles[0].engine.precision, expected=samples, timing=timing)
    results = [verification_of(timed, key, base, percentile=percentile) for key, base in pairs]
    seconds = {"bench": time.perf_counter() - started}
    return tuple(
        replace(_named(result, bundle), seconds=seconds) for result, bundle in zip(results, bundles, strict=True)
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


def _device_for(bundle: Bundle, device: Device | None) -> Device:
    if device is None:
        return bundle.manifest.device
    if device.backend != bundle.engine.backend:
        raise InputError(
            f"{bundle.folder} holds an engine for {bundle.engine.backend}, device '{device.name}' runs {device.backend}"
        )
    return device


def _one_device(bundles: Sequence[Bundle], device: Device | None) -> Device:
    chosen = _device_for(bundles[0], device)
    for bundle in bundles:
        if device is None and bundle.manifest.device != chosen:
            raise InputError(
                f"{bundle.folder} is for device '{bundle.manifest.device.name}', {bundles[0].folder} for "
                f"'{chosen.name}': bench compares bundles of one device"
            )
        _device_for(bundle, chosen)
        if bundle.engine.precision != bundles[0].engine.precision:
            raise InputError(
                f"{bundle.folder} computes in {bundle.engine.precision}, not {bundles[0].engine.precision}"
            )
    return chosen


def _batch(engine: Engine) -> int:
    return int(engine.inputs[0].shape[0]) if engine.inputs and engine.inputs[0].shape else 1
