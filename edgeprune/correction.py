"""What isolated kernels miss in a network, learned from whole networks that were measured: a Bayesian regression.

In a network a unit takes

    us = s (a + a_f + a_n + d_u + i_f [c_in ragged] + o_f [c_out ragged] + j_f [rough] + i_n [ragged] + j_n [rough])
         + m (b_f + q_f [ragged] + k_f [rough]) + t k_n [rough] + e_f + l_f [rough]
         + x (w v + e' + e'_f + r_f [ragged])
         + p c_j [cat] + p c_a [parts apart] + r c_n [narrow] + m h_f + h

with s the tabled time of its kernel, f its family (`regime_of`), u its name in one structure n of network, m its memory
traffic scaled to the family's times, t that scaled to all times, w the bytes of its weights scaled to all times, x how
cold the network is, p and r bytes that are copied (`_layout_terms`); a network takes the sum of its units, c, and c_n
times the dense sum of s of its structure. All coefficients are normal before anything is measured, about 1 (a) or 0;
measured node times and totals make them certain (Bishop 2006, equations 3.50 and 3.51). So one network says something
about the families of every other one, and a runtime that tells no node times is corrected by totals alone. What ragged
and rough widths cost beyond the kernel depends on what stands around it, copies above all, and so on the network too.

Alone a kernel finds its weights in the cache. In a network they are there only where all it touches in a run fits into
it: x = W / (W + C) of the bytes W of all weights and of the largest activations, with the capacity C of
`CAPACITIES` that makes what was measured most likely (the evidence, Bishop 2006, equation 3.86).

Totals say how long a network takes, node times only how that is shared among its units: they are loosely weighed, since
their errors come together (hundreds of nodes of one network, timed in one state of the machine). What a runtime takes
beside the nodes of units, to copy tensors into another layout and between nodes, is in the last line but for its first
term: totals alone teach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from edgeprune.kernel import Kernel
from edgeprune.staircase import LEAST_STEP, FloatArray, Staircase, Stairs

Column = tuple[str, str]
"""A coefficient: its kind and the family, unit or structure that it belongs to."""

Equations = tuple[FloatArray, FloatArray, FloatArray]
"""Rows of the regression, measured us and their noise in us."""

ALL: Column = ("all", "")
CONSTANT: Column = ("constant", "")
WEIGHTS: Column = ("weights", "")
JOINED: Column = ("joined", "")
APART: Column = ("apart", "")
NARROW: Column = ("narrow", "")
EVERY: Column = ("cold every", "")
BESIDE: Column = ("beside each", "")
TOLD = "told"
PRIOR = {
    "all": 0.12,
    "family": 0.2,
    "structure": 0.08,
    "unit": 0.2,
    "ragged_in": 0.05,
    "ragged_out": 0.05,
    "own ragged": 0.05,
    "bytes": 0.15,
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
    "beside": 0.15,
    "beside each": 0.05,
    "constant": 2.0,
    "own constant": 0.02,
    "told": 0.2,
}
"""Standard deviation of every kind before anything is measured; chosen by hand, wide enough for what was seen.

