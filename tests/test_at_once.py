"""Several devices at once: together they take the time of the slowest, and one that fails leaves the others alone."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from edgeprune.at_once import at_once
from edgeprune.device import Device
from edgeprune.errors import DeviceError, Interrupted
from edgeprune.kernel import Kernel
from edgeprune.profiling import profile
from edgeprune.table import LatencyTable, read_lines
from edgeprune.wire import pause

pytestmark = [pytest.mark.integration, pytest.mark.timed]

KERNELS = [Kernel(operator="linear", c_in=8 * n, c_out=64) for n in range(1, 13)]


def test_results_and_errors_by_name() -> None:
    def gone() -> int:
        raise DeviceError("it is not there")

    found = at_once({"a": lambda: 1, "b": gone, "c": lambda: 3})
    assert (found["a"], found["c"]) == (1, 3)
    assert str(found["b"]) == "it is not there"
    assert at_once({}) == {}


def test_they_run_at_the_same_time() -> None:
    """Each waits for the other: one after the other none would end."""
    meeting = threading.Barrier(2, timeout=20)
    assert set(at_once({"a": meeting.wait, "b": meeting.wait}).values()) == {0, 1}


def test_another_exception_is_a_bug_and_is_raised() -> None:
    def broken() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        at_once({"a": broken, "b": lambda: 1})


def test_ctrl_c_reaches_all_and_saves_what_they_have(tmp_path: Path) -> None:
    """It comes once both have their first eight kernels; the main thread alone hears it."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b")}
    first = threading.Barrier(3, timeout=60)

    def work(name: str) -> LatencyTable:
        def told(done: int, total: int) -> None:
            if done == 8:
                first.wait()
                pause(60)  # until it is cancelled

        return profile(KERNELS, Device(name=name, backend="null"), table_path=paths[name], on_progress=told)

    def interrupt() -> None:
        first.wait()
        time.sleep(0.2)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    found = at_once({name: lambda name=name: work(name) for name in paths})  # type: ignore[misc]
    for name, path in paths.items():
        assert isinstance(found[name], Interrupted)
        assert "8 of 12 kernels are saved" in str(found[name])
        assert len(read_lines([path]).rows) == 8
