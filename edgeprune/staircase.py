"""Latency is a staircase in the widths: at which multiples each kernel family runs at full rate, found by measuring.

Legend: s step of an axis; e(w) the width that is worked on, w rounded up to a multiple of s; *ragged*: w is none; g
grain, a few channels; *rough*: w is no multiple of g, and the runtime falls back to another implementation; *half*: the
last step of w is at most half full, and the runtime takes tiles of half the width for all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgeprune.kernel import Kernel

FloatArray = npt.NDArray[np.float64]

STEPS = (32, 16, 8)
"""Steps that `PROBED` widths can tell from none; an axis without one has step 1."""
LEAST_STEP = 8
"""Widths are offered on multiples of at least this, unless a group is too narrow."""
FIXED_SIZE = 96
"""Width of the axis that is not varied."""
PROBED = (*range(64, 97, 4), 104, 112, 120, 128)
"""Widths that are measured along each axis, to find its step."""
GRAINS = (4, 2)
PROBED_BETWEEN = (65, 66, 70, 77, 90, 97, 102)
"""Those that are measured beside them, to find its grain."""
PROBED_INSIDE = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48)
"""Channels of one group, in and out, of the grouped convolutions that are measured, of `PROBED_GROUPS` groups."""
PROBED_GROUPS = 8
GRAINS_INSIDE = (16, 8, 4, 2)
ONE_WIDTH = ("max_pool", "mean", "mul")
"""Families that read what convolutions write, in its layout: they have grains, of `GRAINS_INSIDE`, and no steps.

