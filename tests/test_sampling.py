"""Which kernels are measured next: those whose uncertain time is largest in the network, each once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import ceil, cos, log2, prod, sin

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.backends.null import partition
from edgeprune.backends.null.staircase import time_us
from edgeprune.cost import CostModel, cost_model, cost_model_from
from edgeprune.device import load_device
from edgeprune.graph import trace
from edgeprune.kernel import Kernel
from edgeprune.preparing import Silent, measured_table
from edgeprune.sampling import GOAL, foreseen_rounds, interpolation_error, uncertain_kernels
from edgeprune.staircase import Staircase, find_staircase, staircase_kernels
from edgeprune.units import kernels_at, shape_key, width_options

pytestmark = pytest.mark.unit


class Net(nn.Module):
    """Two convolutions of one shape, one that takes far less, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1)
        self.c, self.d = nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 96, 1)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        result: Tensor = self.head(torch.relu(self.d(x)).mean((2, 3)))
        return result


def wavy_us(kernel: Kernel) -> float:
    """The null device's formula and a ripple of some percent that no staircase explains."""
    return time_us(kernel) * (1 + 0.05 * sin(3 * log2(kernel.c_in)) * cos(2 * log2(kernel.c_out)))


def model_of(also: Mapping[Kernel, float] | None = None) -> tuple[CostModel, dict[Kernel, float]]:
    """The cost model from the first grid and further kernels, with all that it was made from."""
    graph = trace(Net(), (torch.zeros(1, 3, 16, 16),))
    units = partition(graph, "fp32")
    table = {kernel: wavy_us(kernel) for kernel in staircase_kernels("fp32")}
    stairs = find_staircase(table, "fp32")
    options = width_options(graph, units, stairs.steps())
    table |= {kernel: wavy_us(kernel) for kernel in kernels_at(units, options)} | dict(also or {})
    return cost_model_from(graph, units, options, table, origin="modelled", stairs=stairs), table


def uncertain_us(cost: CostModel, kernel: Kernel) -> float:
    """Time of a kernel in all units of its shape times its relative error."""
    count = sum(shape_key(unit.dense) == shape_key(kernel) for unit in cost.units)
    surface = cost.surfaces[shape_key(kernel)]
    return count * float(surface.at([kernel.sizes])[0] * surface.error_at([kernel.sizes])[0])


def test_the_first_choice_is_the_kernel_with_the_largest_uncertain_time() -> None:
    cost, known = model_of()
    (first,) = uncertain_kernels(cost, known, count=1)
    every = uncertain_kernels(cost, known, count=1000)
    assert len(every) > 10
    assert uncertain_us(cost, first) == max(uncertain_us(cost, kernel) for kernel in every)
    assert first.family == "conv", "three of the units, and the largest, are convolutions of one shape"


def test_a_kernel_that_is_known_or_has_failed_is_never_chosen() -> None:
    cost, known = model_of()
    chosen = uncertain_kernels(cost, known, count=8)
    assert len(set(chosen)) == 8 and not set(chosen) & known.keys()
    failed = {chosen[0]: "no such operator"}
    again = uncertain_kernels(cost, {**known, **failed}, count=8)
    assert chosen[0] not in again and len(again) == 8


def test_every_choice_lies_on_offered_widths_or_multiples_of_8_inside_of_what_was_measured() -> None:
    cost, known = model_of()
    offered = set().union(*cost.options.values()) | {3, 10} | set(range(8, 257, 8))
    for kernel in uncertain_kernels(cost, known):
        assert cost.surfaces[shape_key(kernel)].covers([kernel.sizes])
        assert {kernel.c_in, kernel.c_out} <= offered


def test_where_there_is_a_grain_some_choices_are_rough() -> None:
    """Offered widths never are: a network off them would be told by the family's penalty alone."""
    plain, known = model_of()

    def rough(kernels: Iterable[Kernel]) -> list[Kernel]:
        return [kernel for kernel in kernels if kernel.c_in % 4 and kernel.c_in > 3]

    assert not rough(uncertain_kernels(plain, known, count=1000))
    stairs = {family: replace(own, grain_in=4) for family, own in plain.correction.stairs.families.items()}
    grained = replace(plain, correction=replace(plain.correction, stairs=Staircase(families=stairs)))
    found = uncertain_kernels(grained, known, count=1000)
    assert len(rough(found)) >= 3
    assert all(grained.surfaces[shape_key(kernel)].covers([kernel.sizes]) for kernel in found)


