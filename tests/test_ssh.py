"""Devices behind a real sshd on this machine: the whole flow, host keys, cuts. Without sshd they skip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprune import transport
from edgeprune.benching import bench, verify_bundle
from edgeprune.budget import parse_budget
from edgeprune.device import Device
from edgeprune.errors import DeviceError, DeviceUnreachable, InputError, RuntimeMissing
from edgeprune.kernel import Kernel
from edgeprune.pipeline import fit
from edgeprune.preparing import Task
from edgeprune.profiling import profile
from edgeprune.ssh_link import ssh_link
from edgeprune.table import read_lines
from edgeprune.transport import open_session
from tests.small_models import patiently, plain
from tests.sshd import Sshd, device_python, running_sshd, why_not

pytestmark = [pytest.mark.integration, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

X = (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
KERNELS = [Kernel(operator="linear", c_in=8 * n, c_out=64) for n in range(1, 21)]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd") / "own") as server:
        yield server


@pytest.fixture
def far(sshd: Sshd) -> Iterator[Device]:
    """A null device whose connection ends with the test."""
    device = sshd.device(python=sys.executable)
    yield device
    ssh_link(device).close()
    sshd.know_host_key()


def test_the_same_table_as_locally(far: Device, tmp_path: Path) -> None:
    table = profile(KERNELS, far, table_path=tmp_path / "far.jsonl")
    local = profile(KERNELS, Device(name="near", backend="null"), table_path=tmp_path / "near.jsonl")
    assert {k: entry.ratio for k, entry in table.entries.items()} == {k: e.ratio for k, e in local.entries.items()}
    assert table.fingerprint == local.fingerprint


def test_one_connection_in_a_private_folder(far: Device) -> None:
    link = ssh_link(far)
    with open_session(far) as session:
        first = session.hello()["pid"]
    socket = link.socket
    assert len(str(socket)) < 80
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    inode = socket.stat().st_ino
    with open_session(far) as session:
        assert session.hello()["pid"] != first
    assert link.socket.stat().st_ino == inode
    link.close()
    assert not socket.parent.exists()


def test_a_host_key_that_is_not_known_is_refused(far: Device, sshd: Sshd) -> None:
    sshd.forget_host_key()
    with (
        pytest.raises(DeviceError, match="host key of edgeprune-test is not known here.*accept it: ssh -F") as no,
        open_session(far),
    ):
        pass
    assert no.value.exit_code == 4
    assert not isinstance(no.value, DeviceUnreachable)
    assert sshd.known_hosts.read_text() == ""


@pytest.mark.parametrize("told", ["no", "off", "ask"])
def test_a_config_without_checks_does_not_switch_them_off(told: str, far: Device, sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(f"StrictHostKeyChecking {told}\n{sshd.config_text}")
    sshd.forget_host_key()
    careless = far.model_copy(update={"ssh_config": str(config)})
    with pytest.raises(DeviceError, match="is not known here"), open_session(careless):
        pass


def test_another_host_key_than_before_is_refused(far: Device, sshd: Sshd, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "k")], check=True, timeout=30)
    kind, key, *_ = (tmp_path / "k.pub").read_text().split()
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
    with (
        pytest.raises(DeviceError, match=r"another one than before.*ssh-keygen -R '\[127.0.0.1\]:") as no,
        open_session(far),
    ):
        pass
    assert not isinstance(no.value, DeviceUnreachable)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"host": "no-such-host.invalid"}, DeviceUnreachable, "set 'host' in its entry of devices.yaml"),
        ({"host": "127.0.0.1", "port": 1}, DeviceUnreachable, "is it on, on this network"),
        ({"user": "nobody-of-this-name"}, DeviceError, "no way to give a password.*ssh-copy-id"),
    ],
)
def test_unreachable_is_exit_4_and_says_what_to_set(
    changes: dict[str, Any], error: type[DeviceError], says: str, far: Device
) -> None:
    device = far.model_copy(update=changes)
    with pytest.raises(error, match=f"device 'far' can't be reached: `ssh .*{says}") as no, open_session(device):
        pass
    assert no.value.exit_code == 4


def test_no_name_is_a_command(far: Device, tmp_path: Path) -> None:
    """An interpreter and a folder whose names a shell would take for more than a word."""
    python = tmp_path / "py';touch${IFS}pwned;$(touch${IFS}pwned)"
    python.symlink_to(sys.executable)
    folder = tmp_path / "far;touch${IFS}pwned'$(touch${IFS}pwned)\"`id`"
    with open_session(far.model_copy(update={"python": str(python), "folder": str(folder)})) as session:
        assert session.hello()["runner"] == "null"
    assert (folder / "models").is_dir()
    assert [path.name for path in (*tmp_path.rglob("pwned"), *Path.home().glob("pwned"))] == []


def test_missing_runtime_is_said_with_the_line_for_the_device(sshd: Sshd, require: Callable[[str], None]) -> None:
    """This Python has no tflite; whether it is here doesn't matter."""
    require("openvino")
    python = device_python("tflite") or device_python("litert")
    if python is None:
        pytest.skip("no test device: make test-devices")
    device = sshd.device("none", backend="openvino", python=str(python))
    with (
        pytest.raises(RuntimeMissing, match=r"No module named 'openvino'; there: /.*python.* -m pip install openvino"),
        open_session(device),
    ):
        pass


