"""What every choice needs, from a model and a device: graph, latency table, calibrated cost model, saliency."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from edgeprune.budget import Budget, Wanted
from edgeprune.budget_rows import Row
from edgeprune.calibration import Source, with_networks
from edgeprune.choice import Choice, plan_from
from edgeprune.choosing import FREELY, Rules, choose, least_choice
from edgeprune.constraints import NONE, Constraints, allowed
from edgeprune.cost import CostModel, cost_model
from edgeprune.data import Data
from edgeprune.device import Device
from edgeprune.eligibility import DENSE, TWO_OF_FOUR
from edgeprune.formats import check_device, check_layers, with_formats
from edgeprune.graph import ModelGraph, trace
from edgeprune.graph.structure import by_reason
from edgeprune.kernel import Kernel
from edgeprune.measurement import KERNELS, Timing
from edgeprune.plan_json import Plan
from edgeprune.planning import (
    describe_choice,
    describe_rules,
    rows_of,
    with_common_options,
)
from edgeprune.preprocessing import Preprocessing
from edgeprune.profiling import profile
from edgeprune.pruned import Pruned
from edgeprune.quality import check_takes
from edgeprune.recovery import repair
from edgeprune.saliency import Saliency, check_data, score
from edgeprune.sampling import GOAL, MOST_ROUNDS, interpolation_error, uncertain_kernels
from edgeprune.scheduling import ONE_SHOT, Schedule, Stage, before_the_last
from edgeprune.scopes import Scope
from edgeprune.sparsity.channel_order import permuted
from edgeprune.staircase import find_staircase, staircase_kernels
from edgeprune.table import LatencyTable, with_warnings, without_networks
from edgeprune.units import kernels_at, partition, width_options

if TYPE_CHECKING:
    from edgeprune.gating import MinQuality


class Reporter(Protocol):
    """What the flow tells while it runs: a line per event, and progress of long stages."""

    def say(self, text: str) -> None:
        """One line about what was found."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of a stage."""


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, where it is to run, and what it may be judged by.

    `example_inputs` fix every shape. `data` is split in two by a hash of its names: one half for saliency and repair,
    the other for the report. `others` are budgets beside the latency on `device`, `devices` the other devices that they
    name; `min_quality` is what `fit` hands over at the least, `relative_to` the precision of the dense engine that its
    ratios are taken to, the device's first unless told. `formats` are those that layers may have on `device`. `wait_s`
    is how long to wait for another process that writes a table. `command` are the lines that do it all again.
    """

    model: torch.nn.Module
    name: str
    example_inputs: tuple[torch.Tensor, ...]
    device: Device
    data: Data | None = None
    preprocessing: Preprocessing | None = None
    saliency: str = "taylor_output"
    normalise: str | None = None
    seed: int = 0
    allow_other_table: bool = False
    wait_s: float = 0.0
    command: tuple[str, ...] = ()
    others: tuple[Wanted, ...] = ()
    devices: tuple[Device, ...] = ()
    constraints: Constraints = NONE
    scope: Scope = "global"
    schedule: Schedule = ONE_SHOT
    min_quality: MinQuality | None = None
    relative_to: str | None = None
    formats: tuple[str, ...] = (DENSE,)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a choice needs: graph, table, cost model, saliency, the two halves of the data.

    `others` are the rows of the budgets beside the latency on the task's device, `rules` how to choose.
    """

    graph: ModelGraph
    table: LatencyTable
    cost: CostModel
    saliency: Saliency
    calibration: Data | None
    report: Data | None
    seconds: Mapping[str, float]
    others: tuple[Row, ...] = ()
    rules: Rules = FREELY

    def choose(self, target_us: float, start: Choice | None = None) -> Choice:
        """The most valuable network inside the latency and the other budgets, by the rules."""
        return choose(self.cost, self.saliency, target_us, others=self.others, rules=self.rules, start=start)

    def least(self) -> Choice:
        """The fastest network that the rules allow."""
        return least_choice(self.cost, self.saliency, others=self.others, rules=self.rules)


def kernels_to_profile(graph: ModelGraph, device: Device, steps: Mapping[str, int]) -> tuple[Kernel, ...]:
    """The kernels of a graph at sampled widths, and those that show the device's staircase."""
    units = partition(graph, device)
    own = kernels_at(units, width_options(graph, units, steps))
    return tuple(sorted({*own, *staircase_kernels(device.precisions[0])}))


