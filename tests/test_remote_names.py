"""What an entry of devices.yaml may name: nothing that a command line takes for an option or a shell for a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.device import Device, load_devices
from edgeprune.errors import InputError

pytestmark = pytest.mark.unit

SSH: dict[str, Any] = {"name": "d", "transport": "ssh", "host": "h", "backend": "null"}


@pytest.mark.parametrize("host", ["pi", "me@pi.local", "192.168.1.7", "fe80::1%eth0", "[::1]", "my-pi_4", "a+b"])
def test_hosts_that_are_taken(host: str) -> None:
    assert Device(**{**SSH, "host": host}).host == host


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field in ("host", "user")
            for value in (
                "-oProxyCommand=x",
                "a b",
                "a;b",
                "$(x)",
                "`x`",
                "a\nb",
                "a\x00b",
                "",
                "a'b",
                "a|b",
                "x" * 2000,
            )
        ),
        *(("python", value) for value in ("-c", "py thon", "python3\n", "")),
        *(("folder", value) for value in ("../x", "a/../../b", "/", "~", "..", "-x", "a b", "")),
        *(("port", value) for value in (0, 65536, "22", -1)),
        *(("timeout_s", value) for value in (0, -1, float("inf"))),
        ("cache_mb", 1),
    ],
)
def test_values_that_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Device(**{**SSH, field: value})


def test_serials_are_words_too() -> None:
    with pytest.raises(ValueError, match="serial"):
        Device(name="d", transport="adb", serial="a; reboot", backend="null")


def test_a_way_that_is_not_that_of_the_transport_is_a_fault_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text('schema: 1\ndevices:\n  d:\n    backend: "null"\n    host: pi\n')
    with pytest.raises(InputError, match=r"devices.yaml:3: device 'd': .*'host' is of transport ssh"):
        load_devices(file)


def test_a_bad_host_is_a_fault_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text('schema: 1\ndevices:\n  d:\n    backend: "null"\n    transport: ssh\n    host: -oProxyCommand=x\n')
    with pytest.raises(InputError, match=r"devices.yaml:6: host: must not be empty, nor start with '-'"):
        load_devices(file)
