"""Operators that sum up, average or normalise along dimensions."""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.graph.atoms import is_free, no_atoms
from edgeprune.graph.program import operator_name
from edgeprune.graph.rules.call import Call, Results, rule

REDUCES = {
    "mean": "it averages over a dimension that holds channels",
    "sum": "it sums over a dimension that holds channels",
}


@rule(
    "mean sum amax amin max min prod var std var_mean std_mean argmax argmin all any norm linalg_vector_norm logsumexp "
    "median nanmean count_nonzero aminmax"
)
def reduce(call: Call) -> Results:
    """Some dimensions become one number: refused where they hold channels, but for the statistics of a norm."""
    if call.operator in ("max", "min") and len(call.tensors) == 2:
        from edgeprune.graph.rules.elementwise import broadcast

        both: Results = broadcast(call)
        return both
    x = call.x
    axes = call.arguments.get("dim")
    axes = [axes] if isinstance(axes, int) else axes
    over = {axis % len(x) for axis in axes} if axes is not None and (axes or len(x)) else set(range(len(x)))
    over = over or set(range(len(x)))
    reason = REDUCES.get(call.operator, "it reduces a dimension that holds channels")
    for axis in over:
        if not is_free(x[axis]) and call.operator == "mean" and call.is_data and is_statistic(call.tensors[0]):
            call.atoms.statistics.append(x[axis])
        else:
            call.fix(x[axis], reason)
    keeps = bool(call.arguments.get("keepdim")) and len(call.shape) == len(x)
    kept = [no_atoms(1) if i in over else dim for i, dim in enumerate(x) if keeps or i not in over]
    outputs = [tuple(kept) if len(kept) == len(shape) else tuple(map(no_atoms, shape)) for shape in call.shapes]
    return outputs if len(outputs) != 1 else outputs[0]


def is_statistic(source: torch.fx.Node) -> bool:
    """Whether the mean of this tensor is a norm's: of squares (RMS norm), or one that is only subtracted from it."""
    name = operator_name(source)
    means = [user for user in source.users if operator_name(user) == "mean"]
    if name in ("pow", "square", "mul"):
        squares = name == "square" or (source.args[0] is source.args[1] if name == "mul" else source.args[1] == 2)
        return bool(squares) and all(_normalises(mean, source.args[0], rooted=False) for mean in means)
    return bool(means) and all(
        operator_name(user) == "sub" and user.args[0] is source for mean in means for user in mean.users
    )


_CASTS = ("to", "_to_copy", "type_as", "float", "alias", "clone", "contiguous")
_ON_THE_WAY = (*_CASTS, "add", "clamp", "clamp_min", "maximum", "expand", "reciprocal", "unsqueeze")


def _normalises(statistic: torch.fx.Node, base: Any, *, rooted: bool) -> bool:
    """Whether all that is done with this mean of squares is to scale what was squared by (a part of) its root."""
    for user in statistic.users:
        name = operator_name(user)
        if name in ("sqrt", "rsqrt", "pow"):
            if not _normalises(user, base, rooted=True):
                return False
        elif name in ("mul", "div") and len(user.all_input_nodes) == 2:
            if not rooted or not _from(next(n for n in user.all_input_nodes if n is not statistic), base):
                return False
        elif name in ("mul", "div", *_ON_THE_WAY):
            if not _normalises(user, base, rooted=rooted):
                return False
        else:
            return False
    return True


def _from(node: Any, base: Any) -> bool:
    """Whether a tensor is the one that was squared, computed again, cast, or scaled."""
    base = _uncast(base)
    node = _uncast(node)
    same = node is base or (node.target is base.target and node.args == base.args and node.kwargs == base.kwargs)
    return same or (operator_name(node) == "mul" and any(_from(source, base) for source in node.all_input_nodes))


def _uncast(node: Any) -> Any:
    while operator_name(node) in _CASTS:
        node = node.args[0]
    return node


@rule("softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp sort argsort")
def along(call: Call) -> Results:
    """Works along one dimension, which must not hold channels."""
    x = call.x
    axis = int(call.arguments.get("dim", -1))
    call.fix(x[axis], "it works along a dimension that holds channels")
    result = tuple(no_atoms(d.shape[1]) if i == axis % len(x) else d for i, d in enumerate(x))
    return [result] * len(call.shapes) if len(call.shapes) > 1 else result


@rule("glu")
def glu(call: Call) -> Results:
    """a * sigmoid(b) with a and b the halves of one dimension."""
    x = list(call.x)
    axis = int(call.arguments.get("dim", -1)) % len(x)
    half = x[axis].shape[1] // 2
    x[axis] = call.unite(x[axis][:, :half], x[axis][:, half:], "its halves are multiplied")
    return tuple(x)


@rule("topk")
def topk(call: Call) -> Results:
    """The largest entries along one dimension, whose order is unknown."""
    x = call.x
    axis = int(call.arguments.get("dim", -1)) % len(x)
    call.fix(x[axis], "it works along a dimension that holds channels")
    result = tuple(no_atoms(call.shape[i]) if i == axis else dim for i, dim in enumerate(x))
    return [result, result]
