"""Profile: only what is missing is measured, nothing measured is lost, a kernel that fails costs itself alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune.device import Device, load_device
from edgeprune.errors import Interrupted, MeasurementError, TableError
from edgeprune.kernel import Kernel
from edgeprune.measurement import ConnectionLost, Measurement, SessionHung, SessionLost
from edgeprune.profiling import profile
from edgeprune.table import LatencyTable, read_lines, table_path
from edgeprune.table_log import open_log
from edgeprune.transport import Session

pytestmark = [pytest.mark.integration, pytest.mark.timed]

NULL = load_device("null")
KERNELS = [Kernel(operator="linear", c_in=8 * n, c_out=64) for n in range(1, 21)]
ROOT = Path(__file__).parent.parent


def test_what_is_in_the_table_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    first = profile(KERNELS[:12], NULL, table_path=path)
    assert len(first) == 12
    size = path.stat().st_size
    told: list[tuple[int, int]] = []
    assert dict(profile(KERNELS[:12], NULL, table_path=path, on_progress=lambda *at: told.append(at)).entries) == dict(
        first.entries
    )
    assert path.stat().st_size == size
    assert told == []
    assert len(profile(KERNELS, NULL, table_path=path, on_progress=lambda *at: told.append(at))) == 20
    assert told == [(0, 8), (8, 8)]


def test_null_table_is_the_formula_and_says_modelled(tmp_path: Path) -> None:
    from edgeprune.backends.null.staircase import ALONE_US, time_us

    table = profile(KERNELS, NULL, table_path=tmp_path / "t.jsonl")
    assert table.origin == "modelled"
    assert table.warnings == ()
    for kernel in KERNELS:
        assert table.latency_us(kernel, node=True) == pytest.approx(time_us(kernel), rel=1e-3)
        assert table.latency_us(kernel) == pytest.approx(time_us(kernel) + ALONE_US, rel=1e-3)


def test_default_place_is_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    profile(KERNELS[:2], NULL)
    assert table_path(NULL, "fp32") == tmp_path / "latency_tables" / "null" / "null_fp32.jsonl"
    assert len(read_lines([table_path(NULL, "fp32")]).rows) == 2
    assert list(tmp_path.rglob("*.owner")) == []


def test_kernels_of_another_precision_are_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="is not of the precision fp32"):
        profile([Kernel(operator="linear", c_in=1, c_out=1, precision="int8")], NULL)


def test_table_of_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    noisy = Device(name="other", backend="null", options={"noise": 0.01})
    profile(KERNELS[:2], noisy, table_path=path)
    with pytest.raises(TableError, match="which is not this device"):
        profile(KERNELS[:2], NULL, table_path=path)
    table = profile(KERNELS[:2], NULL, table_path=path, allow_other=True)
    assert len(table) == 2
    assert any("not this device" in warning for warning in table.warnings)


def test_shipped_rows_count_on_their_machine_alone_and_are_no_fault_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_SHIPPED_TABLES", str(tmp_path / "shipped"))
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    shipped = tmp_path / "shipped" / "null" / "null_fp32.jsonl"
    measured: list[tuple[int, int]] = []

    def count(done: int, total: int) -> None:
        measured.append((done, total))

    profile(KERNELS[:3], NULL, table_path=shipped)
    assert len(profile(KERNELS[:4], NULL, on_progress=count)) == 4 and measured[0] == (0, 1), "three came with it"
    shipped.unlink()
    table_path(NULL, "fp32").unlink()
    profile(KERNELS[:3], Device(name="null", backend="null", options={"noise": 0.01}), table_path=shipped)
    table = profile(KERNELS[:4], NULL, on_progress=count)
    assert len(table) == 4 and measured[-2] == (0, 4) and not table.warnings


def test_noise_is_in_the_rows(tmp_path: Path) -> None:
    noisy = Device(name="noisy", backend="null", options={"noise": 0.05, "seed": 1})
    path = tmp_path / "t.jsonl"
    table = profile(KERNELS[:4], noisy, table_path=path)
    exact = profile(KERNELS[:4], NULL, table_path=tmp_path / "u.jsonl")
    for kernel in KERNELS[:4]:
        entry = table.look_up(kernel)
        assert entry.spread > 0
        assert entry.ratio_ci[0] < entry.ratio < entry.ratio_ci[1]
        assert entry.ratio == pytest.approx(exact.look_up(kernel).ratio, rel=0.1)


def test_interrupt_saves_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="8 of 20 kernels are saved"):
        profile(KERNELS, NULL, table_path=path, on_progress=stop)
    assert len(read_lines([path]).rows) == 8
    told: list[tuple[int, int]] = []
    assert len(profile(KERNELS, NULL, table_path=path, on_progress=lambda *at: told.append(at))) == 20
    assert told[0] == (0, 12)


def faulty(monkeypatch: pytest.MonkeyPatch, method: str, culprit: Kernel, error: MeasurementError) -> None:
    real = getattr(Session, method)

    def maybe(self: Session, keys: Any, *arguments: Any, **options: Any) -> Any:
        if culprit.key not in keys:
            return real(self, keys, *arguments, **options)
        self.busy_with = culprit.key
        if method == "measure" or isinstance(error, SessionLost):
            raise error
        others = {key: path for key, path in keys.items() if key != culprit.key}
        loaded, failed = real(self, others, *arguments, **options)
        return loaded, {**failed, culprit.key: str(error)}

    monkeypatch.setattr(Session, method, maybe)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("load_all", MeasurementError("no such operator")),
        ("load_all", SessionLost("it died")),
        ("measure", SessionLost("it died")),
    ],
)
def test_a_kernel_that_fails_is_remembered_and_the_rest_goes_on(
    method: str, error: MeasurementError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    with monkeypatch.context() as patch:
        faulty(patch, method, KERNELS[3], error)
        table = profile(KERNELS, NULL, table_path=path)
    assert len(table) == 19
    assert dict(table.failures) == {KERNELS[3]: str(error)}
    assert len(profile(KERNELS, NULL, table_path=path)) == 19
    assert len(profile(KERNELS, NULL, table_path=path, retry_failed=True)) == 20


def test_a_session_that_was_lost_once_costs_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody killed the device program: the kernel that ran is measured in the next one, after the rest."""
    real, lost = Session.measure, list[str]()

    def measure(self: Session, candidates: list[str], *arguments: Any, **options: Any) -> Measurement:
        if KERNELS[3].key in candidates and not lost:
            lost.append(self.busy_with)
            self.busy_with = KERNELS[3].key
            raise SessionLost("it was killed")
        return real(self, candidates, *arguments, **options)

    monkeypatch.setattr(Session, "measure", measure)
    told: list[tuple[int, int]] = []
    table = profile(KERNELS, NULL, table_path=tmp_path / "t.jsonl", on_progress=lambda *at: told.append(at))
    assert (len(lost), len(table), dict(table.failures)) == (1, 20, {})
    assert [done for done, _ in told] == [0, 0, 7, 8, 16, 20]


