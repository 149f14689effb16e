"""The same elements under other dimensions: views, permutations, concatenation, splits."""

from __future__ import annotations

from math import prod

import numpy as np

from edgeprune.graph.atoms import concatenated, is_free, merged, no_atoms
from edgeprune.graph.rules.call import Call, Dims, Results, rule, unknown
from edgeprune.graph.rules.elementwise import NOT_BOTH
from edgeprune.graph.structure import Indices


@rule("permute transpose t swapaxes movedim numpy_T mT swapdims moveaxis")
def permutation(call: Call) -> Results:
    """Dimensions in another order."""
    x = call.x
    if call.operator in ("movedim", "moveaxis"):
        return _moved(call)
    order = call.arguments.get("dims")
    if order is None:
        order = list(range(len(x)))
        if len(x) < 2:
            return x
        if call.operator == "numpy_T":
            return x[::-1]
        first, second = (0, 1) if call.operator == "t" else (-2, -1)
        a = call.arguments.get("dim0", call.arguments.get("axis0", first))
        b = call.arguments.get("dim1", call.arguments.get("axis1", second))
        order[a], order[b] = order[b], order[a]
    return tuple(x[i] for i in order)


def _moved(call: Call) -> Dims:
    x = call.x
    source, target = call.arguments["source"], call.arguments["destination"]
    sources = [i % len(x) for i in ([source] if isinstance(source, int) else source)]
    targets = [i % len(x) for i in ([target] if isinstance(target, int) else target)]
    order = [i for i in range(len(x)) if i not in sources]
    for goal, origin in sorted(zip(targets, sources, strict=True)):
        order.insert(goal, origin)
    return tuple(x[i] for i in order)


@rule("view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as ravel")
def reshape(call: Call) -> Results:
    """The same elements in the same order under other dimensions.

    Old and new dimensions are matched in runs of equal size. Within a run the old dimensions are merged, which makes
    an index live if it does in each of them, and the result is divided among the new ones.
    """
    if call.operator == "view" and prod(d.shape[1] for d in call.x) != prod(call.shape):
        return unknown(call)  # view as another dtype
    x = call.x
    result: list[Indices] = [no_atoms(size) for size in call.shape]
    for old, new in _runs([dim.shape[1] for dim in x], list(call.shape)):
        if all(is_free(x[i]) for i in old):
            continue
        if not new:
            for i in old:
                call.fix(x[i], "the dimension of its only channel goes away")
        elif len(old) == 1 and len(new) == 1:
            result[new[0]] = x[old[0]]
        else:
            whole = merged([x[i] for i in old])
            shape = tuple(call.shape[j] for j in new)
            reason = call.refusal("it mixes a dimension that holds channels with others")
            if len(new) == 1:
                result[new[0]] = whole
                continue
            for j, dim in zip(new, call.atoms.divided(whole, shape, reason), strict=True):
                result[j] = dim
    if call.operator in ("view_as", "reshape_as"):
        sizes = call.of("other")
        result = [call.unite(a, b, NOT_BOTH) for a, b in zip(result, sizes, strict=True)]
    return tuple(result)


