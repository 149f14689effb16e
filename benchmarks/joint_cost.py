"""Where do networks land that were chosen with c_in frozen, and where with the cost of both widths?

    python -m benchmarks.joint_cost [--cache FOLDER] [--network NAME]... [--budget SHARE]... [--steps N]

Three costs for the same solver, budgets and values (`l2`), from one measured table (`FOLDER/edgeprune`, by default the
user's; nothing is profiled):

- *joint*: each unit's latency over its widths before and behind it, in one shot;
- *frozen*: over its width behind alone, c_in held at the dense width, in one shot;
- *frozen, N steps*: the budget falls exponentially, and c_in is held where the last step left it.

Every network is exported and measured beside the dense one, interleaved, in two processes. Writes
benchmarks/results/joint_cost_<device>_<date>.{md,jsonl}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("resnet50", "mobilenet_v2")
BUDGETS = (0.5, 0.3, 0.1)
STEPS = 30
DENSE = "dense"
HEADER = (
    "| network | budget | cost | stated | joint model says | measured, each pass | to budget | value kept | dropped "
    "| seconds |\n|---|---|---|---|---|---|---|---|---|---|"
)


def frozen(cost: Any, widths: Mapping[str, int]) -> Any:
    """The cost model with every dense contraction's c_in held at these widths; depthwise ones have one width only."""
    from edgeprune.graph import Width

    units = [
        replace(unit, c_in=Width(fixed=unit.c_in.at(widths)))
        if unit.dense.operator in ("conv", "linear") and unit.dense.groups == 1
        else unit
        for unit in cost.units
    ]
    return replace(cost, units=tuple(units))


def in_steps(cost: Any, saliency: Any, target_us: float, steps: int) -> Any:
    """Frozen c_in, tabulated anew at every step; nothing grows back."""
    from edgeprune.choosing import Rules, choose
    from edgeprune.scheduling import Schedule

    schedule, rules, choice = Schedule(steps=steps), Rules(), None
    dense_us, widths = cost.predict({}).us, dict(cost.graph.dense_widths)
    for step in range(1, steps + 1):
        limit = schedule.limit(dense_us, target_us, step)
        choice = choose(frozen(cost, widths), saliency, limit, rules=rules)
        widths, rules = dict(choice.widths), Rules(after=choice.reached)
    return choice


