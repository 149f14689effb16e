"""The variables of the selection problem, what their options are worth, and what ties them to one another.

Every group is a variable whose options are its widths, ascending. A block is *gone* when it or a block around it is
dropped. The groups of a block (inside of it and of no block within it) say so: one more option 0 of each, tied to one
another; a block without such groups has a variable of its own. Where a block is gone those within it are forbidden to
stay, so that nested blocks cost pairwise factors only and the choice among all of them is exact.

*Tied* (scope isomorphic): groups of one structure share one variable without option 0, and each block has one of its
own, so that the others of the structure keep the share where one block is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from edgeprune.constraints import Constraints, Options, allowed, allowed_formats
from edgeprune.cost import CostModel
from edgeprune.formats import FormatValue
from edgeprune.graph.structure import Block, Group, ModelGraph
from edgeprune.saliency import Saliency
from edgeprune.solve import Factor
from edgeprune.unit import SPARSE_WIDTH

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A network that a schedule has come to: no width grows again, no dropped block comes back."""

    widths: Mapping[str, int]
    dropped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Variables:
    """options: widths of each group. blocks: those that may be dropped; block_of[group]: the smallest around it.

    name_of[group] is its variable, of the widths of `options[name]`; carrier[block] the variable that says whether the
    block stays. gone: the blocks that are dropped already. formats: layers that can be 2:4, each a variable of its own
    in `options`, whose widths are the weights of every four that may stay.
    """

    options: Options
    blocks: tuple[Block, ...]
    block_of: Mapping[str, str]
    name_of: Mapping[str, str]
    carrier: Mapping[str, str]
    is_tied: bool = False
    gone: frozenset[str] = frozenset()
    formats: Mapping[str, FormatValue] = field(default_factory=dict)

    def widths(self, variable: str) -> tuple[int, ...]:
        """Width under each option; 0 where gone."""
        own = self.options.get(variable, (0, 1))
        return (0, *own) if not self.is_tied and variable in self.block_of else own

    def count(self, variable: str) -> int:
        """Number of options of a variable."""
        return len(self.widths(variable))

    def counts(self) -> dict[str, int]:
        """Options of all variables."""
        return {name: self.count(name) for name in dict.fromkeys((*self.name_of.values(), *self.carrier.values()))}

    def own_groups(self, block: Block) -> tuple[str, ...]:
        """The groups inside the block and inside no block within it."""
        return tuple(group for group in block.inside if self.block_of[group] == block.id)

    def smallest(self, names: frozenset[str]) -> Block | None:
        """The smallest of these blocks that may be dropped: it is gone whenever one around it is."""
        return min((b for b in self.blocks if b.id in names), key=lambda block: len(block.nodes), default=None)

    def says_gone(self, group: str, block: Block) -> bool:
        """Whether the group's own variable says that the block is gone."""
        return not self.is_tied and self.block_of.get(group) == block.id


def variables_of(
    cost: CostModel, constraints: Constraints, *, after: Reached | None = None, is_tied: bool = False
) -> Variables:
    """The variables of a network under constraints; `after` a step of a schedule nothing grows back."""
    options, blocks = allowed(constraints, cost.graph, cost.units, cost.options)
    options = {**options, **allowed_formats(constraints, cost.graph, cost.formats)}
    if after is not None:
        smaller = {g: tuple(w for w in widths if w <= after.widths.get(g, widths[-1])) for g, widths in options.items()}
        options = {group: widths or (after.widths[group],) for group, widths in smaller.items()}
    largest_first = sorted(blocks, key=lambda block: -len(block.nodes))
    block_of = {group: block.id for block in largest_first for group in block.inside}
    own = {b.id: [] if is_tied else [g for g in b.inside if block_of[g] == b.id] for b in blocks}
    ids = {block.id for block in blocks}
    dropped = cost.graph.outermost(after.dropped) if after is not None else ()
    return Variables(
        options=options,
        blocks=tuple(replace(b, within=b.within if b.within in ids else None) for b in blocks),
        block_of=block_of,
        name_of={name: name for name in options} | (_classes(cost.graph, options) if is_tied else {}),
        carrier={name: groups[0] if groups else f"block {name}" for name, groups in own.items()},
        is_tied=is_tied,
        gone=frozenset(block.id for block in dropped),
        formats=cost.formats,
    )