def _runs(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal size into the shortest runs of dimensions with equal products."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(a), j + len(b)
        while prod(old[k] for k in a) != prod(new[k] for k in b):
            if prod(old[k] for k in a) < prod(new[k] for k in b):
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        runs.append((a, b))
    return runs


@rule("cat concat concatenate")
def concatenate(call: Call) -> Results:
    """Inputs side by side along one dimension; tied along every other."""
    parts = [call.dims[tensor] for tensor in call.arguments["tensors"]]
    parts = [part for part in parts if len(part) == len(call.shape)]  # torch skips old-style empty tensors
    axis = int(call.arguments.get("dim", 0)) % len(call.shape)
    result = list(parts[0])
    for part in parts[1:]:
        for i, dim in enumerate(part):
            if i != axis:
                result[i] = call.unite(result[i], dim, NOT_BOTH)
    result[axis] = concatenated([part[axis] for part in parts])
    return tuple(result)


@rule("stack")
def stack(call: Call) -> Results:
    """Inputs side by side along a new dimension; tied along every other."""
    parts = [call.dims[tensor] for tensor in call.arguments["tensors"]]
    axis = int(call.arguments.get("dim", 0)) % len(call.shape)
    result = list(parts[0])
    for part in parts[1:]:
        result = [call.unite(a, b, NOT_BOTH) for a, b in zip(result, part, strict=True)]
    result.insert(axis, no_atoms(len(parts)))
    return tuple(result)


@rule("split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk split_copy unbind_copy")
def split(call: Call) -> Results:
    """Consecutive parts of one dimension.

    `chunk` and `split` by one size make parts of equal width, which must stay so: their channels are tied in turn.
    """
    x = call.x
    axis = int(call.arguments.get("dim", 0)) % len(x)
    if call.operator.startswith("unbind"):
        call.fix(x[axis], "it takes its channels apart one by one")
        rest = tuple(dim for i, dim in enumerate(x) if i != axis)
        return [rest for _ in call.shapes]
    sizes = [shape[axis] for shape in call.shapes]
    ends = np.cumsum(sizes)
    parts = [x[axis][:, end - size : end] for size, end in zip(sizes, ends, strict=True)]
    if call.operator == "tensor_split" and "sections" not in call.arguments:
        call.fix(x[axis], "it splits a dimension that holds channels at given places")
        return [tuple(part if i == axis else dim for i, dim in enumerate(x)) for part in parts]
    by_sizes = call.operator == "split_with_sizes" or "split_sizes" in call.arguments
    if not by_sizes and not is_free(x[axis]):
        if len(set(sizes)) > 1:
            call.fix(x[axis], "it splits a dimension that holds channels into unequal parts")
        else:
            for part in parts[1:]:
                call.unite(parts[0], part, "its parts have equal widths")
    return [tuple(part if i == axis else dim for i, dim in enumerate(x)) for part in parts]


@rule("expand broadcast_to")
def expand(call: Call) -> Results:
    """Dimensions of size 1 stretch."""
    x = call.x
    shift = len(call.shape) - len(x)
    result = [no_atoms(size) for size in call.shape]
    for i, dim in enumerate(x):
        if dim.shape[1] == call.shape[shift + i]:
            result[shift + i] = dim
        else:
            call.fix(dim, "a single channel is stretched over many")
    return tuple(result)


@rule("repeat tile")
def repeat(call: Call) -> Results:
    """The whole tensor, several times along each dimension."""
    x = [no_atoms(1)] * (len(call.shape) - len(call.x)) + list(call.x)
    return tuple(np.tile(dim, size // dim.shape[1]) for dim, size in zip(x, call.shape, strict=True))


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Results:
    """Every index of one dimension, several times in a row."""
    x = list(call.x)
    axis, times = call.arguments.get("dim"), call.arguments.get("repeats")
    if axis is None or not isinstance(times, int):
        return unknown(call)
    x[axis] = np.repeat(x[axis], times, axis=1)
    return tuple(x)


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Results:
    """[.., C r r, H, W] to [.., C, H r, W r]: the r x r channels that become one live or die together."""
    x, factor = call.x, int(call.arguments["upscale_factor"])
    channels = x[-3]
    blocks = channels.reshape(len(channels), -1, factor * factor)
    leaders = np.repeat(blocks[:, :, :1], factor * factor, axis=2).reshape(len(channels), -1)
    call.unite(leaders, channels, "these channels become positions of one")
    for position in x[-2:]:
        call.fix(position, "it mixes a dimension that holds channels with others")
    return (*x[:-3], blocks[:, :, 0], no_atoms(call.shape[-2]), no_atoms(call.shape[-1]))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Results:
    """[.., C, H r, W r] to [.., C r r, H, W]."""
    x, factor = call.x, int(call.arguments["downscale_factor"])
    for position in x[-2:]:
        call.fix(position, "it mixes a dimension that holds channels with others")
    return (*x[:-3], np.repeat(x[-3], factor * factor, axis=1), no_atoms(call.shape[-2]), no_atoms(call.shape[-1]))


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(call: Call) -> Results:
    """[N, (g c), ...] to [N, (c g), ...]."""
    x, groups = list(call.x), int(call.arguments["groups"])
    outer, inner = call.atoms.divided(x[1], (groups, x[1].shape[1] // groups), call.refusal("it shuffles channels"))
    call.fix(outer, "it shuffles a given number of groups")
    x[1] = merged([inner, outer])
    return tuple(x)


@rule("meshgrid")
def meshgrid(call: Call) -> Results:
    """One-dimensional tensors spread over a grid."""
    return unknown(call)
