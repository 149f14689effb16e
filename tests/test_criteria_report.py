"""The tables of `benchmarks.criteria`, from rows by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import criteria
from benchmarks.criteria_report import report
from edgeprune.saliency import CRITERIA

pytestmark = pytest.mark.unit


def row(criterion: str, seed: int, repaired: float, **more: Any) -> dict[str, Any]:
    made = {"criterion": criterion, "only": None, "seed": seed, "budget": 0.7, "seconds": 1.0, "predicted": 0.7}
    return {**made, "dropped": seed % 2, "cut": 0.1, "repaired": repaired, "ratio": 0.71 + seed / 100, **more}


def test_a_line_is_the_median_over_the_seeds_and_the_best_comes_first() -> None:
    rows = [row("random", 0, 0.2), row("random", 1, 0.5), row("random", 2, 0.4), row("taylor", 0, 0.8, seconds=2.54)]
    rows += [row("l2", 0, 0.5), row("l2", 0, 0.6, normalise="layers")]
    document = report(rows, "resnet20", ["Dense: 91.73%."])
    lines = [line for line in document.splitlines() if line.startswith("| `")]
    assert lines == [
        "| `taylor` | unlabelled | 80.00% | 80.00% | 10.00% | 0.710x | 0.700x | 0 | 2.5 |",
        "| `l2`, `--normalise layers` | none | 60.00% | 60.00% | 10.00% | 0.710x | 0.700x | 0 | 1.0 |",
        "| `l2` | none | 50.00% | 50.00% | 10.00% | 0.710x | 0.700x | 0 | 1.0 |",
        "| `random` | none | 40.00% | 20.00%, 50.00%, 40.00% | 10.00% | 0.720x | 0.700x | 0, 1 | 1.0 |",
    ]
    assert "Dense: 91.73%." in document


def test_a_budget_that_blocks_alone_cannot_meet_is_told() -> None:
    reason = "the budget of 0.2 ms can't be met: the least latency in reach is predicted 0.3 ms"
    failed = {"criterion": "block_loss", "only": "blocks", "seed": 0, "budget": 0.5, "error": reason}
    document = report([row("taylor", 0, 0.8), failed], "resnet20", [])
    assert f"| `block_loss`, only blocks | unlabelled | {reason} |" in document
    assert document.index("## 0.7x") < document.index("## 0.5x")


def test_every_criterion_runs_with_every_seed_and_those_of_blocks_among_blocks_alone_too() -> None:
    runs = criteria._runs((), 3)
    assert {run.criterion for run in runs} == set(CRITERIA) and {run.seed for run in runs} == {0, 1, 2}
    assert {run.criterion for run in runs if run.only} == {"block_influence", "block_taylor", "block_loss"}
    assert len(runs) == len(set(runs)) == 3 * (len(CRITERIA) + 3)


def test_what_was_judged_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run does what the first one left."""
    judged = [row("l2", seed, 0.5) for seed in (0, 1)]
    criteria._append(tmp_path, judged[:1])
    criteria._append(tmp_path, judged[1:])
    assert criteria._kept(tmp_path) == judged
    left = [run for run in criteria._runs(["l2"], 3) if run not in {criteria._run_of(each) for each in judged}]
    assert left == [criteria.Run(criterion="l2", only=None, seed=2)]
