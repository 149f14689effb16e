"""The cost model: exact where it can be, calibrated by whole networks, honest about its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.backends.null import partition
from edgeprune.backends.null.staircase import time_us
from edgeprune.cost import (
    LEAST_ERROR,
    SHRINKAGE,
    UNCALIBRATED_ERROR,
    CostModel,
    NetworkTiming,
    Surface,
    calibrate,
    cost_model_from,
    describe,
)
from edgeprune.errors import TableError
from edgeprune.graph import trace
from edgeprune.kernel import Kernel
from edgeprune.units import samples, width_options

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


def model_of(net: nn.Module, missing: frozenset[Kernel] = frozenset(), size: int = 8) -> CostModel:
    graph = trace(net, (torch.zeros(1, 3, size, size),))
    units = partition(graph, "fp32")
    options = width_options(graph, units, {})
    table = {k: time_us(k) for surface in samples(units, options).values() for k in surface if k not in missing}
    return cost_model_from(graph, units, options, table, origin="modelled")


def bilinear(c_in: float, c_out: float) -> float:
    return 3.0 + 0.5 * c_in + 0.25 * c_out + 0.01 * c_in * c_out


def test_a_surface_is_exact_on_bilinear_functions() -> None:
    ins, outs = (8, 16, 40), (4, 32)
    surface = Surface(sizes=((1,), ins, outs), us=np.array([[[bilinear(i, o) for o in outs] for i in ins]]))
    points = [(8, 4), (13, 7), (40, 32), (39, 5)]
    predicted = surface.at([(1, *point) for point in points])
    assert predicted == pytest.approx([bilinear(*point) for point in points], rel=1e-12)


def test_a_surface_over_heads_and_both_of_their_widths_is_exact_on_trilinear_functions() -> None:
    sizes = (1, 3, 12), (8, 64), (16, 64)
    us = np.array([[[h * bilinear(i, o) for o in sizes[2]] for i in sizes[1]] for h in sizes[0]])
    points = [(1, 8, 16), (2, 20, 30), (7, 64, 33), (12, 64, 64)]
    expected = [h * bilinear(i, o) for h, i, o in points]
    assert Surface(sizes=sizes, us=us).at(points) == pytest.approx(expected, rel=1e-12)


def test_a_line_and_a_point() -> None:
    line = Surface(sizes=((1,), (8, 16), (1,)), us=np.array([[[1.0], [3.0]]]))
    assert line.at([(1, 8, 1), (1, 12, 1), (1, 16, 1)]).tolist() == [1.0, 2.0, 3.0]
    point = Surface(sizes=((1,), (8,), (8,)), us=np.array([[[5.0]]]))
    assert point.at([(1, 8, 8), (1, 8, 8)]).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("point", [(7, 8), (17, 8), (8, 3), (8, 9)])
def test_outside_the_measured_range_raises(point: tuple[int, int]) -> None:
    surface = Surface(sizes=((1,), (8, 16), (4, 8)), us=np.ones((1, 2, 2)))
    with pytest.raises(TableError, match="outside the measured"):
        surface.at([(1, *point)])


def test_the_dense_prediction_is_the_sum_of_the_kernels() -> None:
    model = model_of(Net())
    prediction = model.predict({})
    assert prediction.us == pytest.approx(sum(time_us(unit.dense) for unit in model.units), rel=1e-12)
    assert prediction.error_us == pytest.approx(UNCALIBRATED_ERROR * prediction.us)


def test_sampled_widths_are_predicted_exactly() -> None:
    model = model_of(Net())
    widths = {group: options[0] for group, options in model.options.items()}
    assert model.predict(widths).us == pytest.approx(sum(time_us(u.kernel(widths)) for u in model.units), rel=1e-12)


def test_a_dropped_block_takes_its_units_along() -> None:
    model = model_of(Net())
    (block,) = model.graph.blocks
    assert model.vanishing([block.id]) == {"a", "b"}
    gone = sum(time_us(unit.dense) for unit in model.units if unit.name in ("a", "b"))
    assert model.predict({}).us - model.predict({}, [block.id]).us == pytest.approx(gone)


def test_a_kernel_that_could_not_be_measured_narrows_its_surface() -> None:
    whole = model_of(Net())
    unit = next(unit for unit in whole.units if unit.name == "a")
    least = {group: options[0] for group, options in whole.options.items()}
    model = model_of(Net(), missing=frozenset({unit.kernel(least)}))
    assert model.predict({}).us == pytest.approx(whole.predict({}).us)
    with pytest.raises(TableError, match="outside the measured"):
        model.predict(least)


def test_a_unit_without_any_kernel_is_named() -> None:
    net = Net()
    graph = trace(net, (torch.zeros(1, 3, 8, 8),))
    units = partition(graph, "fp32")
    with pytest.raises(TableError, match=r"no measured kernel for stem \(conv 3>.*profile the model on this device"):
        cost_model_from(graph, units, width_options(graph, units, {}), {}, origin="modelled")


def timing(model: CostModel, widths: Mapping[str, int], factors: Mapping[str, float], overhead: float) -> NetworkTiming:
    """A network whose units of a family take `factors[family]` times what the table says."""
    kept = {**model.graph.dense_widths, **widths}
    nodes = {unit.name: factors[unit.dense.family] * float(model.unit_us(unit, [kept])[0]) for unit in model.units}
    return NetworkTiming(widths=widths, total_us=overhead + sum(nodes.values()), node_us=nodes)


FACTORS = {"conv": 0.8, "pointwise": 1.25, "linear": 2.0, "mean": 0.5}


def networks(model: CostModel) -> list[dict[str, int]]:
    return [{}, {g: o[0] for g, o in model.options.items()}, {g: o[len(o) // 2] for g, o in model.options.items()}]


def test_calibration_recovers_known_factors_and_overhead() -> None:
    model = model_of(Net())
    fitted = calibrate(model, [timing(model, widths, FACTORS, 20.0) for widths in networks(model)])
    for unit in model.units:
        assert fitted.correction[unit.name] == pytest.approx(FACTORS[unit.dense.family], rel=1e-12)
    assert fitted.overhead_us == pytest.approx(20.0)
    assert fitted.relative_error == LEAST_ERROR, "nothing is left over, but a measurement does not repeat better"
    assert fitted.networks == 3
    unseen = {group: options[1] for group, options in model.options.items()}
    assert fitted.predict(unseen).us == pytest.approx(timing(model, unseen, FACTORS, 20.0).total_us, rel=1e-9)


def test_a_unit_of_its_own_kind_is_drawn_to_its_family() -> None:
    model = model_of(Net())
    exact = timing(model, {}, dict.fromkeys(FACTORS, 1.0), 0.0)
    odd = replace(exact, node_us={**exact.node_us, "a": 2.0 * exact.node_us["a"]})
    fitted = calibrate(model, [odd])
    centre = np.log(2.0) / 2  # the median of a and b, its family
    assert np.log(fitted.correction["a"]) == pytest.approx((SHRINKAGE * centre + np.log(2.0)) / (SHRINKAGE + 1))
    assert np.log(fitted.correction["b"]) == pytest.approx(SHRINKAGE * centre / (SHRINKAGE + 1))


def test_without_node_times_one_factor_is_fitted() -> None:
    model = model_of(Net())
    totals = [NetworkTiming(widths=w, total_us=1.3 * model.predict(w).us) for w in networks(model)]
    fitted = calibrate(model, totals)
    assert list(fitted.correction.values()) == pytest.approx([1.3] * len(model.units))
    assert fitted.predict({}).us == pytest.approx(totals[0].total_us)


def test_the_error_bar_leaves_each_network_out_in_turn() -> None:
    model = model_of(Net())
    first, second, third = (NetworkTiming(widths=w, total_us=model.predict(w).us) for w in networks(model))
    off = replace(second, total_us=1.2 * second.total_us)
    fitted = calibrate(model, [first, off, third])
    errors = [1.1 - 1, 1 / 1.2 - 1, 1.1 - 1]  # the median of the two others, over its own
    assert fitted.relative_error == pytest.approx(1.645 * np.sqrt(np.mean(np.square(errors))))


def test_one_network_is_too_few_for_an_error() -> None:
    model = model_of(Net())
    fitted = calibrate(model, [timing(model, {}, FACTORS, 5.0)])
    assert fitted.relative_error == pytest.approx(1.645 * UNCALIBRATED_ERROR / 3)
    assert describe(fitted) == {
        "origin": "modelled",
        "networks": 1,
        "overhead_us": 5.0,
        "relative_error_90": round(fitted.relative_error, 4),
        "units": len(model.units),
    }
