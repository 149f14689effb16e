"""run.py, which a bundle carries: it checks, measures and runs the bundle with numpy and the runtime alone."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.backends import backend_names, find_backend
from edgeprune.bundle import read_bundle
from edgeprune.bundle_engine import differences, parity_error, read_safetensors
from edgeprune.bundle_program import assemble_run
from tests.test_bundle import make

FILES = 8
ALLOWED = {"numpy", "openvino", "onnxruntime", "ai_edge_litert", "tflite_runtime", "tensorrt", "tensorrt_rtx"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bundles") / "net").folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "elsewhere" / "net")


def run(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """With the bundle's folder on the path twice: as the script's, and as the working one."""
    command, environment = [python, "run.py", *arguments], os.environ | {"PYTHONPATH": "."}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.unit
@pytest.mark.parametrize("name", backend_names())
def test_it_imports_nothing_else_and_is_python_3_8(name: str) -> None:
    text = assemble_run({name: find_backend(name).runner_path()})
    tree = ast.parse(text, feature_version=(3, 8))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    assert found <= ALLOWED | sys.stdlib_module_names


@pytest.mark.integration
def test_verify_prints_what_edgeprune_would(folder: Path) -> None:
    done = run(folder, "--json", "--seconds", "1")
    told = answer(done)
    assert done.returncode == 0
    known = read_bundle(folder).document["latency"]  # nothing was left in the folder
    assert told["origin"] == "modelled" and told["files"] == FILES
    assert told["ratio"]["value"] == pytest.approx(known["pruned"]["ratio"], rel=1e-5)
    assert told["pruned"]["p50_ms"] == pytest.approx(known["pruned"]["p50_ms"], rel=1e-2)
    assert told["differences"] == []
    lines = run(folder, "verify", "--seconds", "1").stdout.splitlines()
    assert lines[0].startswith("tests.small_models:Net for null: null 1, fp32")
    assert any(line.startswith("  latency p50") and "x [" in line for line in lines)


@pytest.mark.integration
def test_arrays_in_arrays_out(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 16, 16), np.float32))
    told = answer(run(folder, "run", str(tmp_path / "x.npy"), "--out", str(tmp_path / "y"), "--json"))
    assert told["outputs"] == [{"name": "output", "dtype": "float32", "shape": [1, 10], "mean": 0.0}]
    with np.load(tmp_path / "y.npz") as file:
        assert file["output"].shape == (1, 10)
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 16, 16)))
    done = run(folder, "run", str(tmp_path / "x.npz"), "--json")
    error = answer(done)["error"]
    assert (done.returncode, error["kind"], error["exit_code"]) == (2, "input", 2)
    assert error["message"] == "input 'x': expected float32 [1, 3, 16, 16], found float64 [3, 16, 16]"
    done = run(folder, "run", "nowhere.npy")
    assert done.returncode == 2 and "nowhere.npy" in done.stderr and not done.stdout


@pytest.mark.integration
def test_imported_it_leaves_nothing_behind(folder: Path) -> None:
    code = "import numpy as np; from run import load; e = load(); print(e.run(np.zeros((1, 3, 16, 16), 'f4')).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 10)", done.stderr
    read_bundle(folder)


@pytest.mark.integration
def test_a_module_planted_beside_it_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Python would take `argparse` from the folder of a script before its own."""
    (folder / "argparse.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = run(folder, "check", "--json")
    assert done.returncode == 1 and "argparse.py is not in the manifest" in answer(done)["error"]["message"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.integration
def test_hashes_alone_need_no_numpy_under_an_old_python(folder: Path) -> None:
    homes = sorted((Path.home() / ".pyenv" / "versions").glob("3.8.*/bin/python"))
    if not homes:
        pytest.skip("no Python 3.8 under ~/.pyenv/versions")
    assert run(folder, "check", python=str(homes[-1])).stdout == f"{FILES} files as the manifest has them\n"
    (folder / "plan.json").write_text("{}")
    done = run(folder, "check", python=str(homes[-1]))
    assert done.returncode == 1 and "plan.json has 2 bytes, the manifest says" in done.stderr


@pytest.mark.unit
def test_what_is_not_as_it_was() -> None:
    cpu = {"name": "Xeon", "family": "6", "model": "143", "cores": 2}
    then = {"backend": "openvino", "version": "2026.4.1", "cpu": {**cpu, "isa": ["avx2"]}, "modelled": False}
    here = {"version": "2026.4.1", "cpu": cpu, "accelerator": {}, "modelled": False}
    assert differences(then, here) == [] and differences({}, here) == []
    other = {**here, "version": "2025.0", "cpu": {**cpu, "cores": 64}}
    assert differences(then, other) == [
        "runtime: openvino 2026.4.1 then, 2025.0 here",
        "CPU: name Xeon family 6 model 143 cores 2 then, name Xeon family 6 model 143 cores 64 here",
    ]
    gpu = {**here, "accelerator": {"gpu": "Orin"}}
    assert differences(then, gpu) == ["accelerator: none then, gpu Orin here"]
    boards = [{"board": {"board": "Orin Nano", "power_mode": mode}} for mode in ("15W", "MAXN")]
    assert differences({**then, **boards[0]}, {**here, **boards[1]}) == [
        "board: board Orin Nano power_mode 15W then, board Orin Nano power_mode MAXN here"
    ]


@pytest.mark.unit
def test_safetensors_read_by_the_standard_library(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays: dict[str, Any] = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "b": np.array([], np.float32),
        "c": np.array(True),
    }
    arrays["d"] = np.array([[1.5]], np.float16)
    save_file(arrays, tmp_path / "x.safetensors")
    found = read_safetensors(str(tmp_path / "x.safetensors"))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


@pytest.mark.unit
def test_parity_is_the_largest_difference_over_the_largest_output() -> None:
    a, b = np.array([1.0, 2.5], np.float32), np.array([1.0, 2.0], np.float32)
    assert parity_error([a, b], [b, b]) == 0.25
    assert parity_error([np.array([np.nan], np.float32)], [np.array([1.0], np.float32)]) == float("inf")
    assert parity_error([a], [b[:1]]) == parity_error([a], [a, b]) == float("inf")
