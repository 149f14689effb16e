from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune import bundle as bundle_module
from edgeprune.benching import bench, verify_bundle
from edgeprune.bundle import MANIFEST, SEAL, Bundle, Contents, read_bundle, write_bundle
from edgeprune.bundle_core import seal_of
from edgeprune.cli import main
from edgeprune.device import load_device
from edgeprune.errors import InputError, StorageError, TamperedError
from edgeprune.exporting import export, export_dense
from edgeprune.loading import load_bundle
from edgeprune.measurement import Timing
from edgeprune.parity import samples
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.verifying import verify
from edgeprune.weights import load_weights
from tests.small_models import Net, patiently, pruned, redrawn

QUICK = Timing(warmup_ms=5, burst_ms=1, min_rounds=60, max_rounds=60, max_seconds=10)
Require = Callable[[str], None]


def make(folder: Path, device_name: str = "null", *, width: int = 8, budget: str | None = "0.95x") -> Bundle:
    device = load_device(device_name)
    scratch = folder.with_name(f"{folder.name}-scratch")
    given: Pruned = pruned(redrawn(Net(width)))
    engine = export(given, device, scratch / "pruned")
    dense = export_dense(redrawn(Net(64)), given.example_inputs, device, scratch / "dense")
    result = patiently(lambda: verify(engine, dense=dense, budget=budget, timing=QUICK))
    result = replace(result, predicted_ms=result.pruned.p50_ms * 1.01, quality={"pruned": {"n": 0}})
    contents = Contents(
        engine=engine,
        dense=dense,
        verification=result,
        model="tests.small_models:Net",
        preprocessing={"resize": 16, "crop": [16, 16]},
        command=("edgeprune fit tests.small_models:Net",),
        samples=samples(given),
    )
    written = write_bundle(folder, contents)
    shutil.rmtree(scratch)
    return written


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bundles") / "net").folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "net")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, with its hash: what is refused then is refused by what it says."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))
    (folder / SEAL).write_bytes(seal_of((folder / MANIFEST).read_bytes()))


@pytest.mark.unit
def test_a_bundle_holds_what_is_deployed_and_where_it_came_from(whole: Path) -> None:
    found = read_bundle(whole)
    names = {"model.json", "dense/model.json", "plan.json", "weights.safetensors", "preprocessing.json", "rebuild.sh"}
    names |= {"run.py"}
    assert found.manifest.files.keys() == names | {"parity.safetensors"}
    document = found.document
    assert (document["schema"], document["model"]["name"]) == (1, "tests.small_models:Net")
    assert document["latency"]["origin"] == "modelled"
    assert document["latency"]["met"] is True
    assert document["latency"]["pruned"]["ratio"] < 0.95
    assert document["fingerprint"]["modelled"] is True
    assert document["versions"].keys() >= {"python", "torch", "numpy"}
    assert document["engine"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, 3, 16, 16]}]
    assert Plan.from_json(whole / "plan.json").dropped == ("blocks.0",)
    again = Net(8)
    load_weights(again, whole / "weights.safetensors")
    kept = found.samples()
    assert len(kept) == 2 and kept[0].inputs[0].shape == (1, 3, 16, 16) and kept[0].outputs[0].shape == (1, 10)


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(40))
def test_any_changed_file_is_refused_and_named(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    victim = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST))
    content = bytearray(victim.read_bytes())
    change = rng.choice(["flip", "cut", "grow", "drop"])
    if change == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif change == "cut":
        del content[rng.randrange(len(content)) :]
    elif change == "grow":
        content += b"\0"
    if change == "drop":
        victim.unlink()
    else:
        victim.write_bytes(content)
    with pytest.raises(TamperedError, match=victim.name):
        read_bundle(folder)


@pytest.mark.unit
@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/hostname", "dense/../../outside.json", "..\\outside.json", ""]
)
def test_paths_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside.json").write_text("{}")
    edit(folder, lambda d: d["files"].update({name: {"sha256": "0" * 64, "bytes": 2}}))
    with pytest.raises(TamperedError, match="leaves the folder"):
        read_bundle(folder)


