"""The criterion that looks at batch norms."""

from __future__ import annotations

import numpy as np
import torch

from edgeprune.data import Data
from edgeprune.errors import InputError
from edgeprune.graph.structure import Group, ModelGraph
from edgeprune.saliency.members import by_channel, from_channels
from edgeprune.saliency.registry import Saliency, Values, criterion
from edgeprune.saliency.weights import l2

BatchNorm = torch.nn.modules.batchnorm._BatchNorm


@criterion(source="Liu et al. 2017, Learning efficient convolutional networks through network slimming: |γ|")
def bn_scale(graph: ModelGraph, model: torch.nn.Module, data: Data, seed: int) -> Saliency:
    """|γ| of the batch norms that scale the channel, their mean where there are several.

    A group that no batch norm scales counts as one that scales by 1 on average: `l2`'s shares times its channels.
    """
    shares = l2(graph, model, data, seed).channels
    channels: dict[str, Values] = {}
    scaled = False
    for group in graph.groups:
        scales = _scales(group, model)
        scaled |= bool(scales)
        channels[group.id] = np.mean(scales, axis=0) if scales else shares[group.id] * group.num_channels
    if graph.groups and not scaled:
        raise InputError("saliency 'bn_scale': no batch norm scales a prunable channel of this model; take l2")
    return from_channels(graph, channels, unit="|γ|")


def _scales(group: Group, model: torch.nn.Module) -> list[Values]:
    """float64 [channels] of every batch norm; the mean over a channel's indices."""
    found = []
    for member in group.members:
        owner, _, name = member.parameter.rpartition(".")
        if name == "weight" and isinstance(model.get_submodule(owner), BatchNorm):
            scale = model.get_parameter(member.parameter).detach().double().abs()
            sums = by_channel(torch.stack([scale, torch.ones_like(scale)]), member, group)
            found.append((sums[0] / sums[1].clamp_min(1)).numpy())
    return found
