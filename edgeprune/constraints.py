"""What a user forbids: layers to keep, least widths, the most that a layer may lose, channels or blocks or heads alone.

A constraint takes options away before anything is solved, so that what remains is chosen and proven as ever.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgeprune.errors import InputError, did_you_mean
from edgeprune.formats import WIDTHS, FormatValue
from edgeprune.graph.structure import Block, Group, ModelGraph
from edgeprune.unit import Unit

Only: TypeAlias = Literal["channels", "blocks", "heads"]
ONLY = ("channels", "blocks", "heads")
ROUNDING = 1e-9
Options: TypeAlias = Mapping[str, tuple[int, ...]]  # widths of every group, ascending


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """keep: patterns over qualified names of modules and parameters, whose layers stay whole.

    least_width: channels that every group keeps at least (1 or more), or a share of its own (below 1).
    most_cut: the largest share of any group's channels that may go; below 1 no block is dropped, since its layers would
        go whole.
    only: channels (all widths but heads), blocks, or attention heads.
    """

    keep: tuple[str, ...] = ()
    least_width: float = 0.0
    most_cut: float = 1.0
    only: Only | None = None

    def __post_init__(self) -> None:
        if not self.least_width >= 0:
            raise ValueError(f"least_width is {self.least_width!r}; expected channels or a share, at least 0")
        if not 0 <= self.most_cut <= 1:
            raise ValueError(f"most_cut is {self.most_cut!r}; expected a share, 0 to 1")
        if self.only is not None and self.only not in ONLY:
            raise ValueError(f"only is {self.only!r}; expected one of {', '.join(ONLY)}")

    def describe(self) -> dict[str, object]:
        """What differs from no constraint at all."""
        free = Constraints()
        named = {"keep": list(self.keep), "least_width": self.least_width, "most_cut": self.most_cut, "only": self.only}
        return {name: value for name, value in named.items() if getattr(self, name) != getattr(free, name)}


NONE = Constraints()


def parse_least_width(text: str) -> float:
    """`16` channels, or a share: `0.25`, `0.25x`, `25%`; `InputError` for anything else."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("x", "%") else (text, "")
    try:
        value = float(number) / (100 if unit == "%" else 1)
    except ValueError:
        value = -1.0
    value = value if math.isfinite(value) else -1.0
    is_share = unit != "" or value < 1
    if value < 0 or (is_share and value > 1) or (not is_share and value != int(value)):
        raise InputError(f"least width '{text}' is neither a number of channels (16) nor a share (0.25, 25%)")
    return min(value, 1 - ROUNDING) if is_share else value


def allowed(
    constraints: Constraints, graph: ModelGraph, units: Sequence[Unit], options: Options
) -> tuple[dict[str, tuple[int, ...]], tuple[Block, ...]]:
    """The widths that remain for every group, and the blocks that may still be dropped.

    `InputError` where a pattern matches nothing, or where nothing is left to choose.
    """
    kept = _matched(constraints.keep, graph)
    heads = _heads(units)
    if constraints.only == "heads" and not heads:
        raise InputError("only heads: no attention heads can be pruned in this model")
    if constraints.only == "blocks" and not graph.blocks:
        raise InputError("only blocks: no block can be dropped in this model")
    found = {}
    for group in graph.groups:
        fixed = any(member.parameter in kept for member in group.members) or not _is_chosen(group, constraints, heads)
        least = group.num_channels if fixed else _least(group, constraints)
        widths = options[group.id]
        found[group.id] = tuple(width for width in widths if width >= least) or widths[-1:]
    blocks: tuple[Block, ...] = ()
    if constraints.most_cut == 1 and constraints.only in (None, "blocks"):
        blocks = tuple(block for block in graph.blocks if not any(name in kept for name in parameters_of(block, graph)))
    if not blocks and all(len(widths) == 1 for widths in found.values()):
        raise InputError(f"the constraints leave nothing to prune: {constraints.describe()}")
    return found, blocks


def allowed_formats(constraints: Constraints, graph: ModelGraph, formats: Mapping[str, FormatValue]) -> Options:
    """How many weights of every four may stay: not two where a layer is kept, or only something else may be chosen."""
    kept = _matched(constraints.keep, graph)
    return {
        name: WIDTHS if constraints.only is None and value.parameter not in kept else WIDTHS[-1:]
        for name, value in formats.items()
    }


def parameters_of(block: Block, graph: ModelGraph) -> frozenset[str]:
    """Qualified names of the parameters and buffers that go when the block is dropped."""
    modules = tuple(f"{name}." for name in (*block.zero_modules, *block.skipped_modules))
    return frozenset(name for name in graph.parameter_shapes if name.startswith(modules))


def _matched(patterns: Iterable[str], graph: ModelGraph) -> frozenset[str]:
    """Parameters that a pattern names, or that lie in a module that one names."""
    names: dict[str, set[str]] = {}
    for parameter in graph.parameter_shapes:
        parts = parameter.split(".")
        for depth in range(1, len(parts) + 1):
            names.setdefault(".".join(parts[:depth]), set()).add(parameter)
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise InputError(
                f"keep '{pattern}' matches no module and no parameter of the model{did_you_mean(pattern, names)}"
            )
        found.update(*(names[match] for match in matches))
    return frozenset(found)


def _heads(units: Sequence[Unit]) -> frozenset[str]:
    """Groups whose channels are whole heads of attention."""
    attention = [unit for unit in units if unit.dense.operator == "attention"]
    return frozenset(group for unit in attention for group in unit.kernel_groups.groups)


def _is_chosen(group: Group, constraints: Constraints, heads: frozenset[str]) -> bool:
    if constraints.only is None:
        return True
    return constraints.only == ("heads" if group.id in heads else "channels")


def _least(group: Group, constraints: Constraints) -> float:
    share = constraints.least_width if constraints.least_width < 1 else 0.0
    number = constraints.least_width if constraints.least_width >= 1 else 0.0
    by_share = max(share, 1 - constraints.most_cut) * group.num_channels
    return max(number, by_share - ROUNDING * group.num_channels)
