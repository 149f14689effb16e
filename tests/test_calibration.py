"""Whole networks: which are measured, whose time an executed node is, and that a table is asked for each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgeprune.calibration as calibration_module
from edgeprune.backends.null.staircase import NULL, time_us
from edgeprune.calibration import (
    COMMON_SHARES,
    KINDS,
    LEAST_WIDTH_SHARE,
    Cut,
    Source,
    UnitTimes,
    _node_ratios,
    calibration_cuts,
    missing_networks,
    unit_times,
    with_networks,
)
from edgeprune.cost import CostModel, cost_model, cost_model_from
from edgeprune.device import Device, load_device
from edgeprune.errors import Interrupted, UnstableError
from edgeprune.fusion import fuse
from edgeprune.graph import ModelGraph, trace
from edgeprune.measurement import Measurement, NodeTimes
from edgeprune.preparing import Silent, measured_table
from edgeprune.table import LatencyTable, NetworkEntry, read_lines, read_table, table_path
from edgeprune.table_log import open_log
from edgeprune.transport import Session
from edgeprune.units import kernels_at, width_options

pytestmark = pytest.mark.unit


class Net(nn.Module):
    """A linear, a norm, a copy and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(self.norm(x).transpose(1, 2))))
        return result


def model_of(net: nn.Module, networks: tuple[NetworkEntry, ...] = ()) -> CostModel:
    graph = trace(net, (torch.zeros(1, 6, 5, 8),))
    units = fuse(graph, "fp32", activations=frozenset({"relu"}), adds=True)
    options = width_options(graph, units, {})
    table = {kernel: time_us(kernel) for kernel in kernels_at(units, options)}
    return cost_model_from(graph, units, options, table, origin="modelled", networks=networks)


def nodes(*listed: tuple[str, float, list[str] | None], total_us: float = 100.0) -> NodeTimes:
    documents: list[dict[str, Any]] = [
        {"name": name, "type": "", "time_us": us, "compute": True} | ({} if covers is None else {"covers": covers})
        for name, us, covers in listed
    ]
    return NodeTimes(nodes=tuple(documents), total_us=total_us)


def test_by_what_went_into_a_node_also_under_the_names_of_what_was_fused() -> None:
    model = model_of(Net())
    times = unit_times(
        model,
        Cut(widths=model.graph.dense_widths),
        nodes(("x", 20.0, ["a/WithoutBiases", "relu/0"]), ("mvn", 7.0, ["layer_norm_nchwc"]), ("odd", 3.0, ["odd"])),
    )
    assert times is not None
    assert times.unit_us == {"a": 20.0, "layer_norm": 7.0, "transpose": 0.0, "b": 0.0}
    assert times.total_us == 100.0


def test_a_node_of_several_units_is_shared_by_their_tabled_times() -> None:
    model = model_of(Net())
    times = unit_times(model, Cut(widths=model.graph.dense_widths), nodes(("x", 30.0, ["layer_norm/0", "transpose/0"])))
    assert times is not None
    tabled = {unit.name: float(model.unit_us(unit, [model.graph.dense_widths])[0]) for unit in model.units}
    assert times.unit_us["layer_norm"] + times.unit_us["transpose"] == pytest.approx(30.0)
    ratio = times.unit_us["layer_norm"] / times.unit_us["transpose"]
    assert ratio == pytest.approx(tabled["layer_norm"] / tabled["transpose"])


def test_by_name_where_the_runtime_does_not_tell() -> None:
    model = model_of(Net())
    times = unit_times(model, Cut(widths=model.graph.dense_widths), nodes(("a", 20.0, None), ("Reshape_7", 1.0, None)))
    assert times is not None
    assert times.unit_us == {"a": 20.0}


def test_nodes_that_sum_to_more_than_the_run_are_scaled_to_it() -> None:
    model = model_of(Net())
    times = unit_times(model, Cut(widths=model.graph.dense_widths), nodes(("a", 80.0, ["a"]), ("b", 60.0, ["b"])))
    assert times is not None
    assert times.total_us == 140.0


def test_where_every_node_computes_the_run_is_all_compute_to_the_last_bit() -> None:
    times = nodes(("a", 3.5, None), ("b", 2.3, None), ("c", 9.9, None))
    assert all(times.within(us) == us for us in (15.695, 0.3, 7.1)) and times.within(20.0) == times.compute_us


