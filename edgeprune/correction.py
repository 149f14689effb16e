"""What isolated kernels miss in a network, learned from whole networks that were measured: a Bayesian regression.

In a network a unit takes

    us = s (a + a_f + d_u + i_f [c_in ragged] + o_f [c_out ragged]) + m (b_f + q_f [ragged]) + e_f + r_f [ragged]

with s the tabled time of its kernel, f its family (`regime_of`), u its name in one structure of network, m its memory
traffic scaled to the family's times; a network takes the sum of its units and c + c_n times the dense sum of s of its
structure n. All of a, a_f, d_u, i_f, o_f, b_f, q_f, e_f, r_f, c, c_n are normal before anything is measured, about 1
(a) or 0; measured node times and totals make them certain (Bishop 2006, equations 3.50 and 3.51). So one network says
something about the families of every other one, and a runtime that tells no node times is corrected by totals alone.

Totals say how long a network takes, node times only how that is shared among its units: they are loosely weighed, since
their errors come together (hundreds of nodes of one network, timed in one state of the machine), and what a runtime
takes beside its nodes is shared among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgeprune.kernel import Kernel
from edgeprune.staircase import LEAST_STEP, FloatArray, Staircase

Column = tuple[str, str]
"""A coefficient: its kind and the family, unit or structure that it belongs to."""

Equations = tuple[FloatArray, FloatArray, FloatArray]
"""Rows of the regression, measured us and their noise in us."""

ALL: Column = ("all", "")
CONSTANT: Column = ("constant", "")
PRIOR = {
    "all": 0.12,
    "family": 0.2,
    "unit": 0.15,
    "ragged_in": 0.05,
    "ragged_out": 0.05,
    "bytes": 0.15,
    "ragged bytes": 0.15,
    "each": 0.1,
    "ragged each": 0.1,
    "constant": 0.01,
    "own constant": 0.02,
}
"""Standard deviation of every kind before anything is measured; chosen by hand, wide enough for what was seen.

Those of `TYPICAL` are in the median of all tabled times.
"""
TYPICAL = frozenset({"each", "ragged each"})
NODE_NOISE = 0.25
"""Relative noise of the time of one node; all have `NODE_NOISE_TYPICAL` of the median of all tabled times more."""
NODE_NOISE_TYPICAL = 0.1
TOTAL_NOISE = 0.01
"""Least relative noise of the latency of a whole network."""
OUTLIER = 2.5
"""Measurements further off than this many standard deviations count less, the more the further."""
TRUST = 4.0
"""The stated error counts like this many networks beside those that were left out in turn."""


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

    `bytes_us` turns memory traffic of a family into time; `typical_us` is the median of all tabled times; `absent` are
    the units that the runtime does without; `inflation` is the factor between stated and seen errors.
    """

    stairs: Staircase
    columns: Mapping[Column, int] = field(default_factory=dict)
    mean: FloatArray = field(default_factory=lambda: np.zeros(0))
    covariance: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    bytes_us: Mapping[str, float] = field(default_factory=dict)
    dense_us: Mapping[str, float] = field(default_factory=dict)
    typical_us: float = 1.0
    absent: frozenset[str] = frozenset()
    networks: int = 0
    inflation: float = 1.0

    def unit_us(self, structure: str, works: Sequence[Work]) -> FloatArray:
        """Time of units in a network, float64 [n] in us."""
        return self._rows(structure, works) @ self.mean

    def total(self, structure: str, works: Sequence[Work]) -> tuple[float, float]:
        """Latency of a network in us and its standard deviation."""
        rows = self._rows(structure, works)
        row = rows.sum(axis=0) + self._around(structure)
        us = float(row @ self.mean)
        parts = rows @ self.mean
        tabled = np.array([work.error for work in works])
        variance = float(row @ self.covariance @ row) + float(np.sum((parts * tabled) ** 2))
        return us, self.inflation * float(np.sqrt(variance + (TOTAL_NOISE * us) ** 2))

    def overhead_us(self, structure: str) -> float:
        """What a network takes beside its units, whatever their widths."""
        share = self._value(CONSTANT) + self._value(("own constant", structure))
        return share * self.dense_us.get(structure, 0.0)

    def _value(self, column: Column) -> float:
        return float(self.mean[self.columns[column]]) if column in self.columns else 0.0

    def _rows(self, structure: str, works: Sequence[Work]) -> FloatArray:
        rows = np.zeros((len(works), len(self.columns)))
        for row, work in zip(rows, works, strict=True):
            if f"{structure}/{work.name}" in self.absent:
                continue
            for column, value in terms(structure, work, self.stairs, self.bytes_us):
                if column in self.columns:
                    row[self.columns[column]] += value
        return rows

    def _around(self, structure: str) -> FloatArray:
        row = np.zeros(len(self.columns))
        for column in (CONSTANT, ("own constant", structure)):
            if column in self.columns:
                row[self.columns[column]] = self.dense_us.get(structure, 0.0)
        return row


