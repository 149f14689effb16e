"""How long do real selection problems take: measured costs, the widths that are offered, the values of real criteria?

    python -m benchmarks.solver_criteria [--cache FOLDER] [--network NAME]... [--saliency NAME]... [--budget SHARE]...
    python -m benchmarks.solver_criteria --record resnet50 l2     # writes benchmarks/problem_resnet50_l2.json

Latency tables are those of `FOLDER/edgeprune`, by default the user's; nothing is profiled, and a network that the
table does not hold is left out. Each choice is made alone. Behind a concatenation one takes several solutions; what it
reaches and whether that is proven stands beside it. Criteria of random weights tie channels as trained ones never do:
the values of a group are nearly a straight line, which is the hard case. Writes
benchmarks/results/solver_criteria_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
NETWORKS = ("resnet50", "resnet18", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "squeezenet1_1")
CRITERIA = ("l2", "l1", "bn_scale", "taylor")
BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
DIGITS = 7
HEADER = (
    "| network | saliency | budget | s | solving | gap | value kept | predicted |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One choice; gap is None where nothing is proven; value and predicted are shares of the dense network's.

    seconds: of the whole choice, tables included. solving_s: of all its solutions.
    """

    network: str
    saliency: str
    budget: float
    seconds: float
    solving_s: float
    gap: float | None
    value: float
    predicted: float
    is_exact: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="holds edgeprune/latency_tables; read only")
    parser.add_argument("--device", default="host-openvino")
    parser.add_argument("--network", action="append", default=[])
    parser.add_argument("--saliency", action="append", default=[])
    parser.add_argument("--budget", action="append", type=float, default=[], metavar="SHARE")
    parser.add_argument("--record", nargs=2, metavar=("NETWORK", "SALIENCY"), help="write that problem and end")
    options = parser.parse_args()
    if options.cache is not None:
        os.environ["EDGEPRUNE_CACHE_DIR"] = str(options.cache / "edgeprune")
    if options.record:
        network, name = options.record
        print(record(network, name, options.device))
        return 0
    criteria, budgets = options.saliency or list(CRITERIA), options.budget or list(BUDGETS)
    today = datetime.date.today().isoformat()
    lines = [f"# Selection problems of real criteria on {options.device}, {today}", ""]
    lines += [f"`python -m benchmarks.solver_criteria {' '.join(sys.argv[1:])}`".replace(" `", "`"), "", HEADER]
    rows: list[Row] = []
    for network in options.network or NETWORKS:
        for row in rows_of(network, criteria, budgets, options.device):
            rows.append(row)
            lines.append(line(row))
            print(lines[-1], flush=True)
    path = FOLDER / "results" / f"solver_criteria_{options.device}_{today}.md"
    path.write_text("\n".join([*lines, "", *summary(rows)]) + "\n", encoding="utf-8")
    print(path)
    return 0


def models_of(network: str, device_name: str) -> tuple[Any, Any, Any]:
    """(model, graph, cost model)."""
    import edgeprune as ep
    from benchmarks.clocks import known_tables
    from benchmarks.prediction.networks import build
    from edgeprune.cost import cost_model
    from edgeprune.graph import trace
    from edgeprune.table import read_table

    device = ep.load_device(device_name)
    model, inputs = build(network)
    graph = trace(model, inputs)
    return model, graph, cost_model(graph, read_table(known_tables(device), allow_other=True))


def rows_of(network: str, criteria: list[str], budgets: list[float], device: str) -> Iterator[Row]:
    from edgeprune.choice import dense_choice
    from edgeprune.choosing import choose
    from edgeprune.errors import BudgetError, InputError, TableError
    from edgeprune.saliency import score

    try:
        model, graph, cost = models_of(network, device)
    except TableError as error:
        print(f"{network}: {error}")
        return
    solving_s = timed_solver()
    for name in criteria:
        try:
            saliency = score(name, graph, model)
        except InputError as error:
            print(f"{network}: {error}")
            continue
        dense = dense_choice(cost, saliency)
        for budget in budgets:
            started = time.perf_counter()
            solving_s.clear()
            try:
                choice = choose(cost, saliency, budget * dense.predicted_us)
            except BudgetError as error:
                print(f"{network} at {budget:g}x: {error}")
                continue
            yield Row(
                network=network,
                saliency=name,
                budget=budget,
                seconds=time.perf_counter() - started,
                solving_s=sum(solving_s),
                gap=choice.gap,
                value=choice.solution.value / dense.solution.value,
                predicted=choice.predicted_us / dense.predicted_us,
                is_exact=choice.exact_cost,
            )


def timed_solver() -> list[float]:
    """A list that the seconds of every solution from here on are added to."""
    from edgeprune import choosing, climbing
    from edgeprune.solve import Problem, Solution, solve

    seconds: list[float] = []

    def timed(problem: Problem, *, start: Sequence[Mapping[str, int]] = ()) -> Solution:
        solution = solve(problem, start=start)
        seconds.append(solution.seconds)
        return solution

    for module in (choosing, climbing):
        setattr(module, "solve", timed)  # noqa: B010
    return seconds


def line(row: Row) -> str:
    gap = "nothing proven" if row.gap is None else f"{row.gap:.4%}" + ("" if row.is_exact else " to first order")
    return (
        f"| {row.network} | {row.saliency} | {row.budget:g}x | {row.seconds:.2f} | {row.solving_s:.2f} | {gap} "
        f"| {row.value:.2%} | {row.predicted:.4f}x |"
    )


def summary(rows: list[Row]) -> list[str]:
    """Quantiles of the seconds and the largest gap, without and with concatenations."""
    found = []
    for is_exact, words in ((True, "Without concatenations"), (False, "With concatenations")):
        own = [row for row in rows if row.is_exact is is_exact]
        if own:
            half, most, largest = np.quantile([row.solving_s for row in own], [0.5, 0.9, 1.0])
            gaps = [row.gap for row in own if row.gap is not None]
            worst = f"largest gap {max(gaps):.4%}" if gaps else "no gap"
            found.append(
                f"{words}: {len(own)} choices, solving: median {half:.2f} s, nine of ten within {most:.2f} s, the "
                f"slowest {largest:.2f} s; {worst}, {len(own) - len(gaps)} unproven."
            )
    return found


def record(network: str, name: str, device: str) -> Path:
    """The problem at the dense network's latency, numbers to seven digits, for `benchmarks.solver`."""
    from edgeprune.budget_rows import latency_row
    from edgeprune.choosing import Rules, selection_problem
    from edgeprune.saliency import score
    from edgeprune.solve import Factor, Problem

    model, graph, cost = models_of(network, device)
    dense = cost.predict({}).us
    row, variables = latency_row(cost, dense), Rules().variables(cost)
    point = {group: options[-1] for group, options in variables.options.items()}
    problem = selection_problem(graph, score(name, graph, model), (row,), {row.name: dense}, variables, point)
    short = [
        Factor(variables=f.variables, value=_short(f.value), cost={b: _short(c) for b, c in f.cost.items()})
        for f in problem.factors
    ]
    path = FOLDER / f"problem_{network}_{name}.json"
    Problem(variables=problem.variables, budgets={row.name: float(f"{dense:.{DIGITS}g}")}, factors=short).to_json(path)
    return path


def _short(table: Any) -> Any:
    return np.vectorize(lambda number: float(f"{number:.{DIGITS}g}"), otypes=[np.float64])(table)


if __name__ == "__main__":
    sys.exit(main())
