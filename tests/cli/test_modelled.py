"""Numbers from a data sheet at the command line: refused unless allowed, and never without the word."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import pytest

from edgeprune.cli import main

pytestmark = [pytest.mark.integration, pytest.mark.timed]

MODEL = ["tests.small_models:Net", "--shape", "1x3x32x32"]
DEVICE = ["--device", "jetson"]
NEEDS_ONNX = pytest.mark.skipif(util.find_spec("onnxscript") is None, reason="pip install 'edgeprune[onnx]'")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "command",
    [
        ["profile", *MODEL],
        ["prune", *MODEL, "--budget", "0.8x", "--out", "plan.json"],
        ["fit", *MODEL, "--budget", "0.8x", "--out", "build"],
        ["export", *MODEL, "--plan", "plan.json", "--out", "bundle"],
    ],
    ids=lambda command: str(command[0]),
)
def test_each_command_refuses_in_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, *DEVICE]) == 4
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert "device 'jetson': no host to reach it by" in shown.err and "nothing was tried" in shown.err
    assert "edgeprune devices add jetson --host USER@HOST" in shown.err and "--allow-modelled" in shown.err
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_profile_and_prune_say_modelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = [*DEVICE, "--allow-modelled"]
    assert main(["profile", *MODEL, *allowed, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"] == "modelled"
    assert main(["profile", *MODEL, *allowed]) == 0
    shown = capsys.readouterr()
    assert "kernels modelled, 0 failed" in shown.out and "measured" not in shown.out + shown.err
    assert "jetson-orin-nano/tensorrt_fp16.jsonl" in shown.out
    plan = tmp_path / "plan.json"
    prune = ["prune", *MODEL, *allowed, "--budget", "0.8x", "--saliency", "l2", "--out", str(plan)]
    assert main(prune) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("predicted from modelled kernels: ") and "dense modelled as" in shown.err
    assert "measured" not in shown.out + shown.err.replace("0 to measure", "")
    assert "modelled" in plan.read_text()
    assert main([*prune, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"] == "predicted (modelled kernels)"


@NEEDS_ONNX
def test_fit_hands_over_a_real_engine_and_modelled_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", *MODEL, *DEVICE, "--allow-modelled", "--budget", "0.8x", "--saliency", "l2", "--out", str(tmp_path)]
    assert main(fit) == 0
    shown = capsys.readouterr()
    for line in shown.out.splitlines():
        assert "MET" not in line or "modelled" in line
    assert "(modelled, 1 thread, fp16" in shown.out and "predicted   modelled" in shown.out
    assert "modelled p50 is at most" in shown.out and "measured" not in shown.out + shown.err
    bundle = tmp_path / "Net-jetson-orin-nano"
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {"model.onnx", "build_engine.sh", "model.json", "plan.json", "parity.safetensors"} <= names
    assert {"dense/model.onnx", "dense/model.json"} <= names
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["engine"]["path"], manifest["engine"]["precision"]) == ("model.onnx", "fp16")
    assert manifest["latency"]["origin"] == "modelled" and manifest["latency"]["met"]
    assert {attempt["origin"] for attempt in manifest["attempts"]} == {"modelled"}

    for command in ("verify", "bench"):
        assert main([command, str(bundle)]) == 4
        assert "--allow-modelled" in capsys.readouterr().err
        assert main([command, str(bundle), "--allow-modelled", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["origin"] == "modelled"
    assert main(["verify", str(bundle), "--allow-modelled"]) == 0
    text = capsys.readouterr().out
    assert "MET   modelled p50 is at most" in text and "measured" not in text
