"""What each saliency is worth, as tables: one line for each criterion, medians over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from statistics import median
from typing import Any

from edgeprune.saliency import CRITERIA

Row = dict[str, Any]
HEADER = (
    "| criterion | data | repaired | seeds | as cut | measured | predicted | blocks dropped | score, s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
LEGEND = """\
*repaired*, *as cut*: accuracy on the 10,000 test pictures with the label-free repair and without it, medians over the
seeds; *seeds*: each seed's repaired accuracy. A seed draws the pictures, and what a criterion draws itself (`random`'s
values; the probes of `hessian`; the directions of `taylor`, `fisher`, `block_taylor` and what starts from them; the
rows of `thinet` and `reconstruction`). The plans of criteria that need no data, `random` apart, don't depend on it:
only their repair does. *measured*, *predicted*: latency over dense, medians; plans are chosen by the prediction.
*score, s*: processor seconds of one thread for the values alone. `only blocks`: under `--only blocks`; else these
criteria value channels by their blocks (docs/criteria.md)."""


def report(rows: Sequence[Row], network: str, conditions: Sequence[str]) -> str:
    """The document: `conditions` are lines on how it was made; `rows` those of `benchmarks.criteria`, with ratios."""
    lines = [f"# What each saliency is worth: {network}, CIFAR-10, without training, {date.today()}", "", *conditions]
    lines += ["", LEGEND]
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        lines += ["", f"## {budget:g}x", "", HEADER]
        parts = _by_run(row for row in rows if row["budget"] == budget).values()
        reached = [[row for row in part if "error" not in row] for part in parts]
        lines += [_line(part) for part in sorted(filter(None, reached), key=lambda part: -middle(part, "repaired"))]
        failed = [part for part in parts if all("error" in row for row in part)]
        lines += [f"| {_name(part[0])} | {_need(part[0])} | {part[0]['error']} | | | | | | |" for part in failed]
    return "\n".join(lines) + "\n"


def _by_run(rows: Iterable[Row]) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(_name(row), []).append(row)
    return parts


def middle(rows: Sequence[Row], key: str) -> float:
    """The median over the seeds."""
    return float(median(row[key] for row in rows))


def _line(rows: Sequence[Row]) -> str:
    seeds = ", ".join(f"{row['repaired']:.2%}" for row in sorted(rows, key=lambda row: row["seed"]))
    dropped = sorted({row["dropped"] for row in rows})
    return (
        f"| {_name(rows[0])} | {_need(rows[0])} | {middle(rows, 'repaired'):.2%} | {seeds} | {middle(rows, 'cut'):.2%} "
        f"| {middle(rows, 'ratio'):.3f}x | {middle(rows, 'predicted'):.3f}x | {', '.join(map(str, dropped))} "
        f"| {middle(rows, 'seconds'):.1f} |"
    )


def _name(row: Row) -> str:
    only = f", only {row['only']}" if row["only"] else ""
    return f"`{row['criterion']}`{only}" + (f", `--normalise {row['normalise']}`" if row.get("normalise") else "")


def _need(row: Row) -> str:
    return CRITERIA[row["criterion"]].data
