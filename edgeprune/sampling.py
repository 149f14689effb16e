"""Which kernels to measure next: where the cost model is uncertain and the network spends its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgeprune.cost import CostModel
from edgeprune.kernel import Kernel
from edgeprune.staircase import LEAST_STEP
from edgeprune.surface import Surface
from edgeprune.unit import Unit
from edgeprune.units import multiple_near, shape_key, shape_keys

GOAL = 0.008
"""Relative error of whole networks, from interpolating between kernels alone, at which sampling ends."""
BATCH = 32
MOST_ROUNDS = 6
NETWORKS = 12
"""Random choices of widths on which the error is judged, and from which kernels to measure are taken."""


def interpolation_error(cost: CostModel) -> float:
    """Relative standard deviation of the latency of networks of random widths, from the surfaces alone."""
    found = []
    for widths in _random_widths(cost):
        us, error = zip(*(_expected(cost, unit, widths, cost.surfaces) for unit in cost.units), strict=True)
        found.append(float(np.sqrt(np.sum(np.square(error))) / np.sum(us)))
    return float(np.mean(found))


def uncertain_kernels(cost: CostModel, known: Mapping[Kernel, object], count: int = BATCH) -> tuple[Kernel, ...]:
    """Up to `count` kernels whose measurement takes most from the error of whole networks; none of `known`.

    One by one, each given those before it: what a measurement makes certain depends on where it is, not on its result.
    """
    candidates: dict[Kernel, list[Kernel]] = {}
    units: dict[Kernel, int] = {}
    for unit in cost.units:
        key = shape_key(unit.dense)
        units[key] = units.get(key, 0) + 1
        own = candidates.setdefault(key, [])
        sizes = [unit.sizes(widths) for widths in _random_widths(cost)]
        own += [kernel for each in sizes if (kernel := unit.dense.resized(each)) not in known]
    surfaces = dict(cost.surfaces)
    left = {key: sorted(set(own)) for key, own in candidates.items() if own}
    scores = {key: _scores(surfaces[key], own, units[key]) for key, own in left.items()}
    chosen: list[Kernel] = []
    while len(chosen) < count and left:
        key = max(left, key=lambda key: (float(scores[key].max()), key))
        kernel = left[key].pop(int(scores[key].argmax()))
        chosen.append(kernel)
        surfaces[key] = surfaces[key].with_points([kernel.sizes])
        if not left[key]:
            del left[key], scores[key]
        else:
            scores[key] = _scores(surfaces[key], left[key], units[key])
    return tuple(sorted(chosen))


def foreseen_rounds(cost: CostModel, known: Mapping[Kernel, object]) -> list[tuple[Kernel, ...]]:
    """The rounds of `uncertain_kernels` up to `GOAL` if every measurement came out as predicted.

    The first is what a profile measures next; how rough a surface is may turn out otherwise then, and the later ones
    with it.
    """
    rounds: list[tuple[Kernel, ...]] = []
    known = dict(known)
    while len(rounds) < MOST_ROUNDS and interpolation_error(cost) > GOAL:
        more = uncertain_kernels(cost, known)
        if not more:
            break
        rounds.append(more)
        known |= dict.fromkeys(more)
        cost = _as_certain_as_with(cost, more)
    return rounds


def _as_certain_as_with(cost: CostModel, kernels: Sequence[Kernel]) -> CostModel:
    sizes: dict[Kernel, list[tuple[int, int, int]]] = {}
    for kernel in kernels:  # a grouped convolution of one group is measured as the ordinary kernel that it is
        for key in shape_keys(kernel):
            if key in cost.surfaces and cost.surfaces[key].covers([kernel.sizes]):
                sizes.setdefault(key, []).append(kernel.sizes)
    added = {key: cost.surfaces[key].with_points(points) for key, points in sizes.items()}
    return replace(cost, surfaces={**cost.surfaces, **added})


def _scores(surface: Surface, kernels: Sequence[Kernel], units: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Uncertain time of each kernel in all units of its shape, us."""
    sizes = [kernel.sizes for kernel in kernels]
    return np.asarray(units * surface.at(sizes) * surface.error_at(sizes))


def _expected(
    cost: CostModel, unit: Unit, widths: Mapping[str, int], surfaces: Mapping[Kernel, Surface]
) -> tuple[float, float]:
    sizes = [unit.sizes(widths)]
    surface = surfaces[shape_key(unit.dense)]
    us = float(surface.at(sizes)[0])
    return us, us * float(surface.error_at(sizes)[0])


def _random_widths(cost: CostModel) -> list[dict[str, int]]:
    """The same choices each time, so that the same table asks for the same kernels.

    Of offered widths; where these leave out multiples of `LEAST_STEP` every fourth is of such, and where rough widths
    are another matter every fourth of any.
    """
    rng = np.random.default_rng(0)
    families = {unit.dense.family for unit in cost.units}
    stairs = cost.correction.stairs
    has_grain, has_between = stairs.has_grain(families), max(stairs.of(f).step for f in families) > LEAST_STEP
    found = []
    for number in range(NETWORKS):
        widths = {}
        for group, options in sorted(cost.options.items()):
            if has_grain and number % 4 == 3:
                widths[group] = int(rng.integers(options[0], options[-1] + 1))
            elif has_between and number % 4 == 1:
                widths[group] = multiple_near(int(rng.integers(options[0], options[-1] + 1)), options)
            else:
                widths[group] = int(rng.choice(options))
        found.append(widths)
    return found
