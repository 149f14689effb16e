"""What fuses into what, per capability of the runtime, and the kernels at given widths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from edgeprune.fusion import fuse
from edgeprune.graph import ModelGraph, Width, analyse, tracing
from edgeprune.unit import Unit

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
    kinds, within = graph.groups[:2]
    kernel = grouped.kernel({**graph.dense_widths, kinds.id: 3})
    assert (kernel.c_in, kernel.c_out, kernel.groups) == (12, 24, 3)
    narrow = grouped.kernel({**graph.dense_widths, within.id: within.num_channels // 2})
    assert narrow.groups == 4 and {narrow.c_in / 16, narrow.c_out / 32} == {0.5, 1.0}
    assert kernel.family == "grouped"


class Projected(nn.Module):
    """Both operands of the add are convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.project = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.f(x)
        return torch.relu(y + self.project(x))


def test_of_two_operands_the_first_fuses_the_add_whichever_is_computed_first() -> None:
    units = units_of(Projected(), 1, 3, 8, 8)
    assert units["f"].dense.epilogue == ("bias", "add", "relu")
    assert units["project"].dense.epilogue == ("bias",)

    class Second(Projected):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.f(x)
            result: Tensor = self.project(x) + y
            return result

    units = units_of(Second(), 1, 3, 8, 8)
    assert units["f"].dense.epilogue == ("bias",)
    assert units["project"].dense.epilogue == ("bias", "add")


def test_a_convolution_that_has_an_activation_fuses_no_add() -> None:
    class Activated(Projected):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            result: Tensor = torch.relu(self.f(x)) + self.project(x)
            return result

    units = units_of(Activated(), 1, 3, 8, 8)
    assert units["f"].dense.epilogue == ("bias", "relu")
    assert units["project"].dense.epilogue == ("bias", "add")

    class Alone(Projected):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + torch.relu(self.f(x))

    units = units_of(Alone(), 1, 3, 8, 8)
    assert units["f"].dense.epilogue == ("bias", "relu")
    assert units["add"].dense.operator == "add"


class Products(nn.Module):
    """Operands of adds that are contractions in another guise, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.weight = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        first = (x @ self.weight.t()) + self.p(y)
        second = nn.functional.linear(self.weight, self.q.weight) + self.q(y)
        result: Tensor = first + second
        return result


def test_no_node_lies_in_two_units_and_every_add_in_one() -> None:
    units = units_of(Products(), 8, 8)
    nodes = [node for unit in units.values() for node in unit.nodes]
    assert sorted(nodes) == sorted(set(nodes))
    assert {name: unit.dense.epilogue for name, unit in units.items() if "add" in unit.dense.epilogue} == {
        "matmul": ("bias", "add"),
        "q": ("bias", "add"),
    }


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


class Transformer(nn.Module):
    """One block over 4 x 4 patches: norm, attention, norm, MLP, each with its residual add; channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 24, 4, stride=4), nn.Linear(24, 5)
        self.norm_1, self.norm_2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))
        result: Tensor = self.head(x.mean(1))
        return result


def test_a_transformer_block() -> None:
    units = units_of(Transformer(), 2, 3, 16, 16)
    assert {name: unit.dense.key for name, unit in units.items()} == {
        "patches": "conv 3>24 g1 b2 16x16 k4x4 s4x4 p0x0 d1x1 +bias fp32 dense",
        "transpose": "transpose 24>24 g1 b2 16 fp32 dense",
        "layer_norm": "layer_norm 24>24 g1 b2 16 fp32 dense",
        "qkv": "linear 24>72 g1 b2 16 +bias fp32 dense",
        "scaled_dot_product_attention": "attention 24>24 g3 b2 16x16 fp32 dense",
        "out": "linear 24>24 g1 b2 16 +bias+add fp32 dense",
        "layer_norm_1": "layer_norm 24>24 g1 b2 16 fp32 dense",
        "up": "linear 24>32 g1 b2 16 +bias+gelu fp32 dense",
        "down": "linear 32>24 g1 b2 16 +bias+add fp32 dense",
        "mean": "mean 24>24 g1 b2 16 fp32 dense",
        "head": "linear 24>5 g1 b2 +bias fp32 dense",
    }


