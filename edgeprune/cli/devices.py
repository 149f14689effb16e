from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json

if TYPE_CHECKING:
    from edgeprune.device import Device


@click.group(
    "devices",
    cls=rich_click.RichGroup,
    invoke_without_command=True,
    epilog="Example: edgeprune devices add jetson --host me@orin",
)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the devices of devices.yaml; show, add, probe and remove one.

    Numbers of a *modelled* device come from a formula, those of the others are measured. One that has no host yet is
    known by its data sheet alone, which --allow-modelled takes.
    """
    if context.invoked_subcommand is None:
        _list(as_json)


def _command(name: str, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    return command.command(name, cls=rich_click.RichCommand, epilog=f"Example: edgeprune devices {name} {example}")


@_command("list", "--json")
@json_option
def list_command(as_json: bool) -> None:
    """List the devices of devices.yaml and whether they can run here."""
    _list(as_json)


@_command("show", "jetson")
@click.argument("name")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Show an entry as it stands in its file: presets are there to be copied."""
    from edgeprune.device import SHIPPED, find_device
    from edgeprune.device_entries import entry_text, is_own, own_file

    device = find_device(name)
    file = own_file() if is_own(device.name) else SHIPPED
    if as_json:
        entry = device.model_dump(mode="json", exclude_defaults=True)
        print_json({"name": device.name, "file": str(file), "own": is_own(device.name), **_row(device), "entry": entry})
        return
    click.echo(f"# {file}")
    click.echo(entry_text(device.name), nl=False)
    if not device.at_hand:
        click.echo(f"# no way to it yet: edgeprune devices add {name} --host USER@HOST")


@_command("add", "jetson --host me@orin --set power_mode=MAXN")
@click.argument("name")
@click.option("--like", metavar="PRESET", help="The entry to copy.  [default: the preset called NAME]")
@click.option("--host", metavar="USER@HOST", help="How ssh reaches it: a name of ~/.ssh/config, host or user@host.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A key of the entry and its value as YAML.")
@json_option
def add_command(name: str, like: str | None, host: str | None, pairs: tuple[str, ...], as_json: bool) -> None:
    """Write an entry into your devices.yaml, or change keys of one that is there.

    Comments and order of the file stay; nothing is written that would have a fault.
    """
    from edgeprune.device_entries import add_entry, entry_text, own_file, parse_settings

    device = add_entry(name, like=like, host=host, settings=parse_settings(pairs))
    if as_json:
        print_json({"name": device.name, "file": str(own_file()), **_row(device)})
        return
    click.echo(f"# {own_file()}")
    click.echo(entry_text(name), nl=False)
    if device.at_hand:
        click.echo(f"# next: edgeprune doctor --device {name}")
    else:
        click.echo(f"# no way to it yet: edgeprune devices add {name} --host USER@HOST")


@_command("remove", "jetson")
@click.argument("name")
@json_option
def remove_command(name: str, as_json: bool) -> None:
    """Take an entry out of your devices.yaml; what was measured on it stays."""
    from edgeprune.device_entries import own_file, remove_entry

    remove_entry(name)
    if as_json:
        print_json({"removed": name, "file": str(own_file())})
    else:
        click.echo(f"removed '{name}' from {own_file()}")


@_command("probe", "jetson")
@click.argument("name")
@json_option
def probe_command(name: str, as_json: bool) -> None:
    """Ask a device what it is and in what state: model, memory, clocks, temperature, which runtimes it has.

    Exit code 4 when it can't be reached; a runtime that is missing there is told, and no failure.
    """
    from edgeprune.device import load_device
    from edgeprune.device_probe import probe, probe_lines

    found = probe(load_device(name))
    if as_json:
        print_json(found.to_json())
    else:
        click.echo("\n".join(probe_lines(found)))


def _list(as_json: bool) -> None:
    from edgeprune.device import load_devices

    rows = [_row(device) for device in load_devices().values()]
    if as_json:
        print_json({"devices": rows})
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        origin = "modelled" if row["modelled"] else "measured"
        click.echo(f"{row['name']:<{width}}  {origin}  {_state(row)}".rstrip())


def _state(row: dict[str, Any]) -> str:
    if not row["at_hand"]:
        modelled = ", or modelled from its data sheet: --allow-modelled" if row["allow_modelled"] else ""
        return f"no host    edgeprune devices add {row['name']} --host USER@HOST{modelled}"
    if row["transport"] != "local":
        return f"{row['transport']:<9}  {row['backend']} on {row['host'] or row['serial'] or 'the one plugged in'}"
    mark = "available" if row["available"] else "missing  "
    return f"{mark}  {row['fix'] or ' '.join(filter(None, (row['backend'], row['version'])))}"


def _row(device: Device) -> dict[str, Any]:
    """`available` and `fix` are about this machine, and null for a device that is not."""
    from edgeprune.modelled import backend_of

    backend = backend_of(device)
    here = device.transport == "local" or device.roofline is not None
    fix = backend.available() if here else None
    return {
        "name": device.name,
        "description": device.description,
        "backend": device.backend,
        "transport": device.transport,
        "host": device.host,
        "serial": device.serial,
        "at_hand": device.at_hand,
        "modelled": device.modelled,
        "allow_modelled": device.roofline is not None,
        "available": fix is None if here else None,
        "version": None if fix or device.roofline or not here else backend.version(),
        "fix": fix,
    }
