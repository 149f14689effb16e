"""A unit: one kernel instance of a network as a runtime fuses it, with widths as functions of the groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgeprune.eligibility import TWO_OF_FOUR, refusal
from edgeprune.graph.structure import Width
from edgeprune.kernel import CONTRACTIONS, Kernel
from edgeprune.kernel_sizes import ONE, Size

SPARSE_WIDTH = 2
"""Weights of every four that stay in a 2:4 layer."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One kernel instance. `name`, unique, is the qualified module of a contraction's weight, else the node's name.

    `nodes` are the graph nodes that it covers; `dense` its kernel in the dense network. `kernel_groups` are the groups
    of its kernel (of a convolution, or heads), `parts` the widths that a `cat` joins. `format` names the variable that
    says how many weights of every four stay, where that is to be chosen: `SPARSE_WIDTH` makes it 2:4, at widths that
    can be.
    """

    name: str
    dense: Kernel
    c_in: Size
    c_out: Size
    nodes: frozenset[str]
    kernel_groups: Size = ONE
    format: str = ""
    parts: tuple[Width, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups that its widths depend on, in order of appearance."""
        return tuple(dict.fromkeys((*self.c_in.groups, *self.c_out.groups, *self.kernel_groups.groups)))

    @property
    def variables(self) -> tuple[str, ...]:
        """Its groups, and its format where that is to be chosen."""
        return (*self.groups, self.format) if self.format else self.groups

    def sizes(self, kept: Mapping[str, int]) -> tuple[int, int, int]:
        """`Kernel.sizes` of its kernel when group g keeps `kept[g]` channels."""
        if self.dense.operator not in CONTRACTIONS:
            return 1, self.c_in.at(kept), 1
        groups = self.kernel_groups.at(kept)
        return groups, self.c_in.at(kept) // groups, self.c_out.at(kept) // groups

    def kernel(self, widths: Mapping[str, int]) -> Kernel:
        """Its kernel when group g keeps `widths[g]` channels, and its format as many weights of every four."""
        kernel = self.dense.resized(self.sizes(widths))
        if self.parts:
            return replace(kernel, parts=tuple(part.at(widths) for part in self.parts))
        is_sparse = self.format and widths.get(self.format) == SPARSE_WIDTH and refusal(kernel) is None
        return replace(kernel, sparsity=TWO_OF_FOUR) if is_sparse else kernel
