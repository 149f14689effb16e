"""Convolutions, linears and matrix products: sums over channels, in which a channel that is zero adds nothing."""

from __future__ import annotations

import numpy as np

from edgeprune.graph.atoms import is_free, merged, no_atoms
from edgeprune.graph.rules.call import Call, Dims, Results, refuse, rule, unknown
from edgeprune.graph.structure import Indices

INPUT = "its input channels are not prunable"
BIAS = "its bias is not prunable"
PARAMETERS = "it computes a parameter from a sum over this dimension"
BATCHES = "the other operand's batches are not prunable"


@rule("conv1d conv2d conv3d")
def convolution(call: Call) -> Results:
    """x [N, C_in, ...] with weight [C_out, C_in / g, ...]; with g > 1 C_in and C_out are products group x channel."""
    x, weight, groups = call.of("input"), call.of("weight"), int(call.arguments["groups"])
    if len(x) != len(weight):
        return refuse(call, "its input has no batch dimension")
    c_out = _contract(call, x[1], weight[1], weight[0], groups)
    call.role("weight", 0, "producer")
    return _convolved(call, x, c_out)


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def transposed_convolution(call: Call) -> Results:
    """x [N, C_in, ...] with weight [C_in, C_out / g, ...]."""
    x, weight, groups = call.of("input"), call.of("weight"), int(call.arguments["groups"])
    if len(x) != len(weight):
        return refuse(call, "its input has no batch dimension")
    if groups == 1:
        call.unite(weight[0], x[1], INPUT)
        c_out = weight[1]
    else:
        kinds = call.atoms.new(groups)
        c_in = merged([kinds, call.atoms.new(x[1].shape[1] // groups)])
        call.unite(c_in, x[1], INPUT)
        call.unite(c_in, weight[0], INPUT)
        c_out = merged([kinds, weight[1]])
    call.role("weight", 1, "producer")
    call.role("weight", 0, "consumer")
    return _convolved(call, x, c_out)


def _contract(call: Call, c_in: Indices, per_group: Indices, c_out: Indices, groups: int) -> Indices:
    if groups == 1:
        call.role("weight", 1, "consumer")
        call.unite(per_group, c_in, INPUT)
        return c_out
    width_in, width_out = c_in.shape[1] // groups, c_out.shape[1] // groups
    if width_in == width_out == 1:  # depthwise
        call.fix(per_group, "a depthwise filter has one input channel")
        return call.unite(c_out, c_in, "the input of its depthwise convolution is not prunable")
    kinds = call.atoms.new(groups)
    if width_in == 1:
        call.unite(kinds, c_in, "the input of its grouped convolution is not prunable")
    else:
        call.role("weight", 1, "consumer")
        call.unite(merged([kinds, per_group]), c_in, "the input of its grouped convolution is not prunable")
    product = merged([kinds, call.atoms.new(width_out)])
    return call.unite(c_out, product, "the output of its grouped convolution is not prunable")


def _convolved(call: Call, x: Dims, c_out: Indices) -> Dims:
    for spatial in x[2:]:
        call.fix(spatial, "the convolution slides along a dimension that holds channels")
    for position in call.of("weight")[2:]:
        call.fix(position, "the positions of its kernel hold channels")
    if call.given("bias"):
        c_out = call.unite(call.of("bias")[0], c_out, BIAS)
    return (x[0], c_out, *(no_atoms(size) for size in call.shape[2:]))


@rule("linear")
def linear(call: Call) -> Results:
    """x [..., C_in] with weight [C_out, C_in]."""
    x, weight = call.of("input"), call.of("weight")
    if len(weight) != 2:
        return unknown(call)
    call.unite(weight[1], x[-1], "its input features are not prunable")
    call.role("weight", 0, "producer")
    call.role("weight", 1, "consumer")
    if call.given("bias"):
        call.unite(call.of("bias")[0], weight[0], BIAS)
    return (*x[:-1], weight[0])


@rule("matmul mm bmm mv dot")
def matmul(call: Call) -> Results:
    """a [..., n, m] times b [..., m, p], with batches broadcast; vectors as in `torch.matmul`."""
    a, b = (call.dims[tensor] for tensor in (call.tensors * 2)[:2])
    _mark(call, a, b)
    return product(call, a, b)


def product(call: Call, a: Dims, b: Dims) -> Dims:
    """Dimensions of a @ b; ties what is summed over."""
    inner = b[-2] if len(b) > 1 else b[0]
    if not call.is_data:
        call.fix(a[-1], PARAMETERS)
        call.fix(inner, PARAMETERS)
    call.unite(a[-1], inner, "the other operand's features are not prunable")
    batches = broadcast_dims(call, a[:-2], b[:-2])
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return (*batches, *rows, *columns)


def broadcast_dims(call: Call, a: Dims, b: Dims) -> Dims:
    """Batch dimensions of two operands, aligned at the last."""
    rank = max(len(a), len(b))
    result = []
    for i in range(-rank, 0):
        left, right = a[i] if -i <= len(a) else None, b[i] if -i <= len(b) else None
        if left is None or right is None:
            result.append(left if right is None else right)
        elif left.shape[1] != right.shape[1]:
            small, wide = sorted((left, right), key=lambda dim: dim.shape[1])
            call.fix(small, "a single channel is stretched over many")
            result.append(wide)
        else:
            result.append(call.unite(left, right, BATCHES))
    return tuple(dim for dim in result if dim is not None)


def _mark(call: Call, a: Dims, b: Dims) -> None:
    """A parameter that is multiplied is a producer along what it adds, a consumer along what is summed."""
    nodes = (call.tensors * 2)[:2]
    for node, dims, inner in ((nodes[0], a, len(a) - 1), (nodes[1], b, max(0, len(b) - 2))):
        name = call.parameters.get(node)
        if name is not None:
            for dim in range(len(dims)):
                call.atoms.roles.setdefault((name, dim), "consumer" if dim == inner else "producer")


@rule("addmm baddbmm")
def add_product(call: Call) -> Results:
    """bias + a @ b."""
    name = "mat" if call.operator == "addmm" else "batch"
    a, b = call.of(f"{name}1"), call.of(f"{name}2")
    first = call.parameters.get(call.arguments[f"{name}2"])
    if first is not None:
        call.atoms.roles.setdefault((first, len(b) - 1), "producer")
        call.atoms.roles.setdefault((first, len(b) - 2), "consumer")
    result = product(call, a, b)
    bias = call.of("self" if "self" in call.arguments else "input")
    return tuple(
        dim if i >= len(bias) or bias[-1 - i].shape[1] == 1 else call.unite(dim, bias[-1 - i], BIAS)
        for i, dim in enumerate(reversed(result))
    )[::-1]


@rule("einsum")
def einsum(call: Call) -> Results:
    """Every letter is one dimension, tied over all operands; letters that the result lacks are summed over."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    operands = [call.dims[tensor] for tensor in call.arguments["tensors"]]
    if "->" not in equation or "." in equation:
        return unknown(call)
    left, right = equation.split("->")
    letters: dict[str, Indices] = {}
    for names, dims in zip(left.split(","), operands, strict=True):
        if len(set(names)) != len(names):
            return unknown(call)
        for name, dim in zip(names, dims, strict=True):
            known = letters.get(name)
            if known is None or known.shape[1] == 1:
                letters[name] = dim
            elif dim.shape[1] != 1:
                letters[name] = call.unite(known, dim, "the other operand's dimension is not prunable")
    for tensor, names in zip(call.arguments["tensors"], left.split(","), strict=True):
        parameter = call.parameters.get(tensor)
        if parameter is not None:
            for dim, name in enumerate(names):
                call.atoms.roles.setdefault((parameter, dim), "producer" if name in right else "consumer")
    if len(operands) == 1:
        for name in set(left) - set(right):
            call.fix(letters[name], "it sums over a dimension that holds channels")
    return tuple(letters[name] for name in right)


@rule("embedding")
def embedding(call: Call) -> Results:
    """Rows of weight [V, C], picked by the indices' values: V stays."""
    weight, indices = call.of("weight"), call.of("indices")
    call.fix(weight[0], "rows are picked by number")
    call.role("weight", 1, "producer")
    return (*indices, weight[1])


@rule("bilinear")
def bilinear(call: Call) -> Results:
    """x1 [..., A], x2 [..., B] with weight [C, A, B]."""
    weight = call.of("weight")
    call.unite(weight[1], call.of("input1")[-1], INPUT)
    call.unite(weight[2], call.of("input2")[-1], INPUT)
    call.role("weight", 0, "producer")
    if call.given("bias"):
        call.unite(call.of("bias")[0], weight[0], BIAS)
    return (*broadcast_dims(call, call.of("input1")[:-1], call.of("input2")[:-1]), weight[0])


def holds(dims: Dims) -> bool:
    """Whether any dimension has atoms."""
    return any(not is_free(dim) for dim in dims)


def whole_groups(dim: Indices, groups: int) -> Indices:
    """A dimension as its groups: int64 [k, groups, size of a group]."""
    result: Indices = np.reshape(dim, (len(dim), groups, -1))
    return result
