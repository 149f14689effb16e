"""The choice of widths and blocks: the same as trying every network, and the same each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.backends.null import partition
from edgeprune.backends.null.staircase import time_us
from edgeprune.budget_rows import Piece, Points, Row
from edgeprune.choice import Choice, best_channels, dense_choice, floor_layers, plan_from
from edgeprune.choosing import choose, least_choice
from edgeprune.cost import CostModel, cost_model_from
from edgeprune.errors import BudgetError
from edgeprune.graph import Block, trace
from edgeprune.saliency import Saliency
from edgeprune.staircase import find_staircase, staircase_kernels
from edgeprune.surgery import apply
from edgeprune.units import kernels_at, width_options
from edgeprune.variables import FloatArray, block_extras

pytestmark = pytest.mark.unit


class Residual(nn.Module):
    """A stem, a residual block (groups: the trunk and one inside), a tail and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a, self.b = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 32, 1)
        self.tail, self.head = nn.Conv2d(32, 24, 3), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        result: Tensor = self.head(torch.relu(self.tail(x)).mean((2, 3)))
        return result


class OneLayerBranch(nn.Module):
    """A residual branch without a group of its own, between two widths that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.tail = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 24, 3)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        result: Tensor = self.head(self.tail(x + self.f(x)).mean((2, 3)))
        return result


class Concatenated(nn.Module):
    """Three branches side by side; the convolution behind them reads three groups and gives a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(16, width, 3, padding=1) for width in (16, 24, 32))
        self.join, self.head = nn.Conv2d(72, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.join(torch.cat([torch.relu(branch(x)) for branch in self.branches], 1))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class ConcatenatedInABranch(nn.Module):
    """Inception-ResNet's block: the concatenation lies inside of what may be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 10)
        self.branches = nn.ModuleList(nn.Conv2d(32, width, 3, padding=1) for width in (16, 24, 32))
        self.join = nn.Conv2d(72, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.join(torch.cat([branch(x) for branch in self.branches], 1))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class Nested(nn.Module):
    """x + g(x) with a branch of its own inside g; each has groups of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.before, self.after = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 1)
        self.a, self.b = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.before(x)
        x = x + self.after(y + self.b(torch.relu(self.a(y))))
        result: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return result


class Around(nn.Module):
    """x + f(x)."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.parts(x)
        return result


class NestedWithoutGroups(nn.Module):
    """Three branches in one another and one beside; only the innermost has a group, the others are one layer each."""

    def __init__(self) -> None:
        super().__init__()
        deepest = Around(nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 1))
        beside = Around(nn.Conv2d(24, 24, 3, padding=1))
        self.stem, self.head = nn.Conv2d(3, 24, 1), nn.Linear(24, 10)
        self.body = Around(Around(deepest, nn.Conv2d(24, 24, 1)), beside, nn.Conv2d(24, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.body(self.stem(x))).mean((2, 3)))
        return result


class ConcatenatedInNestedBranches(nn.Module):
    """The concatenation lies in a branch of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.branches = nn.ModuleList(nn.Conv2d(24, width, 3, padding=1) for width in (16, 24, 16))
        self.before, self.join, self.after = nn.Conv2d(16, 24, 1), nn.Conv2d(56, 24, 1), nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.before(x)
        y = y + self.join(torch.cat([branch(y) for branch in self.branches], 1))
        result: Tensor = self.head((x + self.after(y)).mean((2, 3)))
        return result


def cost_of(net: nn.Module, size: int = 24) -> CostModel:
    """Its cost on the null device, where every kernel's time is a formula."""
    graph = trace(net, (torch.zeros(1, 3, size, size),))
    units = partition(graph, "fp32")
    options = width_options(graph, units, {})
    table = {kernel: time_us(kernel) for kernel in (*kernels_at(units, options), *staircase_kernels("fp32"))}
    return cost_model_from(graph, units, options, table, origin="modelled", stairs=find_staircase(table, "fp32"))


