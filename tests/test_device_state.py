"""State of a device, read from *synthetic* machines (`tests/synthetic_machines.py`) and from this one."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from edgeprune.device_nvidia import parse_card, parse_tegrastats
from edgeprune.device_state import (
    Tree,
    Watch,
    board_facts,
    cpu_facts,
    machine_facts,
    machine_state,
    power_mode,
    slowed_counts,
    slowed_now,
    whole_state,
)
from edgeprune.machine import told
from tests.synthetic_machines import CARD, CARD_LINE, JETSON, RASPBERRY_PI, TEGRASTATS, X86, Machine, path_with, program

pytestmark = pytest.mark.unit


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    machine: Machine = request.param
    root = machine.written(tmp_path)
    monkeypatch.setenv("PATH", path_with(tmp_path))
    return Tree(str(root))


def write(tree: Tree, path: str, text: str) -> None:
    Path(tree.root, path).write_text(text)


def of(machine: Machine) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("tree", [machine], indirect=True)


@of(JETSON)
def test_a_jetson_by_device_tree_nvpmodel_and_sysfs(tree: Tree) -> None:
    board = {
        "board": "NVIDIA Jetson Orin Nano Developer Kit",
        "soc": "nvidia,tegra234",
        "l4t": "R36.3.0",
        "power_mode": "15W",
    }
    assert board_facts(tree) == board
    assert machine_facts(tree) == {
        **board,
        "memory_mb": 7620,
        "os": "Ubuntu 22.04.4 LTS",
        "kernel": "5.15.136-tegra",
        "governor": "schedutil",
        "jetpack": "6.0+b106",
    }
    # the zone that is switched off (-256) and the clock of another engine (vic) are none of it
    assert machine_state(tree) == {
        "clock_mhz": 1120.0,
        "temperature_c": 48.906,
        "gpu_clock_mhz": 624.8,
        "power_w": 5.04,
    }
    assert slowed_now(tree) == []  # a fan that turns slows nothing down
    assert slowed_counts(tree) == {"oc1: under-voltage": 0, "oc3: over-current (instant)": 15}


@of(JETSON)
def test_a_jetson_that_is_hot_and_short_of_power(tree: Tree) -> None:
    watch = Watch(tree, card=True)
    write(tree, "sys/class/thermal/cooling_device1/cur_state", "1\n")
    write(tree, "sys/class/thermal/thermal_zone2/temp", "97000\n")
    watch.look(quick=True)
    write(tree, "sys/class/thermal/thermal_zone2/temp", "60000\n")
    write(tree, "sys/class/hwmon/hwmon3/oc3_event_cnt", "16\n")
    state, slowed = watch.ended()
    assert state["temperature_c"] == 97.0  # the hottest in between
    assert slowed == ["heat: gpu-throttle-alert at step 1", "oc3: over-current (instant)"]


@of(JETSON)
def test_tegrastats_fills_in_for_files_that_are_not_there(tree: Tree) -> None:
    for path in ("sys/class/devfreq/17000000.gpu/cur_freq", "sys/class/hwmon/hwmon1/in1_label"):
        Path(tree.root, path).unlink()
    assert machine_state(tree) == {
        "clock_mhz": 1120.0,
        "temperature_c": 48.906,
        "gpu_clock_mhz": 624.0,
        "power_w": 4.984,
    }


def test_lines_of_tegrastats() -> None:
    told = parse_tegrastats(TEGRASTATS)
    assert told == {"clock_mhz": 1119.5, "gpu_clock_mhz": 624.0, "temperature_c": 48.9, "power_w": 4.984}
    # 32.x: https://docs.nvidia.com/jetson/archives/l4t-archived/l4t-3275/ (no unit, no list of clocks)
    old = "RAM 1/7860MB CPU [0%@1190,off] GR3D_FREQ 0%@114 AUX@39.5C GPU@38C POM_5V_IN 2532/2532"
    assert parse_tegrastats(old) == {
        "clock_mhz": 1190.0,
        "gpu_clock_mhz": 114.0,
        "temperature_c": 39.5,
        "power_w": 2.532,
    }
    assert parse_tegrastats("") == {}


@pytest.mark.parametrize("release", ["nv", ""])
@of(JETSON)
def test_power_modes_with_other_words_around_them(tree: Tree, tmp_path: Path, release: str) -> None:
    program(
        tmp_path / "bin" / "nvpmodel", f'echo "NVPM WARN: fan mode is not set!{release}"; echo "NV Power Mode: MAXN"'
    )
    assert power_mode(tree) == "MAXN"
    program(tmp_path / "bin" / "nvpmodel", "exit 1")
    assert power_mode(tree) == "" and "power_mode" not in board_facts(tree)
    # what it keeps (forum posts show `pmode:0001`), and < POWER_MODEL ID=1 NAME=5W > as the developer guide has it
    files = {"var/lib/nvpmodel/status": "pmode:0001", "etc/nvpmodel.conf": "< POWER_MODEL ID=1 NAME=7W >"}
    for path, text in files.items():
        Path(tree.root, path).parent.mkdir(parents=True, exist_ok=True)
        write(tree, path, text)
    assert power_mode(tree) == "7W"


@of(RASPBERRY_PI)
def test_a_raspberry_pi_by_vcgencmd(tree: Tree, tmp_path: Path) -> None:
    assert board_facts(tree) == {"board": "Raspberry Pi 5 Model B Rev 1.0", "soc": "brcm,bcm2712"}
    assert machine_state(tree) == {"clock_mhz": 2400.0, "temperature_c": 61.7}
    assert slowed_now(tree) == ["under-voltage", "throttled"]
    assert [name for name, count in slowed_counts(tree).items() if count] == ["under-voltage", "throttled"]
    program(tmp_path / "bin" / "vcgencmd", "echo throttled=0xe0008")
    assert slowed_now(tree) == ["soft temperature limit"]
    program(tmp_path / "bin" / "vcgencmd", "echo VCHI initialization failed; exit 255")  # not in group video
    assert slowed_now(tree) == ["under-voltage", "throttled"]  # the same word, from sysfs


@of(RASPBERRY_PI)
def test_a_raspberry_pi_that_was_throttled_in_between(tree: Tree, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "vcgencmd", "echo throttled=0x0")
    watch = Watch(tree, card=False)
    write(tree, "sys/class/thermal/cooling_device0/cur_state", "2\n")
    watch.look(quick=True)
    write(tree, "sys/class/thermal/cooling_device0/cur_state", "0\n")
    program(tmp_path / "bin" / "vcgencmd", "echo throttled=0x20000")  # is not any more, but was
    assert watch.ended()[1] == ["heat: cpufreq-cpu0 at step 2", "clock capped"]


@of(RASPBERRY_PI)
def test_the_cpu_of_a_raspberry_pi(tree: Tree) -> None:
    facts = cpu_facts(tree)
    assert (facts["vendor"], facts["model"], facts["governor"]) == ("0x41", "0xd0b", "ondemand")
    assert facts["flags"] == ["asimd", "asimddp", "fp"] and facts["caches"] == {}


@of(X86)
def test_x86_by_cpuinfo_zones_and_counters(tree: Tree) -> None:
    assert machine_facts(tree)["board"] == "ASUSTeK COMPUTER INC. NUC14RVH" and board_facts(tree) == {}
    assert machine_state(tree, quick=True) == {"clock_mhz": 4291.0, "temperature_c": 88.0}
    counts = slowed_counts(tree)
    assert counts == {"heat: a core or its package was throttled": 11}
    watch = Watch(tree, card=False)
    assert watch.ended()[1] == []
    write(tree, "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "2\n")
    assert watch.ended()[1] == list(counts)


@of(X86)
def test_watts_of_a_package_by_rapl(tree: Tree) -> None:
    watch = Watch(tree, card=False)
    watch.started -= 10.0
    write(tree, "sys/class/powercap/intel-rapl:0/energy_uj", "151000000\n")  # 150 J more
    assert watch.ended()[0]["power_w"] == pytest.approx(15.0, rel=0.05)


@of(CARD)
def test_an_nvidia_card_by_nvidia_smi(tree: Tree) -> None:
    facts = machine_facts(tree)
    assert (facts["gpu"], facts["driver"], facts["compute_capability"]) == (
        "NVIDIA GeForce RTX 4090",
        "550.54.14",
        "8.9",
    )
    assert machine_state(tree) == {"gpu_clock_mhz": 2520.0, "gpu_temperature_c": 61.0, "power_w": 312.5}
    assert slowed_now(tree) == ["GPU: power cap", "GPU: software thermal slowdown"]
    assert slowed_now(tree, quick=True) == [] and machine_state(tree, quick=True) == {}
    state, slowed = Watch(tree, card=True).ended()
    assert state["temperature_c"] == 61.0 and len(slowed) == 2


def test_lines_of_nvidia_smi() -> None:
    card = parse_card(CARD_LINE)
    assert card["reasons"] == 0x24
    assert told({"facts": {"gpu_memory_mb": card["gpu_memory_mb"]}})["facts"] == {"gpu_memory_mb": 24564}
    assert "power_w" not in parse_card(CARD_LINE.replace("312.50", "[N/A]"))
    assert parse_card("Field clocks.current is not a valid field to query.") == {}


@of(CARD)
def test_an_nvidia_card_by_pynvml(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in module: names and order of arguments are those of nvidia-ml-py."""
    nvml = types.ModuleType("pynvml")

    def refuse(handle: object) -> int:
        raise RuntimeError("Not Supported")

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: ("card", index),
        "nvmlDeviceGetName": lambda handle: b"NVIDIA L4",
        "nvmlSystemGetDriverVersion": lambda: "550.1",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 9),
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=24 << 30),
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1590,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 55,
        "nvmlDeviceGetPowerUsage": refuse,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x40,
    }
    for name, answer in answers.items():
        setattr(nvml, name, answer)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    from edgeprune.device_nvidia import card_state

    assert card_state(Tree("/")) == {
        "gpu": "NVIDIA L4",
        "driver": "550.1",
        "compute_capability": "8.9",
        "gpu_memory_mb": 24576,
        "gpu_clock_mhz": 1590.0,
        "gpu_temperature_c": 55.0,
        "reasons": 0x40,
    }
    assert card_state(tree)["gpu"] == "NVIDIA GeForce RTX 4090"  # another root is another machine


@of(Machine(files={"proc/version": "nothing else"}))
def test_what_cannot_be_read_is_left_out(tree: Tree) -> None:
    for found in (machine_facts(tree), machine_state(tree), board_facts(tree), slowed_counts(tree)):
        assert not found
    assert slowed_now(tree) == [] and Watch(tree, card=True).ended() == ({}, [])


@of(JETSON)
def test_files_that_hold_something_else(tree: Tree) -> None:
    for path in tree.paths("sys/class/*/*/*") + tree.paths("sys/devices/system/cpu/cpu*/cpufreq/*"):
        write(tree, path, "\xff nonsense\n")
    assert slowed_now(tree) == []
    assert machine_state(tree, quick=True) == {}


def test_this_machine() -> None:
    told = whole_state(Tree())
    assert told["facts"]["kernel"] == os.uname().release and told["facts"]["memory_mb"] > 100
    assert "numpy" in told["packages"] and told["disk_free_mb"] > 0
    assert cpu_facts()["cores"] == os.cpu_count()
