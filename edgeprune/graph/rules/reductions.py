"""Operators that sum up, average or normalise along dimensions."""

from __future__ import annotations

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
    if name in ("pow", "square"):
        return name == "square" or bool(source.args[1] == 2)
    if name == "mul":
        left, right = source.args
        return left is right
    means = [user for user in source.users if operator_name(user) == "mean"]
    return bool(means) and all(
        operator_name(user) == "sub" and user.args[0] is source for mean in means for user in mean.users
    )


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