Not looked for in int8, and in fp32 for bf16: not every runtime has such kernels in these.
"""
NARROW_ROUGH = 13
PROBED_NARROW = (8, NARROW_ROUGH, 16, 32)
"""And to see whether a width below the step costs as much as the step, and a rough one more."""
NARROW_SHARE = 0.9
"""Half a step that takes less than this share of a whole one is not padded to it, nor one that takes more than a ragged
whole one over this; a quarter that takes less of a half is not padded to that."""
EVIDENCE = 10.0
"""How much lower the Bayesian information criterion of a step has to be than that of no step, or of half widths than
that of ragged ones."""
MOST_PENALTY = 1.0
LEAST_HALF = 0.05
"""Half and narrow widths that are slower by less are not told apart."""
MOST_ROUGH = 20.0


class Rise(NamedTuple):
    """Step, ragged penalty and half penalty (0 where tiles are never halved) of one axis."""

    step: int = 1
    ragged: float = 0.0
    half: float = 0.0


class Narrow(NamedTuple):
    """The implementation that widths below a step take, if it is another: what it pads to, how much slower it is."""

    tile: int = 1
    slower: float = 0.0


NOT_NARROW = Narrow()


class Axis(NamedTuple):
    """Its rise, grain, rough penalty, whether widths below the step are padded to it, and what they take if not."""

    rise: Rise
    grain: int
    rough: float
    pads: bool
    narrow: Narrow

    @property
    def least(self) -> int:
        """Wider sizes climb the stairs. Narrower ones are another implementation's, without grain, with its own tile.

        1 stands for a size that follows from others.
        """
        return 1 if self.pads else self.rise.step

    def worked_on(self, size: FloatArray) -> tuple[FloatArray, FloatArray]:
        """e(w), and the factor for ragged, half or narrow widths: float64 [n] each for sizes [n]."""
        step, ragged, half = self.rise
        wide = size > self.least
        is_half = wide & _is_half(size, step) & (half > 0)
        tile = np.where(wide, step, self.narrow.tile)
        worked = np.ceil(size / tile) * tile - np.where(is_half, step / 2, 0.0)
        is_narrow = size < self.least
        return worked, 1 + ragged * (wide & (size % step > 0)) + half * is_half + self.narrow.slower * is_narrow

    def describe(self) -> str:
        """`steps of 16, ragged 12% slower`."""
        step, ragged, half = self.rise
        told = [f"steps of {step}" if step > 1 else "no steps"]
        if ragged >= LEAST_HALF:
            told.append(f"ragged {ragged:.0%} slower")
        if half:
            told.append(f"in tiles of {step // 2}, {half:.0%} slower, where the last is at most half full")
        if self.grain > 1:
            told.append(f"off multiples of {self.grain}: {self.rough:.0%} slower")
        if not self.pads:
            tiles = f"in tiles of {self.narrow.tile}" if self.narrow.tile > 1 else "as they are"
            told.append(f"narrower ones {tiles}" + (f", {self.narrow.slower:.0%} slower" if self.narrow.slower else ""))
        return ", ".join(told)

    def is_rough(self, size: FloatArray) -> npt.NDArray[np.bool_]:
        """bool [n] for sizes [n]."""
        found: npt.NDArray[np.bool_] = (size > self.least) & (size % self.grain > 0)
        return found


@dataclass(frozen=True, kw_only=True)
class Stairs:
    """Steps of one kernel family along c_in and c_out, and the share by which a ragged width is slower than e(w).

    Or a half one: then e(w) is a multiple of half a step for it. Grains too, and the share by which a rough width is
    slower still; `pads` is false where widths below the step are not padded to it but take a `narrow` implementation.
    """

    c_in: int = 1
    c_out: int = 1
    ragged_in: float = 0.0
    ragged_out: float = 0.0
    half_in: float = 0.0
    half_out: float = 0.0
    grain_in: int = 1
    grain_out: int = 1
    rough_in: float = 0.0
    rough_out: float = 0.0
    pads_in: bool = True
    pads_out: bool = True
    narrow_in: Narrow = NOT_NARROW
    narrow_out: Narrow = NOT_NARROW

    def axes(self, family: str) -> tuple[tuple[int, Axis], ...]:
        """Each with its place in `Kernel.sizes`; channels of a depthwise convolution are its groups."""
        rise_out = Rise(self.c_out, self.ragged_out, self.half_out)
        out = Axis(rise_out, self.grain_out, self.rough_out, self.pads_out, self.narrow_out)
        if family == "depthwise" or family in ONE_WIDTH:
            return ((0 if family == "depthwise" else 1, out),)
        rise_in = Rise(self.c_in, self.ragged_in, self.half_in)
        return (1, Axis(rise_in, self.grain_in, self.rough_in, self.pads_in, self.narrow_in)), (2, out)

    @property
    def step(self) -> int:
        """The coarser of the two."""
        return max(self.c_in, self.c_out)


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """The stairs of every kernel family of one device; families that were not probed have none."""

    families: Mapping[str, Stairs] = field(default_factory=dict)

    def of(self, family: str) -> Stairs:
        """The stairs of a family; of one group, where convolutions have several."""
        return self.families.get(family) or Stairs()

    def steps(self) -> dict[str, int]:
        """Per family the step that offered widths lie on."""
        found = {family: max(LEAST_STEP, stairs.step) for family, stairs in self.families.items()}
        if "grouped" in self.families:  # whose grain is as wide as the steps of others
            found["grouped"] = max(found["grouped"], self.families["grouped"].grain_in)
        return found

    def worked_on(self, kernel: Kernel, sizes: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """e(w) of every size and the factor for those that are slower: float64 [n, 3] and [n], for sizes [n, 3]."""
        sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 3)
        worked, factor, rough = sizes.copy(), np.ones(len(sizes)), np.zeros(len(sizes))
        for place, axis in self.of(kernel.family).axes(kernel.family):
            worked[:, place], slower = axis.worked_on(sizes[:, place])
            factor *= slower
            rough = np.maximum(rough, axis.rough * axis.is_rough(sizes[:, place]))
        other = self.is_rough(kernel, sizes)  # the implementation that rough widths fall back to pads nothing
        return np.where(other[:, None], sizes, worked), np.where(other, 1 + rough, factor)

    def has_grain(self, families: Iterable[str]) -> bool:
        """Whether one of these families is slower at rough widths."""
        return any(max(self.of(family).grain_in, self.of(family).grain_out) > 1 for family in families)

    def has_rough_size(self, kernel: Kernel) -> bool:
        """Whether any of a kernel's sizes is no multiple of its grain."""
        return bool(self.is_rough(kernel, kernel.sizes)[0])

    def is_rough(self, kernel: Kernel, sizes: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """bool [n] for `Kernel.sizes` [n, 3]: whether any of them is no multiple of its grain."""
        sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 3)
        found = np.zeros(len(sizes), dtype=np.bool_)
        for place, axis in self.of(kernel.family).axes(kernel.family):
            found |= axis.is_rough(sizes[:, place])
        return found


