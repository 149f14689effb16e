"""Wanda: Sun et al. 2023, A simple and effective pruning approach for large language models, arXiv:2306.11695."""

from __future__ import annotations

import torch

from edgeprune.pattern import M, N, best_mask


def wanda(W: torch.Tensor, H: torch.Tensor, n: int = N, m: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    """W [C, K] with zeros, and which stay: of every m the n largest S_ij = |W_ij| · ||X_j||₂ (equation 1).

    H [K, K] is the Gram matrix X Xᵀ of the layer's inputs, whose diagonal is ||X_j||₂².
    """
    S = W.abs() * H.diagonal().sqrt().to(W.dtype)
    mask = best_mask(S, n, m)
    return W * mask, mask
