"""Shapes of the most frequent operators without a run on fake tensors, which costs a hundred times as much.

Each function gets the call's arguments and returns the output's shape, or None where it is not sure: then the operator
itself runs, and raises its own error where the arguments don't fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
Shape = tuple[int, ...]


def _same(x: Any, *_: Any) -> Shape | None:
    return tuple(x.shape)


def _same_as_both(x: Any, y: Any, *_: Any) -> Shape | None:
    if isinstance(y, torch.Tensor):
        return tuple(x.shape) if x.shape == y.shape and x.dtype == y.dtype else None
    return tuple(x.shape) if x.is_floating_point() else None


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *_: Any) -> Shape | None:
    given = [t for t in (weight, bias, mean, variance) if t is not None]
    return tuple(x.shape) if not training and x.dim() > 1 and all(t.shape == x.shape[1:2] for t in given) else None


def _layer_norm(x: Any, normalized: Any, weight: Any = None, bias: Any = None, *_: Any) -> Shape | None:
    shape = tuple(normalized)
    given = [t for t in (weight, bias) if t is not None]
    return tuple(x.shape) if tuple(x.shape[-len(shape) :]) == shape and all(t.shape == shape for t in given) else None


def _linear(x: Any, weight: Any, bias: Any = None) -> Shape | None:
    fits = weight.dim() == 2 and x.dim() > 1 and x.shape[-1] == weight.shape[1]
    if bias is not None:
        fits = fits and bias.shape == weight.shape[:1]
    return (*x.shape[:-1], weight.shape[0]) if fits else None


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Shape | None:
    fits = x.dim() == 4 and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    if bias is not None:
        fits = fits and bias.shape == weight.shape[:1]
    if not fits:
        return None
    size = []
    for i in range(2):
        s, p, d = (_at(value, i) for value in (stride, padding, dilation))
        size.append((x.shape[2 + i] + 2 * p - d * (weight.shape[2 + i] - 1) - 1) // s + 1)
    return (x.shape[0], weight.shape[0], *size) if min(size) > 0 else None


def _at(value: Any, i: int) -> int:
    if isinstance(value, int):
        return value
    return int(value[i if len(value) > 1 else 0])


SHAPES: dict[Any, Callable[..., Shape | None]] = {
    **dict.fromkeys(
        (
            *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardswish.default, aten.sigmoid.default),
            *(aten.hardsigmoid.default, aten.relu6.default, aten.leaky_relu.default, aten.tanh.default),
        ),
        _same,
    ),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor), _same_as_both),
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.linear.default: _linear,
    aten.conv2d.default: _conv2d,
}
IN_PLACE: dict[Any, Callable[..., Shape | None]] = {
    **dict.fromkeys(
        (
            aten.relu_.default,
            aten.silu_.default,
            aten.hardswish_.default,
            aten.hardsigmoid_.default,
            aten.relu6_.default,
        ),
        _same,
    ),
    **dict.fromkeys((aten.add_.Tensor, aten.mul_.Tensor), _same_as_both),
}


def shape_without_running(func: Any, args: Any, kwargs: Any) -> Shape | None:
    """The shape of a floating-point output in the type of the first tensor, laid out contiguously."""
    rule = SHAPES.get(func)
    if rule is None or kwargs or not args or not args[0].is_floating_point():
        return None
    return rule(*args) if args[0].is_contiguous() else None


def writes_same_shape(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an in-place operator needs no run to know that it fits."""
    rule = IN_PLACE.get(func)
    return rule is not None and not kwargs and rule(*args) == tuple(args[0].shape)
