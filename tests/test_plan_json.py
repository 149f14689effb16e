"""plan.json: written alike each time, read back whole, faults named with file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import InputError
from edgeprune.plan_json import Plan

pytestmark = pytest.mark.unit

PLAN = Plan(
    structure_hash="ab" * 32,
    kept={"b.weight:0": (0, 2), "a.weight:0": (1, 5, 6)},
    dropped=("layer2.1", "layer1.0"),
    formats={"fc.weight": "zeros:0.95", "head.weight": "dense"},
    notes={"budget": "8ms", "predicted_us": 7901.5},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.to_json(path)
    read = Plan.from_json(path)
    assert (read.structure_hash, read.kept, read.formats, read.notes) == (
        PLAN.structure_hash,
        PLAN.kept,
        PLAN.formats,
        PLAN.notes,
    )
    assert read.dropped == ("layer1.0", "layer2.1")
    read.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_diff_shows_one_group_a_line(tmp_path: Path) -> None:
    PLAN.to_json(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert '    "a.weight:0": [1, 5, 6],' in lines
    assert lines.index('    "a.weight:0": [1, 5, 6],') + 1 == lines.index('    "b.weight:0": [0, 2]')


def test_an_empty_plan_says_so() -> None:
    assert Plan(structure_hash="ab").is_empty
    assert not PLAN.is_empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "plan.json: not a plan of schema 1"),
        ({"structure_hash": None}, "plan.json:structure_hash: expected str, found None"),
        ({"kept": []}, r"plan.json:kept: expected dict, found \[\]"),
        (
            {"kept": {"a.weight:0": []}},
            "plan.json:kept.a.weight:0: expected positions from 0, none twice, at least one",
        ),
        ({"kept": {"a.weight:0": 3}}, "plan.json:kept.a.weight:0: expected positions"),
        ({"kept": {"a.weight:0": "01"}}, "plan.json:kept.a.weight:0: expected positions"),
        ({"kept": {"a.weight:0": [1, 1]}}, "plan.json:kept.a.weight:0: expected positions"),
        ({"kept": {"a.weight:0": [-1, 1]}}, "plan.json:kept.a.weight:0: expected positions"),
        ({"kept": {"a.weight:0": [0.5]}}, "plan.json:kept.a.weight:0: expected positions"),
        ({"dropped": {}}, "plan.json:dropped: expected list, found {}"),
        ({"dropped": [1]}, "plan.json:dropped: expected names of blocks, found 1"),
        ({"formats": None}, "plan.json:formats: expected dict, found None"),
        *(
            (
                {"formats": {"a.weight": form}},
                rf"plan.json:formats.a.weight: expected dense, 2:4 or zeros:SHARE \(zeros:0.95\), found {form!r}",
            )
            for form in ("1:4", "zeros:1", "zeros:0.0", "zeros:95", 4)
        ),
        ({"notes": []}, r"plan.json:notes: expected dict, found \[\]"),
    ],
)
def test_faults_are_named_with_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    PLAN.to_json(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=message):
        Plan.from_json(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"schema": 1'])
def test_what_is_no_plan_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match="plan.json: not a plan"):
        Plan.from_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.json: cannot read the plan: No such file"):
        Plan.from_json(tmp_path / "none.json")
