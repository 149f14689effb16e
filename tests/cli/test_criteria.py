"""`--saliency help`, and criteria that can't be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeprune.cli import main
from edgeprune.saliency import CRITERIA, NORMALISATIONS

pytestmark = pytest.mark.integration
MODEL = ["tests.small_models:plain", "--shape", "1x3x32x32", "--device", "null", "--budget", "0.6x"]


@pytest.mark.parametrize("command", ["prune", "fit"])
def test_help_lists_the_criteria_without_a_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--saliency", "help"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["name", "data", "granularity", "normalise", "forward", "backward"] and err == ""
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in CRITERIA] == sorted(CRITERIA)
    assert lines[lines.index(next(line for line in lines if line.startswith("snip "))) + 1].endswith("Σ |g w|]")


@pytest.mark.parametrize("argv", [["--saliency", "help", "--json"], ["--json", "--saliency", "help"]])
def test_the_same_as_a_document(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *argv]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["criteria"]] == sorted(CRITERIA)
    assert [way["name"] for way in document["normalisations"]] == list(NORMALISATIONS)
    (snip,) = (row for row in document["criteria"] if row["name"] == "snip")
    assert snip["source"] == "Lee et al. 2019, SNIP: |g w| / Σ |g w|"
    assert [snip[key] for key in ("data", "granularity", "forward", "backward", "normalise")] == [
        "labels",
        "channels",
        "1",
        "1",
        "none",
    ]


def test_a_criterion_that_needs_labels_says_so_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 3, 32, 32), np.float32))
    for data in ([], ["--data", str(tmp_path / "x.npz")]):
        assert main(["prune", *MODEL, "--saliency", "snip", "--out", str(plan), *data]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: saliency 'snip' needs labels and ") and "profiling" not in err
        assert not plan.exists()


def test_the_normalisation_is_the_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    assert main(["prune", *MODEL, "--saliency", "l1", "--normalise", "rank", "--out", str(plan)]) == 0
    notes = json.loads(plan.read_text())["notes"]
    assert (notes["saliency"], notes["normalise"]) == ("l1", "rank")
    capsys.readouterr()
    assert main(["prune", *MODEL, "--saliency", "l1", "--normalise", "rang", "--out", str(plan)]) == 2
    assert "no normalisation 'rang'; did you mean 'rank'?" in capsys.readouterr().err