def staircase_kernels(precision: str) -> tuple[Kernel, ...]:
    """A few small kernels that show the steps and grains of each family along each axis."""
    return tuple(sorted({kernel for lines in _lines(precision).values() for line in lines for kernel in line.values()}))


def find_staircase(latency_us: Mapping[Kernel, float], precision: str) -> Staircase:
    """The stairs that measured latencies show, in any unit; no step along an axis that was not measured.

    Along each axis latency is fitted by a + b e(w) + c e(w) [w ragged] for every step s; the step whose Bayesian
    information criterion (Schwarz 1978) is least counts, if it is below that of a straight line by `EVIDENCE`; and one
    with half widths in the place of ragged ones, if it is lower by as much again. Then, over the widths between too,
    for every grain, which counts by the same rule, by a + b w + d w where w is rough.
    Those of grouped convolutions are those inside a group.
    """
    families = {}
    for family, lines in _lines(precision).items():
        known = [{size: latency_us[k] for size, k in line.items() if k in latency_us} for line in lines]
        if not any(known):
            continue
        if family == "grouped":
            families[family] = _stairs_inside(known[0])
            continue
        if family in ONE_WIDTH:
            grain, rough = _grain_along(known[0], Rise(), GRAINS_INSIDE)
            families[family] = Stairs(grain_out=grain, rough_out=rough)
            continue
        rises = [_rise_along({w: us for w, us in line.items() if w in PROBED}) for line in known]
        grains = [_grain_along(line, rise, GRAINS) for line, rise in zip(known, rises, strict=True)]
        pads = [_pads(line, rise, *grain) for line, rise, grain in zip(known, rises, grains, strict=True)]
        narrow = [
            NOT_NARROW if padded else _narrow(line, rise.step)
            for line, rise, padded in zip(known, rises, pads, strict=True)
        ]
        rise_in, rise_out = rises if len(rises) == 2 else (Rise(), rises[0])
        (grain_in, rough_in), (grain_out, rough_out) = grains if len(grains) == 2 else ((1, 0.0), grains[0])
        families[family] = Stairs(
            c_in=rise_in.step,
            c_out=rise_out.step,
            ragged_in=rise_in.ragged,
            ragged_out=rise_out.ragged,
            half_in=rise_in.half,
            half_out=rise_out.half,
            grain_in=grain_in,
            grain_out=grain_out,
            rough_in=rough_in,
            rough_out=rough_out,
            pads_in=len(pads) < 2 or pads[0],
            pads_out=pads[-1],
            narrow_in=narrow[0] if len(narrow) == 2 else NOT_NARROW,
            narrow_out=narrow[-1],
        )
    return Staircase(families=families)


