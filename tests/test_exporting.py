from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune import backends
from edgeprune.device import load_device
from edgeprune.engine import Engine
from edgeprune.errors import InputError, RuntimeMissing
from edgeprune.exporting import as_pruned, export, export_dense, kernels_of
from edgeprune.transport import open_session
from tests.small_models import Net, pruned, redrawn

pytestmark = pytest.mark.contract
DEVICES = {"null": "null", "openvino": "host-openvino", "onnxruntime": "host-onnxruntime", "tflite": "host-tflite"}
FILES = {
    "null": {"model.json"},
    "openvino": {"model.xml", "model.bin", "model.onnx"},
    "onnxruntime": {"model.onnx"},
    "tflite": {"model.tflite"},
}
Require = Callable[[str], None]


@pytest.mark.parametrize("backend", DEVICES)
def test_an_engine_runs_and_says_what_goes_in_and_out(backend: str, require: Require, tmp_path: Path) -> None:
    require(backend)
    given = pruned(redrawn(Net()))
    device = load_device(DEVICES[backend])
    engine = export(given, device, tmp_path / "engine")
    assert {file.name for file in engine.files} == {item.name for item in engine.folder.iterdir()} == FILES[backend]
    assert (engine.backend, engine.precision, engine.device, engine.pruned) == (backend, "fp32", device, given)
    with open_session(device) as session:
        loaded = session.load("engine", engine.path)
        (output,) = session.run("engine", [given.example_inputs[0].numpy()])
    assert loaded.inputs == engine.inputs
    assert loaded.outputs == engine.outputs
    assert (engine.inputs[0].name, engine.inputs[0].shape) == ("x", (1, 3, 16, 16))
    assert (engine.outputs[0].name, engine.outputs[0].shape) == ("output", (1, 10))
    if not device.modelled:
        wanted = given.module(*given.example_inputs).detach().numpy()
        assert np.abs(output - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_remote_devices_engine_is_that_of_its_runtime_here(precision: str, require: Require, tmp_path: Path) -> None:
    require("onnxruntime")
    given, here = pruned(redrawn(Net())), load_device("host-onnxruntime")
    there = here.model_copy(update={"name": "far", "transport": "ssh", "host": "nowhere"})
    batches = [given.example_inputs] if precision == "int8" else []
    one, other = (
        export(given, device, tmp_path / device.name, precision=precision, calibration=batches)
        for device in (here, there)
    )
    assert one.path.read_bytes() == other.path.read_bytes()
    with pytest.raises(InputError, match="has an option 'layout', but onnxruntime writes only one"):
        export(given, there.model_copy(update={"options": {"layout": "channels_last"}}), tmp_path / "turned")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "tflite"])
def test_profiled_nodes_bear_the_names_of_their_modules(backend: str, require: Require, tmp_path: Path) -> None:
    require(backend)
    given = pruned(redrawn(Net(16)))
    engine = export(given, load_device(DEVICES[backend]), tmp_path / "engine")
    assert engine.device is not None
    with open_session(engine.device) as session:
        session.load("engine", engine.path, profile=True)
        session.measure(["engine"])
        times = session.node_times("engine")
    assert times is not None
    found = {str(node["name"]).partition("/")[0] for node in times.nodes if node["compute"]}
    assert {"conv", "blocks.0.branch.0", "blocks.0.branch.3", "blocks.1.branch.0", "blocks.1.branch.3", "head"} <= found


def test_half_precision_storage_halves_the_file(require: Require, tmp_path: Path) -> None:
    require("openvino")
    given, device = pruned(redrawn(Net(64))), load_device("host-openvino")
    full, half = (export(given, device, tmp_path / kind, weights=kind) for kind in ("fp32", "fp16"))
    sizes = [engine.path.with_suffix(".bin").stat().st_size for engine in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert (full.notes["weights"], half.notes["weights"], half.precision) == ("fp32", "fp16", "fp32")
    with pytest.raises(InputError, match="fp32, fp16"):
        export(given, device, tmp_path / "int4", weights="int4")
    assert not (tmp_path / "int4").exists()


def test_the_null_device_takes_kernels_or_finds_them(tmp_path: Path) -> None:
    net = redrawn(Net())
    device = load_device("null")
    given = pruned(net)
    kernels = kernels_of(net, given.example_inputs, device, "fp32")
    assert [k.operator for k in kernels].count("conv") == 5
    found, told = export(given, device, tmp_path / "a"), export(given, device, tmp_path / "b", kernels=kernels)
    assert found.path.read_bytes() == told.path.read_bytes()
    assert len(json.loads(found.path.read_text())["kernels"]) == len(kernels)


def test_dense_is_an_empty_plan(tmp_path: Path) -> None:
    net = redrawn(Net())
    engine = export_dense(net, (torch.zeros(1, 3, 16, 16),), load_device("null"), tmp_path / "dense")
    assert engine.pruned is not None and engine.pruned.plan.is_empty
    assert len(as_pruned(net, ()).origin) == 64


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, device = pruned(redrawn(Net())), load_device("null")
    before = export(given, device, tmp_path / "engine").path.read_bytes()

    def fail(given: object, folder: Path, precision: str, **_: object) -> Engine:
        (folder / "model.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backends.find_backend("null"), "export", fail)
    with pytest.raises(Exception, match="No space left"):
        export(given, device, tmp_path / "engine")
    assert [item.name for item in tmp_path.iterdir()] == ["engine"]
    assert (tmp_path / "engine" / "model.json").read_bytes() == before


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    given, device = pruned(redrawn(Net())), load_device("null")
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holiday\.jpg"):
        export(given, device, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        export(given, device, tmp_path / "holiday.jpg")
    assert (tmp_path / "holiday.jpg").read_bytes() == b"x"


def test_what_is_missing_or_unknown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, device = pruned(redrawn(Net())), load_device("null")
    with pytest.raises(InputError, match="no precision 'int8' .known: fp32"):
        export(given, device, tmp_path / "engine", precision="int8")
    monkeypatch.setattr(backends.find_backend("null"), "available", lambda: "install it so")
    with pytest.raises(RuntimeMissing, match="install it so"):
        export(given, device, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []
