"""What a trace says about a model: tensors, groups, blocks, refusals. Plain data, free of devices.

Legend: an *index* is a position along one dimension of one tensor; a *channel* is what must live or die together:
a class of such indices, over all tensors of a group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Attribute: TypeAlias = tuple[str, str, int | None]
"""Qualified module name, attribute name, and the place in it where the attribute is a tuple or list."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One dimension of one parameter or buffer that follows a group.

    `channels[i]` is the group's channel that index i of the dimension belongs to, -1 where it belongs to none (it is
    fixed, or of another group, as behind a concatenation). `role` is `producer` (output of a contraction), `consumer`
    (its input) or `per_channel` (norm statistics, biases, depthwise filters).
    """

    parameter: str
    dim: int
    channels: Indices
    role: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Dimensions that must shrink together, channel by channel.

    `id` is `parameter:dim` of the smallest member that names no other group; where each does, with `#2` behind it. An
    index of a dimension may belong to several groups (heads and their width): it goes when one of its channels does.
    """

    id: str
    num_channels: int
    members: tuple[Member, ...]
    least_channels: int = 1
    changes_statistics: bool = False

    @property
    def first(self) -> Member:
        """The member that names the group: a plan's kept indices are positions along it."""
        name = self.id.partition("#")[0]
        return next(m for m in self.members if f"{m.parameter}:{m.dim}" == name)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual branch f of x + f(x) that may be dropped (f's output at the add becomes zero).

    `id` is the qualified name of the module that adds. `zero_modules` are the modules whose zeros make f's output at
    the add, of `shape` (dimension 0 is the batch), zero: one, or several where f ends in a sum; `skipped_modules` those
    that nothing else needs then. `inside` are the ids of the groups that vanish with the block, `nodes` the graph nodes
    that do, those of blocks within it included; `within` is the id of the smallest block that holds this one.
    """

    id: str
    zero_modules: tuple[str, ...]
    skipped_modules: tuple[str, ...]
    shape: tuple[int, ...]
    inside: tuple[str, ...]
    nodes: frozenset[str]
    within: str | None = None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Something that stays dense: the operator, its place in the model (qualified module name) and why."""

    operator: str
    where: str
    reason: str


def by_reason(refused: Iterable[Refusal]) -> dict[tuple[str, str], list[str]]:
    """Operator and reason to the places, so that equal refusals are told once."""
    places: dict[tuple[str, str], list[str]] = {}
    for refusal in refused:
        places.setdefault((refusal.operator, refusal.reason), []).append(refusal.where or "(the model itself)")
    return places


@dataclass(frozen=True, kw_only=True)
class Width:
    """The size of one tensor dimension as a function of the groups' widths: fixed + sum of times x product of kept.

    A term names one group, or several where every channel of one meets every channel of the others (heads x width).
    Where the size depends on which channels are kept, not only on how many (behind a slice), `uneven` names all groups
    that it depends on, and the size is that of the average.
    """

    fixed: int = 0
    terms: tuple[tuple[tuple[str, ...], int], ...] = ()
    uneven: tuple[str, ...] = ()

    def at(self, kept: Mapping[str, int]) -> int:
        """Size when group g keeps `kept[g]` channels."""
        return self.fixed + sum(times * prod(kept[group] for group in groups) for groups, times in self.terms)

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups that this size depends on, in order of appearance."""
        return tuple(dict.fromkeys(group for groups, _ in self.terms for group in groups))


@dataclass(frozen=True, kw_only=True)
class SizeRule:
    """A size as a function of the groups' kept channels, and the groups that it depends on."""

    groups: tuple[str, ...]
    at: Callable[[Mapping[str, int]], int]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator of the ATen program.

    `operator` is the ATen name without overload (`conv2d`), `inputs` the nodes or parameter names it reads in order
    of appearance, `shape` and `widths` describe its output (first tensor), `where` is the qualified name of the
    module that called it, `attributes` the non-tensor arguments by name.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    widths: tuple[Width, ...]
    where: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelGraph:
    """An ATen graph with static shapes and what pruning may do to it.

    `program` is the traced `Program` (its graph's node names are those of `nodes` and `channels`).
    `model` is the eager module that was traced, which the stages leave as it is; `attributes` are the integers that its
    modules hold and that change with the widths.
    `channels[node][dim]` is an int64 array [k, size]: the index i lives if all channels in column i do, numbers of
    `channel_names`, -1 for none.
    """

    program: Any
    nodes: tuple[Node, ...]
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    refused: tuple[Refusal, ...]
    channels: Mapping[str, tuple[Indices, ...]]
    parameter_shapes: Mapping[str, tuple[int, ...]]
    parameter_dtypes: Mapping[str, str]
    prunable_macs_share: float
    prunable_params_share: float
    attributes: Mapping[Attribute, SizeRule] = field(default_factory=dict)
    model: Any = None

    def group(self, group_id: str) -> Group:
        """The group of that id; `KeyError` if there is none."""
        return {g.id: g for g in self.groups}[group_id]

    @cached_property
    def channel_names(self) -> tuple[tuple[str, int], ...]:
        """Group id and channel within the group, by the numbers that `channels` holds."""
        return tuple((group.id, channel) for group in self.groups for channel in range(group.num_channels))

    @cached_property
    def block_of(self) -> dict[str, str]:
        """Group id to the id of the smallest block that it is inside of."""
        largest_first = sorted(self.blocks, key=lambda block: -len(block.nodes))
        return {group: block.id for block in largest_first for group in block.inside}

    def outermost(self, names: Iterable[str]) -> tuple[Block, ...]:
        """The blocks of these ids that lie in no other of them: what else is named goes with them."""
        named = set(names)
        chosen = [block for block in self.blocks if block.id in named]
        return tuple(block for block in chosen if not any(block.nodes < other.nodes for other in chosen))

    @property
    def dense_widths(self) -> dict[str, int]:
        """Every group at its full width."""
        return {g.id: g.num_channels for g in self.groups}

    @cached_property
    def structure_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and group membership, never graph text: survives torch versions."""
        document = {
            "parameters": [
                [name, list(shape), self.parameter_dtypes[name]]
                for name, shape in sorted(self.parameter_shapes.items())
            ],
            "groups": [
                [g.id, g.num_channels, sorted([m.parameter, m.dim, m.channels.tolist()] for m in g.members)]
                for g in sorted(self.groups, key=lambda g: g.id)
            ],
            "blocks": sorted([b.id, sorted(b.skipped_modules)] for b in self.blocks),
        }
        return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()
