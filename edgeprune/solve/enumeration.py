"""Small problems, exactly: every combination at once."""

from __future__ import annotations

import math

import numpy as np

from edgeprune.solve.answer import Answer, inside, value_of
from edgeprune.solve.model import model_from_problem, picked
from edgeprune.solve.problem import Problem

LARGEST = 4096
ROUNDING = 1e-9


def enumerated(problem: Problem) -> Answer | None:
    """The best choice, proven; None when every combination is forbidden. At most `LARGEST` combinations."""
    model = model_from_problem(problem)
    count = math.prod(model.sizes)
    strides = [math.prod(model.sizes[v + 1 :]) for v in range(len(model.sizes))]
    options = [(np.arange(count) // stride) % size for stride, size in zip(strides, model.sizes, strict=True)]
    totals, allowed = np.zeros((1 + model.rows, count)), np.ones(count, dtype=np.bool_)
    for scope, table in model.tables.items():
        at = [options[v] for v in scope]
        totals += picked(table, at)
        allowed &= model.allowed[scope][tuple(at)]
    if not allowed.any():
        return None

    def choice(n: int) -> tuple[int, ...]:
        return tuple(int(option[n]) for option in options)

    ratios = np.where(allowed, totals[1:].max(axis=0, initial=-np.inf), np.inf)
    free, least = int(np.argmax(np.where(allowed, totals[0], -np.inf))), int(np.argmin(ratios))
    value_range = max(value_of(problem, choice(free)) - value_of(problem, choice(least)), 0.0)
    near = np.flatnonzero(allowed & (ratios <= 1.0 + ROUNDING))
    for n in near[np.argsort(-totals[0, near], kind="stable")]:
        if inside(problem, choice(int(n))):
            best = choice(int(n))
            return Answer(
                choice=best, upper_bound=value_of(problem, best), least=choice(least), value_range=value_range
            )
    return Answer(choice=None, upper_bound=-math.inf, least=choice(least), value_range=value_range)
