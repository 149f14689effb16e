"""Choose widths and blocks: a problem for the solver from saliency and cost model, and a plan from its solution.

Every group is a variable whose options are its widths, ascending. A block is *gone* when it or a block around it is
dropped. The groups of a block (inside of it and of no block within it) say so: one more option 0 of each, tied to one
another; a block without such groups has a variable of its own. Where a block is gone those within it are forbidden to
stay, so that nested blocks cost pairwise factors only and the choice among all of them is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.budget import Budget, parse_budget
from edgeprune.cost import CostModel
from edgeprune.data import as_data
from edgeprune.errors import BudgetError
from edgeprune.fusion import Unit
from edgeprune.graph import Block, ModelGraph
from edgeprune.graph.structure import Indices
from edgeprune.plan_json import Plan
from edgeprune.saliency import Saliency, score
from edgeprune.solve import Factor, Problem, Solution, solve
from edgeprune.surgery import positions_of

FloatArray = npt.NDArray[np.float64]

LATENCY = "latency_us"
ROUNDS = 8
"""How often costs of concatenations are tabulated anew around the last answer before the best one is taken."""
ROUNDING = 1e-9
"""What sums in another order may differ by: a budget of exactly the dense latency keeps the dense network."""
DAMPING = 0.7
"""Share of the miss by which the solver's limit is moved for the next of these rounds."""


def plan(
    graph: ModelGraph,
    cost: CostModel,
    *,
    budget: str | Budget,
    saliency: str | Saliency = "taylor",
    data: object = None,
    seed: int = 0,
    normalise: str | None = None,
) -> Plan:
    """The plan of highest value whose predicted latency is inside the budget; a ratio is of the dense prediction.

    `saliency` is a criterion's name or its result, `data` what the criterion looks at (batches x or (x, y)),
    `normalise` how its values are made to compare across groups, the criterion's own way unless told.
    `BudgetError` where even the least network is predicted slower. Nothing is measured here.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    if isinstance(saliency, str):
        samples = None if data is None else as_data(data)
        saliency = score(saliency, graph, graph.model, samples, seed=seed, normalise=normalise)
    batch = next(node.shape[0] for node in graph.nodes if node.operator == "placeholder")
    target_us = budget.limit_ms(cost.predict({}).us / 1e3, batch=batch) * 1e3
    choice = choose(cost, saliency, target_us)
    notes = {"budget": str(budget), "saliency": saliency.criterion, "seed": seed, **describe_choice(cost, choice)}
    return plan_from(choice, graph, saliency, notes)


def describe_choice(cost: CostModel, choice: Choice) -> dict[str, Any]:
    """What a plan says about the prediction it was chosen by."""
    return {
        "origin": f"predicted from {cost.origin} kernels",
        "predicted_ratio": round(choice.predicted_us / cost.predict({}).us, 4),
        "solver_gap": float(f"{choice.solution.gap:.2g}"),
        "exact_cost": choice.exact_cost,
    }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the solver chose: widths of the groups, blocks dropped, the solution with its bound.

    `exact_cost` is false where a unit reads a sum of groups (a concatenation), whose cost was tabulated around the
    answer to first order; the answer itself was checked against the cost model.
    """

    widths: Mapping[str, int]
    dropped: tuple[str, ...]
    predicted_us: float
    error_us: float
    solution: Solution
    exact_cost: bool


@dataclass(frozen=True, kw_only=True)
class Variables:
    """Option 0 of a group inside a block means "gone"; `carrier[block]` is the variable that says whether it stays.

    `block_of[group]` is the smallest block that the group is inside of.
    """

    options: Mapping[str, tuple[int, ...]]
    block_of: Mapping[str, str]
    carrier: Mapping[str, str]

    def count(self, variable: str) -> int:
        """Number of options of a variable."""
        if variable not in self.options:
            return 2
        return len(self.options[variable]) + (variable in self.block_of)

    def widths(self, variable: str) -> tuple[int, ...]:
        """Width under each option; 0 where gone."""
        own = self.options.get(variable, (0, 1)) if variable not in self.options else self.options[variable]
        return (0, *own) if variable in self.block_of else own


