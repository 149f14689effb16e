"""Random weights of kernels, the same in every file format."""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_DRAWN = 1 << 16  # a large layer's weights need not all differ: they are repeated


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], scale: float = 1.0) -> Floats:
    """Normal values times `scale`, float32 of `shape`."""
    drawn = rng.standard_normal(min(prod(shape), _DRAWN), dtype=np.float32) * np.float32(scale)
    return np.resize(drawn, shape)
