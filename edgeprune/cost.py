"""The cost model: from measured kernels to the latency of a whole network at any widths, with an error bar.

A surface tells the time of a unit's kernel at any widths in the measured range (`surface`); a correction learned from
whole networks tells what that is in a network (`correction`). All microseconds are on the clock of the table: ratios to
the session references times their table value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import hypot, prod
from typing import Any

from edgeprune.backends import find_backend
from edgeprune.correction import Correction, Observation, Work
from edgeprune.eligibility import DENSE, TWO_OF_FOUR
from edgeprune.errors import TableError
from edgeprune.formats import FormatValue, format_values, with_formats
from edgeprune.graph import ModelGraph
from edgeprune.kernel import Kernel
from edgeprune.learning import learn
from edgeprune.staircase import FloatArray, Staircase, find_staircase
from edgeprune.surface import LEAST_US, Surface, surfaces_of
from edgeprune.table import LatencyTable, NetworkEntry
from edgeprune.unit import Unit
from edgeprune.units import eligible_sizes, samples, shape_key, shape_keys, sizes_of, width_options

Box = tuple[tuple[int, int, int], tuple[int, int, int]]
INTERVAL = 1.645
"""Standard deviations to each side that hold 90 % of a normal distribution."""
NODE_US = 0.3
"""Standard error of a node's time, however often it ran: OpenVINO and ONNX Runtime tell whole microseconds (√1/12).

