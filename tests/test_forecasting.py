"""What a dry run says before anything is measured, and what is then measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgeprune.device import Device, load_device
from edgeprune.forecasting import MACS_PER_SECOND, RUNS_EACH, SECONDS_EACH, forecast, seconds_for
from edgeprune.graph import trace
from edgeprune.kernel import Kernel
from edgeprune.preparing import Silent, measured_table
from edgeprune.profiling import known_table, profile
from edgeprune.sampling import BATCH, MOST_ROUNDS
from edgeprune.staircase import staircase_kernels
from edgeprune.table import LatencyTable, table_path
from edgeprune.table_lines import FailureLine
from edgeprune.table_log import open_log

pytestmark = pytest.mark.unit
NULL = load_device("null")
NOISY = Device(name="noisy", backend="null", options={"noise": 0.2, "seed": 1})
STAIRS = staircase_kernels("fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    return tmp_path


class Net(nn.Module):
    """Three convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 128, 3, padding=1), nn.Conv2d(128, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


GRAPH = trace(Net(), (torch.zeros(1, 3, 16, 16),))


def grid_alone(device: Device) -> None:
    """Profile the staircase, then the first grid on it, and nothing by need."""
    profile(STAIRS, device)
    profile(forecast([GRAPH], device).missing, device)


def test_of_an_empty_table_the_grid_is_told_and_what_need_adds_is_bounded(cache: Path) -> None:
    found = forecast([GRAPH], NULL)
    assert len(found.missing) == found.grid > len(STAIRS)
    assert (found.following, found.expected, found.at_most) == (None, None, MOST_ROUNDS * BATCH)
    assert 0 < found.seconds < found.most_seconds
    assert [text.partition(":")[0] for text in found.unknown] == ["the grid's widths", "how many kernels come by need"]
    assert list(cache.iterdir()) == []


def test_without_a_model_nothing_comes_by_need() -> None:
    assert forecast([], NULL).missing == STAIRS
    profile(STAIRS, NULL)
    found = forecast([], NULL)
    assert (found.missing, found.following, found.expected, found.at_most) == ((), (), 0, 0)
    assert (found.seconds, found.most_seconds, found.unknown) == (0.0, 0.0, ())


def test_the_staircase_alone_fixes_the_widths_of_the_grid() -> None:
    profile(STAIRS, NULL)
    found = forecast([GRAPH], NULL)
    assert not set(found.missing) & set(STAIRS)
    assert [text.partition(":")[0] for text in found.unknown] == ["how many kernels come by need"]


def test_of_a_measured_grid_the_next_kernels_are_told_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the ones that the profile then asks for first."""
    grid_alone(NOISY)
    found = forecast([GRAPH], NOISY)
    assert (found.missing, found.at_most) == ((), MOST_ROUNDS * BATCH)
    assert found.following is not None and found.expected is not None
    assert 0 < len(found.following) <= found.expected <= found.at_most
    asked: list[tuple[Kernel, ...]] = []

    def note(kernels: tuple[Kernel, ...], device: Device, **options: object) -> LatencyTable:
        asked.append(kernels)
        return profile(kernels, device)

    monkeypatch.setattr("edgeprune.preparing.profile", note)
    measured_table(GRAPH, NOISY, Silent())
    assert asked[2] == found.following
    assert sum(map(len, asked[2:])) <= found.at_most


def test_where_the_goal_is_reached_nothing_is_left() -> None:
    measured_table(GRAPH, NULL, Silent())
    found = forecast([GRAPH], NULL)
    assert (found.missing, found.following, found.expected, found.at_most, found.seconds) == ((), (), 0, 0, 0.0)


def test_a_kernel_that_failed_counts_only_where_it_is_tried_again() -> None:
    profile(STAIRS[1:], NULL)
    fingerprint = known_table(NULL, "fp32").fingerprint
    with open_log(table_path(NULL, "fp32")) as log:
        log.append([FailureLine(kernel=STAIRS[0].to_json(), fingerprint=fingerprint, session="s", reason="no such")])
    assert forecast([], NULL).missing == ()
    assert forecast([], NULL, retry_failed=True).missing == STAIRS[:1]


def test_the_pace_is_that_of_the_tabled_kernels_of_an_operator() -> None:
    """Of a device that is measured: 0.12 s each, and 50 runs at the multiply-adds a second that the table shows."""
    clocked = Device(name="clocked", backend="openvino")
    small, large, other = (
        Kernel(operator="linear", c_in=64, c_out=64),
        Kernel(operator="linear", c_in=640, c_out=640),
        Kernel(operator="matmul", c_in=64, c_out=64, spatial=(8,)),
    )
    empty = known_table(NULL, "fp32")
    assert seconds_for([small], empty, clocked) == SECONDS_EACH + RUNS_EACH * small.macs / MACS_PER_SECOND
    table = profile([small], NULL)
    rate = small.macs / (table.latency_us(small) / 1e6)
    assert seconds_for([large], table, clocked) == pytest.approx(SECONDS_EACH + RUNS_EACH * large.macs / rate)
    assert seconds_for([other], table, clocked) == SECONDS_EACH + RUNS_EACH * other.macs / MACS_PER_SECOND
