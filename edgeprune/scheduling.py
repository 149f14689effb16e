"""Schedules: cut to the budget at once, or in steps, with the network that is left scored anew between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch

from edgeprune.budget_rows import Row
from edgeprune.choice import Choice, plan_from
from edgeprune.choosing import Rules, choose
from edgeprune.cost import CostModel
from edgeprune.errors import RefusedError
from edgeprune.graph import ModelGraph, trace
from edgeprune.graph.structure import Group, Member
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.saliency import Saliency
from edgeprune.surgery import apply, read_plan
from edgeprune.zero_branch import ZeroBranch

Targets: TypeAlias = Literal["exponential", "linear"]
TARGETS = ("exponential", "linear")
WORTHLESS = float(np.finfo(np.float64).tiny)
"""Least value of a channel that is still there, so that those already gone come last."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`steps` choices, one for one-shot, whose budgets fall from dense to the asked ones.

    exponential: every step takes the same share of what is left; linear: the same share of the dense network.
    """

    steps: int = 1
    targets: Targets = "exponential"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1")
        if self.targets not in TARGETS:
            raise ValueError(f"targets is {self.targets!r}; expected one of {', '.join(TARGETS)}")

    def limit(self, dense: float, final: float, step: int) -> float:
        """The budget of a step, counted from 1, on the way from dense to the final one; never above dense."""
        share = step / self.steps
        if final >= dense:
            return final
        return dense * (final / dense) ** share if self.targets == "exponential" else dense + (final - dense) * share


ONE_SHOT = Schedule()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a schedule stands before its next choice: what the channels are worth now, and what may not grow back."""

    saliency: Saliency
    rules: Rules


def before_the_last(
    cost: CostModel,
    stage: Stage,
    target_us: float,
    schedule: Schedule,
    score_anew: Callable[[ModelGraph, torch.nn.Module], Saliency],
    *,
    others: Sequence[Row] = (),
    between: Callable[[Pruned], Pruned] | None = None,
    inputs: tuple[torch.Tensor, ...] | None = None,
    on_step: Callable[[int, Choice], None] | None = None,
) -> Stage:
    """All steps but the last, whose choice is left to the caller: cut, hand to `between` (repair), score what is left.

    `score_anew(graph, module)` gives the values of a cut network. A block that was dropped stays dropped, a channel
    that went stays away. `BudgetError` where a step is out of reach.
    """
    graph = cost.graph
    inputs = inputs or inputs_of(graph)
    dense_us = cost.predict({}).us
    for step in range(1, schedule.steps):
        limits = tuple(replace(row, limit=schedule.limit(row.dense, row.limit, step)) for row in others)
        target = schedule.limit(dense_us, target_us, step)
        choice = choose(cost, stage.saliency, target, others=limits, rules=stage.rules)
        plan = plan_from(choice, graph, stage.saliency, {})
        pruned = apply(plan, graph.model, inputs, graph=graph)
        if between is not None:
            pruned = between(pruned)
        smaller, module = _traced(pruned.module, inputs)
        found = score_anew(smaller, module)
        saliency = carried_back(found, smaller, stage.saliency, plan, graph)
        stage = Stage(saliency=saliency, rules=replace(stage.rules, after=choice.reached))
        if on_step is not None:
            on_step(step, choice)
    return stage


def _traced(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[ModelGraph, torch.nn.Module]:
    """The graph of a cut network, and the module that it is of.

    Zeros of a dropped block have its sizes, which would hold the trunk at them; zeros of size 1 add as well. Where the
    code needs them whole they stay, and the trunk keeps the values it had.
    """
    light = copy.deepcopy(module)
    for branch in light.modules():
        if isinstance(branch, ZeroBranch):
            branch.leaves = [
                torch.Size((*leaf[:1], *(1 for _ in leaf[1:]))) if isinstance(leaf, torch.Size) else leaf
                for leaf in branch.leaves
            ]
    try:
        return trace(light, inputs), light
    except RefusedError:
        return trace(module, inputs), module


def carried_back(found: Saliency, smaller: ModelGraph, before: Saliency, plan: Plan, graph: ModelGraph) -> Saliency:
    """The values of a cut network as values of the dense one's channels; 0 for those that are gone.

    Groups are recognised by a parameter dimension that they share; one that the cut network doesn't show keeps the
    values it had.
    """
    cut = read_plan(plan, graph)
    owners = {(m.parameter, m.dim): (group, m) for group in smaller.groups for m in group.members}
    channels = {}
    for group in graph.groups:
        values = np.zeros(group.num_channels)
        kept = cut.kept[group.id]
        place = _same_dimension(group, owners)
        values[kept] = np.maximum(before.channels[group.id][kept], WORTHLESS)
        if place is not None:
            member, (other, its) = place
            indices = cut.indices.get((member.parameter, member.dim), np.arange(len(member.channels)))
            dense, now = member.channels[indices], its.channels
            both = (dense >= 0) & (now >= 0)
            values[dense[both]] = np.maximum(found.channels[other.id][now[both]], WORTHLESS)
        channels[group.id] = values
    blocks = {block.id: found.blocks.get(block.id, before.blocks.get(block.id, 0.0)) for block in graph.blocks}
    return replace(found, channels=channels, blocks=blocks)


def _same_dimension(
    group: Group, owners: Mapping[tuple[str, int], tuple[Group, Member]]
) -> tuple[Member, tuple[Group, Member]] | None:
    """A member of the group and the cut network's group that has it; not where the dimension is of several groups."""
    for member in group.members:
        known = owners.get((member.parameter, member.dim))
        if known is not None and (known[1].channels >= 0).all() and (member.channels >= 0).all():
            return member, known
    return None


def inputs_of(graph: ModelGraph) -> tuple[torch.Tensor, ...]:
    """Zeros of the shapes and types that were traced."""
    names = {node.name: node for node in graph.program.graph.nodes}
    values = [names[name].meta["val"] for name in graph.program.inputs]
    return tuple(torch.zeros(tuple(map(int, value.shape)), dtype=value.dtype) for value in values)
