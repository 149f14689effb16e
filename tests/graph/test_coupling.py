"""The groups of small networks: ids, channels, members, roles; and random networks, which must be exact or refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import RefusedError, SurgeryError
from edgeprune.graph import Group, ModelGraph, trace
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply
from tests.reference import difference, masked_output, random_plan, redraw

pytestmark = pytest.mark.unit

Forward = Callable[[nn.ModuleDict, Tensor], Tensor]


class Net(nn.Module):
    """Named layers and a forward over them."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


def graph_of(forward: Forward, **layers: nn.Module) -> ModelGraph:
    return trace(Net(forward, **layers), (torch.zeros(1, 3, 4, 4),))


def short(name: str) -> str:
    return name.removeprefix("layers.")


def members(group: Group) -> dict[str, str]:
    """`parameter:dim` to role."""
    return {f"{short(m.parameter)}:{m.dim}": m.role for m in group.members}


def channels(group: Group, parameter: str, dim: int) -> list[int]:
    return next(m.channels.tolist() for m in group.members if (short(m.parameter), m.dim) == (parameter, dim))


def test_chain() -> None:
    graph = graph_of(
        lambda m, x: m["c"](m["norm"](m["a"](x)).relu()),
        a=nn.Conv2d(3, 4, 1, bias=False),
        norm=nn.BatchNorm2d(4),
        c=nn.Conv2d(4, 2, 1),
    )
    (group,) = graph.groups
    assert group.id == "layers.a.weight:0"
    assert group.num_channels == 4
    assert members(group) == {
        "a.weight:0": "producer",
        "c.weight:1": "consumer",
        "norm.bias:0": "per_channel",
        "norm.running_mean:0": "per_channel",
        "norm.running_var:0": "per_channel",
        "norm.weight:0": "per_channel",
    }
    assert all(m.channels.tolist() == [0, 1, 2, 3] for m in group.members)
    assert graph.group(group.id) is group
    assert graph.dense_widths == {group.id: 4}


def test_a_residual_ties_all_that_is_added() -> None:
    graph = graph_of(
        lambda m, x: m["head"]((lambda y: y + m["b"](m["a"](y).relu()))(m["stem"](x))),
        stem=nn.Conv2d(3, 4, 1, bias=False),
        a=nn.Conv2d(4, 6, 1, bias=False),
        b=nn.Conv2d(6, 4, 1, bias=False),
        head=nn.Conv2d(4, 2, 1),
    )
    inner, trunk = graph.groups
    assert members(inner) == {"a.weight:0": "producer", "b.weight:1": "consumer"}
    assert members(trunk) == {
        "a.weight:1": "consumer",
        "b.weight:0": "producer",
        "head.weight:1": "consumer",
        "stem.weight:0": "producer",
    }
    assert trunk.id == "layers.a.weight:1", "the smallest (parameter, dimension)"


def test_depthwise_filters_follow_their_channels() -> None:
    graph = graph_of(
        lambda m, x: m["c"](m["b"](m["a"](x))),
        a=nn.Conv2d(3, 4, 1, bias=False),
        b=nn.Conv2d(4, 8, 3, groups=4, bias=False),
        c=nn.Conv2d(8, 2, 1),
    )
    group, multiplier = graph.groups
    assert members(group) == {"a.weight:0": "producer", "b.weight:0": "producer", "c.weight:1": "consumer"}
    assert channels(group, "a.weight", 0) == [0, 1, 2, 3]
    assert channels(group, "b.weight", 0) == channels(group, "c.weight", 1) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert channels(multiplier, "b.weight", 0) == [0, 1, 0, 1, 0, 1, 0, 1], "one of the two filters of every channel"


def test_a_grouped_convolution_loses_whole_groups_or_channels_of_each() -> None:
    graph = graph_of(
        lambda m, x: m["c"](m["b"](m["a"](x))),
        a=nn.Conv2d(3, 6, 1, bias=False),
        b=nn.Conv2d(6, 3, 3, groups=3, bias=False),
        c=nn.Conv2d(3, 2, 1),
    )
    group, within = graph.groups
    assert channels(group, "a.weight", 0) == [0, 0, 1, 1, 2, 2]
    assert channels(group, "b.weight", 0) == channels(group, "c.weight", 1) == [0, 1, 2]
    assert channels(within, "a.weight", 0) == [0, 1, 0, 1, 0, 1]
    assert channels(within, "b.weight", 1) == [0, 1]
    width = next(n for n in graph.nodes if n.operator == "conv2d").widths[1]
    assert width.terms == (((group.id, within.id), 1),)
    assert width.at({group.id: 2, within.id: 1}) == 2


