"""Operators that act on every element alone, with broadcasting."""

from __future__ import annotations

from edgeprune.graph.atoms import is_free, no_atoms
from edgeprune.graph.rules.call import Call, Results, free, rule, unknown
from edgeprune.graph.sizes import Expression
from edgeprune.graph.structure import Indices

NOT_BOTH = "the other operand can't be pruned along this dimension"


@rule(
    "relu relu6 hardtanh hardswish hardsigmoid silu sigmoid tanh gelu elu leaky_relu softplus mish clamp clamp_min "
    "clamp_max neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt abs square reciprocal sin cos tan asin acos atan erf "
    "erfc floor ceil round trunc frac sign sgn dropout feature_dropout alpha_dropout feature_alpha_dropout "
    "native_dropout clone contiguous detach alias to _to_copy lift_fresh lift_fresh_copy lift hardshrink "
    "softshrink log_sigmoid selu celu threshold zeros_like ones_like full_like "
    "empty_like rand_like randn_like logical_not bitwise_not isnan isinf isfinite nan_to_num fill zero resolve_conj "
    "resolve_neg real type_as rrelu positive"
)
def pointwise(call: Call) -> Results:
    """Acts on every element alone."""
    x = call.x
    if call.operator.startswith("clamp") and len(call.tensors) > 1:
        clamped: Results = broadcast(call)
        return clamped
    if tuple(dim.shape[1] for dim in x) != call.shape:
        return unknown(call)
    for other in call.tensors[1:]:
        if call.operator not in ("type_as", "fill") or any(not is_free(dim) for dim in call.dims[other]):
            return unknown(call)
    return [x] * len(call.shapes) if len(call.shapes) > 1 else x


@rule(
    "add sub mul div rsub maximum minimum fmax fmin pow remainder fmod floor_divide true_divide atan2 where lerp "
    "masked_fill eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor addcmul "
    "addcdiv prelu copysign hypot xlogy __and__ __or__ subtract multiply divide logaddexp expand_as"
)
def broadcast(call: Call) -> Results:
    """Tensors (or a tensor and numbers), element by element; dimensions of size 1 stretch."""
    if call.operator == "prelu":
        return _prelu(call)
    result: list[Indices | None] = [None] * len(call.shape)
    for tensor in call.tensors:
        dims = call.dims[tensor]
        shift = len(result) - len(dims)
        for i, dim in enumerate(dims, start=shift):
            known = result[i]
            if dim.shape[1] != call.shape[i]:
                call.fix(dim, "a single channel is stretched over many")
            elif known is None:
                result[i] = dim
            else:
                result[i] = call.unite(known, dim, NOT_BOTH)
    return tuple(no_atoms(size) if dim is None else dim for size, dim in zip(call.shape, result, strict=True))


def _prelu(call: Call) -> Results:
    x = list(call.of("self"))
    (slope,) = call.of("weight")
    if slope.shape[1] == 1 or len(x) < 2:
        call.fix(slope, "one slope serves all channels")
    else:
        x[1] = call.unite(slope, x[1], NOT_BOTH)
    return tuple(x)


@rule("copy")
def copy(call: Call) -> Results:
    """The second tensor's elements, broadcast to the shape of the first."""
    result = list(call.x)
    source = call.dims[call.tensors[-1]]
    for i, dim in enumerate(source, start=len(result) - len(source)):
        if dim.shape[1] == result[i].shape[1]:
            result[i] = call.unite(result[i], dim, NOT_BOTH)
        else:
            call.fix(dim, "a single channel is stretched over many")
    return tuple(result)


@rule("getitem")
def getitem(call: Call) -> Results:
    """One of the outputs of an operator that gives several."""
    outputs = call.dims[call.tensors[0]]
    index = call.arguments["1"]
    if isinstance(outputs, list):
        return outputs[index]  # type: ignore[no-any-return]
    return outputs if index == 0 else free(call)


@rule("zeros ones full empty new_zeros new_ones new_full new_empty")
def uniform(call: Call) -> Results:
    """One value everywhere. A dimension that the code made as long as another one's has its channels."""
    sizes = call.sizes.get("size", [])
    if len(sizes) != len(call.shape):
        return free(call)
    return tuple(_as_long_as(call, size, n) for size, n in zip(sizes, call.shape, strict=True))


def _as_long_as(call: Call, size: Expression, n: int) -> Indices:
    dims = call.dims.get(size[1]) if size[0] == "dimension" else None  # none of a node that nothing else reads
    if dims is not None and not isinstance(dims, list):
        dim: Indices = dims[size[2]]
        return dim
    return no_atoms(n)


@rule(
    "arange linspace eye rand randn scalar_tensor tril_indices triu_indices logspace randint randperm hann_window "
    "new_empty_strided empty_strided _assert_tensor_metadata"
)
def constant(call: Call) -> Results:
    """Made from numbers."""
    return free(call)
