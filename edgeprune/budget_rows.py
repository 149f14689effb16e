"""Budget rows of the selection problem: a device's latency, the parameters, the multiply-adds, as tables.

A row is a sum of *pieces*, each a function of a few groups that goes with a block: a fused kernel of a device, or a
monomial of a parameter's size (a weight of [c_out, c_in] is one product of two widths, behind a concatenation one for
each of the groups that were joined, so that parameters are exact there too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np

from edgeprune.constraints import parameters_of
from edgeprune.cost import CostModel
from edgeprune.graph.structure import ModelGraph, Width
from edgeprune.graph.widths import Widths
from edgeprune.unit import Unit
from edgeprune.variables import FloatArray, Variables

LATENCY = "latency_us"
Points: TypeAlias = Sequence[Mapping[str, int]]
Tables: TypeAlias = list[tuple[tuple[str, ...], FloatArray]]
RowUnit: TypeAlias = Literal["us", "parameters", "bytes", "MACs"]
BYTES = {"fp32": 4, "fp16": 2, "bf16": 4, "int8": 1}
"""Of a stored parameter: bf16 is how a runtime computes, its weights stay float32 in the file."""
ROUNDING = 1e-9
"""What sums in another order may differ by: a budget of exactly the dense latency keeps the dense network."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`at(points)` float64 [n]: what it costs at n choices of the widths of `groups`; 0 with any block of `gone_with`.

    Beyond `widest` variables, and one for its block, it is tabulated to first order.
    """

    groups: tuple[str, ...]
    gone_with: frozenset[str]
    at: Callable[[Points], FloatArray]
    widest: int = 2

    def scope(self, variables: Variables) -> tuple[str, ...]:
        """Variables that decide its cost: of its groups, and its block's where none of them says that it is gone."""
        names = tuple(dict.fromkeys(variables.name_of[group] for group in self.groups))
        block = variables.smallest(self.gone_with)
        if block is not None and not any(variables.says_gone(group, block) for group in self.groups):
            names = tuple(dict.fromkeys((*names, variables.carrier[block.id])))
        return names

    def is_wide(self, variables: Variables) -> bool:
        """Whether it depends on too many variables for one table."""
        most = self.widest if variables.smallest(self.gone_with) is None else 3
        return len(self.scope(variables)) > most

    def tables(self, variables: Variables, point: Mapping[str, int]) -> tuple[Tables, float]:
        """Tables over its variables, and what it costs whatever is chosen."""
        names = self.scope(variables)
        if not names:
            return [], float(self.at([point])[0])
        if self.is_wide(variables):
            return self._first_order(variables, point)
        return [(names, self._full_table(variables, names))], 0.0

    def _full_table(self, variables: Variables, names: tuple[str, ...]) -> FloatArray:
        shape = tuple(variables.count(name) for name in names)
        points, gone = [], []
        for index in np.ndindex(*shape):
            kept = {name: variables.widths(name)[i] for name, i in zip(names, index, strict=True)}
            is_gone = any(width == 0 for width in kept.values())
            gone.append(is_gone)
            if is_gone:
                kept = {name: variables.widths(name)[-1] for name in names}
            points.append({group: kept[variables.name_of[group]] for group in self.groups})
        return np.where(gone, 0.0, self.at(points)).reshape(shape)

    def _first_order(self, variables: Variables, point: Mapping[str, int]) -> tuple[Tables, float]:
        """Around `point`: the cost there, and what moving one variable alone adds; nothing once its block is gone."""
        here = float(self.at([point])[0])
        tables: Tables = []
        block = variables.smallest(self.gone_with)
        carrier = "" if block is None else variables.carrier[block.id]
        for name in dict.fromkeys(variables.name_of[group] for group in self.groups):
            own = [group for group in self.groups if variables.name_of[group] == name]
            moved = [{**point, **{g: width or point[g] for g in own}} for width in variables.widths(name)]
            added = self.at(moved) - here
            if block is None or any(variables.says_gone(group, block) for group in own):
                tables.append(((name,), added))
            else:
                tables.append(((name, carrier), np.outer(added, _stays(carrier, variables))))
        if block is None:
            return tables, here
        return [*tables, ((carrier,), here * _stays(carrier, variables))], 0.0


