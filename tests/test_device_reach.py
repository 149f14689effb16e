"""One entry is measured where there is a way to the device, and modelled from its data sheet where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.device import Device, check_modelled, load_device, load_devices
from edgeprune.errors import DeviceError, InputError

pytestmark = pytest.mark.unit

ROOFLINE = "{peak_gflops: 1, bandwidth_gbs: 1, conditions: 1 GHz, sources: [none]}"


def written(folder: Path, entries: str) -> Path:
    path = folder / "devices.yaml"
    path.write_text(f"schema: 1\ndevices:\n{entries}")
    return path


def test_with_a_host_a_preset_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path))
    written(
        tmp_path,
        "  jetson-orin-nano:\n    {transport: ssh, host: orin, backend: tensorrt, precisions: [fp16, fp32], "
        f"roofline: {ROOFLINE}}}\n",
    )
    for allowed in (False, True):
        device = load_device("jetson", allow_modelled=allowed)  # the preset's alias holds for the entry in its place
        assert (device.name, device.host, device.transport) == ("jetson-orin-nano", "orin", "ssh")
        assert not device.modelled and device.roofline is None and device.precisions == ("fp16", "fp32")


def test_without_one_it_is_modelled_in_the_precision_of_its_roofline() -> None:
    device = load_device("jetson", allow_modelled=True)
    assert device.modelled and device.precisions == ("fp16",) and device.transport == "local"


def test_what_belongs_to_the_way_there_is_left_out_where_a_formula_runs_here(tmp_path: Path) -> None:
    path = written(
        tmp_path, f"  box: {{transport: ssh, user: me, port: 22, backend: openvino, roofline: {ROOFLINE}}}\n"
    )
    device = load_device("box", path, allow_modelled=True)
    assert Device.model_validate(device.model_dump()) == device


def test_without_host_and_data_sheet_nothing_helps_but_a_host() -> None:
    for allowed in (False, True):
        with pytest.raises(DeviceError, match=r"'x86-linux': no host .*add x86-linux --host USER@HOST \(there is no d"):
            load_device("x86-linux", allow_modelled=allowed)


def test_a_roofline_of_ones_own_without_a_way_to_the_device(tmp_path: Path) -> None:
    path = written(tmp_path, f"  box: {{backend: openvino, roofline: {ROOFLINE}}}\n")
    with pytest.raises(DeviceError, match="'box': its entry knows a roofline and no way to it"):
        load_device("box", path)
    assert load_device("box", path, allow_modelled=True).modelled


def test_a_phone_with_a_data_sheet_is_at_hand_once_its_serial_is_set(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"  a: {{transport: adb, backend: tflite, roofline: {ROOFLINE}}}\n"
        f"  b: {{transport: adb, backend: tflite, serial: X1, roofline: {ROOFLINE}}}\n"
        "  c: {transport: adb, backend: tflite}\n",
    )
    assert [device.at_hand for device in load_devices(path).values()] == [False, True, True]


def test_a_device_at_hand_is_taken_as_it_is() -> None:
    device = load_device("null")
    assert check_modelled(device, False) is device


@pytest.mark.parametrize("name", ["a b", "-x", "../up", "a;rm", "x" * 65, "é"])
def test_names_are_safe_in_paths_and_command_lines(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, f'  "{name}": {{backend: "null"}}\n')
    with pytest.raises(InputError, match="3: name: a device's name is made of letters"):
        load_devices(path)


def test_aliases_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"aliases.0: a device's name is made of letters"):
        load_devices(written(tmp_path, '  a: {backend: "null", aliases: ["b/c"]}\n'))


def test_fields_of_another_transport_are_faults(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'host' is of transport ssh, this device has local"):
        load_devices(written(tmp_path, '  a: {backend: "null", host: orin}\n'))
