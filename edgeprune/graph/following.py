"""Can the model's Python code follow when groups shrink? Which attributes must change, and what does it fix?

For every size that reaches an operator there are two accounts: what it has to be when the groups have other widths (by
the coupling), and how the code computes it (`sizes`). Where both agree nothing is to be done; where the code reads a
module's attribute, surgery sets it; where they disagree, the code fixes the size, and the groups must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from edgeprune.graph.coupling import Coupling
from edgeprune.graph.program import Program, arguments, integer_slots, module_name, operator_name
from edgeprune.graph.rules import Dims
from edgeprune.graph.rules.indexing import bounds
from edgeprune.graph.sizes import COMPARISONS, OPERATORS, Comparison, Expression, integers
from edgeprune.graph.structure import Attribute, Refusal, SizeRule, Width
from edgeprune.graph.widths import Widths

PROBES = 3
UNKNOWN = -(2**31)
"""A size that depends on which channels are kept, not only on how many."""
Kept: TypeAlias = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Followed:
    """The attributes that surgery sets, and the groups that the code keeps from shrinking, with the reason."""

    attributes: Mapping[Attribute, SizeRule]
    refused: Mapping[str, Refusal]


@dataclass(frozen=True, kw_only=True)
class Equation:
    """`expression` has to give `expected`."""

    expression: Expression
    expected: SizeRule
    refusal: Refusal


def follow(program: Program, coupling: Coupling) -> Followed:
    """Solve for the attributes and find what the code fixes.

    Whether two accounts agree is judged at three random choices of widths; `surgery.apply` checks every size of the
    network that it cuts.
    """
    widths = Widths(coupling.groups)
    equations = [equation for node in program.graph.nodes for equation in _equations(node, coupling, widths)]
    probes = _probes({group.id: group.num_channels for group in coupling.groups})
    solver = _Solver(coupling=coupling, widths=widths, probes=probes)
    for equation in equations:
        if equation.expression[0] == "attribute" and equation.expected.groups:
            solver.attributes.setdefault(_attribute(equation.expression), equation.expected)
    for comparison in program.comparisons:
        solver.bind(comparison)
    while True:
        before = len(solver.refused)
        for equation in equations:
            solver.check(equation)
        for comparison in program.comparisons:
            solver.check_comparison(comparison)
        if len(solver.refused) == before:
            break
    attributes = {name: rule for name, rule in solver.attributes.items() if set(rule.groups) - solver.refused.keys()}
    return Followed(attributes=attributes, refused=solver.refused)


def attributes_of_layers(program: Program, coupling: Coupling) -> dict[Attribute, SizeRule]:
    """For a program that does not say where its sizes come from: what torch's own layers hold of them, by name."""
    sizes = Sizes(channels=coupling.channels, widths=Widths(coupling.groups))
    found: dict[Attribute, SizeRule] = {}
    for node in program.graph.nodes:
        name = LAYERS.get(operator_name(node))
        if name is None:
            continue
        for (_, place), rule in EXPECTED[operator_name(node)](node, sizes):
            if rule.groups:
                found[module_name(node), name, place if name == "normalized_shape" else None] = rule
    return found


