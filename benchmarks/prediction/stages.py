"""The stages of one network: kernels, convert, profile, predict, measure, table_only. Each gives a JSON document."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import edgeprune as ep
from benchmarks.prediction.networks import RANDOM, build
from edgeprune.budget import parse_budget
from edgeprune.calibration import Cut, Source, calibration_cuts, with_networks
from edgeprune.choosing import choose
from edgeprune.cost import CostModel, cost_model
from edgeprune.device import Device
from edgeprune.errors import BudgetError
from edgeprune.exporting import export
from edgeprune.graph import ModelGraph, trace
from edgeprune.measurement import KERNELS, Timing
from edgeprune.plan_json import Plan
from edgeprune.preparing import Silent, measured_table
from edgeprune.references import COMPUTE, load_references
from edgeprune.saliency import score
from edgeprune.surgery import apply
from edgeprune.table import LatencyTable, read_table, table_path
from edgeprune.transport import open_session
from edgeprune.units import samples, shape_key

BUDGETS = (0.8, 0.6, 0.5, 0.4)
PASSES = 4
TIMING = Timing(
    warmup_ms=60.0,
    min_rounds=8,
    max_rounds=12,
    max_seconds=40.0,
    tolerance=0.006,
    burst_percentile=KERNELS.burst_percentile,
)
Row = dict[str, Any]


def kernels(name: str, device_name: str, work: Path, row: Row) -> Row:
    """Kernels by need; how much of the full grid of widths they are."""
    device = ep.load_device(device_name)
    model, inputs = build(name)
    before = len(_table(device))
    table = measured_table(graph := trace(model, inputs), device, Silent())
    grid = _full_grid(cost_model(graph, table))
    return {
        "kernels": len(table) - before,
        "table": len(table),
        "grid": grid,
        "told": f"{len(table) - before} measured, {len(table)} in the table; the grid in steps of 8 has {grid}",
    }


def convert(name: str, device_name: str, work: Path, row: Row) -> Row:
    """Engines of the networks of the calibration and of the random widths, which wait for nothing to be measured."""
    device = ep.load_device(device_name)
    source, cost = _source_and_cost(name, device)
    plans = [cut.plan(source.graph) for cut in calibration_cuts(cost)]
    started = time.perf_counter()
    for plan in plans:
        _engine(plan, source, device, _engines(work, name))
    seconds = round(time.perf_counter() - started, 1)
    for widths in _all_random(source.graph, row).values():
        _engine(Cut(widths=widths).plan(source.graph), source, device, _engines(work, name))
    return {"calibration_seconds": seconds, "told": f"those of the calibration: {len(plans)} in {seconds} s"}


def profile(name: str, device_name: str, work: Path, row: Row) -> Row:
    """Whole networks of the calibration, beside the kernels."""
    device = ep.load_device(device_name)
    source, cost = _source_and_cost(name, device)
    before = len(_table(device).networks)
    table = with_networks(
        _table(device),
        cost,
        source,
        device,
        engine_of=lambda cut: _engine(cut.plan(source.graph), source, device, _engines(work, name)),
    )
    return {"told": f"{len(table.networks) - before} networks measured"}


def _source_and_cost(name: str, device: Device) -> tuple[Source, CostModel]:
    """The network, and what kernels alone tell of it."""
    model, inputs = build(name)
    graph = trace(model, inputs)
    cost = cost_model(graph, replace(_table(device), networks=()))
    return Source(model=model, graph=graph, example_inputs=inputs), cost


def _engines(work: Path, name: str) -> Path:
    return work / "engines" / name


def _full_grid(cost: CostModel) -> int:
    """Kernels at every width in steps of 8, of all shapes."""
    return sum(
        prod(-(-(max(k.sizes[axis] for k in kernels)) // 8) for axis in range(3))
        for kernels in samples(cost.units, cost.options).values()
    )


def _table(device: Device) -> LatencyTable:
    path = table_path(device, device.precisions[0])
    return read_table(path, allow_other=True)


def predict(name: str, device_name: str, work: Path, row: Row) -> Row:
    """Random widths and the solver's choices, with what is predicted for them in several ways."""
    device = ep.load_device(device_name)
    model, inputs = build(name)
    graph = trace(model, inputs)
    table = _table(device)
    cost = cost_model(graph, table)
    cases: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {"dense": (dict(graph.dense_widths), ())}
    cases |= {case: (widths, ()) for case, widths in _all_random(graph, row).items()}
    cases |= _chosen(cost, graph, model)
    found: Row = {}
    for case, (widths, dropped) in cases.items():
        ours = cost.predict(widths, dropped)
        gone = cost.vanishing(dropped)
        kernels = [unit.kernel(widths) for unit in cost.units if unit.name not in gone]
        found[case] = {
            "widths": widths,
            "dropped": list(dropped),
            "us": ours.us,
            "error_us": ours.error_us,
            "isolated_us": _isolated(cost, table, kernels, widths, gone),
            "macs": sum(kernel.macs for kernel in kernels),
        }
    return {"cases": found, "compute_us": table.references_us[COMPUTE], "networks": cost.networks}


def table_only(name: str, device_name: str, work: Path, row: Row) -> Row:
    """What the table says without the networks of this structure: its kernels, and what the others teach."""
    model, inputs = build(name)
    graph = trace(model, inputs)
    table = _table(ep.load_device(device_name))
    others = tuple(n for n in table.networks if n.structure != graph.structure_hash)
    cost = cost_model(graph, replace(table, networks=others))
    found: Row = {}
    for case, predicted in row["predict"]["cases"].items():
        alone = cost.predict(predicted["widths"], predicted["dropped"])
        found[case] = {"us": alone.us, "error_us": alone.error_us}
    return {"cases": found, "compute_us": table.references_us[COMPUTE], "networks": len(others)}


