"""The curve of one kernel shape: its latency over one width, and where it steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from textwrap import wrap

from edgeprune.errors import TableError
from edgeprune.kernel import CONTRACTIONS, Kernel
from edgeprune.staircase import find_staircase, staircase_kernels
from edgeprune.table_listing import IMPORTED, Item, Listing

NOISE = 0.02
"""A change of latency below this share is none."""
STEEPNESS = 1.5
"""A rise is a step where it is steeper than this many times the mean slope."""
PERIODS = (4, 8, 16, 32, 64, 128)
AGREEMENT = 0.8
LEAST_WIDTHS = 3
ENOUGH_PROBES = 0.8
"""Share of a family's probes from which on its stairs are named."""
MOST_TICKS = 24
LINE = 100  # characters
MOST_NAMED = 12
"""Steps that are named in words and in a plot, there the largest; the others are marked only."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Between two neighbouring widths; `change` is the relative change of latency, negative for a fall."""

    before: int
    after: int
    change: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """`latency_us` over `widths` of one axis (`c_in`, `c_out` or `channels`), all else of the kernel fixed.

    `period`: rises come after its multiples, and after each of them; None where no such number is found. `stairs` is
    what the cost model takes from all probes of the family along this axis, None where they were not measured.
    """

    kernel: str  # its key, with * for the width
    axis: str
    quantity: str  # `compute node` or `end to end`
    origin: str
    widths: tuple[int, ...]
    latency_us: tuple[float, ...]
    rises: tuple[Step, ...]
    falls: tuple[Step, ...]
    period: int | None
    stairs: str | None = None

    def describe(self) -> str:
        """`steps of 16 channels, after 64, 80, 96, 112`."""
        if not self.rises:
            return "no steps found"
        where = ", ".join(str(step.before) for step in self.rises[:MOST_NAMED])
        where += f" and {len(self.rises) - MOST_NAMED} more" if len(self.rises) > MOST_NAMED else ""
        return f"steps of {self.period} channels, after {where}" if self.period else f"steps after {where}"


def curve_of(listing: Listing, kernel: str | None = None, axis: str | None = None) -> Curve:
    """The shape with most widths along one axis, or that of the named kernel (a key of `table show`).

    `TableError` where there is no shape with three widths.
    """
    curves: dict[tuple[str, Kernel], dict[int, Item]] = {}
    for item in listing.items:
        for name, base, width in _axes(item.kernel) if item.kernel else ():
            curves.setdefault((name, base), {})[width] = item
    if kernel is not None and kernel not in {item.name for item in listing.items}:
        raise TableError(f"'{listing.name}' has no kernel '{kernel}' (edgeprune table show {listing.name})")
    fitting = {
        (name, base): items
        for (name, base), items in curves.items()
        if len(items) >= LEAST_WIDTHS
        and (axis is None or name == axis)
        and (kernel is None or any(item.name == kernel for item in items.values()))
    }
    if not fitting:
        raise TableError(f"'{listing.name}' has no kernel that was timed at {LEAST_WIDTHS} widths, all else the same")
    found = [_curve(name, base, items) for (name, base), items in fitting.items()]
    curve = min(found, key=lambda curve: (-len(curve.widths), -len(curve.rises), curve.kernel, curve.axis))
    (base,) = (base for (name, base), own in zip(fitting, found, strict=True) if own is curve)
    return replace(curve, stairs=_stairs(listing, base, curve.axis))


def _stairs(listing: Listing, base: Kernel, axis: str) -> str | None:
    """In words, of the family that the shape belongs to."""
    latency_us = {item.kernel: item.best_us for item in listing.items if item.kernel and item.origin != IMPORTED}
    families = {kernel.family for kernel in latency_us if (axis, base) in {each[:2] for each in _axes(kernel)}}
    probes = [kernel for kernel in staircase_kernels(base.precision) if kernel.family in families - {"grouped"}]
    if not probes or len(latency_us.keys() & set(probes)) < ENOUGH_PROBES * len(probes):
        return None
    (family,) = families
    places = {0: "channels", 1: "c_in", 2: "c_out"}
    axes = find_staircase(latency_us, base.precision).of(family).axes(family)
    named = {places[place] if len(axes) > 1 else "channels": own for place, own in axes}
    return f"{family} along {axis}: {named[axis].describe()}" if axis in named else None


