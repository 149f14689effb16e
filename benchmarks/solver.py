"""The solver on problems of the size of real networks, beside plain HiGHS in the same run.

    python -m benchmarks.solver                        # everything; writes benchmarks/results/solver_<date>.md
    python -m benchmarks.solver resnet50 chain-1000    # these cases anew, the report of today with all there are

Every solution comes out of a process of its own, whose largest memory is that of the report. *Plain* is
`scipy.optimize.milp` on the linearised pairwise model with no reduction of any kind (`benchmarks.solver_plain`), under
a limit of 120 s and 12 GB. Seconds are those of solving, without making the problem.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import scipy

from benchmarks.solver_problems import LATENCY, chain, network_problem, recorded
from edgeprune.solve import Problem, front, solve

RESULTS = Path(__file__).parent / "results"
LIMIT_S = 120.0
GRACE_S = 60.0
MEMORY_GB = 12
FRONT = tuple(share / 100 for share in range(95, 20, -5))
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """gap and seconds are what must be reached; `shares` of the dense cost are solved in turn.

    beside: plain HiGHS solves the first of them too.
    """

    name: str
    build: Callable[..., Problem]
    gap: float
    seconds: float | None = None
    shares: tuple[float, ...] = (0.5, 0.3, 0.7, 0.9)
    beside: bool = True


CASES = (
    Case(name="resnet50", build=partial(network_problem, "resnet50", step=8), gap=1e-4, seconds=2.0),
    Case(
        name="resnet50-l2",
        build=partial(recorded, "resnet50_l2"),
        gap=1e-4,
        seconds=2.0,
        shares=(0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8),
    ),
    Case(name="resnet101", build=partial(network_problem, "resnet101", step=8), gap=1e-4, seconds=5.0),
    Case(
        name="resnet50-two-budgets",
        build=partial(network_problem, "resnet50", step=8, parameters=0.4),
        gap=5e-4,
        seconds=10.0,
    ),
    Case(name="chain-1000", build=partial(chain, 1000, 64), gap=1e-3, seconds=10.0, shares=(0.4, 0.2, 0.6)),
    Case(name="resnet50-1-channel", build=partial(network_problem, "resnet50", step=1), gap=1e-3, seconds=30.0),
    Case(
        name="resnet50-whole",
        build=partial(network_problem, "resnet50", step=8, whole=True),
        gap=1e-4,
        seconds=2.0,
        beside=False,
    ),
    Case(
        name="resnet50-1-channel-whole",
        build=partial(network_problem, "resnet50", step=1, whole=True),
        gap=1e-3,
        seconds=30.0,
        beside=False,
    ),
    *(
        Case(name=f"chain-{n}", build=partial(chain, n, 64), gap=1e-3, shares=(0.4,), beside=False)
        for n in (125, 250, 500, 2000, 4000)
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases; all unless told")
    parser.add_argument("--ours", action="store_true", help="without plain HiGHS")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # marks the child: NAME SHARE HOW
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measured(*options.one.split())))
        return 0
    today = datetime.date.today().isoformat()
    path = RESULTS / f"solver_{today}.jsonl"
    rows = {_key(row): row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    for case in CASES:
        if options.names and case.name not in options.names:
            continue
        jobs = [(share, "ours") for share in case.shares]
        jobs += [(case.shares[0], "plain")] * (case.beside and not options.ours)
        for share, how in jobs:
            row = _in_child(case, share, how)
            rows[_key(row)] = row
            print(json.dumps(row), flush=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    if not options.names or "front" in options.names:
        row = _front()
        rows[_key(row)] = row
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    report = path.with_suffix(".md")
    report.write_text(_report(list(rows.values()), today))
    print(report)
    return 0


def _front() -> Row:
    """Many budgets of one network, each from what the ones before have met, and each alone."""
    problem = network_problem("resnet50", step=8, share=1.0)
    dense = problem.budgets[LATENCY]
    together = front(problem, [{LATENCY: share * dense} for share in FRONT])
    alone = [solve(network_problem("resnet50", step=8, share=share)) for share in FRONT]
    return {
        "case": "front",
        "share": 0.0,
        "how": "ours",
        "points": len(FRONT),
        "together_s": [solution.seconds for solution in together],
        "alone_s": [solution.seconds for solution in alone],
        "most_gap": max(solution.gap for solution in together),
    }


def _key(row: Row) -> tuple[str, float, str]:
    return row["case"], row["share"], row["how"]


def _in_child(case: Case, share: float, how: str) -> Row:
    """The row; where the child runs out of time or memory, a row that says so."""
    command = [sys.executable, "-m", "benchmarks.solver", "--one", f"{case.name} {share} {how}"]
    row: Row = {"case": case.name, "share": share, "how": how}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(command, stdout=out, stderr=err) as child:
            deadline, most_gb = time.monotonic() + LIMIT_S + GRACE_S, 0.0
            while child.poll() is None and time.monotonic() < deadline:
                most_gb = max(most_gb, _largest_gb(child.pid))
                time.sleep(0.2)
            late = child.poll() is None
            child.kill()
        if late:
            return {**row, "gb": most_gb, "said": f"no answer when killed after {LIMIT_S + GRACE_S:.0f} s"}
        out.seek(0)
        err.seek(0)
        lines, complaint = out.read().strip().splitlines(), err.read()
    if child.returncode or not lines or not lines[-1].startswith("{"):
        memory = child.returncode == -9 or "MemoryError" in complaint or "bad_alloc" in complaint
        why = f"out of memory ({MEMORY_GB} GB)" if memory else f"ended with {child.returncode}: {complaint[-200:]}"
        return {**row, "gb": most_gb, "said": why}
    return {**row, **json.loads(lines[-1])}


def _largest_gb(pid: int) -> float:
    """Largest resident memory so far, of the process alone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), default=0.0)