def saliency_of(cost: CostModel, seed: int = 0) -> Saliency:
    rng = np.random.default_rng(seed)
    channels = {g.id: rng.exponential(size=g.num_channels) for g in cost.graph.groups}
    blocks = {b.id: 1.1 * sum(channels[g].sum() for g in b.inside) + 5.0 for b in cost.graph.blocks}
    return Saliency(channels=channels, blocks=blocks)


def value(cost: CostModel, saliency: Saliency, widths: dict[str, int], dropped: list[str]) -> float:
    """A width is worth its best channels; a block that stays what its drop costs beyond all that is inside."""
    hidden = {group for block in cost.graph.blocks if block.id in dropped for group in block.inside}
    kept = sum(np.sort(saliency.channels[g])[::-1][:w].sum() for g, w in widths.items() if g not in hidden)
    gone = [block.nodes for block in cost.graph.blocks if block.id in dropped]
    staying = [block for block in cost.graph.blocks if not any(block.nodes <= nodes for nodes in gone)]
    return float(kept + sum(worth(cost, saliency, b) - worth_inside(cost, saliency, b) for b in staying))


def worth(cost: CostModel, saliency: Saliency, block: Block) -> float:
    return max(saliency.blocks[block.id], worth_inside(cost, saliency, block))


def worth_inside(cost: CostModel, saliency: Saliency, block: Block) -> float:
    """Of the blocks directly within, and of the channels that are in none of them."""
    within = [other for other in cost.graph.blocks if other.within == block.id]
    own = set(block.inside).difference(*(other.inside for other in within))
    return float(sum(saliency.channels[g].sum() for g in own)) + sum(worth(cost, saliency, b) for b in within)


def everything(cost: CostModel) -> Iterator[tuple[dict[str, int], list[str]]]:
    for widths in product(*cost.options.values()):
        for drops in product((False, True), repeat=len(cost.graph.blocks)):
            dropped = [b.id for b, drop in zip(cost.graph.blocks, drops, strict=True) if drop]
            yield dict(zip(cost.options, widths, strict=True)), dropped


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("net", "drops"), [(Residual, 2), (OneLayerBranch, 2), (Nested, 3), (NestedWithoutGroups, 3)])
def test_the_choice_is_that_of_trying_every_network(net: type[nn.Module], drops: int, seed: int) -> None:
    cost = cost_of(net())
    saliency = saliency_of(cost, seed)
    networks = [(cost.predict(w, d).us, value(cost, saliency, w, d)) for w, d in everything(cost)]
    dense_us = cost.predict({}).us
    seen = set()
    for share in (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12):
        reachable = [v for us, v in networks if us <= share * dense_us]
        if not reachable:
            continue
        choice = choose(cost, saliency, share * dense_us)
        assert choice.exact_cost
        assert choice.predicted_us <= share * dense_us * (1 + 1e-9)
        assert choice.predicted_us == pytest.approx(choice.solution.cost["latency_us"])
        assert value(cost, saliency, dict(choice.widths), list(choice.dropped)) == pytest.approx(choice.solution.value)
        assert choice.solution.value >= max(reachable) * (1 - 1e-4)
        seen.add(choice.dropped)
    assert len(seen) >= drops, "blocks stay under the large budgets and go under the small ones"


