"""The cost model: exact where its surfaces can be, corrected by the networks in the table, honest about its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import hypot

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeprune.backends.null import partition
from edgeprune.backends.null.staircase import time_us
from edgeprune.correction import PRIOR, TOTAL_NOISE
from edgeprune.cost import INTERVAL, CostModel, cost_model, cost_model_from, describe
from edgeprune.errors import TableError
from edgeprune.graph import trace
from edgeprune.kernel import Kernel
from edgeprune.staircase import Staircase, Stairs, find_staircase, staircase_kernels
from edgeprune.table import Entry, LatencyTable, NetworkEntry
from edgeprune.table_lines import SessionLine
from edgeprune.units import kernels_at, shape_key, width_options

pytestmark = pytest.mark.unit


class Net(nn.Module):
    """A stem, one residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        result: Tensor = self.head((x + self.b(torch.relu(self.a(x)))).mean((2, 3)))
        return result


def smooth_us(kernel: Kernel) -> float:
    """A time that grows with what is read, written and multiplied: a surface's mean can be it exactly."""
    groups, c_in, c_out = kernel.sizes
    return 2.0 + groups * (0.02 * c_in + 0.03 * c_out + 0.001 * c_in * c_out)


def model_of(
    net: nn.Module,
    *,
    us: Callable[[Kernel], float] = smooth_us,
    missing: frozenset[Kernel] = frozenset(),
    networks: Sequence[NetworkEntry] = (),
    also: Mapping[Kernel, float] | None = None,
    stairs: Staircase | None = None,
) -> CostModel:
    graph = trace(net, (torch.zeros(1, 3, 8, 8),))
    units = partition(graph, "fp32")
    options = width_options(graph, units, {})
    table = {kernel: us(kernel) for kernel in kernels_at(units, options) if kernel not in missing} | dict(also or {})
    return cost_model_from(graph, units, options, table, origin="modelled", networks=networks, stairs=stairs)


def least_of(model: CostModel) -> dict[str, int]:
    return {group: options[0] for group, options in model.options.items()}


