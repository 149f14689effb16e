"""Scopes: one share for all, one for each layer's value, one for each structure, or no rule at all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeprune.budget_rows import params_row
from edgeprune.choosing import Rules, choose
from edgeprune.constraints import Constraints
from edgeprune.errors import BudgetError, InputError
from edgeprune.saliency import Saliency
from edgeprune.scopes import largest_share, shares_of, widths_at
from tests.test_planning import Residual, cost_of, saliency_of, value

pytestmark = pytest.mark.unit
OPTIONS = {"a": (2, 4), "b": (1, 2, 3)}
VALUES = Saliency(channels={"a": np.array([1.0, 5.0, 2.0, 2.0]), "b": np.array([8.0, 1.0, 1.0])}, blocks={})


def test_a_share_of_channels_and_a_share_of_value() -> None:
    uniform, local = (shares_of(scope, OPTIONS, VALUES) for scope in ("uniform", "local"))
    assert [uniform[g].tolist() for g in "ab"] == [[0.5, 1.0], pytest.approx([1 / 3, 2 / 3, 1.0])]
    assert [local[g].tolist() for g in "ab"] == [[0.7, 1.0], pytest.approx([0.8, 0.9, 1.0])]
    assert widths_at(0.5, OPTIONS, uniform) == {"a": 2, "b": 2}
    assert widths_at(0.7, OPTIONS, local) == {"a": 2, "b": 1}, "exactly the share is enough"
    assert widths_at(0.85, OPTIONS, local) == {"a": 4, "b": 2}


def test_a_layer_without_value_goes_by_its_channels() -> None:
    worthless = Saliency(channels={"a": np.zeros(4), "b": np.zeros(3)}, blocks={})
    found, uniform = (shares_of(scope, OPTIONS, worthless) for scope in ("local", "uniform"))
    assert all(np.array_equal(found[g], uniform[g]) for g in OPTIONS)


@given(st.integers(3, 8))
def test_the_largest_share_inside_is_found(total: int) -> None:
    """Where what is spent grows with every width."""

    def is_inside(widths: dict[str, int]) -> bool:
        return sum(widths.values()) <= total

    found = largest_share("uniform", OPTIONS, VALUES, is_inside)  # type: ignore[arg-type]
    assert found is not None
    shares = shares_of("uniform", OPTIONS, VALUES)
    inside = [s for s in (0.0, 1 / 3, 0.5, 2 / 3, 1.0) if is_inside(widths_at(s, OPTIONS, shares))]
    assert found[0] == pytest.approx(max(inside)) and sum(found[1].values()) <= total
    assert largest_share("uniform", OPTIONS, VALUES, lambda widths: False) is None


@pytest.mark.parametrize("scope", ["uniform", "local"])
def test_one_share_for_all_inside_every_budget_and_no_drop(scope: str) -> None:
    cost = cost_of(Residual())
    saliency = saliency_of(cost)
    dense_us = cost.predict({}).us
    rules = Rules(scope=scope)  # type: ignore[arg-type]
    row = params_row(cost.graph, 4000.0)
    best = choose(cost, saliency, 0.6 * dense_us, others=(row,))
    choice = choose(cost, saliency, 0.6 * dense_us, others=(row,), rules=rules)
    assert choice.predicted_us <= 0.6 * dense_us and choice.spent[1].value <= 4000
    assert choice.dropped == () and choice.gap is None and choice.proof == "by one share, nothing proven"
    assert choice.solution.value == pytest.approx(value(cost, saliency, dict(choice.widths), []))
    assert choice.solution.value < best.solution.value
    shares = shares_of(scope, cost.options, saliency)
    held = min(shares[g][cost.options[g].index(w)] for g, w in choice.widths.items())
    for group, width in choice.widths.items():
        narrower = cost.options[group][: cost.options[group].index(width)]
        assert all(shares[group][i] < held * (1 + 1e-9) for i in range(len(narrower))), "no wider than the share asks"
    with pytest.raises(BudgetError, match="floor is set by"):
        choose(cost, saliency, 0.01 * dense_us, rules=rules)
    with pytest.raises(InputError, match="drops no blocks"):
        choose(cost, saliency, 0.6 * dense_us, rules=Rules(scope=rules.scope, constraints=Constraints(only="blocks")))


class Twins(nn.Module):
    """Two blocks of one structure on one trunk, and a tail of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)
        self.a1, self.b1 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.a2, self.b2 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b1(torch.relu(self.a1(x)))
        x = x + self.b2(torch.relu(self.a2(x)))
        result: Tensor = self.head(torch.relu(self.tail(x)).mean((2, 3)))
        return result


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_of_one_structure_share_one_width_and_their_blocks_go_alone(seed: int) -> None:
    """The best of all networks whose two inner widths are the same wherever both blocks stay."""
    cost = cost_of(Twins())
    saliency = saliency_of(cost, seed)
    inner = ("a1.bias:0", "a2.bias:0")
    blocks = [block.id for block in cost.graph.blocks]
    assert {block.inside for block in cost.graph.blocks} == {(name,) for name in inner}
    networks = []
    for widths in product(*cost.options.values()):
        named = dict(zip(cost.options, widths, strict=True))
        if named[inner[0]] == named[inner[1]]:
            for drops in product((False, True), repeat=2):
                gone = [block for block, drop in zip(blocks, drops, strict=True) if drop]
                networks.append((cost.predict(named, gone).us, value(cost, saliency, named, gone)))
    seen = set()
    for share in (0.9, 0.6, 0.4, 0.25):
        target = share * cost.predict({}).us
        choice = choose(cost, saliency, target, rules=Rules(scope="isomorphic"))
        assert choice.widths[inner[0]] == choice.widths[inner[1]]
        assert choice.predicted_us <= target * (1 + 1e-9)
        assert choice.predicted_us == pytest.approx(choice.solution.cost["latency_us"])
        assert choice.solution.value == pytest.approx(max(v for us, v in networks if us <= target), rel=1e-4)
        assert choice.solution.value <= choose(cost, saliency, target).solution.value * (1 + 1e-4)
        seen.add(choice.dropped)
    assert len(seen) > 1, "blocks stay and go"
