"""Asks a device what it is, how it is doing and which runtimes it has: `devices probe` prints it, the doctor judges it.

Each question goes through a session like every measurement. The first one starts the device program with the null
backend, which needs no runtime there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeprune.errors import MeasurementError, RuntimeMissing
from edgeprune.installing import install_there
from edgeprune.transport import Session, open_session

if TYPE_CHECKING:
    from edgeprune.device import Device

Opener = Callable[["Device"], AbstractContextManager[Session]]
"""`open_session`, or a stand-in for it."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A backend over there: its version and the accelerator that it tells of, or why it isn't there and what helps."""

    version: str | None = None
    missing: str | None = None
    fix: str | None = None
    hello: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing_with_fix(self) -> str:
        return "; ".join(filter(None, [self.missing, self.fix]))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a device told: the answers to `hello` and `state`, and its backend and fallbacks in their order."""

    device: Device
    hello: Mapping[str, Any]
    state: Mapping[str, Any]
    runtimes: Mapping[str, Runtime]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Board, memory, system, driver, power mode."""
        told: Mapping[str, Any] = self.state.get("facts", {})
        return told

    def to_json(self) -> dict[str, Any]:
        """For `--json`: flags of the CPU are left out."""
        hello = {name: self.hello.get(name) for name in ("python", "platform", "program")}
        cpu = {name: value for name, value in self.hello.get("cpu", {}).items() if name != "flags"}
        runtimes = {
            name: {"version": found.version, "missing": found.missing, "accelerator": found.hello.get("accelerator")}
            for name, found in self.runtimes.items()
        }
        return {"device": self.device.name, **hello, "cpu": cpu, **self.state, "runtimes": runtimes}


def probe(device: Device, opener: Opener = open_session) -> Probe:
    """`DeviceError` where it can't be reached; a runtime that is missing there is told, and no failure."""
    with opener(bare(device)) as session:
        hello, state = session.hello(), session.state()
    backends = (device.backend, *(name for name in device.fallbacks if name != device.backend))
    runtimes = {name: _ask(device, name, opener, hello) for name in backends}
    return Probe(device=device, hello=hello, state=state, runtimes=runtimes)


def bare(device: Device) -> Device:
    """The device without a runtime: what runs there is the formula of the null backend, which is asked nothing."""
    return device.model_copy(update={"backend": "null", "options": {}, "lock_clocks": False})


def with_backend(device: Device, name: str) -> Device:
    """The device through another of its backends."""
    options = device.options if name == device.backend else {}
    return device.model_copy(update={"backend": name, "options": options, "lock_clocks": False})


def _ask(device: Device, name: str, opener: Opener, told: Mapping[str, Any]) -> Runtime:
    """`told` is what the device said of itself without a runtime."""
    try:
        with opener(with_backend(device, name)) as session:
            hello = session.hello()
        return Runtime(version=str(hello["version"]), hello=hello)
    except (RuntimeMissing, MeasurementError) as error:
        missing = str(error.args[0]).strip().splitlines()[-1][:500]
        if device.transport == "local":  # then that says what helps
            return Runtime(missing=missing)
        machine = str(told.get("cpu", {}).get("machine", ""))
        fix = install_there(name, device, python=str(told.get("python", "")), machine=machine)
        return Runtime(missing=missing, fix=fix)


def probe_lines(found: Probe) -> list[str]:
    """For a person: a name and a value a line."""
    facts, state = found.facts, found.state.get("state", {})
    cpu = found.hello.get("cpu", {})
    told = {
        "device": _joined(facts.get("board"), facts.get("soc")),
        "cpu": _joined(cpu.get("name") or cpu.get("machine"), f"{cpu.get('cores')} cores"),
        "gpu": _joined(facts.get("gpu"), facts.get("compute_capability"), facts.get("driver")),
        "memory": f"{facts['memory_mb']} MB" if "memory_mb" in facts else "",
        "system": _joined(facts.get("os"), facts.get("kernel"), facts.get("l4t"), facts.get("jetpack")),
        "python": str(found.hello.get("python", "")),
        "power mode": str(facts.get("power_mode", "")),
        "governor": _joined(facts.get("governor"), facts.get("cpufreq_driver")),
        "clock": _joined(_unit(state, "clock_mhz", "MHz"), _unit(state, "gpu_clock_mhz", "MHz (GPU)")),
        "temperature": _joined(_unit(state, "temperature_c", "°C"), _unit(state, "gpu_temperature_c", "°C (GPU)")),
        "power": _unit(state, "power_w", "W"),
        "slowed by": "; ".join(found.state.get("slowed", ())),
        "earlier by": "; ".join(found.state.get("slowed_before", ())),
        "disk": f"{found.state['disk_free_mb']} MB free" if "disk_free_mb" in found.state else "",
        "packages": ", ".join(f"{name} {version}" for name, version in found.state.get("packages", {}).items()),
    }
    told |= {f"runtime {name}": _runtime(runtime) for name, runtime in found.runtimes.items()}
    width = max(map(len, told))
    return [f"{name:<{width}}  {value}" for name, value in told.items() if value]


def _runtime(runtime: Runtime) -> str:
    if runtime.version is None:
        return f"missing: {runtime.missing_with_fix}"
    accelerator = runtime.hello.get("accelerator") or {}
    return _joined(runtime.version, *(str(value) for value in accelerator.values()))


def _unit(state: Mapping[str, Any], name: str, unit: str) -> str:
    return f"{state[name]:g} {unit}" if name in state else ""


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part)
