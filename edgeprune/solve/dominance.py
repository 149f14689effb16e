"""Options that another option of the same variable replaces, whatever the other variables are.

Option p replaces o when, with the worst case over the neighbours taken factor by factor, p allows all that o allows,
adds no less value and no more to any cost. Replacing is transitive, and what is replaced at one variable is so whatever
is chosen at the others: all variables may give up their replaced options at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edgeprune.solve.elimination import Scope
from edgeprune.solve.model import Model, restrict
from edgeprune.solve.problem import BoolArray, FloatArray


def without_dominated(model: Model) -> Model:
    """Take out options that one next to them replaces: the flats of a staircase. Of equal options the last one goes."""
    touching: dict[int, list[Scope]] = {v: [] for v in range(len(model.sizes))}
    for scope in model.tables:
        for v in scope:
            touching[v].append(scope)
    for step in (-1, 1):
        several = [v for v, size in enumerate(model.sizes) if size > 1]
        keep: dict[Scope, BoolArray] = {(v,): _beside(model, v, touching[v], step) for v in several}
        model = restrict(model, keep) or model
    return model


def _losses(model: Model, scope: Scope, v: int) -> tuple[FloatArray, BoolArray]:
    """What is to be small, and where it counts: float64 [1 + R, k, n], bool [k, n] for n combinations of the others."""
    axis = scope.index(v)
    table = np.moveaxis(model.tables[scope], axis + 1, 1).reshape(1 + model.rows, model.sizes[v], -1)
    loss = np.concatenate([-table[:1], table[1:]])
    return loss, np.moveaxis(model.allowed[scope], axis, 0).reshape(model.sizes[v], -1)


def _worst(step: FloatArray, free_o: BoolArray, free_p: BoolArray) -> FloatArray:
    """The largest loss where o is allowed; infinite where p is not."""
    if not (free_o.all() and free_p.all()):
        step = np.where(free_o, np.where(free_p, step, np.inf), -np.inf)
    return np.asarray(step.max(axis=-1, initial=-np.inf), dtype=np.float64)


def _beside(model: Model, v: int, around: Iterable[Scope], step: int) -> BoolArray:
    """Which options o are not replaced by option o + step."""
    first, second = (slice(1, None), slice(None, -1)) if step < 0 else (slice(None, -1), slice(1, None))
    worst = np.zeros((1 + model.rows, model.sizes[v] - 1))
    for scope in around:
        loss, free = _losses(model, scope, v)
        worst += _worst(loss[:, second] - loss[:, first], free[first], free[second])
    keep = np.ones(model.sizes[v], dtype=np.bool_)
    keep[first] = ~(worst <= 0).all(axis=0)
    return keep
