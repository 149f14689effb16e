"""`edgeprune solve`: a problem file in, the proven answer out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli import main

pytestmark = pytest.mark.unit


def write_problem(folder: Path, limit: float, **changes: Any) -> str:
    """Two variables, narrow or wide; wide is worth 1 and 1.5, and both wide costs 4."""
    document = {
        "schema": 1,
        "variables": {"g1": 2, "g2": 2},
        "budgets": {"latency_us": limit},
        "factors": [
            {"variables": ["g1"], "value": [0.0, 1.0]},
            {"variables": ["g2"], "value": [0.0, 1.5]},
            {"variables": ["g1", "g2"], "value": [[0, 0], [0, 0]], "cost": {"latency_us": [[1.0, 2.0], [2.0, 4.0]]}},
        ],
    }
    path = folder / "problem.json"
    path.write_text(json.dumps({**document, **changes}))
    return str(path)


def test_the_document_holds_the_fields_of_the_solution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", write_problem(tmp_path, 3.0), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["feasible"] is True
    assert document["choice"] == {"g1": 0, "g2": 1}
    assert document["value"] == document["upper_bound"] == 1.5
    assert document["cost"] == {"latency_us": 2.0}
    assert document["gap"] == 0.0
    assert document["seconds"] >= 0.0


def test_over_budget_prints_the_least_choice_and_ends_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["solve", write_problem(tmp_path, 0.5), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["feasible"] is False
    assert document["choice"] == {"g1": 0, "g2": 0}
    assert document["least_ratio"] == 2.0
    assert document["gap"] is None  # infinite


def test_the_text_says_how_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", write_problem(tmp_path, 3.0), "--time-limit", "5"]) == 0
    assert "value  1.5, none above 1.5 (gap 0.00%)" in capsys.readouterr().out
    assert main(["solve", write_problem(tmp_path, 0.5)]) == 3
    assert "least reachable cost: 2 of the budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "place"), [({"schema": 2}, "schema"), ({"variables": {"g1": 2}}, "factors[1].variables")]
)
def test_a_fault_is_named_with_file_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], place: str
) -> None:
    path = write_problem(tmp_path, 3.0, **changes)
    assert main(["solve", path]) == 2
    assert f"{path}:{place}: " in capsys.readouterr().err


def test_a_missing_file_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(tmp_path / "none.json"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "input"


def test_a_time_limit_is_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", write_problem(tmp_path, 3.0), "--time-limit", "0"]) == 2
    assert "--time-limit" in capsys.readouterr().err


def test_the_gap_is_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", write_problem(tmp_path, 3.0), "--gap", "0.01", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gap"] <= 0.01
    assert main(["solve", write_problem(tmp_path, 3.0), "--gap", "2"]) == 2
    assert "--gap" in capsys.readouterr().err