def measured_table(
    graph: ModelGraph,
    device: Device,
    reporter: Reporter,
    *,
    timing: Timing = KERNELS,
    allow_other: bool = False,
    retry_failed: bool = False,
    wait_s: float = 0.0,
) -> LatencyTable:
    """The device's table with the kernels that the graph needs: a coarse grid on the staircase that the device shows,
    then, round by round, those where the cost model is uncertain (`sampling`)."""

    asked: list[int] = []  # kernels that each of the profiles below had to measure
    warnings: dict[str, None] = {}  # of all of them

    def progress(done: int, total: int) -> None:
        if done == 0:
            asked.append(total)
        reporter.progress(f"profiling {device.name}", done, total)

    def measure(kernels: tuple[Kernel, ...]) -> LatencyTable:
        table = profile(
            kernels,
            device,
            on_progress=progress,
            allow_other=allow_other,
            retry_failed=retry_failed,
            timing=timing,
            wait_s=wait_s,
        )
        warnings.update(dict.fromkeys(table.warnings))
        return table

    precision = device.precisions[0]
    table = measure(staircase_kernels(precision))
    wanted = set(kernels_to_profile(graph, device, find_staircase(node_latencies(table), precision).steps()))
    table = measure(tuple(sorted(wanted)))
    for _ in range(MOST_ROUNDS):
        cost = cost_model(graph, without_networks(table))
        if interpolation_error(cost) <= GOAL:
            break
        more = uncertain_kernels(cost, {**table.entries, **table.failures})
        if not more:
            break
        wanted.update(more)
        table = measure(more)
    new = sum(asked)
    state = f"{new} of {len(wanted)} kernels {table.origin}" if new else "table up to date, 0 to measure"
    reporter.say(f"profiling {device.name}: {state}")
    for warning in warnings:
        reporter.say(f"warning: {warning}")
    for kernel in sorted(wanted):
        if kernel in table.failures:
            reporter.say(f"warning: kernel '{kernel.key}' could not be measured: {table.failures[kernel]}")
    return with_warnings(table, (warning for warning in warnings if warning not in table.warnings))


def node_latencies(table: LatencyTable) -> dict[Kernel, float]:
    """Compute time of every measured kernel in us, on the table's clock."""
    return {entry.kernel: table.latency_us(entry.kernel, node=True) for entry in table}


def prepare(task: Task, reporter: Reporter | None = None) -> Prepared:
    """Trace, score, profile and calibrate. What is measured goes to the device's table at once."""
    reporter = reporter or Silent()
    check_data(task.saliency, task.data)
    seconds: dict[str, float] = {}
    with timed(seconds, "trace"):
        graph = trace(task.model, task.example_inputs)
    check_data(task.saliency, task.data, graph)
    if task.data is not None:
        check_takes(task.model, task.data, num_inputs=len(task.example_inputs))
    unproven = [refusal for refusal in graph.refused if refusal.operator != "output"]
    units = partition(graph, task.device)
    reporter.say(
        f"tracing {task.name}: {len(units)} units, {len(graph.groups)} groups, {len(graph.blocks)} blocks droppable, "
        f"{len(unproven)} refused"
    )
    for (operator, reason), places in by_reason(unproven).items():
        more = f" and {len(places) - 1} more places" if len(places) > 1 else ""
        reporter.say(f"refused: {places[0]}{more}: {operator}: {reason}")
    if TWO_OF_FOUR in task.formats:
        check_device(task.device, task.formats)
        check_layers(units, graph)
    allowed(task.constraints, graph, units, width_options(graph, units, {}))  # a fault in them shows before profiling
    calibration, report = task.data.split_by_hash() if task.data is not None else (None, None)
    with timed(seconds, "score"):  # before anything is measured: not every criterion can value every model
        saliency = score(task.saliency, graph, task.model, calibration, seed=task.seed, normalise=task.normalise)
    with timed(seconds, "profile"):
        table = _measured(task, graph, task.device, reporter)
    with timed(seconds, "calibrate"):
        table, cost = _calibrated(task, graph, task.device, table, reporter)
    costs = {}
    for device in task.devices:
        with timed(seconds, f"profile {device.name}"):
            own = _measured(task, graph, device, reporter)
            costs[device.name] = _calibrated(task, graph, device, own, reporter)[1]
    cost, costs = with_common_options(cost, costs)
    others = rows_of(task.others, cost, costs, batch=batch_of(task), precision=task.device.precisions[0])
    return Prepared(
        graph=graph,
        table=table,
        cost=cost,
        saliency=saliency,
        calibration=calibration,
        report=report,
        seconds=seconds,
        others=others,
        rules=Rules(constraints=task.constraints, scope=task.scope),
    )