def test_concatenation_puts_groups_side_by_side() -> None:
    graph = graph_of(
        lambda m, x: m["c"](torch.cat([m["a"](x), m["b"](x)], 1)),
        a=nn.Conv2d(3, 2, 1, bias=False),
        b=nn.Conv2d(3, 3, 1, bias=False),
        c=nn.Conv2d(5, 2, 1),
    )
    a, b = graph.groups
    assert (a.id, b.id) == ("layers.a.weight:0", "layers.b.weight:0")
    assert channels(a, "c.weight", 1) == [0, 1, -1, -1, -1]
    assert channels(b, "c.weight", 1) == [-1, -1, 0, 1, 2]
    node = next(n for n in graph.nodes if n.operator == "cat")
    assert node.widths[1].terms == (((a.id,), 1), ((b.id,), 1))
    assert node.widths[1].at({a.id: 1, b.id: 3}) == 4


def test_groups_that_share_their_smallest_dimension_are_both_found() -> None:
    """The norm sorts before both of its producers, and can name only one of them."""
    graph = graph_of(
        lambda m, x: m["z"](m["norm"](torch.cat([m["p"](x), m["q"](x)], 1))),
        norm=nn.BatchNorm2d(5, affine=False),
        p=nn.Conv2d(3, 2, 1, bias=False),
        q=nn.Conv2d(3, 3, 1, bias=False),
        z=nn.Conv2d(5, 2, 1),
    )
    assert [g.id for g in graph.groups] == ["layers.norm.running_mean:0", "layers.norm.running_var:0"]
    assert [g.num_channels for g in graph.groups] == [2, 3]
    assert graph.groups[1].first.channels.tolist() == [-1, -1, 0, 1, 2]


def test_squeeze_excite_gates_follow_what_they_gate() -> None:
    graph = graph_of(
        lambda m, x: m["c"](
            (lambda y: y * m["up"](m["down"](y.mean((2, 3), keepdim=True)).relu()).sigmoid())(m["a"](x))
        ),
        a=nn.Conv2d(3, 4, 1, bias=False),
        down=nn.Conv2d(4, 2, 1, bias=False),
        up=nn.Conv2d(2, 4, 1, bias=False),
        c=nn.Conv2d(4, 2, 1),
    )
    gated, squeezed = graph.groups
    assert members(gated) == {
        "a.weight:0": "producer",
        "c.weight:1": "consumer",
        "down.weight:1": "consumer",
        "up.weight:0": "producer",
    }
    assert members(squeezed) == {"down.weight:0": "producer", "up.weight:1": "consumer"}


def test_flattening_repeats_a_channel_once_a_position() -> None:
    graph = graph_of(
        lambda m, x: m["head"](m["a"](x).flatten(1)),
        a=nn.Conv2d(3, 2, 3, bias=False),
        head=nn.Linear(8, 2),
    )
    (group,) = graph.groups
    assert channels(group, "head.weight", 1) == [0, 0, 0, 0, 1, 1, 1, 1]
    node = next(n for n in graph.nodes if n.operator == "flatten")
    assert node.widths[1].terms == (((group.id,), 4),)


def test_a_layer_called_twice_has_one_width() -> None:
    graph = graph_of(
        lambda m, x: m["head"](m["b"](m["b"](m["a"](x)).relu())),
        a=nn.Conv2d(3, 4, 1, bias=False),
        b=nn.Conv2d(4, 4, 1, bias=False),
        head=nn.Conv2d(4, 2, 1),
    )
    (group,) = graph.groups
    assert set(members(group)) == {"a.weight:0", "b.weight:0", "b.weight:1", "head.weight:1"}


def test_tied_weights_go_by_their_first_name() -> None:
    a, b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
    b.weight = a.weight
    net = Net(lambda m, x: m["head"](torch.cat([m["a"](x), m["b"](x)], 1)), a=a, b=b, head=nn.Conv2d(8, 2, 1))
    x = (torch.randn(1, 3, 4, 4),)
    graph = trace(net, x)
    (group,) = graph.groups
    assert set(members(group)) == {"a.weight:0", "head.weight:1"}
    assert channels(group, "head.weight", 1) == [0, 1, 2, 3, 0, 1, 2, 3]
    pruned = apply(Plan(structure_hash=graph.structure_hash, kept={group.id: (0, 2)}), net, x, graph=graph).module
    assert pruned.get_submodule("layers.a").weight is pruned.get_submodule("layers.b").weight
    assert dict(pruned.named_parameters())["layers.head.weight"].shape[1] == 4


