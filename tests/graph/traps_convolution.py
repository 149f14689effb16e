"""Traps around convolutions and norms: grouped, depthwise, transposed; statistics over channels; weights computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.graph.trap import TOKENS, conv, random, trap


@trap(
    lambda: {"a": conv(3, 12), "grouped": conv(12, 12, 3, groups=3), "head": conv(12, 2)},
    groups={"a.weight:0": (3, 4), "grouped.weight:0": (3, 4), "grouped.weight:1": 4, "head.weight:1": (3, 4)},
)
def grouped_convolution(m: Any, x: Tensor) -> Any:
    """Three groups of four: the groups, the four inputs of each and the four outputs of each can all shrink."""
    return m.head(m.grouped(m.a(x)).relu())


@trap(
    lambda: {"a": conv(3, 6), "b": conv(3, 6), "grouped": conv(12, 12, 3, groups=3), "head": conv(12, 2)},
    groups={
        "a.weight:0": [(4,), (3, 4)],
        "b.weight:0": [(4,), (3, 4)],
        "grouped.weight:0": [(4,), (3, 4)],
        "grouped.weight:1": 4,
    },
)
def grouped_convolution_over_cat(m: Any, x: Tensor) -> Any:
    """The second of three convolution groups reads the end of one branch and the start of the other."""
    return m.head(m.grouped(torch.cat([m.a(x), m.b(x)], 1)))


@trap(
    lambda: {"a": conv(3, 4), "depthwise": conv(4, 8, 3, groups=4), "head": conv(8, 2)},
    groups={"a.weight:0": 4, "depthwise.weight:0": [(2, 4), (4,)], "head.weight:1": [(2, 4), (4,)]},
)
def depthwise_with_multiplier(m: Any, x: Tensor) -> Any:
    """Every channel has two filters: they go with it, or one of the two goes everywhere."""
    return m.head(m.depthwise(m.a(x)).relu())


@trap(
    lambda: {"a": conv(3, 8), "grouped": conv(8, 4, 3, groups=4), "head": conv(4, 2)},
    groups={"a.weight:0": (2, 4), "grouped.weight:0": 4, "grouped.weight:1": 2, "head.weight:1": 4},
)
def grouped_convolution_with_one_filter_each(m: Any, x: Tensor) -> Any:
    """Two inputs and one output a group: it looks depthwise and is not."""
    return m.head(m.grouped(m.a(x)))


@trap(
    lambda: {"a": conv(3, 4), "up": nn.ConvTranspose2d(4, 6, 2, 2), "head": conv(6, 2)},
    groups={"a.weight:0": 4, "up.weight:0": 4, "up.weight:1": 6, "up.bias:0": 6},
)
def transposed_convolution(m: Any, x: Tensor) -> Any:
    """The weight has its input channels first."""
    return m.head(m.up(m.a(x)).relu())


@trap(
    lambda: {"a": conv(3, 8), "up": nn.ConvTranspose2d(8, 12, 2, 2, groups=2), "head": conv(12, 2)},
    groups={"a.weight:0": (2, 4), "up.weight:0": (2, 4), "up.weight:1": 6, "head.weight:1": (2, 6)},
)
def grouped_transposed_convolution(m: Any, x: Tensor) -> Any:
    """Input channels first, outputs per convolution group second."""
    return m.head(m.up(m.a(x)))


@trap(
    lambda: {"a": nn.Conv1d(3, 4, 1), "norm": nn.BatchNorm1d(4), "b": nn.Conv1d(4, 6, 3), "head": nn.Conv1d(6, 2, 1)},
    inputs=(random(2, 3, 7),),
    groups={"a.weight:0": 4, "norm.running_var:0": 4, "b.weight:0": 6},
)
def one_dimension(m: Any, x: Tensor) -> Any:
    """Convolutions over time."""
    return m.head(F.gelu(m.b(m.norm(m.a(x))), approximate="tanh"))


@trap(
    lambda: {"a": nn.Conv3d(3, 4, 1), "norm": nn.BatchNorm3d(4), "b": nn.Conv3d(4, 6, 2), "head": nn.Linear(6, 2)},
    inputs=(random(2, 3, 2, 3, 4),),
    groups={"a.weight:0": 4, "norm.weight:0": 4, "b.weight:0": 6, "head.weight:1": 6},
)
def three_dimensions(m: Any, x: Tensor) -> Any:
    """Convolutions over video."""
    return m.head(m.b(m.norm(m.a(x)).relu()).mean((2, 3, 4)))


@trap(
    lambda: {
        "stem": conv(3, 4),
        "a": conv(4, 5),
        "b": conv(4, 7),
        "norm": nn.GroupNorm(4, 12),
        "head": conv(12, 2),
    },
    groups={"stem.weight:0": 4},
)
def group_norm_across_cat(m: Any, x: Tensor) -> Any:
    """Four norm groups of three over 5 + 7 channels: the second spans both branches."""
    x = m.stem(x).relu()
    return m.head(m.norm(torch.cat([m.a(x), m.b(x)], 1)).relu())


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 12), "norm": nn.GroupNorm(4, 12), "head": conv(12, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": [(3, 4), (4,), (3,)], "norm.weight:0": [(3, 4), (4,), (3,)]},
)
def group_norm(m: Any, x: Tensor) -> Any:
    """A whole norm group goes without a trace; one channel of each changes statistics; anything else is torn."""
    return m.head(m.norm(m.a(m.stem(x).relu())).relu())


@trap(
    lambda: {"a": conv(3, 6), "norm": nn.GroupNorm(1, 6), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "norm.weight:0": 6, "norm.bias:0": 6},
)
def group_norm_of_one_group(m: Any, x: Tensor) -> Any:
    """A layer norm over channels and positions: its statistics are those of what is kept."""
    return m.head(m.norm(m.a(x)).relu())


@trap(
    lambda: {"a": conv(3, 6), "norm": nn.InstanceNorm2d(6, affine=True), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "norm.weight:0": 6},
)
def instance_norm(m: Any, x: Tensor) -> Any:
    """Statistics of every channel alone, written as a batch norm over batch times channels inside."""
    return m.head(m.norm(m.a(x)).relu())


@trap(
    lambda: {"a": conv(3, 6), "norm": nn.InstanceNorm2d(6, track_running_stats=True), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "norm.running_mean:0": 6},
)
def instance_norm_with_running_statistics(m: Any, x: Tensor) -> Any:
    """Buffers follow the channels."""
    return m.head(m.norm(m.a(x)).relu())


@trap(
    lambda: {"a": nn.Linear(8, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "norm.weight:0": 6, "head.weight:1": 6},
)
def layer_norm(m: Any, x: Tensor) -> Any:
    """Statistics over the pruned axis; `normalized_shape` follows."""
    return m.head(m.norm(m.a(x)))


@trap(
    lambda: {"a": conv(3, 4), "norm": nn.LayerNorm([4, 4, 4]), "head": conv(4, 2)},
    groups={"a.weight:0": [(4,)], "norm.weight:0": [(4,)]},
)
def layer_norm_over_three_dimensions(m: Any, x: Tensor) -> Any:
    """The first 4 of `normalized_shape` is the channels, the others are the picture."""
    return m.head(m.norm(m.a(x)).relu())


@trap(
    lambda: {"a": nn.Linear(8, 6), "norm": nn.RMSNorm(6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "norm.weight:0": 6},
)
def rms_norm(m: Any, x: Tensor) -> Any:
    """The mean of squares runs over the pruned axis."""
    return m.head(m.norm(m.a(x)))


@trap(
    lambda: {
        "embed": nn.Linear(8, 6),
        "gamma": nn.Parameter(torch.ones(6)),
        "up": nn.Linear(6, 10),
        "head": nn.Linear(10, 2),
    },
    inputs=TOKENS,
    groups={"up.weight:0": 10, "embed.weight:0": 6, "gamma:0": 6},
)
def hand_written_rms_norm(m: Any, x: Tensor) -> Any:
    """The same norm as separate operators: a mean over channels, sound only because all of it is a norm."""
    y = m.embed(x)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.head(m.up(m.gamma * y).relu())


@trap(
    lambda: {"a": conv(3, 6), "norm": nn.LocalResponseNorm(3), "b": conv(6, 5), "head": conv(5, 2)},
    groups={"b.weight:0": 5, "a.weight:0": ()},
    refused="avg_pool3d",
)
def local_response_norm(m: Any, x: Tensor) -> Any:
    """A window slides over neighbouring channels."""
    return m.head(m.b(m.norm(m.a(x))).relu())


@trap(
    lambda: {"a": conv(3, 4), "b": conv(4, 6, 3), "c": conv(6, 5), "head": conv(5, 2)},
    groups={"c.weight:0": 5, "b.weight:0": [(6,), ()], "a.weight:0": (), "b.weight:1": ()},
    refused="mean",
)
def standardised_weight(m: Any, x: Tensor) -> Any:
    """The weight is read through a mean over its input channels."""
    x = m.a(x)
    weight = m.b.weight - m.b.weight.mean((1, 2, 3), keepdim=True)
    return m.head(m.c(F.conv2d(x, weight, m.b.bias, padding=1)).relu())


@trap(
    lambda: {"a": conv(3, 4), "b": parametrizations.spectral_norm(conv(4, 6)), "c": conv(6, 5), "head": conv(5, 2)},
    groups={"c.weight:0": 5, "a.weight:0": (), "b.parametrizations.weight.original:0": ()},
)
def spectral_parametrization(m: Any, x: Tensor) -> Any:
    """The weight is divided by a norm of the whole of it."""
    return m.head(m.c(m.b(m.a(x))).relu())


@trap(
    lambda: {"a": conv(3, 4), "b": parametrizations.weight_norm(conv(4, 6)), "c": conv(6, 5), "head": conv(5, 2)},
    groups={"c.weight:0": 5, "a.weight:0": (), "b.parametrizations.weight.original1:0": [(6,), ()]},
)
def weight_norm_parametrization(m: Any, x: Tensor) -> Any:
    """Each filter is divided by its norm over the input channels."""
    return m.head(m.c(m.b(m.a(x))).relu())


@trap(
    lambda: {"a": conv(3, 6), "squeeze": conv(6, 4), "excite": conv(4, 6), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "squeeze.weight:1": 6, "excite.weight:0": 6, "squeeze.weight:0": 4},
)
def squeeze_excite(m: Any, x: Tensor) -> Any:
    """The gate reads what it gates."""
    x = m.a(x)
    return m.head(x * m.excite(m.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid())


@trap(
    lambda: {
        "stem": conv(3, 8),
        "depthwise": conv(8, 8, 3, groups=8),
        "norm": nn.LayerNorm(8),
        "up": nn.Linear(8, 16),
        "down": nn.Linear(16, 8),
        "gamma": nn.Parameter(torch.ones(8)),
        "head": conv(8, 2),
    },
    groups={"stem.weight:0": 8, "depthwise.weight:0": 8, "norm.weight:0": 8, "gamma:0": 8, "up.weight:0": 16},
)
def convnext_block(m: Any, x: Tensor) -> Any:
    """Channels first, then last, then first again; the layer norm and the layer scale follow the trunk."""
    x = m.stem(x)
    y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
    y = (m.gamma * m.down(F.gelu(m.up(y), approximate="tanh"))).permute(0, 3, 1, 2)
    return m.head(x + y)


@trap(
    lambda: {"down": conv(3, 4, 3), "deep": conv(4, 6, 3), "up": conv(10, 5, 3), "head": conv(5, 2)},
    groups={"down.weight:0": 4, "deep.weight:0": 6, "up.weight:0": 5, "up.weight:1": (4, 6)},
)
def unet(m: Any, x: Tensor) -> Any:
    """A skip meets an enlarged picture in a cat."""
    skip = m.down(x).relu()
    deep = m.deep(F.max_pool2d(skip, 2)).relu()
    deep = F.interpolate(deep, size=skip.shape[2:], mode="bilinear", align_corners=False)
    return m.head(m.up(torch.cat([skip, deep], 1)).relu())