def test_nothing_is_told_of_units_where_the_runtime_tells_no_nodes() -> None:
    model = model_of(Net())
    assert unit_times(model, Cut(widths=model.graph.dense_widths), None) is None
    assert unit_times(model, Cut(widths=model.graph.dense_widths), nodes(total_us=0.0)) is None


def test_a_copy_that_is_never_executed_costs_nothing_and_what_no_unit_covers_is_overhead() -> None:
    model = model_of(Net())
    networks, truth = [], []
    for cut in calibration_cuts(model):
        widths = cut.widths
        own = {unit.name: float(model.unit_us(unit, [widths])[0]) for unit in model.units} | {"transpose": 0.0}
        truth.append(0.2 + sum(own.values()))
        networks.append(
            NetworkEntry(
                structure=model.graph.structure_hash,
                kernels=cut.kernels(model),
                nodes=own,
                reference="compute",
                ratio=truth[-1],
                ratio_ci=(truth[-1], truth[-1]),
                origin="modelled",
            )
        )
    fitted = model_of(Net(), tuple(networks))
    transpose = next(unit for unit in fitted.units if unit.name == "transpose")
    assert fitted.unit_us(transpose, [fitted.graph.dense_widths]).tolist() == [0.0]
    for widths, us in zip([cut.widths for cut in calibration_cuts(model)], truth, strict=True):
        assert fitted.predict(widths).us == pytest.approx(us, rel=0.01)
        kept = sum(float(fitted.unit_us(unit, [widths], fitted.cold(widths))[0]) for unit in fitted.units)
        assert fitted.overhead_us == pytest.approx(fitted.predict(widths).us - kept)
    assert 0.0 < fitted.overhead_us < 0.4


def test_the_dense_network_random_ones_and_ones_cut_evenly_to_offered_widths() -> None:
    model = model_of(Net())
    cuts = calibration_cuts(model)
    chosen = [dict(cut.widths) for cut in cuts]
    dense = model.graph.dense_widths
    assert cuts == calibration_cuts(model) and cuts[0] == Cut(widths=dense)
    assert len(KINDS) / 3 < len(chosen) <= len(KINDS)
    assert len({tuple(sorted(widths.items())) for widths in chosen}) == len(chosen)
    even = [w for w in chosen if all(width in model.options[group] for group, width in w.items())]
    assert len(even) > len(COMMON_SHARES)
    for widths in chosen[1:]:
        for group, width in widths.items():
            assert LEAST_WIDTH_SHARE * dense[group] - 1 <= width <= dense[group]


class Residual(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), Branch(), Branch()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.b(torch.relu(self.a(x))))
        return result


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(torch.relu(self.first(x))))


def test_some_networks_lack_blocks_and_are_taught_without_their_units(cache: Path) -> None:
    net = Residual().eval()
    null, graph = load_device("null"), trace(net, X)
    table = measured_table(graph, null, Silent())
    bare = cost_model(graph, table)
    without = [cut for cut in calibration_cuts(bare) if cut.dropped]
    assert len(without) == sum(kind.startswith("without") for kind in KINDS)
    for cut in without:
        assert set(cut.dropped) <= {"b", "c"}
        units = {unit.name for unit in bare.units} - bare.vanishing(cut.dropped)
        assert set(cut.kernels(bare)) == units and len(units) < len(bare.units)
        assert not any(name.startswith(cut.dropped) for name in cut.plan(graph).kept)
    found = with_networks(table, bare, Source(model=net, graph=graph, example_inputs=X), null)
    model = cost_model(graph, found)
    for cut in without:
        expected = NULL.context * sum(map(time_us, cut.kernels(bare).values())) + NULL.network_us
        assert model.predict(cut.widths, cut.dropped).us == pytest.approx(expected, rel=0.03)


