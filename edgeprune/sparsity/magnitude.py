"""The largest weights stay."""

from __future__ import annotations

import torch

from edgeprune.pattern import M, N, best_mask


def magnitude(
    W: torch.Tensor, H: torch.Tensor | None = None, n: int = N, m: int = M
) -> tuple[torch.Tensor, torch.Tensor]:
    """W [C, K] with zeros, and which stay (bool [C, K]): of every m the n largest |w|. Looks at no data."""
    mask = best_mask(W.abs(), n, m)
    return W * mask, mask
