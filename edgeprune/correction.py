"""What isolated kernels miss in a network: coefficients on what a unit takes alone, learned from whole networks.

In a network a unit takes

    us = s (a + a_f + a_n + d_u + i_f [c_in ragged] + o_f [c_out ragged] + j_f [rough] + i_n [ragged] + j_n [rough])
         + m (q_f [ragged] + k_f [rough]) + t k_n [rough] + e_f + l_f [rough]
         + x (m b_f + t b + w v + e' + e'_f + r_f [ragged])
         + p c_j [cat] + p c_a [parts apart] + p c_g [gate] + r c_n [narrow] + x (m h_f + t h) + h'

with s the tabled time of its kernel, f its family (`regime_of`), u its name in one structure n of network, m its memory
traffic scaled to the family's times, t that scaled to all times (both s at the most: to copy is part of what a kernel
does), w the bytes of its weights scaled to all times, x how cold the network is, p and r bytes that are copied
(`_layout_terms`); a network takes the sum of its units, c, and c_n times the dense sum of s of its structure. All
coefficients are normal before anything is measured, about 1 (a) or 0; `learning` makes them certain. So one network
says something about the families of every other one, and a runtime that tells no node times is corrected by totals
alone. What ragged and rough widths cost beyond the kernel depends on what stands around it, copies above all, and so on
the network too.

Alone a kernel finds its weights and its inputs in the cache. In a network they are there only where all it touches in a
run fits into it: x = W / (W + C) of the bytes W of all weights and of the largest activations.

What a runtime takes beside the nodes of units, to copy tensors into another layout and between nodes, is in the last
line but for its first term: totals alone teach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from edgeprune.kernel import Kernel
from edgeprune.staircase import LEAST_STEP, FloatArray, Staircase, Stairs

Column = tuple[str, str]
"""A coefficient: its kind and the family, unit or structure that it belongs to."""

ALL: Column = ("all", "")
CONSTANT: Column = ("constant", "")
WEIGHTS: Column = ("weights", "")
JOINED: Column = ("joined", "")
APART: Column = ("apart", "")
NARROW: Column = ("narrow", "")
GATED: Column = ("gated", "")
MOVED: Column = ("bytes every", "")
MOVED_BESIDE: Column = ("beside every", "")
EVERY: Column = ("cold every", "")
BESIDE: Column = ("beside each", "")
PRIOR = {
    "all": 0.05,
    "family": 0.2,
    "structure": 0.08,
    "unit": 0.2,
    "ragged_in": 0.05,
    "ragged_out": 0.05,
    "own ragged": 0.05,
    "bytes": 0.06,
    "bytes every": 0.15,
    "ragged bytes": 0.15,
    "weights": 0.15,
    "cold every": 0.2,
    "cold each": 0.1,
    "cold ragged each": 0.1,
    "each": 0.1,
    "rough": 0.2,
    "rough bytes": 0.3,
    "own rough": 0.1,
    "own rough bytes": 0.1,
    "rough each": 0.3,
    "joined": 0.5,
    "apart": 0.5,
    "narrow": 0.5,
    "gated": 0.5,
    "beside": 0.06,
    "beside every": 0.15,
    "beside each": 0.05,
    "constant": 2.0,
    "own constant": 0.02,
    "told": 0.2,
}
"""Standard deviation of every kind before anything is measured; chosen by hand, wide enough for what was seen.

