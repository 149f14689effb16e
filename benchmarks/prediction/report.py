"""Errors of predictions against measurements, pooled and network by network, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.conditions import conditions
from benchmarks.prediction.networks import FIRST_SEED, RANDOM

Row = dict[str, Any]
WAYS = {"cost model": "us", "sum of isolated layers": "isolated_us", "MACs x constant": "macs"}


def errors(row: Row) -> list[Row]:
    """One entry a case: the error of every way, the noise floor, whether the stated interval held.

    *drift-cancelled*: predicted against measured, on the clock of the calibration's networks, which were timed again
    beside the cases (`drift`); *to dense*: predicted over predicted dense against measured over measured dense;
    *clock*: against the ratio to the reference kernel times its time in the table. Measured is the mean of the passes;
    noise is their second half against the first.
    """
    cases, measure = row["predict"]["cases"], row["measure"]
    passes = [p["cases"] for p in measure["passes"]]
    clock = row["predict"]["compute_us"]
    drifts = [drift(measure["anchors"], p) for p in passes]
    found = []
    for case, predicted in cases.items():
        ratios = [p[case]["ratio"] for p in passes]
        shares = [p[case]["to_dense"] for p in passes]
        still = [ratio / float(then(ratio)) for ratio, then in zip(ratios, drifts, strict=True)]
        us, share, ours = float(np.mean(ratios)) * clock, float(np.mean(shares)), float(np.mean(still)) * clock
        entry: Row = {"network": row["network"], "case": case, "share": share}
        entry["measured error"] = float(np.std(still, ddof=1) / len(still) ** 0.5 / np.mean(still))
        entry["noise"], entry["noise to dense"], entry["noise cancelled"] = map(_halves, (ratios, shares, still))
        for way, key in WAYS.items():
            entry[f"{way}, to dense"] = predicted[key] / cases["dense"][key] / share - 1
            entry[f"{way}, clock"] = predicted[key] / us - 1 if key != "macs" else float("nan")
            entry[f"{way}, cancelled"] = predicted[key] / ours - 1 if key != "macs" else float("nan")
        alone, then = row["table_only"]["cases"], row["table_only"]["compute_us"] / clock
        entry["table only, to dense"] = alone[case]["us"] / alone["dense"]["us"] / share - 1
        entry["table only, clock"] = alone[case]["us"] / (us * then) - 1
        entry["table only, cancelled"] = alone[case]["us"] / (ours * then) - 1
        entry["table only half width"] = alone[case]["error_us"] / alone[case]["us"]
        entry["table only held"] = abs(alone[case]["us"] - ours * then) <= alone[case]["error_us"]
        entry["half width"] = predicted["error_us"] / predicted["us"]
        entry["held"] = abs(predicted["us"] - ours) <= predicted["error_us"]
        found.append(entry)
    return found


def drift(tabled: Mapping[str, float], measured: Mapping[str, Row]) -> Callable[[float], float]:
    """What the machine of a pass makes of a network's ratio: today's over the table's, by its size.

    A machine whose caches others use as well slows small networks more than large ones and more than a reference
    kernel; a straight line in the logarithm through the calibration's networks says by how much.
    """
    sizes = np.log([measured[name]["ratio"] for name in tabled])
    moved = np.log([measured[name]["ratio"] / ratio for name, ratio in tabled.items()])
    slope, level = np.polyfit(sizes - sizes.mean(), moved, 1) if len(sizes) > 3 else (0.0, moved.mean())
    return lambda ratio: float(np.exp(level + slope * (np.log(ratio) - sizes.mean())))


def _halves(values: Sequence[float]) -> float:
    half = len(values) // 2
    return float(np.mean(values[half:]) / np.mean(values[:half])) - 1


def line(label: str, values: list[float]) -> str:
    """Median and 95th percentile of the size, median of the signed error."""
    sizes = np.abs(values)
    return f"| {label} | {median(sizes):.1%} | {np.quantile(sizes, 0.95):.1%} | {median(values):+.1%} | {len(values)} |"


def write(rows: list[Row], folder: Path) -> Path:
    """The report and the rows beside it; gives the report's path."""
    device = rows[0]["device"]
    entries = [entry for row in rows for entry in errors(row)]
    pruned = [e for e in entries if e["case"] != "dense"]
    chosen = [e for e in pruned if e["case"].startswith("solver")]
    random = [e for e in pruned if e["case"].startswith("random")]
    parts = [f"# Prediction on {device}, {date.today()}", "", _conditions(device), "", _seeds(rows), ""]
    parts += ["| all networks | median error | 95th percentile | bias | n |", "|---|---|---|---|---|"]
    for way in (*WAYS, "table only"):
        parts.append(line(f"{way}, ratio to dense", [e[f"{way}, to dense"] for e in pruned]))
        if way != "MACs x constant":
            parts.append(line(f"{way}, drift-cancelled", [e[f"{way}, cancelled"] for e in pruned]))
            parts.append(line(f"{way}, on the table's clock", [e[f"{way}, clock"] for e in pruned]))
    parts.append(line("noise: the same plan twice, drift-cancelled", [e["noise cancelled"] for e in pruned]))
    parts.append(line("noise: the same plan twice, ratio to dense", [e["noise to dense"] for e in pruned]))
    parts.append(line("noise: the same plan twice, on the table's clock", [e["noise"] for e in pruned]))
    for label, part in (("random widths", random), ("chosen by the solver", chosen)):
        for kind in ("cancelled", "to dense", "clock"):
            parts.append(line(f"cost model, {label}, {kind}", [e[f"cost model, {kind}"] for e in part]))
    unsure = [e["measured error"] for e in pruned]
    parts += ["", f"Standard error of what was measured, from its passes: median {median(unsure):.1%}, "]
    parts[-1] += f"95th percentile {np.quantile(unsure, 0.95):.1%}."
    parts += ["", "Intervals of 90 %:", ""]
    for way, prefix in (("cost model", ""), ("table only", "table only ")):
        held = float(np.mean([e[f"{prefix}held"] for e in pruned]))
        width = median(e[f"{prefix}half width"] for e in pruned)
        parts.append(f"- {way}: {held:.0%} of {len(pruned)} hold, median half-width {width:.1%}")
    parts += ["", _by_network(rows, pruned), "", _cost(rows), ""]
    path = folder / f"prediction_{device}_{date.today()}.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    data = path.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _by_network(rows: list[Row], entries: list[Row]) -> str:
    parts = [
        "| network | cost model, drift-cancelled: median | 95th percentile | to dense: median | 95th percentile "
        "| table only, drift-cancelled: median | 95th percentile | isolated, to dense | MACs, to dense "
        "| noise, drift-cancelled |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        own = [e for e in entries if e["network"] == row["network"]]
        cells = [row["network"]]
        for key in ("cost model, cancelled", "cost model, to dense", "table only, cancelled"):
            sizes = np.abs([e[key] for e in own])
            cells += [f"{median(sizes):.1%}", f"{np.quantile(sizes, 0.95):.1%}"]
        for key in ("sum of isolated layers, to dense", "MACs x constant, to dense", "noise cancelled"):
            cells.append(f"{median(np.abs([e[key] for e in own])):.1%}")
        parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts)


def _cost(rows: list[Row]) -> str:
    parts = [
        "| network, in this order on one table | kernels measured | of the full grid (step 8) | seconds for kernels | "
        "for engines of the calibration | for measuring these | together |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = row["kernels"]
        share = own["kernels"] / own["grid"]
        seconds = (own["seconds"], row["convert"]["calibration_seconds"], row["profile"]["seconds"])
        cells = [row["network"], str(own["kernels"]), f"{share:.0%} of {own['grid']}"]
        cells += [f"{value:.0f}" for value in (*seconds, sum(seconds))]
        parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts)


def _seeds(rows: list[Row]) -> str:
    first = sorted({row.get("first_seed", FIRST_SEED) for row in rows})
    ranges = " and ".join(f"{seed} to {seed + RANDOM - 1}" for seed in first)
    return f"Random widths: seeds {ranges}, {RANDOM} a network (even anywhere, odd on multiples of 8)."


def _conditions(device: str) -> str:
    made_with = f"{conditions()}, one thread, batch 1, fp32, random weights"
    return f"`python -m benchmarks.prediction --device {device}`: {made_with}."