@pytest.mark.parametrize("net", [Nested, NestedWithoutGroups])
def test_nested_blocks_of_any_value_are_chosen_as_by_trying_every_network(net: type[nn.Module]) -> None:
    cost = cost_of(net())
    networks = [(w, d, cost.predict(w, d).us) for w, d in everything(cost)]
    seen = set()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        channels = {g.id: 10 ** rng.uniform(-1, 1) * rng.exponential(size=g.num_channels) for g in cost.graph.groups}
        blocks = {b.id: rng.exponential(5.0) * len(b.nodes) for b in cost.graph.blocks}
        saliency = Saliency(channels=channels, blocks=blocks)
        target = rng.choice([0.07, 0.15, 0.3, 0.5, 0.7]) * cost.predict({}).us
        best = max(value(cost, saliency, w, d) for w, d, us in networks if us <= target)
        choice = choose(cost, saliency, target)
        assert choice.predicted_us <= target * (1 + 1e-9)
        assert choice.solution.value == pytest.approx(best, rel=1e-4)
        assert value(cost, saliency, dict(choice.widths), list(choice.dropped)) == pytest.approx(choice.solution.value)
        assert len(cost.graph.outermost(choice.dropped)) == len(choice.dropped), "no drop within another"
        seen.add(choice.dropped)
    assert len(seen) > len(cost.graph.blocks), "outer and inner blocks go, alone and beside one another"


def test_of_nested_blocks_that_go_the_outermost_is_named() -> None:
    cost = cost_of(Nested())
    inner, outer = cost.graph.blocks
    assert (inner.within, inner.inside) == (outer.id, ("a.bias:0",))
    assert set(outer.inside) == {"a.bias:0", "a.weight:1"}
    saliency = saliency_of(cost)
    least = least_choice(cost, saliency)
    assert least.dropped == (outer.id,)
    assert set(plan_from(least, cost.graph, saliency, {}).kept).isdisjoint(outer.inside)
    assert cost.vanishing([outer.id]) == cost.vanishing([inner.id, outer.id]) > cost.vanishing([inner.id])
    assert cost.predict({}, [outer.id]).us == cost.predict({}, [inner.id, outer.id]).us


def test_the_value_of_a_nested_block_is_counted_once() -> None:
    """Dropping the outer block of a network without a limit would lose its value, not the inner one's on top."""
    cost = cost_of(Nested())
    inner, outer = cost.graph.blocks
    channels = {g.id: np.full(g.num_channels, 1.0) for g in cost.graph.groups}
    saliency = Saliency(channels=channels, blocks={inner.id: 30.0, outer.id: 70.0})
    extras = block_extras(cost.graph, saliency)
    assert extras == {inner.id: 30.0 - 24.0, outer.id: 70.0 - (24.0 + 30.0)}
    assert dense_choice(cost, saliency).solution.value == 24.0 + 70.0, "the trunk and the outer block"
    undercut = Saliency(channels=channels, blocks={inner.id: 30.0, outer.id: 10.0})
    assert block_extras(cost.graph, undercut) == {inner.id: 6.0, outer.id: 0.0}


def test_a_dropped_block_takes_cost_and_value_along() -> None:
    cost = cost_of(Residual())
    (block,) = cost.graph.blocks
    saliency = saliency_of(cost)
    worthless = Saliency(
        channels={g: v * (1e-6 if g in block.inside else 1.0) for g, v in saliency.channels.items()},
        blocks={block.id: 0.0},
    )
    choice = choose(cost, worthless, 1.001 * cost.predict({}, [block.id]).us)
    assert choice.dropped == (block.id,)
    others = {g: v for g, v in worthless.channels.items() if g not in block.inside}
    assert choice.solution.value == pytest.approx(sum(v.sum() for v in others.values()))
    assert choice.predicted_us == pytest.approx(cost.predict({}, [block.id]).us)


def test_the_plan_keeps_the_best_channels_and_hides_what_is_dropped() -> None:
    cost = cost_of(Residual())
    (block,) = cost.graph.blocks
    saliency = saliency_of(cost)
    choice = least_choice(cost, saliency)
    assert choice.dropped == (block.id,)
    plan = plan_from(choice, cost.graph, saliency, {"why": "a test"})
    assert plan.dropped == (block.id,)
    assert set(plan.kept) == {g.id for g in cost.graph.groups} - set(block.inside)
    for group, kept in plan.kept.items():
        best = np.argsort(-saliency.channels[group])[: choice.widths[group]]
        assert kept == tuple(sorted(best.tolist()))