def choose(cost: CostModel, saliency: Saliency, target_us: float) -> Choice:
    """The most valuable widths and blocks whose predicted latency is at most `target_us`.

    Deterministic. `BudgetError` where even the least network is slower: with the least latency in reach and the
    layers that set the floor.
    """
    variables = _variables(cost)
    wide = any(_is_wide(unit, cost, variables) for unit in cost.units)
    point = {name: options[-1] for name, options in cost.options.items()}
    best: Choice | None = None
    limit, dropped = target_us * (1 + ROUNDING / 2), tuple[str, ...]()
    for _ in range(ROUNDS if wide else 1):
        problem = latency_problem(cost, saliency, limit, point)
        solution = solve(problem)
        if not solution.choice:
            break
        choice = _read(cost, variables, solution, exact=not wide)
        if choice.predicted_us <= target_us * (1 + ROUNDING):
            if best is None or solution.value > best.solution.value:
                best = choice
            if choice.widths == point and choice.dropped == dropped:
                break
        elif not wide:
            break
        point, dropped = dict(choice.widths), choice.dropped
        limit = max(0.5 * limit, limit + DAMPING * (target_us - choice.predicted_us))
    if best is None:
        raise BudgetError(_out_of_reach(cost, variables, saliency, target_us))
    return best


def plan_from(choice: Choice, graph: ModelGraph, saliency: Saliency, notes: Mapping[str, Any]) -> Plan:
    """Keep the most valuable channels of every group; ties go to the lower index."""
    hidden = {name for block in graph.blocks if block.id in choice.dropped for name in block.inside}
    kept = {}
    for group in graph.groups:
        width = choice.widths[group.id]
        if width < group.num_channels and group.id not in hidden:
            kept[group.id] = positions_of(graph, group.id, best_channels(saliency.channels[group.id], width))
    return Plan(structure_hash=graph.structure_hash, kept=kept, dropped=choice.dropped, notes=notes)


def best_channels(values: FloatArray, width: int) -> Indices:
    """The `width` most valuable channels, ascending."""
    order = np.lexsort((np.arange(len(values)), -values))
    return np.sort(order[:width]).astype(np.int64)


def latency_problem(cost: CostModel, saliency: Saliency, limit_us: float, point: Mapping[str, int]) -> Problem:
    """The selection problem in the solver's form; `point` is where concatenations are tabulated."""
    variables = _variables(cost)
    counts = {group: variables.count(group) for group in variables.options}
    counts |= {name: 2 for name in variables.carrier.values() if name not in counts}
    constant = "(fixed)"
    counts[constant] = 1
    factors = [*_value_factors(cost, saliency, variables), *_tie_factors(cost, variables)]
    fixed = cost.overhead_us
    for unit in cost.units:
        tables, rest = _cost_tables(unit, cost, variables, point)
        fixed += rest
        factors += [
            Factor(variables=names, value=np.zeros_like(table), cost={LATENCY: table}) for names, table in tables
        ]
    factors.append(Factor(variables=(constant,), value=np.zeros(1), cost={LATENCY: np.array([fixed])}))
    return Problem(variables=counts, budgets={LATENCY: limit_us}, factors=factors)


def _variables(cost: CostModel) -> Variables:
    graph = cost.graph
    own = {block.id: _own_groups(block, graph) for block in graph.blocks}
    carrier = {name: groups[0] if groups else f"block {name}" for name, groups in own.items()}
    return Variables(options=cost.options, block_of=graph.block_of, carrier=carrier)


def _own_groups(block: Block, graph: ModelGraph) -> tuple[str, ...]:
    """The groups inside the block and inside no block within it."""
    return tuple(group for group in block.inside if graph.block_of[group] == block.id)


