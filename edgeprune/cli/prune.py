from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import choice_options, make_task, model_options, reporter

EXAMPLE = (
    "Example: edgeprune prune torchvision:resnet18 --shape 1x3x224x224 --device host-openvino --budget 8ms "
    "--out plan.json"
)


@click.command("prune", cls=rich_click.RichCommand, epilog=EXAMPLE)
@model_options
@choice_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The plan to write.")
@json_option
def command(budget: str, out: Path, as_json: bool, **options: Any) -> None:
    """Choose what to prune for a latency budget; writes plan.json.

    By prediction alone: a ratio is of the predicted dense latency, and only `fit` or `verify` measure the result.
    """
    from edgeprune.budget import parse_budget
    from edgeprune.folders import check_writable
    from edgeprune.preparing import prepare, prune

    wanted = parse_budget(budget)
    check_writable(out.parent)
    task = make_task(**options)
    prepared = prepare(task, reporter())
    plan, choice = prune(task, prepared, wanted)
    plan.to_json(out)
    dense = prepared.cost.predict({})
    document = {
        "model": task.name,
        "device": task.device.name,
        "budget": str(wanted),
        "origin": f"predicted ({prepared.cost.origin} kernels)",
        "predicted_ms": round(choice.predicted_us / 1e3, 4),
        "predicted_error_ms": round(choice.error_us / 1e3, 4),
        "dense_predicted_ms": round(dense.us / 1e3, 4),
        "gap": choice.solution.gap,
        "exact_cost": choice.exact_cost,
        "groups_pruned": len(plan.kept),
        "dropped": list(plan.dropped),
        "plan": str(out),
        "seconds": {stage: round(value, 3) for stage, value in prepared.seconds.items()},
    }
    if as_json:
        print_json(document)
        return
    ratio = choice.predicted_us / dense.us
    click.echo(
        f"predicted from {prepared.cost.origin} kernels: {document['predicted_ms']} ± "
        f"{document['predicted_error_ms']} ms ({ratio:.3f}x of dense), proven within {choice.solution.gap:.2%}; "
        f"{len(plan.kept)} groups pruned, {len(plan.dropped)} blocks dropped: {out}"
    )
