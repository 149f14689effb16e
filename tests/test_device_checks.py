"""What the doctor says of *synthetic* devices: every fault with the line that mends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.device import Device, find_device
from edgeprune.device_checks import Check, differences, reached_checks, table_check
from edgeprune.device_probe import probe, probe_lines
from edgeprune.errors import DeviceError, MeasurementError, RuntimeMissing
from edgeprune.fingerprint import describe, fingerprint_of
from edgeprune.kernel import Kernel
from edgeprune.table import table_path
from edgeprune.table_lines import FingerprintLine, RowLine, SessionLine
from tests.fake_device import opener
from tests.synthetic_machines import JETSON, RASPBERRY_PI, X86, path_with, program

pytestmark = pytest.mark.unit

ORIN = {"gpu": "Orin (nvgpu)", "compute_capability": "8.7"}
NO_TRTEXEC = RuntimeMissing("device 'jetson': no trtexec: not $TRTEXEC, not on the PATH")
AARCH64: dict[str, Any] = {"cpu": {"machine": "aarch64", "cores": 6, "flags": []}, "python": "3.10.12"}


def jetson(**changes: Any) -> Device:
    """As `edgeprune devices add jetson --host orin` writes it."""
    preset = find_device("jetson")
    fields = {"host": "orin", "roofline": None, "precisions": ("fp16", "int8", "fp32"), **changes}
    return preset.model_copy(update=fields)


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root: Path = request.param.written(tmp_path)
    monkeypatch.setenv("PATH", path_with(tmp_path))
    return root


def of(machine: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("machine", [machine], indirect=True)


def checks(found: Any) -> dict[str, Check]:
    return {check.name: check for check in reached_checks(found)}


@of(JETSON)
def test_a_jetson_in_order(machine: Path) -> None:
    found = probe(jetson(), opener(machine, {"tensorrt": "10.3.0"}, accelerator=ORIN, hello=AARCH64))
    told = checks(found)
    faults = {name: check.fix for name, check in told.items() if check.fix}
    assert set(faults) == {"clocks and heat", "runtime tensorrt_python"} - {"runtime tensorrt_python"}
    assert "over-current (instant): a stronger power supply" in str(faults["clocks and heat"])
    assert told["reached"].found == "NVIDIA Jetson Orin Nano Developer Kit, Python 3.10.12"
    assert (told["power mode"].found, told["compute capability"].found) == ("15W", "8.7")
    lines = dict(line.split("  ", 1) for line in probe_lines(found))
    assert lines["power mode"].strip() == "15W" and lines["clock"].strip() == "1120 MHz, 624.8 MHz (GPU)"
    assert lines["runtime tensorrt"].strip() == "10.3.0, Orin (nvgpu), 8.7"
    assert found.to_json()["facts"]["l4t"] == "R36.3.0" and "flags" not in found.to_json()["cpu"]


@of(JETSON)
def test_a_jetson_with_everything_wrong(machine: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "nvpmodel", 'echo "NV Power Mode: MAXN"')
    (machine / "sys/class/thermal/cooling_device1/cur_state").write_text("1\n")
    other = jetson(compute_capability="7.2", arch="x86_64")
    runtimes = {"tensorrt": NO_TRTEXEC, "tensorrt_python": "10.3.0"}
    told = checks(probe(other, opener(machine, runtimes, accelerator=ORIN, hello=AARCH64)))
    runtime = told["runtime tensorrt"]
    assert runtime.required and runtime.exit_code == 5 and runtime.found is None
    assert "no trtexec" in str(runtime.fix) and "sudo apt-get install nvidia-jetpack" in str(runtime.fix)
    assert "--set backend=tensorrt_python" in str(runtime.fix)
    assert "sudo nvpmodel -m ID" in str(told["power mode"].fix) and "power_mode=MAXN" in str(told["power mode"].fix)
    assert "--set compute_capability=8.7, sparse=true" in str(told["compute capability"].fix)
    assert "--set arch=aarch64" in str(told["architecture"].fix)
    assert "right now by heat: gpu-throttle-alert at step 1: a fan" in str(told["clocks and heat"].fix)


@of(RASPBERRY_PI)
def test_a_raspberry_pi_with_the_old_runtime_and_the_new_numpy(machine: Path) -> None:
    device = find_device("pi5").model_copy(update={"host": "pi", "roofline": None})
    found = probe(device, opener(machine, {"tflite": MeasurementError("numpy.core.multiarray failed")}, hello=AARCH64))
    state = {**found.state, "packages": {"tflite-runtime": "2.14.0", "numpy": "2.1.0"}, "disk_free_mb": 80}
    told = {c.name: c for c in reached_checks(type(found)(**{**vars(found), "state": state}))}
    assert told["numpy"].fix == "tflite-runtime 2.14.0 can't use numpy 2: pip install 'numpy<2' there"
    assert told["numpy"].required and "free some of it" in str(told["disk"].fix)
    hint = "there: python3 -m venv edgeprune-env && edgeprune-env/bin/python -m pip install ai-edge-litert; here: "
    assert hint in str(told["runtime tflite"].fix) and "python=edgeprune-env/bin/python" in str(
        told["runtime tflite"].fix
    )
    assert "under-voltage; throttled: a stronger power supply" in str(told["clocks and heat"].fix)
    packages = {"tflite-runtime": "2.14.0", "ai-edge-litert": "2.0.1", "numpy": "2.1.0"}
    told = {c.name: c for c in reached_checks(type(found)(**{**vars(found), "state": {"packages": packages}}))}
    assert told["numpy"].fix is None  # the new one is taken


@of(RASPBERRY_PI)
def test_a_32_bit_system(machine: Path) -> None:
    device = find_device("pi4").model_copy(update={"host": "pi", "roofline": None})
    hello = {"cpu": {"machine": "armv7l", "cores": 4, "flags": []}, "python": "3.11.2"}
    missing = RuntimeMissing("no tflite", fix="there: pip install x")  # as opening it says, before the machine is known
    told = checks(probe(device, opener(machine, {"tflite": missing}, hello=hello)))
    assert "install the 64 bit one" in str(told["architecture"].fix)
    assert "no tflite; there: python3 -m venv" in str(told["runtime tflite"].fix)
    assert "-m pip install 'tflite-runtime==2.14.0' 'numpy<2'" in str(told["runtime tflite"].fix)


@of(X86)
def test_governors(machine: Path) -> None:
    cpufreq = machine / "sys/devices/system/cpu/cpu0/cpufreq"
    device = find_device("x86-linux").model_copy(update={"host": "nuc"})
    assert "--lock-clocks" in str(checks(probe(device, opener(machine, {})))["governor"].fix)
    (cpufreq / "scaling_driver").write_text("intel_pstate\n")  # there powersave is the ordinary one
    assert checks(probe(device, opener(machine, {})))["governor"].fix is None


@of(X86)
def test_a_device_that_cannot_be_reached_is_told_by_whoever_opens_it(machine: Path) -> None:
    with pytest.raises(DeviceError, match="the host key"):
        probe(jetson(), opener(machine, {"null": DeviceError("the host key of orin is not known here")}))


@of(JETSON)
def test_the_board_belongs_to_the_fingerprint_and_the_table_is_old_when_it_changes(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    device = jetson()
    found = probe(device, opener(machine, {"tensorrt": "10.3.0"}, accelerator=ORIN, hello=AARCH64))
    hello = dict(found.runtimes["tensorrt"].hello)
    facts = fingerprint_of(device, "fp16", hello).facts
    assert facts["board"]["power_mode"] == "15W" and facts["board"]["l4t"] == "R36.3.0"
    assert describe(facts).startswith(
        "aarch64 (), 6 cores, NVIDIA Jetson Orin Nano Developer Kit, 15W, Orin (nvgpu), t"
    )
    held = device.model_copy(update={"lock_clocks": True})
    assert fingerprint_of(held, "fp16", hello).facts == {**facts, "clocks": "held"}
    assert "nothing is measured yet: edgeprune profile --device" in str(table_check(device, "fp16", hello).fix)
    write_table(table_path(device, "fp16"), held, hello)
    check = table_check(device, "fp16", hello)
    assert check.fix is None and "with clocks held (--lock-clocks)" in str(check.found)
    table_path(device, "fp16").unlink()
    write_table(table_path(device, "fp16"), device, hello)
    assert table_check(device, "fp16", hello).fix is None
    changed = {**hello, "board": {**hello["board"], "power_mode": "MAXN"}, "version": "10.7.0"}
    fix = str(table_check(device, "fp16", changed).fix)
    assert "version 10.3.0 > 10.7.0, board power_mode 15W > MAXN; anew: edgeprune profile --device" in fix


def write_table(path: Path, device: Device, hello: Any) -> None:
    fingerprint = fingerprint_of(device, "fp16", hello)
    kernel = Kernel(operator="linear", c_in=8, c_out=8, spatial=(4,), precision="fp16").to_json()
    common: dict[str, Any] = {"fingerprint": fingerprint.short_hash}
    row: dict[str, Any] = {
        "n": 4,
        "median_us": 2.0,
        "p90_us": 2.0,
        "p99_us": 2.0,
        "spread": 0.0,
        "reference": "compute",
    }
    row |= {"reference_ratio": 1.0, "ratio_ci": (1.0, 1.0), "rounds": 4, "disturbed": 0, "origin": "measured"}
    lines = [
        FingerprintLine(hash=fingerprint.short_hash, facts=dict(fingerprint.facts)),
        SessionLine(
            id="1",
            started="2026-11-29T10:00:00Z",
            device="d",
            references={"compute": 2.0},
            rounds=4,
            edgeprune="0",
            **common,
        ),
        RowLine(kernel=kernel, session="1", **common, **row),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line.to_line() for line in lines))


def test_differences_are_named_by_their_place() -> None:
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": "x" * 80}) == [
        "b c 2 > 4",
        "e none > " + "x" * 57 + "...",
    ]