def chosen(name: str, device: Any, budgets: list[float], steps: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The source of the engines and every case's network: what each cost states of it, and what it keeps."""
    from benchmarks.clocks import known_tables
    from benchmarks.prediction.networks import build
    from edgeprune.calibration import Source
    from edgeprune.choice import dense_choice
    from edgeprune.choosing import choose, least_choice
    from edgeprune.cost import cost_model
    from edgeprune.errors import BudgetError
    from edgeprune.graph import trace
    from edgeprune.saliency import score
    from edgeprune.table import read_table

    model, inputs = build(name)
    graph = trace(model, inputs)
    cost = cost_model(graph, read_table(known_tables(device), allow_other=True))
    saliency = score("l2", graph, model)
    dense = dense_choice(cost, saliency)
    floor = least_choice(cost, saliency).predicted_us
    cases: dict[str, dict[str, Any]] = {DENSE: {"choice": dense, "budget": 1.0, "cost": DENSE, "seconds": 0.0}}
    held = frozen(cost, graph.dense_widths)
    for share in budgets:
        target = share * dense.predicted_us
        ways: dict[str, Callable[[float], Any]] = {
            "joint": lambda t: choose(cost, saliency, t),
            "frozen": lambda t: choose(held, saliency, t),
            f"frozen, {steps} steps": lambda t: in_steps(cost, saliency, t, steps),
        }
        for way, solve in ways.items():
            started = time.perf_counter()
            case: dict[str, Any] = {"budget": share, "cost": way}
            try:
                case["choice"] = solve(max(target, 1.02 * floor))
                case["budget"] = max(share, 1.02 * floor / dense.predicted_us)
            except BudgetError as error:
                case["why"] = str(error)
            case["seconds"] = time.perf_counter() - started
            cases[f"{way} {share:g}x"] = case
    for case in cases.values():
        if "choice" in case:
            found = case.pop("choice")
            case |= {
                "widths": dict(found.widths),
                "dropped": list(found.dropped),
                "stated": found.predicted_us / dense.predicted_us,
                "joint": cost.predict(found.widths, found.dropped).us / dense.predicted_us,
                "value": kept_value(graph, saliency, found) / dense.solution.value,
            }
    return Source(model=model, graph=graph, example_inputs=inputs), cases


def kept_value(graph: Any, saliency: Any, choice: Any) -> float:
    """What the solver counts: the best channels of every width, and blocks beyond what is inside of them."""
    from edgeprune.variables import block_extras

    hidden = {g for block in graph.blocks if block.id in choice.dropped for g in block.inside}
    nodes = [block.nodes for block in graph.blocks if block.id in choice.dropped]
    gone = {block.id for block in graph.blocks if any(block.nodes <= own for own in nodes)}
    widths = {g: width for g, width in choice.widths.items() if g not in hidden}
    channels = sum(float(np.sort(saliency.channels[g])[::-1][:width].sum()) for g, width in widths.items())
    return channels + sum(extra for block, extra in block_extras(graph, saliency).items() if block not in gone)


def measure(source: Any, cases: dict[str, dict[str, Any]], device: Any, folder: Path) -> list[dict[str, Any]]:
    """Each network's share of dense, in two processes."""
    from benchmarks.prediction.stages import measure_plans
    from edgeprune.calibration import Cut

    plans = {
        name: Cut(widths=case["widths"], dropped=tuple(case["dropped"])).plan(source.graph)
        for name, case in cases.items()
        if "widths" in case
    }
    return measure_plans(plans, source, device, folder)


def line(network: str, name: str, case: dict[str, Any], passes: list[dict[str, Any]]) -> str:
    if "widths" not in case:
        return f"| {network} | {case['budget']:g}x | {case['cost']} | {case['why']} | | | | | | {case['seconds']:.1f} |"
    shares = [each["cases"][name]["to_dense"] for each in passes]
    return (
        f"| {network} | {case['budget']:.3g}x | {case['cost']} | {case['stated']:.3f}x | {case['joint']:.3f}x "
        f"| {', '.join(f'{share:.3f}x' for share in shares)} | {np.mean(shares) / case['budget'] - 1:+.1%} "
        f"| {case['value']:.1%} | {len(case['dropped'])} | {case['seconds']:.1f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joint_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="holds edgeprune/latency_tables; read only")
    parser.add_argument("--device", default="host-openvino")
    parser.add_argument("--network", action="append", default=[])
    parser.add_argument("--budget", action="append", type=float, default=[], metavar="SHARE")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if options.cache is not None:
        os.environ["EDGEPRUNE_CACHE_DIR"] = str(options.cache / "edgeprune")
    import edgeprune as ep
    from benchmarks.conditions import conditions

    device = ep.load_device(options.device)
    rows, lines = [], [f"# Joint cost against frozen c_in on {options.device}, {date.today()}", ""]
    lines += [f"`python -m benchmarks.joint_cost`; {conditions()}, one thread, batch 1, fp32, random weights.", ""]
    lines.append(HEADER)
    for network in options.network or NETWORKS:
        source, cases = chosen(network, device, options.budget or list(BUDGETS), options.steps)
        print(f"{network}: {len(cases)} networks chosen", flush=True)
        with tempfile.TemporaryDirectory(prefix="edgeprune-joint-cost-") as folder:
            passes = measure(source, cases, device, Path(folder))
        rows.append({"network": network, "device": options.device, "cases": cases, "passes": passes})
        lines += [line(network, name, case, passes) for name, case in cases.items() if name != DENSE]
        disturbed = ", ".join(f"{each['disturbed']} of {each['rounds']}" for each in passes)
        lines.append(f"| {network} | | disturbed rounds: {disturbed} | | | | | | | |")
        print("\n".join(lines[-len(cases) :]), flush=True)
    path = RESULTS / f"joint_cost_{options.device}_{date.today()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
