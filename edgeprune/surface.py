"""Latency of one piece of work as a function of its widths, from scattered measurements, with an error estimate.

A Gaussian process on the logarithm of latency (kriging; Rasmussen and Williams 2006, chapter 2), around a mean that is
linear in the widths and their product. Legend: X widths that are worked on [n, 3], with a fourth coordinate for rough
ones and the logarithm of their penalty as the fifth; m(X) the mean; r = log us - log m. How much slower rough widths
are is not the family's alone: on ONNX Runtime 5 times for one depthwise convolution, 27 times for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import nnls

from edgeprune.errors import TableError
from edgeprune.kernel import Kernel
from edgeprune.staircase import FloatArray, Staircase

LEAST_US = 0.05
"""Times below this (work that the runtime found a way around) count as this."""
SCATTER = 0.05
"""How far points lie from a surface's mean, about: a point of more doubt than this counts less for it."""
ROUGH_APART = 4.0
"""What is learned of rough widths says as much of the others as of those this many times as wide."""
ROUGH_DOUBT = 0.3
"""A surface's own penalty for rough widths is that of its family to the power of 1 ± this."""


@dataclass(frozen=True, kw_only=True)
class Roughness:
    """How latencies of one family scatter about their mean: relative size, range in octaves of width, noise."""

    size: float = 0.1
    octaves: float = 1.0
    noise: float = 0.015


CANDIDATES = tuple(
    Roughness(size=size, octaves=octaves, noise=noise)
    for size, octaves, noise in product((0.03, 0.06, 0.12, 0.25), (0.7, 1.5, 3.0), (0.002, 0.01, 0.02, 0.04))
)


