"""`edgeprune table`: every command by hand, on the null device and on files that are wrong."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli import main
from edgeprune.device import load_device
from edgeprune.kernel import Kernel
from edgeprune.profiling import profile
from edgeprune.table import read_lines, table_path
from tests.test_table import HOLD, row, session, written

pytestmark = pytest.mark.integration

NULL = load_device("null")
PLAIN: dict[str, Any] = {"window": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "spatial": (28, 28)}
KERNELS = [Kernel(operator="conv", c_in=64, c_out=c_out, **PLAIN) for c_out in range(64, 129, 8)]


@pytest.fixture
def null_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's table of the null device, in a cache of its own."""
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    profile(KERNELS, NULL)
    return table_path(NULL, "fp32")


def table(*argv: str | Path) -> int:
    return main(["table", *map(str, argv)])


def document(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> Any:
    capsys.readouterr()
    assert table(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_list_and_show(null_table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table("list") == 0
    assert capsys.readouterr().out.startswith("null/null_fp32  yours    9 kernels modelled")
    (mine,) = (entry for entry in document(capsys, "list")["tables"] if entry["place"] == "yours")
    assert (mine["path"], mine["kernels"], mine["fault"]) == (str(null_table), 9, None)
    shown = document(capsys, "show", "null", "--kernels", "64>72")
    assert (shown["origin"], shown["facts"]["backend"], len(shown["kernels"])) == ("modelled", "null", 1)
    assert shown["kernels"][0]["latency_us"] > shown["kernels"][0]["node_us"] > 0
    assert table("show", "null") == 0
    assert "null: 9 kernels, modelled" in capsys.readouterr().out


def test_no_tables_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    assert [entry for entry in document(capsys, "list")["tables"] if entry["place"] == "yours"] == []


def test_plot(null_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    told = document(capsys, "plot", "null", "--out", tmp_path / "s.png")
    assert (told["axis"], told["period"], told["origin"]) == ("c_out", 16, "modelled")
    assert told["steps"] == "steps of 16 channels, after 64, 80, 96, 112"
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert table("plot", "null", "--out", tmp_path / "s.jpg") == 2


def test_missing_extras_name_the_line_that_installs_them(
    null_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib.figure", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert table("plot", "null", "--out", tmp_path / "s.png") == 5
    assert "pip install 'edgeprune[plot]'" in capsys.readouterr().err
    assert table("export", "parquet", "null", "--out", tmp_path / "t.parquet") == 5
    assert "pip install 'edgeprune[parquet]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.p*"))


def test_diff_of_the_null_device_with_a_slower_one(
    null_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    text = null_table.read_text().splitlines(keepends=True)
    kept = [line for line in text if '64,"c_out":128' not in line.replace(" ", "")]
    other.write_text("".join(kept[:-1]))
    told = document(capsys, "diff", "null", other)
    assert (told["median"], told["spread"]) == (1.0, 0.0)
    assert len(told["pairs"]) + len(told["only_first"]) == 9
    assert table("diff", "null", other) == 0
    assert "median 1.000x" in capsys.readouterr().out


def test_merge_and_gc(null_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(null_table.read_bytes() + b'{"type":"row","kern')
    told = document(capsys, "merge", null_table, other, "--out", tmp_path / "all.jsonl")
    assert told["duplicates"] == told["written"] == len(null_table.read_text().splitlines())
    assert len(told["unreadable"]) == 1
    assert table("merge", null_table, "--out", tmp_path / "all.jsonl") == 2
    assert "exists already" in capsys.readouterr().err
    (counted,) = document(capsys, "gc", "null")["tables"]
    assert (counted["found"]["superseded"], counted["dropped"]) == (1, [])
    (dropped,) = document(capsys, "gc", "null", "--superseded")["tables"]
    assert dropped["kept"] == counted["kept"] - 1
    assert len(read_lines([null_table]).rows) == 9


def test_export_and_import_again(null_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table("export", "csv", "null") == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(entry["c_out"]) for entry in rows] == list(range(64, 129, 8))
    assert {entry["origin"] for entry in rows} == {"modelled"}
    (tmp_path / "t.csv").write_text(text)
    told = document(capsys, "import", tmp_path / "t.csv", "--out", tmp_path / "t.jsonl")
    assert (told["entries"], told["kernels"], told["unit"], told["flags"]) == (9, 9, "us", [])
    compared = document(capsys, "diff", "null", tmp_path / "t.jsonl")
    assert (compared["median"], len(compared["pairs"]), compared["second"]["origin"]) == (1.0, 9, "imported")
    assert table("export", "parquet", "null") == 2


def test_export_parquet(null_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    told = document(capsys, "export", "parquet", "null", "--out", tmp_path / "t.parquet")
    read = parquet.read_table(tmp_path / "t.parquet")
    assert (told["rows"], read.num_rows) == (9, 9)
    assert str(read.schema.field("latency_us").type) == "double"
    assert json.loads(read.schema.metadata[b"edgeprune"])["origin"] == "modelled"


def test_the_sum_of_named_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("name,latency_ms\nstem,0.1\nblock,0.2\n")
    assert table("import", tmp_path / "t.csv", "--out", tmp_path / "t.jsonl") == 0
    (tmp_path / "net.txt").write_text("stem\n\nblock\nblock\n")
    told = document(capsys, "show", tmp_path / "t.jsonl", "--sum", tmp_path / "net.txt")
    assert (told["sum"], told["unit"], told["entries"], told["origin"]) == (0.5, "ms", 3, "imported")
    (tmp_path / "net.txt").write_text("stem\nblok\n")
    assert table("show", tmp_path / "t.jsonl", "--sum", tmp_path / "net.txt") == 2
    assert "no entry 'blok'; did you mean 'block'?" in capsys.readouterr().err
    assert table("show", tmp_path / "t.jsonl", "--sum", tmp_path) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["show"], ["plot", "--out", "x.png"], ["export", "csv"], ["gc"], ["diff", "null"]])
def test_wrong_files_are_errors_of_one_line(
    argv: list[str], null_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary.jsonl").write_bytes(os.urandom(5000))
    (tmp_path / "poem.jsonl").write_text("Roses\nViolets\n")
    for wrong in ("binary.jsonl", "poem.jsonl", "missing.jsonl", "."):
        assert table(argv[0], *argv[1:], tmp_path / wrong) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
    (tmp_path / "empty.jsonl").write_text("")
    assert table(argv[0], *argv[1:], tmp_path / "empty.jsonl") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert table("show", "nope", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "input"
    assert table("shw", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_a_table_that_is_torn_and_contradicting_is_shown_with_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "t.jsonl", session(), row(2.0), row(3.0, session="s2"), "torn")
    assert table("show", path) == 0
    out, err = capsys.readouterr()
    assert "125 us" in out  # 2.5 times the reference's 50 us
    assert f"warning: {path}:4: skipped" in err
    assert "2 rows contradict each other" in err


SIZED = ["tests.small_models:plain", "--shape", "1x3x32x32", "--saliency", "l2"]


class Heard(logging.Handler):
    """Does something as soon as edgeprune says that it waits, and keeps what it said."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self.then, self.told = then, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting" in record.getMessage():
            self.told.append(record.getMessage())
            self.then()


@pytest.mark.parametrize("command", ["profile", "prune", "fit"])
def test_a_second_writer_is_told_or_waits(
    command: str, null_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choosing = [*SIZED, "--budget", "0.6x", "--out", str(tmp_path / "out")] if command != "profile" else []
    argv = [command, *choosing, "--device", "null"]
    with subprocess.Popen([sys.executable, "-c", HOLD, str(null_table)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert main(argv) == 2
        assert f"is being written by process {holder.pid}, since 20" in capsys.readouterr().err
        assert not (tmp_path / "out").is_file() and not list(tmp_path.glob("out/*"))
        before, during = null_table.read_text(), list[str]()

        def leave() -> None:
            during.append(null_table.read_text())
            holder.kill()

        heard = Heard(then=threading.Timer(0.3, leave).start)
        logging.getLogger().addHandler(heard)
        try:
            assert main([*argv, "--wait"]) == 0
        finally:
            logging.getLogger().removeHandler(heard)
    (told,) = heard.told
    assert told.startswith(f"waiting for the table: it is being written by process {holder.pid}")
    assert told in capsys.readouterr().err
    assert during == [before]
    assert len(read_lines([null_table]).rows) > len(KERNELS)
    assert (tmp_path / "out").exists() == (command != "profile")


def test_ctrl_c_while_waiting(null_table: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(null_table)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        heeding = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # not so in a background
        )
        program = f"{heeding}; from edgeprune.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "table", "gc", "null", "--superseded", "--wait"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            waiting.stderr.readline()
            time.sleep(0.1)
            waiting.send_signal(signal.SIGINT)
            _, err = waiting.communicate(timeout=30)
        holder.kill()
    assert (waiting.returncode, "Traceback" in err) == (130, False)
