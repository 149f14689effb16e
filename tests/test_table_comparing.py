"""Two tables kernel by kernel, and one table's staircase: exact numbers on tiny cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.errors import InputError, TableError
from edgeprune.kernel import Kernel
from edgeprune.staircase import staircase_kernels
from edgeprune.table_comparing import compare
from edgeprune.table_curve import Step, curve_of, draw, find_steps
from edgeprune.table_listing import Listing, find_tables, list_tables, read_listing
from tests.test_table import HERE, THERE, fingerprint, row, session, written

pytestmark = pytest.mark.unit


def linear(c_out: int) -> Kernel:
    return Kernel(operator="linear", c_in=8, c_out=c_out)


def listing(path: Path, ratios: dict[int, float], compute_us: float = 100.0) -> Listing:
    rows = [row(ratio, kernel=linear(c_out)) for c_out, ratio in ratios.items()]
    return read_listing(str(written(path, fingerprint(), session(compute_us=compute_us), *rows)))


def test_ratios_of_second_over_first(tmp_path: Path) -> None:
    first = listing(tmp_path / "a.jsonl", {8: 1.0, 16: 2.0, 24: 3.0, 99: 1.0})
    second = listing(tmp_path / "b.jsonl", {8: 1.0, 16: 1.0, 24: 3.0, 77: 1.0}, compute_us=200.0)
    found = compare(first, second)
    assert [(pair.first, pair.second, pair.ratio) for pair in found.pairs] == [
        (300.0, 600.0, 2.0),
        (100.0, 200.0, 2.0),
        (200.0, 200.0, 1.0),
    ]
    assert (found.median, found.spread, found.p95) == (2.0, 0.0, 2.0)
    assert (found.only_first, found.only_second) == ((linear(99).key,), (linear(77).key,))
    assert found.references == {"compute": 2.0, "memory": 1.0}
    assert compare(first, second, "ratio").median == 1.0
    assert compare(first, second, "node").pairs[0].first == pytest.approx(240.0)  # 0.8 of it in the compute node


def test_nothing_in_common(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="have no kernel in common"):
        compare(listing(tmp_path / "a.jsonl", {8: 1.0}), listing(tmp_path / "b.jsonl", {16: 1.0}))


def test_two_fingerprints_in_one_file_are_told_and_named_by_hash(tmp_path: Path) -> None:
    """As after an update of the runtime: new rows in the same file."""
    new = session("s2", started="2026-03-01T00:00:00Z").model_copy(update={"fingerprint": THERE})
    both = [session(), row(2.0), new, row(3.0, fingerprint=THERE, session="s2")]
    path = str(written(tmp_path / "t.jsonl", *both))
    latest = read_listing(path)
    assert (latest.fingerprint, latest.others) == (THERE, {HERE: 1})
    old = read_listing(f"{path}@aaaa")
    assert (old.fingerprint, old.items[0].ratio) == (HERE, 2.0)
    assert compare(old, latest, "ratio").median == 1.5
    with pytest.raises(TableError, match="has 0 fingerprints that start with 'ffff'"):
        read_listing(f"{path}@ffff")


def test_names_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    mine = tmp_path / "latency_tables" / "null" / "null_fp32.jsonl"
    with pytest.raises(TableError, match="device 'null' has no table yet; measure one: edgeprune profile"):
        find_tables("null")
    mine.parent.mkdir(parents=True)
    written(mine, session(), row())
    (mine.parent / "broken.jsonl").write_text("garbage\n")
    assert find_tables("null") == find_tables("null/null_fp32") == (mine,)
    with pytest.raises(InputError, match=r"'nul' is neither a file nor a device .* did you mean 'null'"):
        find_tables("nul")
    known = {table.name: table for table in list_tables() if table.place == "yours"}
    assert (known["null/null_fp32"].kernels, known["null/null_fp32"].latest) == (1, "2026-01-01T00:00:00Z")
    assert "none of its lines can be read" in str(known["null/broken"].fault)


def test_steps_are_rises_steeper_than_the_mean_slope() -> None:
    rises, falls = find_steps([8, 16, 24, 32, 40], [10.0, 20.0, 20.0, 30.0, 27.0])
    assert rises == [Step(before=8, after=16, change=1.0), Step(before=24, after=32, change=0.5)]
    assert falls == [Step(before=32, after=40, change=-0.1)]
    assert find_steps([8, 16, 24, 32], [10.0, 20.0, 30.0, 40.0]) == ([], [])
    assert find_steps([8, 16, 24], [10.0, 10.1, 10.0]) == ([], [])  # noise


def test_a_staircase_has_a_period(tmp_path: Path) -> None:
    stairs = {c_out: 1.0 + -(-c_out // 16) for c_out in range(64, 129, 8)}
    curve = curve_of(listing(tmp_path / "t.jsonl", stairs))
    assert (curve.kernel, curve.axis, curve.period) == ("linear 8>* g1 b1 fp32 dense", "c_out", 16)
    assert curve.describe() == "steps of 16 channels, after 64, 80, 96, 112"
    straight = listing(tmp_path / "u.jsonl", {c_out: float(c_out) for c_out in range(64, 129, 8)})
    assert curve_of(straight).describe() == "no steps found"


def test_the_stairs_of_its_family_are_named_where_its_probes_were_measured(tmp_path: Path) -> None:
    """Those that the cost model takes; of one kernel's few widths nothing is said, nor of what was imported."""
    probes = {k: k.c_in * -(-k.c_out // 16) / 1e3 for k in staircase_kernels("fp32") if k.family == "conv"}
    rows = [row(ratio, kernel=kernel) for kernel, ratio in probes.items()]
    whole = read_listing(str(written(tmp_path / "t.jsonl", fingerprint(), session(), *rows)))
    assert curve_of(whole, axis="c_out").stairs == "conv along c_out: steps of 16"
    assert curve_of(whole, axis="c_in").stairs == "conv along c_in: no steps"
    few = tuple(item for item in whole.items if item.kernel and item.kernel.c_out % 32 == 0)
    assert curve_of(replace(whole, items=few), axis="c_out").stairs is None
    foreign = tuple(replace(item, origin="imported") for item in whole.items)
    assert curve_of(replace(whole, items=foreign), axis="c_out").stairs is None


def test_what_has_no_staircase(tmp_path: Path) -> None:
    two = listing(tmp_path / "t.jsonl", {8: 1.0, 16: 2.0})
    with pytest.raises(TableError, match="no kernel that was timed at 3 widths"):
        curve_of(two)
    with pytest.raises(TableError, match="has no kernel 'conv'"):
        curve_of(two, "conv")


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = curve_of(listing(tmp_path / "t.jsonl", {8: 1.0, 16: 2.0, 24: 2.0, 32: 1.5}))
    png = draw(curve, "test")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png == draw(curve, "test")
