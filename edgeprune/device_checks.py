"""What could be wrong with a device, each with the line that mends it. Judges what `device_probe` was told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.device import Device
    from edgeprune.device_probe import Probe

LITTLE_DISK_MB = 500
LITTLE_MEMORY_MB = 900


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the doctor's. With `fix` something is wrong: broken if `required`, else a `word` for it."""

    name: str
    found: str | None  # None: missing
    fix: str | None = None  # what to do; None when all is well
    required: bool = False
    word: str = "missing"
    exit_code: int = 1  # of a required one


def entry_checks(device: Device, unreachable: str | None) -> Iterator[Check]:
    """The entry alone, before anything is tried; `unreachable` says why there is no way to it."""
    to = device.host or device.serial or ("the one plugged in" if device.transport == "adb" else "no host")
    where = "this machine" if device.transport == "local" else f"{device.transport}, {to}"
    yield Check(
        name="entry",
        found=f"{device.name}: {where}, {device.backend}, {', '.join(device.precisions)}",
        fix=unreachable,
        required=True,
        exit_code=4,
    )


def reached_checks(found: Probe) -> Iterator[Check]:
    """Everything that a device that answered tells of itself."""
    hello, facts = found.hello, found.facts
    board = facts.get("board") or hello.get("platform")
    yield Check(name="reached", found=f"{board}, Python {hello.get('python')}", required=True)
    yield from _architecture(found)
    yield from _runtimes(found)
    yield from _numpy(found)
    yield from _capability(found)
    yield from _power(found)
    yield from _slowed(found)
    yield from _room(found)


def _architecture(found: Probe) -> Iterator[Check]:
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(told := str(found.hello.get("cpu", {}).get("machine")), told)
    wanted = found.device.arch
    fix = None
    if wanted is not None and machine != wanted:
        more = " (a 32 bit system on a 64 bit board: install the 64 bit one)" if machine == "armv7l" else ""
        fix = f"the entry says {wanted}{more}: {_set(found.device, f'arch={machine}')}, if that is the device you meant"
    yield Check(name="architecture", found=machine, fix=fix, word="differs")


def _runtimes(found: Probe) -> Iterator[Check]:
    device = found.device
    there = [name for name, runtime in found.runtimes.items() if runtime.version is not None]
    for name, runtime in found.runtimes.items():
        primary = name == device.backend
        fix = None
        if runtime.version is None:
            fix = runtime.missing_with_fix
            if primary and there:
                fix += f"; or take the one that is there: {_set(device, f'backend={there[0]}')}"
        yield Check(
            name=f"runtime {name}", found=runtime.version, fix=fix, required=primary, word="missing", exit_code=5
        )


def _numpy(found: Probe) -> Iterator[Check]:
    """tflite-runtime stopped at 2.14, which was compiled against numpy 1."""
    packages = found.state.get("packages", {})
    if "tflite" not in found.runtimes or "numpy" not in packages:
        return
    old = "tflite-runtime" in packages and "ai-edge-litert" not in packages
    fix = None
    if old and int(re.match(r"\d*", packages["numpy"])[0] or 0) >= 2:  # type: ignore[index]
        fix = f"tflite-runtime {packages['tflite-runtime']} can't use numpy 2: pip install 'numpy<2' there"
    yield Check(name="numpy", found=packages["numpy"], fix=fix, required=fix is not None, exit_code=5)


def _capability(found: Probe) -> Iterator[Check]:
    device = found.device
    accelerators = [runtime.hello.get("accelerator") or {} for runtime in found.runtimes.values()]
    told = next(
        (each["compute_capability"] for each in [*accelerators, found.facts] if "compute_capability" in each), None
    )
    if told is None or device.compute_capability is None:
        return
    fix = None
    if told != device.compute_capability:
        sparse = "true" if float(told) >= 8.0 else "false"
        fix = (
            f"the entry says {device.compute_capability}: {_set(device, f'compute_capability={told}')}, sparse={sparse}"
        )
    yield Check(name="compute capability", found=told, fix=fix, word="differs")


