"""Seconds of analysis and surgery, beside `torch.export` alone and torch-pruning 1.6.1, in turn, round by round.

    python -m benchmarks.coverage.peers [--warm] [--only PATTERN] [--rounds 3] [--side 224] [--list] [--again]

*Ours* is trace, analysis and apply of a random plan that cuts every group by about a third (and drops no block, as the
peer drops none); *torch-pruning* is its MagnitudePruner (which builds its dependency graph) and one step by a third,
with the layers that give the model's output ignored. Both must run forwards afterwards. Each run is the first call in
a process of its own, as it is for who prunes a network, after `import torch, torchvision, edgeprune, torch_pruning`;
with `--warm`, calls are repeated in one process after an untimed one on a small network. Medians. A peer that takes
longer than five minutes is stopped. Writes benchmarks/results/coverage_speed_<date>.md (coverage_speed_warm_<date>.md).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.coverage import zoo
from benchmarks.coverage.__main__ import RESULTS, rows_of
from benchmarks.coverage.gates import Row, Save, export, first_line, in_child, in_fork, portable, quiet, saver, warm_up
from benchmarks.coverage.table import number, versions
from benchmarks.coverage.weights import Inputs, outputs_of
from edgeprune import apply
from edgeprune.graph import analyse, tracing
from tests.reference import random_plan

SHARE = 1 / 3
PEER_SECONDS = 300
WAYS = ("export", "ours", "torch-pruning")
LAYERS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)
HEADER = (
    "| model | export s | ours s | trace s | analysis s | apply s | torch-pruning s | it leaves of the parameters "
    "| analysis + apply / export | ours / export | ours / torch-pruning |\n" + "|---" * 11 + "|"
)


def ours(model: torch.nn.Module, inputs: Inputs) -> dict[str, float]:
    """Trace, analyse, then apply a random plan, copy and hash of the dense weights included; the choice of the plan is
    not timed."""
    started = time.perf_counter()
    program = tracing.trace_program(model, inputs)
    traced = time.perf_counter() - started
    graph = replace(analyse(program), model=model)
    analysed = time.perf_counter() - started - traced
    plan = random_plan(graph, 0, share=SHARE, drop=0.0)
    started = time.perf_counter()
    pruned = apply(plan, model, inputs, graph=graph)
    applied = time.perf_counter() - started
    with torch.no_grad():
        pruned.module(*inputs)
    surgery = analysed + applied
    return {
        "ours": traced + surgery,
        "trace": traced,
        "analysis": analysed,
        "apply": applied,
        "analysis + apply": surgery,
    }


def output_layers(model: torch.nn.Module, inputs: Inputs) -> list[torch.nn.Module]:
    """The layers whose output shares memory with the model's, and the one that ran last."""
    ran: list[tuple[torch.nn.Module, int]] = []

    def note(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        ran.append((module, output.untyped_storage().data_ptr()))
        held.append(output)

    held: list[torch.Tensor] = []  # kept alive, so that no address is used twice
    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, LAYERS)]
    with torch.no_grad():
        addresses = {y.untyped_storage().data_ptr() for y in outputs_of(model(*inputs))}
    for hook in hooks:
        hook.remove()
    found = [module for module, address in ran if address in addresses]
    return list(dict.fromkeys([*found, *(module for module, _ in ran[-1:])]))


def torch_pruning(model: torch.nn.Module, inputs: Inputs) -> dict[str, float]:
    """The peer on a copy of the model."""
    import torch_pruning as tp

    copied = copy.deepcopy(model)
    ignored = output_layers(copied, inputs)
    started = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        copied,
        inputs,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=SHARE,
        ignored_layers=ignored,
    )
    pruner.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        copied(*inputs)
    left = sum(p.numel() for p in copied.parameters()) / sum(p.numel() for p in model.parameters())
    return {"torch-pruning": seconds, "parameters left": left}


def exported(model: torch.nn.Module, inputs: Inputs) -> dict[str, float]:
    """`torch.export` alone."""
    started = time.perf_counter()
    export(model, inputs)
    return {"export": time.perf_counter() - started}


def cold(name: str, rounds: int) -> Row:
    """Rounds of the three on one model, each run in a fork of its own."""
    import torch_pruning  # noqa: F401

    row: Row = {"model": name, "samples": {}, "failures": {}}
    for turn in range(rounds):
        for way in WAYS:
            if way in row["failures"]:
                continue
            own = in_fork(partial(measure, name, 1, (way,)), PEER_SECONDS + 300)
            row["failures"].update(own.get("failures", {}))
            if way not in own.get("samples", {}):
                row["failures"].setdefault(way, own.get("error") or f"no result: {own.get('stage')}")
            row["stage"] = f"{way}, round {turn}"
            for key, values in own.get("samples", {}).items():
                row["samples"].setdefault(key, []).extend(values)
    return row


