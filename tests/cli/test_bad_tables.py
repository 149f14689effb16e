"""Bad input to a profile by the command line, one test for each: no traceback, nothing lost, and it is told.

A second profiler on the same table is in test_table_command.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli import main
from edgeprune.device import load_device
from edgeprune.kernel import Kernel
from edgeprune.profiling import profile
from edgeprune.staircase import staircase_kernels
from edgeprune.table import read_lines, table_path
from edgeprune.transport import Session
from tests.sshd import children

pytestmark = pytest.mark.integration

NULL = load_device("null")
STAIRS = staircase_kernels("fp32")
ROOT = Path(__file__).parents[2]
DEVICES = """\
schema: 1
devices:
  slow:
    backend: "null"
    options: {sleep_ms: 1}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A whole table of the null device."""
    path = tmp_path_factory.mktemp("whole") / "table.jsonl"
    profile(STAIRS, NULL, table_path=path)
    return path.read_text()


@pytest.fixture
def table(whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a cache of its own, to spoil."""
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    path = table_path(NULL, "fp32")
    path.parent.mkdir(parents=True)
    path.write_text(whole)
    return path


def again(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The document of another profile, which ends well and measures what is then missing."""
    capsys.readouterr()
    assert main(["profile", "--device", "null", "--json"]) == 0
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    document: dict[str, Any] = json.loads(shown.out)
    assert (document["kernels"], document["failures"]) == (len(STAIRS), {})
    return document


def edit(path: Path, change: Callable[[dict[str, Any]], object], kind: str = "row") -> None:
    """Change every line of a kind in place."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["type"] == kind:
            change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rows_of_another_fingerprint_stay_beside_those_of_this_device(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table.read_text()
    (own,) = read_lines([table]).fingerprints
    table.write_text(text.replace(own, "bbbbbbbbbbbb"))
    assert again(capsys)["warnings"] == []
    rows = read_lines([table]).rows
    assert [sum(row.fingerprint == name for row in rows) for name in (own, "bbbbbbbbbbbb")] == [len(STAIRS)] * 2


def test_rows_under_a_session_of_another_schema_are_measured_anew(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(table, lambda line: line.update(schema=2), kind="session")
    warnings = again(capsys)["warnings"]
    assert "written in schema 2, this edgeprune reads 1" in warnings[0]
    assert f"{len(STAIRS)} rows skipped" in warnings[-1]


def test_a_torn_last_line_costs_itself(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = table.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"type":"row"' in line)
    table.write_text("".join(lines[:last]) + lines[last][:80])
    (warning,) = again(capsys)["warnings"]
    assert warning.startswith(f"{table}:{last + 1}: skipped, not a JSON object: torn or corrupt")
    assert len(read_lines([table]).rows) == len(STAIRS)


def test_rows_that_come_twice_count_once_and_contradicting_ones_are_told(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table.read_text()
    row = next(json.loads(line) for line in text.splitlines() if '"type":"row"' in line)
    row |= {name: row[name] * 2 for name in ("reference_ratio", "median_us", "p90_us", "p99_us")}
    row |= {"session": "x", "ratio_ci": [row["reference_ratio"]] * 2}
    table.write_text(text + text + json.dumps(row) + "\n")
    (warning,) = again(capsys)["warnings"]
    assert f"kernel '{Kernel.from_json(row['kernel']).key}': 2 rows contradict each other" in warning


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
def test_times_that_are_none_are_named_and_measured_again(
    bad: float, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(table, lambda line: line.update(median_us=bad))
    warnings = again(capsys)["warnings"]
    assert len(warnings) == len(STAIRS)
    assert all(": skipped, median_us: Input should be" in warning for warning in warnings)


def test_a_kernel_that_cannot_be_built_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    from edgeprune.backends import null

    real = null.build

    def build(kernel: Kernel, folder: Path) -> Path:
        if kernel == STAIRS[5]:
            raise ValueError("no such operator here")
        return real(kernel, folder)

    monkeypatch.setattr(null, "build", build)
    assert main(["profile", "--device", "null", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["failures"] == {STAIRS[5].key: "no such operator here"}
    assert document["kernels"] == len(STAIRS) - 1


SMALL_FILES = """
import resource, sys
from edgeprune.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["profile", "--device", "null"]))
"""


def test_a_full_disk_keeps_what_was_measured_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may grow beyond 200 kB, of which the table starts with all but six."""
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    path = table_path(NULL, "fp32")
    path.parent.mkdir(parents=True)
    path.write_text("\n" * 194_000)
    command = [sys.executable, "-c", SMALL_FILES, "200000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"error: cannot write {path}" in done.stderr and "lines of this run are saved" in done.stderr
    kept = read_lines([path])
    assert 0 < len(kept.rows) < len(STAIRS) and kept.warnings == ()
    assert again(capsys)["warnings"] == []
    assert len(read_lines([path]).rows) == len(STAIRS)


def device_programs(parent: int) -> list[int]:
    """Child processes of a process that run a device program."""
    found = []
    for child in children(parent):
        with suppress(OSError):
            if b"device_program.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the device program in /proc")
def test_a_device_that_vanishes_in_the_middle_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program is killed three times; every kernel is measured all the same."""
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "devices.yaml").write_text(DEVICES)
    path = table_path(load_device("slow"), "fp32")
    command = [sys.executable, "-m", "edgeprune", "profile", "--device", "slow", "--json", "--min-iters", "4"]
    command += ["--warmup-ms", "0"]
    killed = set[int]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while process.poll() is None and len(killed) < 3:
            rows = path.read_text().count('"type":"row"') if path.exists() else 0
            programs = [pid for pid in device_programs(process.pid) if pid not in killed]
            if programs and rows >= 8 * (1 + len(killed)):
                os.kill(programs[0], signal.SIGKILL)
                killed.add(programs[0])
            time.sleep(0.02)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, len(killed), "Traceback" in err) == (0, 3, False), err
    document = json.loads(out)
    assert (document["kernels"], document["failures"]) == (len(STAIRS), {})


def test_a_device_that_stays_away_is_told_with_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    real_measure, real_hello, batches = Session.measure, Session.hello, list[int]()

    def measure(self: Session, *arguments: Any, **options: Any) -> Any:
        batches.append(len(batches))
        if len(batches) > 2:
            self.channel._wire.kill()  # type: ignore[attr-defined]
        return real_measure(self, *arguments, **options)

    def hello(self: Session) -> dict[str, Any]:
        if len(batches) > 2:
            self.channel._wire.kill()  # type: ignore[attr-defined]
        return real_hello(self)

    monkeypatch.setattr(Session, "measure", measure)
    monkeypatch.setattr(Session, "hello", hello)
    assert main(["profile", "--device", "null"]) == 4
    err = capsys.readouterr().err
    path = table_path(NULL, "fp32")
    assert "device 'null' has gone: hello: the device program was ended by SIGKILL" in err
    assert f"16 of {len(STAIRS)} kernels are saved in {path}; run it again to go on" in err
    assert len(read_lines([path]).rows) == 16
