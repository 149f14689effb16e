"""What a layer's inputs are like: the Gram matrix that Wanda and SparseGPT look at, and the error that it tells.

Legend: X [K, rows] inputs of the layer's matrix, one column an output position of a sample; K as in `pattern`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

CHUNK = 4
"""Samples whose windows are laid out at once."""


def gram_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """H = X Xᵀ / rows, float64 [K, K], of a Linear or an ungrouped Conv2d whose input is x [N, ...]."""
    total: torch.Tensor | None = None
    count = 0
    for part in torch.split(x, CHUNK):
        rows = rows_of(layer, part)
        count += len(rows)
        gram = (rows.T @ rows).double()
        total = gram if total is None else total + gram
    assert total is not None, "no samples"
    return total / count


def rows_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Xᵀ float32 [rows, K]: a Conv2d's windows (im2col), input channels running fastest."""
    if isinstance(layer, torch.nn.Linear):
        return x.reshape(-1, x.shape[-1])
    (top, left), mode = layer.padding if isinstance(layer.padding, tuple) else (None, None), layer.padding_mode
    sides = layer._reversed_padding_repeated_twice if top is None else (left, left, top, top)
    padded = functional.pad(x, sides, mode="constant" if mode == "zeros" else mode)
    windows = functional.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    channels = windows.reshape(len(x), x.shape[1], -1, windows.shape[-1])  # [N, I, kh · kw, positions]
    return channels.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def output_error(W: torch.Tensor, new: torch.Tensor, H: torch.Tensor) -> float:
    """||W X - W' X||² / ||W X||² of the layer's output, from H = X Xᵀ."""
    change, weights = (new - W).double(), W.double()
    left = float(((change @ H) * change).sum())
    return left / max(float(((weights @ H) * weights).sum()), torch.finfo(torch.float64).tiny)