def test_ties_go_to_the_lower_channel() -> None:
    assert best_channels(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_out_of_reach_names_the_floor() -> None:
    cost = cost_of(Residual())
    saliency = saliency_of(cost)
    least = least_choice(cost, saliency)
    assert least.predicted_us == pytest.approx(min(cost.predict(w, d).us for w, d in everything(cost)))
    choose(cost, saliency, 1.0001 * least.predicted_us)
    with pytest.raises(BudgetError) as caught:
        choose(cost, saliency, 0.99 * least.predicted_us)
    assert caught.value.exit_code == 3
    top = floor_layers(cost, least)
    assert str(caught.value).endswith(f"the floor is set by {', '.join(top)}")
    assert top[0].startswith("stem (")


@pytest.mark.parametrize("net", [Residual, Concatenated])
def test_the_same_plan_byte_for_byte(net: type[nn.Module], tmp_path: Path) -> None:
    written = []
    for number in range(2):
        torch.manual_seed(number)
        cost = cost_of(net())
        saliency = saliency_of(cost)
        choice = choose(cost, saliency, 0.6 * cost.predict({}).us)
        path = tmp_path / f"{number}.json"
        plan_from(choice, cost.graph, saliency, {"predicted_us": choice.predicted_us}).to_json(path)
        written.append(path.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("net", [Concatenated, ConcatenatedInABranch, ConcatenatedInNestedBranches])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.45])
def test_behind_a_concatenation_the_answer_is_checked_by_the_cost_model(net: type[nn.Module], share: float) -> None:
    cost = cost_of(net())
    saliency = saliency_of(cost)
    target = share * cost.predict({}).us
    choice = choose(cost, saliency, target)
    assert not choice.exact_cost
    assert choice.predicted_us == cost.predict(choice.widths, choice.dropped).us
    assert choice.predicted_us <= target * (1 + 1e-9)
    best = max(value(cost, saliency, w, d) for w, d in everything(cost) if cost.predict(w, d).us <= target)
    assert choice.solution.value >= 0.98 * best, "first order, tabulated anew around each answer"


@pytest.mark.parametrize("net", [Concatenated, ConcatenatedInABranch, ConcatenatedInNestedBranches])
def test_behind_a_concatenation_no_width_can_grow_alone_and_the_floor_is_reached(net: type[nn.Module]) -> None:
    cost = cost_of(net())
    networks = [(w, d, cost.predict(w, d).us) for w, d in everything(cost)]
    for seed, share in product((0, 1, 2), (0.7, 0.55, 0.42)):
        saliency, target = saliency_of(cost, seed), share * cost.predict({}).us
        choice = choose(cost, saliency, target)
        best = max(value(cost, saliency, w, d) for w, d, us in networks if us <= target)
        assert choice.predicted_us <= target and choice.solution.value >= 0.98 * best
        hidden = {group for block in cost.graph.blocks if block.id in choice.dropped for group in block.inside}
        for group in set(cost.options) - hidden:
            wider = [{**choice.widths, group: w} for w in cost.options[group] if w > choice.widths[group]]
            assert all(cost.predict(widths, choice.dropped).us > target for widths in wider)
    saliency, floor = saliency_of(cost), min(us for _, _, us in networks)
    assert choose(cost, saliency, 1.0001 * floor).predicted_us == pytest.approx(floor)
    with pytest.raises(BudgetError, match="the least latency in reach"):
        choose(cost, saliency, 0.9999 * floor)


