"""Make layers of a network 2:4, one after another: each sees what the sparse ones before it give. Or zeros anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from edgeprune.eligibility import TWO_OF_FOUR, share_of
from edgeprune.errors import InputError, did_you_mean
from edgeprune.models import evaluating
from edgeprune.pattern import mask_of, matrix_of, shape_refusal, weight_of
from edgeprune.pruned import Pruned
from edgeprune.sparsity.gram import gram_of, output_error
from edgeprune.sparsity.magnitude import magnitude
from edgeprune.sparsity.sparsegpt import sparsegpt
from edgeprune.sparsity.wanda import wanda

Criterion: TypeAlias = Literal["magnitude", "wanda", "sparsegpt"]
CRITERIA: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}
"""(W [C, K], H [K, K]) to new weights and mask."""


@dataclass(frozen=True, kw_only=True)
class LayerSparsity:
    """One parameter: by which criterion, the share of magnitude that is left, and ||W X - W' X||² / ||W X||².

    `error` is None where no samples were given or the layer's input was not seen (`criterion` is magnitude then).
    """

    parameter: str
    criterion: str
    kept_magnitude: float
    error: float | None


def sparsify(
    pruned: Pruned,
    parameters: Iterable[str],
    *,
    criterion: Criterion = "magnitude",
    samples: Sequence[torch.Tensor] = (),
    zeros: float | None = None,
) -> tuple[Pruned, tuple[LayerSparsity, ...]]:
    """A copy in which these parameters are 2:4 too, the plan says so, and what was done to each.

    With `zeros`, a share above 0 and below 1, they are unstructured: the smallest so many of a parameter's weights are
    zero, wherever they lie; magnitude alone knows how.

    `samples` are the model's inputs, each [N, ...] for all N samples, unlabelled; Wanda and SparseGPT need them, with
    magnitude they only tell the error. In one forward pass each layer is made sparse when its input is there, by what
    the layers before it have become. `InputError` where a parameter is unknown or has no 2:4 form, all of them listed.
    """
    names = sorted(set(parameters))
    if criterion not in CRITERIA:
        raise InputError(
            f"no criterion '{criterion}'{did_you_mean(criterion, CRITERIA)} (known: {', '.join(CRITERIA)})"
        )
    if criterion != "magnitude" and not samples:
        raise InputError(f"{criterion} looks at the layers' inputs: give samples, or take magnitude")
    form = _form(zeros, criterion)
    module = copy.deepcopy(pruned.module)
    _check(module, names, form)
    found: dict[str, LayerSparsity] = {}
    if samples:
        _in_one_pass(module, names, criterion, form, samples, found)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in found:
            found[name] = _make_sparse(name, tensors[name], None, "magnitude", form)
    formats = {**pruned.plan.formats, **dict.fromkeys(names, form)}
    plan = replace(pruned.plan, formats=formats)
    return replace(pruned, module=module, plan=plan), tuple(found[name] for name in names)


def _form(zeros: float | None, criterion: str) -> str:
    """The format as a plan names it."""
    if zeros is None:
        return TWO_OF_FOUR
    form = f"zeros:{zeros:.6g}"
    if share_of(form) is None:
        raise InputError(f"zeros is a share above 0 and below 1, found {zeros!r}")
    if criterion != "magnitude":
        raise InputError(f"{criterion} makes 2:4; zeros anywhere are chosen by magnitude")
    return form


def _check(module: torch.nn.Module, names: Sequence[str], form: str) -> None:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    faults = []
    for name in names:
        if name not in shapes:
            faults.append(f"'{name}' is no parameter of the model{did_you_mean(name, shapes)}")
        elif why := shape_refusal(shapes[name], form):
            faults.append(f"'{name}': {why}")
    if faults:
        raise InputError(f"can't be made {form}: " + "; ".join(faults))


def _in_one_pass(
    module: torch.nn.Module,
    names: Sequence[str],
    criterion: str,
    form: str,
    samples: Sequence[torch.Tensor],
    found: dict[str, LayerSparsity],
) -> None:
    hooks = []
    for path, layer in module.named_modules():
        name = f"{path}.weight" if path else "weight"
        if name in names and _is_readable(layer):
            hooks.append(layer.register_forward_pre_hook(_hook(name, criterion, form, found)))
    try:
        with torch.no_grad(), evaluating(module):
            module(*samples)
    finally:
        for hook in hooks:
            hook.remove()


def _is_readable(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear) or (isinstance(layer, torch.nn.Conv2d) and layer.groups == 1)


def _hook(name: str, criterion: str, form: str, found: dict[str, LayerSparsity]) -> Callable[[Any, Any], None]:
    def hook(layer: Any, inputs: Any) -> None:
        if name not in found:  # a layer that runs twice is fitted to its first input
            found[name] = _make_sparse(name, layer.weight, gram_of(layer, inputs[0].detach()), criterion, form)

    return hook


def _make_sparse(name: str, weight: torch.Tensor, H: torch.Tensor | None, criterion: str, form: str) -> LayerSparsity:
    """New weights in place."""
    W = matrix_of(weight.detach())
    if H is None or form != TWO_OF_FOUR:
        mask = mask_of(W, form)
        new = W * mask
    else:
        new, mask = CRITERIA[criterion](W, H)
    kept = float(W.abs()[mask].sum() / W.abs().sum().clamp_min(torch.finfo(W.dtype).tiny))
    error = None if H is None else output_error(W, new, H)
    with torch.no_grad():
        weight.copy_(weight_of(new.to(W.dtype), weight.shape))
    return LayerSparsity(parameter=name, criterion=criterion, kept_magnitude=kept, error=error)
