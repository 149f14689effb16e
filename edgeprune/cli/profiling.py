from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import device_of, lock_option, modelled_option, precision_option, reporter
from edgeprune.cli.timing import make_timing

if TYPE_CHECKING:
    from edgeprune.device import Device
    from edgeprune.forecasting import Forecast
    from edgeprune.preparing import Reporter
    from edgeprune.table import LatencyTable

EXAMPLE = "Example: edgeprune profile torchvision:mobilenet_v2 --shape 1x3x224x224 --device host-openvino --dry-run"


@click.command("profile", cls=rich_click.RichCommand, epilog=EXAMPLE)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--device",
    "device_names",
    required=True,
    multiple=True,
    metavar="NAME",
    help="An entry of devices.yaml; several are measured at once.",
)
@precision_option
@click.option("--shape", default="1x3x224x224", show_default=True, help="One float32 input, for every MODEL.")
@click.option("--dry-run", is_flag=True, help="Tell how many kernels would be measured, and about how long it takes.")
@click.option("--warmup-ms", type=click.FloatRange(0), help="Of each kernel, untimed.  [default: 10]")
@click.option("--duration-s", type=click.FloatRange(0.1), help="At most this long a batch.  [default: 30]")
@click.option("--min-iters", type=click.IntRange(1), help="At least this many runs of each.  [default: 20]")
@click.option("--retry-failed", is_flag=True, help="Try kernels again that could not be measured before.")
@click.option("--wait", is_flag=True, help="Where another process has the table or device, wait for it.")
@modelled_option
@lock_option
@json_option
def command(
    models: tuple[str, ...],
    device_names: tuple[str, ...],
    precision: str | None,
    shape: str,
    dry_run: bool,
    retry_failed: bool,
    wait: bool,
    allow_modelled: bool,
    lock_clocks: bool,
    as_json: bool,
    **timing: int | float | None,
) -> None:
    """Measure kernels on a device into its latency table, or on several at once.

    Without a MODEL the kernels that show the device's staircase; with models also theirs, at sampled widths. What is in
    the table is not measured again; interrupted, the next run goes on.
    """
    from edgeprune.measurement import KERNELS

    devices = [
        device_of(name, precision=precision, allow_modelled=allow_modelled, lock_clocks=lock_clocks)
        for name in device_names
    ]
    names = [device.name for device in devices]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise click.UsageError(f"device '{twice[0]}' is given twice")
    graphs = [_graph(model, shape) for model in models]
    if dry_run:
        from edgeprune.forecasting import forecast

        foreseen = {device.name: forecast(graphs, device, retry_failed=retry_failed) for device in devices}
        documents = [forecast_document(foreseen[device.name], device) for device in devices]
        lines = [forecast_lines(foreseen[device.name], device) for device in devices]
    else:
        pace = make_timing(**timing, base=KERNELS)  # type: ignore[arg-type]
        how = {"timing": pace, "retry_failed": retry_failed, "wait_s": math.inf if wait else 0.0}
        documents = measured_documents(graphs, devices, how)
        lines = [[_summary(document)] for document in documents]
    if as_json:
        print_json(documents[0] if len(documents) == 1 else {"devices": documents})
        return
    for device, told in zip(devices, lines, strict=True):
        click.echo("\n".join(told if len(devices) == 1 else [f"{device.name}: {line}" for line in told]))


def measured_documents(graphs: list[Any], devices: list[Device], how: dict[str, Any]) -> list[dict[str, Any]]:
    """One document a device. Where some fail the others go on, and the error then tells of all of them."""
    from edgeprune.at_once import at_once
    from edgeprune.errors import EdgepruneError

    console = reporter()
    if len(devices) == 1:
        return [_document(_measured(graphs, devices[0], console, **how), devices[0])]

    here = Lock()  # devices that are this machine would disturb one another

    def work(device: Device) -> Callable[[], dict[str, Any]]:
        def measured() -> dict[str, Any]:
            with nullcontext() if device.remote or device.modelled else here:
                return _document(_measured(graphs, device, console.view(device.name), **how), device)

        return measured

    found = at_once({device.name: work(device) for device in devices})
    failed = [outcome for outcome in found.values() if isinstance(outcome, EdgepruneError)]
    if not failed:
        return [outcome for outcome in found.values() if not isinstance(outcome, EdgepruneError)]
    told = [
        f"{name}: {outcome if isinstance(outcome, EdgepruneError) else _summary(outcome)}"
        for name, outcome in found.items()
    ]
    raise type(failed[0])("\n  ".join([f"{len(failed)} of {len(devices)} devices failed", *told]))