def _curve(axis: str, base: Kernel, items: dict[int, Item]) -> Curve:
    widths = sorted(items)
    node = all(items[width].node_us for width in widths)
    latency_us = [items[width].best_us if node else items[width].latency_us for width in widths]
    rises, falls = find_steps(widths, latency_us)
    operator, _, groups, rest = base.key.split(" ", 3)
    shape = {"c_in": f"*>{base.c_out}", "c_out": f"{base.c_in}>*", "channels": "*>*"}[axis]
    groups = "g*" if axis == "channels" and operator == "conv" else groups  # depthwise
    return Curve(
        kernel=f"{operator} {shape} {groups} {rest}",
        axis=axis,
        quantity="compute node" if node else "end to end",
        origin=next(iter(items.values())).origin,
        widths=tuple(widths),
        latency_us=tuple(latency_us),
        rises=tuple(rises),
        falls=tuple(falls),
        period=_period(widths, rises),
    )


def find_steps(widths: Sequence[int], latency_us: Sequence[float]) -> tuple[list[Step], list[Step]]:
    """Rises steeper than the mean slope from end to end, and falls; both above the noise."""
    slope = max(0.0, (latency_us[-1] - latency_us[0]) / (widths[-1] - widths[0]))
    rises, falls = [], []
    for i in range(1, len(widths)):
        change = latency_us[i] - latency_us[i - 1]
        step = Step(before=widths[i - 1], after=widths[i], change=change / latency_us[i - 1])
        if step.change > NOISE and change > STEEPNESS * slope * (widths[i] - widths[i - 1]):
            rises.append(step)
        elif step.change < -NOISE:
            falls.append(step)
    return rises, falls


def _period(widths: Sequence[int], rises: Iterable[Step]) -> int | None:
    """The largest number at whose multiples, and hardly anywhere else, the rises begin."""
    begins = {step.before for step in rises}
    gap = min(b - a for a, b in pairwise(widths))
    for period in reversed(PERIODS):
        multiples = {width for width in widths[:-1] if width % period == 0}
        right = len(begins & multiples)
        if period > gap and right >= 2 and right >= AGREEMENT * max(len(begins), len(multiples)):
            return period
    return None


def _axes(kernel: Kernel) -> list[tuple[str, Kernel, int]]:
    """Each width of a kernel that may vary, and the kernel without it."""
    if kernel.is_depthwise and kernel.c_out == kernel.c_in:
        return [("channels", replace(kernel, c_in=1, c_out=1, groups=1), kernel.c_in)]
    if kernel.operator not in CONTRACTIONS:
        return [("channels", replace(kernel, c_in=1, c_out=1), kernel.c_in)]
    return [
        ("c_in", replace(kernel, c_in=kernel.groups), kernel.c_in),
        ("c_out", replace(kernel, c_out=kernel.groups), kernel.c_out),
    ]


def draw(curve: Curve, title: str) -> bytes:
    """A PNG: the measured points, every step marked and named. `RuntimeMissing` without matplotlib."""
    from io import BytesIO

    from edgeprune.errors import RuntimeMissing, install_line

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeMissing(f"matplotlib is missing: {install_line('plot')}") from None
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve.widths, curve.latency_us, "o-", color="#1f4e79", linewidth=1, markersize=4)
    top = 1.08 * max(curve.latency_us)
    largest = sorted((*curve.rises, *curve.falls), key=lambda step: -abs(step.change))[:MOST_NAMED]
    for step in (*curve.rises, *curve.falls):
        axes.axvline(_middle(step), color=_colour(step), linewidth=0.8, linestyle="--")
    for index, step in enumerate(sorted(largest, key=_middle)):
        name = f"{step.before}→{step.after}\n{step.change:+.0%}"
        height = (0.02 + 0.07 * (index % 3)) * top  # the axis starts at 0: mostly below the curve
        label = axes.text(_middle(step), height, name, fontsize=7, ha="center", color=_colour(step))
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    narrowest = min(b - a for a, b in pairwise(curve.widths))
    if (curve.widths[-1] - curve.widths[0]) / narrowest < MOST_TICKS:  # else their numbers would overlap
        axes.set_xticks(curve.widths)
    axes.set_xlabel("channels in and out" if curve.axis == "channels" else f"{curve.axis}, channels")
    axes.set_ylabel(f"{curve.origin} latency, {curve.quantity} (µs)")
    lines = "\n".join(wrap(title, LINE))
    told = "\n".join(filter(None, [lines, f"{curve.kernel} ({curve.origin})", curve.describe(), curve.stairs]))
    axes.set_title(told, fontsize=9)
    axes.set_ylim(bottom=0, top=top)
    axes.grid(alpha=0.25)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _middle(step: Step) -> float:
    return (step.before + step.after) / 2


def _colour(step: Step) -> str:
    return "#c0392b" if step.change > 0 else "#1e8449"