def _probes(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    rng = np.random.default_rng(0)
    return [
        {group: int(rng.integers(1, size)) if size > 1 else size for group, size in sizes.items()}
        for _ in range(PROBES)
    ]


class _Solver:
    """Holds the attributes' rules and the refused groups while equations are checked at the probes."""

    def __init__(self, *, coupling: Coupling, widths: Widths, probes: list[dict[str, int]]) -> None:
        self.channels = coupling.channels
        self.dense = {group.id: group.num_channels for group in coupling.groups}
        self.widths = widths
        self.probes = probes
        self.attributes: dict[Attribute, SizeRule] = {}
        self.refused: dict[str, Refusal] = {}

    def bind(self, comparison: Comparison) -> None:
        """An attribute that the code only compares with a shape follows the shape (`assert c == self.dim`)."""
        if (comparison.symbol, comparison.result) not in (("==", True), ("!=", False)):
            return
        for own, other in ((comparison.left, comparison.right), (comparison.right, comparison.left)):
            if own[0] == "attribute" and other[0] == "dimension" and _attribute(own) not in self.attributes:
                width = self._width(other)
                if width.groups:
                    self.attributes[_attribute(own)] = rule_of(width, self.dense)

    def check(self, equation: Equation) -> None:
        """Refuse the groups of an equation that does not hold at the probes: first of what is expected, then of how
        it is computed."""
        groups = [equation.expected.groups, self.groups_of(equation.expression)]
        for candidates in (*groups, ()):
            if all(self._holds(equation, kept) for kept in self.probes):
                return
            self.refuse(candidates, equation.refusal)

    def _holds(self, equation: Equation, kept: Kept) -> bool:
        expected = equation.expected.at(kept)
        return expected != UNKNOWN and self.value(equation.expression, kept) == expected

    def check_comparison(self, comparison: Comparison) -> None:
        """The code must take the same way at the probes."""
        sides = (comparison.left, comparison.right)
        groups = [group for side in sides for group in self.groups_of(side)]
        if not set(groups) - self.refused.keys():
            return
        compare = COMPARISONS[comparison.symbol]
        for kept in self.probes:
            left, right = (self.value(side, kept) for side in sides)
            if compare(left, right) != comparison.result:
                place = f"the code at {comparison.source}" if comparison.source else "a layer of torch"
                reason = f"{place} decides or computes by this size"
                self.refuse(groups, Refusal(operator="python", where="", reason=reason))
                return

    def refuse(self, groups: Iterable[str], refusal: Refusal) -> None:
        """These groups stay whole from now on."""
        for group in groups:
            if group not in self.refused:
                self.refused[group] = refusal
                for kept in self.probes:
                    kept[group] = self.dense[group]

    def value(self, expression: Expression, kept: Kept) -> int:
        """What the code computes when the groups have these widths; attributes are set by their rules."""
        kind = expression[0]
        if kind == "number":
            return int(expression[1])
        if kind == "attribute":
            rule = self.attributes.get(_attribute(expression))
            return rule.at(kept) if rule is not None else int(expression[4])
        if kind == "dimension":
            return rule_of(self._width(expression), self.dense).at(kept)
        left, right = (self.value(side, kept) for side in expression[1:])
        if kind in ("//", "%") and right == 0:
            return -1
        return OPERATORS[kind](left, right)

    def groups_of(self, expression: Expression) -> tuple[str, ...]:
        """The groups that the value of an expression depends on."""
        kind = expression[0]
        if kind == "number":
            return ()
        if kind == "attribute":
            rule = self.attributes.get(_attribute(expression))
            return rule.groups if rule is not None else ()
        if kind == "dimension":
            return rule_of(self._width(expression), self.dense).groups
        return tuple(group for side in expression[1:] for group in self.groups_of(side))

    def _width(self, expression: Expression) -> Width:
        _, node, axis = expression
        channels = self.channels.get(node.name, ())
        if axis >= len(channels):
            return Width(fixed=int(node.meta["val"].shape[axis]))
        return self.widths.of(channels[axis])


def _attribute(expression: Expression) -> Attribute:
    return expression[1], expression[2], expression[3]


def rule_of(width: Width, dense: Kept) -> SizeRule:
    """A width as the rule for a size; `UNKNOWN` where it depends on which channels are kept."""
    if not width.uneven:
        return SizeRule(groups=width.groups, at=width.at)

    def at(kept: Kept) -> int:
        return width.at(dense) if all(kept[group] == dense[group] for group in width.uneven) else UNKNOWN

    return SizeRule(groups=width.uneven, at=at)


def negative(rule: SizeRule) -> SizeRule:
    """Minus a size: a place counted from the end."""
    return SizeRule(groups=rule.groups, at=lambda kept: -size if (size := rule.at(kept)) != UNKNOWN else UNKNOWN)


def quotient(whole: Width, part: Width) -> SizeRule:
    """How many times one width goes into another."""
    groups = tuple(dict.fromkeys((*whole.groups, *part.groups)))
    return SizeRule(groups=groups, at=lambda kept: whole.at(kept) // max(1, part.at(kept)))


def _equations(node: torch.fx.Node, coupling: Coupling, widths: Widths) -> Iterator[Equation]:
    """What each integer of a call has to be; none for those that no width changes."""
    expressions = node.meta.get("sizes")
    if node.op != "call_function" or expressions is None:
        return
    slots = integer_slots(node)
    if sum(map(len, slots.values())) != len(expressions):
        return
    source = node.meta.get("source", "")
    code = f"the code at {source}" if source else "the code of a layer of torch"
    refusal = Refusal(
        operator=operator_name(node), where=module_name(node), reason=f"{code} fixes the size of a dimension"
    )
    rule = EXPECTED.get(operator_name(node))
    if rule is None:  # an integer to compute with
        for expression, value in zip(expressions, integers((node.args, node.kwargs)), strict=True):
            if expression[0] != "number":
                yield Equation(expression=expression, expected=fixed(value), refusal=refusal)
        return
    for (name, i), expected in rule(node, Sizes(channels=coupling.channels, widths=widths)):
        if i < len(slots.get(name, ())):
            expression = expressions[slots[name][i]]
            if expected.groups or expression[0] != "number":
                yield Equation(expression=expression, expected=expected, refusal=refusal)


def expected_sizes(node: torch.fx.Node, sizes: Sizes, kept: Kept) -> dict[tuple[str, int], int]:
    """(argument, place in it) to what its integer has to be when the groups keep so many channels."""
    rule = EXPECTED.get(operator_name(node))
    found = {} if rule is None else {place: size.at(kept) for place, size in rule(node, sizes)}
    return {place: size for place, size in found.items() if size != UNKNOWN}


def fixed(value: int) -> SizeRule:
    """A size that no width changes."""
    return SizeRule(groups=(), at=lambda _: value)


Expected: TypeAlias = Iterator[tuple[tuple[str, int], SizeRule]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths of the dimensions of nodes."""

    channels: Mapping[str, Dims]
    widths: Widths

    def rule(self, width: Width) -> SizeRule:
        return rule_of(width, self.widths.sizes)

    def of(self, node: torch.fx.Node) -> list[Width]:
        return [self.widths.of(dim) for dim in self.channels[node.name]]

    def part(self, node: torch.fx.Node, axis: int, start: int, end: int) -> Width:
        return self.widths.of(self.channels[node.name][axis][:, start:end])


def _by_output(node: torch.fx.Node, sizes: Sizes) -> Expected:
    """view(sizes), expand(sizes): the output's dimensions, -1 left open."""
    name = "shape" if "shape" in arguments(node) else "size"
    given = arguments(node)[name]
    own = sizes.of(node)
    for i, (value, width) in enumerate(zip(given, own[len(own) - len(given) :], strict=True)):
        if value != -1:
            yield (name, i), sizes.rule(width)


def _filled(node: torch.fx.Node, sizes: Sizes) -> Expected:
    """full(sizes, value): the value is a number to compute with."""
    yield from _by_output(node, sizes)
    value = arguments(node)["fill_value"]
    if isinstance(value, int):
        yield ("fill_value", 0), fixed(value)


def _unflatten(node: torch.fx.Node, sizes: Sizes) -> Expected:
    own, given = sizes.of(node), arguments(node)["sizes"]
    axis = int(arguments(node)["dim"]) % (len(own) - len(given) + 1)
    for i, value in enumerate(given):
        if value != -1:
            yield ("sizes", i), sizes.rule(own[axis + i])


def _split(node: torch.fx.Node, sizes: Sizes) -> Expected:
    values = arguments(node)
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    axis = int(values.get("dim", 0)) % len(sizes.of(source))
    name = "split_sizes" if "split_sizes" in values else "split_size"
    given = values[name]
    start = 0
    for i, size in enumerate([given] if isinstance(given, int) else given):
        yield (name, i), sizes.rule(sizes.part(source, axis, start, start + size))
        start += size


def _slice(node: torch.fx.Node, sizes: Sizes) -> Expected:
    values = arguments(node)
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    own = sizes.channels[source.name]
    axis = int(values.get("dim", 0)) % len(own)
    size = own[axis].shape[1]
    start, end, _ = bounds(values, size)
    for name, place, given in (("start", start, values.get("start")), ("end", end, values.get("end"))):
        if given is None or given >= size or given == 0:
            continue
        if given > 0:
            yield (name, 0), sizes.rule(sizes.part(source, axis, 0, place))
        else:
            yield (name, 0), negative(sizes.rule(sizes.part(source, axis, place, size)))


def _narrow(node: torch.fx.Node, sizes: Sizes) -> Expected:
    values = arguments(node)
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    own = sizes.channels[source.name]
    axis = int(values["dim"]) % len(own)
    start = int(values["start"]) % own[axis].shape[1]
    yield ("start", 0), sizes.rule(sizes.part(source, axis, 0, start))
    yield ("length", 0), sizes.rule(sizes.part(source, axis, start, start + int(values["length"])))


def _convolution(node: torch.fx.Node, sizes: Sizes) -> Expected:
    values = arguments(node)
    if values["groups"] > 1:
        c_in, per_group = sizes.of(values["input"])[1], sizes.of(values["weight"])[1]
        yield ("groups", 0), quotient(c_in, per_group)


def _transposed(node: torch.fx.Node, sizes: Sizes) -> Expected:
    values = arguments(node)
    if values["groups"] > 1:
        yield ("groups", 0), quotient(sizes.of(node)[1], sizes.of(values["weight"])[1])


def _layer_norm(node: torch.fx.Node, sizes: Sizes) -> Expected:
    given = arguments(node)["normalized_shape"]
    for i, width in enumerate(sizes.of(node)[-len(given) :]):
        yield ("normalized_shape", i), sizes.rule(width)


def _group_norm(node: torch.fx.Node, sizes: Sizes) -> Expected:
    groups = int(arguments(node)["num_groups"])
    if groups > 1:
        width = sizes.of(node)[1]
        size = int(node.meta["val"].shape[1]) // groups
        yield ("num_groups", 0), quotient(width, Width(fixed=size))


LAYERS = {
    **dict.fromkeys("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(), "groups"),
    **dict.fromkeys(("layer_norm", "rms_norm"), "normalized_shape"),
    "group_norm": "num_groups",
}
"""Operator to the attribute that torch's layer of it reads."""

EXPECTED: dict[str, Callable[[torch.fx.Node, Sizes], Expected]] = {
    **dict.fromkeys("zeros ones empty new_zeros new_ones new_empty".split(), _by_output),
    **dict.fromkeys(("full", "new_full"), _filled),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _by_output),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    **dict.fromkeys(("slice", "slice_copy"), _slice),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "narrow": _narrow,
    "unflatten": _unflatten,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
}