def _summary(document: dict[str, Any]) -> str:
    failures = len(document["failures"])
    return f"{document['kernels']} kernels {document['origin']}, {failures} failed: {document['table']}"


def _measured(graphs: list[Any], device: Device, console: Reporter, **how: Any) -> LatencyTable:
    """The staircase first: it decides on which widths the models' kernels are sampled."""
    from edgeprune.profiling import profile
    from edgeprune.staircase import staircase_kernels
    from edgeprune.table import with_warnings

    stairs = staircase_kernels(device.precisions[0])
    first = profile(stairs, device, on_progress=_progress(console, device.name), **how)
    tables = [first]
    if graphs:
        from edgeprune.preparing import measured_table

        tables += [measured_table(graph, device, console, **how) for graph in graphs]
    else:
        for warning in first.warnings:
            console.say(f"warning: {warning}")
    done = profile(stairs, device, wait_s=how.get("wait_s", 0.0))
    told = dict.fromkeys(warning for table in tables for warning in table.warnings)
    return with_warnings(done, (warning for warning in told if warning not in done.warnings))


def _document(table: LatencyTable, device: Device) -> dict[str, Any]:
    from edgeprune.table import table_path

    return {
        "device": device.name,
        "precision": device.precisions[0],
        "table": str(table_path(device, device.precisions[0])),
        "kernels": len(table),
        "failures": {kernel.key: reason for kernel, reason in table.failures.items()},
        "origin": table.origin,
        "warnings": list(table.warnings),
    }


def forecast_document(found: Forecast, device: Device) -> dict[str, Any]:
    """Keys of `profile --dry-run --json`; null where it is not known before measuring."""
    return {
        "device": device.name,
        "precision": device.precisions[0],
        "kernels": found.grid,
        "missing": len(found.missing),
        "by_need": {
            "next": None if found.following is None else len(found.following),
            "expected": found.expected,
            "at_most": found.at_most,
        },
        "estimated_seconds": round(found.seconds, 1),
        "most_seconds": round(found.most_seconds, 1),
        "paced_by": found.paced_by,
        "unknown": list(found.unknown),
        "origin": "modelled" if device.modelled else "measured",
    }


def forecast_lines(found: Forecast, device: Device) -> list[str]:
    """What is certain, what is expected, how long it takes, and what is not known, for a person."""
    doing = "model" if device.modelled else "measure"
    lines = [f"{len(found.missing)} of {found.grid} kernels of the first grid to {doing}"]
    if found.expected is None:
        lines.append(f"then by need: at most {found.at_most}")
    elif found.expected:
        after = "" if found.following is None else f"{len(found.following)} next, "
        lines.append(f"then by need: {after}about {found.expected} in all, at most {found.at_most}")
    time = f"about {_duration(found.seconds)}"
    if found.at_most:
        time += f", at most {_duration(found.most_seconds)}"
    how = f"at the pace of {found.paced_by} kernels in the table" if found.paced_by else "guessed"
    lines.append(time if device.modelled else f"{time} ({how})")
    return lines + [f"not known: {text}" for text in found.unknown]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _graph(model: str, shape: str) -> Any:
    from edgeprune.graph import trace
    from edgeprune.models import example_inputs, resolve

    return trace(resolve(model), example_inputs(shape))


def _progress(console: Any, device: str) -> Any:
    return lambda done, total: console.progress(f"profiling {device}", done, total)