def test_what_reaches_the_output_is_refused() -> None:
    graph = graph_of(lambda m, x: m["b"](m["a"](x)), a=nn.Conv2d(3, 4, 1, bias=False), b=nn.Conv2d(4, 2, 1, bias=False))
    assert [g.id for g in graph.groups] == ["layers.a.weight:0"]
    (refusal,) = graph.refused
    assert (refusal.operator, refusal.where) == ("output", "layers.b")


def test_shares_count_layers_with_a_prunable_dimension() -> None:
    graph = graph_of(
        lambda m, x: m["b"](m["a"](x)) + m["alone"](x),
        a=nn.Conv2d(3, 4, 1, bias=False),
        b=nn.Conv2d(4, 2, 1, bias=False),
        alone=nn.Conv2d(3, 2, 1, bias=False),
    )
    assert graph.prunable_params_share == pytest.approx((12 + 8) / (12 + 8 + 6))
    assert graph.prunable_macs_share == pytest.approx((12 + 8) / (12 + 8 + 6))


def chain(width: int, *, norm: bool = True) -> nn.Module:
    middle = [nn.BatchNorm2d(width)] if norm else []
    return nn.Sequential(nn.Conv2d(3, width, 1), *middle, nn.Conv2d(width, 2, 1))


def test_the_structure_hash_is_stable_and_sensitive() -> None:
    def hashed(model: nn.Module, size: int = 4, dtype: torch.dtype = torch.float32) -> str:
        return trace(model.to(dtype), (torch.zeros(1, 3, size, size, dtype=dtype),)).structure_hash

    reference = hashed(chain(4))
    assert reference == hashed(redraw(chain(4), 1)) == hashed(copy.deepcopy(chain(4))), "weights don't count"
    assert reference == hashed(chain(4), size=6), "neither does the size of the picture"
    assert len({reference, hashed(chain(6)), hashed(chain(4, norm=False)), hashed(chain(4), dtype=torch.float64)}) == 4


def test_a_number_that_python_computes_from_a_size_is_refused() -> None:
    """It would run after pruning, and give something else than the dense network with zeros."""
    net = Net(
        lambda m, x: m["b"](torch.relu(m["a"](x)) * m["b"].get_parameter("weight").shape[1] ** -0.5),
        a=nn.Conv2d(3, 4, 1, bias=False),
        b=nn.Conv2d(4, 2, 1),
    )
    with pytest.raises(RefusedError) as caught:
        trace(net, (torch.randn(1, 3, 4, 4),))
    assert any("test_coupling.py" in reason and "computes by this size" in reason for reason in caught.value.reasons)


def test_a_number_that_only_apply_sees_is_caught() -> None:
    """`len` gives a plain integer, which no trace can follow."""
    net = Net(
        lambda m, x: m["b"](torch.relu(m["a"](x)) * len(m["a"].get_parameter("weight")) ** -0.5),
        a=nn.Conv2d(3, 4, 1, bias=False),
        b=nn.Conv2d(4, 2, 1),
    )
    x = (torch.randn(1, 3, 4, 4),)
    graph = trace(net, x)
    plan = Plan(structure_hash=graph.structure_hash, kept={graph.groups[0].id: (0,)})
    with pytest.raises(
        SurgeryError, match=r"computes with a size that pruning changes: mul\[0.5\] before, \[1.0\] after"
    ):
        apply(plan, net, x, graph=graph)