Those of `TYPICAL` are in the median of all tabled times.
"""
TYPICAL = frozenset({"cold every", "cold each", "cold ragged each", "each", "rough each", "beside each", "constant"})
UNSEEN = frozenset({"beside", "beside each", "apart", "narrow"})
"""Kinds that no node of a unit is told with, so that only totals teach them: copies, what is done between nodes."""
COLD = frozenset({"bytes", "beside", "weights", "cold every", "cold each", "cold ragged each"})
"""Kinds that a network pays only as far as it is cold."""
CAPACITIES = tuple(2.0**power for power in range(19, 26))
"""Bytes beyond which a network is cold: what may be found."""
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
        rows = self._rows(structure, works)
        return rows @ (self._scale(0.0) * self.mean), rows @ self.mean

    def cold(self, works: Sequence[Work]) -> float:
        """How far a network is beyond the cache, 0 to 1."""
        weights = sum(work.kernel.weight_bytes for work in works)
        largest = max((work.kernel.num_bytes - work.kernel.weight_bytes for work in works), default=0)
        return (weights + largest) / (weights + largest + self.capacity)

    def total(self, structure: str, works: Sequence[Work]) -> tuple[float, float]:
        """Latency of a network in us and its standard deviation."""
        rows = self._rows(structure, works) * self._scale(self.cold(works))
        row = rows.sum(axis=0) + self._around(structure)
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

    def _scale(self, cold: float) -> FloatArray:
        return np.array([cold if kind in COLD else 1.0 for kind, _ in self.columns])

    def _rows(self, structure: str, works: Sequence[Work]) -> FloatArray:
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
        yield ALL, work.us
        yield ("family", family), work.us
        yield ("structure", structure), work.us
        yield ("unit", f"{structure}/{work.name}"), work.us
        yield ("bytes", family), traffic_us
        yield WEIGHTS, work.kernel.weight_bytes * self.weights_us
        yield ("each", family), 1.0
        yield EVERY, 1.0
        yield ("cold each", family), 1.0
        yield ("beside", family), traffic_us
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
            yield ("own rough bytes", structure), work.kernel.num_bytes * self.moved_us
            yield ("rough", family), work.us
            yield ("rough bytes", family), traffic_us
            yield ("rough each", family), 1.0

    def _layout_terms(self, kernel: Kernel, own: Stairs) -> Iterable[tuple[Column, float]]:
        """Copies between the plain layout and that in blocks of channels, as wide as the step of a convolution.

        Parts that are no whole blocks are joined in the plain one, and channels that are fewer than a block and not
        padded to it are read in it.
        """
        block = self.stairs.of("conv").c_out
        if kernel.operator == "cat":
            yield JOINED, kernel.num_bytes * self.moved_us
        if any(part % block for part in kernel.parts):
            yield APART, kernel.num_bytes * self.moved_us
        if not own.pads_in and kernel.operator == "conv" and kernel.c_in < own.c_in:
            yield NARROW, kernel.input_bytes * self.moved_us

    def _around(self, structure: str) -> FloatArray:
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
    equations = [_equations(prior, number, observation) for number, observation in enumerate(observations)]
    prior = replace(prior, capacity=_likeliest_capacity(prior, observations, equations))
    parts = _weighted(prior, equations, [prior.cold(o.works) for o in observations])
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
    weight_bytes = sum(work.kernel.weight_bytes for _, works in networks for work in works)
    prior = Correction(
        stairs=stairs,
        bytes_us={family: us / traffic for family, (us, traffic) in sums.items() if traffic},
        weights_us=sum(us for us, _ in sums.values()) / max(1, weight_bytes),
        moved_us=sum(us for us, _ in sums.values()) / max(1, sum(traffic for _, traffic in sums.values())),
        typical_us=float(np.median([work.us for _, works in networks for work in works])),
        dense_us=dense_us,
        absent=frozenset(name for name, times in told.items() if not any(times)),
        networks=len(observations),
    )
    for structure, works in networks:
        for work in works:
            for column, _ in prior.terms(structure, work):
                columns.setdefault(column, len(columns))
    for number in range(len(observations)):
        columns[TOLD, str(number)] = len(columns)
    deviations = [PRIOR[kind] * (prior.typical_us if kind in TYPICAL else 1.0) for kind, _ in columns]
    return replace(
        prior,
        columns=columns,
        mean=np.array([1.0 if column == ALL else 0.0 for column in columns]),
        covariance=np.diag(np.square(deviations)),
    )


def _squares(parts: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    """Sums of squares and products of weighted equations."""
    rows, left = np.concatenate([rows for rows, _ in parts]), np.concatenate([left for _, left in parts])
    return rows.T @ rows, rows.T @ left


def _posterior(prior: Correction, gram: FloatArray, moment: FloatArray) -> Correction:
    """From the weighted equations' sums of squares and products."""
    covariance: FloatArray = np.linalg.inv(gram + np.diag(1 / np.diag(prior.covariance))).astype(np.float64)
    return replace(prior, mean=prior.mean + covariance @ moment, covariance=covariance)


