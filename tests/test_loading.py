"""`load_bundle(path).run(x)`: what goes in, what comes out, and what is wrong with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import transport
from edgeprune.benching import bench, check_device, explained, verify_bundle
from edgeprune.bundle import Contents, read_bundle, write_bundle
from edgeprune.bundle_core import Refused
from edgeprune.bundle_engine import InputFault, LoadedEngine, checked_inputs, use_cache
from edgeprune.cli import main
from edgeprune.device import load_device
from edgeprune.errors import InputError, MeasurementError, RuntimeMissing
from edgeprune.exporting import export
from edgeprune.loading import Outputs, load_bundle
from edgeprune.local_channel import LocalChannel
from tests.small_models import Net, pruned, redrawn
from tests.test_bundle import QUICK, Require, edit, make

SPECS = [{"name": "ids", "dtype": "int64", "shape": [1, 4]}, {"name": "mask", "dtype": "float32", "shape": [1, 4]}]
IDS, MASK = np.zeros((1, 4), np.int64), np.ones((1, 4), np.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bundles") / "net").folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "net")


class Adds:
    """A runner with two inputs and two outputs: x + y and x - y; counts what is let go of."""

    def __init__(self) -> None:
        self.given: dict[int, np.ndarray[Any, Any]] = {}
        self.unloaded = 0

    def load(self, path: str, options: dict[str, Any]) -> str:
        return path

    def inputs(self, handle: str) -> list[dict[str, Any]]:
        return [{"name": name, "dtype": "float32", "shape": [2]} for name in ("x", "y")]

    outputs = inputs

    def set_input(self, handle: str, index: int, data: bytes) -> None:
        self.given[index] = np.frombuffer(data, np.float32)

    def run(self, handle: str) -> None: ...

    def get_output(self, handle: str, index: int) -> bytes:
        x, y = self.given[0], self.given[1]
        return bytes((x + y if index == 0 else x - y).tobytes())

    def unload(self, handle: str) -> None:
        self.unloaded += 1


@pytest.mark.unit
def test_several_inputs_by_place_or_name_give_several_outputs_in_order() -> None:
    runner = Adds()
    entry = {"inputs": runner.inputs(""), "outputs": runner.outputs("")}
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), np.array([3.0, 5.0], np.float32)
    with LoadedEngine(runner, "model", {}, entry) as engine:
        for found in (engine.run(x, y), engine.run(x, y=y), engine.run(y=y, x=x), engine.run({"x": x, "y": y})):
            assert [array.tolist() for array in found] == [[4.0, 7.0], [-2.0, -3.0]]
    assert runner.unloaded == 1
    engine.close()
    assert runner.unloaded == 1
    with pytest.raises(InputFault, match="was closed"):
        engine.run(x, y)
    other = {**entry, "outputs": [*entry["outputs"][:1], {"name": "z", "dtype": "float32", "shape": [3]}]}
    with pytest.raises(Refused, match=r"'z' is float32 \[3\] by the manifest, float32 \[2\] in the engine"):
        LoadedEngine(runner, "model", {}, other)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("given", "named", "words"),
    [
        ((IDS,), {}, r"input 'mask' is missing: expected float32 \[1, 4\]"),
        ((IDS, MASK, MASK), {}, r"has 2 inputs \(ids, mask\), 3 were given"),
        ((IDS, MASK), {"mask": MASK}, "'mask' is given twice"),
        ((IDS,), {"masks": MASK}, "no input 'masks'; did you mean 'mask'"),
        ((IDS.astype(np.int32), MASK), {}, r"input 'ids': expected int64 \[1, 4\], found int32 \[1, 4\]"),
        ((IDS, MASK[0]), {}, r"input 'mask': expected float32 \[1, 4\], found float32 \[4\]"),
        ((IDS, torch.ones(1, 4, dtype=torch.bfloat16)), {}, "bfloat16"),
        ((IDS, [[1.0], [1.0, 2.0]]), {}, "is no array"),
        ((IDS, "text"), {}, "input 'mask': expected float32"),
        ((), {}, "input 'ids' is missing"),
    ],
)
def test_what_is_wrong_with_an_input_is_named(given: tuple[Any, ...], named: dict[str, Any], words: str) -> None:
    with pytest.raises(InputFault, match=words):
        checked_inputs(SPECS, given, named)


@pytest.mark.integration
@pytest.mark.timed
def test_pictures_go_through_the_manifests_preprocessing(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    with load_bundle(folder) as loaded:
        x = loaded.preprocess([tmp_path / "red.png"])
        assert x.shape == (1, 3, 16, 16) and x.dtype == np.float32
        assert x[0, :, 0, 0] == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-6)
        found = loaded.run_pictures([tmp_path / "red.png"] * 3)
        assert isinstance(found, np.ndarray) and found.shape == (3, 10)
        with pytest.raises(InputError, match=r"nothing\.png: no such picture"):
            loaded.run_pictures([tmp_path / "nothing.png"])
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(InputError, match=r"text\.png: not a readable picture"):
            loaded.preprocess([tmp_path / "text.png"])
        with pytest.raises(InputError, match="no pictures"):
            loaded.run_pictures([])
    edit(folder, lambda d: d["layout"].update(x="NHWC"))
    with load_bundle(folder) as loaded:
        assert np.array_equal(loaded.preprocess([tmp_path / "red.png"]), x.transpose(0, 2, 3, 1))


@pytest.mark.integration
@pytest.mark.timed
def test_a_runtime_that_is_too_old_is_told_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, lambda d: d["runtime"].update(least="2"))
    for refuse in (lambda: load_bundle(folder), lambda: verify_bundle(folder)):
        with pytest.raises(RuntimeMissing, match=r"needs null 2 or later.*here is 1: install a newer one"):
            refuse()
    assert main(["verify", str(folder)]) == 5
    assert "needs null 2 or later" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.timed
def test_another_version_is_told_beside_the_measurement(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, lambda d: d["fingerprint"].update(version="0"))
    result = verify_bundle(folder, timing=QUICK)
    assert result.differences == ("runtime: null 0 then, 1 here",)
    assert result.to_json()["differences"] == ["runtime: null 0 then, 1 here"]
    assert main(["verify", str(folder), "--duration-s", "5"]) == 0
    assert "  differs     runtime: null 0 then, 1 here\n" in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.timed
def test_the_device_is_asked_in_the_process_that_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def counted(*arguments: Any) -> LocalChannel:
        started.append(arguments)
        return LocalChannel(*arguments)

    monkeypatch.setattr(transport, "LocalChannel", counted)
    verify_bundle(folder, timing=QUICK)
    assert len(started) == 1  # a formula's order of loading makes no difference
    bench([folder, folder], timing=QUICK)
    assert len(started) == 2


@pytest.mark.integration
@pytest.mark.timed
def test_what_openvino_compiled_is_kept_where_the_user_says(tmp_path: Path, require: Require) -> None:
    require("openvino")
    device, cache = load_device("host-openvino"), tmp_path / "cache"
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)

    def bundled(width: int) -> Path:
        engine = export(pruned(redrawn(Net(width))), device, tmp_path / f"engine{width}")
        return write_bundle(tmp_path / f"net{width}", Contents(engine=engine, dense=None)).folder

    def loaded(folder: Path, cache: Path | None) -> tuple[Outputs, bool]:
        with load_bundle(folder, cache=cache) as net:
            return net.run(x), net._loaded._handle.compiled.get_property("LOADED_FROM_CACHE")

    first, other = bundled(8), bundled(16)
    expected, _ = loaded(first, None)
    for again in (False, True):
        found, from_cache = loaded(first, cache)
        assert from_cache is again and np.array_equal(found, expected)
    assert len([*cache.glob("*.blob")]) == 1
    assert not loaded(other, cache)[1]
    moved = first.rename(tmp_path / "moved")  # what is in its files counts, not where they are
    code = "import sys; sys.path.insert(0, '.'); import run; handle = run.load(cache=sys.argv[1])._handle"
    code += "; print(handle.compiled.get_property('LOADED_FROM_CACHE'))"
    done = subprocess.run([sys.executable, "-c", code, cache], cwd=moved, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.unit
def test_a_cache_that_can_not_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="null keeps no compiled models: leave the cache out"):
        load_bundle(folder, cache=tmp_path / "cache")
    keeps = SimpleNamespace(NAME="keeps", use_cache=print)
    with pytest.raises(Refused, match=r"cache .*net/inside lies in the bundle"):
        use_cache(keeps, str(folder / "inside"), str(folder / "model.xml"))
    with pytest.raises(Refused, match=r"cache .*plan\.json/x can't be made: Not a directory"):
        use_cache(keeps, str(folder / "plan.json" / "x"), str(tmp_path / "other" / "model.xml"))


@pytest.mark.unit
def test_what_fails_elsewhere_is_explained(folder: Path) -> None:
    bundle = read_bundle(folder)
    hello = {"version": "1", "cpu": {}, "accelerator": {"gpu": "Orin"}, "modelled": False}
    differs = check_device(bundle, bundle.manifest.device, hello)
    assert differs == ("accelerator: none then, gpu Orin here",)
    with (
        pytest.raises(MeasurementError, match=r"(?s)it broke\n  accelerator: none then.*rebuild\.sh"),
        explained(bundle, differs),
    ):
        raise MeasurementError("it broke")
    with pytest.raises(MeasurementError, match="^it broke$"), explained(bundle, ()):
        raise MeasurementError("it broke")
