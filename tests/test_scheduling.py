"""Schedules: the budgets of their steps, and that what went stays away while what is left is scored again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.budget_rows import params_row
from edgeprune.choice import Choice
from edgeprune.choosing import Rules, choose
from edgeprune.errors import InputError
from edgeprune.graph import ModelGraph, trace
from edgeprune.plan_json import Plan
from edgeprune.planning import plan
from edgeprune.pruned import Pruned
from edgeprune.saliency import Saliency, score
from edgeprune.scheduling import ONE_SHOT, Schedule, Stage, _traced, before_the_last, carried_back
from edgeprune.surgery import apply
from edgeprune.variables import Reached, variables_of
from tests.test_planning import Nested, Residual, cost_of, saliency_of

pytestmark = pytest.mark.unit
X = (torch.zeros(1, 3, 24, 24),)


def test_the_budgets_of_the_steps() -> None:
    assert [Schedule(steps=3).limit(1000.0, 1.0, step) for step in (1, 2, 3)] == pytest.approx([100.0, 10.0, 1.0])
    linear = Schedule(steps=4, targets="linear")
    assert [linear.limit(100.0, 20.0, step) for step in (1, 2, 3, 4)] == pytest.approx([80.0, 60.0, 40.0, 20.0])
    assert ONE_SHOT.limit(100.0, 20.0, 1) == pytest.approx(20.0)
    assert linear.limit(100.0, 120.0, 2) == 120.0, "a budget that dense meets asks nothing of a step"
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(steps=0)


def squares(graph: ModelGraph, module: nn.Module) -> Saliency:
    return score("l2", graph, module)


def after_two_steps(net: nn.Module, share: float) -> tuple[Stage, list[Choice], list[Pruned]]:
    cost = cost_of(net)
    steps: list[Choice] = []
    networks: list[Pruned] = []

    def seen(pruned: Pruned) -> Pruned:
        networks.append(pruned)
        return pruned

    stage = before_the_last(
        cost,
        Stage(saliency=squares(cost.graph, net), rules=Rules()),
        share * cost.predict({}).us,
        Schedule(steps=3),
        squares,
        between=seen,
        on_step=lambda step, choice: steps.append(choice),
    )
    return stage, steps, networks


@pytest.mark.parametrize("net", [Residual, Nested])
def test_steps_come_down_and_nothing_comes_back(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    cost = cost_of(model)
    dense_us = cost.predict({}).us
    stage, steps, networks = after_two_steps(model, 0.2)
    assert [choice.predicted_us <= dense_us * 0.2 ** (k / 3) * (1 + 1e-9) for k, choice in enumerate(steps, 1)] == [
        True
    ] * 2
    assert len(networks) == 2 and stage.rules.after == steps[-1].reached
    first, second = steps
    assert all(second.widths[g] <= first.widths[g] for g in first.widths)
    gone = {
        b.id for b in cost.graph.blocks if any(b.nodes <= o.nodes for o in cost.graph.blocks if o.id in first.dropped)
    }
    assert all(
        any(b.nodes <= o.nodes for o in cost.graph.blocks if o.id in second.dropped)
        for b in cost.graph.blocks
        if b.id in gone
    )


def test_the_values_are_those_of_the_network_that_is_left() -> None:
    """Scored by hand: the cut module's own l2 at the kept channels, nothing at the others."""
    torch.manual_seed(0)
    model = Residual()
    graph = trace(model, X)
    kept = {"a.weight:1": (1, 4, 9), "a.bias:0": (0, 47), "head.weight:1": (5, 6)}
    choice_plan = plan_of(graph, kept)
    module = apply(choice_plan, model, X, graph=graph).module
    smaller = trace(module, X)
    found, before = squares(smaller, module), squares(graph, model)
    values = carried_back(found, smaller, before, choice_plan, graph)
    for group, channels in kept.items():
        assert values.channels[group][list(channels)] == pytest.approx(found.channels[group])
        assert np.delete(values.channels[group], channels).tolist() == [0.0] * (
            len(values.channels[group]) - len(channels)
        )
    assert values.blocks.keys() == before.blocks.keys()


def test_a_group_whose_naming_layer_was_dropped_is_found_by_another_layer() -> None:
    """The trunk is named after `a`, which is in the block that goes."""
    torch.manual_seed(0)
    model = Residual()
    graph = trace(model, X)
    (block,) = graph.blocks
    dropped = plan_of(graph, {"a.weight:1": tuple(range(0, 32, 2))}, (block.id,))
    module = apply(dropped, model, X, graph=graph).module
    smaller, module = _traced(module, X)
    names = {group.id for group in smaller.groups}
    assert "a.weight:1" not in names and "stem.bias:0" in names
    found = squares(smaller, module)
    values = carried_back(found, smaller, squares(graph, model), dropped, graph)
    assert values.channels["a.weight:1"][::2] == pytest.approx(found.channels["stem.bias:0"])
    assert not values.channels["a.weight:1"][1::2].any()


def test_a_channel_that_is_worth_nothing_comes_before_one_that_is_gone() -> None:
    model = Residual()
    graph = trace(model, X)
    cut = plan_of(graph, {"head.weight:1": (7, 11, 20)})
    smaller = trace(apply(cut, model, X, graph=graph).module, X)
    nothing = Saliency(channels={g.id: np.zeros(g.num_channels) for g in smaller.groups}, blocks={})
    values = carried_back(nothing, smaller, squares(graph, model), cut, graph)
    assert np.flatnonzero(values.channels["head.weight:1"]).tolist() == [7, 11, 20]


def test_a_dropped_block_is_forbidden_to_come_back() -> None:
    cost = cost_of(Residual())
    (block,) = cost.graph.blocks
    rules = Rules(after=Reached(widths={**cost.graph.dense_widths, "head.weight:1": 16}, dropped=(block.id,)))
    choice = choose(cost, saliency_of(cost), cost.predict({}).us, rules=rules)
    assert choice.dropped == (block.id,) and choice.widths["head.weight:1"] == 16 and choice.widths["a.weight:1"] == 32
    assert variables_of(cost, rules.constraints, after=rules.after).gone == {block.id}


def test_a_plan_in_steps_meets_every_budget_and_says_how_it_was_made() -> None:
    torch.manual_seed(0)
    model = Residual()
    cost = cost_of(model)
    params = params_row(cost.graph, 1.0)
    found = plan(cost.graph, cost, budget=["0.5x", "0.4x@params"], saliency="l2", schedule=Schedule(steps=3))
    assert found.notes["schedule"] == {"steps": 3, "targets": "exponential"}
    latency, parameters = found.notes["budgets"]
    assert latency["predicted"] <= latency["limit"] and latency["unit"] == "ms"
    assert parameters["of"] == "params" and parameters["predicted"] <= parameters["limit"] == round(0.4 * params.dense)
    module = apply(found, model, X, graph=cost.graph).module
    assert sum(p.numel() for p in module.parameters()) == parameters["predicted"]
    with pytest.raises(InputError, match="no budget is of the latency"):
        plan(cost.graph, cost, budget="0.4x@params", saliency="l2")
    with pytest.raises(InputError, match=r"no scope 'globl'; did you mean 'global'"):
        plan(cost.graph, cost, budget="0.5x", saliency="l2", scope="globl")  # type: ignore[arg-type]


def plan_of(graph: ModelGraph, kept: dict[str, tuple[int, ...]], dropped: tuple[str, ...] = ()) -> Plan:
    return Plan(structure_hash=graph.structure_hash, kept=kept, dropped=dropped)
