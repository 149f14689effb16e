"""The whole flow in one place, and its one loop: what was measured over budget goes back to the solver."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.budget import Budget
from edgeprune.choice import Choice, dense_choice, floor_layers
from edgeprune.device import check_precision
from edgeprune.engine import Calibration, Engine
from edgeprune.errors import BudgetError, InputError, UnstableError
from edgeprune.exporting import NO_CALIBRATION, export
from edgeprune.handing_over import Fitted as Fitted
from edgeprune.handing_over import hand_over
from edgeprune.measurement import Timing
from edgeprune.modelled import installed
from edgeprune.preparing import Prepared, Reporter, Silent, Task, batch_of, in_steps, plan_of, prepare, timed
from edgeprune.pruned import Pruned
from edgeprune.ranges import batches_of, drawn_batches
from edgeprune.recovery import RepairReport, repair
from edgeprune.surgery import apply
from edgeprune.verifying import CONFIRM, Verification, measure_pair, verify

ATTEMPTS = 5
"""Rounds of solve, export and measure before the best network inside the budget is taken."""
CONFIRMATIONS = 3
"""Fresh confirmation runs, each of a new choice, before the budget counts as missed."""
AIM = 0.985
"""Share of the budget that a choice aims at: room for the noise of the confirmation."""
SLACK = 0.06
"""A network this far inside the budget leaves quality on the table: one more round with a larger target."""
QUICK = Timing(warmup_ms=100.0, min_rounds=20, max_rounds=48, max_seconds=20.0, tolerance=0.006)
"""How an attempt is measured, before the confirmation."""
UNREPAIRED = RepairReport(chosen="none", differences={}, num_fit=0, num_held_out=0)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One round of the loop: the share of the dense latency aimed at, what was cut, and what the device said."""

    target: float
    choice: Choice
    measured: Verification

    @property
    def ratio(self) -> float:
        """Latency over the dense one's in the same run."""
        assert self.measured.pruned.ratio is not None
        return self.measured.pruned.ratio.value

    @property
    def upper(self) -> float:
        """The one-sided 95 % bound of `ratio`."""
        assert self.measured.pruned.ratio is not None
        return self.measured.pruned.ratio.upper


def fit(task: Task, budget: Budget, out: Path, *, percentile: float = 50.0, reporter: Reporter | None = None) -> Fitted:
    """A bundle in `out` whose engine was measured inside the budget, or `BudgetError` with the least in reach.

    An engine slower than the dense one is never handed over; a dense model already inside gives an empty plan. Latency
    is measured on the task's device alone, so no other device may have a budget. `QualityError` where the engine
    answers worse than the task's `min_quality` on the half of the data that nothing was fitted to.
    """
    reporter = reporter or Silent()
    check_one_device(task)
    if task.device.precisions[0] == "int8" and task.device.computes and task.data is None:
        raise InputError(NO_CALIBRATION)
    if task.relative_to is not None:
        check_precision(task.device, task.relative_to)
        if budget.kind != "ratio":
            raise InputError(f"--relative-to says what a ratio is taken to, {budget} is none: give one like 0.6x")
    if task.min_quality is not None:
        task = replace(task, min_quality=task.min_quality.named(task.data))
    installed(task.device, engines_in=filter(None, [task.device.precisions[0], task.relative_to]))
    prepared = prepare(task, reporter)
    seconds = dict(prepared.seconds)
    with tempfile.TemporaryDirectory(prefix="edgeprune-fit-") as scratch:
        with timed(seconds, "search"):
            loop = Loop(task, prepared, budget, Path(scratch), reporter, percentile)
            dense = _dense_alone(loop)
            loop.starts_from(dense)
        if dense.met and all(row.dense <= row.limit for row in prepared.others):
            reporter.say("the dense model is inside the budget already: empty plan")
            result = replace(dense, dense=dense.dense or dense.pruned)
            return hand_over(loop, loop.whole, UNREPAIRED, loop.dense, result, out, seconds)
        target, unstable = min(1.0, AIM * loop.limit_ratio), None
        with timed(seconds, "search"):
            loop.prepared = in_steps(task, prepared, target * loop.dense_us, reporter)
        for number in range(CONFIRMATIONS):
            with timed(seconds, "search"):
                attempt = loop.search(target)
            if attempt is None:
                break
            with timed(seconds, "repair"):
                pruned, repaired = loop.repaired(attempt)
            with timed(seconds, "confirm"):
                engine = loop.export(pruned, attempt.choice, f"confirmed{number}", to_deploy=True)
                try:
                    result = verify(engine, dense=loop.base, budget=budget, percentile=percentile)
                except UnstableError as error:
                    reporter.say(f"confirmation too noisy: {error}")
                    unstable, target = error, attempt.target * AIM
                    continue
                loop.record("confirmation", attempt, result)
            if result.met:
                return hand_over(loop, attempt.choice, repaired, engine, result, out, seconds)
            target = loop.after_a_miss(attempt, result)
        raise unstable or loop.out_of_reach()