class Fire(nn.Module):
    """Two convolutions of one input, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.one = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1)
        self.three, self.last = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(56, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.squeeze(x))
        return torch.relu(self.last(torch.cat([self.one(squeezed), self.three(squeezed)], 1)))


def test_what_a_concatenation_joins_is_kept_in_the_table(cache: Path) -> None:
    net = Fire().eval()
    null, graph = load_device("null"), trace(net, X)
    table = measured_table(graph, null, Silent())
    assert not any(kernel.parts for kernel in table.entries), "as a kernel of its own it is joined from two halves"
    bare = cost_model(graph, table)
    found = with_networks(table, bare, Source(model=net, graph=graph, example_inputs=X), null)
    joined = [network.kernels["cat"] for network in found.networks]
    assert joined[0].parts == (32, 24)
    assert all(sum(kernel.parts) == kernel.c_in for kernel in joined)
    assert len({kernel.parts for kernel in joined}) > len(KINDS) / 2
    assert missing_networks(found, bare) == []


def test_only_blocks_without_a_stride_are_dropped_where_there_are_such(cache: Path) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.short = nn.Conv2d(3, 16, 3, padding=1), Branch(), nn.Conv2d(16, 32, 1, 2)
            self.down, self.up = nn.Conv2d(16, 24, 3, 2, 1), nn.Conv2d(24, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(torch.relu(self.a(x)))
            result: Tensor = self.short(y) + self.up(torch.relu(self.down(y)))
            return result

    net = Strided().eval()
    graph = trace(net, X)
    assert len(graph.blocks) == 2
    table = measured_table(graph, load_device("null"), Silent())
    dropped = {name for cut in calibration_cuts(cost_model(graph, table)) for name in cut.dropped}
    assert dropped == {"b"}


def test_a_unit_takes_its_median_share_over_the_processes(cache: Path) -> None:
    told = [UnitTimes(unit_us={"a": us, "b": 4.0}, total_us=us + 6.0) for us in (4.0, 14.0, 24.0)]
    assert _node_ratios([told[0], None, *told[1:]], 2.0) == {"a": 1.4, "b": 0.4}
    assert _node_ratios([None, None], 2.0) == {}


class Small(nn.Module):
    """A stem and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


X = (torch.zeros(1, 3, 16, 16),)
SMALL = Small().eval()


@pytest.fixture(scope="module")
def kernels_of_small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a table of the null device holds once the kernels of `SMALL` are measured, and no network is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        measured_table(trace(SMALL, X), load_device("null"), Silent())
        return table_path(load_device("null"), "fp32").read_text()


