"""Operators that pick indices by number."""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.graph.atoms import concatenated, is_free, no_atoms
from edgeprune.graph.rules.call import Call, Results, refuse, rule, unknown

PICKS = "it picks channels by number"


@rule("select select_copy")
def select(call: Call) -> Results:
    """One index of a dimension."""
    x = call.x
    axis = int(call.arguments["dim"]) % len(x)
    call.fix(x[axis], PICKS)
    return tuple(dim for i, dim in enumerate(x) if i != axis)


@rule("slice slice_copy narrow")
def cut(call: Call) -> Results:
    """From one index to another; every n-th of them only where there are no channels."""
    x = list(call.x)
    axis = int(call.arguments.get("dim", 0)) % len(x)
    size = x[axis].shape[1]
    if call.operator == "narrow":
        start, step = int(call.arguments["start"]) % size, 1
        end = start + int(call.arguments["length"])
    else:
        start, end, step = bounds(call.arguments, size)
    if step != 1:
        call.fix(x[axis], PICKS)
    x[axis] = x[axis][:, start:end:step]
    return tuple(x)


def bounds(arguments: Any, size: int) -> tuple[int, int, int]:
    """Start, end and step of a slice of a dimension of that size, as Python counts."""
    return slice(arguments.get("start"), arguments.get("end"), arguments.get("step") or 1).indices(size)


@rule("slice_scatter select_scatter")
def scatter(call: Call) -> Results:
    """A tensor with a part of it replaced by another one."""
    x, source = list(call.x), list(call.dims[call.tensors[-1]])
    axis = int(call.arguments.get("dim", 0)) % len(x)
    if call.operator == "select_scatter":
        source.insert(axis, no_atoms(1))
    if source[axis].shape[1] != x[axis].shape[1]:
        call.fix(source[axis], PICKS)
        call.fix(x[axis], PICKS)
        source[axis] = x[axis]
    return tuple(call.unite(a, b, "a part of it is replaced") for a, b in zip(x, source, strict=True))


@rule("index index_copy index_put _unsafe_index")
def index(call: Call) -> Results:
    """Dimensions replaced by tensors of positions; those must not hold channels."""
    if call.operator not in ("index", "_unsafe_index"):
        return refuse(call, "it writes to positions")
    x, picks = call.x, list(call.arguments["indices"])
    picked = [i for i, pick in enumerate(picks) if pick is not None]
    for i in picked:
        for dim in call.dims[picks[i]]:
            call.fix(dim, "channels serve as positions")
    masks = any(picks[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in picked)
    if masks or picked != list(range(picked[0], picked[-1] + 1)):
        return refuse(call, PICKS)
    for i in picked:
        call.fix(x[i], PICKS)
    rest = len(x) - len(picked)
    middle = tuple(no_atoms(size) for size in call.shape[picked[0] : len(call.shape) - rest + picked[0]])
    return (*x[: picked[0]], *middle, *x[picked[-1] + 1 :])


@rule("index_select")
def index_select(call: Call) -> Results:
    """Indices of one dimension in a given order."""
    x = list(call.x)
    axis = int(call.arguments["dim"]) % len(x)
    for dim in call.of("index"):
        call.fix(dim, "channels serve as positions")
    call.fix(x[axis], PICKS)
    x[axis] = no_atoms(call.shape[axis])
    return tuple(x)


@rule("gather take_along_dim")
def gather(call: Call) -> Results:
    """Along one dimension each element picks its own position."""
    x = list(call.x)
    axis = call.arguments.get("dim")
    if axis is None:
        return unknown(call)
    axis = int(axis) % len(x)
    if call.operator == "take_along_dim" and (
        tuple(dim.shape[1] for dim in call.of("indices")) != call.shape
        or any(dim.shape[1] != call.shape[i] for i, dim in enumerate(x) if i != axis)
    ):
        return refuse(call, "its positions are stretched over a dimension")
    for i, dim in enumerate(call.of("indices" if "indices" in call.arguments else "index")):
        if i == axis:
            call.fix(dim, PICKS)
        elif dim.shape[1] == x[i].shape[1]:
            x[i] = call.unite(x[i], dim, "its positions are not prunable along this dimension")
        else:
            call.fix(x[i], PICKS)
            x[i] = dim
    call.fix(x[axis], PICKS)
    x[axis] = no_atoms(call.shape[axis])
    return tuple(x)


@rule("flip")
def flip(call: Call) -> Results:
    """Dimensions back to front."""
    x = list(call.x)
    for axis in call.arguments["dims"]:
        x[axis] = x[axis][:, ::-1]
    return tuple(x)


@rule("roll")
def roll(call: Call) -> Results:
    """Positions moved around in a circle; channels stay where they are."""
    x = call.x
    dims = call.arguments.get("dims")
    for axis in dims if dims else range(len(x)):
        call.fix(x[axis], "it moves channels by a number of places")
    return tuple(x)


@rule("tril triu")
def triangle(call: Call) -> Results:
    """Zeros above or below the diagonal of the last two dimensions."""
    for dim in call.x[-2:]:
        call.fix(dim, "it compares the positions of channels")
    return call.x


@rule("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d")
@rule("replication_pad3d _pad_circular")
def pad(call: Call) -> Results:
    """More indices before and behind, from the last dimension on; new ones are no channels."""
    x = list(call.x)
    amounts = list(call.arguments.get("pad", call.arguments.get("padding")))
    constant = call.operator == "constant_pad_nd" or call.arguments.get("mode", "") == "constant"
    for i in range(len(amounts) // 2):
        before, behind = amounts[2 * i : 2 * i + 2]
        axis = len(x) - 1 - i
        if before == behind == 0:
            continue
        if is_free(x[axis]):
            x[axis] = no_atoms(call.shape[axis])
        elif constant and before >= 0 and behind >= 0:
            x[axis] = concatenated([no_atoms(before), x[axis], no_atoms(behind)])
        else:
            call.fix(x[axis], "it pads channels by other channels")
            x[axis] = no_atoms(call.shape[axis])
    return tuple(x)


@rule("one_hot bincount nonzero masked_select _unique2 bucketize searchsorted")
def values(call: Call) -> Results:
    """Shapes or contents that depend on values."""
    return refuse(call, "its result depends on values")
