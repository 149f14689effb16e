from __future__ import annotations

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.device import Device, load_devices
from edgeprune.modelled import backend_of


@click.command("devices", cls=rich_click.RichCommand, epilog="Example: edgeprune devices --json")
@json_option
def command(as_json: bool) -> None:
    """List the devices of devices.yaml and whether they can run here.

    Numbers of a *modelled* device come from a formula, those of the others are measured. Those that take
    --allow-modelled are known by their data sheets alone.
    """
    rows = [_row(device) for device in load_devices().values()]
    if as_json:
        print_json({"devices": rows})
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        origin = "modelled" if row["modelled"] else "measured"
        mark = "available" if row["available"] else "missing  "
        state = str(row["fix"] or f"{row['backend']} {row['version'] or ''}".rstrip())
        if row["allow_modelled"]:
            state += ", by its data sheet: --allow-modelled"
        click.echo(f"{row['name']:<{width}}  {origin}  {mark}  {state}".rstrip())


def _row(device: Device) -> dict[str, object]:
    backend = backend_of(device)
    fix = backend.available()
    return {
        "name": device.name,
        "description": device.description,
        "backend": device.backend,
        "modelled": device.modelled,
        "allow_modelled": device.roofline is not None,
        "available": fix is None,
        "version": None if fix or device.roofline else backend.version(),
        "fix": fix,
    }
