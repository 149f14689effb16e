from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.cli import main

pytestmark = pytest.mark.integration

KERNELS = [{"operator": "linear", "c_in": 8 * n, "c_out": 64} for n in range(1, 6)]


@pytest.fixture
def kernels(tmp_path: Path) -> str:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(KERNELS))
    return str(path)


def profile(*options: str) -> int:
    return main(["profile", "--device", "null", *options])


def test_dry_run_then_measured_then_nothing_to_do(
    kernels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--kernels", kernels, "--table", str(tmp_path / "t.jsonl"))
    assert profile(*options, "--dry-run") == 0
    assert "5 of 5 kernels to measure, about" in capsys.readouterr().out
    assert not (tmp_path / "t.jsonl").exists()
    assert profile(*options) == 0
    assert "5 of 5 kernels in the table of null (modelled)" in capsys.readouterr().out
    assert profile(*options, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 0


def test_json_document(kernels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile("--kernels", kernels, "--table", str(tmp_path / "t.jsonl"), "--json", "--min-iters", "6") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kernels"], document["in_table"], document["failed"]) == (5, 5, {})
    assert document["origin"] == "modelled"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "is not JSON"),
        ("{}", "expected a list of kernels"),
        ('[{"operator": "linear", "c_in": 0, "c_out": 1}]', "kernel 1: sizes must be at least 1"),
        ('[{"operator": "linear", "c_in": 1, "c_out": 1, "precision": "int8"}]', "device's precision fp32"),
        ("[7]", "expected an object"),
    ],
)
def test_a_faulty_file_is_a_usage_error(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "k.json").write_text(text)
    assert profile("--kernels", str(tmp_path / "k.json")) == 2
    assert said in capsys.readouterr().err


def test_a_corrupt_line_is_named(kernels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text("garbage\n")
    assert profile("--kernels", kernels, "--table", str(table)) == 0
    captured = capsys.readouterr()
    assert f"warning: {table}:1: skipped" in captured.err
    assert "5 of 5" in captured.out