def test_cuts_cost_nothing_that_was_measured(far: Device, sshd: Sshd, tmp_path: Path) -> None:
    """The device's side of all connections is killed while it measures, in the first batch and in the second."""
    slow = far.model_copy(update={"options": {"sleep_ms": 0.2}})
    path = tmp_path / "t.jsonl"
    cuts: list[int] = []
    timers: list[threading.Timer] = []

    def cut(done: int, total: int) -> None:
        if len(timers) < 2 and done == 8 * len(timers):
            timers.append(threading.Timer(0.2, lambda: cuts.append(sshd.cut())))
            timers[-1].start()

    table = profile(KERNELS[:10], slow, table_path=path, on_progress=cut)
    for timer in timers:
        timer.join()
    assert len(table) == 10
    assert len(cuts) == 2
    assert all(cuts)
    lines = read_lines([path])
    assert (len(lines.rows), lines.failures) == (10, ())


def test_a_device_that_stays_away_is_exit_4(far: Device, sshd: Sshd, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("edgeprune.profiler.PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(transport, "LONGEST_PAUSE_SECONDS", 0.2)
    path = tmp_path / "t.jsonl"

    def away(done: int, total: int) -> None:
        if done == 8:
            sshd.forget_host_key()
            sshd.config.write_text("Host edgeprune-test\n  HostName 127.0.0.1\n  Port 1\n")
            sshd.cut()

    try:
        with pytest.raises(DeviceError, match="device 'far' has gone: .*8 of 20 kernels are saved") as no:
            profile(KERNELS, far, table_path=path, on_progress=away)
    finally:
        sshd.config.write_text(sshd.config_text)
        sshd.know_host_key()
    assert no.value.exit_code == 4
    assert len(profile(KERNELS, far, table_path=path)) == 20


@pytest.mark.parametrize(
    ("name", "backend"), [("openvino", "openvino"), ("litert", "tflite"), ("tflite", "tflite")], ids=lambda name: name
)
def test_a_device_with_its_runtime_alone(
    name: str, backend: str, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No torch there; here only what writes models."""
    from edgeprune.backends import find_backend
    from edgeprune.modelled import packages_missing

    python = device_python(name)
    if python is None:
        pytest.skip(f"no test device '{name}': make test-devices")
    if missing := packages_missing(find_backend(backend)):
        pytest.skip(missing)
    assert subprocess.run([python, "-I", "-c", "import torch"], capture_output=True, check=False).returncode != 0
    device = sshd.device(name, backend=backend, python=str(python), options={})
    shape: dict[str, Any] = {"window": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    small, large = (Kernel(operator="conv", c_in=c, c_out=c, spatial=(14, 14), **shape) for c in (16, 128))
    table = profile([small, large], device, table_path=tmp_path / "t.jsonl")
    assert table.origin == "measured"
    assert table.latency_us(large) > 4 * table.latency_us(small)


def test_what_a_device_is_is_told_without_what_its_models_are_written_with(sshd: Sshd, tmp_path: Path) -> None:
    """Only measuring needs that, and says where it is missing: here."""
    from edgeprune.backends import find_backend
    from edgeprune.errors import RuntimeMissing
    from edgeprune.modelled import packages_missing

    python, missing = device_python("litert"), packages_missing(find_backend("tflite"))
    if python is None or missing is None:
        pytest.skip("takes the test device 'litert' (make test-devices), and that LiteRT's converter is not here")
    device = sshd.device("told", backend="tflite", python=str(python), options={})
    with open_session(device) as session:
        assert session.hello()["version"]
    with pytest.raises(RuntimeMissing, match="litert-torch not installed"):
        profile(KERNELS[:1], device, table_path=tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists() or "failure" not in (tmp_path / "t.jsonl").read_text()


def test_the_whole_flow_over_ssh_gives_the_same_plan(
    far: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profile, calibrate, fit, verify and bench; how the device is reached is never read from the bundle."""
    twin = far.model_copy(update={"name": "twin", "folder": f"{far.folder}-twin"})
    plans = {}
    for way, device in (("near", Device(name="twin", backend="null")), ("far", twin)):
        monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / f"cache-{way}"))
        task = Task(model=plain().eval(), name="plain", example_inputs=X, device=device, saliency="l2")
        found = fit(task, parse_budget("0.6x"), tmp_path / way)
        assert found.verification.met
        plans[way] = (tmp_path / way / "plan.json").read_bytes()
    assert plans["near"] == plans["far"]
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path))
    with pytest.raises(InputError, match="device 'twin' is not in devices.yaml"):
        verify_bundle(tmp_path / "far")
    entry = twin.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    (tmp_path / "devices.yaml").write_text(json.dumps({"schema": 1, "devices": {"twin": entry}}))
    assert verify_bundle(tmp_path / "far").met
    (result,) = bench([tmp_path / "far"])
    assert result.pruned.ratio is not None
    assert result.pruned.ratio.value < 0.6