def _stays(carrier: str, variables: Variables) -> FloatArray:
    """0 for the option of a carrier that drops its block, 1 for the others."""
    return np.array([float(width > 0) for width in variables.widths(carrier)])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One budget, `limit` and `dense` in `unit`; `predict(widths, dropped)` gives a value and its 90 % half-width.

    `name` is the budget's in the problem, `of` a device's name or a quantity. `is_exact` is false where a size depends
    on which channels go, not only on how many. `pieces` hold for networks like the dense one; `pieces_near` gives those
    near another one, where they differ.
    """

    name: str
    of: str
    unit: RowUnit
    limit: float
    dense: float
    pieces: tuple[Piece, ...]
    predict: Callable[[Mapping[str, int], Iterable[str]], tuple[float, float]]
    fixed: float = 0.0
    origin: str = "counted"
    is_exact: bool = True
    pieces_near: Callable[[Mapping[str, int], Iterable[str]], tuple[Piece, ...]] | None = None

    def near(self, widths: Mapping[str, int], dropped: Iterable[str]) -> Row:
        """The row as it is for networks like the one of these widths and dropped blocks."""
        return self if self.pieces_near is None else replace(self, pieces=self.pieces_near(widths, dropped))

    def is_wide(self, variables: Variables) -> bool:
        """Whether a piece is tabulated to first order."""
        return any(piece.is_wide(variables) for piece in self.pieces)

    def spent(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> Spent:
        """What the network of these widths and dropped blocks takes of it."""
        value, error = self.predict(widths, dropped)
        return Spent(row=self, value=value, error=error)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a chosen network takes of one budget, in the row's unit; `error` is 0 where it is counted."""

    row: Row
    value: float
    error: float

    @property
    def fits(self) -> bool:
        """Whether what is predicted is inside the limit."""
        return self.value <= self.row.limit * (1 + ROUNDING)

    def to_json(self) -> dict[str, Any]:
        """Latencies in ms, counts as they are."""
        scale, unit = (1e3, "ms") if self.row.unit == "us" else (1, self.row.unit)

        def number(value: float) -> float | int:
            return round(value / scale, 4) if unit == "ms" else round(value)

        return {
            "of": self.row.of,
            "unit": unit,
            "limit": number(self.row.limit),
            "predicted": number(self.value),
            "error": number(self.error),
            "dense": number(self.row.dense),
            "origin": self.row.origin,
        }


def latency_row(cost: CostModel, limit_us: float, *, of: str = "", name: str = LATENCY) -> Row:
    """A device's latency in us as its cost model predicts it."""

    def predict(widths: Mapping[str, int], dropped: Iterable[str]) -> tuple[float, float]:
        found = cost.predict(widths, dropped)
        return found.us, found.error_us

    known: dict[Any, tuple[FloatArray, FloatArray]] = {}

    def us_of(unit: Unit, cold: float) -> Callable[[Points], FloatArray]:
        def at(points: Points) -> FloatArray:
            key = unit.name, tuple(tuple(widths[group] for group in unit.variables) for widths in points)
            if key not in known:
                known[key] = cost.unit_us_inside_and_beyond(unit, points)
            inside, beyond = known[key]
            us: FloatArray = inside + cold * (beyond - inside)
            return us

        return at

    def pieces_near(widths: Mapping[str, int], dropped: Iterable[str]) -> tuple[Piece, ...]:
        cold = cost.cold(widths, dropped)
        return tuple(_piece_of(unit, cost.graph, us_of(unit, cold)) for unit in cost.units)

    return Row(
        name=name,
        of=of,
        unit="us",
        limit=limit_us,
        dense=cost.predict({}).us,
        pieces=pieces_near({}, ()),
        predict=predict,
        fixed=cost.overhead_us,
        origin=f"predicted from {cost.basis}",
        pieces_near=pieces_near,
    )


