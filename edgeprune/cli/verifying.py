from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import lock_option, modelled_option
from edgeprune.cli.timing import make_timing, pair_lines, timing_options

if TYPE_CHECKING:
    from edgeprune.device import Device
    from edgeprune.verifying import Verification

EXAMPLE = "Example: edgeprune verify build/mobilenet_v2-host-openvino --budget 0.7x"

MIN_QUALITY = "top1:0.9, agreement:0.95 (with the dense engine), kl:0.1, or a number: top1 with labels."


@click.command("verify", cls=rich_click.RichCommand, epilog=EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--budget", metavar="8ms|120fps|0.6x", help="Instead of the manifest's.")
@click.option("--percentile", type=click.FloatRange(1, 99.9), help="Of the latency; the manifest's unless told.")
@click.option("--device", "device_name", metavar="NAME", help="An entry of devices.yaml; the manifest's unless told.")
@click.option("--data", metavar="FOLDER|CSV|NPZ|pkg.mod:loader", help="What --min-quality is judged on.")
@click.option("--min-quality", "least", metavar="METRIC:VALUE", help=MIN_QUALITY)
@timing_options
@modelled_option
@lock_option
@json_option
def command(
    bundle: Path,
    budget: str | None,
    percentile: float | None,
    device_name: str | None,
    data: str | None,
    least: str | None,
    allow_modelled: bool,
    lock_clocks: bool,
    as_json: bool,
    **timing: int | float | None,
) -> int:
    """Check a bundle's files and outputs, and measure its latency here against its budget.

    The exit code is 0 when the budget is met or none is known, 3 when it is missed, 7 when the engine answers worse
    than its torch module or than --min-quality.
    """
    from edgeprune.benching import verify_bundle
    from edgeprune.device import load_device

    device = load_device(device_name, allow_modelled=allow_modelled) if device_name else None
    quality = _judged(bundle, data, least, device) if data or least else {}
    result = verify_bundle(
        bundle,
        budget=budget,
        percentile=percentile,
        device=device,
        allow_modelled=allow_modelled,
        lock_clocks=lock_clocks,
        timing=make_timing(**timing),  # type: ignore[arg-type]
    )
    if as_json:
        print_json({**result.to_json(), **({"judged": quality} if quality else {})})
    else:
        found = [f"  {name:<12}{value:.4g}" for name, value in quality.items() if value is not None]
        lines = [*pair_lines(result), *found, *_differences(result)]
        click.echo("\n".join([f"{result.bundle} on {result.device}", *lines]))
    return 3 if result.met is False else 0


def _differences(result: Verification) -> list[str]:
    """What is not as it was when the manifest was written, and what that means."""
    if not result.differences:
        return []
    told = [f"  differs     {difference}" for difference in result.differences]
    hint = "the manifest's latency is that of another machine or version: this one's is above; rebuild.sh makes"
    return [*told, f"              {hint}", "              the engine again with what is here"]


def _judged(bundle: Path, data: str | None, least: str | None, device: Device | None) -> dict[str, float | int | None]:
    from edgeprune.gating import parse_min_quality, quality_of_bundle

    wanted = parse_min_quality(least) if least else None
    if data is None:
        assert wanted is not None
        wanted.named(None)
    quality, judged_on = quality_of_bundle(bundle, str(data), device=device)
    if wanted is not None:
        wanted.named(judged_on).check(quality)
    return quality.to_json()
