"""The oracle: `scipy.optimize.milp` on the linearised model of a problem, nothing taken out before.

One binary per option of a variable, one continuous column per combination of a factor of several variables, tied to
the options by its marginals, one row per budget.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from edgeprune.solve import Problem


def plain(problem: Problem, *, gap: float, limit_s: float) -> dict[str, Any]:
    """{"seconds", "value", "bound", "choice", "said"}; "value" is None where it found none.

    "said": solved, time, infeasible, or what HiGHS says.
    """
    started = time.perf_counter()
    names = {name: i for i, name in enumerate(problem.variables)}
    sizes = np.array(list(problem.variables.values()), dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(sizes)])
    wide = [factor for factor in problem.factors if len(factor.variables) > 1]
    width = int(first[-1]) + sum(factor.value.size for factor in wide)
    gain, most = np.zeros(width), np.ones(width)
    costs = {budget: np.zeros(width) for budget in problem.budgets}
    rows, columns, signs = [np.repeat(np.arange(len(sizes)), sizes)], [np.arange(first[-1])], [np.ones(first[-1])]
    height, right = len(sizes), [np.ones(len(sizes))]
    column = int(first[-1])
    for factor in problem.factors:
        if len(factor.variables) == 1:
            start = int(first[names[factor.variables[0]]])
            own = start + np.arange(factor.value.size)
        else:
            own = column + np.arange(factor.value.size)
            column += factor.value.size
            for axis, name in enumerate(factor.variables):
                option = np.indices(factor.value.shape)[axis].ravel()
                rows += [height + option, height + np.arange(sizes[names[name]])]
                columns += [own, first[names[name]] + np.arange(sizes[names[name]])]
                signs += [np.ones(len(own)), -np.ones(sizes[names[name]])]
                right.append(np.zeros(sizes[names[name]]))
                height += int(sizes[names[name]])
        gain[own] += factor.value.ravel()
        for budget, table in factor.cost.items():
            free = np.isfinite(table.ravel())
            costs[budget][own] += np.where(free, table.ravel(), 0.0)
            most[own[~free]] = 0.0
    equal = np.concatenate(right)
    matrix = sparse.csr_array(
        (np.concatenate(signs), (np.concatenate(rows), np.concatenate(columns))), shape=(height, width)
    )
    limits = [
        LinearConstraint(costs[budget][None] / limit, -np.inf, 1.0)
        for budget, limit in problem.budgets.items()
        if math.isfinite(limit)
    ]
    unit = max(float(np.abs(gain).max()), 1e-300)
    result: Any = milp(
        -gain / unit,
        constraints=[LinearConstraint(matrix, equal, equal), *limits],
        integrality=(np.arange(width) < first[-1]).astype(np.int64),
        bounds=Bounds(np.zeros(width), most),
        options={"mip_rel_gap": gap, "time_limit": max(1.0, limit_s - (time.perf_counter() - started))},
    )
    bound = getattr(result, "mip_dual_bound", None)
    return {
        "seconds": time.perf_counter() - started,
        "value": None if result.x is None else float(-result.fun) * unit,
        "choice": {} if result.x is None else _choice(result.x, names, first),
        "bound": None if bound is None else float(-bound) * unit,
        "said": {0: "solved", 1: "time", 2: "infeasible"}.get(result.status, result.message),
    }


def _choice(x: Any, names: dict[str, int], first: Any) -> dict[str, int]:
    return {name: int(np.argmax(x[first[i] : first[i + 1]])) for name, i in names.items()}
