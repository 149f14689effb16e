from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.cli import main

pytestmark = pytest.mark.integration


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    return tmp_path


def profile(*options: str) -> int:
    return main(["profile", "--device", "null", *options])


def test_dry_run_then_measured_then_nothing_to_do(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile("--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kernels"] == told["missing"] > 0
    assert list(cache.iterdir()) == []
    assert profile("--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kernels"], document["origin"]) == (told["kernels"], "modelled")
    assert Path(document["table"]).is_relative_to(cache)
    assert profile("--dry-run") == 0
    assert "0 of" in capsys.readouterr().out


def test_a_precision_that_the_device_has_not_is_named(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile("--precision", "int8") == 2
    assert "device 'null' has no precision 'int8' (known: fp32, fp16)" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_a_precision_has_a_table_of_its_own(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "devices.yaml").write_text(
        "schema: 1\ndevices:\n  null8:\n    backend: 'null'\n    precisions: [fp32, int8]\n"
    )
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(cache))
    tables = {}
    for precision in ("fp32", "int8"):
        assert main(["profile", "--device", "null8", "--precision", precision, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["precision"], Path(document["table"]).name) == (precision, f"null_{precision}.jsonl")
        tables[precision] = Path(document["table"]).read_text()
    assert '"precision":"int8"' in tables["int8"] and '"precision":"int8"' not in tables["fp32"]


def test_a_corrupt_line_is_named(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = cache / "latency_tables" / "null" / "null_fp32.jsonl"
    table.parent.mkdir(parents=True)
    table.write_text("garbage\n")
    assert profile("--json") == 0
    assert f"{table}:1: skipped" in json.loads(capsys.readouterr().out)["warnings"][0]


def test_dry_run_of_a_model_knows_the_staircase_that_was_measured(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["tests.small_models:plain", "--shape", "1x3x32x32"]
    assert profile(*model) == 0
    capsys.readouterr()
    assert profile(*model, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 0
