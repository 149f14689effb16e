"""rebuild.sh makes a bundle again: the same plan and weights, byte by byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune
from edgeprune.bundle import read_bundle
from edgeprune.cli import main
from edgeprune.cli.rebuilding import rebuild_lines

ROOT = Path(edgeprune.__file__).resolve().parents[1]


def rebuilt(bundle: Path, into: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    """`sh rebuild.sh`, with the edgeprune of these tests on the PATH."""
    (scratch / "bin").mkdir(exist_ok=True)
    shim = scratch / "bin" / "edgeprune"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgeprune "$@"\n')
    shim.chmod(0o755)
    environment = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["sh", str(bundle / "rebuild.sh"), *([str(into)] if into.name else [])]
    return subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.integration
def test_a_fitted_bundle_is_made_again_with_the_same_plan_and_weights(tmp_path: Path) -> None:
    out = tmp_path / "first" / "plain-null"
    given = ["fit", "tests.small_models:plain", "--shape", "1x3x32x32", "--device", "null", "--budget", "0.7x"]
    assert main([*given, "--saliency", "l2", "--out", str(out.parent)]) == 0
    done = rebuilt(out, tmp_path / "again", tmp_path)
    assert done.returncode == 0, done.stderr
    first, again = read_bundle(out), read_bundle(tmp_path / "again")
    for name in ("plan.json", "weights.safetensors", "model.json", "dense/model.json"):
        assert first.manifest.files[name] == again.manifest.files[name], name
    assert not (out / "again").exists()
    for key in ("model", "device", "runtime"):
        assert first.document[key] == again.document[key]


@pytest.mark.unit
def test_what_rebuild_sh_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["edgeprune", "fit", "pkg.mod:net", "--data", "a b\nc"])
    lines = rebuild_lines(
        {"model": "pkg.mod:net", "shape": "1x3", "seed": 3, "device_name": "null", "weights": 'w "$x}'}
    )
    text = "\n".join(lines)
    assert "# It was made by: edgeprune fit pkg.mod:net --data 'a b c'" in lines
    assert 'exec edgeprune export pkg.mod:net --shape 1x3 --seed 3 --device null --weights "${WEIGHTS:-w' in text
    script = tmp_path / "rebuild.sh"
    script.write_text(text.replace("exec edgeprune", "printf '%s|'"))
    say = ["sh", str(script), "out"]
    told = subprocess.run(say, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}).stdout
    assert 'null|--weights|w "$x}|--pruned|' in told and told.endswith("|--out|out|")
    elsewhere = {"PATH": os.environ["PATH"], "WEIGHTS": "moved.pt"}
    assert "|moved.pt|" in subprocess.run(say, capture_output=True, text=True, check=True, env=elsewhere).stdout
    without = subprocess.run(say[:2], capture_output=True, text=True, check=False)
    assert without.returncode != 0 and "name the folder to write" in without.stderr
