"""The end of the flow: judge what was fitted, and write the bundle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import parity
from edgeprune.bundle import Bundle, Contents, write_bundle
from edgeprune.choice import Choice
from edgeprune.cost import describe
from edgeprune.engine import Engine
from edgeprune.executed import executed
from edgeprune.gating import judged, quality_of
from edgeprune.preparing import timed
from edgeprune.recovery import RepairReport
from edgeprune.references import COMPUTE
from edgeprune.verifying import Verification, on_todays_clock

if TYPE_CHECKING:
    from edgeprune.pipeline import Loop


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What `fit` gives: the bundle and the confirmation run that it passed, MACs before and after, the repair."""

    bundle: Bundle
    verification: Verification
    choice: Choice
    repair: RepairReport
    dense_macs: int
    pruned_macs: int


def hand_over(
    loop: Loop,
    choice: Choice,
    repaired: RepairReport,
    engine: Engine,
    result: Verification,
    out: Path,
    seconds: dict[str, float],
) -> Fitted:
    task, cost = loop.task, loop.prepared.cost
    assert engine.pruned is not None
    with timed(seconds, "report"):
        quality = _quality(loop, engine)
        ran = None
        if engine.precision != "fp32" and not task.device.modelled:
            ran = executed(engine, task.device)
            loop.reporter.say(str(ran or "the runtime doesn't tell in which precision it computed"))
    # the cost model's clock is that of the compute-bound reference
    then, now = ({COMPUTE: clock[COMPUTE]} for clock in (loop.prepared.table.references_us, result.references_us))
    result = replace(
        result,
        model=task.name,
        predicted_ms=on_todays_clock(choice.predicted_us, then, now) / 1e3,
        predicted_error_ms=on_todays_clock(choice.error_us, then, now) / 1e3,
        attempts=tuple(loop.records),
        quality=quality,
        bundle=str(out.resolve()),
        seconds=seconds,
    )
    gone = cost.vanishing(choice.dropped)
    macs = sum(unit.kernel(choice.widths).macs for unit in cost.units if unit.name not in gone)
    dense_macs = sum(unit.dense.macs for unit in cost.units)
    contents = Contents(
        engine=loop.complete(engine, choice),
        dense=loop.complete(loop.base, loop.whole),
        verification=result,
        model=task.name,
        preprocessing=task.preprocessing.model_dump(mode="json") if task.preprocessing else None,
        command=task.command,
        samples=parity.samples(engine.pruned, calibration=engine.calibration) if task.device.computes else (),
        notes={
            **({"ran_in": ran.to_json()} if ran else {}),
            "macs": {"dense": dense_macs, "pruned": macs},
            "cost_model": describe(cost),
            "solver": {
                "gap": None if choice.gap is None else choice.solution.gap,
                "exact_cost": choice.exact_cost,
                "dropped": list(choice.dropped),
            },
            "budgets": [spent.to_json() for spent in choice.spent[1:]],
            "repair": {"chosen": repaired.chosen, "differences": repaired.differences},
        },
    )
    bundle = write_bundle(out, contents)
    return Fitted(
        bundle=bundle, verification=result, choice=choice, repair=repaired, dense_macs=dense_macs, pruned_macs=macs
    )


def _quality(loop: Loop, engine: Engine) -> dict[str, Any]:
    """On the half of the data that nothing was fitted to; `QualityError` where it is less than was asked for."""
    data = loop.prepared.report
    if data is None:
        return {}
    found = quality_of(engine, loop.task.device, data, loop.task.model)
    if loop.task.min_quality is not None:
        loop.task.min_quality.check(judged(found))
    return {
        "report": list(data.names),
        "calibration": list(loop.prepared.calibration.names) if loop.prepared.calibration else [],
        "skipped": list(data.skipped),
        **{name: quality.to_json() for name, quality in found.items()},
    }
