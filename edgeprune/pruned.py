"""What `apply` gives, `recover` takes and gives, and `export` takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgeprune.plan_json import Plan


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A really smaller, trainable module with where it came from.

    `module` is the eager model after surgery, in evaluation mode; `example_inputs` have the shapes it is deployed
    with; `origin` is the SHA-256 of the dense weights (`weights.weights_hash`).
    """

    module: torch.nn.Module
    plan: Plan
    example_inputs: tuple[torch.Tensor, ...]
    origin: str