@pytest.fixture
def cache(kernels_of_small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for tables, with that one in it."""
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    path = table_path(load_device("null"), "fp32")
    path.parent.mkdir(parents=True)
    path.write_text(kernels_of_small)
    return tmp_path


def calibrated(graph: ModelGraph, device: Device, table: LatencyTable, **options: Any) -> LatencyTable:
    source = Source(model=SMALL, graph=graph, example_inputs=X)
    return with_networks(table, cost_model(graph, table), source, device, **options)


def test_a_table_that_holds_the_networks_is_not_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null, graph = load_device("null"), trace(SMALL, X)
    told: list[tuple[int, int]] = []
    table = calibrated(graph, null, measured_table(graph, null, Silent()), on_network=lambda *at: told.append(at))
    distinct = {tuple(sorted(network.kernels.items())) for network in table.networks}
    assert len(table.networks) == len(distinct) == told[-1][1] <= 1 + len(KINDS)
    size = table_path(null, "fp32").stat().st_size

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a device was opened")

    monkeypatch.setattr(calibration_module, "Profiler", opened)
    again = read_table(table_path(null, "fp32"))
    assert again.networks == table.networks
    assert calibrated(graph, null, again) is again
    assert table_path(null, "fp32").stat().st_size == size
    assert cost_model(graph, again).predict({}) == cost_model(graph, table).predict({})


def test_on_the_null_device_a_network_is_its_formula(cache: Path) -> None:
    """The lines hold `context` times the sum of the kernels and `network_us`, as ratios; the cost model learns both."""
    null, graph = load_device("null"), trace(SMALL, X)
    table = calibrated(graph, null, measured_table(graph, null, Silent()))
    model = cost_model(graph, table)
    reference_us = table.references_us["compute"]
    for network in table.networks:
        assert network.structure == graph.structure_hash and network.origin == "modelled"
        assert list(network.kernels) == [unit.name for unit in model.units]
        expected = NULL.context * sum(time_us(kernel) for kernel in network.kernels.values()) + NULL.network_us
        assert network.ratio * reference_us == pytest.approx(expected, rel=1e-3)
        assert network.ratio_ci[0] <= network.ratio <= network.ratio_ci[1]
    assert (model.networks, model.correction.networks) == (len(table.networks), len(table.networks))
    unseen = {group: options[1] for group, options in model.options.items()}
    kernels = [unit.kernel({**graph.dense_widths, **unseen}) for unit in model.units]
    expected = NULL.context * sum(map(time_us, kernels)) + NULL.network_us
    found = model.predict(unseen)
    assert found.us == pytest.approx(expected, rel=0.03)
    assert abs(found.us - expected) < found.error_us < 0.1 * expected


def test_networks_go_to_the_file_that_is_named_and_only_missing_ones_are_measured(cache: Path) -> None:
    null, graph = load_device("null"), trace(SMALL, X)
    table = calibrated(graph, null, measured_table(graph, null, Silent()))
    whole, path = table_path(null, "fp32"), cache / "mine.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    networks = [line for line in lines if line.startswith('{"type":"network"')]
    assert len(networks) == len(table.networks) > 3
    path.write_text("".join(line for line in lines if line not in networks[:2]))
    part = read_table(path)
    assert len(part.networks) == len(table.networks) - 2
    told: list[tuple[int, int]] = []
    found = calibrated(graph, null, part, path=path, on_network=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]
    assert {tuple(n.kernels.items()) for n in found.networks} == {tuple(n.kernels.items()) for n in table.networks}
    assert len(read_lines([path]).networks) == len(table.networks)
    assert whole.read_text() == "".join(lines)


def test_a_table_of_another_device_that_was_asked_for_is_corrected_by_networks_of_this_one(cache: Path) -> None:
    """Kernels were measured on a noisy device of the same name; its networks are ratios, which carry over."""
    noisy = Device(name="other", backend="null", options={"noise": 0.001})
    here, graph = Device(name="other", backend="null"), trace(SMALL, X)
    theirs = measured_table(graph, noisy, Silent())
    table = measured_table(graph, here, Silent(), allow_other=True)
    assert table.fingerprint == theirs.fingerprint and any("not this device" in w for w in table.warnings)
    found = calibrated(graph, here, table)
    assert found.entries.keys() == theirs.entries.keys()
    assert len(found.networks) > 3
    model = cost_model(graph, found)
    assert model.correction.networks == len(found.networks)
    expected = NULL.context * sum(time_us(unit.dense) for unit in model.units) + NULL.network_us
    assert model.predict({}).us == pytest.approx(expected, rel=0.05)


def spoil_rounds(monkeypatch: pytest.MonkeyPatch, share: float) -> list[int]:
    """Every whole-network run has a reference that jumps in a share of its rounds; gives the seeds of the runs."""
    real, seeds = Session.measure, list[int]()

    def measure(self: Session, candidates: list[str], *arguments: Any, **options: Any) -> Measurement:
        answer = real(self, candidates, *arguments, **options)
        if not candidates[0].startswith("network"):
            return answer
        seeds.append(options["seed"])
        times = {key: [list(burst) for burst in bursts] for key, bursts in answer.times_us.items()}
        for number in range(round(share * len(times["compute"]))):
            times["compute"][number] = [value * 3 ** (1 + number % 5) for value in times["compute"][number]]
        return Measurement(times_us=times, rounds=answer.rounds, references=answer.references, anchors=answer.anchors)

    monkeypatch.setattr(Session, "measure", measure)
    return seeds


def test_references_that_keep_changing_are_measured_twice_and_then_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    null, graph = load_device("null"), trace(SMALL, X)
    table = measured_table(graph, null, Silent())
    seeds = spoil_rounds(monkeypatch, 0.9)
    with pytest.raises(UnstableError, match="reference kernels kept changing"):
        calibrated(graph, null, table)
    assert seeds == [0, 1]
    assert read_lines([table_path(null, "fp32")]).networks == ()


def test_ctrl_c_leaves_the_kernels_and_no_half_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null, graph = load_device("null"), trace(SMALL, X)
    table = measured_table(graph, null, Silent())

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "measure", interrupt)
    with pytest.raises(Interrupted, match="the kernels are saved"):
        calibrated(graph, null, table)
    kept = read_table(table_path(null, "fp32"))
    assert kept.entries.keys() == table.entries.keys() and kept.networks == () and kept.warnings == ()


def test_one_that_waited_measures_no_network_that_the_other_did(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process ends while we wait for its lock; here it runs just before we get it."""
    null, graph = load_device("null"), trace(SMALL, X)
    kernels = measured_table(graph, null, Silent())

    def after_the_other(path: Path, *, wait_s: float) -> Any:
        monkeypatch.setattr(calibration_module, "open_log", open_log)
        calibrated(graph, null, kernels)
        monkeypatch.setattr(calibration_module, "Profiler", None)  # would fail if a device were opened
        return open_log(path, wait_s=wait_s)

    monkeypatch.setattr(calibration_module, "open_log", after_the_other)
    found = calibrated(graph, null, kernels, wait_s=60.0)
    assert found.entries == kernels.entries
    assert found.networks == read_table(table_path(null, "fp32")).networks
    assert len(found.networks) == len(read_lines([table_path(null, "fp32")]).networks) > 3
