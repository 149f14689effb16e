"""At least one call of every operator that has a rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graph.rule_case import case

aten = torch.ops.aten
X = "2 4* 3 5"
SAME = ". 0,1,2,3 . ."
HOLDS = "a dimension that holds channels"


def called(name: str, *more: Any, **options: Any) -> Callable[..., Any]:
    """An ATen operator with these arguments behind the tensors."""

    def function(*tensors: Tensor) -> Any:
        return getattr(aten, name)(*tensors, *more, **options)

    return function


POINTWISE = [
    case(name, called(name), X, SAME)
    for name in (
        "relu relu6 hardtanh hardswish hardsigmoid silu sigmoid tanh gelu elu leaky_relu softplus mish neg exp exp2 "
        "expm1 log log2 log10 log1p sqrt rsqrt abs square reciprocal sin cos tan asin acos atan erf erfc floor ceil "
        "round trunc frac sign sgn clone lift contiguous detach alias lift_fresh lift_fresh_copy hardshrink softshrink "
        "log_sigmoid selu celu zeros_like ones_like logical_not isnan isinf isfinite nan_to_num zero resolve_conj "
        "resolve_neg real rrelu positive"
    ).split()
]
WITH_NUMBERS = [
    case("clamp", called("clamp", -1.0, 1.0), X, SAME),
    case("clamp_min", called("clamp_min", 0.0), X, SAME),
    case("clamp_max", called("clamp_max", 0.0), X, SAME),
    *(
        case(name, called(name, 0.5, False), X, SAME)
        for name in "dropout feature_dropout alpha_dropout feature_alpha_dropout".split()
    ),
    case("native_dropout", lambda x: aten.native_dropout(x, 0.5, False)[0], X, SAME),
    case("to", called("to", torch.float32), X, SAME, meaning="random"),
    case("_to_copy", called("_to_copy", dtype=torch.float32), X, SAME, meaning="random"),
    case("threshold", called("threshold", 0.0, 1.0), X, SAME),
    case("full_like", called("full_like", 2.0), X, SAME),
    case("fill", called("fill", 2.0), X, SAME),
    case("type_as", called("type_as"), f"{X}; 1", SAME),
    case("bitwise_not", called("bitwise_not"), f"{X} long", SAME),
    *(case(name, called(name), X, SAME, meaning="random") for name in "empty_like rand_like randn_like".split()),
]
TWO = f"{X}; 4* 1 1"
TIED = ". 0,1,2,3 . . | 0,1,2,3 . ."
BROADCAST = [
    *(
        case(name, called(name), TWO, SAME, then=TIED)
        for name in (
            "add sub mul div rsub maximum minimum fmax fmin pow remainder fmod floor_divide true_divide atan2 eq ne "
            "lt le gt ge logical_and logical_or logical_xor copysign hypot xlogy subtract multiply divide logaddexp"
        ).split()
    ),
    *(
        case(name, called(name), f"{X} long; 4* 1 1 long", SAME, then=TIED)
        for name in "bitwise_and bitwise_or bitwise_xor __and__ __or__".split()
    ),
    case("clamp_min", called("clamp_min"), TWO, SAME, then=TIED),
    case("lerp", called("lerp", 0.5), f"{X}; {X}", SAME, then=f"{SAME} | {SAME}"),
    case("where", called("where"), f"{X} bool; {X}; 1", SAME, then=f"{SAME} | {SAME} | ."),
    case("masked_fill", called("masked_fill", 0.0), f"{X}; 4* 1 1 bool", SAME, then=TIED),
    case("addcmul", called("addcmul"), f"{X}; 4* 1 1; 3 1", SAME, then=f"{TIED} | . ."),
    case("addcdiv", called("addcdiv"), f"{X}; 4* 1 1; 3 1", SAME, then=f"{TIED} | . ."),
    case("expand_as", called("expand_as"), f"1 4* 1 1; {X}", SAME),
    case("prelu", called("prelu"), f"{X}; 4*", SAME, then=". 0,1,2,3 . . | 0,1,2,3"),
    case("prelu", called("prelu"), f"{X}; 1*", SAME, refused="one slope serves all channels"),
    case("add", called("add"), f"{X}; 1* 1 1", SAME, refused="a single channel is stretched over many"),
    case("add", called("add"), f"{X}; 4 1 1", SAME, refused="the other operand can't be pruned along this dimension"),
    case("mul", lambda x: x * 2 + 1, X, SAME),
    case("copy", called("copy"), f"{X}; {X}", SAME, then=f"{SAME} | {SAME}"),
    case("copy", called("copy"), f"{X}; 4* 1 1", SAME, then=TIED),
    case("copy", called("copy"), f"{X}; 1", SAME),
    case("getitem", lambda x: x.max(2)[0], X, ". 0,1,2,3 ."),
]
MADE = [
    *(
        case(name, lambda x, name=name: getattr(x, name)(x.shape), X, SAME, meaning="random")
        for name in "new_zeros new_ones new_empty".split()
    ),
    case("new_full", lambda x: x.new_full(x.shape, 2.0), X, SAME),
    *(
        case(name, lambda x, name=name: getattr(torch, name)(x.shape), X, SAME, meaning="random")
        for name in "zeros ones empty".split()
    ),
    case("full", lambda x: torch.full((x.shape[1], 3), 2.0), X, "0,1,2,3 ."),
    case("zeros", lambda: torch.zeros(2, 4), "", ". ."),
    case("linspace", lambda: torch.linspace(0, 1, 4), "", "."),
    case("arange", lambda: torch.arange(4), "", "."),
    case("eye", lambda: torch.eye(4), "", ". ."),
    case("rand", lambda: torch.rand(4), "", "."),
    case("randn", lambda: torch.randn(4), "", "."),
    case("randint", lambda: torch.randint(0, 2, (4,)), "", "."),
    case("randperm", lambda: torch.randperm(4), "", "."),
    case("logspace", lambda: torch.logspace(0, 1, 4), "", "."),
    case("hann_window", lambda: torch.hann_window(4), "", "."),
    case("tril_indices", lambda: torch.tril_indices(2, 2), "", ". ."),
    case("triu_indices", lambda: torch.triu_indices(2, 2), "", ". ."),
    case("scalar_tensor", lambda: torch.scalar_tensor(2.0), "", ""),
    case("empty_strided", lambda: torch.empty_strided((2, 4), (4, 1)), "", ". ."),
    case("new_empty_strided", called("new_empty_strided", (2, 2), (2, 1)), "1", ". ."),
]
SLIDES = f"it mixes {HOLDS}"
PERMUTED = [
    case("permute", lambda x: x.permute(0, 2, 3, 1), X, ". . . 0,1,2,3"),
    *(case(name, called(name, 1, -1), X, ". . . 0,1,2,3") for name in "transpose swapaxes swapdims".split()),
    *(case(name, called(name, 1, -1), X, ". . . 0,1,2,3") for name in "movedim moveaxis".split()),
    case("movedim", lambda x: x.movedim((1, 2), (3, 0)), X, ". . . 0,1,2,3"),
    case("t", lambda x: x.t(), "2 4*", "0,1,2,3 ."),
    case("t", lambda x: x.t(), "4*", "0,1,2,3"),
    case("numpy_T", called("numpy_T"), "2 4*", "0,1,2,3 ."),
    case("numpy_T", called("numpy_T"), "2 4* 3", ". 0,1,2,3 ."),
    case("numpy_T", called("numpy_T"), "4* 2 3", ". . 0,1,2,3"),
    case("mT", called("mT"), "2 4* 3", ". . 0,1,2,3"),
]
RESHAPED = [
    *(
        case(name, lambda x, out=(2, 4, 15), name=name: getattr(aten, name)(x, out), X, ". 0,1,2,3 .")
        for name in "view reshape _unsafe_view".split()
    ),
    case("flatten", lambda x: x.flatten(2), X, ". 0,1,2,3 ."),
    case("flatten", lambda x: x.flatten(1), "2 4* 2", ". 0,0,1,1,2,2,3,3"),
    case("flatten", lambda x: x.flatten(1), "2 3 2*", ". 0,1,0,1,0,1"),
    case("flatten", lambda x: x.flatten(), "2* 2*", "0+2,0+3,1+2,1+3"),
    case("ravel", lambda x: x.ravel(), "1 4* 2", "0,0,1,1,2,2,3,3"),
    case("view", lambda x, out=(2, 2, 2): x.view(out), "2 4*", ". 4,5 6,7", then=". 4+6,4+7,5+6,5+7"),
    case("view", lambda x, out=(2, 4): x.view(out), "2 2* 2*", ". 0+2,0+3,1+2,1+3"),
    case("view", lambda x: x.view(torch.int64), "2 4*", ". 0,1,2,3"),
    case("view", lambda x: x.view(torch.float32), "2 4*", ". .", refused="operator 'view' has no coupling rule"),
    case("unflatten", lambda x, out=(2, 2, 2): x.unflatten(1, out[1:]), "2 4*", ". 4,5 6,7"),
    case("squeeze", lambda x: x.squeeze(2), "2 4* 1", ". 0,1,2,3"),
    case("squeeze", lambda x: x.squeeze(1), "2 1*", ".", refused="the dimension of its only channel goes away"),
    case("unsqueeze", lambda x: x.unsqueeze(1), "2 4*", ". . 0,1,2,3"),
    *(case(name, called(name), "2 3*; 2 3*", ". 0,1,2") for name in ("view_as", "reshape_as")),
]
MIXES = "the other operand can't be pruned along this dimension"
JOINED = [
    *(
        case(name, lambda x, y, name=name: getattr(aten, name)([x, y], 1), "2 2*; 2 3*", ". 0,1,2,3,4")
        for name in "cat concat concatenate".split()
    ),
    case("cat", lambda x: torch.cat([x, x], 1), "2 2*", ". 0,1,0,1"),
    case("cat", lambda x, y: torch.cat([x, y], 1), "2* 2; 2* 3", "0,1 .", then="0,1 . | 0,1 ."),
    case("cat", lambda x, y: torch.cat([x, y], 1), "2* 2; 2 3", "0,1 .", refused=MIXES),
    case("cat", lambda x, y: torch.cat([x, y], 1), "2 2*; 2 1", ". 0,1,-"),
    case("stack", lambda x, y: torch.stack([x, y], 1), "2 2*; 2 2*", ". . 0,1", then=". 0,1 | . 0,1"),
]
PARTED = [
    *(
        case(name, called(name, 2, 1), "2 4*", ". 0,1 | . 0,1", then=". 0,1,0,1")
        for name in "chunk unsafe_chunk tensor_split".split()
    ),
    *(
        case(
            name,
            lambda x, out=((2, 2), (2, 2)), name=name: getattr(aten, name)(x, out[0][1], 1),
            "2 4*",
            ". 0,1 | . 0,1",
        )
        for name in "split unsafe_split split_copy".split()
    ),
    case("split", lambda x: x.split(3, 1), "2 4*", ". 0,1,2 | . 3", refused=f"it splits {HOLDS} into unequal parts"),
    case("split", lambda x: x.split(1, 0), "2 4*", ". 0,1,2,3 | . 0,1,2,3"),
    *(
        case(
            name,
            lambda x, out=((2, 1), (2, 3)), name=name: getattr(aten, name)(x, [part[1] for part in out], 1),
            "2 4*",
            ". 0 | . 1,2,3",
        )
        for name in ("split_with_sizes",)
    ),
    case(
        "tensor_split",
        lambda x: x.tensor_split([2], 1),
        "2 4*",
        ". 0,1 | . 2,3",
        refused="it splits a dimension that holds channels at given places",
    ),
    case("unbind", lambda x: x.unbind(2), "2 4* 2", ". 0,1,2,3 | . 0,1,2,3"),
    *(
        case(name, called(name, 1), "2 2*", ". | .", refused="it takes its channels apart one by one")
        for name in ("unbind", "unbind_copy")
    ),
]
REPEATED = [
    *(
        case(name, lambda x, out=(2, 4, 3), name=name: getattr(aten, name)(x, out), "4* 1", ". 0,1,2,3 .")
        for name in ("expand", "broadcast_to")
    ),
    case(
        "expand", lambda x, out=(2, 4): x.expand(out), "2 1*", ". .", refused="a single channel is stretched over many"
    ),
    *(case(name, called(name, (1, 2)), "2 2*", ". 0,1,0,1") for name in ("repeat", "tile")),
    case("repeat_interleave", lambda x: x.repeat_interleave(2, 1), "2 2*", ". 0,0,1,1"),
    case(
        "repeat_interleave",
        lambda x: x.repeat_interleave(2),
        "2*",
        ".",
        refused="operator 'repeat_interleave' has no coupling rule",
    ),
    case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), "1 8* 1 1", ". 0,4 . .", then=". 0,0,0,0,4,4,4,4 . ."),
    case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), "1 2* 2 2", ". 0,0,0,0,1,1,1,1 . ."),
    *(
        case(
            name,
            called(name, 2),
            "1 4* 1 1",
            ". 6,6,7,7 . .",
            then=". 6,7,6,7 . .",
            refused="it shuffles a given number of groups",
        )
        for name in ("channel_shuffle", "native_channel_shuffle")
    ),
    case(
        "meshgrid",
        lambda x, y: torch.meshgrid(x, y, indexing="ij")[0],
        "2*; 3",
        ". .",
        refused="operator 'meshgrid' has no coupling rule",
    ),
]
PICKS = "it picks channels by number"
PICKED = [
    *(case(name, called(name, 2, 0), X, ". 0,1,2,3 .") for name in ("select", "select_copy")),
    case("select", lambda x: x[:, 0], "2 4*", ".", refused=PICKS),
    *(
        case(
            name,
            lambda x, out=(2, 4, 2, 5), name=name: getattr(aten, name)(x, 2, x.shape[2] - out[2]),
            X,
            ". 0,1,2,3 . .",
        )
        for name in ("slice", "slice_copy")
    ),
    case("slice", lambda x, out=(2, 2): x[:, : out[1]], "2 4*", ". 0,1"),
    case("slice", lambda x, out=(2, 1): x[:, x.shape[1] - out[1] :], "2 4*", ". 3"),
    case("slice", lambda x: x[:, ::2], "2 4*", ". 0,2", refused=PICKS),
    case("slice", lambda x: x[::2], "4 4*", ". 0,1,2,3"),
    case("narrow", lambda x, out=(1, 4): x.narrow(0, 0, out[0]), "2 4*", ". 0,1,2,3"),
    case("narrow", lambda x, out=(2, 2): x.narrow(1, 0, out[1]), "2 4*", ". 0,1"),
    case(
        "slice_scatter",
        lambda x, y: x.slice_scatter(y, 0, 0, 1),
        "2 4*; 1 4*",
        ". 0,1,2,3",
        then=". 0,1,2,3 | . 0,1,2,3",
    ),
    case("slice_scatter", lambda x, y: x.slice_scatter(y, 1, 0, 2), "2 4*; 2 2*", ". 0,1,2,3", refused=PICKS),
    case("select_scatter", lambda x, y: x.select_scatter(y, 0, 1), "2 4*; 4*", ". 0,1,2,3", then=". 0,1,2,3 | 0,1,2,3"),
    case("select_scatter", lambda x, y: x.select_scatter(y, 1, 1), "2 4*; 2", ". 0,1,2,3", refused=PICKS),
    *(
        case(name, lambda x, i, name=name: getattr(aten, name)(x, [None, None, i]), "2 4* 2; 3 long", ". 0,1,2,3 .")
        for name in ("index", "_unsafe_index")
    ),
    case("index", lambda x, i: x[:, i], "2 4*; 3 long", ". .", refused=PICKS),
    case("index", lambda x, i: x[i], "2 4*; 3* long", ". 0,1,2,3", refused="channels serve as positions"),
    case("index", lambda x, i: x[i, :, i], "2 4* 2; 3 long", ". .", refused=PICKS),
    case(
        "index_put",
        lambda x, i, y: aten.index_put(x, [i], y),
        "2 4*; 1 long; 1 4*",
        ". .",
        refused="it writes to positions",
    ),
    case(
        "index_copy",
        lambda x, i, y: x.index_copy(0, i, y),
        "2 4*; 1 long; 1 4*",
        ". .",
        refused="it writes to positions",
    ),
    case("index_select", lambda x, i: x.index_select(0, i), "2 4*; 3 long", ". 0,1,2,3"),
    case("index_select", lambda x, i: x.index_select(1, i), "2 4*; 3 long", ". .", refused=PICKS),
    case(
        "index_select",
        lambda x, i: x.index_select(0, i),
        "2 4*; 3* long",
        ". 0,1,2,3",
        refused="channels serve as positions",
    ),
    case("gather", lambda x, i: x.gather(0, i), "2 4*; 3 4* long", ". 0,1,2,3", then=". 0,1,2,3 | . 0,1,2,3"),
    case("gather", lambda x, i: x.gather(1, i), "2 4*; 2 3 long", ". .", refused=PICKS),
    case("take_along_dim", lambda x, i: x.take_along_dim(i, 0), "2 4*; 3 4* long", ". 0,1,2,3"),
    case("flip", lambda x: x.flip(1), "2 4*", ". 3,2,1,0"),
    case("roll", lambda x: x.roll(1, 2), X, SAME),
    case("roll", lambda x: x.roll(1, 1), X, SAME, refused="it moves channels by a number of places"),
    *(case(name, called(name), "4* 3 5", "0,1,2,3 . .") for name in ("tril", "triu")),
    case("tril", called("tril"), "4* 3", "0,1,2,3 .", refused="it compares the positions of channels"),
    case("pad", lambda x: F.pad(x, (1, 1)), X, SAME),
    case("pad", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), X, ". -,0,1,2,3,-,- . ."),
    case("constant_pad_nd", called("constant_pad_nd", (1, 2)), "2 4*", ". -,0,1,2,3,-,-"),
    case("pad", lambda x: F.pad(x, (0, -1)), "2 4*", ". .", refused="it pads channels by other channels"),
    case("reflection_pad1d", called("reflection_pad1d", (1, 1)), "2 4* 3", ". 0,1,2,3 ."),
    case("reflection_pad2d", called("reflection_pad2d", (1, 1, 1, 1)), X, SAME),
    case("reflection_pad3d", called("reflection_pad3d", (1,) * 6), "1 4* 2 2 2", ". 0,1,2,3 . . ."),
    case("replication_pad1d", called("replication_pad1d", (1, 1)), "2 4* 3", ". 0,1,2,3 ."),
    case("replication_pad2d", called("replication_pad2d", (1, 1, 1, 1)), X, SAME),
    case("replication_pad3d", called("replication_pad3d", (1,) * 6), "1 4* 2 2 2", ". 0,1,2,3 . . ."),
    case("_pad_circular", called("_pad_circular", (1, 1)), "2 4* 3", ". 0,1,2,3 ."),
    case(
        "reflection_pad1d",
        called("reflection_pad1d", (1, 1)),
        "2 4 3*",
        ". . .",
        refused="it pads channels by other channels",
    ),
]
VALUES = [
    case("one_hot", lambda x: F.one_hot(x, 2), "4* long", ". .", refused="its result depends on values"),
    case("bucketize", called("bucketize"), "4*; 3", ".", refused="its result depends on values"),
    case("searchsorted", called("searchsorted"), "4*; 3", ".", refused="its result depends on values"),
]
REDUCED = [
    *(
        case(name, called(name, [2, 3]), X, ". 0,1,2,3")
        for name in "mean sum amax amin var std logsumexp nanmean count_nonzero".split()
    ),
    *(case(name, called(name, dim=2), X, ". 0,1,2,3 .") for name in "prod argmax argmin all any".split()),
    *(case(name, called(name, 2), X, ". 0,1,2,3 . | . 0,1,2,3 .") for name in "max min median".split()),
    case("max", called("max"), TWO, SAME, then=TIED),
    case("max", lambda x: x.max(), "2 4*", "", refused=f"it reduces {HOLDS}"),
    case("aminmax", called("aminmax", dim=2), X, ". 0,1,2,3 . | . 0,1,2,3 ."),
    *(case(name, called(name, [2, 3]), X, ". 0,1,2,3 | . 0,1,2,3") for name in ("var_mean", "std_mean")),
    case("norm", called("norm", 2, [2]), X, ". 0,1,2,3 ."),
    case("linalg_vector_norm", called("linalg_vector_norm", 2, [2]), X, ". 0,1,2,3 ."),
    case("mean", lambda x: x.mean(2, keepdim=True), X, ". 0,1,2,3 . ."),
    case("mean", lambda x: x.mean(1), X, ". . .", refused=f"it averages over {HOLDS}"),
    case("mean", lambda x: x.mean(), X, "", refused=f"it averages over {HOLDS}"),
    case("mean", lambda x: x.pow(2).mean(1), "2 4*", "."),
    case("mean", lambda x: (x * x).mean(1), "2 4*", "."),
    case("mean", lambda x: x.square().mean(1), "2 4*", "."),
    case("mean", lambda x: (x * 2).mean(1), "2 4*", ".", refused=f"it averages over {HOLDS}"),
    case("mean", lambda x: (x * x[:1]).mean(1), "2 4*", ".", refused=f"it averages over {HOLDS}"),
    case("mean", lambda x: x - x.mean(1, keepdim=True), "2 4*", ". 0,1,2,3"),
    case("mean", lambda x: x.mean(1, keepdim=True) - x, "2 4*", ". 0,1,2,3", refused=f"it averages over {HOLDS}"),
    case("sum", lambda x: x.sum(1), X, ". . .", refused=f"it sums over {HOLDS}"),
    case("amax", lambda x: x.amax(1), X, ". . .", refused=f"it reduces {HOLDS}"),
    *(
        case(name, called(name, 2), X, SAME)
        for name in "softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp argsort".split()
    ),
    *(case(name, called(name, 2, False), X, SAME) for name in ("_softmax", "_log_softmax")),
    case("sort", called("sort", 2), X, f"{SAME} | {SAME}"),
    case("softmax", lambda x: x.softmax(1), "2 4*", ". .", refused=f"it works along {HOLDS}"),
    case("glu", lambda x: F.glu(x, 2), "2 4* 2", ". 0,1,2,3 ."),
    case("glu", lambda x: F.glu(x, 1), "2 4*", ". 0,1", then=". 0,1,0,1"),
    case("topk", called("topk", 1, 2), X, f"{SAME} | {SAME}"),
    case("topk", called("topk", 1, 1), "2 4*", ". . | . .", refused=f"it works along {HOLDS}"),
]
NORMED = [
    case(
        "batch_norm",
        lambda x, m, v: F.batch_norm(x, m, v.abs()),
        f"{X}; 4*; 4*",
        SAME,
        then=f"{SAME} | 0,1,2,3 | 0,1,2,3",
    ),
    case(
        "batch_norm",
        lambda x: F.batch_norm(x, None, None, training=True),
        X,
        ". . . .",
        refused="batch norm uses the statistics of the batch",
    ),
    case(
        "native_batch_norm",
        lambda x, m, v: aten.native_batch_norm(x, None, None, m, v.abs(), False, 0.1, 1e-5)[0],
        f"{X}; 4*; 4*",
        SAME,
    ),
    case(
        "_native_batch_norm_legit_no_training",
        lambda x, m, v: aten._native_batch_norm_legit_no_training(x, None, None, m, v.abs(), 0.1, 1e-5)[0],
        f"{X}; 4*; 4*",
        SAME,
    ),
    case("instance_norm", lambda x, w: F.instance_norm(x, weight=w), f"{X}; 4*", SAME, then=". 0,1,2,3 . . | 0,1,2,3"),
    case("instance_norm", lambda x: F.instance_norm(x), "2 4 3*", ". . 0,1,2", refused=f"it normalises over {HOLDS}"),
    case("layer_norm", lambda x: F.layer_norm(x, x.shape[-1:]), "2 4* 3", ". 0,1,2,3 ."),
    case(
        "layer_norm",
        lambda x, w: F.layer_norm(x, x.shape[-1:], w),
        "2 4*; 4*",
        ". 0,1,2,3",
        then=". 0,1,2,3 | 0,1,2,3",
    ),
    case(
        "native_layer_norm",
        lambda x, w: aten.native_layer_norm(x, x.shape[-1:], w, None, 1e-5)[0],
        "2 4*; 4*",
        ". 0,1,2,3",
    ),
    case(
        "native_layer_norm",
        lambda x: aten.native_layer_norm(x, x.shape[-1:], None, None, 1e-5),
        "2 4* 3",
        ". 0,1,2,3 . | . 0,1,2,3 . | . 0,1,2,3 .",
    ),
    case("rms_norm", lambda x, w: F.rms_norm(x, x.shape[-1:], w), "2 4*; 4*", ". 0,1,2,3"),
    case(
        "_fused_rms_norm",
        lambda x, w: aten._fused_rms_norm(x, x.shape[-1:], w, 1e-5)[0],
        "2 4*; 4*",
        ". 0,1,2,3",
    ),
    case("group_norm", lambda x: F.group_norm(x, 1), "2 4* 3", ". 0,1,2,3 ."),
    case("group_norm", lambda x: F.group_norm(x, x.shape[1] // 2), "2 4* 3", ". 0,0,2,2 ."),
    case("group_norm", lambda x: F.group_norm(x, x.shape[1]), "2 4* 3", ". 0,1,2,3 ."),
    case(
        "native_group_norm",
        lambda x: aten.native_group_norm(x, None, None, *x.shape, x.shape[1] // 2, 1e-5)[0],
        "2 4* 3",
        ". 0,0,2,2 .",
    ),
]
POOLS = [
    *(
        case(
            f"{kind}_pool{rank}d",
            called(f"{kind}_pool{rank}d", [2] * rank),
            f"2 4*{' 2' * rank}",
            ". 0,1,2,3" + " ." * rank,
        )
        for kind in ("max", "avg", "adaptive_avg")
        for rank in (1, 2, 3)
    ),
    *(
        case(
            name,
            called(name, [2] * rank),
            f"2 4*{' 2' * rank}",
            " | ".join([". 0,1,2,3" + " ." * rank] * 2),
        )
        for rank in (1, 2, 3)
        for name in (f"adaptive_max_pool{rank}d", f"max_pool{rank}d_with_indices")
    ),
    *(
        case(
            f"_adaptive_avg_pool{rank}d",
            called(f"_adaptive_avg_pool{rank}d", [2] * rank),
            f"2 4*{' 2' * rank}",
            ". 0,1,2,3" + " ." * rank,
        )
        for rank in (2, 3)
    ),
    *(
        case(f"{kind}{rank}d", called(f"{kind}{rank}d", [4] * rank), f"2 4*{' 2' * rank}", ". 0,1,2,3" + " ." * rank)
        for kind in ("upsample_nearest", "_upsample_nearest_exact")
        for rank in (1, 2, 3)
    ),
    *(
        case(name, called(name, [4] * rank, False), f"2 4*{' 2' * rank}", ". 0,1,2,3" + " ." * rank)
        for name, rank in (
            ("upsample_linear1d", 1),
            ("upsample_bilinear2d", 2),
            ("upsample_bicubic2d", 2),
            ("upsample_trilinear3d", 3),
            ("_upsample_bilinear2d_aa", 2),
            ("_upsample_bicubic2d_aa", 2),
        )
    ),
    case("max_pool2d", lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), 1), X, ". . . .", refused=SLIDES),
]
WINDOWS = [
    case("unfold", lambda x: x.unfold(2, 2, 1), "2 4* 3", ". 0,1,2,3 . ."),
    case("unfold", lambda x: x.unfold(1, 2, 1), "2 4*", ". . .", refused=f"its windows run along {HOLDS}"),
    case("im2col", lambda x: F.unfold(x, (1, 2)), "2 2* 1 3", ". 0,0,1,1 ."),
    case("col2im", lambda x: F.fold(x, (1, 3), (1, 2)), "2 4* 2", ". 0,2 . .", then=". 0,0,2,2 ."),
    case("grid_sampler", partial(F.grid_sample, align_corners=False), "2 4* 3 3; 2 3 3 2", SAME),
    *(
        case(
            f"grid_sampler_{rank}d",
            called(f"grid_sampler_{rank}d", 0, 0, False),
            f"2 4*{' 2' * rank}; 2{' 2' * rank} {rank}",
            ". 0,1,2,3" + " ." * rank,
        )
        for rank in (2, 3)
    ),
    case(
        "grid_sampler",
        partial(F.grid_sample, align_corners=False),
        "2* 4 3 3; 2* 3 3 2",
        "0,1 . . .",
        then="0,1 . . . | 0,1 . . .",
    ),
]
HEADS = "1 2* 3 4*; 1 2* 3 4*; 1 2* 3 5*"
ATTENDED = [
    case(
        "scaled_dot_product_attention",
        partial(F.scaled_dot_product_attention, scale=0.5),
        HEADS,
        ". 0,1 . 14,15,16,17,18",
        then=". 0,1 . 2,3,4,5 | . 0,1 . 2,3,4,5 | . 0,1 . 14,15,16,17,18",
        meaning="sums",
    ),
    case(
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        HEADS,
        ". 0,1 . 14,15,16,17,18",
        refused="the operator scales by this width, which the call does not give",
        meaning="sums",
    ),
    case(
        "scaled_dot_product_attention",
        partial(F.scaled_dot_product_attention, enable_gqa=True),
        "1 4* 3 2; 1 2* 3 2; 1 2* 3 2",
        ". 0,0,2,2 . .",
        then=". 0,0,2,2 . . | . 0,2 . . | . 0,2 . .",
        meaning="sums",
    ),
    case(
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        "1 2 3* 2; 1 2 3 2; 1 2 3 2; 3* 3",
        ". . 0,1,2 .",
        then=". . 0,1,2 . | . . . . | . . . . | 0,1,2 .",
        meaning="sums",
    ),
    case(
        "scaled_dot_product_attention",
        partial(F.scaled_dot_product_attention, is_causal=True),
        "1 2 3* 2; 1 2 3 2; 1 2 3 2",
        ". . 0,1,2 .",
        refused="it compares the positions of channels",
        meaning="sums",
    ),
]