class RandomNetwork(nn.Module):
    """A random program over layers: each step reads earlier values; what is never read gets a head of its own."""

    KINDS = (
        *("conv", "conv", "norm", "activation", "in place", "add", "add", "concatenate", "multiply", "gate", "pool"),
        *("depthwise", "grouped", "branch", "branch", "again", "shuffle", "slice", "flat and back", "softmax"),
    )

    def __init__(self, seed: int, steps: int = 10) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int, int]] = []
        self.shapes = [(3, 8)]  # channels and height of every value
        self._put("layer", 0, shape=(rng.choice((4, 6, 8)), 8), layer=nn.Conv2d(3, 8, 1))
        self.layers[0] = nn.Conv2d(3, self.shapes[1][0], 3, padding=1)
        for _ in range(rng.randint(3, steps)):
            self._step(rng, rng.choice(self.KINDS), rng.randrange(1, len(self.shapes)))
        read = {i for _, a, b, _ in self.steps for i in (a, b)}
        self.ends = [i for i in range(1, len(self.shapes)) if i not in read]
        self.flat = rng.random() < 0.5
        self.heads = nn.ModuleList(
            nn.Linear(c * s * s if self.flat else c, 5) for c, s in (self.shapes[i] for i in self.ends)
        )

    def _put(self, kind: str, a: int, b: int = 0, *, shape: tuple[int, int], layer: nn.Module | None = None) -> None:
        if layer is not None:
            self.layers.append(layer)
        self.steps.append((kind, a, b, len(self.layers) - 1))
        self.shapes.append(shape)

    def _step(self, rng: random.Random, kind: str, a: int) -> None:
        c, size = self.shapes[a]
        out = rng.choice((4, 6, 8, c))
        same = [i for i, shape in enumerate(self.shapes) if i and shape == (c, size)]
        if kind == "conv":
            self._put("layer", a, shape=(out, size), layer=nn.Conv2d(c, out, 1, bias=rng.random() < 0.5))
        elif kind == "depthwise":
            out = c * rng.choice((1, 2))
            self._put("layer", a, shape=(out, size), layer=nn.Conv2d(c, out, 3, padding=1, groups=c))
        elif kind == "grouped" and c % 2 == 0:
            self._put("layer", a, shape=(8, size), layer=nn.Conv2d(c, 8, 1, groups=2))
        elif kind == "norm":
            self._put("layer", a, shape=(c, size), layer=nn.BatchNorm2d(c))
        elif kind == "activation":
            layer = rng.choice((nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Dropout))()
            self._put("layer", a, shape=(c, size), layer=layer)
        elif kind == "pool" and size > 2:
            pool = rng.choice((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(size // 2)))
            self._put("layer", a, shape=(c, size // 2), layer=pool)
        elif kind in ("add", "multiply"):
            self._put(kind, a, rng.choice(same), shape=(c, size))
        elif kind == "concatenate":
            b = rng.choice([i for i, shape in enumerate(self.shapes) if i and shape[1] == size])
            self._put(kind, a, b, shape=(c + self.shapes[b][0], size))
        elif kind == "gate":
            gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1), nn.Sigmoid()
            )
            self._put(kind, a, shape=(c, size), layer=gate)
        elif kind == "branch":
            relu = nn.ReLU(inplace=rng.random() < 0.5)
            self._put(
                kind,
                a,
                shape=(c, size),
                layer=nn.Sequential(nn.Conv2d(c, 6, 1), nn.BatchNorm2d(6), relu, nn.Conv2d(6, c, 3, padding=1)),
            )
        elif kind == "again":  # the weights of an earlier convolution under a second name
            fitting = [m for m in self.layers if isinstance(m, nn.Conv2d) and m.weight.shape[1:] == (c, 1, 1)]
            if fitting:
                tied = nn.Conv2d(c, fitting[0].out_channels, 1)
                tied.weight = fitting[0].weight
                self._put("layer", a, shape=(tied.out_channels, size), layer=tied)
        elif kind == "slice" and c > 4:
            self._put(kind, a, shape=(c - 2, size))
        elif kind in ("in place", "flat and back", "softmax") or (kind == "shuffle" and c % 2 == 0):
            self._put(kind, a, shape=(c, size))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, i, j, layer in self.steps:
            a, b = values[i], values[j]
            if kind == "layer":
                a = self.layers[layer](a)
            elif kind == "branch":
                a = a + self.layers[layer](a)
            elif kind == "gate":
                a = a * self.layers[layer](a)
            elif kind == "in place":
                a = torch.relu_(a)
            elif kind == "add":
                a = a + b
            elif kind == "multiply":
                a = a * b
            elif kind == "concatenate":
                a = torch.cat([a, b], 1)
            elif kind == "shuffle":
                n, c, h, w = a.shape
                a = a.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            elif kind == "slice":
                a = a[:, 2:]
            elif kind == "flat and back":
                a = a.flatten(2).view(a.shape)
            elif kind == "softmax":
                a = a.softmax(1)
            values.append(a)
        ends = [values[i].flatten(1) if self.flat else values[i].mean((2, 3)) for i in self.ends]
        return torch.stack([head(end) for head, end in zip(self.heads, ends, strict=True)]).sum(0)


@pytest.mark.parametrize("first_seed", [0, 100])
def test_random_networks_are_exact_or_refused(first_seed: int) -> None:
    exact = 0
    for seed in range(first_seed, first_seed + 20):
        model = redraw(RandomNetwork(seed).double(), seed)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        try:
            graph = trace(model, (x,))
        except RefusedError as error:
            assert error.reasons or "can't trace" in str(error)
            continue
        for drop in (0.0, 0.6):
            plan = random_plan(graph, seed, drop=drop)
            pruned = apply(plan, model, (x,), graph=graph)
            with torch.no_grad():
                got, reference = pruned.module(x.clone()), masked_output(graph, plan, model, (x.clone(),))
            assert difference(got, reference) <= 1e-9, f"seed {seed}, dropped {plan.dropped}"
        exact += 1
    assert exact >= 10, "most of these networks can be pruned"
