"""The Markdown table of the rows, with a summary of every zoo."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable
from datetime import date
from importlib import metadata
from statistics import median
from typing import Any

Row = dict[str, Any]

PACKAGES = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime")
LEAST_SHARE = 0.6
HEADER = (
    "| model | status | runs | exact | plans | largest error | least control | ONNX | groups | blocks | MACs "
    "| parameters | refusals | export s | trace s | apply s | all s |\n" + "|---" * 17 + "|"
)
LEGEND = (
    "*runs, exact, ONNX*: the three gates. *plans*: random plans in float64. "
    "*largest error, least control*: max |a - b| / max |b| in float64 over the "
    "plans, and of the negative control. *MACs, parameters*: prunable share. Seconds are of float32; *all* holds the "
    "gates, too. One thread."
)


def versions() -> str:
    """The packages and the machine that the numbers belong to."""
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    return f"{', '.join(found)}; Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores."


def number(value: Any, form: str) -> str:
    """The formatted value; nothing where there is none."""
    return "" if value is None else f"{value:{form}}"


def line(row: Row) -> str:
    """A model's line."""
    gates = {True: "yes", False: "NO", None: ""}
    seconds = row.get("seconds", {})
    cells = [
        row["model"],
        row["status"],
        *(gates[row["gates"].get("1")], gates[row["gates"].get("2")]),
        number(len(row["errors"]) if row.get("errors") else None, "d"),
        number(max(row.get("errors") or [None], key=lambda x: x or 0), ".0e"),
        number(min(row.get("controls") or [None], key=lambda x: x or 0), ".0e"),
        gates[row["gates"].get("3")],
        *(number(row.get(key), "d") for key in ("groups", "blocks")),
        *(number(row.get(key), ".0%") for key in ("macs_share", "params_share")),
        number(row.get("refusals"), "d"),
        *(number(seconds.get(key), ".2f") for key in ("export", "trace", "apply")),
        number(row.get("wall_seconds"), ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def summary(zoo: str, rows: list[Row]) -> str:
    """How many of a zoo pass, its medians, and what the issue's limits say."""
    counts = Counter(row["status"] for row in rows)
    wrong = [r["model"] for r in rows if r["gates"].get("1") and r["gates"].get("2") is False]
    low = [r["model"] for r in rows if r.get("macs_share", 1.0) < LEAST_SHARE]
    told = [f"- **{zoo}**: {counts['passed']} of {len(rows)} passed"]
    told += [f"{many} {status}" for status, many in sorted(counts.items()) if status != "passed"]
    for key in ("export", "trace", "apply"):
        if times := [row["seconds"][key] for row in rows if key in row.get("seconds", {})]:
            told.append(f"median {key} {median(times):.2f} s")
    shares = [
        (row["seconds"]["trace"] + row["seconds"]["apply"]) / row["seconds"]["export"]
        for row in rows
        if {"trace", "apply", "export"} <= row.get("seconds", {}).keys()
    ]
    if shares:
        told.append(f"median (trace + apply) / export {median(shares):.2f}")
    if times := [row["wall_seconds"] for row in rows if "wall_seconds" in row]:
        told.append(f"median of all {median(times):.0f} s")
    text = ", ".join(told) + "."
    text += f" Under {LEAST_SHARE:.0%} of MACs prunable: {', '.join(low) or 'none'}."
    return text + (f" **Runs but is not exact: {', '.join(wrong)}.**" if wrong else "")


def reasons(rows: Iterable[Row]) -> list[str]:
    """Failures and notes, then the first refusals, of every model that has some."""
    lines = []
    for row in rows:
        told = [*([row["error"]] if row.get("error") else []), *row.get("notes", [])]
        told += [f"refused: {reason}" for reason in row.get("reasons", [])[:3]]
        if told:
            lines.append(
                f"- {row['model']} ({row.get('refusals', 0)}): " + "; ".join(" ".join(t.split()) for t in told)
            )
    return lines


def table(rows: list[Row]) -> str:
    """The whole document."""
    zoos: dict[str, list[Row]] = {}
    for row in rows:
        zoos.setdefault(row["model"].partition(":")[0], []).append(row)
    parts = [f"# Coverage, {date.today()}", "", f"`python -m benchmarks.coverage`: {versions()}", "", LEGEND, ""]
    parts += [summary(zoo, some) for zoo, some in zoos.items()]
    parts += ["", HEADER, *(line(row) for row in rows), "", "## Failures, notes, first refusals", "", *reasons(rows)]
    return "\n".join(parts) + "\n"
