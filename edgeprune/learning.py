"""What whole networks that were measured teach of a `Correction`: a Bayesian regression.

Measured totals are equations in its coefficients, and each node time that was told (Bishop 2006, equations 3.50 and
3.51). Totals say how long a network takes, node times only how that is shared among its units: they are loosely
weighed, and of each network they may all be off by one factor z,

    node us = what the unit takes, but for what totals alone teach, + z s

since they were told in one state of the machine, and the total in another. The capacity beyond which networks are cold
is the one of `CAPACITIES` that makes what was measured most likely (the evidence, Bishop 2006, equation 3.86).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from edgeprune.correction import (
    ALL,
    CAPACITIES,
    COLD,
    CONSTANT,
    PRIOR,
    TYPICAL,
    Column,
    Correction,
    Observation,
    Work,
    regime_of,
)
from edgeprune.staircase import FloatArray, Staircase

Equations = tuple[FloatArray, FloatArray, FloatArray]
"""Rows of the regression, measured us and their noise in us."""

TOLD = "told"
"""The kind of the columns that are a network's own z."""
UNSEEN = frozenset({"beside", "beside every", "beside each", "apart", "narrow", "gated"})
"""Kinds that no node of a unit is told with, so that only totals teach them: copies, what is done between nodes."""
NODE_NOISE = 0.25
"""Relative noise of the time of one node; all have `NODE_NOISE_TYPICAL` of the median of all tabled times more."""
NODE_NOISE_TYPICAL = 0.1
OUTLIER = 2.5
"""Measurements further off than this many standard deviations count less, the more the further."""
TRUST = 4.0
"""The stated error counts like this many networks beside those that were left out in turn."""


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
    """Rows and what is left of the measured times, over their noise; outliers are weighed down, in two rounds.

    The rows are those of the networks as cold as they are, or as if they were cold (`of_cold`).
    """
    whole = np.concatenate([rows for rows, _, _ in equations])
    scales = [np.tile(prior.scale(cold), (len(us), 1)) for (_, us, _), cold in zip(equations, colds, strict=True)]
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
    rows = prior.rows(observation.structure, works)
    told = [i for i, work in enumerate(works) if work.node_us is not None and rows[i].any()]
    nodes = np.array([works[i].node_us for i in told], dtype=np.float64)
    seen = np.array([kind not in UNSEEN for kind, _ in prior.columns])
    around = rows.sum(axis=0) + prior.around(observation.structure)
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