def test_the_least_network_is_the_start_where_no_answer_of_tables_fits() -> None:
    """A peak is a maximum: tables around the dense network say that narrowing one branch alone takes nothing away."""
    cost = cost_of(Concatenated())
    saliency = saliency_of(cost)
    branches = tuple(group for group in cost.options if group.startswith("branches"))

    def widest(points: Points) -> FloatArray:
        return np.array([float(max(widths[group] for group in branches)) for widths in points])

    peak = Row(
        name="peak",
        of="peak",
        unit="MACs",
        limit=16.0,
        dense=32.0,
        pieces=(Piece(groups=branches, gone_with=frozenset(), at=widest),),
        predict=lambda widths, dropped: (float(widest([widths])[0]), 0.0),
    )
    target = 0.8 * cost.predict({}).us
    choice = choose(cost, saliency, target, others=(peak,))
    assert max(choice.widths[group] for group in branches) <= 16
    fitting = [(w, d) for w, d in everything(cost) if max(w[group] for group in branches) <= 16]
    best = max(value(cost, saliency, w, d) for w, d in fitting if cost.predict(w, d).us <= target)
    assert choice.solution.value >= 0.98 * best


def test_tables_that_miss_the_prediction_by_a_trifle_are_no_budget_out_of_reach() -> None:
    """The widest option just fits by the tables and just doesn't by the prediction: the next one is the answer."""
    cost = cost_of(Residual())
    group = next(iter(cost.options))
    *_, narrower, limit, _ = cost.options[group]

    def tabled(points: Points) -> FloatArray:
        return np.array([float(widths[group]) for widths in points])

    width = Row(
        name="width",
        of="width",
        unit="MACs",
        limit=float(limit),
        dense=32.0,
        pieces=(Piece(groups=(group,), gone_with=frozenset(), at=tabled),),
        predict=lambda widths, dropped: (float(tabled([widths])[0]) * (1 + 5e-5), 0.0),
    )
    choice = choose(cost, saliency_of(cost), cost.predict({}).us, others=(width,))
    assert choice.widths[group] == narrower and choice.fits


def test_a_budget_that_no_table_knows_of_is_held_by_what_is_predicted() -> None:
    """All channels together, counted when a network is judged and in no table: steps from the least network on."""
    cost = cost_of(Concatenated())
    saliency = saliency_of(cost)

    def total(widths: Mapping[str, int], dropped: Iterable[str]) -> tuple[float, float]:
        return float(sum(widths[group] for group in cost.options)), 0.0

    least = total({group: options[0] for group, options in cost.options.items()}, ())[0]
    unseen = Row(name="channels", of="channels", unit="MACs", limit=least + 24, dense=120.0, pieces=(), predict=total)
    target = 0.9 * cost.predict({}).us
    choice = choose(cost, saliency, target, others=(unseen,))
    assert total(choice.widths, ())[0] <= least + 24
    for group in cost.options:
        wider = [{**choice.widths, group: w} for w in cost.options[group] if w > choice.widths[group]]
        assert all(total(w, ())[0] > least + 24 or cost.predict(w).us > target for w in wider)


@pytest.mark.parametrize(("net", "groups"), [(ConcatenatedInABranch, 3), (ConcatenatedInNestedBranches, 4)])
def test_a_concatenation_in_a_dropped_branch_costs_nothing(net: type[nn.Module], groups: int) -> None:
    cost = cost_of(net())
    *_, block = cost.graph.blocks
    assert len(block.inside) == groups
    choice = least_choice(cost, saliency_of(cost))
    assert choice.dropped == (block.id,)
    assert choice.solution.cost["latency_us"] == pytest.approx(choice.predicted_us)


def test_the_chosen_network_has_the_chosen_widths() -> None:
    net, x = Residual(), (torch.zeros(1, 3, 24, 24),)
    cost = cost_of(net)
    saliency = saliency_of(cost)
    choice: Choice = choose(cost, saliency, 0.6 * cost.predict({}).us)
    module = apply(plan_from(choice, cost.graph, saliency, {}), net, x).module
    for unit in cost.units:
        if unit.dense.operator in ("conv", "linear") and unit.name not in cost.vanishing(choice.dropped):
            kernel = unit.kernel(choice.widths)
            assert module.get_parameter(f"{unit.name}.weight").shape[:2] == (kernel.c_out, kernel.c_in)