def _value_factors(cost: CostModel, saliency: Saliency, variables: Variables) -> Iterator[Factor]:
    """A width is worth its most valuable channels; a block what its drop costs beyond what is inside of it."""
    worth: dict[str, FloatArray] = {}
    for group, options in cost.options.items():
        ranked = np.cumsum(np.sort(saliency.channels[group])[::-1])
        values = ranked[np.array(options) - 1]
        worth[group] = np.concatenate([[0.0], values]) if group in variables.block_of else values
    for block, extra in block_extras(cost.graph, saliency).items():
        staying = worth.setdefault(variables.carrier[block], np.zeros(2))
        staying[1:] += extra
    for name, values in worth.items():
        yield Factor(variables=(name,), value=values)


def block_extras(graph: ModelGraph, saliency: Saliency) -> dict[str, float]:
    """What each block is worth beyond what is inside of it, at least 0: its channels, and the blocks within it."""
    inside = {
        block.id: sum(float(saliency.channels[group].sum()) for group in _own_groups(block, graph))
        for block in graph.blocks
    }
    extras = {}
    for block in sorted(graph.blocks, key=lambda block: len(block.nodes)):
        extras[block.id] = max(0.0, saliency.blocks.get(block.id, 0.0) - inside[block.id])
        if block.within is not None:
            inside[block.within] += inside[block.id] + extras[block.id]
    return extras


def _tie_factors(cost: CostModel, variables: Variables) -> Iterator[Factor]:
    """All groups of a block are gone together, or none is; no block stays within one that is gone."""
    for block in cost.graph.blocks:
        first, *others = _own_groups(block, cost.graph) or ("",)
        for other in others:
            table = np.zeros((variables.count(first), variables.count(other)))
            table[0, 1:] = table[1:, 0] = np.inf
            yield Factor(variables=(first, other), value=np.zeros_like(table), cost={LATENCY: table})
        if block.within is not None:
            pair = (variables.carrier[block.within], variables.carrier[block.id])
            table = np.zeros(tuple(variables.count(name) for name in pair))
            table[0, 1:] = np.inf
            yield Factor(variables=pair, value=np.zeros_like(table), cost={LATENCY: table})


def _unit_block(unit: Unit, cost: CostModel) -> Block | None:
    """The smallest block that takes the unit with it: gone whenever one around it is."""
    return min(
        (block for block in cost.graph.blocks if unit.nodes & block.nodes),
        key=lambda block: len(block.nodes),
        default=None,
    )


def _scope(unit: Unit, cost: CostModel, variables: Variables) -> tuple[str, ...]:
    """Variables that decide the unit's cost: its groups, and its block's where none of them says that it is gone."""
    names = unit.groups
    block = _unit_block(unit, cost)
    if block is not None and not any(variables.block_of.get(name) == block.id for name in names):
        names = (*names, variables.carrier[block.id])
    return names


def _is_wide(unit: Unit, cost: CostModel, variables: Variables) -> bool:
    """Whether the unit depends on too many variables for one table: two widths and a block are the most."""
    most = 2 if _unit_block(unit, cost) is None else 3
    return len(_scope(unit, cost, variables)) > most


def _cost_tables(
    unit: Unit, cost: CostModel, variables: Variables, point: Mapping[str, int]
) -> tuple[list[tuple[tuple[str, ...], FloatArray]], float]:
    """Tables of a unit's latency over its variables, and what it costs whatever is chosen."""
    names = _scope(unit, cost, variables)
    if not names:
        return [], float(cost.unit_us(unit, [{}])[0])
    if _is_wide(unit, cost, variables):
        return _first_order(unit, cost, variables, point)
    return [(names, _full_table(unit, cost, variables, names))], 0.0


def _full_table(unit: Unit, cost: CostModel, variables: Variables, names: tuple[str, ...]) -> FloatArray:
    shape = tuple(variables.count(name) for name in names)
    points, gone = [], []
    for index in np.ndindex(*shape):
        kept = {name: variables.widths(name)[i] for name, i in zip(names, index, strict=True)}
        is_gone = any(kept[name] == 0 for name in names)
        gone.append(is_gone)
        full = {name: max(1, width) for name, width in kept.items()}
        if is_gone:
            full = {name: variables.widths(name)[-1] for name in names}
        points.append(full)
    us = np.where(gone, 0.0, cost.unit_us(unit, points))
    return us.reshape(shape)


