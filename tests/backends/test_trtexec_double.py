"""TensorRT from profile to export against a test double of trtexec. Every number here comes from the double's formula.

What is shown is that edgeprune and trtexec's documented command line fit together; of latency on a GPU it says nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.backends import find_backend
from edgeprune.cli import main
from edgeprune.device import Device, load_device
from edgeprune.errors import MeasurementError, RuntimeMissing
from edgeprune.exporting import export
from edgeprune.kernel import Kernel
from edgeprune.measurement import Timing
from edgeprune.profiling import profile
from edgeprune.ranges import drawn_batches
from edgeprune.staircase import staircase_kernels
from edgeprune.table import read_lines
from edgeprune.transport import open_session
from tests.backends.test_contract import KERNELS, agrees, conv, draw
from tests.small_models import Net, pruned, redrawn

pytestmark = pytest.mark.integration

DOUBLE = Path(__file__).with_name("fake_trtexec.py")
DIALECTS = ["8.5", "8.6", "10.3", "11.1"]
QUICK = Timing(warmup_ms=1, burst_ms=0.5, min_rounds=3, max_rounds=3, burst_percentile=50.0)
ALL = Device(name="all", backend="tensorrt", precisions=("fp16", "fp32", "int8"))
HALF = Device(name="double", backend="tensorrt", precisions=("fp16", "fp32"))
FULL = Device(name="double", backend="tensorrt")
ONCE = replace(QUICK, min_rounds=1, max_rounds=1)
SMALL = [conv(16, 24, "bias", "relu"), conv(16, 40, "bias", "relu")]
Set = Callable[..., None]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Set:
    """`double(dialect="8.6", fault="oom")`: sets the environment that the double reads."""
    script = tmp_path_factory.mktemp("bin") / "trtexec"
    # started hundreds of times: without site-packages, but where it computes outputs
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--exportOutput*) alone= ;; *) alone="-I -S" ;; esac\n'
        f'exec "{sys.executable}" $alone "{DOUBLE}" "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(script))
    reader = find_backend("tensorrt").runner_path().resolve().with_name("runner_onnx.py")
    monkeypatch.setenv("FAKE_TRTEXEC_RUNNER", str(reader))

    def configure(**settings: object) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"FAKE_TRTEXEC_{name.upper()}", str(value))

    return configure


def commands(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_builds_runs_and_times(dialect: str, double: Set, tmp_path: Path) -> None:
    """The double knows the flags of its dialect and refuses others; its outputs are those of ONNX's reference."""
    double(dialect=dialect, log=tmp_path / "log")
    kernel = replace(conv(16, 24, "bias", "add", "relu"), precision="fp16")
    path = find_backend("tensorrt").build(kernel, tmp_path)
    with open_session(HALF) as session:
        assert ".".join(session.hello()["version"].split(".")[:2]) == dialect
        loaded = session.load("k", path, profile=True)
        inputs = [draw(spec.shape, index).astype(np.float16) for index, spec in enumerate(loaded.inputs)]
        (output,) = session.run("k", inputs)
        measured = session.measure(["k"], timing=QUICK)
        nodes = session.node_times("k")
    assert [spec.dtype for spec in (*loaded.inputs, *loaded.outputs)] == ["float16"] * 3
    agrees_in_half(output, path, dict(zip((spec.name for spec in loaded.inputs), inputs, strict=True)))
    compute_us = 20 + path.stat().st_size * 1e-3
    assert measured.percentile_us("k") == pytest.approx(compute_us + 15, rel=2e-3)  # 15 us of transfers, 11.x too
    assert nodes is not None and nodes.device_us == pytest.approx(compute_us, rel=2e-3)
    assert nodes.nodes[0]["covers"] == ["Convv0", "Addv1", "Reluv2"]
    built = next(command for command in commands(tmp_path / "log") if any("--onnx" in flag for flag in command))
    assert ("--fp16" in built) == dialect.startswith("8")


def agrees_in_half(output: np.ndarray[Any, Any], path: Path, inputs: dict[str, np.ndarray[Any, Any]]) -> None:
    import onnx.reference

    (expected,) = map(np.asarray, onnx.reference.ReferenceEvaluator(str(path)).run(None, inputs))
    assert output.dtype == np.float16
    assert np.abs(output.astype(np.float32) - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[9], KERNELS[21], KERNELS[32]], ids=lambda kernel: kernel.key)
