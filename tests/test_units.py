"""Which widths are offered and which kernels are measured for them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
import torch
from torch import nn

from edgeprune.fusion import fuse
from edgeprune.graph import ModelGraph, Width, trace
from edgeprune.kernel import Kernel
from edgeprune.kernel_sizes import Product
from edgeprune.unit import Unit
from edgeprune.units import LEAST_SHARE, MOST_OPTIONS, SAMPLE_RATIO, least_width, samples, shape_key, width_options

pytestmark = pytest.mark.unit


def network(*widths: int) -> tuple[ModelGraph, tuple[Unit, ...]]:
    """A chain of 3x3 convolutions of the given widths, a depthwise one among them, and a linear."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    layers += [nn.Conv2d(before, before, 3, padding=1, groups=before), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    graph = trace(nn.Sequential(*layers, nn.Linear(before, 10)), (torch.zeros(1, 3, 8, 8),))
    return graph, fuse(graph, "fp32", activations=frozenset({"relu"}), adds=True)


@pytest.mark.parametrize("channels", [2, 7, 8, 24, 64, 100, 512])
@pytest.mark.parametrize("step", [8, 32])
def test_options_end_dense_and_start_at_an_eighth(channels: int, step: int) -> None:
    graph, units = network(channels)
    (options,) = width_options(graph, units, {"conv": step, "depthwise": 8, "linear": 8}).values()
    assert options[-1] == channels
    assert list(options) == sorted(set(options))
    assert len(options) <= MOST_OPTIONS
    assert options[0] >= ceil(channels / 8)
    if channels >= 3 * step:
        assert all(option % step == 0 for option in options[:-1])
        assert len(options) > 2


def test_a_group_takes_the_coarsest_step_of_the_kernels_it_touches() -> None:
    graph, units = network(64)
    assert width_options(graph, units, {"conv": 16, "depthwise": 8}) == {graph.groups[0].id: (16, 32, 48, 64)}


def test_a_channel_that_counts_four_times_needs_a_quarter_of_the_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 4, 10))
    graph = trace(model, (torch.zeros(1, 3, 2, 2),))
    units = fuse(graph, "fp32", activations=frozenset(), adds=True)
    (options,) = width_options(graph, units, {"conv": 4, "linear": 16}).values()
    assert options == (4, 8, 12, 16)


def test_samples_span_least_to_dense_of_every_unit() -> None:
    """The corners of the range; inside of it the first grid is coarse, and `sampling` adds what is needed."""
    graph, units = network(32, 64)
    options = width_options(graph, units, {})
    found = samples(units, options)
    least = {name: least_width(widths) for name, widths in options.items()}
    assert list(least.values()) == [32 * LEAST_SHARE, 64 * LEAST_SHARE]
    for unit in units:
        surface = found[shape_key(unit.dense)]
        axes = [sorted({kernel.sizes[axis] for kernel in surface}) for axis in range(3)]
        for sizes in (unit.dense.sizes, unit.kernel(least).sizes):
            assert all(axis[0] <= size <= axis[-1] for axis, size in zip(axes, sizes, strict=True))
        same = [other for other in units if shape_key(other.dense) == shape_key(unit.dense)]
        for axis, axis_sizes in enumerate(axes):
            assert axis_sizes[-1] == max(other.dense.sizes[axis] for other in same)
            assert axis_sizes[0] == min(other.kernel(least).sizes[axis] for other in same)
            most = SAMPLE_RATIO**1.5 * 1.05
            assert all(b / a <= most for a, b in pairwise(axis_sizes)), "neighbours are about a factor of 3 apart"


def test_a_contraction_is_sampled_on_a_grid_and_a_depthwise_one_on_a_line() -> None:
    graph, units = network(32, 64)
    options = width_options(graph, units, {})
    found = samples(units, options)
    pairs = {unit.name: {(k.c_in, k.c_out) for k in found[shape_key(unit.dense)]} for unit in units}
    ins, outs = ({p[i] for p in pairs["2"]} for i in (0, 1))
    assert pairs["2"] == {(i, o) for i in ins for o in outs}
    assert all(c_in == c_out for c_in, c_out in pairs["4"])
    assert all(k.groups == k.c_in for k in found[shape_key(units[2].dense)])


def test_units_of_one_shape_share_a_surface() -> None:
    _, units = network(16, 16, 32)
    first, second, third, *_ = units
    assert shape_key(first.dense) == shape_key(second.dense) == shape_key(third.dense)
    assert shape_key(first.dense) != shape_key(units[3].dense)


def attention() -> Unit:
    """12 heads of 64: heads, query width and value width are groups of their own."""
    heads, query, value = (Width(terms=(((name,), 1),)) for name in ("heads", "query", "value"))
    return Unit(
        name="attention",
        dense=Kernel(operator="attention", c_in=768, c_out=768, groups=12, spatial=(49, 49)),
        c_in=Product((heads, query)),
        c_out=Product((heads, value)),
        nodes=frozenset({"attention"}),
        kernel_groups=heads,
    )


def test_attention_is_sampled_over_heads_and_both_of_their_widths() -> None:
    options = {"heads": tuple(range(2, 13)), "query": (8, 16, 32, 64), "value": (32, 64)}
    (found,) = samples([attention()], options).values()
    sizes = {kernel.sizes for kernel in found}
    axes = [{point[axis] for point in sizes} for axis in range(3)]
    assert axes[0] >= {2, 12}
    assert axes[1:] == [{8, 16, 64}, {8, 32, 64}], "an eighth of the value width too, though it is not offered"
    assert len(sizes) == len(axes[0]) * 3 * 3 < 60


def test_steps_count_within_a_head() -> None:
    """Heads can go one by one; what is left of each is a multiple of the step."""
    graph, _ = network(64)
    sizes = {"heads": 12, "query": 64, "value": 64}
    graph = replace(graph, groups=tuple(replace(graph.groups[0], id=n, num_channels=s) for n, s in sizes.items()))
    options = width_options(graph, [attention()], {"attention": 16})
    assert options["query"] == options["value"] == (16, 32, 48, 64)
    assert options["heads"] == tuple(range(2, 13))
