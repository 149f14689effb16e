"""The table of `python -m benchmarks.formats`."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions

RESULTS = Path(__file__).parent.parent / "results"
HEADER = (
    "| network | runtime | arithmetic | weights | parity | dense ms | pruned ms | ratio (95 %) | time in it | MB "
    "| top-1 | agreement | rel. error |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)
Row = dict[str, Any]


def report(work: Path) -> Path:
    """Writes the page from what the stages found so far; gives its path."""
    found = {stage: _rows(work / f"{stage}.jsonl") for stage in ("prune", "export", "judge", "time")}
    lines = [
        f"# Formats and precisions, {date.today()}",
        "",
        "`python -m benchmarks.formats`: each network pruned once, to 0.7x of its latency by the prediction below, "
        "repaired, and exported in every form. *parity*: largest max|a - b| / max|b| to the pruned torch "
        "module. Latencies: one thread, batch 1, pruned beside dense of the same form, interleaved, two processes. "
        "*time in it*: share of the pruned engine's time that the runtime's listing has in that arithmetic. "
        "*MB*: what is deployed. Quality: of the pruned engine; agreement and relative error to dense in torch.",
        "",
        f"{conditions()}.",
        "",
    ]
    for row in found["prune"]:
        lines.append(
            f"- {row['network']}: {row['what']}; {row['predicted']:.3f}x on {row['plan_for']} by {row['origin']}; "
            f"{row['repair']}"
        )
    lines += ["", HEADER]
    judged, timed = _by_key(found["judge"]), _by_key(found["time"])
    for row in found["judge"]:
        if row["device"] == "torch":
            lines.append(f"| {row['network']} | torch, {row['weights']} | fp32 | fp32 | | | | | | | {_quality(row)} |")
    for row in found["export"]:
        key = _key(row)
        if "error" in row:
            lines.append(f"| {' | '.join(key)} | {row['error']} | | | | | | | | |")
        else:
            lines.append(_line(row, judged.get(key, {}), timed.get(key, {})))
    faults = [row for row in found["export"] if "parity_fault" in row]
    lines += ["", *(f"- MISS {row['network']} {row['device']}: {row['parity_fault']}" for row in faults)]
    lines += _within(judged)
    path = RESULTS / f"formats_{date.today()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _within(judged: dict[tuple[str, ...], Row]) -> list[str]:
    """Points that int8 loses to its fp32 pruned self."""
    lines = []
    for key, row in judged.items():
        network, device, precision, _ = key
        base = judged.get((network, "torch", "fp32", "pruned"), {}).get("top1")
        if precision == "int8" and base is not None and row.get("top1") is not None:
            points = 100 * (base - row["top1"])
            lines.append(
                f"- {network} on {device}: int8 loses {points:.2f} points to its fp32 pruned self (n={row['n']})"
            )
    return lines


def _line(row: Row, judged: Row, timed: Row) -> str:
    ms = "| | | "
    if timed:
        ran = timed.get("ran_in")
        share = f"{ran.get(row['precision'], 0.0):.0%}" if ran else ""
        latencies = f"{timed['dense_ms']:.3f} | {timed['pruned_ms']:.3f}"
        ms = f"{latencies} | {timed['ratio']:.3f} (≤ {timed['ratio_upper']:.3f}) | {share}"
    size = f"{row['pruned_bytes'] / 1e6:.2f} of {row['dense_bytes'] / 1e6:.2f}"
    return f"| {' | '.join(_key(row))} | {row['parity']:.2g} | {ms} | {size} | {_quality(judged)} |"


def _quality(row: Row) -> str:
    return " | ".join(
        "" if row.get(name) is None else form.format(row[name])
        for name, form in (("top1", "{:.2%}"), ("agreement", "{:.2%}"), ("relative_error", "{:.3g}"))
    )


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("network", "device", "precision", "weights"))


def _by_key(rows: list[Row]) -> dict[tuple[str, ...], Row]:
    return {_key(row): row for row in rows}


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
