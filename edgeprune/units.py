"""Which kernels to measure: the units of a network as its runtime fuses them, at sampled widths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import median

import numpy as np

from edgeprune.backends import find_backend
from edgeprune.device import Device
from edgeprune.fusion import Unit
from edgeprune.graph import ModelGraph
from edgeprune.kernel import Kernel

LEAST_SHARE = 1 / 8
"""No group is offered fewer than this share of its channels."""
MOST_OPTIONS = 16
SAMPLE_RATIO = 2.0
"""Neighbouring sampled widths of one axis differ by at most about this factor."""
SHARES = 9
"""Sizes offered for sampling where all groups of a unit shrink together."""
MOST_ALONE = 4
"""Sizes under each group alone are offered for sampling where a unit depends on no more groups."""
LEAST_EXCESS = 0.06
STEPS = (32, 16, 8)
"""Widths of a staircase that `staircase_kernels` can tell apart."""


def partition(graph: ModelGraph, device: Device) -> tuple[Unit, ...]:
    """The kernel instances of a graph on the device's runtime."""
    return tuple(find_backend(device.backend).partition(graph, device.precisions[0]))


def kernels(graph: ModelGraph, device: Device, steps: Mapping[str, int] | None = None) -> tuple[Kernel, ...]:
    """Kernels to measure for a graph on a device: every unit's shape on a grid of widths, each once.

    `steps` gives the staircase of each kernel family (`staircase_steps`), 8 where it is not known yet.
    """
    units = partition(graph, device)
    options = width_options(graph, units, steps or {})
    return kernels_at(units, options)


def kernels_at(units: Sequence[Unit], options: Mapping[str, tuple[int, ...]]) -> tuple[Kernel, ...]:
    """All kernels of `samples`, each once."""
    return tuple(sorted({kernel for surface in samples(units, options).values() for kernel in surface}))