def test_outputs_survive_trtexecs_files(kernel: Kernel, double: Set, tmp_path: Path) -> None:
    path = find_backend("tensorrt").build(kernel, tmp_path)
    with open_session(FULL) as session:
        loaded = session.load("k", path)
        inputs = [draw(spec.shape, index) for index, spec in enumerate(loaded.inputs)]
        (output,) = session.run("k", inputs)
    agrees(output, kernel, path, dict(zip((spec.name for spec in loaded.inputs), inputs, strict=True)))


def test_a_wrong_flag_would_be_noticed(double: Set, tmp_path: Path) -> None:
    """Negative control of the double: TensorRT 10 knows no --buildOnly."""
    double(dialect="10.3")
    done = subprocess.run(
        [os.environ["TRTEXEC"], "--onnx=x", "--buildOnly"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "[E] Unknown option: --buildOnly" in done.stdout


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("oom", "building the engine failed: out of memory: 2: "),
        ("refuse", "building the engine failed: Failed to parse onnx file"),
        ("crash", "building the engine failed: trtexec was ended by SIGSEGV"),
        ("no-engine", "wrote no engine"),
        ("silent", "building the engine failed: "),
        ("empty", "trtexec's times.json can't be read"),
        ("truncated", "trtexec's times.json can't be read"),
        ("nan", "trtexec's times.json can't be read"),
        ("short", "trtexec told the times of 1 runs, 4 were asked for"),
        ("profile-nan", "trtexec's profile.json can't be read"),
    ],
)
def test_a_kernel_that_fails_is_named_and_the_rest_goes_on(fault: str, words: str, double: Set, tmp_path: Path) -> None:
    bad = SMALL[1]
    name = find_backend("tensorrt").build(bad, tmp_path).name
    double(fault=fault, fault_in=name)
    path = tmp_path / "table.jsonl"
    table = profile(SMALL, FULL, table_path=path, timing=ONCE)
    assert set(table.failures) == {bad}
    assert table.failures[bad].startswith(f"{bad.key}: ")
    assert words in table.failures[bad]
    assert [kernel for kernel in SMALL if kernel in table] == SMALL[:1]


def test_a_hang_is_ended(double: Set, tmp_path: Path) -> None:
    name = find_backend("tensorrt").build(SMALL[0], tmp_path).name
    double(fault="hang", fault_in=name)
    device = Device(name="double", backend="tensorrt", options={"build_timeout_s": 1})
    with open_session(device) as session, pytest.raises(MeasurementError, match="still building the engine after 1 s"):
        session.load("slow", find_backend("tensorrt").build(SMALL[0], tmp_path))


def test_a_reference_that_fails_ends_the_profile(double: Set, tmp_path: Path) -> None:
    """Without it there is no ratio, and no kernel is to blame."""
    double(fault="oom", fault_in="add_")
    with pytest.raises(MeasurementError, match="memory: building the engine failed: out of memory"):
        profile(SMALL[:1], FULL, table_path=tmp_path / "table.jsonl", timing=ONCE)


@pytest.mark.parametrize("dialect", ["8.6", "10.3"])
def test_a_row_tells_compute_time_and_sparse_tactics(dialect: str, double: Set, tmp_path: Path) -> None:
    double(dialect=dialect)
    dense = replace(conv(64, 64, "bias"), precision="fp16")
    sparse = replace(dense, sparsity="2:4")
    for verbose in (False, True):
        path = tmp_path / f"{verbose}.jsonl"
        device = replace_options(HALF, verbose=verbose)
        profile([dense, sparse], device, table_path=path, timing=ONCE)
        told = {str(row.kernel.get("sparsity", "dense")): row for row in read_lines([path]).rows}
        silent = dialect == "10.3" and not verbose  # there TensorRT tells in its verbose log alone
        assert [told["dense"].sparse, told["2:4"].sparse] == ([None, None] if silent else [False, True])
        assert told["dense"].device_us == pytest.approx(told["dense"].median_us - 15, rel=2e-3)


