from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import click
import rich_click

import edgeprune
from edgeprune.cli.output import json_option, print_json
from edgeprune.device_checks import Check
from edgeprune.errors import DeviceError, EdgepruneError, UsageError, install_line
from edgeprune.folders import cache_dir, config_dir


@click.command("doctor", cls=rich_click.RichCommand, epilog="Example: edgeprune doctor --device jetson --self-test")
@click.option("--device", "device_name", metavar="NAME", help="Look at this device instead, over there.")
@click.option("--self-test", is_flag=True, help="Run a few small kernels there through its real runtime.")
@json_option
@click.pass_context
def command(context: click.Context, device_name: str | None, self_test: bool, as_json: bool) -> None:
    """Show what is installed, what is missing and the line that mends it: here, or on a device.

    Exit code 1 when something is wrong that every command needs; a missing runtime alone is no failure. Of a device: 4
    when it can't be reached, 5 when its runtime is missing.
    """
    if device_name is not None:
        checks = list(_device(device_name, self_test))
    elif self_test:
        raise UsageError("--self-test runs on a device: name it with --device")
    else:
        checks = [*_machine(), *_packages(), *_folders(), *_links()]
        if not any(check.fix for check in checks if check.required):
            checks += [*_backends(), *_devices()]
    broken = [check for check in checks if check.required and check.fix]
    if as_json:
        print_json({"ok": not broken, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = "ok" if check.fix is None else "BROKEN" if check.required else check.word
            text = "; ".join(part for part in (check.found, check.fix) if part)
            click.echo(f"{mark:<7}  {check.name:<{width}}  {text}")
    context.exit(broken[0].exit_code if broken else 0)


def _device(name: str, with_self_test: bool) -> Iterator[Check]:
    """From the entry to the last kernel; what comes after a thing that everything else needs is left out."""
    from edgeprune.device import check_modelled, find_device
    from edgeprune.device_checks import entry_checks, reached_checks, table_check
    from edgeprune.device_probe import probe
    from edgeprune.self_test import self_test

    device = find_device(name)
    try:
        check_modelled(device, False, asked=name)
    except DeviceError as error:
        yield from entry_checks(device, str(error))
        return
    yield from entry_checks(device, None)
    try:
        found = probe(device)
    except EdgepruneError as error:
        yield Check(name="reached", found=None, fix=str(error), required=True, exit_code=error.exit_code)
        return
    yield from reached_checks(found)
    runtime = found.runtimes[device.backend]
    if runtime.version is None:
        return
    yield from (table_check(device, precision, runtime.hello) for precision in device.precisions[:1])
    if with_self_test:
        yield from self_test(device)


def _machine() -> Iterator[Check]:
    yield Check(name="python", found=platform.python_version())
    yield Check(name="platform", found=platform.platform())
    yield Check(name="cpu", found=f"{_cpu_model()}, {len(os.sched_getaffinity(0))} CPUs usable")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return models[0] if models else platform.machine()


def _packages() -> Iterator[Check]:
    """One line for each package that edgeprune needs, then one for each extra; the lists are pyproject.toml's."""
    extras: dict[str, list[str]] = {}
    own = _version("edgeprune")
    yield Check(name="edgeprune", found=own, fix=None if own else "pip install -e .", required=True)
    for requirement in (metadata.requires("edgeprune") if own else None) or []:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement):
            extras.setdefault(extra[1], []).append(name)
        else:
            found = _version(name)
            yield Check(name=name, found=found, fix=None if found else f"pip install {name}", required=True)
    for extra_name, names in extras.items():
        found = ", ".join(f"{name} {version}" for name in names if (version := _version(name)))
        fix = None if all(map(_version, names)) else install_line(extra_name)
        yield Check(name=f"[{extra_name}]", found=found or None, fix=fix)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _folders() -> Iterator[Check]:
    for kind, folder in (("cache", cache_dir()), ("config", config_dir())):
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        fix = None if writable else f"{there} is not writable; set EDGEPRUNE_{kind.upper()}_DIR"
        yield Check(name=f"{kind} folder", found=str(folder), fix=fix, required=kind == "cache")


def _links() -> Iterator[Check]:
    """In a clone these are relative links, which some ways of copying lose."""
    for name in ("backends", "latency_tables", "devices.yaml"):
        path = Path(edgeprune.__file__).with_name(name)
        whole = path.is_file() if path.suffix else path.is_dir()
        fix = None if whole else f"{path} must be a link to ../{name}: clone with git -c core.symlinks=true"
        yield Check(name=name, found=str(path.resolve()) if whole else None, fix=fix, required=True)


def _backends() -> Iterator[Check]:
    from edgeprune.backends import backend_names, find_backend

    for name in backend_names():
        backend = find_backend(name)
        fix = backend.available()
        found = None if fix else backend.version() or "available"
        yield Check(name=f"backend {name}", found=f"{found}, modelled" if backend.modelled else found, fix=fix)


def _devices() -> Iterator[Check]:
    from edgeprune.device import load_devices

    try:
        yield Check(name="devices", found=", ".join(load_devices()), required=True)
    except EdgepruneError as error:
        yield Check(name="devices", found=None, fix=str(error), required=True)
