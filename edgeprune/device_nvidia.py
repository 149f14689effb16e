"""What an NVIDIA card or a Jetson's `tegrastats` tells: a part of the device program (standard library, Python 3.8).

`tree` is a `Tree` of `device_state.py`. Sources: NVML's nvmlClocksEventReasons,
https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html; `nvidia-smi --help-query-gpu`; tegrastats:
https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from typing import Any

SLOWED = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "thermal slowdown"}
SLOWED[0x80] = "power brake"
"""Bits of nvmlClocksEventReasons that mean slower than asked for."""
CARD = {
    "name": "gpu",
    "driver_version": "driver",
    "compute_cap": "compute_capability",
    "memory.total": "gpu_memory_mb",
    "clocks.current.graphics": "gpu_clock_mhz",
    "temperature.gpu": "gpu_temperature_c",
    "power.draw": "power_w",
    "clocks_throttle_reasons.active": "reasons",
}


def card_state(tree: Any) -> dict[str, Any]:
    """The first NVIDIA card, through pynvml where that imports, else nvidia-smi; empty where there is none."""
    card = _card_by_nvml() if tree.root == "/" else {}
    return card or _card_by_smi(tree)


def parse_card(line: str) -> dict[str, Any]:
    """One line of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`, in the order of `CARD`."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != len(CARD):
        return {}
    card: dict[str, Any] = {}
    for name, word in zip(CARD.values(), words):
        if re.search(r"not supported|n/a|unknown", word, re.IGNORECASE):
            continue
        if name in ("gpu", "driver", "compute_capability"):
            card[name] = word
        elif name == "reasons":
            card[name] = int(word, 16)
        elif name == "gpu_memory_mb":
            card[name] = int(float(word))
        else:
            card[name] = float(word)
    return card


def tegrastats_line(tree: Any) -> str:
    """The first line of `tegrastats`, which goes on for ever."""
    if shutil.which("tegrastats") is None:
        return ""
    try:
        child = subprocess.Popen(
            ["tegrastats", "--interval", "100"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return ""
    assert child.stdout is not None
    try:
        return child.stdout.readline().decode(errors="replace").strip()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def parse_tegrastats(line: str) -> dict[str, float]:
    """`... CPU [2%@729,...] GR3D_FREQ 0%@[305] ... cpu@48.5C ... VDD_IN 4984mW/4984mW`: 5.x, 6.x and older."""
    state = {}
    clocks = [float(mhz) for mhz in re.findall(r"%@(\d+)", (re.search(r"CPU \[([^\]]*)\]", line) or [""])[0])]
    if clocks:
        state["clock_mhz"] = round(sum(clocks) / len(clocks), 1)
    gpu = re.search(r"GR3D_FREQ \d+%@\[?(\d+)", line)
    if gpu:
        state["gpu_clock_mhz"] = float(gpu.group(1))
    heat = [float(celsius) for celsius in re.findall(r"\w@(-?[\d.]+)C", line)]
    heat = [celsius for celsius in heat if -50 < celsius < 200]  # a zone that is switched off tells -256
    if heat:
        state["temperature_c"] = max(heat)
    power = re.search(r"(?:VDD_IN|POM_5V_IN) (\d+)(?:mW)?/", line)
    if power:
        state["power_w"] = int(power.group(1)) / 1e3
    return state


def _card_by_smi(tree: Any) -> dict[str, Any]:
    answer = tree.ask("nvidia-smi", "--query-gpu=" + ",".join(CARD), "--format=csv,noheader,nounits")
    return parse_card(answer.splitlines()[0]) if answer else {}


def _card_by_nvml() -> dict[str, Any]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # of a package that is missing, or a driver that is
        return {}
    questions: dict[str, Any] = {
        "gpu": lambda: _words(nvml.nvmlDeviceGetName(handle)),
        "driver": lambda: _words(nvml.nvmlSystemGetDriverVersion()),
        "compute_capability": lambda: "%d.%d" % tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "gpu_memory_mb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20,
        "gpu_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(handle, 0)),
        "gpu_temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(handle, 0)),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "reasons": lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
    card: dict[str, Any] = {}
    for name, question in questions.items():
        try:
            card[name] = question()
        except Exception:  # NVMLError_NotSupported, and what else drivers answer
            continue
    return card


def _words(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def card_reasons(card: dict[str, Any]) -> list[str]:
    return ["GPU: " + reason for bit, reason in sorted(SLOWED.items()) if card.get("reasons", 0) & bit]
