"""Batch norms whose statistics no longer hold: new ones, paired with the dense model's or from the data alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from edgeprune.recovery.reference import Moments, Norm

LEAST_SAMPLES = 8  # fewer say less about the statistics than the old ones do
MAX_RESCALE = 4.0  # of a channel's standard deviation, where it is paired with the dense one


def pair_moments(norm: torch.nn.Module, x: torch.Tensor, dense: Moments) -> None:
    """Shift and rescale a pruned model's batch norm, in place, so that its output has the dense one's moments.

    x float32 [N, C, ...] is what the norm reads now. With mean m and standard deviation s of both inputs, the new
    statistics solve (m - mean') / std' = (m_dense - mean) / std and s / std' = s_dense / std. On the dense model's own
    input that changes nothing, however few the samples are and whatever they were drawn from.
    """
    assert isinstance(norm, Norm) and norm.running_mean is not None and norm.running_var is not None
    by_channel = x.transpose(0, 1).flatten(1).double()
    var, mean = torch.var_mean(by_channel, 1, correction=0)
    alive = (dense.var > dense.running_var * 1e-6) & (var > dense.running_var * 1e-6)
    scale = torch.where(alive, (var / dense.var.clamp_min(1e-30)).sqrt(), 1.0).clamp(1 / MAX_RESCALE, MAX_RESCALE)
    norm.running_mean.copy_(mean - (dense.mean - dense.running_mean) * scale)
    norm.running_var.copy_(((dense.running_var + norm.eps) * scale.square() - norm.eps).clamp_min(0))


def recalibrate(module: torch.nn.Module, batches: Iterable[torch.Tensor]) -> torch.nn.Module:
    """A copy whose batch norms hold the average of the batches' statistics; nothing else in it trains.

    The average is cumulative (momentum None), every batch normalised by its own statistics on the way. With fewer than
    `LEAST_SAMPLES` samples the statistics stay.
    """
    module = copy.deepcopy(module)
    inputs = list(batches)
    norms = [m for m in module.modules() if isinstance(m, Norm) and m.track_running_stats]
    if not norms or sum(len(x) for x in inputs) < LEAST_SAMPLES:
        return module
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x in inputs:
            module(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return module.eval()
