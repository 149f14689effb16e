"""A network that takes integers: data, criteria, repair, int8 and verification get token ids, never floats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeprune.cli import main
from edgeprune.gating import quality_of_bundle

pytestmark = pytest.mark.integration
MODEL = ["tests.small_models:words", "--input", "int64:1x16"]


@pytest.fixture
def ids(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ids.npz", x=rng.integers(0, 100, (64, 16)), y=rng.integers(0, 5, 64))
    return str(tmp_path / "ids.npz")


def test_fit_scores_repairs_and_judges_on_token_ids(
    ids: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--device", "null", "--budget", "0.8x", "--data", ids, "--out", str(out), "--json"]
    assert main(["fit", *MODEL, *options]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["dense"]["agreement"] == 1.0 and 0 < quality["pruned"]["agreement"] <= 1


def test_an_engine_in_int8_is_calibrated_and_judged_on_token_ids(ids: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pruning = ["--device", "null", "--budget", "1x", "--saliency", "l2", "--out", str(tmp_path / "plan.json")]
    assert main(["prune", *MODEL, *pruning]) == 0
    engine = ["--device", "host-onnxruntime", "--precision", "int8", "--data", ids, "--out", str(tmp_path / "bundle")]
    assert main(["export", *MODEL, "--plan", str(tmp_path / "plan.json"), *engine]) == 0
    quality, _ = quality_of_bundle(tmp_path / "bundle", ids)
    assert quality.n == 64 and quality.agreement is not None and quality.agreement > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "saliency 'taylor_output' looks at samples, and which values of int64 the model takes isn't known"),
        (["--saliency", "synflow"], "saliency 'synflow' sends ones through the model, which takes integers"),
        (["--data", "strange.npz"], "the model can't take the data (int64 (2, 16), 0 to 100): IndexError"),
        (["--data", "fractions.npz"], "fractions.npz: x is float64 with fractions, the model takes int64"),
    ],
)
def test_what_the_model_cannot_take_is_told_before_anything_is_measured(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("strange.npz", x=np.arange(101)[None].repeat(4, 0)[:, -16:] * (np.arange(4) % 2)[:, None])
    np.savez("fractions.npz", x=np.full((4, 16), 0.5))
    assert main(["fit", *MODEL, "--device", "null", "--budget", "0.8x", "--out", "out", *options]) == 2
    told = capsys.readouterr().err
    assert message in told and "profiling" not in told and not [*Path("out").glob("*")]
