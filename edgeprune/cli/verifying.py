from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import modelled_option
from edgeprune.cli.timing import make_timing, pair_lines, timing_options

if TYPE_CHECKING:
    from edgeprune.verifying import Verification

EXAMPLE = "Example: edgeprune verify build/mobilenet_v2-host-openvino --budget 0.7x"


@click.command("verify", cls=rich_click.RichCommand, epilog=EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--budget", metavar="8ms|120fps|0.6x", help="Instead of the manifest's.")
@click.option("--percentile", type=click.FloatRange(1, 99.9), help="Of the latency; the manifest's unless told.")
@click.option("--device", "device_name", metavar="NAME", help="An entry of devices.yaml; the manifest's unless told.")
@timing_options
@modelled_option
@json_option
def command(
    bundle: Path,
    budget: str | None,
    percentile: float | None,
    device_name: str | None,
    allow_modelled: bool,
    as_json: bool,
    **timing: int | float | None,
) -> int:
    """Check a bundle's files and outputs, and measure its latency here against its budget.

    The exit code is 0 when the budget is met or none is known, 3 when it is missed.
    """
    from edgeprune.benching import verify_bundle
    from edgeprune.device import load_device

    result = verify_bundle(
        bundle,
        budget=budget,
        percentile=percentile,
        device=load_device(device_name, allow_modelled=allow_modelled) if device_name else None,
        allow_modelled=allow_modelled,
        timing=make_timing(**timing),  # type: ignore[arg-type]
    )
    if as_json:
        print_json(result.to_json())
    else:
        click.echo("\n".join([f"{result.bundle} on {result.device}", *pair_lines(result), *_differences(result)]))
    return 3 if result.met is False else 0


def _differences(result: Verification) -> list[str]:
    """What is not as it was when the manifest was written, and what that means."""
    if not result.differences:
        return []
    told = [f"  differs     {difference}" for difference in result.differences]
    hint = "the manifest's latency is that of another machine or version: this one's is above; rebuild.sh makes"
    return [*told, f"              {hint}", "              the engine again with what is here"]