def test_what_hung_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take its time-out once more."""
    real, tried = Session.measure, list[list[str]]()

    def measure(self: Session, candidates: list[str], *arguments: Any, **options: Any) -> Measurement:
        if KERNELS[3].key in candidates:
            tried.append(candidates)
            self.busy_with = KERNELS[3].key
            raise SessionHung("no answer within 120 s")
        return real(self, candidates, *arguments, **options)

    monkeypatch.setattr(Session, "measure", measure)
    table = profile(KERNELS, NULL, table_path=tmp_path / "t.jsonl")
    assert (len(tried), len(table)) == (1, 19)
    assert dict(table.failures) == {KERNELS[3]: "no answer within 120 s"}


def test_a_lost_connection_is_no_kernels_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often; only where nothing at all is measured in between does it count as gone."""
    real, lost = Session.measure, list[list[str]]()

    def measure(self: Session, candidates: list[str], *arguments: Any, **options: Any) -> Measurement:
        if len(lost) % 3 != 2:
            lost.append(candidates)
            self.busy_with = candidates[0]
            raise ConnectionLost("the connection is lost")
        lost.append([])
        return real(self, candidates, *arguments, **options)

    monkeypatch.setattr(Session, "measure", measure)
    path = tmp_path / "t.jsonl"
    assert (len(profile(KERNELS, NULL, table_path=path)), read_lines([path]).failures) == (20, ())
    assert [len(batch) for batch in lost] == [8, 8, 0, 8, 8, 0, 4, 4, 0]

    def never(self: Session, *arguments: Any, **options: Any) -> Measurement:
        raise ConnectionLost("the connection is lost")

    monkeypatch.setattr(Session, "measure", never)
    with pytest.raises(
        ConnectionLost, match="the connection is lost; 0 of 1 kernels are saved in .* run it again"
    ) as no:
        profile([Kernel(operator="linear", c_in=8, c_out=8)], NULL, table_path=path)
    assert no.value.exit_code == 4


