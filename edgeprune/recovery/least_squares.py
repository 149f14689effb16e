"""Layer by layer, new weights that bring a pruned layer's output back to the dense one's: no labels, no gradients.

Legend: X [rows, D] inputs of a layer in the pruned model, D = c_in · kernel; T [rows, C] outputs of the same layer in
the dense model, at the kept channels; W [C, D] the cut weights. With *streams* a layer that ends a residual branch is
solved for what its sum is to give, T the dense stream less the pruned shortcut (He et al. 2017, Channel pruning:
Y1 - Y1' + Y2): it takes up what went wrong before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from edgeprune.models import output_tensor
from edgeprune.recovery.batch_norm import pair_moments
from edgeprune.recovery.reference import Contraction, Reference, drawn_rows, repairable
from edgeprune.recovery.streams import Streams

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # times the mean diagonal of the Gram matrix
GRAM_OPERATIONS = 3e10  # rows · D², about, a layer
CHUNK = 2048  # rows that are worked on at once
SOLVED = 1e-9  # a relative error from which there is nothing left to gain


@dataclass(frozen=True, kw_only=True)
class LayerRepair:
    """One layer: its error ||output - T||² / ||T - mean||² on held-out samples before and after, and the ridge."""

    layer: str
    before: float
    after: float
    ridge: float | None


def reconstruct(
    pruned: torch.nn.Module,
    dense: torch.nn.Module,
    reference: Reference,
    *,
    solve: bool = True,
    moments: bool = True,
    streams: bool = False,
) -> tuple[torch.nn.Module, tuple[LayerRepair, ...]]:
    """A repaired copy of the pruned model, and what was done to which layer.

    One pass over all samples: when a layer is about to run, its input already comes from repaired layers; `solve`
    fits its weights, `moments` pairs a batch norm's statistics with the dense one's, then the pass goes on with them.
    `streams`: at the sums that `Reference.streams` knows, the layer that ends the branch is fitted to the sum, and a
    batch norm behind it is written anew.
    """
    module = copy.deepcopy(pruned).eval()
    layers, norms = repairable(dense, module)
    ends = _ends(layers, norms, reference) if streams else {}
    fitted = {reference.norm_after.get(name) for name in ends}
    repairs: list[LayerRepair] = []
    waiting: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in layers.items():
        if name in ends:
            hooks.append(layer.register_forward_pre_hook(_waiting_hook(name, waiting)))
        elif solve and name in reference.targets:
            norm = norms.get(reference.norm_after.get(name, ""))
            hooks.append(layer.register_forward_pre_hook(_layer_hook(name, norm, reference, repairs)))
    for name, norm in norms.items():
        if moments and name in reference.moments and name not in fitted:
            hooks.append(norm.register_forward_pre_hook(_norm_hook(name, reference)))

    def meet(name: str, branch: torch.Tensor, shortcut: torch.Tensor) -> None:
        if name in waiting:
            repairs.append(ends[name].fit(waiting.pop(name), branch, shortcut, reference))

    try:
        with torch.no_grad(), Streams({name: end.layer for name, end in ends.items()}, norms.values(), meet):
            output_tensor(module(reference.samples))
    finally:
        for hook in hooks:
            hook.remove()
    return module, tuple(repairs)


def _waiting_hook(name: str, waiting: dict[str, torch.Tensor]) -> Callable[[Any, Any], None]:
    def hook(layer: torch.nn.Module, inputs: Any) -> None:
        waiting[name] = inputs[0]

    return hook


def _ends(layers: dict[str, Any], norms: dict[str, Any], reference: Reference) -> dict[str, End]:
    """The layers that end a branch, with the batch norm behind them; not where that one has no weights to write."""
    found = {}
    for name, stream in reference.streams.items():
        norm = norms.get(reference.norm_after.get(name, ""))
        known = name in layers and stream.shape[2] == len(layers[name].weight)
        if known and (norm is None or norm.affine):
            found[name] = End(name=name, layer=layers[name], norm=norm)
    return found


@dataclass(frozen=True, kw_only=True)
class End:
    """A layer that ends a residual branch, and the batch norm behind it; together y = W x + bias."""

    name: str
    layer: Any
    norm: Any

    def fit(self, x: torch.Tensor, branch: torch.Tensor, shortcut: torch.Tensor, reference: Reference) -> LayerRepair:
        """Solve for the dense stream less the shortcut, in place, and write what comes out into `branch`."""
        weight, bias = self._read()
        positions = reference.positions[self.name]
        rows = _input_rows(self.layer, x, positions, weight.shape[1])
        target = reference.streams[self.name] - drawn_rows(self.layer, shortcut, positions) - bias
        has_offset = self.norm is not None or self.layer.bias is not None
        fit = _fit(rows, target, weight, reference.num_fit, with_offset=has_offset)
        if fit.ridge is not None:
            self._write(fit.weight, bias + fit.offset, x, branch)
        return LayerRepair(layer=self.name, before=fit.before, after=fit.after, ridge=fit.ridge)

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W float32 [C, D] and the bias [C] of layer and norm as one."""
        weight = self.layer.weight.detach().flatten(1)
        bias = weight.new_zeros(len(weight)) if self.layer.bias is None else self.layer.bias.detach()
        if self.norm is None:
            return weight, bias
        scale = self.norm.weight.detach() / (self.norm.running_var + self.norm.eps).sqrt()
        return weight * scale[:, None], (bias - self.norm.running_mean) * scale + self.norm.bias.detach()

    def _write(self, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, branch: torch.Tensor) -> None:
        """W into the layer; the norm gets the statistics of W x, and weights that undo them."""
        layer, norm = self.layer, self.norm
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if norm is None:
            if layer.bias is not None:
                layer.bias.copy_(bias)
            branch.copy_(layer.forward(x))
            return
        if layer.bias is not None:
            layer.bias.zero_()
        y = layer.forward(x)
        var, mean = torch.var_mean(y.transpose(0, 1).flatten(1), 1, correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_((var + norm.eps).sqrt())
        norm.bias.copy_(bias + mean)
        branch.copy_(norm.forward(y))


def _norm_hook(name: str, reference: Reference) -> Callable[[torch.nn.Module, Any], None]:
    def hook(norm: torch.nn.Module, inputs: Any) -> None:
        pair_moments(norm, inputs[0][: reference.num_fit], reference.moments[name])

    return hook


def _layer_hook(
    name: str, norm: torch.nn.Module | None, reference: Reference, repairs: list[LayerRepair]
) -> Callable[[Any, Any], None]:
    def hook(layer: Any, inputs: Any) -> None:
        weight = layer.weight.detach().flatten(1)
        target = reference.targets[name]
        if target.shape[2] != len(weight) or any(repair.layer == name for repair in repairs):
            return
        rows = _input_rows(layer, inputs[0], reference.positions[name], weight.shape[1])
        offset = None if layer.bias is None and norm is None else torch.zeros(len(weight), dtype=torch.float64)
        if layer.bias is not None:
            target = target - layer.bias
        fit = _fit(rows, target, weight, reference.num_fit, with_offset=offset is not None)
        repairs.append(LayerRepair(layer=name, before=fit.before, after=fit.after, ridge=fit.ridge))
        if fit.ridge is None:
            return
        layer.weight.copy_(fit.weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.add_(fit.offset)
        elif norm is not None:
            norm.running_mean.sub_(fit.offset)  # type: ignore[operator]

    return hook


def _input_rows(layer: Contraction, x: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """X at the drawn positions: float32 [N, P, D]."""
    each = max(1, min(positions.shape[1], int(GRAM_OPERATIONS / size**2 / len(positions))))
    positions = positions[:, :each]
    if isinstance(layer, torch.nn.Linear):
        rows = x.reshape(len(positions), -1, x.shape[-1])
        return rows[torch.arange(len(rows))[:, None], positions]
    x = torch.nn.functional.pad(x, _padding(layer))
    height, width = layer.kernel_size
    columns = (x.shape[3] - layer.dilation[1] * (width - 1) - 1) // layer.stride[1] + 1
    corner = positions // columns * layer.stride[0] * x.shape[3] + positions % columns * layer.stride[1]
    across = torch.arange(width) * layer.dilation[1]
    window = (torch.arange(height)[:, None] * layer.dilation[0] * x.shape[3] + across).flatten()
    places = (corner[:, :, None] + window).flatten(1)  # int64 [N, P·kernel], of the padded picture's pixels
    drawn = x.flatten(2).gather(2, places[:, None].expand(-1, x.shape[1], -1))
    return drawn.reshape(len(x), -1, each, len(window)).transpose(1, 2).flatten(2)


def _padding(layer: torch.nn.Conv2d) -> tuple[int, ...]:
    """Left, right, above, below."""
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    if isinstance(layer.padding, str):
        (above, below), (left, right) = (
            (d * (k - 1) // 2, (d * (k - 1) + 1) // 2) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        )
        return left, right, above, below
    above, left = layer.padding
    return left, left, above, above


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The best weights found; `ridge` None: those there were."""

    weight: torch.Tensor
    offset: torch.Tensor
    before: float
    after: float
    ridge: float | None


def _fit(x: torch.Tensor, t: torch.Tensor, weight: torch.Tensor, num_fit: int, *, with_offset: bool) -> Fit:
    """Ridge regression towards the weights there are; the ridge that serves the held-out samples best, or none.

    Minimises ||X W'ᵀ + b - T||² + ridge · trace(XᵀX) / D · ||W' - W||² in float64, X and T [N, P, ·]; b = 0 unless
    `with_offset`. Ridges are tried from the largest down, until a smaller one serves worse.
    """
    t = t[:, : x.shape[1]]
    w = weight.double()
    held = slice(num_fit, None) if num_fit < len(x) else slice(None)
    x_held, t_held = x[held].flatten(0, 1), t[held].flatten(0, 1)
    variance = float((t_held - t_held.mean(0)).double().square().sum()) or 1.0

    def error(candidate: torch.Tensor, offset: torch.Tensor) -> float:
        predicted = x_held @ candidate.float().T + offset.float()
        return float((predicted - t_held).double().square().sum()) / variance

    nothing = torch.zeros(len(w), dtype=torch.float64)
    before = error(w, nothing)
    best = Fit(weight=w, offset=nothing, before=before, after=before, ridge=None)
    if before < SOLVED:
        return best
    x_fit, t_fit = x[:num_fit].flatten(0, 1), t[:num_fit].flatten(0, 1)
    x_mean = x_fit.mean(0, dtype=torch.float64) if with_offset else torch.zeros(x.shape[2], dtype=torch.float64)
    r_mean = t_fit.mean(0, dtype=torch.float64) - x_mean @ w.T if with_offset else nothing
    steps = _dual_steps if len(x_fit) < x.shape[2] else _primal_steps
    last = float("inf")
    for ridge, step in steps(x_fit, t_fit, w, x_mean, r_mean):
        offset = r_mean - x_mean @ step if with_offset else nothing
        after = error(w + step.T, offset)
        if after >= last:
            break
        last = after
        if after < best.after:
            best = Fit(weight=w + step.T, offset=offset, before=before, after=after, ridge=ridge)
    return best


Steps = Iterator[tuple[float, torch.Tensor]]  # (ridge, (W' - W)ᵀ float64 [D, C])


def _primal_steps(
    x: torch.Tensor, t: torch.Tensor, w: torch.Tensor, x_mean: torch.Tensor, r_mean: torch.Tensor
) -> Steps:
    """(XᵀX + λ)⁻¹ XᵀR with centred X and residual R = T - X Wᵀ, summed up a chunk of rows at a time."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    moment = torch.zeros(x.shape[1], t.shape[1], dtype=torch.float64)
    for start in range(0, len(x), CHUNK):
        rows = x[start : start + CHUNK].double()
        residual = t[start : start + CHUNK].double() - rows @ w.T - r_mean
        rows -= x_mean
        gram.addmm_(rows.T, rows)
        moment.addmm_(rows.T, residual)
    for ridge in RIDGES:
        factor = _factor(gram, ridge * float(gram.trace()) / x.shape[1])
        if factor is None:
            return
        yield ridge, torch.cholesky_solve(moment, factor)


def _dual_steps(x: torch.Tensor, t: torch.Tensor, w: torch.Tensor, x_mean: torch.Tensor, r_mean: torch.Tensor) -> Steps:
    """Xᵀ (XXᵀ + λ)⁻¹ R: the same, cheaper where there are fewer rows than inputs."""
    rows = x.double()
    residual = t.double() - rows @ w.T - r_mean
    rows -= x_mean
    kernel = rows @ rows.T
    for ridge in RIDGES:
        factor = _factor(kernel, ridge * float(kernel.trace()) / x.shape[1])
        if factor is None:
            return
        yield ridge, rows.T @ torch.cholesky_solve(residual, factor)


def _factor(matrix: torch.Tensor, damping: float) -> torch.Tensor | None:
    damped = matrix.clone()
    damped.diagonal().add_(max(damping, 1e-30))
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else factor
