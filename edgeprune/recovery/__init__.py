"""Bring a pruned network's answers back towards the dense one's. Repair needs no labels and seconds, and runs first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from edgeprune.data import as_data
from edgeprune.errors import InputError
from edgeprune.graph import ModelGraph, trace
from edgeprune.models import evaluating, output_tensor
from edgeprune.pattern import copy_zeros
from edgeprune.pruned import Pruned
from edgeprune.quality import squared_difference
from edgeprune.recovery.batch_norm import recalibrate
from edgeprune.recovery.least_squares import LayerRepair, reconstruct
from edgeprune.recovery.reference import BATCH_SIZE, Reference, record
from edgeprune.surgery import read_plan

__all__ = ["LayerRepair", "Method", "RepairReport", "recover", "repair"]

Method: TypeAlias = Literal["auto", "batch_norm", "least_squares", "streams", "none"]
_STEPS = {
    "none": (),
    "batch_norm": ("batch_norm",),
    "least_squares": ("least_squares", "least_squares + batch_norm"),
    "streams": ("streams", "streams + batch_norm"),
    "auto": ("batch_norm", "least_squares + batch_norm", "streams + batch_norm"),
}


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What a repair did.

    `chosen` is the step that was kept; `differences[step]` how far the network is from the dense one after each step
    tried, on samples that nothing was fitted to: the mean of `quality.squared_difference`, since the KL of a network
    that is sure of nearly all samples hangs on a few. `none` is before. Empty where there was no dense model to compare
    with. `layers` belong to the step chosen.
    """

    chosen: str
    differences: dict[str, float]
    num_fit: int
    num_held_out: int
    layers: tuple[LayerRepair, ...] = ()


def recover(
    pruned: Pruned,
    data: object,
    *,
    dense: torch.nn.Module | None = None,
    graph: ModelGraph | None = None,
    method: Method = "auto",
    seed: int = 0,
) -> Pruned:
    """`repair` without its report."""
    return repair(pruned, data, dense=dense, graph=graph, method=method, seed=seed)[0]


def repair(
    pruned: Pruned,
    data: object,
    *,
    dense: torch.nn.Module | None = None,
    graph: ModelGraph | None = None,
    method: Method = "auto",
    seed: int = 0,
) -> tuple[Pruned, RepairReport]:
    """A repaired copy of `pruned`, from unlabelled `data` (a `Data`, or batches x or (x, y)); `pruned` stays as it is.

    With the `dense` model: batch norms are paired with its statistics, and every convolution and linear is solved for
    its outputs by least squares, a layer that ends a residual branch also for the stream that it adds to; what serves
    samples that nothing was fitted to best is kept, or nothing; zeros of a 2:4 weight stay. `graph` saves
    tracing the dense model. Without the dense model batch norms are re-calibrated from the data alone, unchecked.
    """
    if method not in _STEPS:
        raise ValueError(f"method {method!r} is none of {', '.join(_STEPS)}")
    samples = as_data(data, dtype=pruned.example_inputs[0].dtype)
    if method == "none":
        return pruned, RepairReport(chosen="none", differences={}, num_fit=0, num_held_out=0)
    if dense is None:
        if method in ("least_squares", "streams"):
            raise InputError(f"{method} needs the dense model to reproduce: give it, or take batch_norm")
        count, views = samples.calibration_views()
        batches = [x for x, _ in samples.batches(4 * BATCH_SIZE, views=views, seed=seed, limit=count)]
        module = recalibrate(pruned.module, batches)
        num_fit = sum(len(x) for x in batches)
        report = RepairReport(chosen="batch_norm", differences={}, num_fit=num_fit, num_held_out=0)
        return replace(pruned, module=module), report
    cut = read_plan(pruned.plan, graph or trace(dense, pruned.example_inputs))
    with evaluating(dense):
        reference = record(dense, pruned.module, cut, samples, seed=seed)
    return _best(pruned, dense, reference, _STEPS[method])


def _best(
    pruned: Pruned, dense: torch.nn.Module, reference: Reference, steps: tuple[str, ...]
) -> tuple[Pruned, RepairReport]:
    module, chosen = pruned.module, "none"
    layers: tuple[LayerRepair, ...] = ()
    differences = {"none": _difference(module, reference)}
    for step in steps:
        streams = step.startswith("streams")
        if streams and not reference.streams and "least_squares + batch_norm" in steps:
            continue  # the same again
        candidate, repairs = reconstruct(
            pruned.module,
            dense,
            reference,
            solve=streams or "least_squares" in step,
            moments="batch_norm" in step,
            streams=streams,
        )
        copy_zeros(pruned.module, candidate, pruned.plan.formats)
        differences[step] = _difference(candidate, reference)
        if differences[step] < differences[chosen]:
            module, layers, chosen = candidate, repairs, step
    report = RepairReport(
        chosen=chosen,
        differences=differences,
        num_fit=reference.num_fit,
        num_held_out=len(reference.samples) - reference.num_fit,
        layers=layers,
    )
    return replace(pruned, module=module), report


def _difference(module: torch.nn.Module, reference: Reference) -> float:
    """On the held-out samples; on all of them where there are none."""
    start = reference.num_fit if reference.num_fit < len(reference.samples) else 0
    with torch.no_grad():
        answers = [output_tensor(module(x)) for x in torch.split(reference.samples[start:], BATCH_SIZE)]
    return float(squared_difference(reference.outputs[start:], torch.cat(answers)).mean())