def _power(found: Probe) -> Iterator[Check]:
    facts, wanted = found.facts, found.device.power_mode
    if "power_mode" in facts or wanted:
        mode, fix = facts.get("power_mode"), None
        if wanted and mode != wanted:
            fix = (
                f"the entry is meant for {wanted}: on the device `sudo nvpmodel -m ID` (IDs: grep POWER_MODEL "
                f"/etc/nvpmodel.conf); or {_set(found.device, f'power_mode={mode or chr(39) * 2}')}"
            )
        yield Check(name="power mode", found=mode, fix=fix, word="differs")
    if "governor" in facts:
        # with intel_pstate and amd-pstate powersave is the ordinary one, which goes up to every clock
        slow = facts["governor"] == "powersave" and "pstate" not in facts.get("cpufreq_driver", "")
        fix = "holds the lowest clock: measure with --lock-clocks, or run `sudo cpupower frequency-set -g performance`"
        yield Check(name="governor", found=facts["governor"], fix=fix if slow else None, word="slow")


def _slowed(found: Probe) -> Iterator[Check]:
    state = found.state.get("state", {})
    shown = ", ".join(
        f"{state[name]:g} {unit}"
        for name, unit in (
            ("clock_mhz", "MHz"),
            ("gpu_clock_mhz", "MHz GPU"),
            ("temperature_c", "°C"),
            ("power_w", "W"),
        )
        if name in state
    )
    now, before = list(found.state.get("slowed", ())), list(found.state.get("slowed_before", ()))
    fix = None
    if now:
        fix = f"slowed down right now by {'; '.join(now)}: {_remedy(now)}"
    elif before:
        fix = f"was slowed down since it was switched on, by {'; '.join(before)}: {_remedy(before)}"
    yield Check(name="clocks and heat", found=shown or None, fix=fix, word="slow")


def _remedy(reasons: list[str]) -> str:
    text = " ".join(reasons)
    remedies = []
    if "voltage" in text or "over-current" in text:
        remedies.append("a stronger power supply and a short, thick cable, or a smaller power mode")
    if re.search("heat|thermal|temperature|throttled", text):
        remedies.append("a fan or heat sink, and let it cool down before measuring")
    if "cap" in text:
        remedies.append("raise its power limit, or measure at a lower, held clock (--lock-clocks)")
    return "; ".join(remedies) or "find out why before measuring"


def _room(found: Probe) -> Iterator[Check]:
    if "disk_free_mb" in found.state:
        free = int(found.state["disk_free_mb"])
        fix = f"free some of it: models and engines need about {LITTLE_DISK_MB} MB in {found.state.get('folder')}"
        yield Check(name="disk", found=f"{free} MB free", fix=fix if free < LITTLE_DISK_MB else None, word="little")
    if "memory_mb" in found.facts:
        memory = int(found.facts["memory_mb"])
        fix = "engines of larger models may not build: add swap (zram), or build one at a time"
        yield Check(name="memory", found=f"{memory} MB", fix=fix if memory < LITTLE_MEMORY_MB else None, word="little")


def table_check(device: Device, precision: str, hello: Mapping[str, Any]) -> Check:
    """Whether the device's latency table is that of the device as it is today."""
    from edgeprune.errors import TableError
    from edgeprune.fingerprint import fingerprint_of
    from edgeprune.table import read_table, staleness, table_paths

    name, line = f"table {precision}", f"edgeprune profile --device {device.name}"
    own = fingerprint_of(device, precision, hello)
    paths = table_paths(device, precision, own.short_hash)
    try:
        table = read_table(paths, own.short_hash, allow_other=True)
    except TableError as error:
        return Check(name=name, found=None, fix=str(error))
    if not len(table):
        return Check(name=name, found=None, fix=f"nothing is measured yet: {line}", word="none")
    found = (
        f"{len(table)} kernels, last measured {table.sessions[-1].started}"
        if table.sessions
        else f"{len(table)} kernels"
    )
    if table.fingerprint != own.short_hash:
        held = table.facts.get("clocks") == "held"  # then its governor is another one too, while something is measured
        told = differences(table.facts, own.facts)
        changed = [each for each in told if not (held and each.startswith(("clocks ", "cpu governor ")))]
        if held and not changed:
            return Check(name=name, found=f"{found}, with clocks held (--lock-clocks)")
        return Check(
            name=name, found=found, fix=f"measured before this changed: {', '.join(changed)}; anew: {line}", word="old"
        )
    stale = staleness(table)
    return Check(name=name, found=found, fix=f"{stale[0]}: {line}" if stale else None, word="old")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`["board power_mode 15W > MAXN", ...]`: what two sets of facts differ in."""
    found = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name} ")
        elif old != new:
            found.append(f"{prefix}{name} {_short(old)} > {_short(new)}")
    return found


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _set(device: Device, pair: str) -> str:
    from edgeprune.device_entries import set_line  # the doctor runs where the packages that read entries are missing

    return set_line(device, pair)
