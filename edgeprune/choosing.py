"""Choose widths and blocks: a problem for the solver from saliency and budget rows, and what its solution means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.budget_rows import ROUNDING, Row, Spent, latency_row
from edgeprune.choice import Choice, floor_layers, unsolved_choice
from edgeprune.climbing import Options, climbed
from edgeprune.constraints import NONE, Constraints
from edgeprune.cost import CostModel
from edgeprune.errors import BudgetError, InputError
from edgeprune.formats import formats_of
from edgeprune.graph import ModelGraph
from edgeprune.saliency import Saliency
from edgeprune.scopes import BISECTED, Scope, largest_share
from edgeprune.solve import Factor, Problem, Solution, solve
from edgeprune.variables import (
    Reached,
    Variables,
    block_extras,
    tie_factors,
    value_factors,
    variables_of,
)

ROUNDS = 8
"""How often costs are tabulated anew around the last answer, at most, to find where to climb from."""
SETTLED = 1e-4
"""Tables that come this close to the prediction of their own answer need no other round."""
DAMPING = 0.7
"""Share of what is left by which the solver's limit is raised for the next of these rounds."""
MARGIN = 2e-3
"""Share of the budget by which the limit is lowered beyond a miss, so that the rounds come to fit, not only near."""
OUT_OF_REACH = 1e-6
"""Share of each limit that nothing meets: then the solver tells which network comes nearest to all of them."""
BINDING = 0.95
"""A row whose tables come to less of its limit does not bind; of several rows, only those that do are moved."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How to choose, beside what for: constraints, scope, and a network that nothing may grow back from."""

    constraints: Constraints = NONE
    scope: Scope = "global"
    after: Reached | None = None

    def variables(self, cost: CostModel) -> Variables:
        """The variables that remain under these rules."""
        return variables_of(cost, self.constraints, after=self.after, is_tied=self.scope == "isomorphic")


FREELY = Rules()


def choose(
    cost: CostModel,
    saliency: Saliency,
    target_us: float,
    *,
    others: Sequence[Row] = (),
    rules: Rules = FREELY,
    start: Choice | None = None,
) -> Choice:
    """The most valuable widths and blocks whose predicted latency is at most `target_us`, inside the `others` too.

    `start` is a choice for a near target under the same rules; it saves time and nothing else. Deterministic.
    `BudgetError` where even the least network is outside: with the least latency in reach and the layers that set the
    floor.
    """
    rows = (latency_row(cost, target_us), *others)
    if rules.scope in BISECTED:
        return _bisected(cost, saliency, rows, rules)
    best = _approached(cost, saliency, rows, rules, start)
    if best.fits and not best.is_settled:
        best = _climbed(cost, saliency, rows, rules, best)
    if not best.fits:
        raise BudgetError(_out_of_reach(cost, saliency, rows, rules))
    return best


def _widest(variables: Variables) -> dict[str, int]:
    return {name: options[-1] for name, options in variables.options.items()}


def _limits(rows: Sequence[Row]) -> dict[str, float]:
    return {row.name: row.limit * (1 + ROUNDING / 2) for row in rows}


def _tabulated(
    cost: CostModel,
    saliency: Saliency,
    rows: Sequence[Row],
    limits: Mapping[str, float],
    variables: Variables,
    point: Reached,
) -> Problem:
    """The selection problem with the costs around a network."""
    near = [row.near(point.widths, point.dropped) for row in rows]
    return selection_problem(cost.graph, saliency, near, limits, variables, point.widths)


