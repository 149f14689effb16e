"""How well a model answers: against labels where there are some, and against the dense model always."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite

import torch

from edgeprune.data import Data
from edgeprune.errors import InputError
from edgeprune.models import ModelFunction, evaluating, output_tensor


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Over `n` samples: `top1` and `agreement` (same arg max as dense) as shares of 1, `kl` KL(dense || model) in nats,
    mean over the samples, `relative_error` ||model - dense|| / ||dense|| over all outputs.

    None where there is nothing to say: no labels, no dense model, an output that is not [N, classes].
    """

    n: int
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    relative_error: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """All fields by name; what is not finite is None, since JSON knows no NaN."""
        return {name: None if value is None or not isfinite(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model answered on some data: `values` float64 [N, ...], `labels` int64 [N] or None."""

    values: torch.Tensor
    labels: torch.Tensor | None


def check_takes(model: torch.nn.Module, data: Data, *, num_inputs: int = 1) -> None:
    """`InputError` where the model can't take the data: it has several inputs, or raises on what the data holds.

    Of integers, such as token ids, the model is shown the samples that hold the least and the largest one.
    """
    if num_inputs > 1:
        raise InputError(
            f"the model takes {num_inputs} inputs, data is for one: wrap the model so that it makes the others itself, "
            "or give no data and take a saliency that looks at weights alone, like l2"
        )
    check_runs(model, _telling(data))


def check_runs(model: torch.nn.Module, x: torch.Tensor, *others: torch.Tensor) -> None:
    """`InputError` where the model raises on a batch of the data, x, with the `others` of its inputs."""
    try:
        with torch.no_grad(), evaluating(model):
            model(x, *others)
    except Exception as error:  # the model's own code may raise anything
        held = "" if x.is_floating_point() or x.dtype == torch.bool else f", {int(x.min())} to {int(x.max())}"
        shown = f"{str(x.dtype).partition('.')[2]} {tuple(x.shape)}{held}"
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"the model can't take the data ({shown}): {type(error).__name__}: {reason}") from error


def _telling(data: Data) -> torch.Tensor:
    """The first sample; of integers those that hold the least and the largest one."""
    batches = data.batches()
    first, _ = next(batches)
    if first.is_floating_point():
        return first[:1]
    x = torch.cat([first, *(x for x, _ in batches)])
    flat = x.flatten(1).long()
    return x[torch.stack([flat.amin(1).argmin(), flat.amax(1).argmax()])]


def evaluate(
    model: ModelFunction, data: Data, *, dense: ModelFunction | Outputs | None = None, batch_size: int = 32
) -> Quality:
    """Run `model`, a torch module or an engine's function, over view 0 of all the data.

    `dense` is what it is compared with, or its `outputs` on the same data where several models are compared with one.
    An engine of a fixed batch takes its own `batch_size`.
    """
    answers = outputs(model, data, batch_size=batch_size)
    if dense is not None and not isinstance(dense, Outputs):
        dense = outputs(dense, data, batch_size=batch_size)
    return compare(answers, dense)


def outputs(
    model: ModelFunction, data: Data, *, batch_size: int = 32, views: int = 1, limit: int | None = None
) -> Outputs:
    """The model's answers, in the order of `data.batches`."""
    values, labels = [], []
    with torch.no_grad():
        for x, y in data.batches(batch_size, views=views, limit=limit):
            values.append(output_tensor(model(x)).to(torch.float64))
            if y is not None:
                labels.append(y)
    return Outputs(values=torch.cat(values), labels=torch.cat(labels) if labels else None)


def compare(answers: Outputs, dense: Outputs | None) -> Quality:
    """Quality of answers, against the dense model's on the same samples."""
    a, labels = answers.values, answers.labels
    classifies = is_classification(a)
    top1 = None
    if labels is not None and classifies:
        check_labels(labels, a.shape[1])
        top1 = _share(a.argmax(1) == labels)
    if dense is None:
        return Quality(n=len(a), top1=top1)
    b = dense.values
    if a.shape != b.shape:
        raise ValueError(f"outputs of shape {tuple(a.shape)} can't be compared with {tuple(b.shape)}")
    return Quality(
        n=len(a),
        top1=top1,
        agreement=_share(a.argmax(1) == b.argmax(1)) if classifies else None,
        kl=float(divergence(b, a).mean()) if classifies else None,
        relative_error=float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)),
    )


def is_classification(output: torch.Tensor) -> bool:
    """Whether an output is [N, classes], read as logits."""
    return output.ndim == 2 and output.shape[1] > 1


def divergence(dense: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL(softmax(dense) || softmax(model)) in nats, float64 [N], from logits [N, classes]."""
    p, q = dense.double().log_softmax(1), model.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1).clamp_min(0)


def difference(dense: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """How far an answer is from the dense one, float64 [N]: nats of KL for a classification, else half the mean squared
    difference over the output's elements."""
    return divergence(dense, model) if is_classification(dense) else squared_difference(dense, model)


def squared_difference(dense: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Half the mean squared difference over an output's elements, float64 [N].

    Logits count less their mean over the classes, which no softmax sees.
    """
    moved = dense.double() - model.double()
    if is_classification(dense):
        moved = moved - moved.mean(1, keepdim=True)
    return moved.flatten(1).square().mean(1) / 2


def check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """`InputError` for a label that the model has no output for."""
    if int(labels.max()) >= num_classes:
        raise InputError(f"the data has label {int(labels.max())}, the model only {num_classes} classes, from 0")


def _share(flags: torch.Tensor) -> float:
    return float(flags.double().mean())
