"""What the dense model computes on the calibration samples: the targets that a repair works towards.

Legend: N samples, C channels, L positions of an output (H·W pixels, or tokens), P of them drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from edgeprune.comparing import Cut
from edgeprune.data import MOST_CALIBRATION_SAMPLES, Data
from edgeprune.models import output_tensor
from edgeprune.recovery.streams import Streams

ROWS = 16384  # of a layer's least-squares problem
TARGET_ELEMENTS = 2**27  # of all targets together: half a GiB, and no more of streams
MOST_SAMPLES = 1024  # that are fitted to, where there are so many pictures and as many as 64 ImageNet crops hold values
ACTIVATION_BYTES = 2**31  # of the samples' activations, held at once
LIVE_ACTIVATIONS = 3  # how many of the largest ones live at once: input, output, a shortcut
BATCH_SIZE = 8
Norm = torch.nn.modules.batchnorm._BatchNorm
Contraction = torch.nn.Conv2d | torch.nn.Linear


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and variance of a batch norm's input, float64 [kept C], with the statistics it was trained with."""

    mean: torch.Tensor
    var: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`samples` float32 [N, ...], of which the first `num_fit` are fitted to and the rest held out.

    `targets[layer]` float32 [N, P, kept C] is the dense layer's output at `positions[layer]` int64 [N, P],
    `streams[layer]` the sum that reads the branch which the layer ends (`streams.Streams`), at the same positions;
    `moments` belong to the fitted samples; `norm_after[layer]` is the batch norm that reads a layer's output.
    """

    samples: torch.Tensor
    num_fit: int
    outputs: torch.Tensor
    targets: dict[str, torch.Tensor]
    positions: dict[str, torch.Tensor]
    moments: dict[str, Moments]
    norm_after: dict[str, str]
    streams: dict[str, torch.Tensor]


def take_samples(data: Data, dense: torch.nn.Module, *, seed: int) -> tuple[torch.Tensor, int]:
    """(samples, how many of them to fit to): no picture is on both sides, and all of them fit into memory at once.

    A third as many as are fitted to are held out. Fitted to are as many as a criterion looks at, or all pictures up to
    `MOST_SAMPLES`: other pictures tell more than other crops.
    """
    held, fit = data.hold_out()
    first, _ = next(data.batches(1))
    most = max(4, ACTIVATION_BYTES // (LIVE_ACTIVATIONS * _largest_activation(dense, first)))
    few, many = (data.calibration_views(count)[0] for count in (MOST_CALIBRATION_SAMPLES, MOST_SAMPLES))
    samples = min(many, max(few, len(fit)))
    parts = []
    for part, wanted in ((fit, min(samples, most * 3 // 4)), (held, min(ceil(samples / 3), most // 4))):
        views = ceil(wanted / max(1, len(part)))
        parts.append(
            [x for x, _ in part.batches(BATCH_SIZE, views=views, seed=seed, limit=wanted)] if len(part) else []
        )
    return torch.cat([*parts[0], *parts[1]]), sum(len(x) for x in parts[0])


def _largest_activation(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes a sample of the largest output of any leaf module."""
    largest = [x.numel()]

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            largest.append(output.numel())

    _run(model, x, [m.register_forward_hook(hook) for m in model.modules() if not list(m.children())])
    return 4 * max(largest) // len(x)


def _run(model: torch.nn.Module, x: torch.Tensor, hooks: list[torch.utils.hooks.RemovableHandle]) -> torch.Tensor:
    try:
        with torch.no_grad():
            return output_tensor(model(x))
    finally:
        for hook in hooks:
            hook.remove()