class Grouped(nn.Module):
    """A grouped convolution that may be cut to one channel a group, which is measured as a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=8)
        self.c = nn.Conv2d(64, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return result


def test_rounds_are_foreseen_where_a_grouped_convolution_is_measured_as_another_kernel() -> None:
    graph = trace(Grouped(), (torch.zeros(1, 3, 16, 16),))
    units = partition(graph, "fp32")
    known = {kernel: wavy_us(kernel) for kernel in staircase_kernels("fp32")}
    stairs = find_staircase(known, "fp32")
    options = dict.fromkeys(width_options(graph, units, stairs.steps()), (1, 2, 4, 8))
    known |= {kernel: wavy_us(kernel) for kernel in kernels_at(units, options)}
    cost = cost_model_from(graph, units, options, known, origin="modelled", stairs=stairs)
    first, *_ = foreseen_rounds(cost, known)
    assert any(shape_key(kernel) not in cost.surfaces for kernel in first)


def test_each_choice_counts_on_those_before_it() -> None:
    """Oracle: choose one, take it for measured, and so on; near a chosen kernel less is left to learn."""
    cost, known = model_of()
    surfaces, chosen = dict(cost.surfaces), list[Kernel]()
    candidates = sorted(uncertain_kernels(cost, known, count=1000))
    units = {key: sum(shape_key(unit.dense) == key for unit in cost.units) for key in surfaces}
    for _ in range(6):
        scores = []
        for kernel in candidates:
            surface = surfaces[shape_key(kernel)]
            sizes = [kernel.sizes]
            scores.append(units[shape_key(kernel)] * float(surface.at(sizes)[0] * surface.error_at(sizes)[0]))
        best = candidates.pop(int(np.argmax(scores)))
        surfaces[shape_key(best)] = surfaces[shape_key(best)].with_points([best.sizes])
        chosen.append(best)
    assert uncertain_kernels(cost, known, count=6) == tuple(sorted(chosen))
    alone = sorted(uncertain_kernels(cost, known, count=1000), key=lambda k: -uncertain_us(cost, k))[:6]
    assert set(chosen) != set(alone), "the six most uncertain ones lie side by side"


def test_the_same_table_asks_for_the_same_kernels() -> None:
    (one, known), (two, _) = model_of(), model_of()
    assert uncertain_kernels(one, known) == uncertain_kernels(two, known)
    assert interpolation_error(one) == interpolation_error(two)


def test_the_error_shrinks_with_what_is_measured_and_so_does_the_true_one() -> None:
    before, known = model_of()
    more = uncertain_kernels(before, known)
    after, _ = model_of({kernel: wavy_us(kernel) for kernel in more})
    assert interpolation_error(after) < 0.8 * interpolation_error(before)
    rng = np.random.default_rng(5)
    off = []
    for _ in range(30):
        widths = {group: int(rng.choice(options)) for group, options in before.options.items()}
        truth = sum(wavy_us(unit.kernel({**before.graph.dense_widths, **widths})) for unit in before.units)
        off.append([abs(cost.predict(widths).us / truth - 1) for cost in (before, after)])
    assert np.median(off, axis=0)[1] < 0.8 * np.median(off, axis=0)[0]
    assert np.median(off, axis=0)[1] < 0.005


def test_where_everything_was_measured_nothing_is_asked_for() -> None:
    cost, known = model_of()
    every = uncertain_kernels(cost, known, count=1000)
    assert uncertain_kernels(cost, {**known, **dict.fromkeys(every)}) == ()


@pytest.mark.integration
def test_on_the_null_device_sampling_ends_at_its_goal_far_from_the_full_grid() -> None:
    """The table is in the cache: asked again, nothing is measured."""
    graph, null = trace(Net(), (torch.zeros(1, 3, 16, 16),)), load_device("null")
    table = measured_table(graph, null, Silent())
    cost = cost_model(graph, table)
    assert interpolation_error(cost) <= GOAL
    own = [kernel for kernel in table.entries if shape_key(kernel) in cost.surfaces]
    grid = sum(prod(ceil(size / 8) for size in surface.high) for surface in cost.surfaces.values())
    assert len(own) < grid / 10
    assert dict(measured_table(graph, null, Silent()).entries) == dict(table.entries)
