"""Which kernels to measure: the units of a network as its runtime fuses them, at sampled widths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from edgeprune.backends import find_backend
from edgeprune.device import Device
from edgeprune.eligibility import C_IN_STEP, C_OUT_STEP, TWO_OF_FOUR, refusal
from edgeprune.graph import ModelGraph
from edgeprune.kernel import Kernel
from edgeprune.unit import Unit

LEAST_SHARE = 1 / 8
"""No group is offered fewer than this share of its channels."""
MOST_OPTIONS = 16
SAMPLE_RATIO = 2.83
"""Neighbouring widths of the first grid differ by at most about this factor; what lies between is sampled by need."""
SHARES = 9
"""Sizes offered for sampling where all groups of a unit shrink together."""
MOST_ALONE = 4
"""Sizes under each group alone are offered for sampling where a unit depends on no more groups."""


def partition(graph: ModelGraph, device: Device) -> tuple[Unit, ...]:
    """The kernel instances of a graph on the device's runtime."""
    return tuple(find_backend(device.backend).partition(graph, device.precisions[0]))


def kernels(graph: ModelGraph, device: Device, steps: Mapping[str, int] | None = None) -> tuple[Kernel, ...]:
    """Kernels to measure for a graph on a device: every unit's shape on a grid of widths, each once.

    `steps` gives the staircase of each kernel family (`Staircase.steps`), 8 where it is not known yet.
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


def shape_keys(kernel: Kernel) -> tuple[Kernel, ...]:
    """All surfaces that the kernel may be a point of, its own first.

    A grouped convolution cut to one group is an ordinary one, and cut to one channel a group a depthwise one.
    """
    own = shape_key(kernel)
    if kernel.operator != "conv" or not (kernel.groups == 1 or kernel.is_depthwise):
        return (own,)
    depthwise = (shape_key(kernel.resized((2, 1, kernel.c_out))),) if kernel.groups == kernel.c_in == 1 else ()
    return own, kernel.resized((2, 2, 2)), *depthwise


def width_options(graph: ModelGraph, units: Sequence[Unit], steps: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """For every group up to 16 widths, ascending and ending dense, on the coarsest step of the kernels it touches.

    A width off the step costs about what the next one on it costs, and keeps less.
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


def multiple_near(width: int, options: Sequence[int]) -> int:
    """The nearest multiple of 8, of 4 in a narrow group, inside the range of the offered widths."""
    step = 8 if options[-1] >= 24 else 4
    return min(options[-1], max(options[0], round(width / step) * step))


def samples(units: Iterable[Unit], options: Mapping[str, tuple[int, ...]]) -> dict[Kernel, tuple[Kernel, ...]]:
    """For each latency surface (`shape_key`) the kernels to measure: the product of sampled `Kernel.sizes`."""
    by_shape: dict[Kernel, list[Unit]] = {}
    for unit in units:
        by_shape.setdefault(shape_key(unit.dense), []).append(unit)
        if unit.format:
            sparse = replace(unit, dense=replace(unit.dense, sparsity=TWO_OF_FOUR))
            by_shape.setdefault(shape_key(sparse.dense), []).append(sparse)
    found = {}
    for key, members in by_shape.items():
        dense = members[0].dense
        axes = [set[int](), set[int](), set[int]()]
        for unit in members:
            for axis, sizes in zip(axes, sizes_of(unit, options), strict=True):
                axis.update(sizes)
        if dense.sparsity == TWO_OF_FOUR:
            axes[1:] = eligible_sizes(dense, axes[1], axes[2])
        if not all(axes):
            continue
        groups, c_in, c_out = map(_axis, axes)
        found[key] = tuple(dense.resized(sizes) for sizes in product(groups, c_in, c_out))
    return found


def eligible_sizes(dense: Kernel, c_in: Iterable[int], c_out: Iterable[int]) -> tuple[set[int], set[int]]:
    """Those at which a kernel of this kind can be 2:4; the two don't depend on one another."""
    step_in, step_out = C_IN_STEP.get(dense.precision, 0), C_OUT_STEP
    inputs = {size for size in c_in if refusal(dense.resized((1, size, step_out))) is None}
    outputs = {size for size in c_out if step_in and refusal(dense.resized((1, step_in, size))) is None}
    return inputs, outputs


def sizes_of(unit: Unit, options: Mapping[str, tuple[int, ...]]) -> tuple[set[int], set[int], set[int]]:
    """What each of the unit's `sizes` can be: with all groups from least to dense together, with a few each alone."""
    dense = {group: options[group][-1] for group in unit.groups}
    alone = unit.groups if len(unit.groups) <= MOST_ALONE else ()
    points = [dense | {group: option} for group in alone for option in options[group]]
    points += [
        {group: options[group][round(share * (len(options[group]) - 1))] for group in unit.groups}
        for share in np.linspace(0.0, 1.0, SHARES)
    ]
    points.append({group: least_width(options[group]) for group in unit.groups})
    groups, c_in, c_out = zip(*(unit.sizes(point) for point in points), strict=True)
    return set(groups), set(c_in), set(c_out)


def least_width(options: Sequence[int]) -> int:
    """The least width that a prediction may be asked for: `LEAST_SHARE` of the dense one, on the staircase or not."""
    return min(options[0], max(1, math.ceil(LEAST_SHARE * options[-1])))


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