def _classes(graph: ModelGraph, options: Options) -> dict[str, str]:
    """Each group to the first of its structure: the same roles in parameters of the same shapes, the same widths."""
    first: dict[object, str] = {}
    return {group.id: first.setdefault(_structure(group, graph, options), group.id) for group in graph.groups}


def _structure(group: Group, graph: ModelGraph, options: Options) -> object:
    members = sorted((graph.parameter_shapes[m.parameter], m.dim, m.role) for m in group.members)
    return group.num_channels, options[group.id], tuple(members)


def block_extras(graph: ModelGraph, saliency: Saliency) -> dict[str, float]:
    """What each block is worth beyond what is inside of it, at least 0: its channels, and the blocks within it."""
    inside = {
        block.id: sum(float(saliency.channels[g].sum()) for g in block.inside if graph.block_of[g] == block.id)
        for block in graph.blocks
    }
    extras = {}
    for block in sorted(graph.blocks, key=lambda block: len(block.nodes)):
        extras[block.id] = max(0.0, saliency.blocks.get(block.id, 0.0) - inside[block.id])
        if block.within is not None:
            inside[block.within] += inside[block.id] + extras[block.id]
    return extras


def value_factors(graph: ModelGraph, saliency: Saliency, variables: Variables) -> Iterator[Factor]:
    """A width is worth its most valuable channels; a block what its drop costs beyond what is inside of it."""
    worth: dict[tuple[str, ...], FloatArray] = {}
    for group, options in variables.options.items():
        if group in variables.formats:
            continue
        names: tuple[str, ...] = (variables.name_of[group],)
        values = _worth(group, options, saliency)
        if group in variables.block_of:
            if variables.is_tied:
                names = (*names, variables.carrier[variables.block_of[group]])
                values = np.outer(values, [0.0, 1.0])
            else:
                values = np.concatenate([[0.0], values])
        worth[names] = worth[names] + values if names in worth else values
    for block, extra in block_extras(graph, saliency).items():
        if block in variables.carrier:
            carrier = variables.carrier[block]
            staying = worth.setdefault((carrier,), np.zeros(variables.count(carrier)))
            staying[1:] += extra
    for names, values in worth.items():
        yield Factor(variables=names, value=values)
    yield from _format_factors(saliency, variables)


def _worth(group: str, options: tuple[int, ...], saliency: Saliency) -> FloatArray:
    """Of each width: its most valuable channels."""
    ranked: FloatArray = np.cumsum(np.sort(saliency.channels[group])[::-1])[np.array(options) - 1]
    return ranked


def _format_factors(saliency: Saliency, variables: Variables) -> Iterator[Factor]:
    """2:4 takes of what a layer's channels are worth the share of its magnitude that it sets to zero."""
    for name, format_value in variables.formats.items():
        for group, share in format_value.groups.items():
            worth = share * format_value.lost * _worth(group, variables.options[group], saliency)
            other = variables.name_of[group]
            worth = np.concatenate([[0.0] * (variables.count(other) - len(worth)), worth])
            is_sparse = [float(width == SPARSE_WIDTH) for width in variables.options[name]]
            yield Factor(variables=(other, name), value=np.outer(-worth, is_sparse))


def tie_factors(variables: Variables, budget: str) -> Iterator[Factor]:
    """All groups of a block are gone together, or none is; no block stays within one that is gone, none comes back."""

    def forbidding(names: tuple[str, ...], table: FloatArray) -> Factor:
        return Factor(variables=names, value=np.zeros_like(table), cost={budget: table})

    for block in variables.blocks:
        carrier = variables.carrier[block.id]
        for other in () if variables.is_tied else variables.own_groups(block)[1:]:
            table = np.zeros((variables.count(carrier), variables.count(other)))
            table[0, 1:] = table[1:, 0] = np.inf
            yield forbidding((carrier, other), table)
        if block.within is not None:
            pair = (variables.carrier[block.within], carrier)
            table = np.zeros(tuple(variables.count(name) for name in pair))
            table[0, 1:] = np.inf
            yield forbidding(pair, table)
        if block.id in variables.gone:
            back = np.zeros(variables.count(carrier))
            back[1:] = np.inf
            yield forbidding((carrier,), back)
