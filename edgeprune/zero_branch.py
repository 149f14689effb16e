"""What stands in the place of a dropped block."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class ZeroBranch(torch.nn.Module):
    """Stands where a dropped block ended: gives what the module there gave, with zeros for its tensors.

    `result` holds a `torch.Size` for every tensor; where the first size is that of the input's first dimension (the
    batch) it follows it. `zero` gives their type and device.
    """

    def __init__(self, result: Any, batch: int, zero: torch.Tensor) -> None:
        super().__init__()
        self.leaves, self.spec = tree_flatten(result, is_leaf=lambda leaf: isinstance(leaf, torch.Size))
        self.batch = batch
        self.zero: torch.Tensor
        self.register_buffer("zero", zero.new_zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever comes in: zeros."""
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)

        def zeros(shape: Any) -> Any:
            if not isinstance(shape, torch.Size):
                return shape
            follows = x is not None and shape[:1] == (self.batch,)
            return self.zero.new_zeros((x.shape[0], *shape[1:]) if follows and x is not None else shape)

        return tree_unflatten([zeros(leaf) for leaf in self.leaves], self.spec)

    def extra_repr(self) -> str:
        return ", ".join(str(tuple(leaf)) for leaf in self.leaves if isinstance(leaf, torch.Size))