def _approached(cost: CostModel, saliency: Saliency, rows: Sequence[Row], rules: Rules, start: Choice | None) -> Choice:
    """The best that fits of some answers, each of tables around the one before; the least network where none does.

    One that is settled, if the tables around some answer say of theirs what is predicted: nothing is better there.
    """
    variables = rules.variables(cost)
    is_wide = any(row.is_wide(variables) for row in rows)
    point, limits, found = Reached(widths=_widest(variables), dropped=()), _limits(rows), list[Choice]()
    for _ in range(ROUNDS):
        solution = _solved(_tabulated(cost, saliency, rows, limits, variables, point), start)
        if not solution.choice:
            break
        near = all(limits[row.name] >= (1 - 2 * SETTLED) * row.limit for row in rows)
        choice = start = _read(cost, rows, variables, solution, exact=near and not is_wide)
        found.append(choice)
        if choice.is_settled and choice.fits:
            return choice
        if choice.fits and choice.reached == point:
            break
        point = choice.reached
        if is_wide:
            limits |= {spent.row.name: _moved(spent, solution, limits, len(rows)) for spent in choice.spent}
        else:  # what the tables told may miss the prediction by a trifle: as much less is asked of them
            limits |= {
                spent.row.name: limits[spent.row.name] * spent.row.limit / spent.value * (1 - ROUNDING)
                for spent in choice.spent
                if not spent.fits
            }
    fitting = [choice for choice in found if choice.fits]
    return max(fitting, key=lambda choice: choice.solution.value, default=None) or _nearest(cost, saliency, rows, rules)


def _climbed(cost: CostModel, saliency: Saliency, rows: Sequence[Row], rules: Rules, start: Choice) -> Choice:
    """The best network near a start, judged by the whole prediction; the start where that does not fit."""
    variables = rules.variables(cost)

    def tabulated(options: Options) -> Problem:
        widths, dropped = _network(cost.graph, variables, options)
        point = Reached(widths=widths, dropped=dropped)
        return _tabulated(cost, saliency, rows, _limits(rows), variables, point)

    def fits(options: Options) -> bool:
        widths, dropped = _network(cost.graph, variables, options)
        return all(row.spent(widths, dropped).fits for row in rows)

    if not start.fits:
        return start
    gone = [name for name in variables.counts() if variables.widths(name)[0] == 0]
    return _read(cost, rows, variables, climbed(start.solution.choice, tabulated, fits, gone), exact=False)


def _moved(spent: Spent, solution: Solution, limits: Mapping[str, float], rows: int) -> float:
    """The limit of a row for the next round: moved by the miss of its prediction."""
    limit, target = limits[spent.row.name], spent.row.limit
    if rows > 1 and spent.value <= target and solution.cost[spent.row.name] < BINDING * limit:
        return limit
    missed = target - spent.value
    return max(0.5 * limit, limit + (DAMPING * missed if missed >= 0 else missed - MARGIN * target))


def _solved(problem: Problem, start: Choice | None) -> Solution:
    """From the start's options where they are of the same problem."""
    options = {} if start is None else start.solution.choice
    known = set(options) == set(problem.variables) and all(o < problem.variables[name] for name, o in options.items())
    return solve(problem, start=[options] if known else ())


def check_scope(scope: Scope, constraints: Constraints) -> None:
    """`InputError` where the constraints leave a scope nothing to choose."""
    if scope in BISECTED and constraints.only == "blocks":
        raise InputError(f"scope {scope} drops no blocks: it can't choose among blocks alone")


def _bisected(cost: CostModel, saliency: Saliency, rows: Sequence[Row], rules: Rules) -> Choice:
    """One share for all groups, the largest inside every row."""
    check_scope(rules.scope, rules.constraints)
    variables = rules.variables(cost)

    def is_inside(widths: Mapping[str, int]) -> bool:
        return all(row.spent(widths).fits for row in rows)

    options = {name: widths for name, widths in variables.options.items() if name not in variables.formats}
    found = largest_share(rules.scope, options, saliency, is_inside)
    if found is None:
        raise BudgetError(_out_of_reach(cost, saliency, rows, rules))
    return _unproven(cost, saliency, rows, found[1])


def _unproven(cost: CostModel, saliency: Saliency, rows: Sequence[Row], widths: Mapping[str, int]) -> Choice:
    value = sum(float(np.sort(saliency.channels[g])[::-1][:width].sum()) for g, width in widths.items())
    value += sum(block_extras(cost.graph, saliency).values())
    return unsolved_choice(rows, widths, value, is_best=False)


