from __future__ import annotations

import math
from typing import Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import modelled_option, precision_option, reporter
from edgeprune.cli.timing import make_timing

EXAMPLE = "Example: edgeprune profile torchvision:mobilenet_v2 --shape 1x3x224x224 --device host-openvino --dry-run"


@click.command("profile", cls=rich_click.RichCommand, epilog=EXAMPLE)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--device", "device_name", required=True, metavar="NAME", help="An entry of devices.yaml.")
@precision_option
@click.option("--shape", default="1x3x224x224", show_default=True, help="One float32 input, for every MODEL.")
@click.option("--dry-run", is_flag=True, help="Tell how many kernels would be measured, and about how long it takes.")
@click.option("--warmup-ms", type=click.FloatRange(0), help="Of each kernel, untimed.  [default: 10]")
@click.option("--duration-s", type=click.FloatRange(0.1), help="At most this long a batch.  [default: 30]")
@click.option("--min-iters", type=click.IntRange(1), help="At least this many runs of each.  [default: 20]")
@click.option("--retry-failed", is_flag=True, help="Try kernels again that could not be measured before.")
@click.option("--wait", is_flag=True, help="Where another process writes the table, wait for it to end.")
@modelled_option
@json_option
def command(
    models: tuple[str, ...],
    device_name: str,
    precision: str | None,
    shape: str,
    dry_run: bool,
    retry_failed: bool,
    wait: bool,
    allow_modelled: bool,
    as_json: bool,
    **timing: int | float | None,
) -> None:
    """Measure kernels on a device into its latency table.

    Without a MODEL the kernels that show the device's staircase; with models also theirs, at sampled widths. What is in
    the table is not measured again; interrupted, the next run goes on.
    """
    from edgeprune.device import in_precision, load_device
    from edgeprune.measurement import KERNELS
    from edgeprune.profiling import estimate, profile
    from edgeprune.staircase import staircase_kernels
    from edgeprune.table import table_path
    from edgeprune.units import kernels

    device = in_precision(load_device(device_name, allow_modelled=allow_modelled), precision)
    graphs = [_graph(model, shape) for model in models]
    console = reporter()
    # the staircase first: it decides on which widths the models' kernels are sampled
    stairs = staircase_kernels(device.precisions[0])
    if dry_run:
        from edgeprune.preparing import known_steps

        steps = known_steps(device)
        wanted = {*stairs, *(kernel for graph in graphs for kernel in kernels(graph, device, steps))}
        found = estimate(sorted(wanted), device)
        document: dict[str, Any] = {
            "device": device.name,
            "kernels": found.total,
            "missing": len(found.missing),
            "estimated_seconds": round(found.seconds, 1),
            "origin": "modelled" if device.modelled else "measured",
        }
        doing = "model" if device.modelled else "measure"
        text = f"{len(found.missing)} of {found.total} kernels to {doing}, about {found.seconds:.0f} s"
    else:
        from edgeprune.preparing import measured_table

        pace = make_timing(**timing, base=KERNELS)  # type: ignore[arg-type]
        how: dict[str, Any] = {"timing": pace, "retry_failed": retry_failed, "wait_s": math.inf if wait else 0.0}
        profile(stairs, device, on_progress=_progress(console, device.name), **how)
        for graph in graphs:
            measured_table(graph, device, console, **how)
        table = profile(stairs, device)
        document = {
            "device": device.name,
            "precision": device.precisions[0],
            "table": str(table_path(device, device.precisions[0])),
            "kernels": len(table),
            "failures": {kernel.key: reason for kernel, reason in table.failures.items()},
            "origin": table.origin,
            "warnings": list(table.warnings),
        }
        text = f"{len(table)} kernels {table.origin}, {len(table.failures)} failed: {document['table']}"
    if as_json:
        print_json(document)
    else:
        click.echo(text)


def _graph(model: str, shape: str) -> Any:
    from edgeprune.graph import trace
    from edgeprune.models import example_inputs, resolve

    return trace(resolve(model), example_inputs(shape))


def _progress(console: Any, device: str) -> Any:
    return lambda done, total: console.progress(f"profiling {device}", done, total)
