"""Re-drawn weights under which a gate proves something, and float64 all the way through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.reference import redraw

POSITION_STD = 0.5
LEAST_CHANGE = 1e-3
"""Of an output between two inputs, relative to its largest entry: below it the gates would prove nothing."""
Inputs = tuple[Tensor, ...]


def redraw_all(model: torch.nn.Module, inputs: Inputs, seed: int) -> torch.nn.Module:
    """Re-draw every parameter and buffer in place, then set batch norms so that activations stay of order one.

    Class tokens and position embeddings get a spread of 0.5; buffers that hold infinities (clipping ranges, masks)
    stay, and what held no negative value holds none afterwards.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if any(stride == 0 for stride in buffer.stride()):  # expanded: can't be written
                setattr(module, name, buffer.clone())
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    redraw(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            own = name.rpartition(".")[2]
            if tensor.dim() > 1 and tensor.shape[0] == 1 and own not in ("weight", "bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * POSITION_STD)
        for name, buffer in model.named_buffers():
            if name in before and not before[name].isfinite().all():
                buffer.copy_(before[name])
            elif name in before and before[name].numel() and before[name].min() >= 0:  # a variance, a frequency
                buffer.abs_()
    _set_batch_norms(model, inputs, generator)
    return model


def _set_batch_norms(model: torch.nn.Module, inputs: Inputs, generator: torch.Generator) -> None:
    """Running statistics near those of the activations, so that deep residual networks neither explode nor vanish."""

    def set_statistics(module: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        dims = [dim for dim in range(x.dim()) if dim != 1]
        mean, variance = x.mean(dims), x.var(dims, correction=0)
        floor = 0.1 * x.square().mean() + 1e-6  # one position a channel has no variance of its own
        spread = torch.rand(variance.shape, generator=generator, dtype=variance.dtype) + 0.5
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        module.running_var.copy_((variance + floor) * spread)
        module.running_mean.copy_(0.7 * mean + 0.3 * noise * module.running_var.sqrt())

    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    try:
        if norms:
            with torch.no_grad():
                model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def other_inputs(inputs: Inputs) -> Inputs:
    """Inputs of the same shapes with other values; what holds one value only (a mask of ones) stays."""
    generator = torch.Generator().manual_seed(99)

    def other(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if x.dtype == torch.bool or x.min() == x.max():
            return x
        return torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=generator, dtype=x.dtype)

    return tuple(other(x) for x in inputs)


def outputs_of(answer: Any) -> list[Tensor]:
    """The floating-point tensors of a model's answer, in order."""
    return [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def why_void(model: torch.nn.Module, inputs: Inputs) -> str | None:
    """Why a gate on this model would prove nothing: outputs not finite, constant, or blind to the input."""
    with torch.no_grad():
        first, second = outputs_of(model(*inputs)), outputs_of(model(*other_inputs(inputs)))
    if not first:
        return "no floating-point output"
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        largest = float(a.abs().max())
        if not a.isfinite().all():
            return f"output {position} is not finite"
        if largest == 0 or (a.numel() > 1 and float(a.std()) <= LEAST_CHANGE * largest):
            return f"output {position} is constant"
        if float((a - b).abs().max()) <= LEAST_CHANGE * largest:
            return f"output {position} does not depend on the input"
    return None


class Float64(TorchFunctionMode):
    """Python code that asks for float32 (norms, rotary embeddings, softmax) computes in float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        replaced = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **replaced)


@contextmanager
def float64() -> Iterator[None]:
    """New tensors are float64, and so are those that were to be float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)
