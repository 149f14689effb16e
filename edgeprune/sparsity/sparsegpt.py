"""SparseGPT: Frantar & Alistarh 2023, Massive language models can be accurately pruned in one-shot, arXiv:2301.00774.

Column by column, what a zero takes from the layer's output is made up for by the columns behind it, which is optimal
for each row given what is fixed already (optimal brain surgeon).
"""

from __future__ import annotations

import torch

from edgeprune.pattern import M, N, best_mask

BLOCK = 128
"""Columns whose updates of all later ones are done at once (B of algorithm 1)."""
DAMPING = 0.01
"""λ as a share of the mean diagonal of H."""


def sparsegpt(W: torch.Tensor, H: torch.Tensor, n: int = N, m: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    """New weights [C, K] and which stay (bool [C, K]): algorithm 1 with the n:m mask selection of section 3.4.

    H [K, K] = X Xᵀ of the layer's inputs. A column whose input is always zero gets zero weights.
    """
    W, H = W.double().clone(), H.double().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)  # H⁻¹ = Hinvᵀ Hinv
    mask = torch.ones_like(W, dtype=torch.bool)
    block = BLOCK - BLOCK % m
    for i in range(0, W.shape[1], block):
        end = min(i + block, W.shape[1])
        E = torch.zeros(len(W), end - i, dtype=W.dtype)
        for j in range(i, end):
            if j % m == 0:
                group = slice(j, j + m)
                mask[:, group] = best_mask((W[:, group] / Hinv.diagonal()[group]).square(), n, m)
            E[:, j - i] = W[:, j] / Hinv[j, j] * ~mask[:, j]
            W[:, j:end] -= torch.outer(E[:, j - i], Hinv[j, j:end])
        W[:, end:] -= E @ Hinv[i:end, end:]
    return W * mask, mask
