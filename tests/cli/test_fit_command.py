"""Bad input to the whole flow: one message, the right exit code, no traceback, nothing half written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import errors
from edgeprune.budget import parse_budget
from edgeprune.cli import main
from edgeprune.data import synthetic
from edgeprune.device import in_precision, load_device
from edgeprune.pipeline import fit
from edgeprune.preparing import Task
from tests.small_models import plain

pytestmark = pytest.mark.integration
MODEL = "tests.small_models:plain"
X = (torch.zeros(1, 3, 32, 32),)


def run(out: Path, *options: str, model: str = MODEL, device: str = "null", budget: str = "0.6x") -> int:
    fixed = ["fit", model, "--shape", "1x3x32x32", "--device", device, "--budget", budget, "--out", str(out)]
    return main([*fixed, "--saliency", "l2", *options])


def bundles(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir()) if out.is_dir() else []


def test_the_document_has_the_keys_that_other_programs_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {"model", "device", "percentile", "budget_ms", "met", "origin", "predicted_ms"} <= set(document)
    assert {"p50_ms", "p90_ms", "n"} <= set(document["dense"])
    assert {"p50_ms", "p90_ms", "n", "ratio", "ratio_ci"} <= set(document["pruned"])
    assert document["attempts"] and document["seconds"]
    assert Path(document["bundle"]).parent == tmp_path


def test_a_person_reads_modelled_and_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    shown = capsys.readouterr()
    assert "MET" in shown.out and "modelled" in shown.out and "nothing is claimed" in shown.out
    assert "0 refused" in shown.err


def pickled_code(folder: Path) -> list[str]:
    class Code:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
            return os.mkdir, (str(folder / "executed"),)

    (folder / "bad.pth").write_bytes(pickle.dumps({"weight": Code()}))
    return ["--weights", str(folder / "bad.pth")]


def other_weights(folder: Path) -> list[str]:
    torch.save({"0.0.weight": torch.zeros(1), "nobody": torch.zeros(2)}, folder / "other.pth")
    return ["--weights", str(folder / "other.pth")]


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"device": "hots-openvino"}, 2, "did you mean 'host-openvino'"),
        ({"model": "torchvision:resnet81"}, 2, "did you mean"),
        ({"model": "tests.small_models:plian"}, 2, "plian"),
        ({"model": "nowhere:net"}, 2, "nowhere"),
        ({"budget": "8"}, 2, "has no unit"),
        ({"budget": "-3ms"}, 2, "negative"),
        ({"budget": "1.2x"}, 2, "at most 1x"),
        ({"budget": "0.01x"}, 3, "least latency"),
    ],
)
def test_each_fault_has_its_exit_code_and_message(
    changed: dict[str, str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", **changed) == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert bundles(tmp_path / "out") == []


def test_weights_that_hold_code_are_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", *pickled_code(tmp_path)) == 2
    assert "bad.pth" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_name_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", *other_weights(tmp_path)) == 2
    shown = capsys.readouterr().err
    assert "0.0.weight" in shown and "nobody" in shown


def test_a_picture_that_is_none_is_named_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        image.fromarray(pixels).save(pictures / f"{i}.png")
    for i in range(12, 18):
        (pictures / f"{i}.png").write_bytes(b"no picture")
    assert run(tmp_path / "out", "--data", str(pictures), "--shape", "1x3x16x16", "--json") == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert len(quality["skipped"]) == 6 and all("png" in name for name in quality["skipped"])
    assert quality["pruned"]["n"] == len(quality["report"])


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "out") == 1
    shown = capsys.readouterr().err
    assert "cannot write" in shown and "tracing" not in shown


def test_a_full_disk_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgeprune.bundle._save_weights", full)
    assert run(tmp_path / "out") == 1
    assert "No space left" in capsys.readouterr().err
    assert bundles(tmp_path / "out") == []


STAGES = (
    "preparing.trace",
    "preparing.profile",
    "preparing.score",
    "preparing.with_networks",
    "preparing.choose",
    "pipeline.apply",
    "pipeline.export",
    "pipeline.measure_pair",
    "pipeline.verify",
    "handing_over.write_bundle",
)


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_every_stage_ends_with_130_and_nothing_half_written(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"edgeprune.{stage}", interrupt)
    assert run(tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert bundles(tmp_path / "out") == []


def test_prune_export_verify_bench_each_read_the_files_of_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [MODEL, "--shape", "1x3x32x32", "--device", "null"]
    plan, bundle = tmp_path / "plan.json", tmp_path / "bundle"
    assert main(["prune", *model, "--budget", "0.6x", "--saliency", "l2", "--out", str(plan)]) == 0
    assert main(["export", *model, "--plan", str(plan), "--out", str(bundle)]) == 0
    capsys.readouterr()
    assert main(["verify", str(bundle), "--budget", "0.65x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["met"] is True
    assert main(["verify", str(bundle), "--budget", "0.3x"]) == 3
    assert main(["bench", str(bundle)]) == 0


def test_one_x_of_dense_is_met_by_the_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--json", budget="1x") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["met"] is True and document["pruned"]["ratio"] == 1.0


def test_an_occupied_folder_is_told_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    occupied = tmp_path / "plain-null"
    occupied.mkdir()
    (occupied / "notes.json").write_text("{}")
    assert run(tmp_path) == 2
    shown = capsys.readouterr().err
    assert "notes.json" in shown and "tracing" not in shown
    assert (occupied / "notes.json").read_text() == "{}"


@pytest.fixture(scope="module")
def cache_of_a_fit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tables after one fit."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_CACHE_DIR", str(folder / "cache"))
        assert run(folder / "out") == 0
    return folder / "cache"


@pytest.mark.parametrize("kind", ["fingerprint", "session"])
def test_damaged_headers_of_a_table_do_not_stop_the_next_run(
    kind: str,
    cache_of_a_fit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = shutil.copytree(cache_of_a_fit, tmp_path / "cache")
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(cache))
    (table,) = cache.rglob("*.jsonl")
    lines = table.read_text().splitlines()
    table.write_text(
        "\n".join("garbage" if f'"type": "{kind}"' in line or f'"type":"{kind}"' in line else line for line in lines)
    )
    capsys.readouterr()
    assert run(tmp_path / "out") == 0
    assert f"{table.name}:" in capsys.readouterr().err


def test_a_missing_runtime_has_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgeprune.backends.openvino.NEEDED", ("nowhere_to_be_found",))
    assert run(tmp_path / "out", device="host-openvino") == 5
    assert "pip install 'edgeprune[openvino]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "quantiser", "line"),
    [
        ("host-openvino", "nncf", "nncf not installed: pip install 'edgeprune[openvino]'"),
        ("host-onnxruntime", "onnxruntime", "onnxruntime not installed: pip install 'edgeprune[onnx]'"),
        ("host-tflite", "ai_edge_quantizer", "ai-edge-quantizer not installed: pip install 'edgeprune[litert]'"),
    ],
)
def test_a_missing_quantiser_is_told_before_anything_is_measured(
    device: str,
    quantiser: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All else is there, as far as it is asked."""
    monkeypatch.setattr(errors, "util", SimpleNamespace(find_spec=lambda name: None if name == quantiser else "here"))
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    data = tmp_path / "data.npz"
    np.savez(data, x=np.zeros((4, 3, 32, 32), np.float32))
    assert run(tmp_path / "out", "--precision", "int8", "--data", str(data), device=device) == 5
    assert line in capsys.readouterr().err
    wanted = in_precision(load_device(device), "int8")
    pictures = synthetic(X[0].shape, count=4)
    task = Task(model=plain().eval(), name="plain", example_inputs=X, device=wanted, data=pictures)
    with pytest.raises(errors.RuntimeMissing, match=re.escape(line)):
        fit(task, parse_budget("0.6x"), tmp_path / "bundle")
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == []


def test_a_plan_of_other_formats_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [MODEL, "--shape", "1x3x32x32", "--device", "null"]
    plan = tmp_path / "plan.json"
    assert main(["prune", *model, "--budget", "0.6x", "--saliency", "l2", "--out", str(plan)]) == 0
    document = json.loads(plan.read_text())
    plan.write_text(json.dumps({**document, "formats": {"0.0.weight": "2:4"}}))
    assert main(["export", *model, "--plan", str(plan), "--out", str(tmp_path / "bundle")]) == 1
    assert "3 input channels are no multiple of 4" in capsys.readouterr().err
