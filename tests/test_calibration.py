"""Whose time an executed node is: by what the runtime says that went into it, else by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeprune.backends.null.staircase import time_us
from edgeprune.calibration import random_widths, unit_times
from edgeprune.cost import CostModel, NetworkTiming, calibrate, cost_model_from
from edgeprune.fusion import fuse
from edgeprune.graph import trace
from edgeprune.measurement import NodeTimes
from edgeprune.units import samples, width_options

pytestmark = pytest.mark.unit


class Net(nn.Module):
    """A linear, a norm, a copy and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(self.norm(x).transpose(1, 2))))
        return result


def model_of(net: nn.Module) -> CostModel:
    graph = trace(net, (torch.zeros(1, 6, 5, 8),))
    units = fuse(graph, "fp32", activations=frozenset({"relu"}), adds=True)
    options = width_options(graph, units, {})
    table = {kernel: time_us(kernel) for kernels in samples(units, options).values() for kernel in kernels}
    return cost_model_from(graph, units, options, table, origin="modelled")


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
        model.graph.dense_widths,
        nodes(("x", 20.0, ["a/WithoutBiases", "relu/0"]), ("mvn", 7.0, ["layer_norm/0"]), ("odd", 3.0, ["odd"])),
    )
    assert times is not None
    assert times.unit_us == {"a": 20.0, "layer_norm": 7.0, "transpose": 0.0, "b": 0.0}
    assert times.total_us == 100.0


def test_a_node_of_several_units_is_shared_by_their_tabled_times() -> None:
    model = model_of(Net())
    times = unit_times(model, model.graph.dense_widths, nodes(("x", 30.0, ["layer_norm/0", "transpose/0"])))
    assert times is not None
    tabled = {unit.name: float(model.unit_us(unit, [model.graph.dense_widths])[0]) for unit in model.units}
    assert times.unit_us["layer_norm"] + times.unit_us["transpose"] == pytest.approx(30.0)
    ratio = times.unit_us["layer_norm"] / times.unit_us["transpose"]
    assert ratio == pytest.approx(tabled["layer_norm"] / tabled["transpose"])


def test_by_name_where_the_runtime_does_not_tell() -> None:
    model = model_of(Net())
    times = unit_times(model, model.graph.dense_widths, nodes(("a", 20.0, None), ("Reshape_7", 1.0, None)))
    assert times is not None
    assert times.unit_us == {"a": 20.0}


def test_nodes_that_sum_to_more_than_the_run_are_scaled_to_it() -> None:
    model = model_of(Net())
    times = unit_times(model, model.graph.dense_widths, nodes(("a", 80.0, ["a"]), ("b", 60.0, ["b"])))
    assert times is not None
    assert times.total_us == 140.0


def test_a_copy_that_is_never_executed_costs_nothing_and_what_no_unit_covers_is_overhead() -> None:
    model = model_of(Net())
    timings = []
    for widths in (model.graph.dense_widths, *random_widths(model.options, 3, 0)):
        kept = {**model.graph.dense_widths, **widths}
        own = {unit.name: float(model.unit_us(unit, [kept])[0]) for unit in model.units} | {"transpose": 0.0}
        timings.append(NetworkTiming(widths=widths, total_us=5.0 + sum(own.values()), node_us=own))
    fitted = calibrate(model, timings)
    assert fitted.correction["transpose"] == 0.0
    assert fitted.overhead_us == pytest.approx(5.0)
    for timing in timings:
        assert fitted.predict(timing.widths).us == pytest.approx(timing.total_us, rel=1e-9)
