from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.choosing import budget_option, choosing_task, rule_options
from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import choice_options, model_options, reporter
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from edgeprune.choice import Choice
    from edgeprune.front import Point
    from edgeprune.plan_json import Plan
    from edgeprune.preparing import Prepared, Task

EXAMPLE = (
    "Example: edgeprune prune torchvision:resnet18 --shape 1x3x224x224 --device host-openvino --budget 8ms "
    "--out plan.json"
)


@click.command("prune", cls=rich_click.RichCommand, epilog=EXAMPLE)
@model_options
@choice_options
@budget_option(required=False)
@rule_options
@click.option("--pareto", metavar="0.3x:0.9x:10", help="The whole front: LOW:HIGH:COUNT; --out is a folder then.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png", help="Of the front.")
@click.option(
    "--rewind",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Other weights of the model, cut by the plan and written beside it: a lottery ticket.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The plan to write, or the front's folder.")
@json_option
def command(
    budgets: tuple[str, ...],
    pareto: str | None,
    plot: Path | None,
    rewind: Path | None,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose what to prune for a latency budget, and others; writes plan.json.

    By prediction alone: a ratio is of the predicted dense latency, and only `fit` or `verify` measure the result.
    """
    from edgeprune.folders import check_writable
    from edgeprune.front import check_drawing, parse_front
    from edgeprune.preparing import prepare
    from edgeprune.rewinding import check_weights

    ratios = None if pareto is None else parse_front(pareto)
    if ratios is None and plot is not None:
        raise InputError("--plot draws a front: give --pareto LOW:HIGH:COUNT")
    if ratios is None and out.is_dir():
        raise InputError(f"--out {out} is a folder; name the plan to write")
    task, budget = choosing_task(budgets, **options)
    if (budget is None) == (ratios is None):
        raise InputError(
            f"give --budget for the latency on {task.device.name} or --pareto for its front, one of the two"
        )
    if rewind is not None and len(set(task.formats)) > 1:
        raise InputError("--rewind cuts other weights, whose zeros would be others: leave out --formats")
    check_writable(out.parent if ratios is None else out)
    if plot is not None:
        check_drawing()
        check_writable(plot.parent)
    if rewind is not None:
        check_weights(task.model, rewind)
        _check_not_overwritten(_rewound_path(out), out, rewind, options["weights"])
    prepared = prepare(task, reporter())
    if ratios is not None:
        _front(task, prepared, ratios, out, plot, rewind, as_json)
        return
    assert budget is not None
    from edgeprune.preparing import prune

    plan, choice = prune(task, prepared, budget)
    document = _document(task, prepared, plan, choice, out)
    plan.to_json(out)
    if rewind is not None:
        document["rewound"] = str(_rewound(task, plan, rewind, out))
    if as_json:
        print_json(document)
    else:
        _print(task, prepared, choice, document)


def _document(task: Task, prepared: Prepared, plan: Plan, choice: Choice, out: Path) -> dict[str, Any]:
    return {
        "model": task.name,
        "device": task.device.name,
        "budget": plan.notes["budget"],
        "precision": task.device.precisions[0],
        "origin": f"predicted ({prepared.cost.basis})",
        "predicted_ms": round(choice.predicted_us / 1e3, 4),
        "predicted_error_ms": round(choice.error_us / 1e3, 4),
        "dense_predicted_ms": round(prepared.cost.predict({}).us / 1e3, 4),
        "budgets": plan.notes["budgets"],
        "gap": choice.gap if choice.gap is None else choice.solution.gap,
        "exact_cost": choice.exact_cost,
        "scope": task.scope,
        "groups_pruned": len(plan.kept),
        "dropped": list(plan.dropped),
        "formats": dict(plan.formats),
        "width_steps": _steps(prepared),
        "plan": str(out),
        "seconds": {stage: round(value, 3) for stage, value in prepared.seconds.items()},
    }


def _steps(prepared: Prepared) -> dict[str, int]:
    """The finest and the coarsest step that offered widths lie on."""
    from edgeprune.planning import step_of

    steps = [step for step in map(step_of, prepared.cost.options.values()) if step] or [1]
    return {"least": min(steps), "most": max(steps)}


def _print(task: Task, prepared: Prepared, choice: Choice, document: dict[str, Any]) -> None:
    ratio = choice.predicted_us / prepared.cost.predict({}).us
    click.echo(
        f"predicted from {prepared.cost.basis}: {document['predicted_ms']} ± "
        f"{document['predicted_error_ms']} ms ({ratio:.3f}x of dense), {choice.proof}; "
        f"{document['groups_pruned']} groups pruned, {len(document['dropped'])} blocks dropped: {document['plan']}"
    )
    for spent in document["budgets"] if len(document["budgets"]) > 1 else ():
        error = f" ± {spent['error']:g}" if spent["error"] else ""
        click.echo(
            f"  {spent['of']}: {spent['predicted']:g}{error} {spent['unit']} of {spent['limit']:g}, "
            f"dense {spent['dense']:g} ({spent['origin']})"
        )
    if document["formats"]:
        click.echo(f"  2:4: {', '.join(document['formats'])}")
    steps = document["width_steps"]
    click.echo(f"widths on the steps of {task.device.name}'s table: {steps['least']} to {steps['most']} channels")
    if "rewound" in document:
        click.echo(f"rewound weights, cut by the plan: {document['rewound']}")


def _front(
    task: Task,
    prepared: Prepared,
    ratios: tuple[float, ...],
    out: Path,
    plot: Path | None,
    rewind: Path | None,
    as_json: bool,
) -> None:
    """Writes the plans, front.json and the plot; one table on stdout."""
    from edgeprune.folders import write_atomically
    from edgeprune.front import draw_front, front
    from edgeprune.plan_json import dumps

    told = reporter()
    points = front(task, prepared, ratios, lambda point: told.say(f"{point.ratio:g}x: {_line(point)}"))
    for point in points:
        if point.plan is not None:
            point.plan.to_json(out / point.file)
            if rewind is not None:
                _rewound(task, point.plan, rewind, out / point.file)
    document = {
        "model": task.name,
        "device": task.device.name,
        "precision": task.device.precisions[0],
        "origin": f"predicted ({prepared.cost.basis})",
        "dense_predicted_ms": round(prepared.cost.predict({}).us / 1e3, 4),
        "scope": task.scope,
        "points": [point.to_json() for point in points],
    }
    write_atomically(out / "front.json", dumps(document))
    if plot is not None:
        title = f"{task.name} on {task.device.name}, predicted from {prepared.cost.basis}"
        write_atomically(plot, draw_front(points, title))
    if as_json:
        print_json(document)
        return
    click.echo(f"{'ratio':>7}  {'predicted ms':>20}  {'value':>12}  {'gap':>8}  plan")
    for point in points:
        click.echo(f"{point.ratio:>6g}x  {_line(point)}")


def _line(point: Point) -> str:
    if point.choice is None:
        return f"out of reach: {point.why}"
    predicted = f"{point.choice.predicted_us / 1e3:.4g} ± {point.choice.error_us / 1e3:.2g}"
    gap = "" if point.choice.gap is None else f"{point.choice.gap:.2%}"
    exact = "" if point.choice.exact_cost else " (cost to first order)"
    return f"{predicted:>20}  {point.choice.solution.value:>12.6g}  {gap:>8}  {point.file}{exact}"


def _rewound_path(plan: Path) -> Path:
    return plan.with_suffix(".safetensors") if plan.suffix == ".json" else plan.with_name(plan.name + ".safetensors")


def _check_not_overwritten(path: Path, *inputs: Path | str | None) -> None:
    if any(path.resolve() == Path(given).resolve() for given in inputs if given is not None):
        raise InputError(f"the rewound weights would be written over {path}; name another --out")


def _rewound(task: Task, plan: Plan, weights: Path, beside: Path) -> Path:
    from edgeprune.rewinding import write_rewound

    path = _rewound_path(beside)
    write_rewound(plan, task.model, weights, task.example_inputs, path)
    return path