def regime_of(kernel: Kernel) -> str:
    """What shares a correction: the family; a linear on a single row apart, it reads its weights and does little else.

    Alone it finds them in the cache, in a network it does not, so what is learned from it holds for no other linear.
    """
    return "single row" if kernel.operator == "linear" and not kernel.spatial else kernel.family


def terms(
    structure: str, work: Work, stairs: Staircase, bytes_us: Mapping[str, float]
) -> Iterable[tuple[Column, float]]:
    """The columns that a unit's time depends on, with their values."""
    family = regime_of(work.kernel)
    traffic_us = work.kernel.num_bytes * bytes_us.get(family, 0.0)
    yield ALL, work.us
    yield ("family", family), work.us
    yield ("unit", f"{structure}/{work.name}"), work.us
    yield ("bytes", family), traffic_us
    yield ("each", family), 1.0
    own = stairs.of(work.kernel.family)
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
        yield ("ragged bytes", family), traffic_us
        yield ("ragged each", family), 1.0


def uncorrected(structure: str, works: Sequence[Work], stairs: Staircase) -> Correction:
    """What is known of a structure before any network was measured."""
    return learn([], stairs, known=[(structure, tuple(works))])


def learn(
    observations: Sequence[Observation],
    stairs: Staircase,
    *,
    known: Sequence[tuple[str, tuple[Work, ...]]] = (),
) -> Correction:
    """The correction that these networks teach. `known` are networks that will be predicted: dense, not measured.

    The stated error is set by leaving out each network of the structures in `known` in turn; where those have none, by
    leaving out all networks of each other structure.
    """
    prior = _prior(observations, stairs, known)
    if not observations:
        return prior
    parts = _weighted(prior, [_equations(prior, observation) for observation in observations])
    gram, moment = _squares(parts)
    structures = {structure for structure, _ in known}
    own = [i for i, observation in enumerate(observations) if observation.structure in structures]
    scores = []
    for numbers in [[i] for i in own] or list(_by_structure(observations)):
        own_gram, own_moment = _squares([parts[i] for i in numbers])
        taught = _posterior(prior, gram - own_gram, moment - own_moment)
        for i in numbers:
            us, deviation = taught.total(observations[i].structure, observations[i].works)
            scores.append((us - observations[i].total_us) / deviation)
    inflation = float(np.sqrt((TRUST + np.sum(np.square(scores))) / (TRUST + len(scores))))
    return replace(_posterior(prior, gram, moment), inflation=inflation)


def _by_structure(observations: Sequence[Observation]) -> Iterable[list[int]]:
    """The places of the networks of each structure."""
    places: dict[str, list[int]] = {}
    for i, observation in enumerate(observations):
        places.setdefault(observation.structure, []).append(i)
    return places.values()