def check_one_device(task: Task) -> None:
    """`InputError` where a latency on another device is asked for."""
    if task.devices:
        names = ", ".join(device.name for device in task.devices)
        raise InputError(
            f"fit measures on {task.device.name} alone, so it can't say whether a budget on {names} is met; plan for "
            "several devices with `edgeprune prune`, then `export` and `verify` on each"
        )


class Loop:
    """The state of one fit: what was prepared, the dense engine, and a record of every attempt."""

    def __init__(
        self, task: Task, prepared: Prepared, budget: Budget, scratch: Path, reporter: Reporter, percentile: float
    ) -> None:
        self.task, self.prepared, self.budget = task, prepared, budget
        self.scratch, self.reporter, self.percentile = scratch, reporter, percentile
        self.attempts: list[Attempt] = []
        self.records: list[Mapping[str, Any]] = []
        self.missed: list[Choice] = []
        self.dense_us = prepared.cost.predict({}).us
        self.whole = dense_choice(prepared.cost, prepared.saliency, prepared.others)
        self.dense_ms = 0.0
        self.drawn = drawn_batches(task.example_inputs)
        self.ranged: Calibration = ()
        if task.device.precisions[0] == "int8" and prepared.calibration is not None:
            self.ranged = batches_of(prepared.calibration, task.example_inputs)
        self.dense = self.export(self.cut(self.whole), self.whole, "dense", to_deploy=True)
        self.base = self.dense
        if task.relative_to not in (None, self.dense.precision):
            self.base = self.export(self.cut(self.whole), self.whole, "base", precision=task.relative_to)

    def starts_from(self, dense: Verification) -> None:
        """Take the dense latency from its measurement; that of another precision moves the prediction too."""
        base = dense.dense if self.base is not self.dense else None
        self.dense_ms = (base or dense.pruned).at.value
        self.dense_us *= self.dense_ms / dense.pruned.at.value

    @property
    def limit_ratio(self) -> float:
        """The budget as a share of the dense latency."""
        return self.budget.limit_ms(self.dense_ms, batch=batch_of(self.task)) / self.dense_ms

    def cut(self, choice: Choice) -> Pruned:
        """Surgery by a choice, not repaired."""
        plan = plan_of(self.task, self.prepared, choice, self.budget)
        return apply(plan, self.task.model, self.task.example_inputs, graph=self.prepared.graph)

    def export(
        self,
        pruned: Pruned,
        choice: Choice,
        folder: str,
        *,
        only_to_time: bool = True,
        to_deploy: bool = False,
        precision: str | None = None,
    ) -> Engine:
        """The engine; a modelled device gets its kernels from the cost model's units, and those alone to be timed.

        In int8 one `to_deploy` has its ranges from the data, any other from drawn values, which take as long.
        """
        cost = self.prepared.cost
        gone = cost.vanishing(choice.dropped)
        kernels = [unit.kernel(choice.widths) for unit in cost.units if unit.name not in gone]
        return export(
            pruned,
            self.task.device,
            self.scratch / folder,
            precision=precision,
            kernels=kernels,
            only_to_time=only_to_time,
            calibration=self.ranged if to_deploy else self.drawn,
        )

    def complete(self, engine: Engine, choice: Choice) -> Engine:
        """What can be deployed: of a device that was only modelled so far its runtime's own files."""
        if self.task.device.roofline is None:
            return engine
        assert engine.pruned is not None
        return self.export(engine.pruned, choice, f"{engine.folder.name}-complete", only_to_time=False, to_deploy=True)

    def search(self, target: float) -> Attempt | None:
        """Move the target by what was measured until a network lies just inside the budget; None if none does."""
        best: Attempt | None = None
        for _ in range(ATTEMPTS):
            attempt = self.attempt(target) or self.attempt(None)
            if attempt is None:
                break
            limit = self.limit_ratio
            inside = attempt.upper <= limit
            if any(_same(attempt.choice, choice) for choice in self.missed):
                target = attempt.target * AIM * min(1.0, limit / attempt.upper)
                continue
            if inside and (best is None or attempt.choice.solution.value > best.choice.solution.value):
                best = attempt
            if inside and attempt.ratio >= limit * (1 - SLACK):
                break
            target = attempt.target * limit * AIM / (attempt.ratio if inside else attempt.upper)
            if target >= 1.0:
                break
        return best

    def attempt(self, target: float | None) -> Attempt | None:
        """Choose, cut, export and measure; the fastest network without a target. None where there is nothing new."""
        try:
            choice = self.prepared.least() if target is None else self.prepared.choose(target * self.dense_us)
        except BudgetError:
            return None
        if not all(spent.fits for spent in choice.spent[1:]):
            return None
        known = next((attempt for attempt in self.attempts if _same(attempt.choice, choice)), None)
        if known is not None:
            return None if target is None else replace(known, target=target)
        attempt = Attempt(
            target=choice.predicted_us / self.dense_us if target is None else target,
            choice=choice,
            measured=self.measure(self.export(self.cut(choice), choice, "attempt")),
        )
        self.attempts.append(attempt)
        self.record("attempt", attempt, attempt.measured)
        return attempt

    def measure(self, engine: Engine) -> Verification:
        """Quickly, beside dense; a run too disturbed to bound is tried again, at last as long as a confirmation."""
        for timing in (QUICK, QUICK, CONFIRM):
            try:
                found = measure_pair(
                    engine, self.base, device=self.task.device, timing=timing, percentile=self.percentile
                )
            except UnstableError:
                if timing is CONFIRM:
                    raise
                continue
            if found.pruned.ratio is not None and math.isfinite(found.pruned.ratio.upper):
                return found
        raise UnstableError("the ratio to dense can't be bounded: something else keeps the device busy")

    def after_a_miss(self, attempt: Attempt, result: Verification) -> float:
        """The next target: moved by the residual of the confirmation, whose dense latency counts from now on."""
        assert result.dense is not None and result.pruned.ratio is not None and result.budget_ms is not None
        self.missed.append(attempt.choice)
        self.dense_ms = result.dense.at.value
        ratio = self.budget.kind == "ratio"
        over = result.pruned.ratio.upper / self.budget.value if ratio else result.pruned.at.upper / result.budget_ms
        predicted = attempt.choice.predicted_us / self.dense_us
        # inside the budget, but not shown to be faster than dense: a target above what it takes would bind nothing
        target = attempt.target if over > 1.0 else min(attempt.target, predicted)
        return target * AIM / max(1.0, over if math.isfinite(over) else 1.0)

    def repaired(self, attempt: Attempt) -> tuple[Pruned, RepairReport]:
        """The attempt's network after label-free repair, where there is data for it."""
        cut = self.cut(attempt.choice)
        if self.prepared.calibration is None:
            return cut, UNREPAIRED
        pruned, report = repair(
            cut,
            self.prepared.calibration,
            dense=self.task.model,
            graph=self.prepared.graph,
            seed=self.task.seed,
        )
        self.reporter.say(f"repair: {report.chosen}")
        return pruned, report

    def record(self, stage: str, attempt: Attempt, measured: Verification) -> None:
        """Every attempt stands in the manifest."""
        assert measured.pruned.ratio is not None and measured.dense is not None
        upper = measured.pruned.ratio.upper
        record = {
            "stage": stage,
            "target_ratio": round(attempt.target, 4),
            "predicted_ratio": round(attempt.choice.predicted_us / self.dense_us, 4),
            "ratio": round(measured.pruned.ratio.value, 4),
            "ratio_upper": round(measured.pruned.ratio.upper, 4)
            if math.isfinite(measured.pruned.ratio.upper)
            else None,
            "p50_ms": round(measured.pruned.p50_ms, 4),
            "dense_p50_ms": round(measured.dense.p50_ms, 4),
            "solver_gap": attempt.choice.gap,
            "dropped": list(attempt.choice.dropped),
            "origin": measured.origin,
        }
        self.records.append(record)
        self.reporter.say(
            f"{stage} {len(self.records)}: {attempt.choice.proof}, predicted "
            f"{record['predicted_ratio']:.3f}x, {measured.origin} {record['ratio']:.3f}x, at most {upper:.3f}x (95 %)"
        )

    def out_of_reach(self) -> BudgetError:
        """The least latency that the device showed, and the layers that set the floor.

        What the prediction says, where no network was inside the other budgets.
        """
        if not self.attempts:
            try:
                self.prepared.choose(self.limit_ratio * self.dense_us)
            except BudgetError as error:
                return error
            return BudgetError(f"budget {self.budget} can't be met with any room for its measurement, the others too")
        least = min(self.attempts, key=lambda attempt: attempt.ratio)
        latency = least.measured.pruned.at.value
        return BudgetError(
            f"budget {self.budget} can't be met on {self.task.device.name}: the least latency reached is "
            f"{latency:.4g} ms, {least.ratio:.3f}x of the dense model ({least.measured.origin}); the floor is set by "
            + ", ".join(floor_layers(self.prepared.cost, least.choice))
        )


def _same(a: Choice, b: Choice) -> bool:
    return a.widths == b.widths and a.dropped == b.dropped


def _dense_alone(loop: Loop) -> Verification:
    """The dense engine's latency, and whether it is inside the budget already; too noisy to say counts as not."""
    budget = loop.budget
    if loop.base is not loop.dense:
        return verify(loop.dense, dense=loop.base, budget=budget, percentile=loop.percentile)
    if budget.kind == "ratio":
        beside = loop.dense if budget.value >= 1 else None  # only 1x is a share that the dense model can meet
        wanted = budget if beside else None
        return verify(loop.dense, dense=beside, budget=wanted, percentile=loop.percentile, timing=QUICK)
    try:
        return verify(loop.dense, dense=None, budget=budget, percentile=loop.percentile)
    except UnstableError:
        return verify(loop.dense, dense=None, percentile=loop.percentile)
