"""Rewinding (lottery tickets): a plan from the scores of trained weights, applied to an earlier checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from edgeprune.folders import write_atomically
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.surgery import apply
from edgeprune.weights import load_weights


def rewind(plan: Plan, model: torch.nn.Module, weights: Path, example_inputs: tuple[torch.Tensor, ...]) -> Pruned:
    """The model with the weights of the file, cut by the plan; `model` is left as it is.

    `WeightsError` where the file's weights don't fit the model. What is given is to be trained: it has learned only
    what the checkpoint had.
    """
    return apply(plan, _with_weights(model, weights), example_inputs)


def check_weights(model: torch.nn.Module, weights: Path) -> None:
    """`WeightsError` where `rewind` would raise it."""
    _with_weights(model, weights)


def write_rewound(
    plan: Plan, model: torch.nn.Module, weights: Path, example_inputs: tuple[torch.Tensor, ...], path: Path
) -> None:
    """The state_dict of `rewind` as safetensors; tied weights are written once for each name."""
    from safetensors.torch import save

    module = rewind(plan, model, weights, example_inputs).module
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    write_atomically(path, save(tensors))


def _with_weights(model: torch.nn.Module, weights: Path) -> torch.nn.Module:
    other = copy.deepcopy(model)
    load_weights(other, weights)
    return other