def _prior(
    observations: Sequence[Observation], stairs: Staircase, known: Sequence[tuple[str, tuple[Work, ...]]]
) -> Correction:
    networks = [*((o.structure, o.works) for o in observations), *known]
    told: dict[str, list[float]] = {}
    for observation in observations:
        for work in observation.works:
            if work.node_us is not None:
                told.setdefault(f"{observation.structure}/{work.name}", []).append(work.node_us)
    columns: dict[Column, int] = {CONSTANT: 0}
    sums: dict[str, tuple[float, float]] = {}
    dense_us: dict[str, float] = {}
    for structure, works in networks:
        dense_us[structure] = max(dense_us.get(structure, 0.0), sum(work.us for work in works))
        columns.setdefault(("own constant", structure), len(columns))
        for work in works:
            us, traffic = sums.get(regime_of(work.kernel), (0.0, 0.0))
            sums[regime_of(work.kernel)] = us + work.us, traffic + work.kernel.num_bytes
    typical_us = float(np.median([work.us for _, works in networks for work in works]))
    bytes_us = {family: us / traffic for family, (us, traffic) in sums.items() if traffic}
    for structure, works in networks:
        for work in works:
            for column, _ in terms(structure, work, stairs, bytes_us):
                columns.setdefault(column, len(columns))
    return Correction(
        stairs=stairs,
        columns=columns,
        mean=np.array([1.0 if column == ALL else 0.0 for column in columns]),
        covariance=np.diag([(PRIOR[kind] * (typical_us if kind in TYPICAL else 1.0)) ** 2 for kind, _ in columns]),
        bytes_us=bytes_us,
        typical_us=typical_us,
        dense_us=dense_us,
        absent=frozenset(name for name, times in told.items() if not any(times)),
        networks=len(observations),
    )


def _squares(parts: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    """Sums of squares and products of weighted equations."""
    rows, left = np.concatenate([rows for rows, _ in parts]), np.concatenate([left for _, left in parts])
    return rows.T @ rows, rows.T @ left


def _posterior(prior: Correction, gram: FloatArray, moment: FloatArray) -> Correction:
    """From the weighted equations' sums of squares and products."""
    covariance: FloatArray = np.linalg.inv(gram + np.diag(1 / np.diag(prior.covariance))).astype(np.float64)
    return replace(prior, mean=prior.mean + covariance @ moment, covariance=covariance)


def _weighted(prior: Correction, parts: Sequence[Equations]) -> list[tuple[FloatArray, FloatArray]]:
    """Rows and what is left of the measured times, over their noise; outliers are weighed down, in three rounds."""
    rows = np.concatenate([rows for rows, _, _ in parts])
    left = np.concatenate([us for _, us, _ in parts]) - rows @ prior.mean
    precision = 1 / np.concatenate([noise for _, _, noise in parts])
    certainty = np.diag(1 / np.diag(prior.covariance))
    weights = precision
    for _ in range(2):
        scaled = rows * weights[:, None]
        shift = np.linalg.solve(scaled.T @ scaled + certainty, scaled.T @ (left * weights))
        far = np.abs((left - rows @ shift) * precision)
        weights = precision * np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(far, 1e-9)))
    ends = np.cumsum([len(us) for _, us, _ in parts])[:-1]
    return list(zip(np.split(rows * weights[:, None], ends), np.split(left * weights, ends), strict=True))


def _equations(prior: Correction, observation: Observation) -> Equations:
    """One for each node that was told, one for the total."""
    works = observation.works
    rows = prior._rows(observation.structure, works)
    told = [i for i, work in enumerate(works) if work.node_us is not None and rows[i].any()]
    nodes = np.array([works[i].node_us for i in told], dtype=np.float64)
    if told:
        nodes += max(0.0, observation.total_us - nodes.sum()) / len(told)
    around = rows.sum(axis=0) + prior._around(observation.structure)
    noise = np.hypot(NODE_NOISE, [works[i].error for i in told]) * nodes + NODE_NOISE_TYPICAL * prior.typical_us
    tabled = np.array([work.us * work.error for work in works])
    total_noise = np.hypot(observation.noise * observation.total_us, float(np.sqrt(np.sum(tabled**2))))
    return (
        np.concatenate([rows[told], around[None]]),
        np.append(nodes, observation.total_us),
        np.append(noise, total_noise),
    )