Those of `TYPICAL` are in the median of all tabled times.
"""
TYPICAL = frozenset({"cold every", "cold each", "cold ragged each", "each", "rough each", "beside each", "constant"})
COLD = frozenset(
    {"bytes", "bytes every", "beside", "beside every", "weights", "cold every", "cold each", "cold ragged each"}
)
"""Kinds that a network pays only as far as it is cold."""
CAPACITIES = tuple(2.0**power for power in range(19, 26))
"""Bytes beyond which a network is cold: what may be found."""
TOTAL_NOISE = 0.01
"""Least relative noise of the latency of a whole network."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A unit in one network: its kernel there, the tabled time `us`, and the measured one, None where nobody told.

    `error` is the relative standard deviation of the tabled time.
    """

    name: str
    kernel: Kernel
    us: float
    error: float = 0.0
    node_us: float | None = None


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A network that was measured: its structure, its units, and the latency in us with its relative noise."""

    structure: str
    works: tuple[Work, ...]
    total_us: float
    noise: float = TOTAL_NOISE


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Coefficients by column with their covariance, as learned from `networks` networks.

    `bytes_us` turns memory traffic of a family into time, `moved_us` that of any, `weights_us` bytes of weights;
    `capacity` is the bytes beyond which a network is cold; `typical_us` is the median of all tabled times; `absent` are
    the units that the runtime does without; `inflation` is the factor between stated and seen errors.
    """

    stairs: Staircase
    columns: Mapping[Column, int] = field(default_factory=dict)
    mean: FloatArray = field(default_factory=lambda: np.zeros(0))
    covariance: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    bytes_us: Mapping[str, float] = field(default_factory=dict)
    weights_us: float = 0.0
    moved_us: float = 0.0
    capacity: float = CAPACITIES[0]
    dense_us: Mapping[str, float] = field(default_factory=dict)
    typical_us: float = 1.0
    absent: frozenset[str] = frozenset()
    networks: int = 0
    inflation: float = 1.0

    def unit_us(self, structure: str, works: Sequence[Work], cold: float) -> FloatArray:
        """Time of units in a network that is `cold` to that degree, float64 [n] in us."""
        inside, beyond = self.unit_us_inside_and_beyond(structure, works)
        us: FloatArray = inside + cold * (beyond - inside)
        return us

    def unit_us_inside_and_beyond(self, structure: str, works: Sequence[Work]) -> tuple[FloatArray, FloatArray]:
        """Time of units in a network inside the cache, and in one far beyond it, float64 [n] each in us."""
        rows = self.rows(structure, works)
        return rows @ (self.scale(0.0) * self.mean), rows @ self.mean

    def cold(self, works: Sequence[Work]) -> float:
        """How far a network is beyond the cache, 0 to 1."""
        weights = sum(work.kernel.weight_bytes for work in works)
        largest = max((work.kernel.num_bytes - work.kernel.weight_bytes for work in works), default=0)
        return (weights + largest) / (weights + largest + self.capacity)

    def total(self, structure: str, works: Sequence[Work]) -> tuple[float, float]:
        """Latency of a network in us and its standard deviation."""
        rows = self.rows(structure, works) * self.scale(self.cold(works))
        row = rows.sum(axis=0) + self.around(structure)
        us = float(row @ self.mean)
        parts = rows @ self.mean
        tabled = np.array([work.error for work in works])
        variance = float(row @ self.covariance @ row) + float(np.sum((parts * tabled) ** 2))
        return us, self.inflation * float(np.sqrt(variance + (TOTAL_NOISE * us) ** 2))

    def overhead_us(self, structure: str) -> float:
        """What a network takes beside its units, whatever their widths."""
        own = self._value(("own constant", structure)) * self.dense_us.get(structure, 0.0)
        return self._value(CONSTANT) + own

    def _value(self, column: Column) -> float:
        return float(self.mean[self.columns[column]]) if column in self.columns else 0.0

    def scale(self, cold: float) -> FloatArray:
        return np.array([cold if kind in COLD else 1.0 for kind, _ in self.columns])

    def rows(self, structure: str, works: Sequence[Work]) -> FloatArray:
        """Of a cold network."""
        rows = np.zeros((len(works), len(self.columns)))
        for row, work in zip(rows, works, strict=True):
            if f"{structure}/{work.name}" in self.absent:
                continue
            for column, value in self.terms(structure, work):
                if column in self.columns:
                    row[self.columns[column]] += value
        return rows

    def terms(self, structure: str, work: Work) -> Iterable[tuple[Column, float]]:
        """The columns that a unit's time depends on in a cold network, with their values."""
        family = regime_of(work.kernel)
        traffic_us = min(work.us, work.kernel.num_bytes * self.bytes_us.get(family, 0.0))
        moved_us = min(work.us, work.kernel.num_bytes * self.moved_us)
        yield ALL, work.us
        yield ("family", family), work.us
        yield ("structure", structure), work.us
        yield ("unit", f"{structure}/{work.name}"), work.us
        yield ("bytes", family), traffic_us
        yield MOVED, moved_us
        yield WEIGHTS, work.kernel.weight_bytes * self.weights_us
        yield ("each", family), 1.0
        yield EVERY, 1.0
        yield ("cold each", family), 1.0
        yield ("beside", family), traffic_us
        yield MOVED_BESIDE, moved_us
        yield BESIDE, 1.0
        own = self.stairs.of(work.kernel.family)
        ragged = [
            kind
            for kind, size, step in (
                ("ragged_in", work.kernel.c_in, own.c_in),
                ("ragged_out", work.kernel.c_out, own.c_out),
            )
            if size % max(step, LEAST_STEP)
        ]
        for kind in ragged:
            yield (kind, family), work.us
        if ragged:
            yield ("own ragged", structure), work.us
            yield ("ragged bytes", family), traffic_us
            yield ("cold ragged each", family), 1.0
        yield from self._layout_terms(work.kernel, own)
        if self.stairs.has_rough_size(work.kernel):
            yield ("own rough", structure), work.us
            yield ("own rough bytes", structure), moved_us
            yield ("rough", family), work.us
            yield ("rough bytes", family), traffic_us
            yield ("rough each", family), 1.0

    def _layout_terms(self, kernel: Kernel, own: Stairs) -> Iterable[tuple[Column, float]]:
        """Copies between the plain layout and that in blocks of channels, as wide as the step of a convolution.

        Parts that are no whole blocks are joined in the plain one, channels that are fewer than a block and not padded
        to it are read in it, and a gate is multiplied in it, where convolutions have a grain, off which they work in it
        as well.
        """
        block = self.stairs.of("conv").c_out
        if kernel.operator == "cat":
            yield JOINED, kernel.num_bytes * self.moved_us
        if kernel.operator == "mul" and self.stairs.has_grain(("conv",)):
            yield GATED, kernel.num_bytes * self.moved_us
        if any(part % block for part in kernel.parts):
            yield APART, kernel.num_bytes * self.moved_us
        if not own.pads_in and kernel.operator == "conv" and kernel.c_in < own.c_in:
            yield NARROW, kernel.input_bytes * self.moved_us

    def around(self, structure: str) -> FloatArray:
        row = np.zeros(len(self.columns))
        for column, value in ((CONSTANT, 1.0), (("own constant", structure), self.dense_us.get(structure, 0.0))):
            if column in self.columns:
                row[self.columns[column]] = value
        return row


def regime_of(kernel: Kernel) -> str:
    """What shares a correction: the family; a contraction of a single row or pixel apart.

    It reads its weights and does little else, so what is learned from it holds for no other one.
    """
    is_single = prod(kernel.spatial) == 1 and kernel.operator in ("conv", "linear")
    return "single row" if is_single else kernel.family
