"""Do two independent profiles of one model tell the same latencies?

    python -m benchmarks.repeatability [--device host-openvino]... [--network mobilenet_v2]

Each profile is a process of its own on an empty table (`edgeprune profile`). Compared are the ratios to the reference
kernel, which cancel the machine's drift, kernel by kernel, and the microseconds as they were, which do not. Writes
benchmarks/results/repeatability_<date>.md. Exit code 1 where the median difference of ratios is above 3 %.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.conditions import conditions
from edgeprune.table import LatencyTable, read_table

MOST_DIFFERENCE = 0.03
RESULTS = Path(__file__).parent / "results"


def profiled(device: str, network: str, cache: Path) -> tuple[LatencyTable, float]:
    """A table measured in a child process, and the seconds that took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "edgeprune", "profile", f"torchvision:{network}", "--device", device]
    subprocess.run(
        command,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "EDGEPRUNE_SHIPPED_TABLES": str(cache)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (path,) = cache.rglob("*.jsonl")
    return read_table(path), time.perf_counter() - started


def compare(first: LatencyTable, second: LatencyTable) -> tuple[list[str], float]:
    """Lines of a table of differences, and the median one of the ratios that predictions are made of."""
    both = sorted(first.entries.keys() & second.entries.keys())
    lines = []
    medians = []
    for label, node, in_us in (
        ("compute node, ratio to the reference", True, False),
        ("end to end, ratio to the reference", False, False),
        ("end to end, us as measured", False, True),
    ):
        a, b = (
            np.array([table.entries[k].best_ratio if node else table.entries[k].ratio for k in both])
            * (table.references_us["compute"] if in_us else 1.0)
            for table in (first, second)
        )
        told = (a > 0) & (b > 0)
        change = b[told] / a[told] - 1
        sizes = np.abs(change)
        medians.append(float(np.median(sizes)))
        ninth, bias = np.quantile(sizes, 0.9), np.median(change)
        lines.append(f"| {label} | {len(change)} | {medians[-1]:.1%} | {ninth:.1%} | {bias:+.1%} |")
    return lines, medians[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="append", default=[])
    parser.add_argument("--network", default="mobilenet_v2")
    options = parser.parse_args()
    parts = [f"# Two profiles of {options.network}, {date.today()}", ""]
    parts += [f"`{' '.join(['python -m benchmarks.repeatability', *sys.argv[1:]])}`, {conditions()}.", ""]
    worst = 0.0
    for device in options.device or ["host-openvino"]:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            (first, took), (second, again) = (profiled(device, options.network, Path(cache)) for cache in (one, two))
        lines, difference = compare(first, second)
        worst = max(worst, difference)
        parts += [
            f"## {device}",
            "",
            f"{len(first)} and {len(second)} kernels in {took:.0f} and {again:.0f} s.",
            "",
            "| quantity | kernels in both | median difference | 90th percentile | bias |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
        print("\n".join(parts[-7 - len(lines) :]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"repeatability_{date.today()}.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    print(path)
    return int(worst > MOST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
