"""How each ATen operator carries channels from its inputs to its output: one function a rule, one table.

A rule gets the call and returns, for every dimension of the output, which atom each index comes from. What it can't
prove it fixes, with the reason. Adding an operator is adding one function under its ATen name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from edgeprune.graph.atoms import FREE, Atoms, no_atoms
from edgeprune.graph.structure import Indices, Refusal

Dims = tuple[Indices, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator call: `arguments` by name, with tensors as fx nodes; `dims` of every node seen so far."""

    operator: str
    where: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    tensors: tuple[torch.fx.Node, ...]
    dims: Mapping[torch.fx.Node, Dims]
    parameters: Mapping[torch.fx.Node, str]
    atoms: Atoms

    def refusal(self, reason: str) -> Refusal:
        """A refusal at this operator's place."""
        return Refusal(operator=self.operator, where=self.where, reason=reason)

    def of(self, name: str) -> Dims:
        """Dimensions of the tensor argument of that name."""
        return self.dims[self.arguments[name]]

    def role(self, name: str, dim: int, role: str) -> None:
        """State what a parameter's dimension is to this contraction, if the argument is a parameter."""
        parameter = self.parameters.get(self.arguments[name])
        if parameter is not None:
            self.atoms.roles.setdefault((parameter, dim), role)


Rule = Callable[[Call], Dims]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under ATen operator names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def unknown(call: Call) -> Dims:
    """What happens without a rule: whatever the operator touches stays whole."""
    return _refuse_inputs(call, f"operator '{call.operator}' has no coupling rule")


def _refuse_inputs(call: Call, reason: str) -> Dims:
    for tensor in call.tensors:
        for dim in call.dims.get(tensor, ()):
            call.atoms.fix(dim, call.refusal(reason))
    return tuple(no_atoms(size) for size in call.shape)


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Dims:
    """x [N, C_in, ...] with weight [C_out, C_in / g, ...]. With g > 1 a whole convolution group lives or dies."""
    atoms, x, weight, groups = call.atoms, call.of("input"), call.of("weight"), call.arguments["groups"]
    if len(x) != len(weight):
        return _refuse_inputs(call, "its input has no batch dimension")
    for spatial in x[2:]:
        atoms.fix(spatial, call.refusal("the convolution slides along a dimension that holds channels"))
    if groups == 1:
        atoms.unite(weight[1], x[1], call.refusal("its input channels are not prunable"))
        call.role("weight", 0, "producer")
        call.role("weight", 1, "consumer")
    else:
        _tie_convolution_groups(call, x[1], weight[0], groups)
        atoms.fix(weight[1], call.refusal("inside a grouped convolution only whole groups are removed"))
    if call.arguments.get("bias") is not None:
        atoms.unite(call.of("bias")[0], weight[0], call.refusal("its bias is not prunable"))
    return (x[0], weight[0], *(no_atoms(size) for size in call.shape[2:]))


def _tie_convolution_groups(call: Call, c_in: Indices, c_out: Indices, groups: int) -> None:
    """Input slice k and output slice k of a grouped convolution become one channel."""
    per_in, per_out = len(c_in) // groups, len(c_out) // groups
    reason = call.refusal("the input of its grouped convolution is not prunable")
    for k in range(groups):
        source, result = c_in[k * per_in : (k + 1) * per_in], c_out[k * per_out : (k + 1) * per_out]
        if (source == FREE).any():
            call.atoms.fix(np.concatenate([source, result]), reason)
        else:
            call.atoms.tie(np.concatenate([source, result]))


@rule("linear")
def linear(call: Call) -> Dims:
    """x [..., C_in] with weight [C_out, C_in]."""
    x, weight = call.of("input"), call.of("weight")
    call.atoms.unite(weight[1], x[-1], call.refusal("its input features are not prunable"))
    call.role("weight", 0, "producer")
    call.role("weight", 1, "consumer")
    if call.arguments.get("bias") is not None:
        call.atoms.unite(call.of("bias")[0], weight[0], call.refusal("its bias is not prunable"))
    return (*x[:-1], weight[0])


