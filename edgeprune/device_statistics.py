"""Statistics of timed runs, on both sides of the connection.

Runs on the device (Python 3.8 or later, standard library only): `device_core` has it pasted in, a bundle's run.py too.
"""

from __future__ import annotations


def median(values: list[float]) -> float:
    return quantile(values, 0.5)


def quantile(values: list[float], share: float) -> float:
    """With linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def digits(value: float) -> float:
    """Six significant digits: more than any clock here tells."""
    return float(f"{value:.6g}")