def test_a_session_lost_after_its_batch_is_saved_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, lost = Session.unload, list[tuple[str, ...]]()

    def unload(self: Session, *keys: str) -> None:
        if not lost:
            lost.append(keys)
            raise ConnectionLost("the connection is lost")
        real(self, *keys)

    monkeypatch.setattr(Session, "unload", unload)
    path = tmp_path / "t.jsonl"
    assert len(profile(KERNELS, NULL, table_path=path)) == 20
    lines = read_lines([path])
    assert (len(lost[0]), len(lines.rows), lines.failures) == (8, 20, ())


def test_a_session_lost_with_nobody_to_blame_tries_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.measure
    culprit = KERNELS[2].key

    def measure(self: Session, candidates: list[str], *arguments: Any, **options: Any) -> Measurement:
        if culprit in candidates:
            self.busy_with = "measure"
            raise SessionLost("it died")
        return real(self, candidates, *arguments, **options)

    monkeypatch.setattr(Session, "measure", measure)
    table = profile(KERNELS[:9], NULL, table_path=tmp_path / "t.jsonl")
    assert len(table) == 8
    assert list(table.failures) == [KERNELS[2]]


def test_a_lost_reference_is_nobodys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = Session.load, 0

    def load(self: Session, key: str, *arguments: Any, **options: Any) -> Any:
        nonlocal tried
        self.busy_with = key
        if key == "memory":
            tried += 1
            raise SessionLost("it died")
        return real(self, key, *arguments, **options)

    monkeypatch.setattr(Session, "load", load)
    with pytest.raises(SessionLost):
        profile(KERNELS[:2], NULL, table_path=tmp_path / "t.jsonl")
    assert read_lines([tmp_path / "t.jsonl"]).failures == ()
    assert tried == 3  # as often it is tried again


