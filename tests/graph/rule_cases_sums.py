"""At least one call of every contraction: a sum over channels, in which a channel that is zero adds nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from tests.graph.rule_case import Case, case

aten = torch.ops.aten
sums = partial(case, meaning="sums")


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Channels per convolution group are what the weight says."""
    return F.conv2d(x, weight, groups=x.shape[1] // weight.shape[1])


def grouped_transposed(x: Tensor, weight: Tensor, out: tuple[int, ...] = (1, 6, 2, 2)) -> Tensor:
    return F.conv_transpose2d(x, weight, groups=out[1] // weight.shape[1])


def plain(rank: int) -> list[Case]:
    """Convolutions of one rank, forward and transposed, without groups: x [1, 2, ..], three output channels."""
    positions = " 2" * rank
    free = " ." * rank
    return [
        sums(
            f"conv{rank}d",
            getattr(F, f"conv{rank}d"),
            f"1 2*{positions}; 3* 2*{positions}; 3*",
            f". 2,3,4{free}",
            then=f". 0,1{free} | 2,3,4 0,1{free} | 2,3,4",
        ),
        sums(
            f"conv_transpose{rank}d",
            getattr(F, f"conv_transpose{rank}d"),
            f"1 2*{positions}; 2* 3*{positions}; 3*",
            f". 4,5,6{free}",
            then=f". 0,1{free} | 0,1 4,5,6{free} | 4,5,6",
        ),
    ]


CONVOLUTIONS = [
    *plain(1),
    *plain(2),
    *plain(3),
    sums(
        "conv2d",
        F.conv2d,
        "2* 3 3; 4* 2* 1 1",
        ". . .",
        refused="its input has no batch dimension",
    ),
    sums(
        "conv2d",
        F.conv2d,
        "1 2 2* 2; 3* 2 1 1",
        ". 2,3,4 . .",
        refused="the convolution slides along a dimension that holds channels",
    ),
    sums("conv2d", F.conv2d, "1 2 2 2; 3* 2* 1 1", ". 0,1,2 . .", refused="its input channels are not prunable"),
    sums("conv2d", F.conv2d, "1 2 2 2; 3* 2 1 1; 3", ". 0,1,2 . .", refused="its bias is not prunable"),
    sums(
        "conv2d",
        grouped,
        "1 3* 2 2; 3* 1 1 1",
        ". 0,1,2 . .",
        then=". 0,1,2 . . | 0,1,2 . . .",
    ),
    sums(  # two filters a channel: output = channel x filter
        "conv2d",
        grouped,
        "1 2* 2 2; 4* 1 1 1",
        ". 0+8,0+9,1+8,1+9 . .",
        then=". 0,1 . . | 0+8,0+9,1+8,1+9 . . .",
    ),
    sums(  # two groups of two channels each, three filters a group
        "conv2d",
        grouped,
        "1 4* 2 2; 6* 2* 1 1",
        ". 12+14,12+15,12+16,13+14,13+15,13+16 . .",
        then=". 10+12,11+12,10+13,11+13 . . | 12+14,12+15,12+16,13+14,13+15,13+16 10,11 . .",
    ),
    sums(
        "conv_transpose2d",
        grouped_transposed,
        "1 4* 2 2; 4* 3* 1 1",
        ". 8+11,9+11,10+11,8+12,9+12,10+12 . .",
        then=". 11+13,11+14,12+13,12+14 . . | 11+13,11+14,12+13,12+14 8,9,10 . .",
    ),
    sums(
        "deform_conv2d",
        torchvision.ops.deform_conv2d,
        "1 2* 2 2; 1 2 2 2; 3* 2* 1 1; 3*",
        ". 2,3,4 . .",
        then=". 0,1 . . | . . . . | 2,3,4 0,1 . . | 2,3,4",
    ),
    sums(
        "deform_conv2d",
        torchvision.ops.deform_conv2d,
        "1 4* 2 2; 1 2 2 2; 4* 2* 1 1",
        ". . . .",
        refused="a deformable convolution in groups",
    ),
    case(
        "roi_align",
        lambda x, boxes: torchvision.ops.roi_align(x, [boxes.abs()], 2),
        "1 4* 3 3; 2 4",
        ". 0,1,2,3 . .",
    ),
    case(
        "roi_pool",
        lambda x, boxes: torchvision.ops.roi_pool(x, [boxes.abs()], 2),
        "1 4* 3 3; 2 4",
        ". 0,1,2,3 . .",
    ),
]
PARTNER = "the other operand's features are not prunable"
PRODUCTS = [
    sums("linear", F.linear, "2 3*; 4* 3*; 4*", ". 3,4,5,6", then=". 0,1,2 | 3,4,5,6 0,1,2 | 3,4,5,6"),
    sums("linear", F.linear, "2 3*; 4* 3", ". 3,4,5,6", refused="its input features are not prunable"),
    sums("matmul", torch.matmul, "2 3*; 3* 4*", ". 6,7,8,9", then=". 0,1,2 | 0,1,2 6,7,8,9"),
    sums("matmul", torch.matmul, "2* 2 3; 2* 3 4*", "0,1 . 4,5,6,7", then="0,1 . . | 0,1 . 4,5,6,7"),
    sums("matmul", torch.matmul, "2* 2 3; 2 3 4", "0,1 . .", refused="the other operand's batches are not prunable"),
    sums("matmul", torch.matmul, "2 3*; 3 4*", ". 3,4,5,6", refused=PARTNER),
    sums("matmul", lambda x: x @ x, "3* 3*", "0,1,2 0,1,2", then="0,1,2 0,1,2"),
    sums("matmul", torch.matmul, "3*; 3* 4*", "6,7,8,9"),
    sums("mm", torch.mm, "2 3*; 3* 4*", ". 6,7,8,9"),
    sums("bmm", torch.bmm, "2* 2 3*; 2* 3* 4*", "0,1 . 10,11,12,13"),
    sums("mv", torch.mv, "2* 3*; 3*", "0,1"),
    sums("dot", torch.dot, "3*; 3*", "", then="0,1,2 | 0,1,2"),
    sums("addmm", torch.addmm, "4*; 2 3*; 3* 4*", ". 0,1,2,3", then="0,1,2,3 | . 4,5,6 | 4,5,6 0,1,2,3"),
    sums("baddbmm", torch.baddbmm, "2* 1 4*; 2* 2 3*; 2* 3* 4*", "0,1 . 2,3,4,5"),
    sums(
        "bilinear",
        F.bilinear,
        "1 2*; 1 3*; 4* 2* 3*; 4*",
        ". 5,6,7,8",
        then=". 0,1 | . 2,3,4 | 5,6,7,8 0,1 2,3,4 | 5,6,7,8",
    ),
    case("embedding", F.embedding, "3 long; 4 5*", ". 0,1,2,3,4"),
    case("embedding", F.embedding, "3 long; 4* 5", ". .", refused="rows are picked by number"),
]


def einsum(equation: str, inputs: str, labels: str, **options: Any) -> Case:
    return sums("einsum", lambda *tensors: torch.einsum(equation, *tensors), inputs, labels, **options)


EINSUMS = [
    einsum("bc,dc->bd", "2 3*; 4* 3*", ". 3,4,5,6", then=". 0,1,2 | 3,4,5,6 0,1,2"),
    einsum("bhc, bhd -> bhcd", "1 2* 3*; 1 2* 4*", ". 0,1 2,3,4 7,8,9,10"),
    einsum("bc,c->bc", "2 3*; 1", ". 0,1,2"),
    einsum("bc->cb", "2 3*", "0,1,2 ."),
    einsum("bc->b", "2 3*", ".", refused="it sums over a dimension that holds channels"),
    einsum("ii->i", "3* 3*", ".", refused="operator 'einsum' has no coupling rule"),
    einsum("...c,dc->...d", "2 3*; 4* 3*", ". .", refused="operator 'einsum' has no coupling rule"),
    einsum("bc,dc->bd", "2 3*; 4* 3", ". 3,4,5,6", refused="the other operand's dimension is not prunable"),
]
