"""Patterns of zeros: n:m, of every m consecutive input channels at most n weights are not zero; or so many, anywhere.

n:m holds for each output channel and kernel position by itself. Legend: W [C, K] a layer's weights as a matrix, one row
an output channel, K = kernel positions · input channels with the input channels running fastest, so that the groups are
m consecutive columns; a weight is [O, I] or [O, I, kh, kw].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from edgeprune.eligibility import DENSE, FORMATS, GROUP, TWO_OF_FOUR, is_format, share_of
from edgeprune.errors import SurgeryError

N, M = 2, GROUP


def matrix_of(weight: torch.Tensor) -> torch.Tensor:
    """[O, I, ...] as W [O, ... · I]."""
    return weight.movedim(1, -1).flatten(1)


def weight_of(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Inverse of `matrix_of` for a weight of this shape."""
    rows, inputs, *window = shape
    return matrix.reshape(rows, *window, inputs).movedim(-1, 1).contiguous()


def best_mask(scores: torch.Tensor, n: int = N, m: int = M) -> torch.Tensor:
    """bool [C, K]: the n largest of every m consecutive scores; ties go to the lower column.

    `ValueError` where K is no multiple of m: a ragged tail would stay dense, and no kernel takes that.
    """
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"{columns} columns are no multiple of {m}")
    grouped = scores.reshape(rows, columns // m, m)
    first = grouped.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, first, True).reshape(rows, columns)


def mask_of(W: torch.Tensor, form: str) -> torch.Tensor:
    """bool [C, K]: the weights that stay in this format by magnitude; ties go to the lower column, then row."""
    share = share_of(form)
    if share is None:
        return best_mask(W.abs())
    first = W.abs().flatten().argsort(descending=True, stable=True)[: W.numel() - math.ceil(share * W.numel())]
    return torch.zeros(W.numel(), dtype=torch.bool, device=W.device).index_fill_(0, first, True).reshape(W.shape)


def share_of_groups(weight: torch.Tensor, n: int = N, m: int = M) -> float:
    """Share of the groups that hold the pattern; 0 where the input channels are no multiple of m."""
    if weight.dim() < 2 or weight.shape[1] % m:
        return 0.0
    grouped = matrix_of(weight).reshape(-1, m)
    return float(((grouped != 0).sum(1) <= n).double().mean())


def holds(weight: torch.Tensor, n: int = N, m: int = M) -> bool:
    """Whether every group holds the pattern."""
    return share_of_groups(weight, n, m) == 1.0


def has_form(weight: torch.Tensor, form: str) -> bool:
    """Whether a weight's zeros are those of a format."""
    share = share_of(form)
    return holds(weight) if share is None else float((weight == 0).double().mean()) >= share


def check_formats(formats: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`SurgeryError` where a plan's format is unknown, or of a parameter that is not there or has no such form."""
    for name, form in formats.items():
        if not is_format(form):
            raise SurgeryError(f"the plan wants '{name}' as {form}; formats are {', '.join(FORMATS)}, zeros:SHARE")
        if name not in shapes:
            raise SurgeryError(f"the plan wants '{name}' as {form}, which the model lacks")
        if form != DENSE and (why := shape_refusal(shapes[name], form)):
            raise SurgeryError(f"the plan wants '{name}' as {form}, but {why}")


def shape_refusal(shape: tuple[int, ...], form: str) -> str | None:
    """Why a weight of this shape can't have this pattern."""
    if len(shape) < 2:
        return f"its shape {list(shape)} has no input channels"
    if form == TWO_OF_FOUR and shape[1] % M:
        return f"its {shape[1]} input channels are no multiple of {M}"
    return None


def mask_by_magnitude(module: torch.nn.Module, formats: Mapping[str, str]) -> None:
    """Set the smallest weights to zero, in place, in the parameters that a format other than dense is named for."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in sparse_names(formats):
        parameter = parameters.get(name)
        if parameter is None:
            continue  # of a dropped block
        with torch.no_grad():
            matrix = matrix_of(parameter)
            parameter.copy_(weight_of(matrix * mask_of(matrix, formats[name]), parameter.shape))


def copy_zeros(source: torch.nn.Module, target: torch.nn.Module, formats: Mapping[str, str]) -> None:
    """Set what is zero in the source's parameters of a sparse format to zero in the target's, in place."""
    known, written = (dict(m.named_parameters(remove_duplicate=False)) for m in (source, target))
    for name in sparse_names(formats):
        if name in known and name in written:
            with torch.no_grad():
                written[name].mul_(known[name] != 0)


def sparse_names(formats: Mapping[str, str]) -> list[str]:
    """The parameters that are to be 2:4 or unstructured, in order."""
    return sorted(name for name, form in formats.items() if form != DENSE)