def test_a_real_runtime_without_torch_is_fitted_and_its_outputs_are_right(
    sshd: Sshd, tmp_path: Path, require: Callable[[str], None]
) -> None:
    require("openvino")
    python = device_python("openvino")
    if python is None:
        pytest.skip("no test device 'openvino': make test-devices")
    device = sshd.device("fitted", backend="openvino", python=str(python))
    task = Task(model=plain().eval(), name="plain", example_inputs=X, device=device, saliency="l2")
    found = patiently(lambda: fit(task, parse_budget("0.8x"), tmp_path / "bundle")).verification
    assert found.met
    assert found.origin == "measured"
    assert found.parity is not None
    assert found.parity.error <= found.parity.tolerance


def test_the_command_line(far: Device, sshd: Sshd, tmp_path: Path) -> None:
    """An entry of devices.yaml is all it takes; two of them are profiled at once."""
    entry = {key: getattr(far, key) for key in ("transport", "host", "ssh_config", "backend", "python")}
    devices = {name: {**entry, "folder": f"{far.folder}-{name}"} for name in ("one", "two")}
    (tmp_path / "devices.yaml").write_text(json.dumps({"schema": 1, "devices": devices}))
    env = dict(os.environ, EDGEPRUNE_CONFIG_DIR=str(tmp_path), EDGEPRUNE_CACHE_DIR=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "edgeprune", "profile", "--device", "one", "--device", "two", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["devices"]
    assert [entry["device"] for entry in told] == ["one", "two"]
    assert told[0]["kernels"] == told[1]["kernels"]
    assert told[0]["kernels"] > 50
