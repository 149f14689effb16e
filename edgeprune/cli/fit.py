from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.choosing import budget_option, choosing_task, rule_options
from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import choice_options, model_options, reporter
from edgeprune.cli.timing import in_ms, modelled
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from edgeprune.pipeline import Fitted

EXAMPLE = (
    "Example: edgeprune fit torchvision:mobilenet_v2 --weights DEFAULT --shape 1x3x224x224 "
    "--device host-openvino --budget 0.7x --data pictures/ --out build/"
)

MIN_QUALITY = "top1:0.9, agreement:0.95, kl:0.1, or a number: top1 with labels. Missed: no bundle, exit code 7."
QUALITY = {"top1": "top-1", "agreement": "agreement", "kl": "KL to dense", "relative_error": "rel. error"}


@click.command("fit", cls=rich_click.RichCommand, epilog=EXAMPLE)
@model_options
@choice_options
@budget_option(required=True)
@rule_options
@click.option("--percentile", type=click.FloatRange(1, 99.9), default=50.0, show_default=True, help="Of the latency.")
@click.option(
    "--relative-to", metavar="fp32|...", help="Precision of the dense engine of a ratio.  [default: the same]"
)
@click.option("--min-quality", "least", metavar="METRIC:VALUE", help=MIN_QUALITY)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle goes into a folder in here.")
@json_option
def command(
    budgets: tuple[str, ...],
    percentile: float,
    relative_to: str | None,
    least: str | None,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """The whole flow: a model, a device and a budget in, a measured engine out.

    Profiles what the device's table lacks, prunes to the budget, repairs without labels, exports, and hands the
    bundle over only when its engine was measured inside the budget. Interrupted, it goes on with what was measured.
    """
    from edgeprune.bundle import check_target
    from edgeprune.folders import check_writable
    from edgeprune.gating import parse_min_quality
    from edgeprune.pipeline import check_one_device, fit

    min_quality = parse_min_quality(least) if least else None
    task, wanted = choosing_task(budgets, **options)
    task = replace(task, min_quality=min_quality, relative_to=relative_to)
    check_one_device(task)
    if wanted is None:
        raise InputError(f"no --budget is of the latency on {task.device.name}, which fit measures")
    check_writable(out)
    folder = out / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', task.name.partition(':')[2] or task.name)}-{task.device.name}"
    check_target(folder)
    fitted = fit(task, wanted, folder, percentile=percentile, reporter=reporter())
    if as_json:
        spent = [each.to_json() for each in fitted.choice.spent[1:]]
        print_json({**fitted.verification.to_json(), "budgets": spent})
    else:
        click.echo("\n".join(summary(fitted)))


def summary(fitted: Fitted) -> list[str]:
    """The table that a person reads at the end."""
    result = fitted.verification
    dense, pruned = result.dense, result.pruned
    assert dense is not None
    ratio = f"{pruned.ratio.value:.3f}x" if pruned.ratio else "1x"
    device = fitted.bundle.manifest.device
    facts = (
        f"{result.origin}, {device.threads} thread{'s' * (device.threads > 1)}, {device.precisions[0]}, n={pruned.n}"
    )
    percentile = f"p{result.percentile:g}"
    lines = [
        f"  {modelled(result):<12}{'dense':<12}pruned",
        f"  {'latency ' + percentile:<12}{in_ms(dense.at.value):<12}{in_ms(pruned.at.value):<12}{ratio}   budget "
        f"{result.budget}  {'MET' if result.met else 'MISSED'}   ({facts})",
        f"  {'':<12}{'':<12}{result.why}",
    ]
    if result.predicted_ms is not None:
        off = f"{result.predicted_ms / pruned.p50_ms - 1:+.1%}"
        lines.append(f"  {'predicted':<12}{modelled(result):<12}{in_ms(result.predicted_ms):<12}{off}")
    lines.append(f"  {'MACs':<12}{_millions(fitted.dense_macs):<12}{_millions(fitted.pruned_macs)}")
    for spent in (each.to_json() for each in fitted.choice.spent[1:]):
        lines.append(
            f"  {spent['of']:<12}{spent['dense']:<12g}{spent['predicted']:<12g}of {spent['limit']:g} {spent['unit']}"
        )
    lines += _quality_lines(result.quality)
    lines.append(f"  bundle: {result.bundle}")
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e6:.0f} M"


def _quality_lines(quality: Any) -> list[str]:
    if not quality:
        return ["  quality     no data given: nothing is claimed"]
    lines = []
    dense, pruned, engine = quality["dense"], quality["pruned"], quality.get("engine")
    if engine is not None:
        lines.append(f"  {'':<12}{'':<12}{'torch':<12}engine")
    for name, title in QUALITY.items():
        if pruned.get(name) is not None:
            line = f"  {title:<12}{_number(name, dense[name]):<12}{_number(name, pruned[name]):<12}"
            lines.append((line + (_number(name, engine[name]) if engine else "")).rstrip())
    few = ": a smoke test, no accuracy claim" if pruned["n"] < 1000 else ""
    fitted_on = len(quality["calibration"])
    lines.append(f"  {'':<12}on {pruned['n']} samples of the report half; fitted on the other {fitted_on}{few}")
    lines.append(f"  report half: {_names(quality['report'])}")
    lines.append(f"  fitted on:   {_names(quality['calibration'])}")
    if quality["skipped"]:
        lines.append(f"  skipped:     {len(quality['skipped'])}: {_names(quality['skipped'])}")
    return lines


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name in ("top1", "agreement") else f"{value:.3g}"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
