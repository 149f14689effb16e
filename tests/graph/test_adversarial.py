"""Code that is legal but unusual: what it computes is kept, or it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import RefusedError, SurgeryError
from edgeprune.graph import trace
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply, positions_of
from tests.graph.trap import IMAGE, Net, conv
from tests.reference import difference, masked_output, outputs_of, redraw

pytestmark = pytest.mark.unit


def two(function: Any, **more: Any) -> nn.Module:
    attributes = {"a": conv(3, 8), "b": conv(8, 4), **more}
    return redraw(Net(function, attributes).double(), 0)


DOUBLE = (IMAGE[0].double(),)


@pytest.mark.parametrize("make", [torch.full, IMAGE[0].new_full])
def test_a_fill_value_is_a_number_to_compute_with(make: Any) -> None:
    def forward(net: Any, x: Tensor) -> Any:
        y = net.a(x)
        return net.b(y / make((1,), y.shape[1]))

    with pytest.raises(RefusedError, match="can be pruned"):
        trace(two(forward), DOUBLE)


def by_constant(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(y * torch.tensor(int(y.shape[1])))


def by_argument(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(y.flip(2 if int(y.shape[1]) & 1 else 3))


def by_parameter(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(y) * net.scales[int(y.shape[1]) % 2]


@pytest.mark.parametrize("forward", [by_constant, by_argument, by_parameter])
def test_a_size_that_python_loses_sight_of_shows_after_the_cut(forward: Any) -> None:
    scales = nn.ParameterList([torch.ones(4, 1, 1), torch.zeros(4, 1, 1)])
    model = two(forward, scales=scales)
    graph = trace(model, DOUBLE)
    (group,) = graph.groups
    kept = positions_of(graph, group.id, torch.arange(3).numpy())
    with pytest.raises(SurgeryError):
        apply(Plan(structure_hash=graph.structure_hash, kept={group.id: kept}, dropped=()), model, DOUBLE, graph=graph)


class Twice(nn.Module):
    """Holds its block under two names and in a plain list."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.block = nn.Sequential(conv(8, 6), nn.ReLU(), conv(6, 8))
        self.registered = nn.ModuleList([self.block])
        self.plain = [self.block]
        self.head = conv(8, 2)
        self.which = which

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(x + getattr(self, self.which)[0](x))


@pytest.mark.parametrize("which", ["registered", "plain"])
def test_a_dropped_block_is_gone_under_all_names(which: str) -> None:
    model = redraw(Twice(which).double(), 0)
    graph = trace(model, DOUBLE)
    plan = Plan(structure_hash=graph.structure_hash, kept={}, dropped=tuple(block.id for block in graph.blocks))
    assert plan.dropped
    expected = masked_output(graph, plan, model, DOUBLE)
    (got,) = outputs_of(apply(plan, model, DOUBLE, graph=graph).module, DOUBLE)
    assert difference(got, expected) <= 1e-9


@dataclass
class Answer:
    features: Tensor


def test_tensors_inside_unknown_outputs_are_no_way_around() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        y = net.a(x)
        return net.b(y), Answer(y)

    with pytest.raises(RefusedError, match="Answer"):
        trace(two(forward), DOUBLE)


@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (2, 1, 4, 4)])
def test_positions_that_stretch_are_refused(shape: tuple[int, ...]) -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.b(torch.take_along_dim(net.a(x), torch.zeros(shape, dtype=torch.int64), 2))

    with pytest.raises(RefusedError, match="can be pruned"):
        trace(two(forward), DOUBLE)


def test_a_kept_result_does_not_hinder_the_copy() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        net.last = net.a(x)
        return net.b(net.last)

    model = two(forward)
    model(*DOUBLE)
    graph = trace(model, DOUBLE)
    plan = Plan(structure_hash=graph.structure_hash, kept={}, dropped=())
    apply(plan, model, DOUBLE, graph=graph)


def energy(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(y), y.pow(2).mean(1)


def gate(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(y) * (y * y).mean(1, keepdim=True)


@pytest.mark.parametrize("forward", [energy, gate])
def test_a_mean_of_squares_that_normalises_nothing_is_refused(forward: Any) -> None:
    with pytest.raises(RefusedError, match="can be pruned"):
        trace(two(forward), DOUBLE)


def test_products_that_no_step_makes_equal_come_to_an_end() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.d(net.norm(net.c(net.b(net.a(x)))))

    layers = {"a": conv(3, 12), "b": conv(12, 24, groups=4), "c": conv(24, 12, groups=4), "d": conv(12, 2)}
    trace(two(forward, norm=nn.GroupNorm(4, 12), **layers), DOUBLE)