def _likeliest_capacity(
    prior: Correction, observations: Sequence[Observation], equations: Sequence[Equations]
) -> float:
    """The one of `CAPACITIES` with the most evidence; outliers count as little as under the middle one.

    Only the columns of `COLD` kinds depend on it: the others are solved once (Schur complement).
    """
    middle = replace(prior, capacity=CAPACITIES[len(CAPACITIES) // 2])
    parts = _weighted(middle, equations, [middle.cold(o.works) for o in observations], of_cold=True)
    rows, left = np.concatenate([rows for rows, _ in parts]), np.concatenate([left for _, left in parts])
    certainty = 1 / np.diag(prior.covariance)
    is_cold = np.array([kind in COLD for kind, _ in prior.columns])
    hot, cold = rows[:, ~is_cold], rows[:, is_cold]
    factor = cho_factor(hot.T @ hot + np.diag(certainty[~is_cold]))
    solved = cho_solve(factor, hot.T @ left)
    evidence = []
    for capacity in CAPACITIES:
        colds = [replace(prior, capacity=capacity).cold(o.works) for o in observations]
        own = cold * np.repeat(colds, [len(each) for each, _ in parts])[:, None]
        across = hot.T @ own
        gram = own.T @ own + np.diag(certainty[is_cold]) - across.T @ cho_solve(factor, across)
        moment = own.T @ left - across.T @ solved
        evidence.append(0.5 * moment @ np.linalg.solve(gram, moment) - 0.5 * np.linalg.slogdet(gram)[1])
    return CAPACITIES[int(np.argmax(evidence))]


def _weighted(
    prior: Correction, equations: Sequence[Equations], colds: Sequence[float], *, of_cold: bool = False
) -> list[tuple[FloatArray, FloatArray]]:
    """Rows and what is left of the measured times, over their noise; outliers are weighed down, in three rounds.

    The rows are those of the networks as cold as they are, or as if they were cold (`of_cold`).
    """
    whole = np.concatenate([rows for rows, _, _ in equations])
    scales = [np.tile(prior._scale(cold), (len(us), 1)) for (_, us, _), cold in zip(equations, colds, strict=True)]
    rows = whole * np.concatenate(scales)
    left = np.concatenate([us for _, us, _ in equations]) - rows @ prior.mean
    precision = 1 / np.concatenate([noise for _, _, noise in equations])
    certainty = np.diag(1 / np.diag(prior.covariance))
    weights = precision
    for _ in range(2):
        scaled = rows * weights[:, None]
        shift = np.linalg.solve(scaled.T @ scaled + certainty, scaled.T @ (left * weights))
        far = np.abs((left - rows @ shift) * precision)
        weights = precision * np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(far, 1e-9)))
    ends = np.cumsum([len(us) for _, us, _ in equations])[:-1]
    shown = (whole if of_cold else rows) * weights[:, None]
    return list(zip(np.split(shown, ends), np.split(left * weights, ends), strict=True))


def _equations(prior: Correction, number: int, observation: Observation) -> Equations:
    """One for each node that was told, one for the total; of a cold network."""
    works = observation.works
    rows = prior._rows(observation.structure, works)
    told = [i for i, work in enumerate(works) if work.node_us is not None and rows[i].any()]
    nodes = np.array([works[i].node_us for i in told], dtype=np.float64)
    seen = np.array([kind not in UNSEEN for kind, _ in prior.columns])
    around = rows.sum(axis=0) + prior._around(observation.structure)
    rows[told] *= seen
    rows[told, prior.columns[TOLD, str(number)]] = [works[i].us for i in told]
    noise = np.hypot(NODE_NOISE, [works[i].error for i in told]) * nodes + NODE_NOISE_TYPICAL * prior.typical_us
    tabled = np.array([work.us * work.error for work in works])
    total_noise = np.hypot(observation.noise * observation.total_us, float(np.sqrt(np.sum(tabled**2))))
    return (
        np.concatenate([rows[told], around[None]]),
        np.append(nodes, observation.total_us),
        np.append(noise, total_noise),
    )
