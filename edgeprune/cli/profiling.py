from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json

if TYPE_CHECKING:
    from edgeprune.kernel import Kernel
    from edgeprune.measurement import Timing

EXAMPLE = "Example: edgeprune profile --device host-openvino --kernels kernels.json --dry-run"


@click.command("profile", cls=rich_click.RichCommand, epilog=EXAMPLE)
@click.option("--device", "device_name", required=True, metavar="NAME", help="An entry of devices.yaml.")
@click.option(
    "--kernels", "kernels_file", type=click.Path(path_type=Path), metavar="FILE.json", help="A list of kernels."
)
@click.option("--table", type=click.Path(path_type=Path), metavar="FILE", help="Instead of the one in the cache.")
@click.option("--allow-other-table", is_flag=True, help="Use a table that was measured on another machine.")
@click.option("--retry-failed", is_flag=True, help="Try kernels again that failed before.")
@click.option("--dry-run", is_flag=True, help="Say how many would be measured and how long it would take.")
@click.option("--warmup-ms", type=click.FloatRange(0), help="Of each kernel, untimed.  [default: 10]")
@click.option("--duration-s", type=click.FloatRange(0.1), help="Of a batch of 8, at most.  [default: 30]")
@click.option("--min-iters", type=click.IntRange(1), help="Timed runs of each burst, at least.  [default: 4]")
@json_option
def command(
    device_name: str,
    kernels_file: Path | None,
    table: Path | None,
    allow_other_table: bool,
    retry_failed: bool,
    dry_run: bool,
    as_json: bool,
    **timing: float | None,
) -> None:
    """Measure kernels on a device into its latency table; what is there already is not measured again.

    Without --kernels: the standard suite. A run that was interrupted or killed goes on where it stopped.
    """
    from edgeprune.cli.progress import Console
    from edgeprune.device import load_device
    from edgeprune.profiling import estimate, profile

    device = load_device(device_name)
    kernels = _kernels(kernels_file, device.precisions[0])
    if dry_run:
        told = estimate(kernels, device, table_path=table)
        missing = len(told.missing)
        if as_json:
            listed = [kernel.key for kernel in told.missing]
            print_json({"kernels": told.total, "missing": missing, "seconds": round(told.seconds, 1), "keys": listed})
        else:
            click.echo(f"{missing} of {told.total} kernels to measure, about {told.seconds:.0f} s")
        return
    console = Console()
    measured = profile(
        kernels,
        device,
        table_path=table,
        on_progress=lambda done, total: console.progress(f"profiling {device.name}", done, total),
        allow_other=allow_other_table,
        retry_failed=retry_failed,
        timing=_timing(**timing),
    )
    for warning in measured.warnings:
        console.say(f"warning: {warning}")
    failed = {kernel.key: measured.failures[kernel] for kernel in kernels if kernel in measured.failures}
    for key, reason in failed.items():
        console.say(f"warning: {key}: skipped, {reason}")
    there = sum(kernel in measured for kernel in kernels)
    if as_json:
        facts = {"device": device.name, "fingerprint": measured.fingerprint, "origin": measured.origin}
        print_json(
            facts | {"kernels": len(kernels), "in_table": there, "failed": failed, "warnings": measured.warnings}
        )
    else:
        click.echo(f"{there} of {len(kernels)} kernels in the table of {device.name} ({measured.origin})")


def _kernels(file: Path | None, precision: str) -> list[Kernel]:
    from edgeprune.errors import InputError
    from edgeprune.kernel import Kernel
    from edgeprune.units import staircase_kernels

    if file is None:
        return list(staircase_kernels(precision))
    try:
        documents: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=file) from None
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", file=file) from None
    if not isinstance(documents, list):
        raise InputError(
            'expected a list of kernels, such as [{"operator": "linear", "c_in": 8, "c_out": 8}]', file=file
        )
    kernels = []
    for number, document in enumerate(documents, 1):
        try:
            if not isinstance(document, dict):
                raise ValueError(f"expected an object, found {document!r}")
            kernels.append(Kernel.from_json(document))
        except ValueError as error:
            raise InputError(str(error), file=file, place=f"kernel {number}") from None
        if kernels[-1].precision != precision:
            message = f"'{kernels[-1].key}' is not of the device's precision {precision}"
            raise InputError(message, file=file, place=f"kernel {number}")
    return kernels


def _timing(warmup_ms: float | None, duration_s: float | None, min_iters: float | None) -> Timing:
    from edgeprune.measurement import KERNELS

    given = {
        "warmup_ms": warmup_ms,
        "max_seconds": duration_s,
        "min_runs": None if min_iters is None else int(min_iters),
    }
    return replace(KERNELS, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
