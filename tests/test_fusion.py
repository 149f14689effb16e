"""What fuses into what, per capability of the runtime, and the kernels at given widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeprune.fusion import Unit, fuse
from edgeprune.graph import ModelGraph, analyse, tracing

pytestmark = pytest.mark.unit

ALL = frozenset({"relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu"})


class Net(nn.Module):
    """conv-norm-silu, depthwise, gate, residual add with relu, pool, mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.a, self.depthwise = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gate = nn.Conv2d(12, 12, 1)
        self.b, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(torch.relu(self.a(x)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        x = torch.relu(x + self.b(y))
        x = torch.max_pool2d(x, 2)
        result: Tensor = self.head(self.dropout(x.mean((2, 3))))
        return result


def graph_of(model: nn.Module, *shape: int) -> ModelGraph:
    return analyse(tracing.trace_program(model, (torch.zeros(*shape),)))


def units_of(model: nn.Module, *shape: int, activations: frozenset[str] = ALL, adds: bool = True) -> dict[str, Unit]:
    units = fuse(graph_of(model, *shape), "fp32", activations=activations, adds=adds)
    return {unit.name: unit for unit in units}


def test_all_that_follows_goes_into_the_contraction() -> None:
    units = units_of(Net(), 2, 3, 16, 16)
    assert {name: unit.dense.key for name, unit in units.items()} == {
        "stem.0": "conv 3>8 g1 b2 16x16 k3x3 s2x2 p1x1 d1x1 +bias+silu fp32 dense",
        "a": "conv 8>12 g1 b2 8x8 k1x1 s1x1 p0x0 d1x1 +bias+relu fp32 dense",
        "depthwise": "conv 12>12 g12 b2 8x8 k3x3 s1x1 p1x1 d1x1 +bias fp32 dense",
        "mean": "mean 12>12 g1 b2 8x8 fp32 dense",
        "gate": "conv 12>12 g1 b2 1x1 k1x1 s1x1 p0x0 d1x1 +bias+sigmoid fp32 dense",
        "mul": "mul 12>12 g1 b2 8x8 fp32 dense",
        "b": "conv 12>8 g1 b2 8x8 k1x1 s1x1 p0x0 d1x1 +bias+add+relu fp32 dense",
        "max_pool2d": "max_pool 8>8 g1 b2 8x8 k2x2 s2x2 p0x0 d1x1 fp32 dense",
        "mean_1": "mean 8>8 g1 b2 4x4 fp32 dense",
        "head": "linear 8>5 g1 b2 +bias fp32 dense",
    }


def test_without_capabilities_only_norms_fold() -> None:
    units = units_of(Net(), 1, 3, 16, 16, activations=frozenset(), adds=False)
    assert units["stem.0"].dense.epilogue == units["b"].dense.epilogue == ("bias",)
    assert units["silu"].dense.operator == "activation"
    assert units["silu"].dense.epilogue == ("silu",)
    assert units["add"].dense.operator == "add"
    assert units["relu_1"].dense.epilogue == ("relu",)


def test_an_activation_that_cannot_go_into_the_contraction_ends_the_fusion() -> None:
    units = units_of(Net(), 1, 3, 16, 16, activations=frozenset({"relu"}))
    assert units["stem.0"].dense.epilogue == ("bias",)
    assert units["a"].dense.epilogue == ("bias", "relu")
    assert units["b"].dense.epilogue == ("bias", "add", "relu")


def test_every_node_belongs_to_at_most_one_unit() -> None:
    units = units_of(Net(), 1, 3, 16, 16)
    nodes = [node for unit in units.values() for node in unit.nodes]
    assert len(nodes) == len(set(nodes))
    assert {"batch_norm", "add", "silu"} <= set(nodes)


def test_kernels_at_widths() -> None:
    model = Net()
    graph = graph_of(model, 1, 3, 16, 16)
    units = {u.name: u for u in fuse(graph, "fp32", activations=ALL, adds=True)}
    inner = next(g.id for g in graph.groups if g.num_channels == 12)
    trunk = next(g.id for g in graph.groups if g.num_channels == 8)
    widths = {inner: 9, trunk: 5}
    assert units["a"].groups == (trunk, inner)
    assert [(k.c_in, k.c_out, k.groups) for k in (u.kernel(widths) for u in units.values())] == [
        (3, 5, 1),
        (5, 9, 1),
        (9, 9, 9),
        (9, 9, 1),
        (9, 9, 1),
        (9, 9, 1),
        (9, 5, 1),
        (5, 5, 1),
        (5, 5, 1),
        (5, 5, 1),
    ]
    assert all(unit.kernel(graph.dense_widths) == unit.dense for unit in units.values())


def test_a_grouped_convolution_keeps_its_channels_a_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 2, 1))
    graph = graph_of(model, 1, 3, 8, 8)
    grouped = fuse(graph, "fp32", activations=ALL, adds=True)[1]
    (group,) = graph.groups
    kernel = grouped.kernel({group.id: 3})
    assert (kernel.c_in, kernel.c_out, kernel.groups) == (12, 24, 3)
    assert kernel.family == "grouped"


class Projected(nn.Module):
    """The projection is computed last: it fuses the add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.project = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.f(x)
        return torch.relu(y + self.project(x))


def test_of_two_operands_the_last_computed_fuses_the_add() -> None:
    units = units_of(Projected(), 1, 3, 8, 8)
    assert units["f"].dense.epilogue == ("bias",)
    assert units["project"].dense.epilogue == ("bias", "add", "relu")


def test_a_value_that_is_read_twice_is_not_fused_away() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return torch.cat([y, torch.relu(y)], 1)

    units = units_of(Twice(), 1, 3, 4, 4)
    assert units["a"].dense.epilogue == ("bias",)
    assert units["relu"].dense.operator == "activation"
    assert (units["cat"].dense.c_in, units["cat"].dense.c_out) == (8, 8)


def test_a_norm_without_a_contraction_before_it_stands_alone() -> None:
    units = units_of(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)), 1, 3, 4, 4)
    assert units["batch_norm"].dense.key == "affine 3>3 g1 b1 4x4 +relu fp32 dense"


def test_adaptive_pooling_that_enlarges_has_a_window() -> None:
    units = units_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(7)), 1, 3, 2, 2)
    assert units["adaptive_avg_pool2d"].dense.window == (1, 1)


@pytest.mark.parametrize(("padding", "expected"), [("same", (2, 2)), ("valid", (0, 0)), (1, (1, 1))])
def test_padding_by_name(padding: str | int, expected: tuple[int, int]) -> None:
    (unit,) = units_of(nn.Conv2d(3, 4, 3, padding=padding, dilation=2), 1, 3, 9, 9).values()
    assert unit.dense.padding == expected


def test_tied_layers_are_two_units() -> None:
    """Whatever is told of one of them by name must not be told of the other."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(torch.relu(self.b(self.a(x))))
            return result

    units = fuse(graph_of(Again(), 1, 3, 4, 4), "fp32", activations=ALL, adds=True)
    assert len({unit.name for unit in units}) == len(units) == 3