class Windows(nn.Module):
    """What Swin does besides: roll, cut into windows, pad, take every second position; and what costs nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(x, (1, 1), (1, 2))
        n, h, w, c = x.shape
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        x = nn.functional.pad(x, (0, 0, 0, 0))[:, :, :].transpose(0, 1).transpose(0, 1)
        return torch.cat([x[:, 0::2], x[:, 1::2]], -1)


def test_copies() -> None:
    graph = graph_of(Windows(), 1, 8, 8, 6)
    found = [unit.dense.key for unit in fuse(graph, "fp32", activations=ALL, adds=True)]
    assert found[:2] == ["copy 6>6 g1 b1 8x8 fp32 dense", "copy 6>6 g1 b1 2x2x4x4 fp32 dense"]
    assert [key.split(" ")[0] for key in found[2:]] == ["copy", "copy", "copy", "copy", "cat"]


def test_a_transposition_of_ones_is_free() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1) + 1

    units = units_of(Turned(), 1, 7, 6)
    assert [unit.dense.operator for unit in units.values()] == ["add"]


def test_matmul_of_two_activations() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, x.transpose(-2, -1))

    (unit,) = (u for u in units_of(Product(), 2, 3, 5, 8).values() if u.dense.operator == "matmul")
    assert unit.dense.key == "matmul 24>15 g3 b2 5 fp32 dense"


def test_widths_of_attention_are_products() -> None:
    """Heads, their query width and their value width as three groups, which a graph may prove independent."""
    graph = graph_of(Transformer(), 1, 3, 16, 16)
    heads, query, value = (Width(terms=(((name,), 1),)) for name in ("heads", "query", "value"))
    core = next(node for node in graph.nodes if node.operator == "scaled_dot_product_attention")
    widths = {name: (Width(fixed=1), heads, Width(fixed=16), query) for name in core.inputs}
    widths[core.name] = (Width(fixed=1), heads, Width(fixed=16), value)
    nodes = tuple(replace(n, widths=widths.get(n.name, n.widths)) for n in graph.nodes)
    units = fuse(replace(graph, nodes=nodes), "fp32", activations=ALL, adds=True)
    (unit,) = (unit for unit in units if unit.dense.operator == "attention")
    assert set(unit.groups) == {"heads", "query", "value"}
    assert unit.kernel({"heads": 3, "query": 8, "value": 8}) == unit.dense
    kernel = unit.kernel({"heads": 2, "query": 8, "value": 4})
    assert (kernel.groups, kernel.c_in, kernel.c_out) == (2, 16, 8)
    assert unit.sizes({"heads": 2, "query": 6, "value": 4}) == (2, 6, 4)


def test_the_groups_of_a_convolution_follow_what_its_widths_share() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 2, 1))
    graph = graph_of(model, 1, 3, 8, 8)
    dense = {"k": 4, "i": 4, "o": 8}
    one, grouped, last = graph.nodes[1:4]
    c_in = replace(one, widths=(Width(fixed=1), Width(terms=((("k", "i"), 1),)), *one.widths[2:]))
    c_out = replace(grouped, widths=(Width(fixed=1), Width(terms=((("k", "o"), 1),)), *grouped.widths[2:]))
    groups = tuple(replace(graph.groups[0], id=name, num_channels=size) for name, size in dense.items())
    graph = replace(graph, nodes=(graph.nodes[0], c_in, c_out, last, *graph.nodes[4:]), groups=groups)
    unit = fuse(graph, "fp32", activations=ALL, adds=True)[1]
    assert unit.kernel(dense) == unit.dense
    kernel = unit.kernel({"k": 3, "i": 2, "o": 5})
    assert (kernel.groups, kernel.c_in, kernel.c_out) == (3, 6, 15)


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