@pytest.mark.unit
def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    engine = folder / "model.json"
    engine.rename(folder.parent / "model.json")
    engine.symlink_to(folder.parent / "model.json")
    with pytest.raises(TamperedError, match="link that leaves"):
        read_bundle(folder)


@pytest.mark.unit
def test_an_engine_without_a_hash_and_a_stray_file_are_refused(folder: Path) -> None:
    edit(folder, lambda d: d["files"].pop("model.json"))
    with pytest.raises(TamperedError, match=r"model\.json"):
        read_bundle(folder)
    edit(folder, lambda d: d["engine"].update(path="plan.json"))
    with pytest.raises(TamperedError, match=r"'plan\.json' is not one of its files"):
        read_bundle(folder)


@pytest.mark.unit
def test_a_file_has_one_purpose(folder: Path) -> None:
    edit(folder, lambda d: d["engine"].update(path="plan.json", files=["plan.json"]))
    with pytest.raises(TamperedError, match=r"'plan\.json' is not where the files of the engine are"):
        read_bundle(folder)
    edit(folder, lambda d: d["engine"].update(path="model.json", files=["model.json"]))
    read_bundle(folder)
    (folder / "notes.txt").write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    edit(folder, lambda d: d["files"].update({"notes.txt": {"sha256": digest, "bytes": 1}}))
    with pytest.raises(TamperedError, match=r"lists 'notes\.txt', which is no part of a bundle"):
        read_bundle(folder)


@pytest.mark.unit
def test_a_stray_file_is_refused(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"x")
    with pytest.raises(TamperedError, match=r"model\.onnx\.data is not in the manifest"):
        read_bundle(folder)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.update(schema=2), "schema"),
        (lambda d: d.pop("engine"), "engine"),
        (lambda d: d["engine"].pop("path"), "engine.path"),
        (lambda d: d["engine"]["inputs"][0].update(shape="wide"), "engine.inputs"),
        (lambda d: d["files"]["plan.json"].update(sha256="short"), "files.plan.json.sha256"),
        (lambda d: d.update(device={"name": "x"}), "device"),
    ],
)
def test_a_faulty_manifest_is_named_by_place(folder: Path, change: Callable[[Any], object], place: str) -> None:
    edit(folder, change)
    with pytest.raises(InputError) as caught:
        read_bundle(folder)
    assert f"{MANIFEST}:{place}" in str(caught.value)


@pytest.mark.unit
def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundle"):
        read_bundle(tmp_path / "nothing")
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="not a manifest"):
        read_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(InputError, match="expected schema 1"):
        read_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text('{"schema": 1}')
    with pytest.raises(TamperedError, match="manifest.sha256 is missing"):
        read_bundle(tmp_path)


@pytest.mark.unit
def test_a_failed_write_leaves_the_old_bundle_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full(samples: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "_save_samples", full)
    with pytest.raises(StorageError, match="No space left"):
        make(folder)
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    with pytest.raises(StorageError, match="No space left"):
        make(tmp_path / "new")
    assert {item.name for item in tmp_path.iterdir()} == {"net", "net-scratch", "new-scratch"}


@pytest.mark.unit
def test_only_a_bundle_is_replaced(folder: Path, tmp_path: Path) -> None:
    make(folder, width=16)
    assert read_bundle(folder).document["engine"]["inputs"]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.json").write_text("{}")
    with pytest.raises(InputError, match="holds other files"):
        make(tmp_path / "papers")
    assert (tmp_path / "papers" / "thesis.json").read_text() == "{}"


