"""What is to be chosen, and the answer: `Factor`, `Problem`, `Solution`, and the file `problem.json`.

Legend: V variables, each with finitely many options; B budgets; a factor over variables with k1, k2, ... options has
tables of shape [k1, k2, ...].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from edgeprune.errors import InputError, StorageError, did_you_mean
from edgeprune.folders import write_atomically

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.int64]
Status: TypeAlias = Literal["solved", "stopped", "over budget", "forbidden"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """What one, two or three variables add to the value and to the cost of an answer.

    variables: 1 to 3 different names; axis i of every table is an option of `variables[i]`.
    value: float64 [k1, ...], finite, any sign; any array-like is taken and copied.
    cost: {budget: float64 [k1, ...]}, any sign; a budget that is left out costs nothing; +inf forbids the combination.
    ValueError for tables that are not so.
    """

    variables: tuple[str, ...]
    value: FloatArray
    cost: Mapping[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "variables", (self.variables,) if isinstance(self.variables, str) else tuple(self.variables)
        )
        name = f"factor {self.variables}"
        if not 1 <= len(self.variables) <= 3 or len(set(self.variables)) != len(self.variables):
            raise ValueError(f"{name}: expected 1 to 3 different variables")
        object.__setattr__(self, "value", _frozen(self.value, f"{name}: value"))
        object.__setattr__(self, "cost", {b: _frozen(c, f"{name}: cost {b!r}") for b, c in self.cost.items()})
        if self.value.ndim != len(self.variables):
            raise ValueError(f"{name}: value has shape {self.value.shape}; expected {len(self.variables)} axes")
        if not np.isfinite(self.value).all():
            raise ValueError(
                f"{name}: value{_place(~np.isfinite(self.value))} is not finite; to forbid, use an infinite cost"
            )
        for budget, cost in self.cost.items():
            if cost.shape != self.value.shape:
                raise ValueError(f"{name}: cost {budget!r} has shape {cost.shape}, value has {self.value.shape}")
            bad = np.isnan(cost) | (cost == -np.inf)
            if bad.any():
                raise ValueError(f"{name}: cost {budget!r}{_place(bad)} is {cost[bad][0]}; expected a number or +inf")


def _frozen(table: npt.ArrayLike, name: str) -> FloatArray:
    try:
        array = np.array(table, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not an array of numbers: {error}") from None
    array.setflags(write=False)
    return array


def _place(bad: BoolArray) -> str:
    return "".join(f"[{i}]" for i in np.argwhere(bad)[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Choose one option for each variable: the sum of the factors' values as large as possible, inside every budget.

    variables: {name: number of options, at least 1}; a variable in no factor gets option 0.
    budgets: {name: limit}, a limit above 0, in the unit of the cost tables; +inf is no limit.
    factors: in any order; several over the same variables add up.
    ValueError, with the factor and the values, for anything else.
    """

    variables: Mapping[str, int]
    budgets: Mapping[str, float]
    factors: Sequence[Factor]

    def __post_init__(self) -> None:
        for name, options in self.variables.items():
            if isinstance(options, bool) or int(options) != options or options < 1:
                raise ValueError(f"variable {name!r} has {options!r} options; expected a whole number, at least 1")
        for name, limit in self.budgets.items():
            if not limit > 0:
                raise ValueError(f"budget {name!r} is {limit!r}; expected a number above 0 (a fixed cost is a factor)")
        object.__setattr__(self, "variables", {name: int(options) for name, options in self.variables.items()})
        object.__setattr__(self, "budgets", {name: float(limit) for name, limit in self.budgets.items()})
        object.__setattr__(self, "factors", tuple(self.factors))
        for number, factor in enumerate(self.factors):
            self._check(f"factor {number} {factor.variables}", factor)

    def _check(self, name: str, factor: Factor) -> None:
        for variable in factor.variables:
            if variable not in self.variables:
                raise ValueError(f"{name}: unknown variable {variable!r}{did_you_mean(variable, self.variables)}")
        expected = tuple(self.variables[variable] for variable in factor.variables)
        if factor.value.shape != expected:
            raise ValueError(f"{name}: tables of shape {factor.value.shape}; the variables' options give {expected}")
        for budget in factor.cost:
            if budget not in self.budgets:
                raise ValueError(f"{name}: cost of unknown budget {budget!r}{did_you_mean(budget, self.budgets)}")

    def value_of(self, choice: Mapping[str, int]) -> float:
        """The sum of the factors' values at {variable: option}, correctly rounded."""
        return math.fsum(float(f.value[tuple(choice[v] for v in f.variables)]) for f in self.factors)

    def cost_of(self, choice: Mapping[str, int]) -> dict[str, float]:
        """{budget: sum of the factors' costs} at {variable: option}, correctly rounded; +inf where it is forbidden."""
        at = [tuple(choice[v] for v in f.variables) for f in self.factors]
        return {
            budget: math.fsum(
                float(f.cost[budget][place]) for f, place in zip(self.factors, at, strict=True) if budget in f.cost
            )
            for budget in self.budgets
        }

    @classmethod
    def from_json(cls, path: Path | str) -> Problem:
        """Read `problem.json` (docs/solver.md); InputError with file, place and what was expected."""
        try:
            document = json.loads(Path(path).read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        except OSError as error:
            raise InputError(error.strerror or str(error), file=path) from None
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON: {error.msg} (column {error.colno})", file=path, place=error.lineno) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a problem: {error}", file=path) from None
        try:
            return _parse(document)
        except _BadPlace as bad:
            raise InputError(bad.message, file=path, place=bad.place) from None
        except ValueError as error:
            raise InputError(str(error), file=path) from None

    def to_json(self, path: Path | str) -> None:
        """Write `problem.json`; numbers come back bit for bit. StorageError if the folder can't be written."""
        path = Path(path)
        if not path.parent.is_dir():
            raise StorageError(f"cannot write {path}: no such folder")
        write_atomically(path, json.dumps(self.to_document(), allow_nan=False) + "\n")

    def to_document(self) -> dict[str, Any]:
        """The content of `problem.json` as plain lists and dicts."""
        factors = [
            {
                "variables": list(f.variables),
                "value": f.value.tolist(),
                "cost": {b: _nulls(c.tolist()) for b, c in f.cost.items()},
            }
            for f in self.factors
        ]
        budgets = {name: _finite(limit) for name, limit in self.budgets.items()}
        return {"schema": SCHEMA, "variables": dict(self.variables), "budgets": budgets, "factors": factors}


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The answer of `solve`.

    feasible: whether some choice is inside every budget.
    choice: {variable: option}; the least-cost answer when not feasible, empty when `status` is "forbidden".
    value, cost: of the choice, summed in float64 from the problem's own tables, correctly rounded.
    upper_bound: no feasible choice has a larger value (up to HiGHS's numerical tolerances);
        -inf when not feasible.
    gap: (upper_bound - value) / (unconstrained best value - value of the least-cost answer); inf when not feasible.
        Under several budgets that answer is the least found.
    least_ratio: the least max over budgets of cost/limit found, that of the least-cost answer; above 1, and then
        proven to 1e-6 (less under a time limit), exactly when not feasible; inf when everything is forbidden; 0 when
        there are no limits.
    status: "solved" (gap reached), "stopped" (feasible, but the gap is larger than asked, as a rule by the time
        limit), "over budget" or "forbidden" (no combination is allowed).
    seconds: wall time.
    """

    feasible: bool
    choice: dict[str, int]
    value: float
    cost: dict[str, float]
    upper_bound: float
    gap: float
    least_ratio: float
    status: Status
    seconds: float

    def to_document(self) -> dict[str, Any]:
        """The fields as plain JSON; infinite numbers become null."""
        numbers = {name: _finite(getattr(self, name)) for name in ("value", "upper_bound", "gap", "least_ratio")}
        return {**vars(self), **numbers, "cost": {b: _finite(c) for b, c in self.cost.items()}}


def _nulls(node: Any) -> Any:
    """Nested lists with None for infinity."""
    return [_nulls(entry) for entry in node] if isinstance(node, list) else _finite(node)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


class _BadPlace(ValueError):
    def __init__(self, place: str, message: str) -> None:
        super().__init__(f"{place}: {message}")
        self.place, self.message = place, message


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number; a forbidden combination is a cost of null")


def _get(node: object, key: str, kind: type, place: str) -> Any:
    """node[key], an object of the kind (dict or list)."""
    if not isinstance(node, dict):
        raise _BadPlace(place or "top level", f"found {_shown(node)}, expected an object")
    path = f"{place}.{key}" if place else key
    if key not in node:
        raise _BadPlace(path, f"missing{did_you_mean(key, node)}")
    if not isinstance(node[key], kind):
        raise _BadPlace(path, f"found {_shown(node[key])}, expected {'an object' if kind is dict else 'a list'}")
    return node[key]


def _shown(node: object) -> str:
    text = json.dumps(node)
    return text if len(text) < 40 else text[:36] + "..."


def _is_number(node: object) -> bool:
    return isinstance(node, (int, float)) and not isinstance(node, bool)


def _parse(document: object) -> Problem:
    schema = _get(document, "schema", object, "")
    if isinstance(schema, bool) or schema != SCHEMA:
        raise _BadPlace("schema", f"found {_shown(schema)}, expected {SCHEMA}")
    variables: dict[str, int] = _get(document, "variables", dict, "")
    for name, options in variables.items():
        if not isinstance(options, int) or isinstance(options, bool) or options < 1:
            raise _BadPlace(
                f"variables.{name}", f"found {_shown(options)}, expected a whole number of options, at least 1"
            )
    budgets: dict[str, float] = {}
    for name, limit in _get(document, "budgets", dict, "").items():
        if limit is not None and not (_is_number(limit) and limit > 0):
            raise _BadPlace(f"budgets.{name}", f"found {_shown(limit)}, expected a number above 0 (null: no limit)")
        budgets[name] = math.inf if limit is None else _float(limit, f"budgets.{name}")
    factors = _get(document, "factors", list, "")
    return Problem(
        variables=variables,
        budgets=budgets,
        factors=[_parse_factor(node, f"factors[{i}]", variables, budgets) for i, node in enumerate(factors)],
    )


def _parse_factor(node: object, place: str, variables: Mapping[str, int], budgets: Mapping[str, float]) -> Factor:
    names = _get(node, "variables", list, place)
    for name in names:
        if not isinstance(name, str) or name not in variables:
            hint = did_you_mean(name, variables) if isinstance(name, str) else ""
            raise _BadPlace(f"{place}.variables", f"found {_shown(name)}, expected a name of 'variables'{hint}")
    shape = tuple(variables[name] for name in names)
    if not 1 <= len(names) <= 3 or len(set(names)) != len(names):
        raise _BadPlace(f"{place}.variables", f"found {_shown(names)}, expected 1 to 3 different names")
    costs = _get(node, "cost", dict, place) if isinstance(node, dict) and "cost" in node else {}
    for budget in costs:
        if budget not in budgets:
            raise _BadPlace(f"{place}.cost.{budget}", f"no such budget{did_you_mean(budget, budgets)}")
    return Factor(
        variables=tuple(names),
        value=_table(_get(node, "value", list, place), shape, f"{place}.value", forbids=False),
        cost={b: _table(table, shape, f"{place}.cost.{b}", forbids=True) for b, table in costs.items()},
    )


def _table(node: object, shape: tuple[int, ...], place: str, *, forbids: bool) -> FloatArray:
    """The nested lists as float64 [shape]; null is +inf where it may forbid."""
    flat: list[float] = list(_flat(node, shape, place, forbids=forbids))
    return np.array(flat, dtype=np.float64).reshape(shape)


def _flat(node: object, shape: tuple[int, ...], place: str, *, forbids: bool) -> Iterator[float]:
    if not shape:
        if node is None and forbids:
            yield math.inf
        elif _is_number(node):
            yield _float(cast(float, node), place)
        else:
            raise _BadPlace(place, f"found {_shown(node)}, expected a number{' or null' if forbids else ''}")
        return
    if not isinstance(node, list) or len(node) != shape[0]:
        found = f"{len(node)} entries" if isinstance(node, list) else _shown(node)
        raise _BadPlace(place, f"found {found}, expected {shape[0]}, one for each option")
    for i, entry in enumerate(node):
        yield from _flat(entry, shape[1:], f"{place}[{i}]", forbids=forbids)


def _float(number: float, place: str) -> float:
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise _BadPlace(place, "the number is too large for float64")
    return value