def shape_key(kernel: Kernel) -> Kernel:
    """The kernel with its sizes taken out: units that share it share one latency surface over `Kernel.sizes`."""
    if kernel.is_depthwise:
        return kernel.resized((2, 1, kernel.c_out // kernel.c_in))
    if kernel.operator == "conv" and kernel.groups > 1:
        return kernel.resized((2, 2, 2))
    return kernel.resized((1, 1, 1))


def width_options(graph: ModelGraph, units: Sequence[Unit], steps: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """For every group up to 16 widths, ascending and ending dense, on the coarsest step of the kernels it touches.

    A width off the step costs what the next one on it costs, and keeps less.
    """
    dense = graph.dense_widths
    touching: dict[str, list[Unit]] = {}
    for unit in units:
        for name in unit.groups:
            touching.setdefault(name, []).append(unit)
    return {
        group.id: _group_options(
            group.num_channels, _group_step(group.id, touching.get(group.id, []), steps, dense), group.least_channels
        )
        for group in graph.groups
    }


def _group_step(group_id: str, units: Iterable[Unit], steps: Mapping[str, int], dense: Mapping[str, int]) -> int:
    """Step in channels of the group: the device's step divided by how often a channel counts in the unit's width."""
    fewer = {**dense, group_id: dense[group_id] - 1}
    found = [1]
    for unit in units:
        for before, after in zip(_aligned(unit, dense), _aligned(unit, fewer), strict=True):
            if before != after:
                found.append(max(1, steps.get(unit.dense.family, 8) // (before - after)))
    return max(found)


def _aligned(unit: Unit, kept: Mapping[str, int]) -> tuple[int, int]:
    """The widths whose steps count: of one head where there are heads, else of all channels."""
    if unit.dense.operator in ("attention", "matmul"):
        return unit.sizes(kept)[1:]
    return unit.c_in.at(kept), unit.c_out.at(kept)


def _group_options(channels: int, step: int, least: int) -> tuple[int, ...]:
    start = max(least, math.ceil(channels * LEAST_SHARE))
    while channels < 3 * step and step > 4:
        step //= 2
    widths = [w for w in range(step, channels, step) if w >= start]
    if len(widths) > MOST_OPTIONS - 1:
        stride = (len(widths) - 1) / (MOST_OPTIONS - 2)
        widths = [widths[round(i * stride)] for i in range(MOST_OPTIONS - 1)]
    return (*widths, channels)


def samples(units: Iterable[Unit], options: Mapping[str, tuple[int, ...]]) -> dict[Kernel, tuple[Kernel, ...]]:
    """For each latency surface (`shape_key`) the kernels to measure: the product of sampled `Kernel.sizes`."""
    by_shape: dict[Kernel, list[Unit]] = {}
    for unit in units:
        by_shape.setdefault(shape_key(unit.dense), []).append(unit)
    found = {}
    for key, members in by_shape.items():
        dense = members[0].dense
        axes = [set[int](), set[int](), set[int]()]
        for unit in members:
            for axis, sizes in zip(axes, _sizes(unit, options), strict=True):
                axis.update(sizes)
        groups, c_in, c_out = map(_axis, axes)
        found[key] = tuple(dense.resized(sizes) for sizes in product(groups, c_in, c_out))
    return found


def _sizes(unit: Unit, options: Mapping[str, tuple[int, ...]]) -> tuple[set[int], set[int], set[int]]:
    """What each of the unit's `sizes` can be: with all groups from least to dense together, with a few each alone."""
    dense = {group: options[group][-1] for group in unit.groups}
    alone = unit.groups if len(unit.groups) <= MOST_ALONE else ()
    points = [dense | {group: option} for group in alone for option in options[group]]
    points += [
        {group: options[group][round(share * (len(options[group]) - 1))] for group in unit.groups}
        for share in np.linspace(0.0, 1.0, SHARES)
    ]
    groups, c_in, c_out = zip(*(unit.sizes(point) for point in points), strict=True)
    return set(groups), set(c_in), set(c_out)


def _axis(sizes: set[int]) -> tuple[int, ...]:
    """From the largest size down, the nearest available one to each halving, and the smallest."""
    ordered = sorted(sizes)
    low, high = ordered[0], ordered[-1]
    chosen = {low, high}
    target = high / SAMPLE_RATIO
    while target > low * SAMPLE_RATIO**0.5:
        chosen.add(min(ordered, key=lambda size: abs(size - target)))
        target /= SAMPLE_RATIO
    return tuple(sorted(chosen))


def staircase_kernels(precision: str) -> tuple[Kernel, ...]:
    """A few small kernels that show the steps of each family: widths 64 to 128 in eighths, along each axis."""
    found = []
    for family, base in _staircase_bases(precision).items():
        for size in range(64, 129, 8):
            if family == "depthwise":
                found.append(replace(base, c_in=size, c_out=size, groups=size))
            else:
                found += [replace(base, c_in=size), replace(base, c_out=size)]
    return tuple(sorted(set(found)))


def _staircase_bases(precision: str) -> dict[str, Kernel]:
    square = {"stride": (1, 1), "dilation": (1, 1), "spatial": (14, 14), "epilogue": ("bias", "relu")}
    conv = Kernel(
        operator="conv",
        c_in=64,
        c_out=64,
        window=(3, 3),
        padding=(1, 1),
        precision=precision,
        **square,  # type: ignore[arg-type]
    )
    return {
        "conv": conv,
        "pointwise": replace(conv, window=(1, 1), padding=(0, 0), spatial=(28, 28)),
        "depthwise": replace(conv, groups=64, spatial=(28, 28)),
        "linear": Kernel(operator="linear", c_in=512, c_out=512, epilogue=("bias",), precision=precision),
    }


def staircase_steps(latency_us: Mapping[Kernel, float], precision: str) -> dict[str, int]:
    """Per family the widest step in (32, 16, 8) at whose multiples alone kernels run at full rate; 8 if there is none.

    At step s every width half-way between two multiples costs as much as the upper one: its latency stands above
    the chord of its neighbours. A step counts when that excess is more than `LEAST_EXCESS` in the median.
    """
    steps = {}
    for family, base in _staircase_bases(precision).items():
        axes = [["c_in", "c_out"]] if family == "depthwise" else [["c_in"], ["c_out"]]
        steps[family] = max(_step_along(latency_us, base, axis) for axis in axes)
    steps["grouped"] = steps["conv"]
    return steps


def _step_along(latency_us: Mapping[Kernel, float], base: Kernel, axis: list[str]) -> int:
    def at(size: int) -> float | None:
        values = dict.fromkeys(axis, size)
        if len(axis) > 1:
            values["groups"] = size
        return latency_us.get(replace(base, **values))  # type: ignore[arg-type]

    for step in STEPS[:-1]:
        half = step // 2
        excess = []
        for middle in range(64 + half, 128, step):
            low, here, high = at(middle - half), at(middle), at(middle + half)
            if low and here and high:
                excess.append(here / ((low + high) / 2) - 1)
        if excess and median(excess) > LEAST_EXCESS:
            return step
    return STEPS[-1]