def repairable(dense: torch.nn.Module, pruned: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names of the pruned model's convolutions and linears that can be solved for, and of its batch norms."""
    own = dict(dense.named_modules())
    layers, norms = {}, {}
    for name, module in pruned.named_modules():
        if type(own.get(name)) is not type(module):
            continue
        convolves = isinstance(module, torch.nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        if convolves or isinstance(module, torch.nn.Linear):
            layers[name] = module
        elif isinstance(module, Norm) and module.running_mean is not None:
            norms[name] = module
    return layers, norms


def record(dense: torch.nn.Module, pruned: torch.nn.Module, cut: Cut, data: Data, *, seed: int = 0) -> Reference:
    """Run the dense model over the calibration samples and keep what the pruned one is to reproduce."""
    samples, num_fit = take_samples(data, dense, seed=seed)
    recorder = _Recorder(dense, pruned, cut, len(samples), num_fit, seed)
    outputs = []
    for start in range(0, len(samples), BATCH_SIZE):
        recorder.start = start
        with Streams(recorder.layers, recorder.norms.values(), recorder.meet):
            outputs.append(_run(dense, samples[start : start + BATCH_SIZE], recorder.hooks()))
    return Reference(
        samples=samples,
        num_fit=num_fit,
        outputs=torch.cat(outputs),
        targets={n: torch.cat(t) for n, t in recorder.targets.items() if recorder.calls[n] == len(outputs)},
        positions=recorder.positions,
        moments={n: recorder.moments_of(n) for n in recorder.sums if recorder.calls[n] == len(outputs)},
        norm_after=recorder.norm_after,
        streams={n: torch.cat(t) for n, t in recorder.streams.items() if len(t) == recorder.calls[n] == len(outputs)},
    )


class _Recorder:
    """Hooks on the dense model, and what they have seen so far."""

    def __init__(
        self, dense: torch.nn.Module, pruned: torch.nn.Module, cut: Cut, num_samples: int, num_fit: int, seed: int
    ) -> None:
        layers, norms = repairable(dense, pruned)
        self.layers = {name: dense.get_submodule(name) for name in layers}
        self.norms: dict[str, Any] = {name: dense.get_submodule(name) for name in norms}
        self.cut, self.num_samples, self.num_fit, self.start = cut, num_samples, num_fit, 0
        total = sum(len(layer.weight) for layer in layers.values())
        self.rows = max(1, min(ROWS, TARGET_ELEMENTS // max(1, total)))
        self.generator = torch.Generator().manual_seed(seed)
        self.calls: Counter[str] = Counter()
        self.targets: dict[str, list[torch.Tensor]] = {}
        self.positions: dict[str, torch.Tensor] = {}
        self.sums: dict[str, list[torch.Tensor]] = {}
        self.norm_after: dict[str, str] = {}
        self.streams: dict[str, list[torch.Tensor]] = {}
        self.latest: tuple[str, torch.Tensor] | None = None

    def hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        self.latest = None
        return [
            *(m.register_forward_hook(self._layer_hook(name)) for name, m in self.layers.items()),
            *(m.register_forward_pre_hook(self._norm_hook(name)) for name, m in self.norms.items()),
        ]

    def kept(self, tensor: str, size: int) -> torch.Tensor:
        indices = self.cut.indices.get((tensor, 0))
        return torch.arange(size) if indices is None else torch.from_numpy(indices)

    def _layer_hook(self, name: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self.calls[name] += 1
            self.latest = (name, output)
            if name not in self.positions:
                self.positions[name] = self._draw(as_rows(module, output, len(inputs[0])).shape[1])
            self.targets.setdefault(name, []).append(self._drawn(name, output))

        return hook

    def meet(self, name: str, branch: torch.Tensor, shortcut: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """A sum that reads the branch which a layer ends: what it gives is kept."""
        return lambda total: self.streams.setdefault(name, []).append(self._drawn(name, total))

    def _drawn(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """float32 [batch, P, kept C]: a layer's output, or what is shaped like it, at the drawn positions."""
        positions = self.positions[name][self.start : self.start + BATCH_SIZE]
        values = drawn_rows(self.layers[name], output, positions)
        return values[:, :, self.kept(f"{name}.weight", values.shape[2])]

    def _draw(self, length: int) -> torch.Tensor:
        """int64 [N, P]: for every sample P of L positions, none twice."""
        each = min(length, ceil(self.rows / self.num_samples))
        if each == length:
            return torch.arange(length).expand(self.num_samples, -1)
        return torch.stack([torch.randperm(length, generator=self.generator)[:each] for _ in range(self.num_samples)])

    def _norm_hook(self, name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, inputs: Any) -> None:
            self.calls[name] += 1
            if self.latest is not None and inputs[0] is self.latest[1]:
                self.norm_after[self.latest[0]] = name
            x = inputs[0][: max(0, self.num_fit - self.start)]
            kept = self.kept(f"{name}.running_mean", x.shape[1])
            by_channel = x.transpose(0, 1).flatten(1)[kept].double()
            new = [torch.tensor(by_channel.shape[1]), by_channel.sum(1), by_channel.square().sum(1)]
            old = self.sums.get(name)
            self.sums[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

        return hook

    def moments_of(self, name: str) -> Moments:
        count, total, squares = self.sums[name]
        norm = self.norms[name]
        mean = total / count
        kept = self.kept(f"{name}.running_mean", len(norm.running_mean))
        return Moments(
            mean=mean,
            var=(squares / count - mean.square()).clamp_min(0),
            running_mean=norm.running_mean[kept].double(),
            running_var=norm.running_var[kept].double(),
        )


def drawn_rows(module: torch.nn.Module, output: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A layer's output at positions int64 [N, P]: [N, P, C]."""
    rows = as_rows(module, output, len(positions))
    return rows[torch.arange(len(rows))[:, None], positions]


def as_rows(module: torch.nn.Module, output: torch.Tensor, num_samples: int) -> torch.Tensor:
    """A layer's output as [N, L, C]."""
    if isinstance(module, torch.nn.Linear):
        return output.reshape(num_samples, -1, output.shape[-1])
    return output.flatten(2).transpose(1, 2)
