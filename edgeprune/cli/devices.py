from __future__ import annotations

import click
import rich_click

from edgeprune.backends import find_backend
from edgeprune.cli.output import json_option, print_json
from edgeprune.device import Device, load_devices


@click.command("devices", cls=rich_click.RichCommand, epilog="Example: edgeprune devices --json")
@json_option
def command(as_json: bool) -> None:
    """List the devices of devices.yaml and whether they can run here.

    Numbers of a *modelled* device come from a formula, those of the others are measured.
    """
    rows = [_row(device) for device in load_devices().values()]
    if as_json:
        print_json({"devices": rows})
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        origin = "modelled" if row["modelled"] else "measured"
        mark = "available" if row["available"] else "missing  "
        state = row["fix"] or f"{row['backend']} {row['version'] or ''}"
        click.echo(f"{row['name']:<{width}}  {origin}  {mark}  {state}".rstrip())


def _row(device: Device) -> dict[str, object]:
    backend = find_backend(device.backend)
    fix = backend.available()
    return {
        "name": device.name,
        "description": device.description,
        "backend": device.backend,
        "modelled": device.modelled,
        "available": fix is None,
        "version": None if fix else backend.version(),
        "fix": fix,
    }
