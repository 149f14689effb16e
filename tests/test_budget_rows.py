"""Budget rows: parameters and multiply-adds are exact tables, whatever is cut, dropped or concatenated."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.budget import parse_wanted
from edgeprune.budget_rows import Row, latency_row, macs_row, params_row
from edgeprune.choosing import FREELY, choose, selection_problem
from edgeprune.cost import CostModel
from edgeprune.errors import BudgetError
from edgeprune.graph import trace
from edgeprune.plan_json import Plan
from edgeprune.planning import rows_of, with_common_options
from edgeprune.surgery import apply, positions_of
from tests.test_planning import (
    Concatenated,
    ConcatenatedInABranch,
    Nested,
    NestedWithoutGroups,
    OneLayerBranch,
    Residual,
    cost_of,
    everything,
    saliency_of,
    value,
)

pytestmark = pytest.mark.unit
NETS = [Residual, OneLayerBranch, Concatenated, ConcatenatedInABranch, Nested, NestedWithoutGroups]


def some(cost: CostModel, step: int = 37) -> list[tuple[dict[str, int], list[str]]]:
    """Some of all networks, the dense one and the least among them."""
    found = list(islice(everything(cost), 4000))
    return [found[0], *found[1:-1:step], found[-1]]


def counted(cost: CostModel, widths: dict[str, int], dropped: list[str]) -> int:
    """Parameters of the network that surgery makes."""
    kept = {g: positions_of(cost.graph, g, np.arange(w, dtype=np.int64)) for g, w in widths.items()}
    plan = Plan(structure_hash=cost.graph.structure_hash, kept=kept, dropped=tuple(dropped))
    module = apply(plan, cost.graph.model, (torch.zeros(1, 3, 24, 24),), graph=cost.graph).module
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("net", NETS)
def test_parameters_are_those_that_surgery_leaves(net: type[nn.Module]) -> None:
    cost = cost_of(net())
    row = params_row(cost.graph, 1.0)
    assert row.is_exact
    assert row.dense == sum(p.numel() for p in cost.graph.model.parameters())
    for widths, dropped in some(cost, step=401):
        assert row.predict(widths, dropped) == (counted(cost, widths, dropped), 0.0)


def test_bytes_are_those_of_the_precision() -> None:
    graph = cost_of(Residual()).graph
    elements = params_row(graph, 1.0).dense
    assert params_row(graph, 1.0, bytes_each=2).dense == 2 * elements
    (row,) = rows_of([parse_wanted("1kB@params")], cost_of(Residual()), {}, batch=1, precision="fp16")
    assert (row.limit, row.unit, row.dense) == (1000, "bytes", 2 * elements)


def rows(cost: CostModel) -> tuple[Row, ...]:
    return latency_row(cost, 1e9), params_row(cost.graph, 1e9), macs_row(cost, 1e9)


@pytest.mark.parametrize("net", NETS)
def test_the_tables_add_up_to_the_prediction(net: type[nn.Module]) -> None:
    """At every answer the solver sees what the row predicts; behind a concatenation that holds for counts alone."""
    cost = cost_of(net())
    variables = FREELY.variables(cost)
    exact = [row for row in rows(cost) if not row.is_wide(variables)]
    assert {"params"} <= {row.name for row in exact}
    point = {name: options[-1] for name, options in variables.options.items()}
    problem = selection_problem(cost.graph, saliency_of(cost), exact, {r.name: 1e9 for r in exact}, variables, point)
    rng = np.random.default_rng(0)
    tried = 0
    while tried < 30:
        choice = {name: int(rng.integers(count)) for name, count in problem.variables.items()}
        if max(problem.cost_of(choice).values()) == np.inf:
            continue
        tried += 1
        gone = [b for b, carrier in variables.carrier.items() if variables.widths(carrier)[choice[carrier]] == 0]
        widths = {g: variables.widths(g)[choice[g]] or options[-1] for g, options in variables.options.items()}
        for row in exact:
            assert problem.cost_of(choice)[row.name] == pytest.approx(row.predict(widths, gone)[0])


@pytest.mark.parametrize("net", [Residual, Nested])
def test_two_budgets_are_kept_as_by_trying_every_network(net: type[nn.Module]) -> None:
    cost = cost_of(net())
    saliency = saliency_of(cost)
    params = params_row(cost.graph, 1.0)
    networks = [
        (cost.predict(w, d).us, params.predict(w, d)[0], value(cost, saliency, w, d)) for w, d in everything(cost)
    ]
    dense_us, binding = cost.predict({}).us, set()
    for latency, share in ((0.9, 0.3), (0.4, 0.9), (0.5, 0.4), (0.3, 0.3)):
        row = replace(params, limit=share * params.dense)
        best = max(v for us, count, v in networks if us <= latency * dense_us and count <= row.limit)
        choice = choose(cost, saliency, latency * dense_us, others=(row,))
        time, count = choice.spent
        assert time.value <= latency * dense_us * (1 + 1e-9) and count.value <= row.limit
        assert choice.solution.value == pytest.approx(best, rel=1e-4)
        binding.add(choose(cost, saliency, latency * dense_us).solution.value > best * (1 + 1e-4))
    assert binding == {True, False}, "the parameters bind in some cases, the latency alone in others"


def with_again(cost: CostModel, name: str) -> CostModel:
    """Another device: one layer runs twice there."""
    (unit,) = (unit for unit in cost.units if unit.name == name)
    return replace(cost, units=(*cost.units, replace(unit, name=f"{name} again")))


def test_two_devices_each_keep_their_budget() -> None:
    """The second device runs the tail twice; its budget takes channels from the tail that the first would keep."""
    cost = cost_of(Residual())
    other = with_again(cost, "tail")
    saliency = saliency_of(cost)
    networks = [
        (cost.predict(w, d).us, other.predict(w, d).us, value(cost, saliency, w, d)) for w, d in everything(cost)
    ]
    here, there = 0.8 * cost.predict({}).us, 0.55 * other.predict({}).us
    (row,) = rows_of([parse_wanted("0.55x@other")], cost, {"other": other}, batch=1)
    assert (row.of, row.name) == ("other", "latency_us@other") and row.limit == pytest.approx(there)
    choice = choose(cost, saliency, here, others=(row,))
    assert [spent.value for spent in choice.spent] == [
        cost.predict(choice.widths, choice.dropped).us,
        other.predict(choice.widths, choice.dropped).us,
    ]
    assert choice.spent[0].value <= here * (1 + 1e-9) and choice.spent[1].value <= there * (1 + 1e-9)
    best = max(v for a, b, v in networks if a <= here and b <= there)
    assert choice.solution.value == pytest.approx(best, rel=1e-4)


def test_devices_with_other_steps_get_the_coarser_widths() -> None:
    cost = cost_of(Residual())
    group = next(iter(cost.options))
    coarse = replace(cost, options={**cost.options, group: (16, 32)})
    assert set(cost.options[group]) > {16, 32}, "steps of 8 and a half of it"
    for one, costs in (with_common_options(cost, {"b": coarse}), with_common_options(coarse, {"b": cost})):
        assert one.options[group] == costs["b"].options[group] == (16, 32)
    assert with_common_options(cost, {}) == (cost, {})


def test_budgets_that_exclude_one_another_are_told_together() -> None:
    cost = cost_of(Residual())
    saliency = saliency_of(cost)
    row = params_row(cost.graph, 1.0)
    with pytest.raises(BudgetError, match=r"can't be met together: .* of .* ms, .* of 1 parameters"):
        choose(cost, saliency, cost.predict({}).us, others=(row,))


def test_macs_of_the_dense_network_are_counted_from_its_units() -> None:
    graph = trace(Residual(), (torch.zeros(1, 3, 24, 24),))
    assert len(graph.groups) == 3
    cost = cost_of(Residual())
    by_hand = 24 * 24 * (32 * 3 * 9 + 48 * 32 * 9 + 32 * 48) + 22 * 22 * 24 * 32 * 9 + 24 * 10
    assert macs_row(cost, 1.0).dense == by_hand