def _all_random(graph: ModelGraph, row: Row) -> dict[str, dict[str, int]]:
    return {f"random {number}": _random(graph, row["first_seed"] + number) for number in range(RANDOM)}


def _random(graph: ModelGraph, seed: int) -> dict[str, int]:
    """Every group uniform in 0.25 to 1.0 of its channels; on multiples of 8 where the seed is odd."""
    rng = np.random.default_rng(seed)
    widths = {}
    for group in sorted(graph.groups, key=lambda group: group.id):
        width = rng.uniform(0.25, 1.0) * group.num_channels
        step = 8 if seed % 2 and group.num_channels >= 32 else 1
        rounded = min(group.num_channels, max(step, round(width / step) * step))
        widths[group.id] = max(rounded, group.least_channels)
    return widths


def _chosen(cost: CostModel, graph: ModelGraph, model: Any) -> dict[str, tuple[dict[str, int], tuple[str, ...]]]:
    saliency = score("l2", graph, model, None)
    dense = cost.predict({}).us
    found = {}
    for share in BUDGETS:
        target = parse_budget(f"{share}x").limit_ms(dense / 1e3, batch=1) * 1e3
        try:
            choice = choose(cost, saliency, target)
        except BudgetError:
            continue
        found[f"solver {share}x"] = (dict(choice.widths), choice.dropped)
    return found


def _isolated(
    cost: CostModel, table: LatencyTable, kernels: list[Any], widths: dict[str, int], gone: frozenset[str]
) -> float:
    """The plain sum: each kernel timed alone, end to end; by the surface times what running it end to end adds."""
    total = 0.0
    for unit in cost.units:
        if unit.name in gone:
            continue
        key = shape_key(unit.dense)
        around = [e.ratio / e.best_ratio for e in table if shape_key(e.kernel) == key and e.best_ratio]
        us = float(cost.surfaces[key].at([unit.sizes(widths)])[0])
        total += us * (float(np.median(around)) if around else 1.0)
    return total


def measure(name: str, device_name: str, work: Path, row: Row) -> Row:
    """Every case beside the dense network and the networks of the calibration, in `PASSES` processes.

    The calibration's networks are what drift is seen by: `anchors` holds their ratios in the table and in each pass.
    """
    device = ep.load_device(device_name)
    source, cost = _source_and_cost(name, device)
    plans = {
        case: Cut(widths=found["widths"], dropped=tuple(found["dropped"])).plan(source.graph)
        for case, found in row["predict"]["cases"].items()
    }
    table = _table(device)
    tabled = {}
    for number, cut in enumerate(calibration_cuts(cost)):
        kernels = cut.kernels(cost)
        tabled[f"anchor {number}"] = next(n.ratio for n in table.networks if n.kernels == kernels)
        plans[f"anchor {number}"] = cut.plan(source.graph)
    return {"passes": measure_plans(plans, source, device, _engines(work, name)), "anchors": tabled}


def measure_plans(plans: Mapping[str, Plan], source: Source, device: Device, folder: Path) -> list[Row]:
    """The networks of the plans, one of them `dense`, in `PASSES` processes; their engines are kept in `folder`."""
    paths = {case: _engine(plan, source, device, folder) for case, plan in plans.items()}
    passes: list[Row] = []
    number = -1
    while len(passes) < PASSES:
        number += 1
        with (
            tempfile.TemporaryDirectory() as scratch,
            open_session(device, precision=device.precisions[0]) as session,
        ):
            references = load_references(session, device, device.precisions[0], Path(scratch))
            for place in np.random.default_rng(number).permutation(len(paths)):
                session.load(list(paths)[place], list(paths.values())[place])
            measured = session.measure(list(paths), references, timing=TIMING, seed=number)
            without = measured.disturbed()
            if len(without) == len(measured.rounds[COMPUTE]):
                if number >= 2 * PASSES:
                    raise SystemExit(f"every round of {number + 1} passes was disturbed: a calmer machine is needed")
                continue
            passes.append(
                {
                    "disturbed": len(without),
                    "rounds": len(measured.rounds[COMPUTE]),
                    "cases": {case: _ratios(measured, case, without) for case in paths},
                }
            )
    return passes


def _ratios(measured: Any, case: str, without: frozenset[int]) -> Row:
    to_compute = measured.ratio(case, COMPUTE, without)
    to_dense = measured.ratio(case, "dense", without)
    return {
        "ratio": to_compute.value,
        "ci": [to_compute.low, to_compute.high],
        "to_dense": to_dense.value,
        "to_dense_ci": [to_dense.low, to_dense.high],
        "us": float(np.median(list(measured.bursts_us(case).values()))),
    }


def _engine(plan: Plan, source: Source, device: Device, folder: Path) -> Path:
    """The engine of a plan, made once; the runtimes that read ONNX share it."""
    text = json.dumps([{k: len(v) for k, v in sorted(plan.kept.items())}, sorted(plan.dropped)])
    kind = "onnx" if device.backend in ("openvino", "onnxruntime") else device.backend
    out = folder / kind / hashlib.sha256(text.encode()).hexdigest()[:16]
    files = {"openvino": "model.xml", "onnxruntime": "model.onnx"}
    known = out / files.get(device.backend, "model.tflite")
    if not known.is_file():
        maker = ep.load_device("host-openvino") if kind == "onnx" else device
        export(apply(plan, source.model, source.example_inputs, graph=source.graph), maker, out)
    return known
