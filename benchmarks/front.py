"""The front of CIFAR ResNet-20: predicted beside measured, as a table and a plot.

    python -m benchmarks.front WEIGHTS [--device host-openvino] [--pareto 0.3x:0.9x:7] [--saliency l2] [--plot FILE.png]

One preparation (the table is the user's own, or that of --cache), one solve a point, each started from its neighbour;
then every network is exported and measured beside the dense one, interleaved, in two processes. Writes
benchmarks/results/front_resnet20_<device>_<date>.{md,jsonl} and docs/front_resnet20.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent
HEADER = (
    "| budget | predicted | measured, each pass | error | value kept | gap | dropped | solve s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def measured(task: Any, prepared: Any, points: Any, folder: Path) -> list[dict[str, Any]]:
    """Every point's network and the dense one, in two processes."""
    from benchmarks.prediction.stages import measure_plans
    from edgeprune.calibration import Source
    from edgeprune.plan_json import Plan

    plans = {"dense": Plan(structure_hash=prepared.graph.structure_hash)}
    plans |= {f"{point.ratio:g}x": point.plan for point in points if point.plan is not None}
    source = Source(model=task.model, graph=prepared.graph, example_inputs=task.example_inputs)
    return measure_plans(plans, source, task.device, folder)


def rows_of(points: Any, passes: list[dict[str, Any]], dense_us: float, dense_value: float) -> list[dict[str, Any]]:
    """Shares of dense, predicted and measured."""
    found = []
    for point in points:
        if point.choice is None:
            continue
        own = [each["cases"][f"{point.ratio:g}x"] for each in passes]
        found.append(
            {
                "ratio": point.ratio,
                "predicted": point.choice.predicted_us / dense_us,
                "half_width": point.choice.error_us / dense_us,
                "measured": [each["to_dense"] for each in own],
                "ci": [each["to_dense_ci"] for each in own],
                "value": point.choice.solution.value / dense_value,
                "gap": point.choice.gap,
                "dropped": list(point.choice.dropped),
                "seconds": point.choice.solution.seconds,
            }
        )
    return found


def draw(rows: list[dict[str, Any]], title: str) -> bytes:
    """A PNG: the value kept against the share of the dense latency, predicted with its interval and measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    values = [row["value"] for row in rows]
    axes.errorbar(
        [row["predicted"] for row in rows],
        values,
        xerr=[row["half_width"] for row in rows],
        fmt="o-",
        color="#1f4e79",
        capsize=3,
        label="predicted, 90 % interval",
    )
    for number, marker in enumerate("x+"):
        shares = [row["measured"][number] for row in rows]
        axes.plot(shares, values, marker, color="#c0392b", markersize=8, label=f"measured, pass {number + 1}")
    axes.set_xlabel("latency, share of the dense network's")
    axes.set_ylabel("value kept, share of the dense network's")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("weights", type=Path, help="resnet20-12fca82f.th")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="of the latency tables")
    parser.add_argument("--device", default="host-openvino")
    parser.add_argument("--pareto", default="0.3x:0.9x:7")
    parser.add_argument("--saliency", default="l2")
    parser.add_argument("--plot", type=Path, default=ROOT.parent / "docs" / "front_resnet20.png")
    options = parser.parse_args()
    if options.cache is not None:
        os.environ["EDGEPRUNE_CACHE_DIR"] = str(options.cache / "edgeprune")
    import torch

    import edgeprune as ep
    from benchmarks import cifar
    from benchmarks.conditions import conditions
    from edgeprune.choice import dense_choice
    from edgeprune.front import front, parse_front
    from edgeprune.preparing import Task, prepare

    model = cifar.trained(options.weights)
    inputs = (torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(0)),)
    device = ep.load_device(options.device)
    task = Task(model=model, name="resnet20", example_inputs=inputs, device=device, saliency=options.saliency)
    started = time.perf_counter()
    prepared = prepare(task)
    ready = time.perf_counter() - started
    points = front(task, prepared, parse_front(options.pareto), lambda p: print(p.to_json(), flush=True))
    solved = time.perf_counter() - started - ready
    with tempfile.TemporaryDirectory(prefix="edgeprune-front-") as folder:
        passes = measured(task, prepared, points, Path(folder))
    dense = dense_choice(prepared.cost, prepared.saliency)
    rows = rows_of(points, passes, dense.predicted_us, dense.solution.value)
    name = f"front_resnet20_{options.device}_{date.today()}"
    lines = [f"# The front of CIFAR ResNet-20 on {options.device}, {date.today()}", ""]
    lines += [f"`python -m benchmarks.front`, `{options.saliency}`; {conditions()}, one thread, batch 1, fp32, "]
    lines[-1] += f"weights of {options.weights.name}."
    lines += [f"Prepared in {ready:.0f} s, {len(points)} points solved in {solved:.1f} s. Dense: "]
    lines[-1] += ", ".join(f"{each['cases']['dense']['us'] / 1e3:.3f} ms" for each in passes)
    lines[-1] += "; disturbed rounds: " + ", ".join(f"{each['disturbed']} of {each['rounds']}" for each in passes)
    lines += ["", HEADER]
    for row in rows:
        shares = ", ".join(f"{share:.3f}x" for share in row["measured"])
        lines.append(
            f"| {row['ratio']:g}x | {row['predicted']:.3f}x ± {row['half_width']:.3f} | {shares} "
            f"| {row['predicted'] / np.mean(row['measured']) - 1:+.1%} | {row['value']:.1%} "
            f"| {'not proven' if row['gap'] is None else format(row['gap'], '.2%')} "
            f"| {len(row['dropped'])} | {row['seconds']:.2f} |"
        )
    lines += [f"| {point.ratio:g}x | {point.why} | | | | | | |" for point in points if point.choice is None]
    path = ROOT / "results" / f"{name}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options.plot.write_bytes(draw(rows, f"CIFAR ResNet-20 on {options.device}, `{options.saliency}`, {date.today()}"))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
