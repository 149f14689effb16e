"""What a user forbids is never chosen, and what remains is still the best of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeprune.backends.null import partition
from edgeprune.choosing import Rules, choose, least_choice
from edgeprune.constraints import NONE, Constraints, Only, allowed, parse_least_width
from edgeprune.errors import InputError
from edgeprune.graph import trace
from edgeprune.units import width_options
from tests.test_planning import Nested, NestedWithoutGroups, Residual, cost_of, everything, saliency_of, value

pytestmark = pytest.mark.unit


def test_without_constraints_everything_is_offered() -> None:
    cost = cost_of(Nested())
    options, blocks = allowed(NONE, cost.graph, cost.units, cost.options)
    assert options == dict(cost.options) and blocks == cost.graph.blocks
    assert NONE.describe() == {}


def test_a_layer_that_is_kept_loses_neither_inputs_nor_outputs_nor_its_block() -> None:
    cost = cost_of(Residual())
    trunk, inside = "a.weight:1", "a.bias:0"
    for pattern in ("a", "a.weight", "[a]*"):
        options, blocks = allowed(Constraints(keep=(pattern,)), cost.graph, cost.units, cost.options)
        assert options[trunk] == (32,) and options[inside] == (48,) and blocks == ()
        assert options["head.weight:1"] == cost.options["head.weight:1"]
    options, blocks = allowed(Constraints(keep=("tail",)), cost.graph, cost.units, cost.options)
    assert options[trunk] == (32,) and options["head.weight:1"] == (24,), "what it reads and what it gives"
    assert options[inside] == cost.options[inside] and blocks == cost.graph.blocks


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    cost = cost_of(Residual())
    with pytest.raises(InputError, match=r"keep 'tial' matches no module .*; did you mean 'tail'"):
        allowed(Constraints(keep=("tial",)), cost.graph, cost.units, cost.options)


@pytest.mark.parametrize(
    ("constraints", "least"),
    [
        (Constraints(least_width=16), {"a.weight:1": 16, "a.bias:0": 16, "head.weight:1": 16}),
        (Constraints(least_width=0.5), {"a.weight:1": 16, "a.bias:0": 24, "head.weight:1": 16}),
        (Constraints(most_cut=0.25), {"a.weight:1": 24, "a.bias:0": 40, "head.weight:1": 24}),
        (Constraints(least_width=40), {"a.weight:1": 32, "a.bias:0": 40, "head.weight:1": 24}),
    ],
)
def test_least_widths_are_those_of_the_table_s_steps(constraints: Constraints, least: dict[str, int]) -> None:
    """On steps of 8; a narrower group than asked stays as it is."""
    cost = cost_of(Residual())
    options, _ = allowed(constraints, cost.graph, cost.units, cost.options)
    steps = {name: tuple(w for w in cost.options[name] if w >= width) for name, width in least.items()}
    assert options == steps


def test_the_most_that_may_go_of_a_layer_forbids_to_drop_it() -> None:
    cost = cost_of(Residual())
    assert allowed(Constraints(most_cut=0.9), cost.graph, cost.units, cost.options)[1] == ()
    assert allowed(Constraints(least_width=0.1), cost.graph, cost.units, cost.options)[1] == cost.graph.blocks


@pytest.mark.parametrize("net", [Residual, Nested])
@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(least_width=16),
        Constraints(most_cut=0.5),
        Constraints(only="channels"),
        Constraints(only="blocks"),
        Constraints(keep=("a",)),
        Constraints(keep=("head",), least_width=0.4),
    ],
)
def test_what_is_left_is_chosen_as_by_trying_every_network(net: type[nn.Module], constraints: Constraints) -> None:
    cost = cost_of(net())
    saliency = saliency_of(cost)
    rules = Rules(constraints=constraints)
    options, blocks = allowed(constraints, cost.graph, cost.units, cost.options)
    free = {block.id for block in blocks}
    left = [(w, d) for w, d in everything(cost) if set(d) <= free and all(w[g] in options[g] for g in w)]
    least = least_choice(cost, saliency, rules=rules)
    assert least.predicted_us == pytest.approx(min(cost.predict(w, d).us for w, d in left))
    target = 0.55 * least.predicted_us + 0.45 * cost.predict({}).us
    choice = choose(cost, saliency, target, rules=rules)
    assert set(choice.dropped) <= free and all(choice.widths[g] in options[g] for g in options)
    best = max(value(cost, saliency, w, d) for w, d in left if cost.predict(w, d).us <= target)
    assert choice.solution.value == pytest.approx(best, rel=1e-4)


def test_an_inner_block_may_go_where_the_outer_one_must_stay() -> None:
    cost = cost_of(Nested())
    inner, outer = cost.graph.blocks
    options, blocks = allowed(Constraints(keep=("after.bias",)), cost.graph, cost.units, cost.options)
    assert [block.id for block in blocks] == [inner.id]
    choice = least_choice(cost, saliency_of(cost), rules=Rules(constraints=Constraints(keep=("after.bias",))))
    assert choice.dropped == (inner.id,)
    with pytest.raises(InputError, match="leave nothing to prune"):
        allowed(Constraints(keep=("*",)), cost.graph, cost.units, cost.options)
    assert inner.within == outer.id and len(options) == len(cost.options)


class Attention(nn.Module):
    """Four heads of 8, a projection back, an MLP: groups of heads, of head widths, and of hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.back, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 10)
        self.num_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.num_heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.down(torch.relu(self.up(self.back(y.transpose(1, 2).reshape(n, t, -1)))).mean(1))
        return result


@pytest.mark.parametrize("only", ["heads", "channels"])
def test_heads_alone_or_everything_but_heads(only: Only) -> None:
    graph = trace(Attention(), (torch.randn(1, 6, 32),))
    units = partition(graph, "fp32")
    before = width_options(graph, units, {})
    options, blocks = allowed(Constraints(only=only), graph, units, before)
    heads = {group.id for group in graph.groups if group.num_channels == 4}
    assert len(heads) == 1 and blocks == ()
    for group, widths in options.items():
        assert (len(widths) > 1) == ((group in heads) == (only == "heads")) or len(before[group]) == 1


@pytest.mark.parametrize(("only", "why"), [("heads", "no attention heads"), ("blocks", "no block can be dropped")])
def test_what_the_model_lacks_can_t_be_all_that_is_pruned(only: Only, why: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    cost = cost_of(net)
    with pytest.raises(InputError, match=why):
        allowed(Constraints(only=only), cost.graph, cost.units, cost.options)


def test_blocks_without_groups_are_blocks_too() -> None:
    cost = cost_of(NestedWithoutGroups())
    choice = least_choice(cost, saliency_of(cost), rules=Rules(constraints=Constraints(only="blocks")))
    assert choice.widths == cost.graph.dense_widths and choice.dropped


@pytest.mark.parametrize(("text", "value"), [("16", 16.0), ("0.25", 0.25), ("25%", 0.25), ("0.5x", 0.5), ("0", 0.0)])
def test_least_widths_are_read(text: str, value: float) -> None:
    assert parse_least_width(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "-3", "2.5", "150%", "wide", "2x", "nan", "inf"])
def test_nonsense_is_no_least_width(text: str) -> None:
    with pytest.raises(InputError, match="neither a number of channels"):
        parse_least_width(text)


def test_bad_arguments_are_value_errors() -> None:
    for wrong in ({"most_cut": 1.5}, {"least_width": -1.0}, {"only": "layers"}):
        with pytest.raises(ValueError, match="expected"):
            Constraints(**wrong)
