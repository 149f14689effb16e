"""Latency tables: what a reader skips and tells, and what a writer never loses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import StorageError, TableError
from edgeprune.kernel import Kernel
from edgeprune.table import LatencyTable, read_lines, read_table, staleness
from edgeprune.table_lines import (
    FailureLine,
    FingerprintLine,
    NetworkLine,
    RowLine,
    SessionLine,
    UnitEntry,
    parse_line,
)
from edgeprune.table_log import open_log

GOLDEN = Path(__file__).parent / "golden" / "table_v1.jsonl"
HERE = "aaaaaaaaaaaa"
THERE = "bbbbbbbbbbbb"
EARLY = "2026-01-01T00:00:00Z"
KERNEL = Kernel(operator="linear", c_in=8, c_out=16)

pytestmark = pytest.mark.unit


def row(ratio: float = 2.0, *, fingerprint: str = HERE, session: str = "s1", kernel: Kernel = KERNEL) -> RowLine:
    return RowLine(
        kernel=kernel.to_json(),
        fingerprint=fingerprint,
        session=session,
        n=20,
        median_us=100.0,
        p90_us=110.0,
        p99_us=120.0,
        spread=0.01,
        node_us=80.0,
        reference="compute",
        reference_ratio=ratio,
        ratio_ci=(ratio * 0.99, ratio * 1.01),
        rounds=5,
        disturbed=0,
        origin="measured",
    )


def session(name: str = "s1", compute_us: float = 50.0, started: str = EARLY, rounds: int = 5) -> SessionLine:
    return SessionLine(
        id=name,
        fingerprint=HERE,
        started=started,
        device="test",
        references={"compute": compute_us, "memory": 10.0},
        rounds=rounds,
        edgeprune="0.1.0",
    )


def fingerprint(name: str = HERE) -> FingerprintLine:
    return FingerprintLine(hash=name, facts={"backend": "openvino", "version": "1", "precision": "fp32", "threads": 2})


STRUCTURE = "0123456789abcdef" * 4
JOIN = Kernel(operator="add", c_in=16, c_out=16)


def network(ratio: float = 3.0, *, fingerprint: str = HERE, session: str = "s1") -> NetworkLine:
    """A linear that took 2.5 times the reference in the network, and an add of which nobody told."""
    return NetworkLine(
        structure=STRUCTURE,
        fingerprint=fingerprint,
        session=session,
        units=[
            UnitEntry(name="fc", kernel=KERNEL.to_json(), node_ratio=2.5),
            UnitEntry(name="join", kernel=JOIN.to_json()),
        ],
        n=40,
        median_us=150.0,
        p90_us=160.0,
        p99_us=170.0,
        spread=0.005,
        reference="compute",
        reference_ratio=ratio,
        ratio_ci=(ratio * 0.99, ratio * 1.01),
        rounds=10,
        disturbed=1,
        origin="measured",
    )


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else line.to_line() for line in lines))
    return path


@pytest.mark.golden
def test_golden_file_reads_and_is_written_the_same() -> None:
    table = read_table(GOLDEN)
    assert table.warnings == ()
    conv = Kernel(
        operator="conv",
        c_in=32,
        c_out=64,
        spatial=(56, 56),
        window=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        epilogue=("bias", "relu"),
    )
    entry = table.look_up(conv)
    assert (entry.ratio, entry.origin) == (2.0, "measured")
    assert entry.node_ratio == pytest.approx(1.6)
    assert table.latency_us(conv) == 500.0
    assert table.latency_us(conv, node=True) == pytest.approx(400.0)
    assert list(table.failures.values()) == ["operator Foo is not supported"]
    pool = Kernel(operator="mean", c_in=64, c_out=64, spatial=(56, 56))
    (found,) = table.networks
    assert (found.structure, found.kernels, found.nodes) == (STRUCTURE, {"c1": conv, "pool": pool}, {"c1": 1.75})
    assert (found.ratio, found.ratio_ci, found.origin) == (2.125, (2.1, 2.15), "measured")
    for text in GOLDEN.read_bytes().splitlines(keepends=True):
        assert parse_line(text).to_line().encode() == text


def test_microseconds_are_derived_from_the_latest_session_or_from_today(tmp_path: Path) -> None:
    late = session("s2", compute_us=60.0, started="2026-02-01T00:00:00Z")
    table = read_table(written(tmp_path / "t.jsonl", row(), late, session()))
    assert table.latency_us(KERNEL) == 120.0
    assert table.latency_us(KERNEL, node=True) == pytest.approx(96.0)
    assert table.latency_us(KERNEL, references_us={"compute": 1.0}) == 2.0


def test_a_kernel_that_is_not_there_is_an_error_never_zero(tmp_path: Path) -> None:
    other = Kernel(operator="linear", c_in=8, c_out=17)
    broken = FailureLine(kernel=other.to_json(), fingerprint=HERE, session="s1", reason="no such operator")
    table = read_table(written(tmp_path / "t.jsonl", row(), session(), broken))
    with pytest.raises(TableError, match="could not be measured: no such operator"):
        table.look_up(other)
    with pytest.raises(TableError, match="is not in the table"):
        table.latency_us(Kernel(operator="linear", c_in=1, c_out=1))
    assert other not in table
    assert KERNEL in table


def broken_row(**changes: Any) -> str:
    return json.dumps(json.loads(row().to_line()) | changes) + "\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"type":"row","ker\n', "torn or corrupt"),
        ("[1]\n", "not a JSON object"),
        (broken_row(median_us=-1.0), "median_us"),
        (broken_row(median_us=float("nan")), "median_us"),
        (broken_row(reference_ratio=0.0), "reference_ratio"),
        (broken_row(ratio_ci=[3.0, 4.0]), "does not hold"),
        (broken_row(p90_us=1.0), "ascend"),
        (broken_row(surprise=1), "surprise"),
        (broken_row(kernel={"operator": "conv", "c_in": 0, "c_out": 1}), "at least 1"),
        (broken_row(kernel={"operator": "magic", "c_in": 1, "c_out": 1}), "magic"),
        (broken_row(n="20"), "n:"),
        (broken_row(type="poem"), "unknown type"),
        ('{"type":"session","schema":2}\n', "schema"),
    ],
)
def test_a_bad_line_is_named_and_skipped_and_nothing_else_lost(line: str, reason: str, tmp_path: Path) -> None:
    third = Kernel(operator="linear", c_in=9, c_out=9)
    path = written(tmp_path / "t.jsonl", fingerprint(), session(), row(), line, row(kernel=third))
    table = read_table(path)
    assert len(table) == 2
    (warning,) = table.warnings
    assert warning.startswith(f"{path}:4: skipped")
    assert reason in warning


def test_files_merge_by_concatenation_in_any_order(tmp_path: Path) -> None:
    parts = [fingerprint(), session(), row(2.0), session("s2"), row(2.1, session="s2"), row(2.0)]
    forward = read_table(written(tmp_path / "a.jsonl", *parts))
    backward = read_table(written(tmp_path / "b.jsonl", *parts[::-1], *parts))
    assert forward.look_up(KERNEL).ratio == pytest.approx(2.05)
    assert backward.look_up(KERNEL).ratio == forward.look_up(KERNEL).ratio
    assert len(forward.sessions) == len(backward.sessions) == 2


def test_a_network_survives_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with open_log(path) as log:
        log.append([fingerprint(), session(), network()])
    assert parse_line(path.read_bytes().splitlines()[-1]) == network()
    (found,) = read_table(path, HERE).networks
    assert dict(found.kernels) == {"fc": KERNEL, "join": JOIN}
    assert dict(found.nodes) == {"fc": 2.5}, "not told is not zero"
    assert (found.structure, found.ratio, found.ratio_ci) == (STRUCTURE, 3.0, network().ratio_ci)
    assert (found.reference, found.origin) == ("compute", "measured")


def test_networks_merge_by_concatenation_each_measurement_once(tmp_path: Path) -> None:
    lines = [fingerprint(), session(), row(), network(), network(3.1, session="s2"), network(9.0, fingerprint=THERE)]
    once = read_table(written(tmp_path / "a.jsonl", *lines))
    twice = read_table(written(tmp_path / "b.jsonl", *lines, *lines))
    assert [n.ratio for n in once.networks] == [n.ratio for n in twice.networks] == [3.0, 3.1]
    assert [n.ratio for n in read_table(written(tmp_path / "c.jsonl", *lines[3:]), THERE).networks] == [9.0]


def broken_network(**changes: Any) -> str:
    return json.dumps(json.loads(network().to_line()) | changes) + "\n"


UNIT = {"name": "fc", "kernel": KERNEL.to_json()}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (broken_network(structure="abc"), "structure"),
        (broken_network(reference_ratio=-1.0), "reference_ratio"),
        (broken_network(median_us=float("nan")), "median_us"),
        (broken_network(ratio_ci=[float("nan"), float("nan")]), "does not hold"),
        (broken_network(ratio_ci=[1.0, 2.0]), "does not hold"),
        (broken_network(p99_us=1.0), "ascend"),
        (broken_network(units=[]), "units"),
        (broken_network(units=[UNIT, UNIT]), "two units of one name"),
        (broken_network(units=[UNIT | {"node_ratio": -1.0}]), "node_ratio"),
        (broken_network(units=[UNIT | {"kernel": {"operator": "magic", "c_in": 1, "c_out": 1}}]), "magic"),
        (broken_network(surprise=1), "surprise"),
    ],
)
def test_a_bad_network_line_is_named_and_skipped(line: str, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", fingerprint(), session(), row(), line, network())
    table = read_table(path)
    assert (len(table), len(table.networks)) == (1, 1)
    (warning,) = table.warnings
    assert warning.startswith(f"{path}:4: skipped")
    assert reason in warning


def test_contradicting_rows_are_told(tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "t.jsonl", row(2.0), row(3.0, session="s2"), row(2.1, session="s3")))
    assert table.look_up(KERNEL).ratio == 2.1
    assert "3 rows contradict each other, 2 to 3" in table.warnings[0]


def test_a_row_that_other_work_hit_in_every_round_counts_little_beside_a_quiet_one(tmp_path: Path) -> None:
    """4 ± 40 % and 2 ± 1 % count 1 to 1,600; halves of that weight meet next to 2."""
    vague = row(4.0).model_copy(update={"ratio_ci": (4 - 1.96 * 1.6, 4 + 1.96 * 1.6)})
    quiet = row(2.0, session="s2").model_copy(update={"ratio_ci": (2 - 1.96 * 0.02, 2 + 1.96 * 0.02)})
    table = read_table(written(tmp_path / "t.jsonl", vague, quiet))
    entry = table.look_up(KERNEL)
    assert entry.ratio == pytest.approx(2.0, rel=2e-3) and entry.rows == 2
    assert entry.doubt == pytest.approx(0.01 * 2.262 / 1.96, rel=0.01), "Student's factor for ten rounds"
    assert not table.warnings, "the quiet one lies in the interval of the other: they don't contradict each other"


def test_the_fullest_line_of_a_session_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", session(rounds=50, compute_us=51.0), row(), session(rounds=5))
    assert read_table(path).references_us["compute"] == 51.0


def test_table_of_another_machine_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", fingerprint(), session(), row())
    with pytest.raises(TableError, match=r"measured on openvino 1, fp32, 2 threads, which is not this device"):
        read_table(path, THERE)
    table = read_table(path, THERE, allow_other=True)
    assert table.fingerprint == HERE
    assert "is not this device" in table.warnings[0]
    both = written(tmp_path / "u.jsonl", session(), row(), row(5.0, fingerprint=THERE))
    assert read_table(both, THERE).look_up(KERNEL).ratio == 5.0


def test_no_file_is_an_empty_table(tmp_path: Path) -> None:
    table = read_table(tmp_path / "none.jsonl", HERE)
    assert (len(table), table.warnings, table.fingerprint) == (0, (), HERE)


def test_stale_when_a_reference_runs_differently(tmp_path: Path) -> None:
    late = "2026-02-01T00:00:00Z"
    table = read_table(written(tmp_path / "t.jsonl", row(), session(), session("s2", compute_us=60.0, started=late)))
    (warning,) = staleness(table)
    assert "the compute reference runs 20% slower than in 1 earlier session" in warning
    table = read_table(written(tmp_path / "u.jsonl", row(), session(), session("s2", compute_us=51.0, started=late)))
    assert staleness(table) == []


def test_modelled_rows_say_so(tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "t.jsonl", session(), broken_row(origin="modelled")))
    assert table.origin == "modelled"
    assert isinstance(table, LatencyTable)


def test_appending_mends_a_torn_tail(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", session(), row(), row().to_line()[:50])
    with open_log(path) as log:
        log.append([row(kernel=Kernel(operator="linear", c_in=3, c_out=3))])
    table = read_table(path)
    assert len(table) == 2
    assert [w.split(": ")[0] for w in table.warnings] == [f"{path}:3"]


HOLD = """
import sys, time
from pathlib import Path
from edgeprune.table_log import open_log
with open_log(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_holds_the_table(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(TableError, match=f"is being written by process {holder.pid}"), open_log(path):
            pass
        holder.kill()
        holder.wait()
    with open_log(path) as log:  # a killed holder holds nothing
        log.append([session()])


FULL = """
import resource, sys
from pathlib import Path
from edgeprune.errors import StorageError
from edgeprune.table_log import open_log
sys.path.insert(0, sys.argv[2])
from tests.test_table import row, session
path = Path(sys.argv[1])
with open_log(path) as log:
    log.append([session(), row()])
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100,) * 2)
    try:
        log.append([row(3.0), row(4.0)])
    except StorageError as error:
        print(error)
"""


def test_full_disk_says_what_is_saved_and_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(root)], capture_output=True, text=True, timeout=60, check=True
    )
    assert f"cannot write {path}" in done.stdout
    assert "2 lines of this run are saved" in done.stdout
    file = read_lines([path])
    assert (len(file.rows), file.warnings) == (1, ())


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="cannot write"), open_log(blocked / "t.jsonl"):
        pass


def test_unreadable_table(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot be read"):
        read_table(tmp_path)


def test_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        writes.append(data)
        return real(descriptor, data)

    with open_log(tmp_path / "t.jsonl") as log, monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        log.append([session(), row()])
    assert len(writes) == 1
    assert writes[0].endswith(b"}\n")


def test_a_row_says_in_which_precisions_it_ran() -> None:
    told = row().model_copy(update={"ran_in": {"int8": 0.9, "fp32": 0.1}})
    assert parse_line(told.to_line().encode()) == told
    assert "ran_in" not in row().to_line()
    with pytest.raises(ValueError, match=r"ran_in.int8: Input should be less than or equal to 1"):
        parse_line(told.to_line().replace("0.9", "1.9").encode())