@rule("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> Dims:
    """Per-channel scale and shift over dimension 1 (evaluation mode)."""
    x = call.of("input")
    if call.arguments.get("training"):
        return _refuse_inputs(call, "batch norm uses the statistics of the batch")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is not None:
            call.atoms.unite(call.of(name)[0], x[1], call.refusal("its batch norm is not prunable"))
    return x


@rule(
    *"relu relu6 hardtanh hardswish hardsigmoid silu sigmoid tanh gelu elu leaky_relu softplus mish clamp clamp_min "
    "clamp_max neg exp log sqrt rsqrt abs pow square dropout feature_dropout alpha_dropout clone contiguous detach "
    "alias to _to_copy getitem lift_fresh_copy hardshrink softsign log_sigmoid selu celu zeros_like ones_like".split()
)
def pointwise(call: Call) -> Dims:
    """Acts on every element alone."""
    x = call.dims[call.tensors[0]]
    if len(call.tensors) > 1 or tuple(len(dim) for dim in x) != call.shape:
        return unknown(call)
    return x


@rule("add", "sub", "mul", "div", "maximum", "minimum", "rsub")
def broadcast(call: Call) -> Dims:
    """Two tensors (or a tensor and a number), element by element; dimensions of size 1 stretch."""
    result: list[Indices | None] = [None] * len(call.shape)
    for tensor in call.tensors:
        dims = call.dims[tensor]
        shift = len(result) - len(dims)
        for i, dim in enumerate(dims, start=shift):
            known = result[i]
            if len(dim) != call.shape[i]:
                call.atoms.fix(dim, call.refusal("a single channel is stretched over many"))
            elif known is None:
                result[i] = dim
            else:
                result[i] = call.atoms.unite(known, dim, call.refusal(NOT_BOTH))
    return tuple(no_atoms(size) if dim is None else dim for size, dim in zip(call.shape, result, strict=True))


NOT_BOTH = "the other operand can't be pruned along this dimension"


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d")
def pooling(call: Call) -> Dims:
    """Windows over the last one to three dimensions."""
    x = call.dims[call.tensors[0]]
    rank = int(call.operator[-2])
    for spatial in x[-rank:]:
        call.atoms.fix(spatial, call.refusal("pooling mixes a dimension that holds channels"))
    return (*x[:-rank], *(no_atoms(size) for size in call.shape[-rank:]))


@rule("mean")
def mean(call: Call) -> Dims:
    """Average over some dimensions: refused where one of them holds channels, since the divisor would change."""
    x = call.dims[call.tensors[0]]
    axes = call.arguments.get("dim")
    over = {axis % len(x) for axis in axes} if axes else set(range(len(x)))
    for axis in over:
        call.atoms.fix(x[axis], call.refusal("it averages over a dimension that holds channels"))
    if call.arguments.get("keepdim"):
        return tuple(no_atoms(1) if i in over else dim for i, dim in enumerate(x))
    return tuple(dim for i, dim in enumerate(x) if i not in over)


@rule("cat")
def concatenate(call: Call) -> Dims:
    """Inputs side by side along one dimension; tied along every other."""
    parts = [call.dims[tensor] for tensor in call.arguments["tensors"]]
    if any(len(part) != len(call.shape) for part in parts):
        return unknown(call)  # torch skips old-style empty tensors
    axis = call.arguments.get("dim", 0) % len(call.shape)
    result = list(parts[0])
    for part in parts[1:]:
        for i, dim in enumerate(part):
            if i != axis:
                result[i] = call.atoms.unite(result[i], dim, call.refusal(NOT_BOTH))
    result[axis] = np.concatenate([part[axis] for part in parts])
    return tuple(result)


@rule("softmax", "_softmax", "log_softmax")
def softmax(call: Call) -> Dims:
    """Normalises along one dimension, which must not hold channels."""
    x = call.dims[call.tensors[0]]
    call.atoms.fix(x[call.arguments["dim"]], call.refusal("it normalises over a dimension that holds channels"))
    return x


@rule("permute", "transpose", "t")
def permutation(call: Call) -> Dims:
    """Dimensions in another order."""
    x = call.dims[call.tensors[0]]
    order = call.arguments.get("dims")
    if order is None:
        order = list(range(len(x)))
        if len(x) < 2:
            return x
        a, b = call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)
        order[a], order[b] = order[b], order[a]
    return tuple(x[i] for i in order)


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")
def reshape(call: Call) -> Dims:
    """The same elements in the same order under other dimensions.

    Old and new dimensions are matched in runs of equal size. A run in which one dimension holds channels is proven
    when the new labels vary along one new dimension only; any other is fixed.
    """
    x = call.dims[call.tensors[0]]
    result = [no_atoms(size) for size in call.shape]
    for old, new in _runs([len(dim) for dim in x], list(call.shape)):
        holding = [i for i in old if (x[i] != FREE).any()]
        if not holding:
            continue
        target = _carry(x, old, new, holding, call.shape) if len(holding) == 1 else None
        if target is None:
            for i in holding:
                call.atoms.fix(x[i], call.refusal("it splits or mixes a dimension that holds channels"))
        else:
            result[target[0]] = target[1]
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


def _carry(
    x: Dims, old: list[int], new: list[int], holding: list[int], shape: tuple[int, ...]
) -> tuple[int, Indices] | None:
    """The new dimension that carries the channels of `holding[0]`, with its atoms; None if there is no single one."""
    position = old.index(holding[0])
    sizes = [len(x[i]) for i in old]
    view = [1] * len(sizes)
    view[position] = sizes[position]
    labels = np.broadcast_to(x[holding[0]].reshape(view), sizes).reshape([shape[j] for j in new])
    for axis, j in enumerate(new):
        along = np.moveaxis(labels, axis, 0).reshape(shape[j], -1)
        if (along == along[:, :1]).all():
            return j, along[:, 0].copy()
    return None


@rule("slice", "expand", "select")
def whole_only(call: Call) -> Dims:
    """Allowed along dimensions without channels, and where it keeps a dimension whole."""
    x = call.dims[call.tensors[0]]
    if call.operator == "select":
        axis = call.arguments["dim"] % len(x)
        call.atoms.fix(x[axis], call.refusal("it picks single channels by number"))
        return tuple(dim for i, dim in enumerate(x) if i != axis)
    shift = len(call.shape) - len(x)
    result = [no_atoms(size) for size in call.shape]
    for i, dim in enumerate(x):
        if len(dim) == call.shape[shift + i]:
            result[shift + i] = dim
        else:
            call.atoms.fix(dim, call.refusal("it cuts or stretches a dimension that holds channels"))
    return tuple(result)
