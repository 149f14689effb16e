"""Normalisations. Where the statistics run over pruned channels they change; the group says so."""

from __future__ import annotations

import numpy as np

from edgeprune.graph.atoms import is_free, no_atoms
from edgeprune.graph.rules.call import Call, Dims, Results, free, refuse, rule
from edgeprune.graph.rules.contractions import whole_groups

NORM = "its norm is not prunable"


@rule("batch_norm _native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm")
def batch_norm(call: Call) -> Results:
    """Per-channel scale and shift over dimension 1 (evaluation mode)."""
    if call.arguments.get("training"):
        return refuse(call, "batch norm uses the statistics of the batch")
    return _first_output(call, per_channel(call, ("weight", "bias", "running_mean", "running_var"), 1))


@rule("instance_norm")
def instance_norm(call: Call) -> Results:
    """Statistics per sample and channel, over positions."""
    for dim in call.x[2:]:
        call.fix(dim, "it normalises over a dimension that holds channels")
    return per_channel(call, ("weight", "bias", "running_mean", "running_var"), 1)


def per_channel(call: Call, names: tuple[str, ...], axis: int) -> Dims:
    """Tie one-dimensional parameters to a dimension of the input."""
    x = list(call.x)
    for name in names:
        if call.given(name):
            x[axis] = call.unite(call.of(name)[0], x[axis], NORM)
    return tuple(x)


@rule("layer_norm native_layer_norm rms_norm _fused_rms_norm")
def layer_norm(call: Call) -> Results:
    """Statistics over the last dimensions, which change when one of them shrinks."""
    x = list(call.x)
    rank = len(call.arguments["normalized_shape"])
    for i in range(-rank, 0):
        for name in ("weight", "bias"):
            if call.given(name):
                x[i] = call.unite(call.of(name)[i], x[i], NORM)
        if not is_free(x[i]):
            call.atoms.statistics.append(x[i])
    statistics = (*x[:-rank], *(no_atoms(1) for _ in range(rank)))
    return [tuple(x), *[statistics] * (len(call.shapes) - 1)] if len(call.shapes) > 1 else tuple(x)


@rule("group_norm native_group_norm")
def group_norm(call: Call) -> Results:
    """Statistics per sample over the channels of a norm group and positions; whole norm groups live or die.

    With one norm group for all channels it is a layer norm over them.
    """
    groups = int(call.arguments.get("num_groups", call.arguments.get("group", 1)))
    x = list(per_channel(call, ("weight", "bias"), 1))
    for dim in x[2:]:
        call.fix(dim, "it normalises over a dimension that holds channels")
    if is_free(x[1]):
        return _first_output(call, tuple(x))
    if groups == 1:
        call.atoms.statistics.append(x[1])
    elif groups < x[1].shape[1]:
        blocks = whole_groups(x[1], groups)
        leaders = np.repeat(blocks[:, :, :1], blocks.shape[2], axis=2).reshape(len(x[1]), -1)
        x[1] = call.unite(leaders, x[1], "its norm groups live or die as a whole")
    return _first_output(call, tuple(x))


def _first_output(call: Call, x: Dims) -> Results:
    """The normalised tensor, and statistics without atoms where the operator gives them too."""
    if len(call.shapes) == 1:
        return x
    outputs = free(call)
    assert isinstance(outputs, list)
    return [x, *outputs[1:]]
