"""The cost model: from measured kernels to the latency of a whole network at any offered widths, with an error bar.

latency(w) = overhead + sum over units u of correction_u * surface_u(groups(w), c_in(w), c_out(w))

A surface interpolates the measured kernels of one shape, multilinearly and inside the measured range only. Corrections
and overhead come from a handful of whole networks that were measured node by node (`calibrate`); without them they are
1 and 0. All microseconds are on the clock of the table: ratios to the session references times their table value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import RegularGridInterpolator

from edgeprune.backends import find_backend
from edgeprune.errors import TableError
from edgeprune.fusion import Unit
from edgeprune.graph import ModelGraph
from edgeprune.kernel import Kernel
from edgeprune.table import LatencyTable
from edgeprune.units import kernels_at, samples, shape_key, staircase_steps, width_options

FloatArray = npt.NDArray[np.float64]

SHRINKAGE = 2.0
"""A unit's own correction counts like its family's after this many measured networks."""
UNCALIBRATED_ERROR = 0.15
"""Relative error stated for a prediction from kernels alone: isolated kernels sum to 5 to 17 % off."""
LEAST_ERROR = 0.015
"""No error bar is narrower than this: the repeatability of the measurements themselves."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Latency over sampled `Kernel.sizes`: `us[i, j, k]` at `sizes[0][i]` groups, `sizes[1][j]` c_in and
    `sizes[2][k]` c_out of one group."""

    sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    us: FloatArray

    def at(self, points: npt.ArrayLike) -> FloatArray:
        """Latencies in us, float64 [n], at points [n, 3] of `Kernel.sizes`. `TableError` outside the measured range."""
        wanted = np.asarray(points, dtype=np.float64).reshape(-1, 3)
        for sizes, column in zip(self.sizes, wanted.T, strict=True):
            low, high = column.min(), column.max()
            if low < sizes[0] or high > sizes[-1]:
                raise TableError(f"width {low:g} to {high:g} is outside the measured {sizes[0]} to {sizes[-1]}")
        axes = [axis for axis, sizes in enumerate(self.sizes) if len(sizes) > 1]
        if not axes:
            return np.full(len(wanted), self.us.item())
        grid = RegularGridInterpolator([self.sizes[axis] for axis in axes], self.us.squeeze())
        return np.asarray(grid(wanted[:, axes]), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class NetworkTiming:
    """A whole network measured node by node: its widths, end-to-end latency and the time of each unit by name.

    `node_us` is empty where the runtime does not tell, and 0 for a unit that it does without. All on the table's clock.
    """

    widths: Mapping[str, int]
    total_us: float
    node_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted latency in us; `error_us` is the half-width of its 90 % interval."""

    us: float
    error_us: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Predicts the latency of `graph` cut to offered widths; `options[group]` are the widths it was sampled for."""

    graph: ModelGraph
    units: tuple[Unit, ...]
    options: Mapping[str, tuple[int, ...]]
    surfaces: Mapping[Kernel, Surface]
    origin: str
    correction: Mapping[str, float] = field(default_factory=dict)
    overhead_us: float = 0.0
    relative_error: float = UNCALIBRATED_ERROR
    networks: int = 0

    def unit_us(self, unit: Unit, kept: Sequence[Mapping[str, int]]) -> FloatArray:
        """Latency of a unit in us, float64 [n], for n choices of the channels that each of its groups keeps."""
        points = [unit.sizes(widths) for widths in kept]
        return self.correction.get(unit.name, 1.0) * self.surfaces[shape_key(unit.dense)].at(points)

    def predict(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> Prediction:
        """Latency of the network with `widths[group]` channels kept (dense where not named) and blocks dropped."""
        kept = {**self.graph.dense_widths, **widths}
        gone = self.vanishing(dropped)
        us = self.overhead_us + sum(
            float(self.unit_us(unit, [kept])[0]) for unit in self.units if unit.name not in gone
        )
        return Prediction(us=us, error_us=us * self.relative_error)

    def vanishing(self, dropped: Iterable[str]) -> frozenset[str]:
        """Names of the units that go with the dropped blocks."""
        names = set(dropped)
        nodes = {node for block in self.graph.blocks if block.id in names for node in block.nodes}
        return frozenset(unit.name for unit in self.units if unit.nodes & nodes)


def cost_model(graph: ModelGraph, table: LatencyTable) -> CostModel:
    """The cost model of a graph on the device of a table, nothing calibrated yet.

    Widths lie on the staircase that the table shows; on steps of 8 where it shows none, or lacks those widths.
    `TableError` names a unit for which nothing was measured.
    """
    precision = str(table.facts["precision"])
    units = tuple(find_backend(str(table.facts["backend"])).partition(graph, precision))
    latency_us = {entry.kernel: table.latency_us(entry.kernel, node=True) for entry in table}
    known = latency_us.keys() | table.failures.keys()
    options = width_options(graph, units, staircase_steps(latency_us, precision))
    if not known >= set(kernels_at(units, options)):
        options = width_options(graph, units, {})
    return cost_model_from(graph, units, options, latency_us, origin=table.origin)


def cost_model_from(
    graph: ModelGraph,
    units: Sequence[Unit],
    options: Mapping[str, tuple[int, ...]],
    latency_us: Mapping[Kernel, float],
    *,
    origin: str,
) -> CostModel:
    """Surfaces from compute times of kernels in us, on the table's clock.

    A kernel that could not be measured narrows the surface it belongs to; `TableError` names the unit for which
    nothing remains.
    """
    surfaces: dict[Kernel, Surface] = {}
    for key, kernels in samples(units, options).items():
        surface = _surface(kernels, latency_us)
        if surface is None:
            names = [unit.name for unit in units if shape_key(unit.dense) == key]
            raise TableError(f"no measured kernel for {names[0]} ({kernels[0].key}): profile the model on this device")
        surfaces[key] = surface
    covered = _covered(units, options, surfaces)
    return CostModel(graph=graph, units=tuple(units), options=covered, surfaces=surfaces, origin=origin)


def _covered(
    units: Sequence[Unit], options: Mapping[str, tuple[int, ...]], surfaces: Mapping[Kernel, Surface]
) -> dict[str, tuple[int, ...]]:
    """The options that every surface covers; a kernel that could not be measured takes widths away."""
    covered = dict(options)
    for unit in units:
        surface = surfaces[shape_key(unit.dense)]
        if not _covers(surface, unit, {group: options[group][-1] for group in unit.groups}):
            raise TableError(f"{unit.name} ({unit.dense.key}) could not be measured at its full width")
        if _covers(surface, unit, {group: options[group][0] for group in unit.groups}):
            continue
        if len(unit.groups) > 1:
            _narrow(covered, surface, unit, options)
            continue
        (group,) = unit.groups
        covered[group] = tuple(width for width in covered[group] if _covers(surface, unit, {group: width}))
    return covered


def _narrow(
    covered: dict[str, tuple[int, ...]], surface: Surface, unit: Unit, options: Mapping[str, tuple[int, ...]]
) -> None:
    """Take away what leaves the surface with every other group dense; all groups at their least must then be on it."""
    dense = {group: options[group][-1] for group in unit.groups}
    for group in unit.groups:
        covered[group] = tuple(width for width in covered[group] if _covers(surface, unit, dense | {group: width}))
    if not _covers(surface, unit, {group: covered[group][0] for group in unit.groups}):
        raise TableError(
            f"{unit.name} ({unit.dense.key}) could not be measured at its narrower widths: see the failed kernels, or "
            "try them again with `edgeprune profile --retry-failed`"
        )


def _covers(surface: Surface, unit: Unit, kept: Mapping[str, int]) -> bool:
    return all(sizes[0] <= size <= sizes[-1] for sizes, size in zip(surface.sizes, unit.sizes(kept), strict=True))


def _surface(kernels: Sequence[Kernel], latency_us: Mapping[Kernel, float]) -> Surface | None:
    """The largest full grid among the measured kernels of one shape."""
    wanted = {kernel.sizes: kernel for kernel in kernels}
    measured = {sizes: latency_us[kernel] for sizes, kernel in wanted.items() if kernel in latency_us}
    axes = [sorted({sizes[axis] for sizes in wanted}) for axis in range(3)]
    while missing := [sizes for sizes in product(*axes) if sizes not in measured]:
        worst_share, worst_axis, worst = 0.0, 0, 0
        for axis, sizes in enumerate(axes):
            slice_size = prod(map(len, axes)) // len(sizes)
            for size, count in Counter(point[axis] for point in missing).items():
                if count / slice_size > worst_share and len(sizes) > 1:
                    worst_share, worst_axis, worst = count / slice_size, axis, size
        if not worst:
            return None
        axes[worst_axis].remove(worst)
    shape = tuple(map(len, axes))
    us = np.array([measured[groups, c_in, c_out] for groups, c_in, c_out in product(*axes)], dtype=np.float64)
    groups, c_in, c_out = map(tuple, axes)
    return Surface(sizes=(groups, c_in, c_out), us=us.reshape(shape))


def calibrate(model: CostModel, timings: Sequence[NetworkTiming]) -> CostModel:
    """Correct a cost model by whole networks, and state its error by leaving each of them out in turn."""
    fitted = _fit(model, timings)
    errors = [
        _fit(model, [*timings[:i], *timings[i + 1 :]]).predict(timing.widths).us / timing.total_us - 1
        for i, timing in enumerate(timings)
        if len(timings) > 1
    ]
    spread = float(np.sqrt(np.mean(np.square(errors)))) if errors else UNCALIBRATED_ERROR / 3
    return replace(fitted, relative_error=max(LEAST_ERROR, 1.645 * spread), networks=len(timings))


def _fit(model: CostModel, timings: Sequence[NetworkTiming]) -> CostModel:
    """Per unit: measured over tabled node time, in logarithms, drawn to its family's mean; then what is left over.

    Where no node times are known one factor is fitted to the totals.
    """
    by_unit = {unit.name: _log_ratios(model, unit, timings) for unit in model.units}
    pooled: dict[str, list[float]] = {}
    for unit in model.units:
        pooled.setdefault(unit.dense.family, []).extend(by_unit[unit.name])
    everything = [value for values in pooled.values() for value in values]
    if not everything:
        factor = float(np.median([t.total_us / replace(model, overhead_us=0.0).predict(t.widths).us for t in timings]))
        return replace(model, correction={unit.name: factor for unit in model.units})
    overall = float(np.median(everything))
    correction = {}
    for unit in model.units:
        family = pooled[unit.dense.family]
        centre = float(np.median(family)) if family else overall
        own = by_unit[unit.name]
        if all(timing.node_us.get(unit.name) == 0.0 for timing in timings):
            correction[unit.name] = 0.0  # a copy that the runtime found a way around
            continue
        correction[unit.name] = float(np.exp((SHRINKAGE * centre + sum(own)) / (SHRINKAGE + len(own))))
    corrected = replace(model, correction=correction, overhead_us=0.0)
    left = [timing.total_us - corrected.predict(timing.widths).us for timing in timings]
    return replace(corrected, overhead_us=max(0.0, float(np.median(left))))


def _log_ratios(model: CostModel, unit: Unit, timings: Sequence[NetworkTiming]) -> list[float]:
    surface = model.surfaces[shape_key(unit.dense)]
    ratios = []
    for timing in timings:
        measured = timing.node_us.get(unit.name, 0.0)
        kept = {**model.graph.dense_widths, **timing.widths}
        tabled = float(surface.at([unit.sizes(kept)])[0])
        if measured > 0.0 and tabled > 0.0:
            ratios.append(float(np.log(measured / tabled)))
    return ratios


def describe(model: CostModel) -> dict[str, Any]:
    """What a manifest says about the model that made a prediction."""
    return {
        "origin": model.origin,
        "networks": model.networks,
        "overhead_us": round(model.overhead_us, 2),
        "relative_error_90": round(model.relative_error, 4),
        "units": len(model.units),
    }