def replace_options(device: Device, **options: Any) -> Device:
    return device.model_copy(update={"options": options})


def test_profile_of_the_shipped_device_gives_a_table(
    double: Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, against the double. Each burst is a process: of the standard kernels some of each family."""
    few = staircase_kernels("fp16")[::9]
    monkeypatch.setattr("edgeprune.staircase.staircase_kernels", lambda precision: few)
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    double(dialect="10.3")
    assert main(["profile", "--device", "host-tensorrt", "--min-iters", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kernels"], document["failures"], document["origin"]) == (len(few), {}, "measured")
    rows = read_lines([Path(document["table"])]).rows
    assert [Kernel.from_json(row.kernel) for row in rows] == list(few)
    assert all(row.device_us and row.median_us - row.device_us == pytest.approx(15, abs=0.5) for row in rows)
    assert Path(document["table"]).name == "tensorrt_fp16.jsonl"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_exported_recipe_builds_an_engine_in_every_dialect(precision: str, double: Set, tmp_path: Path) -> None:
    double(log=tmp_path / "log")
    given = pruned(redrawn(Net()))
    ranges = drawn_batches(given.example_inputs)
    engine = export(given, ALL, tmp_path / "engine", precision=precision, calibration=ranges)
    assert [file.name for file in engine.files] == ["model.onnx", "build_engine.sh"]
    assert [spec.dtype for spec in (*engine.inputs, *engine.outputs)] == ["float32", "float32"]
    for dialect in DIALECTS:
        double(dialect=dialect)
        done = subprocess.run(
            ["sh", engine.folder / "build_engine.sh"], cwd="/", capture_output=True, text=True, check=False
        )
        assert "&&&& PASSED" in done.stdout, done.stdout + done.stderr
        built, profiled = commands(tmp_path / "log")[-2:]
        assert ("--fp16" in built) == (dialect.startswith("8") and precision != "fp32")
        assert ("--int8" in built) == (dialect.startswith("8") and precision == "int8")
        assert ("--stronglyTyped" in built) == (dialect == "10.3")
        assert ("--separateProfileRun" in profiled) == (dialect != "11.1")
        beside = tmp_path / "engine.built"
        assert {file.name for file in beside.iterdir()} == {"model.engine", "layers_model.json", "profile_model.json"}
        layers = json.loads((beside / "layers_model.json").read_text())["Layers"]
        times = json.loads((beside / "profile_model.json").read_text())
        assert [layer["Name"] for layer in layers] == [entry["name"] for entry in times if "name" in entry]
        shutil.rmtree(beside)
    assert {file.name for file in engine.folder.iterdir()} == {"model.onnx", "build_engine.sh"}
    chosen = tmp_path / "of mine"
    subprocess.run(["sh", engine.folder / "build_engine.sh", chosen], capture_output=True, check=True)
    assert (chosen / "model.engine").is_file()


def test_an_exported_network_runs_as_torch_does(double: Set, tmp_path: Path) -> None:
    """By the double's reference evaluator: what is in the ONNX, half precision inside, is the network."""
    given = pruned(redrawn(Net()))
    engine = export(given, HALF, tmp_path / "engine", precision="fp16")
    with open_session(HALF, precision="fp16") as session:
        session.load("engine", engine.path)
        (output,) = session.run("engine", [given.example_inputs[0].numpy()])
    with torch.no_grad():
        wanted = given.module(*given.example_inputs).numpy()
    assert 0 < np.abs(output - wanted).max() <= 2e-2 * np.abs(wanted).max()


def test_without_trtexec_the_doctor_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRTEXEC", "/nowhere/trtexec")
    assert main(["doctor"]) == 0
    assert "no trtexec ($TRTEXEC is /nowhere/trtexec): install TensorRT 8.5 or later" in capsys.readouterr().out
    with pytest.raises(RuntimeMissing, match="no trtexec"), open_session(load_device("host-tensorrt")):
        pass


def test_a_trtexec_that_is_none_is_refused(double: Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "trtexec"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(script))
    with open_session(FULL) as session, pytest.raises(MeasurementError, match="tells no version of TensorRT.*hello"):
        session.hello()