def middle_of(model: CostModel) -> dict[str, int]:
    return {group: options[len(options) // 2] for group, options in model.options.items()}


def test_the_dense_prediction_is_the_sum_of_the_kernels() -> None:
    model = model_of(Net())
    prediction = model.predict({})
    assert prediction.us == pytest.approx(sum(smooth_us(unit.dense) for unit in model.units), rel=1e-6)
    assert prediction.error_us > INTERVAL * PRIOR["all"] * prediction.us, "no network was measured: far from sure"
    assert model.relative_error == prediction.error_us / prediction.us
    assert (model.networks, model.correction.networks, model.overhead_us) == (0, 0, 0.0)


def test_any_widths_are_predicted_exactly_where_the_surface_can_be_the_function() -> None:
    """Measured or in between, on the offered widths or off them."""
    model = model_of(Net())
    odd = {group: options[-1] - 3 for group, options in model.options.items()}
    for widths in (least_of(model), middle_of(model), odd):
        expected = sum(smooth_us(unit.kernel({**model.graph.dense_widths, **widths})) for unit in model.units)
        assert model.predict(widths).us == pytest.approx(expected, rel=1e-6)


class Grouped(nn.Module):
    """A stem, and a convolution in four groups of eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 5, padding=2, groups=4)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.a(torch.relu(self.stem(x)))).mean((2, 3)))
        return result


def test_a_grouped_convolution_cut_to_one_group_is_an_ordinary_kernel_and_predicted() -> None:
    model = model_of(Grouped())
    grouped = next(unit for unit in model.units if unit.dense.groups == 4)
    least = {**model.graph.dense_widths, **least_of(model)}
    assert grouped.kernel(least).groups == 1 and shape_key(grouped.kernel(least)) not in model.surfaces
    assert model.predict(least).us == pytest.approx(sum(smooth_us(u.kernel(least)) for u in model.units), rel=1e-6)


def test_a_staircase_is_predicted_exactly_once_its_steps_are_known() -> None:
    """Wide enough for its arithmetic to count more than its traffic: where the null device's roofline has no bend."""
    stairs = Staircase(families={"conv": Stairs(c_in=8, c_out=16), "pointwise": Stairs(c_out=8, ragged_out=0.25)})

    def us(kernel: Kernel) -> float:
        worked, ragged = stairs.worked_on(kernel, kernel.sizes)
        sizes = tuple(int(size) for size in worked[0])
        return smooth_us(kernel.resized((sizes[0], sizes[1], sizes[2]))) * float(ragged[0])

    model = model_of(Net(), us=us, stairs=stairs)
    for widths in (least_of(model), {"a.bias:0": 37, "a.weight:1": 27}):
        kept = {**model.graph.dense_widths, **widths}
        assert model.predict(widths).us == pytest.approx(sum(us(unit.kernel(kept)) for unit in model.units), rel=1e-6)


def test_the_null_devices_own_staircase_is_predicted_within_three_percent() -> None:
    """Its roofline bends where traffic overtakes arithmetic, which no surface holds exactly: nor is it to."""
    stairs = find_staircase({kernel: time_us(kernel) for kernel in staircase_kernels("fp32")}, "fp32")
    model = model_of(Net(), us=time_us, stairs=stairs)
    for widths in ({}, least_of(model), middle_of(model)):
        kept = {**model.graph.dense_widths, **widths}
        assert model.predict(widths).us == pytest.approx(sum(time_us(u.kernel(kept)) for u in model.units), rel=0.03)


def test_a_dropped_block_takes_its_units_along() -> None:
    model = model_of(Net())
    (block,) = model.graph.blocks
    assert model.vanishing([block.id]) == {"a", "b"}
    gone = sum(smooth_us(unit.dense) for unit in model.units if unit.name in ("a", "b"))
    assert model.predict({}).us - model.predict({}, [block.id]).us == pytest.approx(gone, rel=1e-6)


def test_units_sum_to_the_prediction_so_that_cost_tables_are_exact() -> None:
    """Also with an overhead: what grows with the units is theirs, what is constant is not."""
    model = taught(lambda name: 1.2, overhead_us=3.0)
    for widths in ({}, least_of(model), middle_of(model)):
        kept = {**model.graph.dense_widths, **widths}
        cold = model.cold(widths)
        units = sum(float(model.unit_us(unit, [kept], cold)[0]) for unit in model.units)
        assert units + model.overhead_us == pytest.approx(model.predict(widths).us, rel=1e-9)


def sampled(model: CostModel, name: str) -> list[Kernel]:
    """The kernels of the first grid that belong to a unit, ascending in their widths."""
    unit = next(unit for unit in model.units if unit.name == name)
    key = shape_key(unit.dense)
    return sorted((k for k in kernels_at(model.units, model.options) if shape_key(k) == key), key=lambda k: k.sizes)


def test_a_kernel_that_could_not_be_measured_narrows_its_surface() -> None:
    whole = model_of(Net())
    corner, *_ = sampled(whole, "a")
    least = {"a.weight:1": corner.c_in, "a.bias:0": corner.c_out}
    whole.predict(least)
    model = model_of(Net(), missing=frozenset({corner}))
    assert model.predict({}).us == pytest.approx(whole.predict({}).us)
    with pytest.raises(TableError, match="outside the measured"):
        model.predict(least)
    model.predict(least_of(model))


def test_kernels_that_could_not_be_measured_take_widths_off_the_offer() -> None:
    whole = model_of(Net())
    failed = frozenset(kernel for kernel in sampled(whole, "a") if kernel.c_out < 16)
    model = model_of(Net(), missing=failed)
    assert whole.options == {"a.bias:0": (8, 16, 24, 32, 40, 48), "a.weight:1": (8, 16, 24, 32)}
    assert model.options == {"a.bias:0": (16, 24, 32, 40, 48), "a.weight:1": (8, 16, 24, 32)}
    with pytest.raises(TableError, match="outside the measured"):
        model.predict(least_of(whole))
    model.predict(least_of(model))


def test_with_a_corner_gone_the_range_is_smaller_though_what_lies_beyond_still_teaches() -> None:
    whole = model_of(Net())
    unit = next(unit for unit in whole.units if unit.name == "head")
    (low, *_) = sorted({kernel.c_in for kernel in kernels_at([unit], whole.options)})
    assert whole.surfaces[shape_key(unit.dense)].low[1] == low
    narrow = model_of(Net(), missing=frozenset({unit.dense.resized((1, low, 10))}))
    surface = narrow.surfaces[shape_key(unit.dense)]
    assert surface.low[1] > low
    assert not surface.covers([(1, low, 10)])


def test_a_kernel_that_failed_at_full_width_is_named() -> None:
    unit = next(unit for unit in model_of(Net()).units if unit.name == "head")
    with pytest.raises(TableError, match=r"head \(linear 32>10.* could not be measured at its full width"):
        model_of(Net(), missing=frozenset({unit.dense}))


def test_a_unit_without_any_kernel_is_named() -> None:
    net = Net()
    graph = trace(net, (torch.zeros(1, 3, 8, 8),))
    units = partition(graph, "fp32")
    with pytest.raises(TableError, match=r"no measured kernel for stem \(conv 3>.*profile the model on this device"):
        cost_model_from(graph, units, width_options(graph, units, {}), {}, origin="modelled")


def network_entry(
    model: CostModel,
    widths: Mapping[str, int],
    factor: Callable[[str], float],
    *,
    overhead_us: float = 0.0,
    told: bool = True,
    structure: str | None = None,
) -> NetworkEntry:
    """A network whose units take `factor` times what the table says, over a reference that takes 1 us."""
    kernels = {unit.name: unit.kernel({**model.graph.dense_widths, **widths}) for unit in model.units}
    us = {name: factor(name) * smooth_us(kernel) for name, kernel in kernels.items()}
    total = overhead_us + sum(us.values())
    return NetworkEntry(
        structure=structure or model.graph.structure_hash,
        kernels=kernels,
        nodes=us if told else {},
        reference="compute",
        ratio=total,
        ratio_ci=(0.99 * total, 1.01 * total),
        origin="modelled",
    )


def taught(
    factor: Callable[[str], float], *, overhead_us: float = 0.0, told: bool = True, structure: str | None = None
) -> CostModel:
    """The cost model with six networks in its table."""
    model = model_of(Net())
    rng = np.random.default_rng(0)
    choices = [{}, least_of(model), middle_of(model)]
    choices += [{g: int(rng.choice(options)) for g, options in model.options.items()} for _ in range(3)]
    networks = [
        network_entry(model, widths, factor, overhead_us=overhead_us, told=told, structure=structure)
        for widths in choices
    ]
    return model_of(Net(), networks=networks)


UNSEEN = {"a.bias:0": 24, "a.weight:1": 16}


@pytest.mark.parametrize("told", [True, False], ids=["node times", "totals only"])
def test_networks_in_the_table_teach_one_factor(told: bool) -> None:
    model = taught(lambda _: 1.3, told=told)
    assert (model.networks, model.correction.networks) == (6, 6)
    kept = {**model.graph.dense_widths, **UNSEEN}
    expected = 1.3 * sum(smooth_us(unit.kernel(kept)) for unit in model.units)
    found = model.predict(UNSEEN)
    assert found.us == pytest.approx(expected, rel=0.01)
    assert found.error_us < 0.05 * found.us
    assert found.error_us > INTERVAL * TOTAL_NOISE * found.us * 0.5, "a measurement does not repeat exactly"


def test_networks_teach_factors_of_families_and_an_overhead() -> None:
    factors = {"stem": 0.8, "a": 1.25, "b": 1.25, "mean": 0.9, "head": 1.2}
    model = taught(factors.__getitem__, overhead_us=1.0)
    kept = {**model.graph.dense_widths, **UNSEEN}
    expected = 1.0 + sum(factors[unit.name] * smooth_us(unit.kernel(kept)) for unit in model.units)
    assert model.predict(UNSEEN).us == pytest.approx(expected, rel=0.01)


def test_networks_of_another_structure_teach_too_but_leave_more_doubt() -> None:
    own, foreign, none = taught(lambda _: 1.3), taught(lambda _: 1.3, structure="f" * 64), model_of(Net())
    assert (foreign.networks, foreign.correction.networks) == (0, 6)
    truth = 1.3 * sum(smooth_us(unit.dense) for unit in own.units)
    by_others, by_none = (abs(truth - model.predict({}).us) for model in (foreign, none))
    assert by_others < by_none / 2, "some of it may be that one structure's own"
    assert own.relative_error < foreign.relative_error < none.relative_error


def test_a_network_with_kernels_that_the_table_lacks_teaches_nothing() -> None:
    model = model_of(Net())
    entry = network_entry(model, {}, lambda _: 1.3, structure="f" * 64)
    strange = Kernel(operator="linear", c_in=7, c_out=7, spatial=(3,))
    with_it = replace(entry, kernels={**entry.kernels, "x": strange})
    assert model_of(Net(), networks=[with_it]).correction.networks == 0
    known = {strange: 1.0}
    assert model_of(Net(), networks=[with_it], also=known).correction.networks == 1, "measured: it does"
    wider = replace(entry, kernels={**entry.kernels, "x": replace(strange, c_in=70)})
    assert model_of(Net(), networks=[wider], also=known).correction.networks == 0, "nothing is extrapolated"


@settings(max_examples=15, deadline=None)
@given(share_a=st.floats(0.2, 1.0), share_b=st.floats(0.2, 1.0))
def test_wherever_it_may_be_asked_the_interval_is_finite_and_not_empty(share_a: float, share_b: float) -> None:
    model = CORRECTED
    shares = dict(zip(model.options, (share_a, share_b), strict=True))
    widths = {g: max(options[0], round(shares[g] * options[-1])) for g, options in model.options.items()}
    found = model.predict(widths)
    assert 0 < found.error_us < found.us < 2 * model.predict({}).us


CORRECTED = taught(lambda _: 1.1)

SESSION = SessionLine(
    id="s", fingerprint="a" * 12, started="", device="null", references={"compute": 50.0}, rounds=5, edgeprune="0.1.0"
)


def table_of(networks: Sequence[NetworkEntry]) -> LatencyTable:
    """A table of the null backend in which every ratio is a time over 50 us."""
    model = model_of(Net())
    known = {kernel: smooth_us(kernel) / 50.0 for kernel in kernels_at(model.units, model.options)}
    entries = {
        kernel: Entry(
            kernel=kernel,
            reference="compute",
            ratio=2 * ratio,
            ratio_ci=(2 * ratio, 2 * ratio),
            node_ratio=ratio,
            spread=0.0,
            n=20,
            rounds=5,
            disturbed=0,
            rows=1,
            origin="modelled",
        )
        for kernel, ratio in known.items()
    }
    return LatencyTable(
        fingerprint=SESSION.fingerprint,
        facts={"backend": "null", "precision": "fp32"},
        entries=entries,
        failures={},
        sessions=(SESSION,),
        networks=tuple(
            replace(n, ratio=n.ratio / 50, nodes={name: us / 50 for name, us in n.nodes.items()}) for n in networks
        ),
    )


def test_a_table_gives_the_same_cost_model_each_time_on_its_own_clock() -> None:
    plain = model_of(Net())
    choices = [{}, least_of(plain), middle_of(plain), UNSEEN, {"a.bias:0": 40}, {"a.weight:1": 24}]
    choices += [{"a.bias:0": 16}, {"a.weight:1": 12}, {"a.bias:0": 32, "a.weight:1": 24}]
    table = table_of([network_entry(plain, widths, lambda _: 1.2) for widths in choices])
    one, two = cost_model(plain.graph, table), cost_model(plain.graph, table)
    assert one.predict(UNSEEN) == two.predict(UNSEEN)
    assert one.correction.mean.tolist() == two.correction.mean.tolist()
    assert (one.networks, one.origin) == (len(choices), "modelled")
    assert one.predict({}).us == pytest.approx(1.2 * plain.predict({}).us, rel=0.01)
    slower = replace(table, sessions=(SESSION.model_copy(update={"references": {"compute": 100.0}}),))
    assert cost_model(plain.graph, slower).predict(UNSEEN).us == pytest.approx(2 * one.predict(UNSEEN).us, rel=0.01)


def test_node_times_are_known_to_three_tenths_of_a_microsecond_those_from_end_to_end_as_their_rounds_tell() -> None:
    """Runtimes count a node's time in whole microseconds: a kernel of 3 us is in doubt, one of 300 is not."""
    plain, table = model_of(Net()), table_of([])
    told = {k: replace(e, ratio_ci=(0.98 * e.ratio, 1.02 * e.ratio), rounds=2) for k, e in table.entries.items()}
    known = {kernel: replace(entry, origin="measured") for kernel, entry in told.items()}
    rounds_tell = 0.02 / 1.96
    for entries, coarse_us in (
        (known, 0.3),
        ({kernel: replace(entry, node_ratio=None) for kernel, entry in known.items()}, 0.0),
        (told, 0.0),  # modelled ones are exact
    ):
        own = replace(table, entries=entries)
        for key, surface in cost_model(plain.graph, own).surfaces.items():
            kernels = sorted((k for k in entries if shape_key(k) == key), key=lambda kernel: kernel.sizes)
            expected = [hypot(rounds_tell, coarse_us / own.latency_us(kernel, node=True)) for kernel in kernels]
            assert surface.doubt == pytest.approx(expected)


def test_a_network_over_a_reference_that_no_session_timed_is_an_error_not_a_microsecond() -> None:
    plain = model_of(Net())
    entry = replace(network_entry(plain, {}, lambda _: 1.0), reference="memory")
    with pytest.raises(TableError, match="no session of the table has timed the reference 'memory'"):
        cost_model(plain.graph, table_of([entry]))


def test_what_a_manifest_says() -> None:
    model = taught(lambda _: 1.0, overhead_us=2.0)
    assert describe(model) == {
        "origin": "modelled",
        "networks": 6,
        "taught_by": 6,
        "overhead_us": round(model.overhead_us, 2),
        "relative_error_90": round(model.relative_error, 4),
        "units": len(model.units),
    }
