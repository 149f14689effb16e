"""The user's devices.yaml: written whole and checked, or left as it was; what a person wrote in it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.device import load_device, load_devices
from edgeprune.device_entries import add_entry, entry_text, own_file, parse_settings, remove_entry
from edgeprune.errors import InputError, StorageError

pytestmark = pytest.mark.unit

MINE = """\
# my devices
schema: 1

devices:
  # the one on the desk
  desk:
    backend: openvino   # CPU
    threads: 2
    affinity:
      - 0
      - 1

  # the one in the cellar
  cellar: {backend: "null", aliases: [down]}  # cold
# the end
"""


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def mine() -> str:
    own_file().parent.mkdir()
    own_file().write_text(MINE)
    return MINE


def test_a_preset_with_a_host_is_a_copy_without_its_data_sheet() -> None:
    device = add_entry("jetson", host="me@orin")
    assert (device.name, device.transport, device.host) == ("jetson", "ssh", "me@orin")
    assert (device.backend, device.power_mode, device.sparse, device.roofline) == ("tensorrt", "15W", True, None)
    assert load_device("jetson") == device
    assert load_device("jetson-orin-nano", allow_modelled=True).modelled  # the preset is as it was
    assert own_file().read_text().startswith("# Devices of your own")


def test_in_the_place_of_a_preset_its_aliases_lead_to_the_new_entry() -> None:
    add_entry("jetson-orin-nano", host="orin")
    assert load_device("jetson").host == "orin"
    assert add_entry("jetson", host="other").host == "other"  # an entry of that name comes before an alias
    assert load_device("jetson").host == "other"


def test_without_a_way_to_it_a_copy_keeps_its_data_sheet_for_its_precision() -> None:
    assert add_entry("nano", like="jetson", settings={"power_mode": "7W"}).roofline is not None
    assert add_entry("half", like="jetson", settings={"precisions": "[fp32]"}).roofline is None


def test_keys_of_an_own_entry_are_changed_and_taken_away() -> None:
    add_entry("pi", like="pi5", host="pi.local")
    device = add_entry("pi", settings={"threads": "2", "options.xnnpack": "false", "port": "2222", "arch": "null"})
    assert (device.threads, device.options, device.port, device.host, device.arch) == (
        2,
        {"xnnpack": False},
        2222,
        "pi.local",
        None,
    )


def test_a_local_preset_with_a_host_is_reached_by_ssh() -> None:
    assert add_entry("box", like="host-openvino", host="box").transport == "ssh"


def test_an_entry_from_nothing() -> None:
    assert add_entry("plain", settings={"backend": "openvino"}).backend == "openvino"


def test_comments_and_order_stay() -> None:
    mine()
    add_entry("jetson", host="orin")
    text = own_file().read_text()
    for line in ("# my devices", "  # the one on the desk", "  # the one in the cellar", "# the end"):
        assert line in text.splitlines()
    assert "backend: openvino   # CPU" in text and '{backend: "null", aliases: [down]}  # cold' in text
    assert "    affinity:\n      - 0\n      - 1\n" in text
    assert list(load_devices())[:3] == ["desk", "cellar", "jetson"]


def test_what_was_added_is_removed_again() -> None:
    before = mine()
    add_entry("jetson", host="orin")
    remove_entry("jetson")
    assert own_file().read_text() == before


def test_removing_takes_the_entry_and_no_comment_of_another() -> None:
    mine()
    remove_entry("desk")
    assert own_file().read_text() == MINE.replace(
        MINE[MINE.index("  desk:") : MINE.index("      - 1\n") + len("      - 1\n")], ""
    )
    remove_entry("cellar")
    assert "devices: {}" in own_file().read_text() and "# my devices" in own_file().read_text()
    add_entry("jetson", host="orin")
    assert load_device("jetson").host == "orin"


def test_entries_in_one_line() -> None:
    own_file().parent.mkdir()
    own_file().write_text('schema: 1\ndevices: {a: {backend: "null"}, b: {backend: "null"}}\n')
    remove_entry("a")
    add_entry("c", like="b")
    assert [name for name in load_devices() if len(name) == 1] == ["b", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "jetsn"}, r"no preset 'jetsn'; did you mean 'jetson'\?.*--like"),
        ({"name": "x", "like": "y"}, "no preset 'y'"),
        ({"name": "a b", "like": "jetson"}, "device 'a b' was not written: with it, .*letters, digits"),
        ({"name": "jetson", "host": "-oProxyCommand=x"}, "nor start with '-'"),
        ({"name": "jetson", "host": "a b"}, "must not hold spaces"),
        ({"name": "jetson", "settings": {"threads": "zero"}}, "threads: input should be a valid integer, found 'zero'"),
        ({"name": "jetson", "settings": {"thread": "1"}}, "unknown key 'thread'; did you mean 'threads'"),
        ({"name": "jetson", "settings": {"threads": "[1"}}, r"--set threads=\[1: the value is not YAML"),
        ({"name": "jetson", "settings": {"backend.deep": "1"}}, "'backend' is no mapping"),
        ({"name": "desk", "like": "jetson"}, "'desk' stands in .* already"),
        ({"name": "host-openvino", "settings": {"host": "x"}}, "'host' is of transport ssh"),
    ],
)
def test_a_fault_is_told_and_nothing_is_written(arguments: dict[str, object], message: str) -> None:
    before = mine()
    with pytest.raises(InputError, match=message):
        add_entry(**arguments)  # type: ignore[arg-type]
    assert own_file().read_text() == before


def test_a_file_with_a_fault_is_not_touched() -> None:
    own_file().parent.mkdir()
    own_file().write_text("schema: 1\ndevices:\n  a: {backend: opnvino}\n")
    with pytest.raises(InputError, match="3: backend: no backend 'opnvino'"):
        add_entry("jetson", host="orin")
    own_file().write_text("schema: 1\n")
    with pytest.raises(InputError, match="'devices' must map names to devices"):
        remove_entry("a")


@pytest.mark.parametrize(("name", "where"), [("jetson-orin-nano", "it comes with edgeprune"), ("x", "none of that")])
def test_only_ones_own_are_removed(name: str, where: str) -> None:
    with pytest.raises(InputError, match=where):
        remove_entry(name)
    assert not own_file().exists()


def test_a_folder_that_takes_no_file(config: Path) -> None:
    config.write_text("in the way")
    with pytest.raises((StorageError, InputError)):
        add_entry("jetson", host="orin")


def test_an_entry_is_shown_as_it_stands() -> None:
    assert entry_text("jetson-orin-nano").startswith("jetson-orin-nano:\n  description: NVIDIA Jetson Orin Nano")
    assert "efficiency: 0.5  # assumed" in entry_text("jetson-orin-nano")
    mine()
    assert entry_text("cellar") == 'cellar: {backend: "null", aliases: [down]}  # cold\n'


def test_settings() -> None:
    assert parse_settings(("a=1", "b.c=d=e", "f=")) == {"a": "1", "b.c": "d=e", "f": ""}
    with pytest.raises(InputError, match="--set takes key=value, found 'a'"):
        parse_settings(("a",))