def macs_row(cost: CostModel, limit: float) -> Row:
    """Multiply-adds of the units."""

    def macs_of(unit: Unit) -> Callable[[Points], FloatArray]:
        return lambda points: np.array([float(unit.kernel(widths).macs) for widths in points])

    def predict(widths: Mapping[str, int], dropped: Iterable[str]) -> tuple[float, float]:
        kept, gone = {**cost.graph.dense_widths, **widths}, cost.vanishing(dropped)
        return float(sum(unit.kernel(kept).macs for unit in cost.units if unit.name not in gone)), 0.0

    return Row(
        name="macs",
        of="macs",
        unit="MACs",
        limit=limit,
        dense=predict({}, ())[0],
        pieces=tuple(_piece_of(unit, cost.graph, macs_of(unit)) for unit in cost.units),
        predict=predict,
    )


def _piece_of(unit: Unit, graph: ModelGraph, at: Callable[[Points], FloatArray]) -> Piece:
    gone_with = frozenset(block.id for block in graph.blocks if unit.nodes & block.nodes)
    return Piece(groups=unit.variables, gone_with=gone_with, at=at, widest=3 if unit.format else 2)


def params_row(graph: ModelGraph, limit: float, *, bytes_each: int | None = None) -> Row:
    """Elements of the model's parameters (no buffers), or their bytes."""
    widths, names = Widths(graph.groups), {name: node for node, name in graph.program.parameters.items()}
    goes = [(block.id, parameters_of(block, graph)) for block in graph.blocks]
    counts: dict[tuple[tuple[str, ...], frozenset[str]], int] = {}
    is_exact = True
    for name in parameter_names(graph):
        gone_with = frozenset(block for block, parameters in goes if name in parameters)
        dims = [widths.of(channels) for channels in graph.channels[names[name]]]
        is_exact = is_exact and not any(dim.uneven for dim in dims)
        for groups, times in _monomials(dims):
            counts[groups, gone_with] = counts.get((groups, gone_with), 0) + times
    each = bytes_each or 1

    def predict(kept: Mapping[str, int], dropped: Iterable[str]) -> tuple[float, float]:
        gone, found = frozenset(dropped), {**graph.dense_widths, **kept}
        stays = [(g, times) for (g, gone_with), times in counts.items() if not gone & gone_with]
        return float(each * sum(times * prod(found[group] for group in groups) for groups, times in stays)), 0.0

    return Row(
        name="params",
        of="params",
        unit="parameters" if bytes_each is None else "bytes",
        limit=limit,
        dense=predict({}, ())[0],
        pieces=tuple(
            Piece(groups=tuple(dict.fromkeys(groups)), gone_with=gone, at=_monomial(groups, each * times), widest=3)
            for (groups, gone), times in counts.items()
        ),
        predict=predict,
        is_exact=is_exact,
    )


def parameter_names(graph: ModelGraph) -> list[str]:
    """Parameters that the program reads; buffers too where the eager model isn't known."""
    if graph.model is None:
        return list(graph.parameter_shapes)
    return [name for name, _ in graph.model.named_parameters() if name in graph.parameter_shapes]


def _monomials(dims: Sequence[Width]) -> list[tuple[tuple[str, ...], int]]:
    """The product of sums as a sum of products: groups (as often as they count) and a factor."""
    parts = [[((), dim.fixed), *dim.terms] if dim.fixed else list(dim.terms) for dim in dims]
    found = []
    for terms in product(*parts):
        groups = tuple(sorted(group for own, _ in terms for group in own))
        found.append((groups, prod(times for _, times in terms)))
    return found


def _monomial(groups: tuple[str, ...], times: int) -> Callable[[Points], FloatArray]:
    return lambda points: np.array([float(times * prod(kept[group] for group in groups)) for kept in points])
