"""The mixed-integer program of a model, for HiGHS.

It is the local marginal polytope (Wainwright and Jordan, "Graphical models, exponential families, and variational
inference", 2008, section 4.1) with binary marginals: one binary per option, one continuous variable per allowed
combination of a pair or triple, tied to the binaries by their marginals, and one row per budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from edgeprune.errors import EdgepruneError
from edgeprune.solve.model import Model, Numbers, picked
from edgeprune.solve.problem import FloatArray, IntArray

SCALE = 1000.0
"""HiGHS accepts 1e-6 in absolute terms: with rows and objective of this size, 1e-9 of a budget."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Minimise objective x subject to lower <= matrix x <= upper; matrix in compressed rows (data, indices, indptr).

    starts: the first binary of each variable, and the end of the last.
    """

    objective: FloatArray
    data: FloatArray
    indices: IntArray
    indptr: IntArray
    lower: FloatArray
    upper: FloatArray
    integral: FloatArray
    least: FloatArray
    most: FloatArray
    starts: IntArray

    def arrays(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def chosen(self, x: FloatArray) -> Numbers:
        pairs = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        return tuple(int(np.argmax(x[a:b])) for a, b in pairs)

    def without(self, numbers: Numbers) -> Program:
        """One more row: not all of these options."""
        columns = np.array([a + o for a, o in zip(self.starts.tolist(), numbers, strict=False)], dtype=np.int64)
        return replace(
            self,
            data=np.append(self.data, np.ones(len(columns))),
            indices=np.append(self.indices, columns),
            indptr=np.append(self.indptr, self.indptr[-1] + len(columns)),
            lower=np.append(self.lower, -np.inf),
            upper=np.append(self.upper, len(columns) - 1.0),
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """status: 0 optimal, 1 stopped at the limit, 2 infeasible; x: None if none was found; bound: on the objective."""

    status: int
    x: FloatArray | None = None
    bound: float | None = None


Highs: TypeAlias = Callable[[Program, float, float], Reply]
"""(program, relative gap, seconds) -> reply."""


def run_highs(program: Program, rel_gap: float, seconds: float) -> Reply:
    """In this process, where nothing can interrupt it. EdgepruneError when HiGHS fails."""
    matrix: Any = sparse.csr_array(
        (program.data, program.indices, program.indptr), shape=(len(program.lower), len(program.objective))
    )
    arguments: dict[str, Any] = {
        "c": program.objective,
        "integrality": program.integral,
        "bounds": Bounds(program.least, program.most),
        "constraints": LinearConstraint(matrix, program.lower, program.upper),
    }
    options: Any = {"mip_rel_gap": rel_gap, **({"time_limit": seconds} if seconds < np.inf else {})}
    result: Any = milp(**arguments, options=options)
    if result.status in (3, 4):
        result = milp(**arguments, options=options | {"presolve": False})
    if result.status not in (0, 1, 2):
        raise EdgepruneError(f"HiGHS failed: {result.message}")
    bound = result.mip_dual_bound if result.status != 2 else None
    return Reply(status=int(result.status), x=result.x, bound=bound if bound is None else float(bound))


def program_of(model: Model, goal: str, size: float) -> Program:
    """Goal "value": the objective is -(value + 1); "ratio": the largest cost, in units of `size`; both times `SCALE`.

    Columns: one binary per option, variables in order; then one continuous column per allowed combination of each pair
    and triple; last one column that is 1 (goal "value": the objective's offset) or the ratio (goal "ratio").
    Rows: the options of a variable sum to 1; the combinations with an option sum to its binary; one row per budget.
    """
    starts = np.concatenate([[0], np.cumsum(model.sizes)]).astype(np.int64)
    combinations = {s: np.argwhere(free) for s, free in model.allowed.items() if len(s) > 1}
    columns = int(starts[-1]) + sum(len(c) for c in combinations.values()) + 1
    weights = np.zeros((1 + model.rows, columns))
    entries: list[tuple[Any, Any, Any]] = []  # (row, column, coefficient)
    height = len(model.sizes)
    for v, size_v in enumerate(model.sizes):
        entries.append((np.full(size_v, v), starts[v] + np.arange(size_v), np.ones(size_v)))
        if (v,) in model.tables:
            weights[:, starts[v] : starts[v + 1]] = model.tables[(v,)]
    right = [np.ones(height)]
    column = int(starts[-1])
    for scope, at in combinations.items():
        own = column + np.arange(len(at))
        weights[:, own] = picked(model.tables[scope], list(at.T))
        for axis, v in enumerate(scope):
            options = np.arange(model.sizes[v])
            entries.append((height + at[:, axis], own, np.ones(len(at))))
            entries.append((height + options, starts[v] + options, -np.ones(len(options))))
            right.append(np.zeros(len(options)))
            height += len(options)
        column += len(at)
    value = goal == "value"
    rows = SCALE * weights[1:] / (1.0 if value else size)
    rows[:, -1] = 0.0 if value else -SCALE
    objective = -SCALE * weights[0] if value else np.zeros(columns)
    objective[-1] = -SCALE if value else SCALE
    row, col, coefficient = (np.concatenate(part) for part in zip(*entries, strict=True))
    ties = sparse.coo_array((coefficient, (row, col)), shape=(height, columns))
    matrix = sparse.csr_array(sparse.vstack([ties, sparse.csr_array(rows)]))
    equal = np.concatenate(right)
    most, least = np.ones(columns), np.zeros(columns)
    least[-1], most[-1] = (1.0, 1.0) if value else (-np.inf, np.inf)
    return Program(
        objective=objective,
        data=matrix.data,
        indices=matrix.indices.astype(np.int64),
        indptr=matrix.indptr.astype(np.int64),
        lower=np.concatenate([equal, np.full(model.rows, -np.inf)]),
        upper=np.concatenate([equal, np.full(model.rows, SCALE if value else 0.0)]),
        integral=(np.arange(columns) < starts[-1]).astype(np.float64),
        least=least,
        most=most,
        starts=starts,
    )
