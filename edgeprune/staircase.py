"""Latency is a staircase in the widths: at which multiples each kernel family runs at full rate, found by measuring.

Legend: s step of an axis; e(w) the width that is worked on, w rounded up to a multiple of s; *ragged*: w is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
"""Widths that are measured along each axis."""
EVIDENCE = 10.0
"""How much lower the Bayesian information criterion of a step has to be than that of no step."""
MOST_PENALTY = 1.0


@dataclass(frozen=True, kw_only=True)
class Stairs:
    """Steps of one kernel family along c_in and c_out, and the share by which a ragged width is slower than e(w)."""

    c_in: int = 1
    c_out: int = 1
    ragged_in: float = 0.0
    ragged_out: float = 0.0

    @property
    def step(self) -> int:
        """The coarser of the two."""
        return max(self.c_in, self.c_out)


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """The stairs of every kernel family of one device; families that were not probed have none."""

    families: Mapping[str, Stairs] = field(default_factory=dict)

    def of(self, family: str) -> Stairs:
        """The stairs of a family; grouped convolutions climb those of the others."""
        known = self.families.get(family) or (self.families.get("conv") if family == "grouped" else None)
        return known or Stairs()

    def steps(self) -> dict[str, int]:
        """Per family the step that offered widths lie on."""
        found = {family: max(LEAST_STEP, stairs.step) for family, stairs in self.families.items()}
        return found | ({"grouped": found["conv"]} if "conv" in found else {})

    def worked_on(self, kernel: Kernel, sizes: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """e(w) of every size and the factor for ragged ones: float64 [n, 3] and [n], for `Kernel.sizes` [n, 3].

        A depthwise convolution's channels are its groups, which climb the c_out axis.
        """
        stairs = self.of(kernel.family)
        sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 3)
        axes = {0: (stairs.c_out, stairs.ragged_out)} if kernel.is_depthwise else {}
        if not axes:
            axes = {1: (stairs.c_in, stairs.ragged_in), 2: (stairs.c_out, stairs.ragged_out)}
        worked, factor = sizes.copy(), np.ones(len(sizes))
        for axis, (step, penalty) in axes.items():
            if step > 1:
                wide = sizes[:, axis] > 1  # 1 stands for a size that follows from others
                worked[:, axis] = np.where(wide, np.ceil(sizes[:, axis] / step) * step, sizes[:, axis])
                factor *= 1 + penalty * (wide & (worked[:, axis] != sizes[:, axis]))
        return worked, factor


def staircase_kernels(precision: str) -> tuple[Kernel, ...]:
    """A few small kernels that show the steps of each family: `PROBED` widths along each axis."""
    return tuple(sorted({kernel for lines in _lines(precision).values() for line in lines for kernel in line.values()}))


def find_staircase(latency_us: Mapping[Kernel, float], precision: str) -> Staircase:
    """The stairs that measured latencies show, in any unit; no step along an axis that was not measured.

    Along each axis latency is fitted by a + b e(w) + c e(w) [w ragged] for every step s; the step whose Bayesian
    information criterion (Schwarz 1978) is least counts, if it is below that of a straight line by `EVIDENCE`.
    """
    families = {}
    for family, lines in _lines(precision).items():
        found = [_step_along({size: latency_us[k] for size, k in line.items() if k in latency_us}) for line in lines]
        (c_in, ragged_in), (c_out, ragged_out) = found if len(found) == 2 else ((1, 0.0), found[0])
        if any(k in latency_us for line in lines for k in line.values()):
            families[family] = Stairs(c_in=c_in, c_out=c_out, ragged_in=ragged_in, ragged_out=ragged_out)
    return Staircase(families=families)


def _step_along(line: Mapping[int, float]) -> tuple[int, float]:
    """The step of one axis and the penalty of ragged widths."""
    if len(line) < len(PROBED) - 2:
        return 1, 0.0
    widths = np.array(sorted(line), dtype=np.float64)
    us = np.array([line[int(width)] for width in widths])
    if us.min() <= 0:
        return 1, 0.0
    weights = 1 / us
    straight, _ = _criterion(np.stack([np.ones_like(widths), widths], axis=1), us, weights)
    best, found = straight - EVIDENCE, (1, 0.0)
    for step in STEPS:
        worked = np.ceil(widths / step) * step
        ragged = worked * (worked != widths)
        columns = [np.ones_like(widths), worked] + ([ragged] if ragged.any() else [])
        value, fitted = _criterion(np.stack(columns, axis=1), us, weights)
        if value < best and fitted[1] > 0:
            average = fitted[0] + fitted[1] * worked.mean()
            penalty = fitted[2] * worked.mean() / average if len(fitted) > 2 else 0.0
            best, found = value, (step, float(np.clip(penalty, 0.0, MOST_PENALTY)))
    return found


def _criterion(columns: FloatArray, us: FloatArray, weights: FloatArray) -> tuple[float, FloatArray]:
    """Schwarz's criterion of a fit by weighted least squares, up to a constant, and the fitted coefficients."""
    fitted: FloatArray = np.linalg.lstsq(columns * weights[:, None], us * weights, rcond=None)[0].astype(np.float64)
    left = float(np.sum(((us - columns @ fitted) * weights) ** 2))
    n = len(us)
    return n * float(np.log(max(left, 1e-12 * n) / n)) + columns.shape[1] * float(np.log(n)), fitted


def _lines(precision: str) -> dict[str, tuple[dict[int, Kernel], ...]]:
    """Family to its probed lines, along c_in and c_out (depthwise: along both at once): width to kernel."""
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
        family: ({w: replace(base, c_in=w) for w in PROBED}, {w: replace(base, c_out=w) for w in PROBED})
        for family, base in bases.items()
    }
    depthwise = {w: replace(conv, c_in=w, c_out=w, groups=w, spatial=(56, 56)) for w in PROBED}
    return {**lines, "depthwise": (depthwise,)}
