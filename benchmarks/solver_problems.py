"""Selection problems of the size of real networks, from measured cost surfaces; and a synthetic chain of any length.

A network's costs are those of `benchmarks/solver_<name>.json` (`benchmarks.solver_surfaces` takes them out of a
measured table). Values are drawn, with a seed: the saliency of every channel log-normal, of every group and block
another log-normal factor. Widths lie on multiples of `step` from an eighth of the channels on, and "gone" with their
block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.solve import Factor, Problem

FloatArray = npt.NDArray[np.float64]
FOLDER = Path(__file__).parent
CHUNK = 1 << 15
LATENCY, PARAMETERS = "latency_us", "parameters"


@cache
def document_of(name: str) -> dict[str, Any]:
    """The cost surfaces of a network."""
    found: dict[str, Any] = json.loads((FOLDER / f"solver_{name}.json").read_text())
    return found


def unit_us(document: dict[str, Any], unit: dict[str, Any], widths: Sequence[npt.ArrayLike]) -> FloatArray:
    """What a unit adds to the network in us, over the broadcast widths of its groups."""
    surface = document["surfaces"][unit["surface"]]
    given = [np.asarray(width, dtype=np.float64) for width in widths]
    a, b = (
        np.float64(unit["sizes"][axis]) if place is None else given[place]
        for axis, place in zip((1, 2), unit["axes"], strict=True)
    )
    worked, ragged, off = [], np.float64(1.0), []
    for size, step, penalty in zip((a, b), surface["steps"], surface["ragged"], strict=True):
        up = np.where(size > 1, np.ceil(size / step) * step, size)
        worked.append(up)
        ragged = ragged * (1 + penalty * (up != size))
        off.append(size % max(step, 8) != 0)
    tabled = _on_unique(surface, unit["sizes"][0], *worked) * ragged
    factor, ragged_in, ragged_out = unit["factors"]
    one, of_a, of_b, of_ab = unit["bytes_us"]
    us = tabled * (factor + ragged_in * off[0] + ragged_out * off[1]) + one + of_a * a + of_b * b + of_ab * a * b
    one, of_a, of_b, of_ab = unit.get("ragged_us", (0.0, 0.0, 0.0, 0.0))
    us = us + (off[0] | off[1]) * (one + of_a * a + of_b * b + of_ab * a * b)
    return np.asarray(us, dtype=np.float64)


def _on_unique(surface: dict[str, Any], groups: float, a: FloatArray, b: FloatArray) -> FloatArray:
    """The surface over broadcast widths that are worked on, each pair evaluated once."""
    if np.ndim(a) == np.ndim(b) == 1 and np.shape(a) == np.shape(b):  # points, not a grid
        return _surface(surface, groups, a, b)
    own_a, place_a = np.unique(a, return_inverse=True)
    own_b, place_b = np.unique(b, return_inverse=True)
    grid_a, grid_b = np.broadcast_arrays(own_a[:, None], own_b[None])
    grid = _surface(surface, groups, grid_a.ravel(), grid_b.ravel()).reshape(grid_a.shape)
    return grid[place_a.reshape(np.shape(a)), place_b.reshape(np.shape(b))]


def _surface(surface: dict[str, Any], groups: float, a: FloatArray, b: FloatArray) -> FloatArray:
    """Mean times exp of the Gaussian process, at points."""
    points = np.stack([np.full_like(a, groups), a, b], axis=1)
    known, weights = np.log2(np.array(surface["worked"])), np.array(surface["weights"])
    c = surface["mean"]
    mean = np.maximum(c[0] + c[1] * groups * a + c[2] * groups * b + c[3] * groups * a * b, 1e-12)
    found = np.empty(len(points))
    for start in range(0, len(points), CHUNK):
        steps = (np.log2(points[start : start + CHUNK])[:, None] - known) / surface["octaves"]
        distance = np.sqrt(3 * np.square(steps).sum(axis=-1))
        found[start : start + CHUNK] = (surface["size"] ** 2 * (1 + distance) * np.exp(-distance)) @ weights
    return np.asarray(mean * np.exp(found))


def network_problem(
    name: str, *, step: int, share: float, seed: int = 0, parameters: float | None = None, whole: bool = False
) -> Problem:
    """Widths in steps of `step` channels and blocks within a share of the dense latency, and of the parameters.

    whole: widths below what was measured too.
    """
    document, rng = document_of(name), np.random.default_rng(seed)
    groups = document["groups"]
    least = [step] * len(groups) if whole else document["least"]
    widths = [_widths(group["channels"], start, step) for group, start in zip(groups, least, strict=True)]
    gone = [int(g["block"] is not None) for g in groups]
    factors = []
    for i, group in enumerate(groups):
        saliency = np.sort(rng.lognormal(0.0, 1.0, group["channels"]))[::-1] * rng.lognormal(0.0, 0.7)
        value = np.cumsum(saliency / group["channels"])[widths[i] - 1]
        factors.append(Factor(variables=(f"g{i}",), value=np.concatenate([np.zeros(gone[i]), value])))
    for block in range(document["blocks"]):
        first, *others = [i for i, group in enumerate(groups) if group["block"] == block]
        stays = np.append(0.0, np.full(len(widths[first]), 0.3 * rng.lognormal(0.0, 0.7)))
        factors.append(Factor(variables=(f"g{first}",), value=stays))
        for other in others:
            tie = np.zeros((len(widths[first]) + 1, len(widths[other]) + 1))
            tie[0, 1:] = tie[1:, 0] = np.inf
            factors.append(_costing((first, other), {LATENCY: tie}))
    dense = {LATENCY: 0.0, PARAMETERS: 0.0}
    fixed = document["overhead_us"]
    for unit in document["units"]:
        names = unit["groups"]
        if not names:
            fixed += float(unit_us(document, unit, []))
            continue
        cost = {LATENCY: unit_us(document, unit, np.ix_(*(widths[i] for i in names)))}
        if parameters is not None:
            cost[PARAMETERS] = _parameters(unit, np.ix_(*(widths[i] for i in names)))
        for budget, table in cost.items():
            dense[budget] += float(table[(-1,) * len(names)])
            for axis, i in enumerate(names):
                pad = [(gone[i] if at == axis else 0, 0) for at in range(len(names))]
                table = np.pad(table, pad) if unit["block"] == groups[i]["block"] else _padded_flat(table, pad)
            cost[budget] = table
        factors.append(_costing(names, cost))
    factors.append(Factor(variables=("fixed",), value=np.zeros(1), cost={LATENCY: np.array([fixed])}))
    limits = {LATENCY: share * (fixed + dense[LATENCY])}
    if parameters is not None:
        limits[PARAMETERS] = parameters * dense[PARAMETERS]
    variables = {f"g{i}": len(own) + gone[i] for i, own in enumerate(widths)} | {"fixed": 1}
    return Problem(variables=variables, budgets=limits, factors=factors)


def _widths(channels: int, least: int, step: int) -> npt.NDArray[np.int64]:
    start = -(-least // step) * step
    return np.unique(np.append(np.arange(start, channels, step), channels))


def _padded_flat(table: FloatArray, pad: Sequence[tuple[int, int]]) -> FloatArray:
    """A unit outside the block costs what it costs at the least width."""
    return np.pad(table, pad, mode="edge")


def _costing(numbers: Sequence[int], cost: dict[str, FloatArray]) -> Factor:
    shape = next(iter(cost.values())).shape
    return Factor(variables=tuple(f"g{i}" for i in numbers), value=np.zeros(shape), cost=cost)


def _parameters(unit: dict[str, Any], widths: Sequence[npt.ArrayLike]) -> FloatArray:
    a, b = (
        np.float64(unit["sizes"][axis]) if place is None else np.asarray(widths[place], dtype=np.float64)
        for axis, place in zip((1, 2), unit["axes"], strict=True)
    )
    return np.asarray(a * b * float(unit["window"]))


def chain(length: int, options: int, *, share: float = 0.4, seed: int = 0) -> Problem:
    """Widths of a chain of layers: staircase costs of neighbours, concave values."""
    rng = np.random.default_rng(seed)
    width = np.arange(1, options + 1) / options
    factors, total = [], 0.0
    for i in range(length):
        saliency = np.sort(rng.random(options))[::-1] * rng.lognormal(0, 0.7)
        factors.append(Factor(variables=(f"g{i}",), value=np.cumsum(saliency)))
    for i in range(length - 1):
        steps = np.ceil(20 * np.outer(width, width)) * rng.lognormal(0, 0.8)
        cost = steps * (1 + 0.1 * rng.random((options, options))) + 1
        total += float(cost.max())
        factors.append(Factor(variables=(f"g{i}", f"g{i + 1}"), value=np.zeros_like(cost), cost={LATENCY: cost}))
    names = {f"g{i}": options for i in range(length)}
    return Problem(variables=names, budgets={LATENCY: share * total}, factors=factors)


def recorded(name: str, *, share: float) -> Problem:
    """A whole problem as `benchmarks.solver_criteria --record` wrote it, within a share of the dense latency."""
    problem = Problem.from_json(FOLDER / f"problem_{name}.json")
    return replace(problem, budgets={budget: share * dense for budget, dense in problem.budgets.items()})