def _first_order(
    unit: Unit, cost: CostModel, variables: Variables, point: Mapping[str, int]
) -> tuple[list[tuple[tuple[str, ...], FloatArray]], float]:
    """Around `point`: the latency there, and what moving one group alone adds; nothing once its block is gone."""
    here = float(cost.unit_us(unit, [point])[0])
    tables: list[tuple[tuple[str, ...], FloatArray]] = []
    block = _unit_block(unit, cost)
    carrier = "" if block is None else variables.carrier[block.id]
    for name in unit.groups:
        moved = [{**point, name: width or point[name]} for width in variables.widths(name)]
        added = cost.unit_us(unit, moved) - here
        if block is None or variables.block_of.get(name) == block.id:
            tables.append(((name,), added))
        else:
            tables.append(((name, carrier), np.outer(added, _stays(carrier, variables))))
    if block is None:
        return tables, here
    return [*tables, ((carrier,), here * _stays(carrier, variables))], 0.0


def _stays(carrier: str, variables: Variables) -> FloatArray:
    """0 for the option of a carrier that drops its block, 1 for the others."""
    return np.array([float(width > 0) for width in variables.widths(carrier)])


def _read(cost: CostModel, variables: Variables, solution: Solution, *, exact: bool) -> Choice:
    """The chosen network; of nested blocks that are gone the outermost is dropped."""
    gone = [
        block
        for block, carrier in variables.carrier.items()
        if variables.widths(carrier)[solution.choice[carrier]] == 0
    ]
    dropped = tuple(sorted(block.id for block in cost.graph.outermost(gone)))
    widths = {}
    for group in cost.options:
        width = variables.widths(group)[solution.choice[group]]
        widths[group] = width or cost.options[group][-1]
    prediction = cost.predict(widths, dropped)
    return Choice(
        widths=widths,
        dropped=dropped,
        predicted_us=prediction.us,
        error_us=prediction.error_us,
        solution=solution,
        exact_cost=exact,
    )


def least_choice(cost: CostModel, saliency: Saliency) -> Choice:
    """The fastest network in reach."""
    variables = _variables(cost)
    point = {name: options[0] for name, options in cost.options.items()}
    solution = solve(latency_problem(cost, saliency, 1e-6, point))
    wide = any(_is_wide(unit, cost, variables) for unit in cost.units)
    return _read(cost, variables, solution, exact=not wide)


def dense_choice(cost: CostModel, saliency: Saliency) -> Choice:
    """Everything stays."""
    prediction = cost.predict({})
    value = sum(float(values.sum()) for values in saliency.channels.values())
    value += sum(block_extras(cost.graph, saliency).values())
    solution = Solution(
        feasible=True,
        choice={},
        value=value,
        cost={LATENCY: prediction.us},
        upper_bound=value,
        gap=0.0,
        least_ratio=0.0,
        status="solved",
        seconds=0.0,
    )
    return Choice(
        widths=dict(cost.graph.dense_widths),
        dropped=(),
        predicted_us=prediction.us,
        error_us=prediction.error_us,
        solution=solution,
        exact_cost=True,
    )


def floor_layers(cost: CostModel, choice: Choice, count: int = 3) -> list[str]:
    """The units that take most of a network's latency: `name (share)`."""
    gone = cost.vanishing(choice.dropped)
    us = {unit.name: float(cost.unit_us(unit, [choice.widths])[0]) for unit in cost.units if unit.name not in gone}
    total = sum(us.values()) + cost.overhead_us
    top: Sequence[str] = sorted(us, key=lambda name: (-us[name], name))[:count]
    return [f"{name} ({us[name] / total:.0%})" for name in top]


def _out_of_reach(cost: CostModel, variables: Variables, saliency: Saliency, target_us: float) -> str:
    least = least_choice(cost, saliency)
    return (
        f"the budget of {target_us / 1e3:.3g} ms can't be met: the least latency in reach is predicted "
        f"{least.predicted_us / 1e3:.3g} ms; the floor is set by {', '.join(floor_layers(cost, least))}"
    )
