"""What was chosen: widths, dropped blocks and formats of a network, what it takes of every budget, and its plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.budget_rows import Row, Spent, latency_row
from edgeprune.cost import CostModel
from edgeprune.graph import ModelGraph
from edgeprune.graph.structure import Indices
from edgeprune.plan_json import Plan
from edgeprune.saliency import Saliency
from edgeprune.solve import Solution
from edgeprune.surgery import positions_of
from edgeprune.variables import FloatArray, Reached, block_extras


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen: widths of the groups, blocks dropped, the solution with its bound, what every budget comes to.

    `exact_cost` is false where a unit reads a sum of groups (a concatenation), whose cost was tabulated around the
    answer to first order, or where the tables miss the answer's prediction; the answer itself was checked against the
    cost model. `spent` begins with the latency that the choice was made for.
    """

    widths: Mapping[str, int]
    dropped: tuple[str, ...]
    predicted_us: float
    error_us: float
    solution: Solution
    exact_cost: bool
    spent: tuple[Spent, ...] = ()
    how: str = "by one share"
    """How it was found where nothing is proven."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Of the parameters that are not dense."""

    @property
    def gap(self) -> float | None:
        """The solution's proven gap to two digits; None where nothing is proven (a share found by bisection)."""
        return float(f"{self.solution.gap:.2g}") if math.isfinite(self.solution.gap) else None

    @property
    def proof(self) -> str:
        """`proven within 0.01%`, or that nothing is."""
        return f"proven within {self.gap:.2%}" if self.gap is not None else f"{self.how}, nothing proven"

    @property
    def fits(self) -> bool:
        """Whether what is predicted is inside every budget."""
        return all(spent.fits for spent in self.spent)

    @property
    def is_settled(self) -> bool:
        """Whether the tables of the whole problem told what is predicted for the answer."""
        return self.exact_cost and self.solution.status == "solved"

    @property
    def reached(self) -> Reached:
        """What a schedule goes on from."""
        return Reached(widths=self.widths, dropped=self.dropped)


def unsolved_choice(rows: Sequence[Row], widths: Mapping[str, int], value: float, *, is_best: bool) -> Choice:
    """A network without dropped blocks that no solver chose; `is_best` says that none is worth more."""
    spent = tuple(row.spent(widths) for row in rows)
    solution = Solution(
        feasible=True,
        choice={},
        value=value,
        cost={each.row.name: each.value for each in spent},
        upper_bound=value if is_best else math.inf,
        gap=0.0 if is_best else math.inf,
        least_ratio=0.0,
        status="solved" if is_best else "stopped",
        seconds=0.0,
    )
    return Choice(
        widths=widths,
        dropped=(),
        predicted_us=spent[0].value,
        error_us=spent[0].error,
        solution=solution,
        exact_cost=True,
        spent=spent,
    )


def dense_choice(cost: CostModel, saliency: Saliency, others: Sequence[Row] = ()) -> Choice:
    """Everything stays, whatever it takes of the `others`."""
    rows = (latency_row(cost, cost.predict({}).us), *others)
    value = sum(float(values.sum()) for values in saliency.channels.values())
    value += sum(block_extras(cost.graph, saliency).values())
    return unsolved_choice(rows, dict(cost.graph.dense_widths), value, is_best=True)


def plan_from(choice: Choice, graph: ModelGraph, saliency: Saliency, notes: Mapping[str, Any]) -> Plan:
    """Keep the most valuable channels of every group; ties go to the lower index."""
    hidden = {name for block in graph.blocks if block.id in choice.dropped for name in block.inside}
    kept = {}
    for group in graph.groups:
        width = choice.widths[group.id]
        if width < group.num_channels and group.id not in hidden:
            kept[group.id] = positions_of(graph, group.id, best_channels(saliency.channels[group.id], width))
    return Plan(
        structure_hash=graph.structure_hash, kept=kept, dropped=choice.dropped, formats=choice.formats, notes=notes
    )


def best_channels(values: FloatArray, width: int) -> Indices:
    """The `width` most valuable channels, ascending."""
    order = np.lexsort((np.arange(len(values)), -values))
    return np.sort(order[:width]).astype(np.int64)


def floor_layers(cost: CostModel, choice: Choice, count: int = 3) -> list[str]:
    """The units that take most of a network's latency: `name (share)`."""
    gone = cost.vanishing(choice.dropped)
    cold = cost.cold(choice.widths, choice.dropped)
    stays = [unit for unit in cost.units if unit.name not in gone]
    us = {unit.name: float(cost.unit_us(unit, [choice.widths], cold)[0]) for unit in stays}
    total = sum(us.values()) + cost.overhead_us
    top: Sequence[str] = sorted(us, key=lambda name: (-us[name], name))[:count]
    return [f"{name} ({us[name] / total:.0%})" for name in top]