def _rise_along(line: Mapping[int, float]) -> Rise:
    """The step of one axis and the penalty of ragged or of half widths."""
    if len(line) < len(PROBED) - 2:
        return Rise()
    widths = np.array(sorted(line), dtype=np.float64)
    us = np.array([line[int(width)] for width in widths])
    if us.min() <= 0:
        return Rise()
    weights = 1 / us
    straight, _ = _criterion(np.stack([np.ones_like(widths), widths], axis=1), us, weights)
    best, found = straight - EVIDENCE, Rise()
    for step in STEPS:
        value, fitted = _criterion(_columns(widths, step), us, weights)
        if value < best and fitted[1] > 0:
            best = value
            found = Rise(step, _penalty(fitted, widths, step, MOST_PENALTY) if len(fitted) > 2 else 0.0)
    best -= EVIDENCE  # halves of a step that take no longer are a step of half the width
    for step in STEPS[:-1]:
        value, fitted = _criterion(_columns(widths, step, halves=True), us, weights)
        half = _penalty(fitted, widths[_is_half(widths, step)], step // 2, MOST_PENALTY)
        if value < best and fitted[1] > 0 and half > LEAST_HALF:
            best, found = value, Rise(step, half=half)
    return found


def _grain_along(line: Mapping[int, float], rise: Rise, grains: Iterable[int]) -> tuple[int, float]:
    """The grain of one axis, one of `grains`, its rise known, and the penalty of rough widths."""
    line = {width: us for width, us in line.items() if width not in PROBED_NARROW}
    if len([width for width in line if width in PROBED_BETWEEN]) < len(PROBED_BETWEEN) - 1 or min(line.values()) <= 0:
        return 1, 0.0
    widths = np.array(sorted(line), dtype=np.float64)
    us = np.array([line[int(width)] for width in widths])
    climbing = _columns(widths, rise.step, halves=rise.half > 0)
    smooth, _ = _criterion(climbing, us, 1 / us)
    best, found = smooth - EVIDENCE, (1, 0.0)
    for grain in grains:
        is_rough = widths % grain > 0
        columns = climbing.copy()
        columns[is_rough, 1], columns[is_rough, 2:] = widths[is_rough], 0.0
        value, fitted = _criterion(np.column_stack([columns, widths * is_rough]), us, 1 / us)
        if value < best and fitted[1] > 0 and fitted[-1] > 0:
            best, found = value, (grain, _penalty(fitted, widths[is_rough], 1, MOST_ROUGH))
    return found


def _stairs_inside(line: Mapping[int, float]) -> Stairs:
    """Step and grain of the channels inside a group, the same for c_in and c_out, both chosen at once.

    Both grow along the line, so it is fitted by a + b e(w) + c e(w)^2, and rough widths by d e(w) + f e(w)^2 more.
    """
    if len(line) < len(PROBED_INSIDE) - 2 or min(line.values()) <= 0:
        return Stairs()
    widths = np.array(sorted(line), dtype=np.float64)
    us = np.array([line[int(width)] for width in widths])

    def fit(step: int, grain: int) -> tuple[float, float]:
        worked, rough = np.ceil(widths / step) * step, widths % grain > 0
        smooth = np.stack([np.ones_like(worked), worked, worked**2], axis=1)
        columns = np.column_stack([smooth, worked * rough, worked**2 * rough]) if rough.any() else smooth
        value, fitted = _criterion(columns, us, 1 / us)
        if not rough.any():
            return value, 0.0
        share = (columns[rough, 3:] @ fitted[3:]) / np.maximum(smooth[rough] @ fitted[:3], 1e-9)
        return value, float(np.clip(np.median(share), 0.0, MOST_ROUGH))

    best, found = fit(1, 1)[0], Stairs()
    for step, grain in product((1, 16, 8), (1, *GRAINS_INSIDE)):
        value, rough = fit(step, grain)
        value += EVIDENCE * ((step > 1) + (grain > 1))
        if value < best and (grain == 1 or rough > 0):
            best = value
            found = Stairs(c_in=step, c_out=step, grain_in=grain, grain_out=grain, rough_in=rough, rough_out=rough)
    return found


def _pads(line: Mapping[int, float], rise: Rise, grain: int, rough: float) -> bool:
    """Whether half a step takes as long as a whole one, and a rough width below it longer; also if not measured.

    Where there are half widths, those of less than half a step are taken for such.
    """
    step = rise.step
    if step == 1 or rise.half > 0 or not {step // 2, step} <= line.keys() or line[step] <= 0:
        return True
    if grain > 1 and step > NARROW_ROUGH and line.get(NARROW_ROUGH, np.inf) < (1 + rough / 2) * line[step]:
        return False
    return NARROW_SHARE <= line[step // 2] / line[step] <= (1 + rise.ragged) / NARROW_SHARE


def _narrow(line: Mapping[int, float], step: int) -> Narrow:
    """What widths below the step take: padded to half of it where a quarter, if it was probed, takes as long, else as
    they are.

    How much slower that is, is told by half a step, beside the line through one and two whole ones, half a whole one at
    the least.
    """
    quarter, half = step // 4, step // 2
    if not {half, step, 2 * step} <= line.keys() or line[step] <= 0:
        return NOT_NARROW
    slower = line[half] / max(line[step] - (line[2 * step] - line[step]) / 2, line[step] / 2) - 1
    pads = quarter in line and line[quarter] >= NARROW_SHARE * line[half]
    return Narrow(half if pads else 1, float(min(slower, MOST_ROUGH)) if slower >= LEAST_HALF else 0.0)


def _is_half(widths: FloatArray, step: int) -> npt.NDArray[np.bool_]:
    """bool [n]: whether the last step of a width is at most half full."""
    last = widths % step
    found: npt.NDArray[np.bool_] = (last > 0) & (last <= step / 2)
    return found


def _columns(widths: FloatArray, step: int, *, halves: bool = False) -> FloatArray:
    """1, e(w) and, where there are such, e(w) of the ragged ones; or of the half ones, which work on half a step."""
    worked = np.ceil(widths / step) * step
    slower = _is_half(widths, step) if halves else worked != widths
    worked -= step / 2 * (slower & halves)
    return np.stack([np.ones_like(widths), worked, *([worked * slower] if slower.any() else [])], axis=1)


def _penalty(fitted: FloatArray, widths: FloatArray, step: int, most: float) -> float:
    """The last coefficient as a share of the latency of a width that is neither ragged nor rough."""
    worked = float(np.mean(np.ceil(widths / step) * step))
    return float(np.clip(fitted[-1] * worked / (fitted[0] + fitted[1] * worked), 0.0, most))


def _criterion(columns: FloatArray, us: FloatArray, weights: FloatArray) -> tuple[float, FloatArray]:
    """Schwarz's criterion of a fit by weighted least squares, up to a constant, and the fitted coefficients."""
    fitted: FloatArray = np.linalg.lstsq(columns * weights[:, None], us * weights, rcond=None)[0].astype(np.float64)
    left = float(np.sum(((us - columns @ fitted) * weights) ** 2))
    n = len(us)
    return n * float(np.log(max(left, 1e-12 * n) / n)) + columns.shape[1] * float(np.log(n)), fitted


def _lines(precision: str) -> dict[str, tuple[dict[int, Kernel], ...]]:
    """Family to its probed lines, along c_in and c_out (along both at once where they are one): width to kernel."""
    probed = sorted({*PROBED, *PROBED_BETWEEN, *PROBED_NARROW})
    conv = Kernel(
        operator="conv",
        c_in=FIXED_SIZE,
        c_out=FIXED_SIZE,
        spatial=(14, 14),
        window=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        epilogue=("bias", "relu"),
        precision=precision,
    )
    bases = {
        "conv": conv,
        "pointwise": replace(conv, window=(1, 1), padding=(0, 0), spatial=(28, 28)),
        "linear": Kernel(
            operator="linear",
            c_in=FIXED_SIZE,
            c_out=FIXED_SIZE,
            spatial=(196,),
            epilogue=("bias",),
            precision=precision,
        ),
    }
    lines = {
        family: ({w: replace(base, c_in=w) for w in probed}, {w: replace(base, c_out=w) for w in probed})
        for family, base in bases.items()
    }
    depthwise = {w: replace(conv, c_in=w, c_out=w, groups=w, spatial=(56, 56)) for w in probed}
    grouped = {
        w: replace(conv, c_in=PROBED_GROUPS * w, c_out=PROBED_GROUPS * w, groups=PROBED_GROUPS) for w in PROBED_INSIDE
    }
    if precision == "int8":
        return {**lines, "depthwise": (depthwise,), "grouped": (grouped,)}
    own = "fp32" if precision == "bf16" else precision
    plain = Kernel(operator="mean", c_in=1, c_out=1, spatial=(56, 56), precision=own)
    pool = replace(plain, operator="max_pool", window=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    ones = {"mean": plain, "max_pool": pool, "mul": replace(plain, operator="mul")}
    grained = sorted({*PROBED, *PROBED_BETWEEN})
    beside = {family: ({w: replace(ones[family], c_in=w, c_out=w) for w in grained},) for family in ONE_WIDTH}
    return {**lines, "depthwise": (depthwise,), "grouped": (grouped,), **beside}
