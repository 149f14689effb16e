"""What a device is and how it is doing, read over there: a part of the device program (standard library, Python 3.8).

`Tree` reads files below a root folder and runs programs of the PATH, so that a *synthetic* tree of another machine
reads like that machine. What can't be read is left out, never guessed.

Sources: Jetson: NVIDIA's Jetson Linux Developer Guide, Platform Power and Performance (nvpmodel, soctherm, devfreq,
INA3221, tegrastats); NVML answers nothing there. Raspberry Pi: documentation of `vcgencmd get_throttled`. x86: the
kernel's Documentation/admin-guide/thermal/intel_thermal_throttle.rst, cpufreq and powercap.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import time
from typing import Any

from edgeprune.device_nvidia import card_reasons, card_state, parse_tegrastats, tegrastats_line

THROTTLED = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
"""Bits of a Raspberry Pi's get_throttled; sixteen higher: it has happened since it was switched on."""
PACKAGES = ("numpy", "openvino", "onnxruntime", "ai-edge-litert", "tflite-runtime", "tensorrt", "tensorrt-rtx")
LOOK_SECONDS = 2.0


class Tree:
    """The files and programs of one machine."""

    def __init__(self, root: str = "/") -> None:
        self.root = root

    def text(self, path: str) -> str:
        """Without what ends it; empty where it can't be read."""
        try:
            with open(os.path.join(self.root, path), errors="replace") as file:
                return file.read(1 << 20).strip().strip("\0").strip()
        except OSError:
            return ""

    def number(self, path: str) -> float | None:
        try:
            return float(self.text(path))
        except ValueError:
            return None

    def paths(self, pattern: str) -> list[str]:
        """Sorted, relative to the root."""
        found = glob.glob(os.path.join(glob.escape(self.root), pattern))
        return sorted(os.path.relpath(path, self.root) for path in found)

    def numbers(self, pattern: str) -> list[float]:
        found = [self.number(path) for path in self.paths(pattern)]
        return [number for number in found if number is not None]

    def ask(self, *command: str) -> str:
        """What a program prints; empty where there is none, or it fails or takes longer than ten seconds."""
        if shutil.which(command[0]) is None:
            return ""
        try:
            done = subprocess.run(
                list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def board_facts(tree: Tree) -> dict[str, str]:
    """What tells one board from another, where there is a device tree: model, SoC, and of a Jetson release and mode."""
    compatible = [name for name in tree.text("proc/device-tree/compatible").split("\0") if name]
    release = re.search(r"R(\d+).*REVISION: ([\d.]+)", tree.text("etc/nv_tegra_release"))
    facts = {
        "board": tree.text("proc/device-tree/model"),
        "soc": compatible[-1] if compatible else "",
        "l4t": "R%s.%s" % release.groups() if release else "",
        "power_mode": power_mode(tree) if is_jetson(tree) else "",
    }
    return {name: value for name, value in facts.items() if value}


def machine_facts(tree: Tree) -> dict[str, Any]:
    """What doesn't change while a program runs: the board, memory, system, GPU and its driver, packages."""
    system = re.search(r'^PRETTY_NAME="?([^"\n]*)', tree.text("etc/os-release"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", tree.text("proc/meminfo"), re.MULTILINE)
    facts: dict[str, Any] = dict({"board": _product(tree)}, **board_facts(tree))
    facts["memory_mb"] = int(memory.group(1)) // 1024 if memory else None
    facts["os"] = system.group(1) if system else ""
    facts["kernel"] = tree.text("proc/sys/kernel/osrelease")
    for ours, theirs in (("governor", "scaling_governor"), ("cpufreq_driver", "scaling_driver")):
        facts[ours] = tree.text("sys/devices/system/cpu/cpu0/cpufreq/" + theirs)
    if is_jetson(tree):
        facts["jetpack"] = tree.ask("dpkg-query", "--showformat=${Version}", "--show", "nvidia-jetpack")
    else:
        card = card_state(tree)
        facts.update((name, card.get(name)) for name in ("gpu", "driver", "compute_capability", "gpu_memory_mb"))
    return {name: value for name, value in facts.items() if value}


def whole_state(tree: Tree) -> dict[str, Any]:
    """All that can be told: facts, state, what slows it down now and what has since it was switched on."""
    free = shutil.disk_usage(os.getcwd()).free
    return {
        "facts": machine_facts(tree),
        "state": machine_state(tree),
        "slowed": slowed_now(tree),
        "slowed_before": [name for name, count in slowed_counts(tree).items() if count],
        "packages": package_versions(),
        "disk_free_mb": free >> 20,
        "folder": os.getcwd(),
    }


def is_jetson(tree: Tree) -> bool:
    return "tegra" in tree.text("proc/device-tree/compatible") or bool(tree.text("etc/nv_tegra_release"))


def is_raspberry_pi(tree: Tree) -> bool:
    return "raspberrypi" in tree.text("proc/device-tree/compatible")


def power_mode(tree: Tree) -> str:
    """Of a Jetson, as `nvpmodel -q` calls it: `NV Power Mode: 15W`, then its number.

    Where that needs rights that this user hasn't, the number that it keeps leads to the name in its configuration.
    """
    found = re.search(r"NV Power Mode:\s*(\S+)", tree.ask("nvpmodel", "-q"))
    if found:
        return found.group(1)
    kept = re.search(r"pmode:0*(\d+)", tree.text("var/lib/nvpmodel/status"))
    if not kept:
        return ""
    named = re.search(r"POWER_MODEL ID=%s NAME=(\S+)" % kept.group(1), tree.text("etc/nvpmodel.conf"))
    return named.group(1) if named else kept.group(1)


def package_versions() -> dict[str, str]:
    """Of the runtimes that pip has installed for this interpreter, or for this user, whom `python -I` leaves out."""
    from importlib import metadata

    places = [*sys.path, site.getusersitepackages()]
    found: dict[str, str] = {}
    for place in metadata.distributions(path=places):
        name = re.sub(r"[-_.]+", "-", place.metadata["Name"] or "").lower()
        if name in PACKAGES:
            found.setdefault(name, place.version)
    return found


def machine_state(tree: Tree, quick: bool = False, card: dict[str, Any] | None = None) -> dict[str, Any]:
    """`clock_mhz`, the mean of the cores', `temperature_c` of the hottest zone, `gpu_clock_mhz`, `power_w`, where told.

    A `quick` look reads files alone; `card` is what an NVIDIA card has just told.
    """
    clocks = [clock / 1e3 for clock in tree.numbers("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if not clocks:
        clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)", tree.text("proc/cpuinfo"), re.MULTILINE)]
    state: dict[str, Any] = {"clock_mhz": round(sum(clocks) / len(clocks), 1)} if clocks else {}
    # a zone that is switched off answers nothing, or an impossible number
    heat = [milli / 1e3 for milli in tree.numbers("sys/class/thermal/thermal_zone[0-9]*/temp")]
    heat = [celsius for celsius in heat if -50 < celsius < 200]
    if heat:
        state["temperature_c"] = max(heat)
    gpu = [tree.number(path) for path in tree.paths("sys/class/devfreq/*/cur_freq") if _is_gpu(path)]
    told = [hertz for hertz in gpu if hertz]
    if told:
        state["gpu_clock_mhz"] = round(max(told) / 1e6, 1)
    power = _board_watts(tree)
    if power:
        state["power_w"] = power
    if quick:
        return state
    if is_jetson(tree):
        if "gpu_clock_mhz" not in state or "temperature_c" not in state:
            state = dict(parse_tegrastats(tegrastats_line(tree)), **state)
    else:
        card = card_state(tree) if card is None else card
        state.update((name, card[name]) for name in ("gpu_clock_mhz", "gpu_temperature_c", "power_w") if card.get(name))
    return state


def slowed_now(tree: Tree, quick: bool = False, card: dict[str, Any] | None = None) -> list[str]:
    """Why the machine runs slower than it could, right now."""
    reasons = []
    for path in tree.paths("sys/class/thermal/cooling_device[0-9]*/cur_state"):
        kind = tree.text(os.path.join(os.path.dirname(path), "type"))
        if re.search(r"cpufreq|devfreq|throttle|cpu-idle|^Processor$", kind) and (tree.number(path) or 0) > 0:
            reasons.append("heat: %s at step %d" % (kind, tree.number(path) or 0))
    bits = _pi_bits(tree)
    reasons += [reason for bit, reason in sorted(THROTTLED.items()) if bits >> bit & 1]
    if not quick and not is_jetson(tree):
        reasons += card_reasons(card_state(tree) if card is None else card)
    return reasons


def slowed_counts(tree: Tree) -> dict[str, float]:
    """Counters that only rise, of what slowed the machine down since it was switched on."""
    counts = {}
    cores = tree.numbers("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    packages = tree.numbers("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/package_throttle_count")
    if cores or packages:
        counts["heat: a core or its package was throttled"] = sum(cores) + max(packages or [0.0])
    names = {"oc1": "under-voltage", "oc2": "over-current (average)", "oc3": "over-current (instant)"}
    for path in tree.paths("sys/class/hwmon/hwmon*/oc[0-9]_event_cnt"):
        short = os.path.basename(path)[:3]
        counts["%s: %s" % (short, names.get(short, "over-current"))] = tree.number(path) or 0.0
    bits = _pi_bits(tree)
    if is_raspberry_pi(tree):
        counts.update((reason, float(bits >> 16 >> bit & 1)) for bit, reason in THROTTLED.items())
    return counts


class Watch:
    """A machine over one measurement: before, now and then while it runs, after."""

    def __init__(self, tree: Tree, card: bool) -> None:
        """`card`: an NVIDIA card takes part, so that asking for it is worth a while."""
        self.tree, self.card = tree, card
        self.before = slowed_counts(tree)
        self.reasons: dict[str, None] = {}
        self.hottest: list[float] = []
        self.joules = _package_joules(tree)
        self.started = self.seen = time.monotonic()
        self.look(quick=True)  # nvidia-smi takes its time: once a measurement, at its end

    def now_and_then(self) -> None:
        """Files alone, and not more often than every two seconds."""
        if time.monotonic() - self.seen > LOOK_SECONDS:
            self.look(quick=True)

    def look(self, quick: bool) -> dict[str, Any]:
        self.seen = time.monotonic()
        card = None if quick or is_jetson(self.tree) else card_state(self.tree)
        state = machine_state(self.tree, quick, card)
        self.reasons.update(dict.fromkeys(slowed_now(self.tree, quick, card)))
        self.hottest += [state[name] for name in ("temperature_c", "gpu_temperature_c") if name in state]
        return state

    def ended(self) -> tuple[dict[str, float], list[str]]:
        """State at the end, `temperature_c` the hottest seen; and what slowed the machine down meanwhile."""
        state = self.look(quick=not self.card)
        state.pop("gpu_temperature_c", None)
        if self.hottest:
            state["temperature_c"] = max(self.hottest)
        joules, seconds = _package_joules(self.tree), time.monotonic() - self.started
        if joules and self.joules and seconds > 0.1 and joules >= self.joules:
            state.setdefault("power_w", round((joules - self.joules) / seconds, 2))
        for name, count in slowed_counts(self.tree).items():
            if count > self.before.get(name, 0.0):
                self.reasons[name] = None
        return state, list(self.reasons)


def cpu_facts(tree: Tree | None = None) -> dict[str, Any]:
    """What tells one kind of CPU from another; what can't be read is left out."""
    tree = tree or Tree()
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    lines = tree.text("proc/cpuinfo").split("\n\n")[0].splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    info = {name.strip(): value.strip() for name, value in pairs}
    names = {"vendor_id": "vendor", "cpu family": "family", "model": "model", "stepping": "stepping"}
    names.update({"model name": "name", "CPU implementer": "vendor", "CPU part": "model", "CPU variant": "stepping"})
    facts.update({ours: info[theirs] for theirs, ours in names.items() if theirs in info})
    facts["flags"] = sorted((info.get("flags") or info.get("Features") or "").split())
    facts["caches"] = _caches(tree)
    governor = tree.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        facts["governor"] = governor
    return facts


def _is_gpu(path: str) -> bool:
    """`17000000.ga10b` (JetPack 5), `17000000.gpu` (6), `17000000.gv11b` (Xavier), `gpu-gpc-0` (Thor)."""
    return re.search(r"gpu|ga10b|gv11b|gp10b", path.split("/")[3]) is not None


def _pi_bits(tree: Tree) -> int:
    """0 on any other machine."""
    if not is_raspberry_pi(tree):
        return 0
    found = re.search(r"0x([0-9a-fA-F]+)", tree.ask("vcgencmd", "get_throttled"))
    word = found.group(1) if found else tree.text("sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        return int(word or "0", 16)
    except ValueError:
        return 0


def _board_watts(tree: Tree) -> float | None:
    """What a Jetson takes in, by its INA3221."""
    for label in tree.paths("sys/class/hwmon/hwmon*/in[0-9]_label"):
        if tree.text(label) in ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN"):
            millivolts = tree.number(label.replace("_label", "_input"))
            milliamperes = tree.number(re.sub(r"in(\d)_label$", r"curr\1_input", label))
            if millivolts and milliamperes:
                return round(millivolts * milliamperes / 1e6, 2)
    return None


def _package_joules(tree: Tree) -> float | None:
    """RAPL's counter, which often only root may read."""
    micro = tree.number("sys/class/powercap/intel-rapl:0/energy_uj")
    return None if micro is None else micro / 1e6


def _product(tree: Tree) -> str:
    names = [tree.text("sys/class/dmi/id/" + name) for name in ("sys_vendor", "product_name")]
    return " ".join(name for name in names if name)


def _caches(tree: Tree) -> dict[str, str]:
    """`{"L1d": "48K", "L2": "1024K", ...}` of the first core."""
    caches = {}
    for index in range(8):
        folder = "sys/devices/system/cpu/cpu0/cache/index%d/" % index
        level, kind, size = (tree.text(folder + name) for name in ("level", "type", "size"))
        if level and kind and size:
            caches["L" + level + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return caches
