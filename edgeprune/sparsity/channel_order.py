"""Permute the channels of groups so that 2:4 keeps more: a permutation is another order of a plan's kept indices.

All layers that read a group share its order, so what they keep is summed; what produces the channels follows through
the coupling graph, by the same surgery that cuts (`graph.ordering` says where an order can be changed).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from edgeprune.comparing import Cut
from edgeprune.eligibility import TWO_OF_FOUR
from edgeprune.graph import Group, ModelGraph
from edgeprune.graph.ordering import indices_of, why_not_ordered
from edgeprune.pattern import M, matrix_of
from edgeprune.plan_json import Plan
from edgeprune.sparsity.permutation import WORK, best_order, kept
from edgeprune.surgery import ordered_positions_of, read_plan


@dataclass(frozen=True, kw_only=True)
class GroupOrder:
    """What a permutation does for one group: the share of its readers' magnitude that 2:4 keeps before and after.

    `parameters` are the 2:4 weights that read its channels. Where it stays in order `why` says for what reason.
    """

    group: str
    parameters: tuple[str, ...]
    before: float
    after: float
    why: str | None = None


def permuted(
    plan: Plan, graph: ModelGraph, parameters: Iterable[str] | None = None, *, seed: int = 0, work: float = WORK
) -> tuple[Plan, tuple[GroupOrder, ...]]:
    """The plan with the channels of every group in the order that keeps most of the weights that are to be 2:4.

    `parameters` are those that the plan has as 2:4, unless told. The weights are those of the traced model. The network
    computes the same in any order: only what a pattern of zeros keeps of it changes.
    """
    sparse = frozenset(_two_of_four(plan) if parameters is None else parameters)
    cut = read_plan(plan, graph)
    weights = dict(graph.model.named_parameters(remove_duplicate=False))
    orders, found = dict(plan.kept), []
    for group in graph.groups:
        names = _readers(group, sparse)
        if not names or len(cut.kept[group.id]) % M:
            continue
        scores = torch.cat([_columns(weights[name], name, group, cut) for name in names])
        total = float(scores.double().sum())
        given = list(range(scores.shape[1]))
        before = kept(scores, given) / total
        why = why_not_ordered(graph, group)
        order = given if why else best_order(scores, seed=seed, work=work)
        if order != given:
            orders[group.id] = ordered_positions_of(graph, group.id, cut.kept[group.id][order])
        after = kept(scores, order) / total
        found.append(GroupOrder(group=group.id, parameters=names, before=before, after=after, why=why))
    return replace(plan, kept=orders), tuple(found)


def _two_of_four(plan: Plan) -> list[str]:
    return [name for name, form in plan.formats.items() if form == TWO_OF_FOUR]


def _readers(group: Group, sparse: frozenset[str]) -> tuple[str, ...]:
    """The 2:4 weights whose input channels are the group's, one index a channel and no others."""
    names = []
    for member in group.members:
        table = indices_of(member.channels, group.num_channels) if (member.channels >= 0).all() else None
        if member.parameter in sparse and member.dim == 1 and table is not None and table.shape[1] == 1:
            names.append(member.parameter)
    return tuple(sorted(names))


def _columns(weight: torch.Tensor, name: str, group: Group, cut: Cut) -> torch.Tensor:
    """|w| of the cut weight: [outputs · kernel positions, kept channels]."""
    W = weight.detach()
    for dim in range(2):
        indices = cut.indices.get((name, dim))
        if indices is not None:
            W = W.index_select(dim, torch.from_numpy(indices))
    return matrix_of(W).reshape(-1, W.shape[1]).abs()