def test_a_kernel_whose_rounds_are_far_apart_comes_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other work hits one kernel the first time, and another one every time: measured twice, and three times in all."""
    real = Session.measure
    seen: list[str] = []

    def measure(self: Session, *arguments: Any, **options: Any) -> Measurement:
        answer = real(self, *arguments, **options)
        times = {key: [list(burst) for burst in bursts] for key, bursts in answer.times_us.items()}
        for key in times:
            if (key == KERNELS[0].key and key not in seen) or key == KERNELS[9].key:
                times[key] = [[(1 + i % 3) * value for value in burst] for i, burst in enumerate(times[key])]
        seen.extend(key for key in times if key not in ("compute", "memory"))
        return replace(answer, times_us=times)

    monkeypatch.setattr(Session, "measure", measure)
    told: list[tuple[int, int]] = []

    def count(done: int, total: int) -> None:
        told.append((done, total))

    table = profile(KERNELS[:10], NULL, table_path=tmp_path / "t.jsonl", on_progress=count)
    assert len(set(seen)) == 10
    assert seen[10:] == [KERNELS[0].key, KERNELS[9].key, KERNELS[9].key]
    assert told == [(0, 10), (8, 10), (10, 12), (12, 13), (13, 13)]
    quiet = profile(KERNELS[:10], NULL, table_path=tmp_path / "u.jsonl")
    first = table.look_up(KERNELS[0])
    assert first.rows == 2 and first.ratio == pytest.approx(quiet.look_up(KERNELS[0]).ratio, rel=0.01)


def test_disturbed_rounds_are_those_of_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.measure
    measured = 0

    def measure(self: Session, *arguments: Any, **options: Any) -> Measurement:
        nonlocal measured
        measured += 1
        answer = real(self, *arguments, **options)
        times = {key: [list(burst) for burst in bursts] for key, bursts in answer.times_us.items()}
        times["compute"][1] = [2 * value for value in times["compute"][1]]  # a disturbed reference
        times[KERNELS[0].key][2] = [2 * value for value in times[KERNELS[0].key][2]]  # a slow candidate is not
        return Measurement(times_us=times, rounds=answer.rounds, references=answer.references, anchors=answer.anchors)

    monkeypatch.setattr(Session, "measure", measure)
    profile(KERNELS[:1], NULL, table_path=tmp_path / "t.jsonl")
    (row,) = read_lines([tmp_path / "t.jsonl"]).rows
    assert (row.rounds, row.disturbed, measured) == (4, 1, 1)
    assert row.p99_us > 1.5 * row.median_us


def test_killed_at_random_moments_it_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--kills", "3", "--kernels", "48", "--longest", "0.4"]
    report = ["--out", str(tmp_path / "report.md")]
    done = subprocess.run([*command, *report], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost 0 finished rows" in done.stdout and "the table equals a whole profile's" in done.stdout
    assert "lost 0 finished rows" in (tmp_path / "report.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["host-openvino", "host-onnxruntime", "host-tflite"])
def test_a_real_runtime(name: str, require: Callable[[str], None], tmp_path: Path) -> None:
    """More work takes longer, and the compute node alone takes less than the whole; no time is asserted."""
    device = load_device(name)
    require(device.backend)
    shape: dict[str, Any] = {"window": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    small, large = (Kernel(operator="conv", c_in=c, c_out=c, spatial=(28, 28), **shape) for c in (16, 128))
    unable = Kernel(operator="cat", c_in=1, c_out=1, spatial=(4, 4))
    table: LatencyTable = profile([small, large, unable], device, table_path=tmp_path / "t.jsonl")
    assert table.origin == "measured"
    assert "can't be joined" in table.failures[unable]
    for kernel in (small, large):
        assert table.latency_us(kernel, node=True) <= table.latency_us(kernel)
    assert table.latency_us(large, node=True) > 4 * table.latency_us(small, node=True)
    assert table.facts["threads"] == 1


def test_one_that_waited_measures_only_what_the_other_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other profiler ends while we wait for its lock; here it runs just before we get it."""
    path = tmp_path / "t.jsonl"

    def after_the_other(path: Path, *, wait_s: float) -> Any:
        monkeypatch.setattr("edgeprune.profiling.open_log", open_log)
        profile(KERNELS[:15], NULL, table_path=path)
        return open_log(path, wait_s=wait_s)

    monkeypatch.setattr("edgeprune.profiling.open_log", after_the_other)
    told: list[tuple[int, int]] = []
    table = profile(KERNELS, NULL, table_path=path, wait_s=60.0, on_progress=lambda *at: told.append(at))
    assert (len(table), told[0]) == (20, (0, 5))
    assert len(read_lines([path]).rows) == 20
