"""Sizes of a unit's kernel as functions of the groups' widths: what can be made of the graph's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from edgeprune.graph.structure import Node, Width


@dataclass(frozen=True)
class Product:
    """A size that is a product of sizes: heads x head width."""

    factors: tuple[Width, ...]

    def at(self, kept: Mapping[str, int]) -> int:
        """Size when group g keeps `kept[g]` channels."""
        return prod(width.at(kept) for width in self.factors)

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups that this size depends on."""
        return tuple(dict.fromkeys(group for width in self.factors for group in width.groups))


@dataclass(frozen=True, kw_only=True)
class ConvolutionGroups:
    """The number of groups of a convolution: it goes with what its input and output widths have in common.

    c_in = k i and c_out = k o: what is not common to both (i and o) is held at its dense width, where
    `channels` inputs make one group.
    """

    c_in: Width
    groups: tuple[str, ...]
    channels: int
    dense: Mapping[str, int] = field(hash=False)

    def at(self, kept: Mapping[str, int]) -> int:
        """Convolution groups when group g keeps `kept[g]` channels."""
        common = {group: kept[group] if group in self.groups else self.dense[group] for group in self.c_in.groups}
        return self.c_in.at(common) // self.channels


Size = Width | Product | ConvolutionGroups
"""A size as a function of the groups' widths."""

ONE = Width(fixed=1)


def width_of(node: Node, axis: int) -> Width:
    """The width of one axis of the node's output; as it is in the dense network where the graph knows no more."""
    known = len(node.widths) == len(node.shape)
    return node.widths[axis] if known else Width(fixed=node.shape[axis])
