"""Operators that slide over positions and leave channels alone: pooling, interpolation, patches."""

from __future__ import annotations

import numpy as np

from edgeprune.graph.atoms import no_atoms
from edgeprune.graph.rules.call import Call, Results, refuse, rule
from edgeprune.graph.rules.contractions import INPUT

RANK = {"1d": 1, "2d": 2, "3d": 3}


@rule("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d")
@rule("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d")
@rule("adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices")
@rule("_adaptive_avg_pool2d _adaptive_avg_pool3d")
@rule("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d")
@rule("upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa")
@rule("_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d")
def over_positions(call: Call) -> Results:
    """Works over the last one to three dimensions of [N, C, ...]."""
    x = call.x
    rank = next(rank for name, rank in RANK.items() if name in call.operator)
    for spatial in x[-rank:]:
        call.fix(spatial, "it mixes a dimension that holds channels")
    result = (*x[:-rank], *(no_atoms(size) for size in call.shape[-rank:]))
    return [result] * len(call.shapes) if len(call.shapes) > 1 else result


@rule("unfold im2col")
def unfold(call: Call) -> Results:
    """Patches: [N, C, H, W] to [N, C x window, patches]; or windows of one dimension as a new last one."""
    x = list(call.x)
    if "dimension" in call.arguments:
        axis = int(call.arguments["dimension"]) % len(x)
        call.fix(x[axis], "its windows run along a dimension that holds channels")
        x[axis] = no_atoms(call.shape[axis])
        return (*x, no_atoms(call.shape[-1]))
    for spatial in x[-2:]:
        call.fix(spatial, "it mixes a dimension that holds channels")
    window = call.shape[-2] // x[-3].shape[1]
    return (*x[:-3], np.repeat(x[-3], window, axis=1), no_atoms(call.shape[-1]))


@rule("col2im")
def fold(call: Call) -> Results:
    """[N, C x window, patches] back to [N, C, H, W]."""
    x = call.x
    channels = call.shape[-3]
    window = x[-2].shape[1] // channels
    blocks = x[-2].reshape(len(x[-2]), channels, window)
    leaders = np.repeat(blocks[:, :, :1], window, axis=2).reshape(len(x[-2]), -1)
    call.unite(leaders, x[-2], "the window of a channel lives or dies with it")
    call.fix(x[-1], "it mixes a dimension that holds channels")
    return (*x[:-2], blocks[:, :, 0], *(no_atoms(size) for size in call.shape[-2:]))


@rule("grid_sampler grid_sampler_2d grid_sampler_3d")
def grid_sampler(call: Call) -> Results:
    """x [N, C, ...] at the positions of a grid [N, ..., 2]."""
    x, grid = call.of("input"), call.of("grid")
    for dim in (*x[2:], *grid[1:]):
        call.fix(dim, "positions are read along a dimension that holds channels")
    batch = call.unite(x[0], grid[0], "the other operand's batches are not prunable")
    return (batch, x[1], *(no_atoms(size) for size in call.shape[2:]))


@rule("roi_align roi_pool")
def roi_align(call: Call) -> Results:
    """Windows of x [N, C, H, W] at boxes [K, 5]: [K, C, h, w]."""
    x, rois = call.of("input"), call.of("rois")
    for dim in (x[0], *x[2:], *rois):
        call.fix(dim, "boxes are read along a dimension that holds channels")
    result = (no_atoms(call.shape[0]), x[1], *(no_atoms(size) for size in call.shape[2:]))
    return [result] * len(call.shapes) if len(call.shapes) > 1 else result


@rule("deform_conv2d")
def deformable_convolution(call: Call) -> Results:
    """x [N, C_in, H, W] with weight [C_out, C_in, ...] at offsets; only without groups."""
    arguments = call.arguments
    weight, offsets = call.of("weight"), [call.of(name) for name in ("offset", "mask") if call.given(name)]
    x = call.of("input")
    for dims in (*offsets, (x[0], *x[2:], *weight[2:])):
        for dim in dims:
            call.fix(dim, "it reads a dimension that holds channels by offsets")
    if arguments.get("groups", 1) != 1 or arguments.get("offset_groups", 1) != 1:
        return refuse(call, "a deformable convolution in groups")
    call.unite(weight[1], x[1], INPUT)
    call.role("weight", 0, "producer")
    call.role("weight", 1, "consumer")
    if call.given("bias"):
        call.unite(call.of("bias")[0], weight[0], "its bias is not prunable")
    return (x[0], weight[0], *(no_atoms(size) for size in call.shape[2:]))