def _measured(name: str, share: str, how: str) -> Row:
    """The child's side."""
    import resource

    case = next(case for case in CASES if case.name == name)
    problem = case.build(share=float(share))
    sizes = {
        "variables": len(problem.variables),
        "pairs": sum(len(factor.variables) == 2 for factor in problem.factors),
        "most_options": max(problem.variables.values()),
        "columns": sum(problem.variables.values()) + sum(f.value.size for f in problem.factors if f.value.ndim > 1),
    }
    if how == "plain":
        from benchmarks.solver_plain import plain

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GB << 30, MEMORY_GB << 30))
        answer = plain(problem, gap=case.gap, limit_s=LIMIT_S)
        del answer["choice"]
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        solution = solve(problem, gap=case.gap)
        answer = {
            "seconds": solution.seconds,
            "gap": solution.gap,
            "value": solution.value,
            "bound": solution.upper_bound,
            "said": solution.status,
            "problem_gb": before / 2**20,
        }
    memory = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {**sizes, **answer, "gb": sum(memory)}


def _report(rows: list[Row], today: str) -> str:
    lines = [
        f"# The solver beside plain HiGHS, {today}",
        "",
        f"`python -m benchmarks.solver` on {platform.machine()}, one thread; Python {platform.python_version()}, "
        f"numpy {numpy.__version__}, scipy {scipy.__version__}.",
        "Plain HiGHS: `scipy.optimize.milp` on the linearised pairwise model, nothing taken out before; it is given",
        f"the same gap, {LIMIT_S:.0f} s and {MEMORY_GB} GB. Gaps of both are over the same range (docs/solver.md).",
        "Costs: see `benchmarks/solver_problems.py`; *whole* offers widths below an eighth of the channels too, which",
        "were not measured: the surfaces extrapolate there. Memory is the largest resident one, with that of a child",
        "process, the problem's own tables and the libraries included.",
        "",
        "| problem | share of dense | columns | ours: gap | s | GB | must | plain: gap | s | GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {(row["case"], row["share"]): row for row in rows if row["how"] == "plain"}
    for case in CASES:
        for row in sorted((r for r in rows if r["case"] == case.name and r["how"] == "ours"), key=lambda r: r["share"]):
            lines.append(_line(case, row, plain.get((case.name, row["share"]))))
    return "\n".join([*lines, "", *_growth(rows), *_fronts(rows)])


def _fronts(rows: list[Row]) -> list[str]:
    return [
        line
        for row in rows
        if row["case"] == "front"
        for line in (
            "## A front",
            "",
            f"{row['points']} budgets of resnet50, largest gap {row['most_gap']:.4%}: {sum(row['together_s']):.2f} s "
            f"with `front`, {sum(row['alone_s']):.2f} s each alone.",
            "",
        )
    ]


def _line(case: Case, row: Row, plain: Row | None) -> str:
    if "gap" not in row:
        return f"| {case.name} | {row['share']} | | {row['said']} | | | | | | |"
    must = "" if case.seconds is None else f"{case.gap:.2%} in {case.seconds:g} s"
    if case.seconds is not None:
        must += " met" if row["gap"] <= case.gap and row["seconds"] <= case.seconds else " **missed**"
    theirs = " | | "
    if plain is not None:
        gap = plain["said"] if plain.get("value") is None else f"{_plain_gap(row, plain):.3%} ({plain['said']})"
        seconds, memory = plain.get("seconds", LIMIT_S + GRACE_S), plain.get("gb")
        theirs = f"{gap} | | " if memory is None else f"{gap} | {seconds:.1f} | {memory:.1f}"
    return (
        f"| {case.name}: {row['variables']} variables, {row['pairs']} pairs, up to {row['most_options']} options "
        f"| {row['share']} | {row['columns']:,} | {row['gap']:.4%} | {row['seconds']:.2f} | {row['gb']:.2f} "
        f"| {must} | {theirs} |"
    )


def _plain_gap(ours: Row, plain: Row) -> float:
    """Its own bound minus its own value, over the range that our gap is over."""
    own = ours["bound"] - ours["value"]
    unit = own / ours["gap"] if ours["gap"] > 0 else None
    if unit is None:
        return float("nan") if plain["bound"] > plain["value"] else 0.0
    return float((plain["bound"] - plain["value"]) / unit)


def _growth(rows: list[Row]) -> list[str]:
    found = sorted(
        (row["variables"], row["seconds"], row["gap"])
        for row in rows
        if row["how"] == "ours" and row["case"].startswith("chain") and row["share"] == 0.4 and "gap" in row
    )
    lines = [
        "## Growth: a chain of variables with 64 options",
        "",
        "| variables | s | s per 1,000 | gap |",
        "|---|---|---|---|",
    ]
    return [*lines, *(f"| {n} | {s:.2f} | {1000 * s / n:.2f} | {gap:.3%} |" for n, s, gap in found), ""]


if __name__ == "__main__":
    sys.exit(main())
