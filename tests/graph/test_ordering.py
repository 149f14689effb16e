"""The order of kept channels: any order is the same network, where it is not refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import SurgeryError
from edgeprune.graph import ModelGraph, trace
from edgeprune.graph.ordering import _is_even, indices_of, why_not_ordered
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply, ordered_positions_of, read_plan
from tests.graph.test_traps import PRUNABLE, copies, distance, doubled, each, output
from tests.graph.trap import Trap
from tests.reference import difference, random_plan, redraw
from tests.test_surgery import Residual

pytestmark = pytest.mark.unit


def shuffled(plan: Plan, graph: ModelGraph, seed: int = 0) -> tuple[Plan, list[str]]:
    """The plan with the channels of every group that allows it in a random order, and which groups those are."""
    rng = np.random.default_rng(seed)
    cut = read_plan(plan, graph)
    kept = dict(plan.kept)
    groups = []
    for group in graph.groups:
        if why_not_ordered(graph, group) is None and len(cut.kept[group.id]) > 1:
            order = rng.permutation(cut.kept[group.id])
            kept[group.id] = ordered_positions_of(graph, group.id, order)
            groups.append(group.id)
    return replace(plan, kept=kept), groups


class Beside(nn.Module):
    """Two groups side by side in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.norm(torch.cat([self.a(x), self.b(x)], dim=1)))
        return y


class Attention(nn.Module):
    """Heads of one projection for queries, keys and values, as ViT has them; a gated MLP behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)
        self.heads = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, -1))
        x = x + self.down(torch.relu(self.up(x)) * self.gate(x))
        head: torch.Tensor = self.head(x)
        return head


PICTURE, TOKENS = (2, 3, 6, 6), (2, 5, 6)


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [(Residual, PICTURE, 3), (Beside, PICTURE, 2), (Attention, TOKENS, 2)],
    ids=["residual", "beside", "attention"],
)
def test_channels_in_any_order_are_the_same_network(model: type[nn.Module], shape: tuple[int, ...], count: int) -> None:
    module = redraw(model().double(), 0)
    inputs = (torch.randn(shape, dtype=torch.float64),)
    graph = trace(module, inputs)
    for seed, share in enumerate((0.0, 1 / 3)):
        plan = random_plan(graph, seed, share=share, drop=0.0)
        other, groups = shuffled(plan, graph, seed)
        assert len(groups) >= count
        outputs = [apply(p, module, inputs, graph=graph).module(*inputs) for p in (plan, other)]
        assert difference(outputs[1], outputs[0]) <= 1e-12
        assert any(list(other.kept[group]) != sorted(other.kept[group]) for group in groups)


@each(PRUNABLE)
def test_whatever_order_is_allowed_changes_nothing_in_networks_made_to_go_wrong(trap: Trap) -> None:
    model, x = doubled(trap, 0)
    graph = trace(model, x)
    for seed, share in enumerate((0.0, 1 / 3)):
        plan = random_plan(graph, seed, share=share, drop=0.0)
        other, groups = shuffled(plan, graph, seed)
        if groups:
            assert distance(output(other, graph, model, copies(x)), output(plan, graph, model, copies(x))) <= 1e-9


def test_an_order_moves_rows_and_columns_alike() -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs = (torch.randn(1, 2),)
    graph = trace(module, inputs)
    pruned = apply(Plan(structure_hash=graph.structure_hash, kept={"0.bias:0": (3, 0, 2)}), module, inputs).module
    assert pruned.get_parameter("0.weight").equal(module.get_parameter("0.weight")[[3, 0, 2]])
    assert pruned.get_parameter("0.bias").equal(module.get_parameter("0.bias")[[3, 0, 2]])
    assert pruned.get_parameter("2.weight").equal(module.get_parameter("2.weight")[:, [3, 0, 2]])


@pytest.mark.parametrize(
    ("channels", "is_even"),
    [
        ([0, 1, 2, -1], True),
        ([0, 0, 1, 1, 2, 2], True),  # as a picture laid flat
        ([0, 1, 2, 0, 1, 2], True),  # queries and keys of each head
        ([2, 1, 0], True),
        ([0, 2, 1], False),
        ([0, 1, 2, 2, 1, 0], False),  # one copy the other way round
        ([0, -1, 1, 2], False),
        ([0, 1], False),  # part of them
        ([0, 0, 1, 2], False),
    ],
)
def test_equal_strides_by_hand(channels: list[int], is_even: bool) -> None:
    table = indices_of(np.array(channels), 3)
    assert (table is not None and _is_even(table)) == is_even


def test_two_groups_that_share_indices_stay_in_order() -> None:
    trap = PRUNABLE["eager_attention"]
    model = trap.build()
    graph = trace(model, trap.inputs)
    group = graph.group("k.bias:0")
    why = why_not_ordered(graph, group)
    assert why == "its channels share the indices of dimension 0 of q.weight with another group's"
    plan = Plan(structure_hash=graph.structure_hash, kept={group.id: tuple(reversed(range(len(group.first.channels))))})
    with pytest.raises(SurgeryError, match="puts the channels of group 'k.bias:0' in another order, but its channels"):
        apply(plan, model, trap.inputs)


def test_a_head_moves_as_a_whole_or_not_at_all() -> None:
    """A channel of four indices in one dimension, and of three times four in another."""
    module, inputs = Attention(), (torch.randn(TOKENS),)
    graph = trace(module, inputs)
    heads = "out.weight:1"
    positions = ordered_positions_of(graph, heads, np.array([2, 0]))
    assert positions == (8, 9, 10, 11, 0, 1, 2, 3)
    cut = read_plan(Plan(structure_hash=graph.structure_hash, kept={heads: positions}), graph)
    rows = [start + i for start in (0, 16, 32) for i in positions]
    assert cut.indices["qkv.weight", 0].tolist() == rows
    for torn in ((9, 8, 10, 11), (0, 1, 2, 3, 8), (0, 1, 2, 3, 0, 1, 2, 3)):
        with pytest.raises(SurgeryError, match="tear a channel apart"):
            read_plan(Plan(structure_hash=graph.structure_hash, kept={heads: torn}), graph)