@pytest.mark.integration
@pytest.mark.timed
@pytest.mark.parametrize("name", ["host-openvino", "host-onnxruntime", "host-tflite"])
def test_a_bundle_moves_runs_and_is_verified_elsewhere(name: str, require: Require, tmp_path: Path) -> None:
    require(load_device(name).backend)
    made = make(tmp_path / "here", name, budget=None)
    there = made.folder.rename(tmp_path / "there")
    loaded = load_bundle(there)
    assert (loaded.input_names, loaded.output_names) == (("x",), ("output",))
    for sample in read_bundle(there).samples():
        found = loaded.run(sample.inputs[0])
        assert isinstance(found, np.ndarray)
        assert np.abs(found - sample.outputs[0]).max() <= 1e-4 * np.abs(sample.outputs[0]).max()
        by_name = loaded.run({"x": sample.inputs[0]})
        assert np.array_equal(np.asarray(by_name), found)
    with pytest.raises(InputError, match=r"'x': expected float32 \[1, 3, 16, 16\], found float64 \[1, 3, 16, 16\]"):
        loaded.run(np.zeros((1, 3, 16, 16)))
    with pytest.raises(InputError, match=r"found float32 \[3, 16, 16\]"):
        loaded.run(np.zeros((3, 16, 16), np.float32))
    with pytest.raises(InputError, match=r"no input 'X' \(its inputs: x\)"):
        loaded.run({"X": np.zeros((1, 3, 16, 16), np.float32)})
    with pytest.raises(InputError, match="input 'x' is missing"):
        loaded.run({})
    loaded.close()
    with pytest.raises(InputError, match="was closed"):
        loaded.run(np.zeros((1, 3, 16, 16), np.float32))
    command = [sys.executable, "run.py", "--json", "--seconds", "1"]
    done = subprocess.run(command, cwd=there, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert told["parity"]["error"] < 1e-4 and told["origin"] == "measured" and told["ratio"]["value"] > 0
    result = patiently(lambda: verify_bundle(there, budget="100s", timing=QUICK))
    assert result.parity is not None and result.parity.error < 1e-4
    assert (result.origin, result.model, result.bundle) == ("measured", "tests.small_models:Net", str(there))
    assert result.predicted_ms is not None  # the same machine: the prediction moves to this run's clock


@pytest.mark.unit
def test_loading_needs_no_torch() -> None:
    code = "import sys, edgeprune.loading; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.integration
@pytest.mark.timed
def test_bench_times_bundles_together_and_shares_the_dense_engine(whole: Path, tmp_path: Path) -> None:
    second = make(tmp_path / "wide", width=32).folder
    small, wide = patiently(lambda: bench([whole, second], timing=QUICK))
    assert small.pruned.p50_ms < wide.pruned.p50_ms
    assert small.dense is not None and wide.dense is not None and small.dense.p50_ms == wide.dense.p50_ms
    assert small.origin == "modelled" and small.met is None
    with pytest.raises(InputError, match="for null, device 'host-openvino' runs openvino"):
        bench([whole], device=load_device("host-openvino"))


@pytest.mark.integration
@pytest.mark.timed
def test_the_command_line(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ["--duration-s", "5", "--min-iters", "40", "--warmup-ms", "1"]
    assert main(["verify", str(whole), *fast]) == 0
    text = capsys.readouterr().out
    assert "MET" in text and "modelled" in text
    assert main(["verify", str(whole), "--budget", "0.01x", "--json", *fast]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["met"] is False and document["budget_ms"] > 0
    assert main(["bench", str(whole), "--json", *fast]) == 0
    assert json.loads(capsys.readouterr().out)["dense"]["p50_ms"] > 0
    assert main(["bench", str(whole), str(whole), *fast]) == 0
    assert capsys.readouterr().out.count("latency p50") == 2
    assert main(["verify", str(whole), "--budget", "8", "--json", *fast]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.integration
@pytest.mark.timed
def test_export_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgeprune.graph import trace

    net = redrawn(Net())
    plan = Plan(structure_hash=trace(net, pruned(net).example_inputs).structure_hash)
    plan.to_json(tmp_path / "plan.json")
    given = ["export", "tests.small_models:Net", "--shape", "1x3x16x16", "--device", "null"]
    out = tmp_path / "built" / "net"
    assert main([*given, "--plan", str(tmp_path / "plan.json"), "--out", str(out)]) == 0
    assert "not measured yet" in capsys.readouterr().out
    assert read_bundle(out).document["latency"] is None
    assert main(["verify", str(out), "--budget", "1x", "--duration-s", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["met"] is True
    assert main([*given, "--out", str(out)]) == 2
    assert "--plan" in capsys.readouterr().err
    assert main([*given, "--plan", str(tmp_path / "none.json"), "--out", str(tmp_path / "x"), "--json"]) == 2
    assert "none.json" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "x").exists()
