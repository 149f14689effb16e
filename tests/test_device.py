from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from edgeprune.device import Device, load_device, load_devices
from edgeprune.errors import InputError

pytestmark = pytest.mark.unit


def written(folder: Path, text: str) -> Path:
    path = folder / "devices.yaml"
    path.write_text(text)
    return path


HERE = ["null", "host-openvino", "host-onnxruntime", "host-tflite", "host-tensorrt", "host-tensorrt-python"]
JETSONS = ["jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor", "jetson-xavier-nx"]
DATA_SHEETS = [*JETSONS, "raspberry-pi-5", "raspberry-pi-4", "nuc-core-ultra", "rtx-workstation"]
OTHERS = ["nuc-core-ultra-gpu", "nuc-core-ultra-npu", "x86-linux", "android-phone"]
SHIPPED = [*HERE, *DATA_SHEETS[:-1], *OTHERS, "rtx-workstation"]


def test_shipped_devices() -> None:
    devices = load_devices()
    assert list(devices) == SHIPPED
    assert [name for name, device in devices.items() if device.modelled] == ["null", *DATA_SHEETS]
    assert [name for name, device in devices.items() if device.at_hand] == [*HERE, "android-phone"]
    sparse = {name for name, device in devices.items() if device.sparse}
    assert {*JETSONS[:4], "rtx-workstation"} <= sparse and not sparse & {"jetson-xavier-nx", "host-openvino"}
    host = load_device("host-openvino")
    assert (host.precisions, host.threads, host.streams, host.transport) == (("fp32", "bf16", "int8"), 1, 1, "local")


def test_a_device_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_device("null").threads = 2  # type: ignore[misc]


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(InputError, match="'host-openvno' is not in devices.yaml; did you mean 'host-openvino'"):
        load_device("host-openvno")
    with pytest.raises(InputError, match=r"device 'orin' is not in devices.yaml \(known: null, host-openvino, "):
        load_device("orin")


def test_user_file_adds_and_replaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path))
    written(
        tmp_path,
        """\
schema: 1
devices:
  host-openvino: {backend: openvino, threads: 2, affinity: [0, 1]}
  box: {backend: "null", aliases: [b], options: {seed: 3, noise: 0.01, exact: true, note: x}}
""",
    )
    assert set(load_devices()) == {*SHIPPED, "box"}
    assert load_device("host-openvino").threads == 2
    assert load_device("host-openvino").affinity == (0, 1)
    assert load_device("b").options == {"seed": 3, "noise": 0.01, "exact": True, "note": "x"}
    assert load_device("b") is not load_device("box")
    assert load_device("b") == load_device("box")


def test_all_faults_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """\
schema: 2
device: {}
devices:
  null: {backend: openvino}
  a:
    backend: opnvino
    threads: 0
    affinty: [0]
  a: {backend: openvino}
  b:
    threads: yes
    options: {deep: [1]}
  c: 7
  d:
    name: e
    backend: "null"
    precisions: [fp32, int9]
    note: !shell ls
  f: {backend: opnvino, aliases: [g]}
  g: {backend: "null"}
""",
    )
    with pytest.raises(InputError) as caught:
        load_devices(path)
    lines = str(caught.value).splitlines()
    known = "null, onnxruntime, openvino, tensorrt, tensorrt_python, tflite"
    assert lines[0] == f"15 faults in {path}:"
    assert [line.removeprefix(f"  {path}:") for line in lines[1:]] == [
        "1: expected 'schema: 1', found 2",
        "2: unknown key 'device'; did you mean 'devices'?",
        '4: a name must be a string: write "null", in quotes',
        f"6: backend: no backend 'opnvino'; did you mean 'openvino'? (known: {known})",
        "7: threads: input should be greater than or equal to 1, found 0",
        "8: unknown key 'affinty'; did you mean 'affinity'?",
        "9: 'a' stands here twice, first in line 5",
        "10: device 'b' lacks 'backend'",
        "11: threads: input should be a valid integer, found 'yes'",
        "12: options.deep: expected text, a number or a truth value, found [1]",
        "13: device 'c' must be a mapping, found 7",
        "15: unknown key 'name': the name of this device is 'd'",
        "17: precisions.1: input should be 'fp32', 'fp16', 'bf16' or 'int8', found 'int9'",
        "18: tag !shell is not plain data",
        f"19: backend: no backend 'opnvino'; did you mean 'openvino'? (known: {known})",
    ]


def test_aliases_are_unambiguous(tmp_path: Path) -> None:
    path = written(
        tmp_path, 'schema: 1\ndevices:\n  f: {backend: "null", aliases: [g, h]}\n  g: {backend: "null", aliases: [h]}\n'
    )
    with pytest.raises(InputError, match=r"(?s)2 faults.*:3: alias 'g' names another .*:4: alias 'h' names another "):
        load_devices(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: 1\ndevices: [1\na: 2", "devices.yaml:3: not YAML: expected ','"),
        ("schema: 1\n\tdevices: {}\n", "devices.yaml:2: not YAML: found character"),
        ("", "devices.yaml:1: expected 'schema' and 'devices'"),
        ("schema: 1\n", "devices.yaml:1: 'devices' must map names to devices"),
        ("schema: 1\ndevices: &a\n  b: *a\n", r"devices.yaml:3: .*alias"),
        ("\x00", "devices.yaml: not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML: but found another document"),
    ],
)
def test_what_is_no_device_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_devices(written(tmp_path, text))


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        load_devices(tmp_path / "devices.yaml")
    (tmp_path / "devices.yaml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not YAML"):
        load_devices(tmp_path / "devices.yaml")


def test_defaults_are_not_shared() -> None:
    first, second = Device(name="a", backend="null"), Device(name="b", backend="null")
    first.options["seed"] = 1
    assert second.options == {}