@dataclass(frozen=True, kw_only=True)
class Points:
    """Measurements of the kernels of one shape: `Kernel.sizes` [n, 3], latencies [n] in us, the widest kernel.

    `doubt` [n] are their relative standard errors, as the rounds of each tell.
    """

    kernel: Kernel
    sizes: FloatArray
    us: FloatArray
    doubt: FloatArray

    @classmethod
    def of(cls, latency_us: Mapping[Kernel, float], doubts: Mapping[Kernel, float]) -> Points:
        """From kernels of one shape, in ascending order of their sizes."""
        kernels = sorted(latency_us, key=lambda kernel: kernel.sizes)
        return cls(
            kernel=kernels[-1],
            sizes=np.array([kernel.sizes for kernel in kernels], dtype=np.float64),
            us=np.array([max(latency_us[kernel], LEAST_US) for kernel in kernels]),
            doubt=np.array([doubts.get(kernel, 0.0) for kernel in kernels]),
        )


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Predicts latency inside the box [low, high] of `Kernel.sizes`, in which all corners were measured."""

    kernel: Kernel
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    stairs: Staircase
    mean: FloatArray
    roughness: Roughness
    worked: FloatArray
    residual: FloatArray
    doubt: FloatArray
    weights: FloatArray
    factor: Any

    def at(self, points: npt.ArrayLike) -> FloatArray:
        """Latencies in us, float64 [n], at points [n, 3] of `Kernel.sizes`. `TableError` outside the measured range."""
        return self._evaluate(points)[0]

    def error_at(self, points: npt.ArrayLike) -> FloatArray:
        """Relative standard deviations of `at`, float64 [n]."""
        _, worked = self._evaluate(points)
        across = self._covariance(worked, self.worked)
        explained = np.einsum("ij,ji->i", across, cho_solve(self.factor, across.T))
        before = self.roughness.size**2 + (ROUGH_DOUBT * worked[:, 4]) ** 2
        deviation: FloatArray = np.sqrt(np.maximum(before - explained, 0.0))
        return deviation

    def with_points(self, sizes: npt.ArrayLike) -> Surface:
        """As certain as with further measurements there, which change no prediction: for choosing what to measure."""
        added = self._evaluate(sizes)[1]
        worked = np.concatenate([self.worked, added])
        guess = np.concatenate([self.residual, self._covariance(added, self.worked) @ self.weights])
        return _surface(self, worked, guess, np.append(self.doubt, np.zeros(len(added))))

    def covers(self, sizes: npt.ArrayLike) -> bool:
        """Whether all points lie inside the measured range."""
        points = np.asarray(sizes, dtype=np.float64).reshape(-1, 3)
        return bool((points >= self.low).all() and (points <= self.high).all())

    def _evaluate(self, points: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        wanted = np.asarray(points, dtype=np.float64).reshape(-1, 3)
        for low, high, column in zip(self.low, self.high, wanted.T, strict=True):
            if len(column) and (column.min() < low or column.max() > high):
                raise TableError(
                    f"width {column.min():g} to {column.max():g} is outside the measured {low:g} to {high:g}"
                )
        worked, ragged = _placed(self.stairs, self.kernel, wanted)
        us = _mean(worked, self.mean) * ragged * np.exp(self._covariance(worked, self.worked) @ self.weights)
        return us, worked

    def _covariance(self, a: FloatArray, b: FloatArray) -> FloatArray:
        return covariance(a, b, self.roughness)


def covariance(a: FloatArray, b: FloatArray, roughness: Roughness) -> FloatArray:
    """Matern kernel of order 3/2 on logarithms of widths, and what all rough ones have in common: float64 [n, m]."""
    steps = (np.log2(a[:, :4])[:, None] - np.log2(b[:, :4])[None]) / roughness.octaves
    distance = np.sqrt(3 * np.square(steps).sum(axis=-1))
    result: FloatArray = roughness.size**2 * (1 + distance) * np.exp(-distance) + ROUGH_DOUBT**2 * a[:, 4:] @ b[:, 4:].T
    return result


def surfaces_of(
    latency_us: Mapping[Kernel, Mapping[Kernel, float]],
    boxes: Mapping[Kernel, tuple[tuple[int, int, int], tuple[int, int, int]]],
    stairs: Staircase,
    doubts: Mapping[Kernel, float] | None = None,
) -> dict[Kernel, Surface]:
    """One surface a shape key: `latency_us[key]` are its measured kernels, `boxes[key]` the corners of its range.

    `doubts` are relative standard errors of kernels: one that other work hit in every round counts the less.

    How rough a family is is told by its own points: the candidate under which each point is likeliest given the others
    (leave one out; Rasmussen and Williams 2006, equations 5.10 to 5.12), over all surfaces of the family.
    """
    points = {key: Points.of(kernels, doubts or {}) for key, kernels in latency_us.items()}
    worked, means, residuals = {}, {}, {}
    for key, own in points.items():
        worked[key], ragged = _placed(stairs, own.kernel, own.sizes)
        means[key] = _fitted_mean(worked[key], own.us / ragged, own.doubt)
        residuals[key] = np.log(own.us / ragged / _mean(worked[key], means[key]))
    families: dict[str, list[Kernel]] = {}
    for key, own in points.items():
        families.setdefault(own.kernel.family, []).append(key)
    found = {}
    for keys in families.values():
        roughness = likeliest([(worked[key], residuals[key], points[key].doubt) for key in keys])
        for key in keys:
            low, high = boxes[key]
            empty = Surface(
                kernel=points[key].kernel,
                low=low,
                high=high,
                stairs=stairs,
                mean=means[key],
                roughness=roughness,
                worked=worked[key],
                residual=residuals[key],
                doubt=points[key].doubt,
                weights=np.zeros(0),
                factor=None,
            )
            found[key] = _surface(empty, worked[key], residuals[key], points[key].doubt)
    return found


def _surface(like: Surface, worked: FloatArray, residual: FloatArray, doubt: FloatArray) -> Surface:
    factor = cho_factor(_of_measured(worked, doubt, like.roughness), lower=True)
    weights = cho_solve(factor, residual)
    return replace(like, worked=worked, residual=residual, doubt=doubt, weights=weights, factor=factor)


def _of_measured(worked: FloatArray, doubt: FloatArray, roughness: Roughness) -> FloatArray:
    """Covariance of what was measured: noise of the family, and of each where its rounds tell of more."""
    noise = np.square(np.maximum(doubt, roughness.noise)) + 1e-10
    result: FloatArray = covariance(worked, worked, roughness) + np.diag(noise)
    return result


def likeliest(surfaces: Iterable[tuple[FloatArray, FloatArray, FloatArray]]) -> Roughness:
    """The candidate under which the residuals [n] at X [n, 5] of all surfaces, each with its doubt [n], are likeliest,
    each point left out once.

    Surfaces of fewer than four points say nothing; without any other the default stands.
    """
    telling = [(worked, residual, doubt) for worked, residual, doubt in surfaces if len(residual) >= 4]
    if not telling:
        return Roughness()
    return max(CANDIDATES, key=lambda roughness: sum(_left_out(*own, roughness) for own in telling))


def _left_out(worked: FloatArray, residual: FloatArray, doubt: FloatArray, roughness: Roughness) -> float:
    """Log-likelihood of the points, each predicted from the others."""
    inverse = np.linalg.inv(_of_measured(worked, doubt, roughness))
    variance = 1 / np.diag(inverse)
    error = inverse @ residual * variance
    return float(-0.5 * np.sum(np.log(variance) + error**2 / variance))


def _placed(stairs: Staircase, kernel: Kernel, sizes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """X, [n, 5]: the fourth is `ROUGH_APART` where widths are rough, else 1, the fifth 0 else. And the factor [n]."""
    worked, factor = stairs.worked_on(kernel, sizes)
    rough = stairs.is_rough(kernel, sizes)
    return np.column_stack([worked, np.where(rough, ROUGH_APART, 1.0), rough * np.log(factor)]), factor


def _columns(worked: FloatArray) -> FloatArray:
    """1, g a, g b and g a b of widths (g, a, b): what reading, writing and multiplying grow with."""
    groups, c_in, c_out = worked.T[:3]
    return np.stack([np.ones(len(worked)), groups * c_in, groups * c_out, groups * c_in * c_out], axis=1)


def _mean(worked: FloatArray, coefficients: FloatArray) -> FloatArray:
    result: FloatArray = np.maximum(_columns(worked) @ coefficients, 1e-12)
    return result


def _fitted_mean(worked: FloatArray, us: FloatArray, doubt: FloatArray) -> FloatArray:
    """Coefficients, none negative, of least relative error; a doubtful point counts less."""
    columns = _columns(worked)
    scale = columns.max(axis=0)
    certainty = 1 / np.hypot(SCATTER, doubt)
    coefficients, _ = nnls(columns / scale * (certainty / us)[:, None], certainty)
    result: FloatArray = coefficients / scale
    return result
