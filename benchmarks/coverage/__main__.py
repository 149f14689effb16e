"""Run the gates over the zoo, each model in a fork, and write the table.

A row is appended to benchmarks/results/coverage.jsonl as soon as its model is done; models that have one are skipped
unless --again is given. benchmarks/results/coverage_<date>.md is written from all rows at the end, and by --table.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from functools import partial
from pathlib import Path

import torch

from benchmarks.coverage import zoo
from benchmarks.coverage.gates import Row, in_fork, portable, preload, run_gates
from benchmarks.coverage.table import table

RESULTS = Path(__file__).resolve().parent.parent / "results"


def rows_of(path: Path) -> dict[str, Row]:
    """The last row of every model."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def short(row: Row) -> str:
    """One line for the terminal."""
    gates = " ".join(f"{gate}:{'ok' if held else 'NO'}" for gate, held in row["gates"].items())
    share = f"{row['macs_share']:.0%} of MACs" if "macs_share" in row else ""
    return (
        f"{row['model']:44} {row['status']:9} {gates:15} {share:12} {row['wall_seconds']:6.1f} s {row.get('error', '')}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="repeatable: timm:*, resnet")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--table", action="store_true", help="write the table of the rows so far and stop")
    parser.add_argument("--gates", default="123", choices=("1", "12", "13", "123"))
    parser.add_argument("--again", action="store_true", help="also models that have a row")
    parser.add_argument("--seconds-per-model", type=float, default=300.0)
    parser.add_argument("--results", type=Path, default=RESULTS / "coverage.jsonl", metavar="FILE")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    rows = rows_of(options.results)
    if not options.table:
        chosen = zoo.names(options.only)
        if options.list:
            print("\n".join(chosen))
            return 0
        options.results.parent.mkdir(exist_ok=True)
        torch.set_num_threads(1)  # a fork takes no threads along
        preload(chosen)
        for name in chosen:
            if name in rows and not options.again:
                continue
            work = partial(run_gates, name, options.gates)
            row = {"model": name, **in_fork(work, options.seconds_per_model)}
            rows[name] = row
            with options.results.open("a", encoding="utf-8") as file:
                file.write(portable(json.dumps(row)) + "\n")
            print(short(row), flush=True)
    path = options.results.parent / f"coverage_{date.today()}.md"
    path.write_text(portable(table(list(rows.values()))), encoding="utf-8")
    print(path)
    return 0 if all(row["status"] == "passed" for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
