"""Hold a pattern while the network is trained: zeros stay zeros, by a parametrisation that `baked` takes off again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils import parametrize

from edgeprune.errors import SurgeryError
from edgeprune.pattern import has_form, sparse_names
from edgeprune.pruned import Pruned


class Mask(torch.nn.Module):
    """What it parametrises is multiplied by a fixed mask of zeros and ones."""

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """What is assigned is masked too."""
        return weight * self.mask


def held(pruned: Pruned) -> Pruned:
    """A copy to train: every parameter that the plan wants as 2:4 or unstructured keeps the zeros that it has.

    Optimisers are to be made from *its* parameters. `baked` gives the plain module back; `export` does so by itself.
    """
    module = copy.deepcopy(pruned.module)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for name in sparse_names(pruned.plan.formats):
        if name not in tensors:
            continue  # of a dropped block
        path, _, own = name.rpartition(".")
        owner = module.get_submodule(path)
        if parametrize.is_parametrized(owner):
            raise SurgeryError(f"'{path}' is parametrised already; remove that before its zeros are held")
        mask = (tensors[name].detach() != 0).to(tensors[name].dtype)
        parametrize.register_parametrization(owner, own, Mask(mask))
    return replace(pruned, module=module)


def baked(pruned: Pruned) -> Pruned:
    """The same network with plain parameters again, zeros in them; `pruned` itself where there is nothing to bake.

    `SurgeryError` where a parameter that the plan wants as 2:4 or unstructured isn't: it was trained without `held`.
    """
    if any(_masked(module) for module in pruned.module.modules()):
        module = copy.deepcopy(pruned.module)
        for owner in [m for m in module.modules() if _masked(m)]:
            _bake(owner)
        pruned = replace(pruned, module=module)
    check_held(pruned)
    return pruned


def _masked(module: torch.nn.Module) -> bool:
    """Whether masks parametrise it, and nothing else does."""
    if not parametrize.is_parametrized(module):
        return False
    entries: Any = module.parametrizations
    return all(isinstance(part, Mask) for entry in entries.values() for part in entry)


def _bake(owner: Any) -> None:
    """As `parametrize.remove_parametrizations` does, which takes them off the class that copies of a module share."""
    values = {name: (getattr(owner, name).detach(), entry.original) for name, entry in owner.parametrizations.items()}
    del owner._modules["parametrizations"]
    owner.__class__ = type(owner).__mro__[1]
    for name, (value, original) in values.items():
        owner.register_parameter(name, torch.nn.Parameter(value, requires_grad=original.requires_grad))


def check_held(pruned: Pruned) -> None:
    """`SurgeryError` where a parameter has lost the pattern that the plan wants."""
    tensors = dict(pruned.module.named_parameters(remove_duplicate=False))
    forms = pruned.plan.formats
    lost = [name for name in sparse_names(forms) if name in tensors and not has_form(tensors[name], forms[name])]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise SurgeryError(
            f"the plan wants '{lost[0]}'{more} as {forms[lost[0]]}, but it is not any more: train "
            "edgeprune.sparsity.held(pruned), which keeps the zeros, or make them again by edgeprune.sparsity.sparsify"
        )