def _measured(task: Task, graph: ModelGraph, device: Device, reporter: Reporter) -> LatencyTable:
    table = measured_table(graph, device, reporter, allow_other=task.allow_other_table, wait_s=task.wait_s)
    if TWO_OF_FOUR not in formats_on(device, task):
        return table
    kernels = sparse_kernels(graph, device, find_staircase(node_latencies(table), device.precisions[0]).steps())
    reporter.say(f"profiling {device.name}: {len(kernels)} kernels in 2:4")
    return profile(
        kernels,
        device,
        on_progress=lambda done, total: reporter.progress(f"profiling {device.name}, 2:4", done, total),
        allow_other=task.allow_other_table,
        wait_s=task.wait_s,
    )


def formats_on(device: Device, task: Task) -> tuple[str, ...]:
    """What layers may be there: 2:4 is chosen for the task's device alone, other budgets count it as dense."""
    return task.formats if device.name == task.device.name else (DENSE,)


def sparse_kernels(graph: ModelGraph, device: Device, steps: Mapping[str, int]) -> tuple[Kernel, ...]:
    """The 2:4 kernels of a graph at sampled widths."""
    units = with_formats(partition(graph, device), graph)
    kernels = kernels_at(units, width_options(graph, units, steps))
    return tuple(kernel for kernel in kernels if kernel.sparsity == TWO_OF_FOUR)


def _calibrated(
    task: Task, graph: ModelGraph, device: Device, table: LatencyTable, reporter: Reporter
) -> tuple[LatencyTable, CostModel]:
    """The device's table with whole networks, and the cost model that they correct."""
    table = with_networks(
        table,
        cost_model(graph, without_networks(table)),
        Source(model=task.model, graph=graph, example_inputs=task.example_inputs),
        device,
        on_network=lambda done, total: reporter.progress("calibrating on whole networks", done, total),
        wait_s=task.wait_s,
    )
    cost = cost_model(graph, table, formats=formats_on(device, task))
    where = f" of {device.name}" if device.name != task.device.name else ""
    reporter.say(
        f"cost model{where}: {len(cost.surfaces)} surfaces, {cost.networks} whole networks, "
        f"error ±{cost.relative_error:.1%} (90 %), dense {cost.origin} as {cost.predict({}).us / 1e3:.3g} ms"
    )
    return table, cost


def prune(task: Task, prepared: Prepared, budget: Budget, start: Choice | None = None) -> tuple[Plan, Choice]:
    """The plan for a budget by prediction alone: ratios are of the predicted dense latency, nothing is verified.

    `start` is a choice for a near budget, which saves time.
    """
    target_us = target_of(task, prepared, budget)
    prepared = in_steps(task, prepared, target_us)
    choice = prepared.choose(target_us, start)
    return plan_of(task, prepared, choice, budget), choice


def target_of(task: Task, prepared: Prepared, budget: Budget) -> float:
    """A budget in us by prediction."""
    dense_us = prepared.cost.predict({}).us
    return budget.limit_ms(dense_us / 1e3, batch=batch_of(task)) * 1e3


def in_steps(task: Task, prepared: Prepared, target_us: float, reporter: Reporter | None = None) -> Prepared:
    """What the last choice of the task's schedule is made from: the network of the step before, repaired and scored."""
    reporter = reporter or Silent()

    def score_anew(graph: ModelGraph, module: torch.nn.Module) -> Saliency:
        return score(task.saliency, graph, module, prepared.calibration, seed=task.seed, normalise=task.normalise)

    def repaired(pruned: Pruned) -> Pruned:
        assert prepared.calibration is not None
        return repair(pruned, prepared.calibration, dense=task.model, graph=prepared.graph, seed=task.seed)[0]

    stage = before_the_last(
        prepared.cost,
        Stage(saliency=prepared.saliency, rules=prepared.rules),
        target_us,
        task.schedule,
        score_anew,
        others=prepared.others,
        between=repaired if prepared.calibration is not None else None,
        inputs=task.example_inputs,
        on_step=lambda step, choice: reporter.say(
            f"step {step} of {task.schedule.steps}: predicted {choice.predicted_us / 1e3:.4g} ms, scored again"
        ),
    )
    return replace(prepared, saliency=stage.saliency, rules=stage.rules)


def plan_of(task: Task, prepared: Prepared, choice: Choice, budget: Budget) -> Plan:
    """The plan of a choice, with where it came from in its notes."""
    notes = {
        "model": task.name,
        "device": task.device.name,
        "budget": str(budget),
        "saliency": task.saliency,
        "normalise": prepared.saliency.normalise,
        "seed": task.seed,
        **describe_choice(prepared.cost, choice, task.device.name),
        **describe_rules(prepared.rules, task.schedule),
    }
    plan = plan_from(choice, prepared.graph, prepared.saliency, notes)
    return permuted(plan, prepared.graph, seed=task.seed)[0] if plan.formats else plan


def batch_of(task: Task) -> int:
    """Samples in one inference."""
    return int(task.example_inputs[0].shape[0])


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the `with` block to a stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