def measure(name: str, rounds: int, chosen: Sequence[str], save: Save) -> None:
    """Rounds of the chosen ways on one model, warmed up first where there are several rounds.

    A way that fails is told once and left out of the later rounds.
    """
    row: Row = {"model": name, "stage": "build", "samples": {}, "failures": {}}
    save(row)
    ways: dict[str, Callable[[torch.nn.Module, Inputs], dict[str, float]]]
    ways = dict(zip(WAYS, (exported, ours, torch_pruning), strict=True))

    def ring(*_: object) -> None:
        raise TimeoutError(f"stopped after {PEER_SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    with quiet():
        model, inputs = zoo.build(name)
        if rounds > 1:
            small = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).eval()
            warm_up()
            torch_pruning(small, (torch.randn(2, 4),))
        for turn in range(rounds):
            for way, work in ((way, ways[way]) for way in chosen):
                if way in row["failures"]:
                    continue
                row["stage"] = f"{way}, round {turn}"
                save(row)
                gc.collect()
                signal.alarm(PEER_SECONDS)
                try:
                    seconds = work(model, inputs)
                except Exception as error:  # any type, from any of the three
                    row["failures"][way] = first_line(error)
                    continue
                finally:
                    signal.alarm(0)
                for key, value in seconds.items():
                    row["samples"].setdefault(key, []).append(round(value, 4))
    row["stage"] = "end"
    save(row)


def medians(row: Row) -> dict[str, float]:
    """Of every sample; nothing of a way that failed in some round."""
    failed = row.get("failures", {})
    return {key: median(values) for key, values in row.get("samples", {}).items() if key not in failed}


def table(rows: list[Row], how: str) -> str:
    """Summary, one line a model, failures."""
    found = {row["model"]: medians(row) for row in rows}
    both = [m for m in found.values() if {"ours", "torch-pruning"} <= m.keys()]
    to_export = [m["ours"] / m["export"] for m in found.values() if {"ours", "export"} <= m.keys()]
    parts = [
        f"# Speed of analysis and surgery, {date.today()}",
        "",
        f"`python -m benchmarks.coverage.peers`: {versions()}",
    ]
    parts += [f"One thread; medians of rounds of the three in turn, {how}.", ""]
    for way in WAYS:
        parts.append(f"- {way}: finished {sum(way in m for m in found.values())} of {len(rows)} models")
    surgery = [m["analysis + apply"] / m["export"] for m in found.values() if {"ours", "export"} <= m.keys()]
    if to_export:
        parts.append(f"- analysis + apply / export: median {median(surgery):.2f} over {len(surgery)} models")
        parts.append(f"- ours / export: median {median(to_export):.2f} over {len(to_export)} models")
    if both:
        mine, theirs = (median(m[way] for m in both) for way in ("ours", "torch-pruning"))
        ratio = median(m["ours"] / m["torch-pruning"] for m in both)
        parts.append(
            f"- of the {len(both)} models that both finish: median of ours {mine:.2f} s, "
            f"of torch-pruning {theirs:.2f} s, median ratio {ratio:.2f}"
        )
    parts += ["", HEADER]
    for name, m in found.items():
        cells = [number(m.get(key), ".2f") for key in ("export", "ours", "trace", "analysis", "apply", "torch-pruning")]
        cells.append(number(m.get("parameters left"), ".0%"))
        for own, other in (("analysis + apply", "export"), ("ours", "export"), ("ours", "torch-pruning")):
            cells.append(f"{m[own] / m[other]:.2f}" if {own, other} <= m.keys() else "")
        parts.append(f"| {' | '.join([name, *cells])} |")
    parts += ["", "## Failures and time-outs", ""]
    for row in rows:
        told = {**row.get("failures", {}), **({"run": row["error"]} if row.get("error") else {})}
        parts += [f"- {row['model']}: {way}: {' '.join(reason.split())}" for way, reason in told.items()]
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage.peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--again", action="store_true", help="also models that have a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="repeat the calls in one process")
    parser.add_argument("--side", type=int, help="pixels of torchvision's images where the zoo says nothing else")
    parser.add_argument("--seconds-per-model", type=float, default=900.0)
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        measure(options.only[0], options.rounds, WAYS, saver(Path(options.child[0])))
        return 0
    suffix = "_warm" if options.warm else ""
    results = options.results or RESULTS / f"coverage_speed{suffix}.jsonl"
    chosen = zoo.names(options.only)
    if options.list:
        print("\n".join(chosen))
        return 0
    if options.side:
        os.environ["COVERAGE_SIDE"] = str(options.side)
    torch.set_num_threads(1)
    rows = rows_of(results)
    for name in chosen:
        if name in rows and not options.again:
            continue
        given = ["--only", name, "--rounds", str(options.rounds)]
        if options.warm:
            row = {"model": name, **in_child("benchmarks.coverage.peers", given, options.seconds_per_model)}
        else:
            row = cold(name, options.rounds)
        rows[name] = row
        results.parent.mkdir(exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(portable(json.dumps(row)) + "\n")
        told = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in medians(row).items() if way in WAYS)
        print(f"{name:44} {told} {row.get('error', '')} {row.get('failures') or ''}", flush=True)
    how = "calls repeated in one process a model" if options.warm else "each the first call in a process of its own"
    path = results.parent / f"coverage_speed{suffix}_{date.today()}.md"
    path.write_text(portable(table(list(rows.values()), how)), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
