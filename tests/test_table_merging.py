"""Merging files and dropping what no reader needs: told line by line, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import TableError
from edgeprune.kernel import Kernel
from edgeprune.table import LatencyTable, read_lines, read_table
from edgeprune.table_lines import FailureLine
from edgeprune.table_merging import collect, merge
from tests.test_table import HERE, HOLD, KERNEL, THERE, fingerprint, row, session, written

pytestmark = pytest.mark.unit

OTHER = Kernel(operator="linear", c_in=8, c_out=17)
LATER = "2026-02-01T00:00:00Z"
ROOT = Path(__file__).parent.parent


def failure(kernel: Kernel) -> FailureLine:
    return FailureLine(kernel=kernel.to_json(), fingerprint=HERE, session="s1", reason="no such operator")


def test_merge_tells_what_was_duplicated_torn_contradicting_and_undefined(tmp_path: Path) -> None:
    a = written(tmp_path / "a.jsonl", fingerprint(), session(), row(2.0), row().to_line()[:40])
    b = written(tmp_path / "b.jsonl", session(), row(2.0), row(3.0, session="s2"), row(5.0, fingerprint=THERE))
    before = a.read_bytes(), b.read_bytes()
    done = merge([a, b], tmp_path / "all.jsonl")
    assert done.lines == {str(a): 4, str(b): 4}
    assert (done.written, done.duplicates) == (5, 2)
    assert done.unreadable == (f"{a}:4: not a JSON object: torn or corrupt",)
    assert done.fingerprints == {HERE: 2, THERE: 1}
    assert done.undefined == ("session s2", f"fingerprint {THERE}")
    (doubt,) = done.contradicting
    assert "2 rows contradict each other, 2 to 3; the median counts" in doubt
    assert read_table(done.out).look_up(KERNEL).ratio == 2.5
    assert (a.read_bytes(), b.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["a.jsonl", "all.jsonl", "b.jsonl"]


def test_merge_replaces_nothing_unasked(tmp_path: Path) -> None:
    a = written(tmp_path / "a.jsonl", session(), row(2.0))
    out = written(tmp_path / "out.jsonl", session(), row(4.0))
    with pytest.raises(TableError, match="exists already; name another file, or --force"):
        merge([a], out)
    assert merge([a, out], out, force=True).written == 3
    assert len(read_lines([out]).rows) == 2


def test_merge_of_what_is_no_table(tmp_path: Path) -> None:
    good = written(tmp_path / "a.jsonl", session(), row())
    for name, content, message in (
        ("text.jsonl", b"hello\nworld\n", "none of its lines can be read as a latency table's"),
        ("binary.jsonl", bytes(range(256)), "none of its lines can be read"),
        ("deep.jsonl", b"[" * 100_000, "none of its lines can be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TableError, match=message):
            merge([good, tmp_path / name], tmp_path / "out.jsonl")
    with pytest.raises(TableError, match="there is no such file"):
        merge([good, tmp_path / "none.jsonl"], tmp_path / "out.jsonl")
    with pytest.raises(TableError, match="cannot be read: Is a directory"):
        merge([tmp_path], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def other_schema(line: Any) -> str:
    return json.dumps(json.loads(line.to_line()) | {"schema": 2}) + "\n"


def test_rows_of_another_schema_are_neither_read_nor_merged(tmp_path: Path) -> None:
    """Their session says schema 2: what its ratios are to, this version can't know."""
    new = written(tmp_path / "new.jsonl", other_schema(session("s2")), row(9.0, session="s2"))
    old = written(tmp_path / "old.jsonl", session(), row(2.0))
    table = read_table([old, new])
    assert table.look_up(KERNEL).ratio == 2.0
    assert "written in schema 2, this edgeprune reads 1" in table.warnings[0]
    assert table.warnings[1] == "1 rows skipped: their session or fingerprint is of another schema"
    with pytest.raises(TableError, match=r"new.jsonl: none of its lines can be read .*schema 2"):
        merge([old, new], tmp_path / "all.jsonl")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes(old.read_bytes() + new.read_bytes())
    done = merge([mixed], tmp_path / "all.jsonl")
    assert len(done.unreadable) == 2
    assert read_table(done.out).look_up(KERNEL).ratio == 2.0
    collect(mixed, ["unreadable"])
    assert read_table(mixed).look_up(KERNEL).ratio == 2.0


def table_with_everything(path: Path) -> Path:
    return written(
        path,
        session(rounds=5),
        failure(KERNEL),
        row(2.0),
        row(2.0),
        failure(OTHER),
        session(rounds=9),
        session("s2", started=LATER),
        row(2.1, session="s2"),
        "torn\n",
    )


def test_gc_counts_and_drops_only_what_is_asked(tmp_path: Path) -> None:
    path = table_with_everything(tmp_path / "t.jsonl")
    before = path.read_bytes()
    counted = collect(path)
    assert counted.found == {"duplicates": 1, "superseded": 2, "replaced": 1, "unreadable": 1}
    assert path.read_bytes() == before
    done = collect(path, ["duplicates", "superseded"])
    assert (done.kept, done.dropped) == (6, ("duplicates", "superseded"))
    assert collect(path).found == {"duplicates": 0, "superseded": 0, "replaced": 1, "unreadable": 1}
    collect(path, ["replaced", "unreadable"])
    table = read_table(path)
    assert table.look_up(KERNEL).ratio == 2.1
    assert (table.warnings, list(table.failures)) == ((), [OTHER])


def seen(table: LatencyTable) -> tuple[Any, ...]:
    return dict(table.entries), dict(table.failures), dict(table.references_us)


LINES = st.lists(
    st.sampled_from(
        [
            session(rounds=5),
            session(rounds=9),
            session("s2", started=LATER),
            row(2.0),
            row(2.1, session="s2"),
            row(3.0, kernel=OTHER),
            failure(KERNEL),
            failure(OTHER),
            "torn\n",
        ]
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(LINES)
def test_what_is_superseded_or_double_changes_nothing_that_is_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any]
) -> None:
    path = written(tmp_path_factory.mktemp("gc") / "t.jsonl", session(rounds=1), *lines)
    before = seen(read_table(path, HERE))
    collect(path, ["duplicates", "superseded"])
    assert seen(read_table(path, HERE)) == before
    done = merge([path], path.with_name("merged.jsonl"))
    assert seen(read_table(done.out, HERE)) == before


def test_gc_beside_a_writer_says_who_holds_the_table(tmp_path: Path) -> None:
    path = table_with_everything(tmp_path / "t.jsonl")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(TableError, match=rf"is being written by process {holder.pid}, since \d{{4}}-.*wait"):
            collect(path, ["duplicates"])
        holder.kill()
        holder.wait()
    assert collect(path, ["duplicates"]).kept == 8


FULL = """
import resource, sys
from pathlib import Path
from edgeprune.errors import StorageError
from edgeprune.table_merging import collect, merge
a, out = map(Path, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for attempt in (lambda: merge([a], out), lambda: collect(a, ["duplicates"])):
    try:
        attempt()
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_file_and_no_half_written_one(tmp_path: Path) -> None:
    path, out = table_with_everything(tmp_path / "t.jsonl"), tmp_path / "all.jsonl"
    before = path.read_bytes()
    command = [sys.executable, "-c", FULL, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [f"cannot write {out}", f"cannot write {path}"]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["t.jsonl"]
