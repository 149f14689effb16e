"""A device that gets hot while it is measured: told in the answer, in the session's line and as a warning."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from edgeprune.device import load_device
from edgeprune.device_core import Program
from edgeprune.device_state import Tree
from edgeprune.errors import MeasurementError
from edgeprune.machine import told
from edgeprune.measurement import Measurement, Timing, joined
from edgeprune.profiling import slowed_warnings
from edgeprune.transport import Session
from tests.fake_device import CoreChannel
from tests.synthetic_machines import RASPBERRY_PI, path_with, program

pytestmark = pytest.mark.unit

QUICK = Timing(warmup_ms=0.0, burst_ms=0.0, untimed_runs=0, min_runs=1, min_rounds=2, max_rounds=2)


def session(root: Path, heats_up_after: int) -> Session:
    """Over a *synthetic* Raspberry Pi whose clock is capped after so many runs."""
    runs = [0]

    def run(handle: Any) -> None:
        runs[0] += 1
        if runs[0] == heats_up_after:
            (root / "sys/class/thermal/cooling_device0/cur_state").write_text("2\n")
            (root / "sys/class/thermal/thermal_zone0/temp").write_text("85200\n")

    runner: Any = types.ModuleType("runner")
    runner.NAME, runner.version, runner.run, runner.fill = "x", lambda: "1", run, lambda handle, seed: None
    core = Program(runner, "0" * 12, lambda message: None)
    core.tree = Tree(str(root))
    core.handles = {"kernel": 0, "reference": 1}
    return Session(CoreChannel(core, root, {}), {})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", path_with(tmp_path))
    root = RASPBERRY_PI.written(tmp_path)
    program(tmp_path / "bin" / "vcgencmd", "echo throttled=0x0")
    return root


def test_it_is_told_with_the_hottest_that_was_seen(root: Path) -> None:
    measured = session(root, heats_up_after=3).measure(["kernel"], ["reference"], timing=QUICK)
    assert measured.slowed == ("heat: cpufreq-cpu0 at step 2",)
    assert measured.machine == {"clock_mhz": 2400.0, "temperature_c": 85.2}
    calm = session(root, heats_up_after=10**9)
    (root / "sys/class/thermal/cooling_device0/cur_state").write_text("0\n")
    other = calm.measure(["kernel"], ["reference"], timing=QUICK)
    assert other.slowed == ()
    assert joined([measured, other]).slowed == measured.slowed  # of several processes: all that any of them met


def test_the_warning_names_the_device_the_reason_and_where_to_look() -> None:
    (warning,) = slowed_warnings(load_device("null"), ["heat: cpufreq-cpu0 at step 2", "under-voltage"])
    assert warning.startswith(
        "device 'null' was slowed down while it was measured (heat: cpufreq-cpu0 at step 2; under-"
    )
    assert warning.endswith("see edgeprune doctor --device null")
    assert slowed_warnings(load_device("null"), []) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"facts": 7}, "facts: Input should be a valid dictionary"),
        ({"state": {"clock_mhz": "fast"}}, "state.clock_mhz: Input should be a valid number"),
        ({"facts": {"a b;c": "x"}}, "String should match pattern"),
        ({"slowed": ["x"] * 51}, "slowed: List should have at most 50 items"),
        ({"packages": {str(n): "1" for n in range(51)}}, "packages: Dictionary should have at most 50 items"),
    ],
)
def test_a_state_of_another_shape_is_refused(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(MeasurementError, match=f"answer to 'state' is malformed: .*{message}"):
        told(answer)


def test_text_of_a_device_orders_no_terminal_about() -> None:
    assert told({"facts": {"board": "\x1b[2JJetson"}, "slowed": ["a\nb"]})["facts"]["board"] == "?[2JJetson"
    assert told({"slowed": ["a\nb"], "later": 1})["slowed"] == ["a?b"]
    assert len(told({"facts": {"board": "x" * 10**6}})["facts"]["board"]) == 1000


@pytest.mark.parametrize("slowed", [7, {"a": 1}.items, [["x"] * 30]])
def test_what_the_device_says_is_limited(slowed: Any) -> None:
    answer = {
        "times_us": {"a": [[1.0]]},
        "rounds": {"a": [0]},
        "modelled": False,
        "seconds": 1.0,
        "stopped_by": "rounds",
    }
    if isinstance(slowed, list):
        told = Measurement.from_json({**answer, "slowed": slowed * 50}, [], {}).slowed
        assert len(told) == 20 and all(len(reason) <= 200 for reason in told)
    else:
        with pytest.raises(MeasurementError, match="malformed"):
            Measurement.from_json({**answer, "slowed": slowed}, [], {})
