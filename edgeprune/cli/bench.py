from __future__ import annotations

from pathlib import Path

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import lock_option, modelled_option
from edgeprune.cli.timing import make_timing, pair_lines, timing_options

EXAMPLE = "Example: edgeprune bench build/resnet18-host-openvino build/resnet50-host-openvino --json"


@click.command("bench", cls=rich_click.RichCommand, epilog=EXAMPLE)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--percentile", type=click.FloatRange(1, 99.9), default=50.0, show_default=True, help="Of the ratio.")
@click.option("--device", "device_name", metavar="NAME", help="An entry of devices.yaml; the manifest's unless told.")
@timing_options
@modelled_option
@lock_option
@json_option
def command(
    bundles: tuple[Path, ...],
    percentile: float,
    device_name: str | None,
    allow_modelled: bool,
    lock_clocks: bool,
    as_json: bool,
    **timing: int | float | None,
) -> None:
    """Time bundles side by side: all engines, dense and pruned, interleaved in the same processes.

    With --json, one bundle gives its document, several give {"bundles": [..]}.
    """
    from edgeprune.benching import bench
    from edgeprune.device import load_device

    device = load_device(device_name, allow_modelled=allow_modelled) if device_name else None
    results = bench(
        bundles,
        device=device,
        percentile=percentile,
        allow_modelled=allow_modelled,
        lock_clocks=lock_clocks,
        timing=make_timing(**timing),  # type: ignore[arg-type]
    )
    if as_json:
        documents = [result.to_json() for result in results]
        print_json(documents[0] if len(documents) == 1 else {"bundles": documents})
        return
    for result in results:
        click.echo("\n".join([f"{result.bundle} on {result.device}", *pair_lines(result)]))