Taken for every runtime that tells node times; for TensorRT's it is an assumption, none were measured.
"""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted latency in us; `error_us` is the half-width of its 90 % interval."""

    us: float
    error_us: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Predicts the latency of `graph` cut to any widths in the measured range; `options[group]` are the offered ones.

    `formats[name]` are layers that may be 2:4: widths named so are 2 or 4, weights of every four that stay. `networks`
    counts the networks of this structure that were measured. `precision` is that of the network; some of its
    kernels may be in fp32, where the runtime has no others.
    """

    graph: ModelGraph
    units: tuple[Unit, ...]
    options: Mapping[str, tuple[int, ...]]
    surfaces: Mapping[Kernel, Surface]
    correction: Correction
    origin: str
    networks: int = 0
    precision: str = "fp32"
    formats: Mapping[str, FormatValue] = field(default_factory=dict)

    @property
    def basis(self) -> str:
        """What predictions rest on: `measured kernels`, and that they rest on no whole network where it is so."""
        alone = "" if self.correction.networks else f" alone (no whole network was timed in {self.precision})"
        return f"{self.origin} kernels{alone}"

    @property
    def overhead_us(self) -> float:
        """What the dense network takes beside its units, or what its units hide of one another (negative)."""
        return self.correction.overhead_us(self.graph.structure_hash)

    @property
    def relative_error(self) -> float:
        """Half-width of the dense network's 90 % interval over its latency."""
        dense = self.predict({})
        return dense.error_us / dense.us

    def unit_us(self, unit: Unit, kept: Sequence[Mapping[str, int]], cold: float = 1.0) -> FloatArray:
        """What a unit adds to a network, float64 [n] in us, for n choices of the channels that its groups keep.

        `cold` is how far the whole network is beyond the cache.
        """
        inside, beyond = self.unit_us_inside_and_beyond(unit, kept)
        us: FloatArray = inside + cold * (beyond - inside)
        return us

    def unit_us_inside_and_beyond(self, unit: Unit, kept: Sequence[Mapping[str, int]]) -> tuple[FloatArray, FloatArray]:
        """The same for a network inside the cache and for one far beyond it: between them it is linear."""
        works: dict[int, Work] = {}
        by_surface: dict[Kernel, list[int]] = {}
        kernels = [unit.kernel(widths) for widths in kept]
        for number, kernel in enumerate(kernels):
            own = replace(unit.dense, sparsity=kernel.sparsity)
            by_surface.setdefault(shape_key(own), []).append(number)
        for key, numbers in by_surface.items():
            tabled = self.surfaces[key].at([kernels[number].sizes for number in numbers])
            for number, us in zip(numbers, tabled.tolist(), strict=True):
                works[number] = Work(name=unit.name, kernel=kernels[number], us=us)
        return self.correction.unit_us_inside_and_beyond(
            self.graph.structure_hash, [works[number] for number in range(len(kept))]
        )

    def cold(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> float:
        """How far the network with these widths, dense where not named, is beyond the cache: 0 to 1."""
        return self.correction.cold(self._works(widths, dropped))

    def predict(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> Prediction:
        """Latency of the network with `widths[group]` channels kept (dense where not named) and blocks dropped."""
        us, deviation = self.correction.total(self.graph.structure_hash, self._works(widths, dropped))
        return Prediction(us=us, error_us=INTERVAL * deviation)

    def _works(self, widths: Mapping[str, int], dropped: Iterable[str]) -> tuple[Work, ...]:
        gone = self.vanishing(dropped)
        kept = {**self.graph.dense_widths, **widths}
        return works_of([unit for unit in self.units if unit.name not in gone], kept, self.surfaces)

    def vanishing(self, dropped: Iterable[str]) -> frozenset[str]:
        """Names of the units that go with the dropped blocks."""
        names = set(dropped)
        nodes = {node for block in self.graph.blocks if block.id in names for node in block.nodes}
        return frozenset(unit.name for unit in self.units if unit.nodes & nodes)


def works_of(units: Sequence[Unit], kept: Mapping[str, int], surfaces: Mapping[Kernel, Surface]) -> tuple[Work, ...]:
    """The units of a network with `kept[group]` channels and their tabled times."""
    return works_at({unit.name: unit.kernel(kept) for unit in units}, surfaces)


def works_at(
    kernels: Mapping[str, Kernel], surfaces: Mapping[Kernel, Surface], node_us: Mapping[str, float] | None = None
) -> tuple[Work, ...]:
    """The units of a network, by name, with their tabled times; each surface is asked once."""
    names: dict[Kernel, list[str]] = {}
    for name, kernel in kernels.items():
        names.setdefault(_key_in(surfaces, kernel) or shape_key(kernel), []).append(name)
    found: dict[str, Work] = {}
    for key, own in names.items():
        sizes = [kernels[name].sizes for name in own]
        us, errors = surfaces[key].at(sizes).tolist(), surfaces[key].error_at(sizes).tolist()
        for name, time, error in zip(own, us, errors, strict=True):
            told = None if node_us is None else node_us.get(name)
            found[name] = Work(name=name, kernel=kernels[name], us=time, error=error, node_us=told)
    return tuple(found[name] for name in kernels)


def cost_model(graph: ModelGraph, table: LatencyTable, *, formats: Sequence[str] = (DENSE,)) -> CostModel:
    """The cost model of a graph on the device of a table, corrected by all whole networks that the table holds.

    Widths lie on the staircase that the table shows; on steps of 8 where it shows none, or lacks those widths.
    With `2:4` among the `formats` a layer may be 2:4 where the table holds such kernels of it.
    `TableError` names a unit for which nothing was measured.
    """
    precision = str(table.facts["precision"])
    units = tuple(find_backend(str(table.facts["backend"])).partition(graph, precision))
    if TWO_OF_FOUR in formats:
        units = with_formats(units, graph)
    latency_us = {entry.kernel: table.latency_us(entry.kernel, node=True) for entry in table}
    coarse_us = {
        entry.kernel: NODE_US if entry.node_ratio is not None and entry.origin == "measured" else 0.0 for entry in table
    }
    doubts = {
        entry.kernel: hypot(entry.doubt, coarse_us[entry.kernel] / max(LEAST_US, latency_us[entry.kernel]))
        for entry in table
    }
    stairs = find_staircase(latency_us, precision)
    return cost_model_from(
        graph,
        units,
        width_options(graph, units, stairs.steps()),
        latency_us,
        doubts=doubts,
        origin=table.origin,
        stairs=stairs,
        networks=table.networks,
        references_us=table.references_us,
        precision=precision,
    )


def cost_model_from(
    graph: ModelGraph,
    units: Sequence[Unit],
    options: Mapping[str, tuple[int, ...]],
    latency_us: Mapping[Kernel, float],
    *,
    origin: str,
    doubts: Mapping[Kernel, float] | None = None,
    stairs: Staircase | None = None,
    networks: Sequence[NetworkEntry] = (),
    references_us: Mapping[str, float] | None = None,
    precision: str = "fp32",
) -> CostModel:
    """Surfaces from compute times of kernels in us and a correction from networks, on the table's clock.

    `doubts` are relative standard errors of kernels. Without `references_us` the ratios of networks are microseconds. A
    kernel that could not be measured narrows the surface it belongs to; `TableError` names the unit for which nothing
    remains.
    """
    stairs = stairs or Staircase()
    boxes = _boxes(units, options, latency_us)
    units = _measured_formats(units, options, boxes)
    foreign = {shape_key(kernel) for network in networks for kernel in network.kernels.values()}.difference(boxes)
    measured: dict[Kernel, dict[Kernel, float]] = {key: {} for key in (*boxes, *foreign)}
    for kernel, us in latency_us.items():
        own, *others = shape_keys(kernel)
        for key in (own, *(key for key in others if key in boxes and _inside(kernel, boxes[key]))):
            if key in measured:
                measured[key][kernel] = us
    measured = {key: kernels for key, kernels in measured.items() if kernels}
    ranges = {key: _range(kernels) for key, kernels in measured.items()}
    everywhere = surfaces_of(measured, ranges, stairs, doubts)
    surfaces = {key: replace(everywhere[key], low=low, high=high) for key, (low, high) in boxes.items()}
    covered = _covered(units, options, surfaces)  # names a unit that is not there at full width, before it is asked
    dense = works_of(units, graph.dense_widths, surfaces)
    observed = [
        _observation(network, everywhere, _reference_us(network, references_us))
        for network in networks
        if is_covered(network, everywhere)
    ]
    return CostModel(
        graph=graph,
        units=tuple(units),
        options=covered,
        surfaces=surfaces,
        correction=learn(observed, stairs, known=[(graph.structure_hash, dense)]),
        origin=origin,
        networks=sum(network.structure == graph.structure_hash for network in networks),
        precision=precision,
        formats=format_values(units, graph),
    )


def _measured_formats(
    units: Sequence[Unit], options: Mapping[str, tuple[int, ...]], boxes: Mapping[Kernel, Box]
) -> tuple[Unit, ...]:
    """The units without the formats of those whose 2:4 kernels were not all measured."""
    found = []
    for unit in units:
        if unit.format:
            box = boxes.get(shape_key(replace(unit.dense, sparsity=TWO_OF_FOUR)))
            c_in, c_out = eligible_sizes(unit.dense, *sizes_of(unit, options)[1:])
            ends = [(1, end(c_in), end(c_out)) for end in (min, max)] if c_in and c_out else []
            if box is None or not ends or any(not box[0][i] <= size[i] <= box[1][i] for size in ends for i in range(3)):
                unit = replace(unit, format="")
        found.append(unit)
    return tuple(found)


def _inside(kernel: Kernel, box: Box) -> bool:
    low, high = box
    return all(a <= size <= b for a, size, b in zip(low, kernel.sizes, high, strict=True))


def _range(kernels: Iterable[Kernel]) -> Box:
    """The least and the largest of all `Kernel.sizes`."""
    sizes = [kernel.sizes for kernel in kernels]
    groups, c_in, c_out = zip(*sizes, strict=True)
    return (min(groups), min(c_in), min(c_out)), (max(groups), max(c_in), max(c_out))


def is_covered(network: NetworkEntry, surfaces: Mapping[Kernel, Surface]) -> bool:
    """Whether the surfaces tell the time of all of its kernels."""
    return all(_key_in(surfaces, kernel) is not None for kernel in set(network.kernels.values()))


def _key_in(surfaces: Mapping[Kernel, Surface], kernel: Kernel) -> Kernel | None:
    """The surface that tells the time of a kernel, if one does."""
    covering = (key for key in shape_keys(kernel) if key in surfaces and surfaces[key].covers(kernel.sizes))
    return next(covering, None)


def _reference_us(network: NetworkEntry, references_us: Mapping[str, float] | None) -> float:
    if references_us is None:
        return 1.0
    if network.reference not in references_us:
        raise TableError(f"no session of the table has timed the reference '{network.reference}'")
    return references_us[network.reference]


def _observation(network: NetworkEntry, surfaces: Mapping[Kernel, Surface], reference_us: float) -> Observation:
    node_us = {name: ratio * reference_us for name, ratio in network.nodes.items()}
    low, high = network.ratio_ci
    return Observation(
        structure=network.structure,
        works=works_at(network.kernels, surfaces, node_us),
        total_us=network.ratio * reference_us,
        noise=max(Observation.noise, (high - low) / (2 * 1.96 * network.ratio)),
    )


def _boxes(
    units: Sequence[Unit], options: Mapping[str, tuple[int, ...]], latency_us: Mapping[Kernel, float]
) -> dict[Kernel, Box]:
    """For each shape key the least and the largest `Kernel.sizes` between which everything was measured."""
    boxes: dict[Kernel, Box] = {}
    for key, kernels in samples(units, options).items():
        box = _box(kernels, latency_us)
        if box is None and key.sparsity == TWO_OF_FOUR:
            continue
        if box is None:
            names = [unit.name for unit in units if shape_key(unit.dense) == key]
            raise TableError(f"no measured kernel for {names[0]} ({kernels[0].key}): profile the model on this device")
        boxes[key] = box
    return boxes


def _box(kernels: Sequence[Kernel], latency_us: Mapping[Kernel, float]) -> Box | None:
    """The corners of the largest full grid among the measured ones of these kernels."""
    wanted = {kernel.sizes: kernel for kernel in kernels}
    measured = {sizes for sizes, kernel in wanted.items() if kernel in latency_us}
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
    return (axes[0][0], axes[1][0], axes[2][0]), (axes[0][-1], axes[1][-1], axes[2][-1])


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
    return surface.covers(unit.sizes(kept))


def describe(model: CostModel) -> dict[str, Any]:
    """What a manifest says about the model that made a prediction."""
    return {
        "origin": model.origin,
        "networks": model.networks,
        "taught_by": model.correction.networks,
        "overhead_us": round(model.overhead_us, 2),
        "relative_error_90": round(model.relative_error, 4),
        "units": len(model.units),
    }