def selection_problem(
    graph: ModelGraph,
    saliency: Saliency,
    rows: Sequence[Row],
    limits: Mapping[str, float],
    variables: Variables,
    point: Mapping[str, int],
) -> Problem:
    """The selection problem in the solver's form; `point` is where concatenations are tabulated."""
    constant = "(fixed)"
    factors = [*value_factors(graph, saliency, variables), *tie_factors(variables, rows[0].name)]
    fixed = {}
    for row in rows:
        fixed[row.name] = row.fixed
        for piece in row.pieces:
            tables, rest = piece.tables(variables, point)
            fixed[row.name] += rest
            factors += [
                Factor(variables=names, value=np.zeros_like(table), cost={row.name: table}) for names, table in tables
            ]
    staying = sum(extra for block, extra in block_extras(graph, saliency).items() if block not in variables.carrier)
    costs = {name: np.array([rest]) for name, rest in fixed.items()}
    factors.append(Factor(variables=(constant,), value=np.array([staying]), cost=costs))
    return Problem(variables={**variables.counts(), constant: 1}, budgets=dict(limits), factors=factors)


def _network(graph: ModelGraph, variables: Variables, options: Options) -> tuple[dict[str, int], tuple[str, ...]]:
    """Widths and dropped blocks under these options; of nested blocks that are gone the outermost is dropped."""
    gone = [block for block, carrier in variables.carrier.items() if variables.widths(carrier)[options[carrier]] == 0]
    widths = {}
    for group, offered in variables.options.items():
        name = variables.name_of[group]
        widths[group] = variables.widths(name)[options[name]] or offered[-1]
    return widths, tuple(sorted(block.id for block in graph.outermost(gone)))


def _read(cost: CostModel, rows: Sequence[Row], variables: Variables, solution: Solution, *, exact: bool) -> Choice:
    """The chosen network."""
    widths, dropped = _network(cost.graph, variables, solution.choice)
    spent = tuple(row.spent(widths, dropped) for row in rows)
    return Choice(
        widths=widths,
        dropped=dropped,
        predicted_us=spent[0].value,
        error_us=spent[0].error,
        solution=solution,
        exact_cost=exact and all(row.is_exact for row in rows) and _is_told(spent, solution),
        how="by tables taken anew",
        spent=spent,
        formats=formats_of(cost.units, widths, cost.vanishing(dropped)),
    )


def _is_told(spent: Sequence[Spent], solution: Solution) -> bool:
    """Whether the tables told what the rows predict for the answer."""
    return all(abs(each.value - solution.cost[each.row.name]) <= SETTLED * each.value for each in spent)


def least_choice(cost: CostModel, saliency: Saliency, *, others: Sequence[Row] = (), rules: Rules = FREELY) -> Choice:
    """The fastest network in reach, whatever it takes of the `others`."""
    return _nearest(cost, saliency, (latency_row(cost, 1e-6), *others), rules)


def _nearest(cost: CostModel, saliency: Saliency, rows: Sequence[Row], rules: Rules) -> Choice:
    """The network with the least largest share of a limit, for rows that can't all be met."""
    variables = rules.variables(cost)
    point = {name: options[0] for name, options in variables.options.items()}
    if rules.scope in BISECTED:
        return _unproven(cost, saliency, rows, point)
    limits = {row.name: OUT_OF_REACH * row.limit for row in rows}
    solution = solve(_tabulated(cost, saliency, rows, limits, variables, Reached(widths=point, dropped=())))
    return _read(cost, rows, variables, solution, exact=not any(row.is_wide(variables) for row in rows))


def _out_of_reach(cost: CostModel, saliency: Saliency, rows: Sequence[Row], rules: Rules) -> str:
    if len(rows) > 1:
        nearest = _nearest(cost, saliency, rows, rules)
        told = ", ".join(_told(spent.to_json()) for spent in nearest.spent)
        return f"the budgets can't be met together: the network in reach that comes nearest takes {told}"
    least = least_choice(cost, saliency, rules=rules)
    return (
        f"the budget of {rows[0].limit / 1e3:.3g} ms can't be met: the least latency in reach is predicted "
        f"{least.predicted_us / 1e3:.3g} ms; the floor is set by {', '.join(floor_layers(cost, least))}"
    )


def _told(document: Mapping[str, Any]) -> str:
    of = f" on {document['of']}" if document["unit"] == "ms" and document["of"] else ""
    return f"{document['predicted']:.6g} of {document['limit']:.6g} {document['unit']}{of}"
