"""Hand-made networks in the form that `export` takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import nn

from edgeprune.errors import UnstableError
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned

Measured = TypeVar("Measured")


class Zeros(nn.Module):
    """What stands in the place of a dropped block."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(self.shape)


class Residual(nn.Module):
    """relu(f(x) + x); `inplace` and the order of the add as networks in the wild have them."""

    def __init__(self, branch: nn.Module, *, inplace: bool) -> None:
        super().__init__()
        self.branch = branch
        self.inplace = inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.branch(x)
        if self.inplace:
            y += x
            return nn.functional.relu_(y)
        return nn.functional.relu(x + y)


class Net(nn.Module):
    """conv-bn-relu, two residual blocks, mean, linear: 3x16x16 to 10."""

    def __init__(self, width: int = 8, *, dropped: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        first: nn.Module = Zeros((1, width, 16, 16)) if dropped else branch(width)
        second: nn.Module = Zeros((1, width, 16, 16)) if dropped else branch(width)
        self.blocks = nn.Sequential(Residual(first, inplace=True), Residual(second, inplace=False))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(torch.relu(self.norm(self.conv(x))))
        logits: torch.Tensor = self.head(y.mean((2, 3)))
        return logits


def branch(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )


def redrawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer drawn again, so that outputs are of order one and depend on all of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator)
            positive = name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1)
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
            tensor.copy_(drawn.abs() + 0.5 if positive else drawn / fan_in**0.5)
    return module.eval()


def pruned(module: nn.Module, shape: tuple[int, ...] = (1, 3, 16, 16), *, empty: bool = False) -> Pruned:
    """As if `apply` had cut a larger network."""
    inputs = (torch.randn(shape, generator=torch.Generator().manual_seed(1)),)
    plan = Plan(structure_hash="0" * 64, dropped=() if empty else ("blocks.0",))
    return Pruned(module=module.eval(), plan=plan, example_inputs=inputs, origin="0" * 64)


class Words(nn.Module):
    """An embedding of 100 words, a residual MLP, mean, linear: token ids [N, 16] to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        logits: torch.Tensor = self.head((x + self.down(torch.relu(self.up(x)))).mean(1))
        return logits


def words() -> nn.Module:
    return redrawn(Words())


def plain() -> nn.Module:
    """Four times conv-norm-relu, mean, linear: 3x32x32 to 10."""
    torch.manual_seed(0)

    def layer(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

    body = [layer(3, 64), layer(64, 96), layer(96, 96), layer(96, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def patiently(measure: Callable[[], Measured]) -> Measured:
    """The result of a measurement on a real runtime; a busy machine may refuse an answer twice, but not three times."""
    for _ in range(2):
        with suppress(UnstableError):
            return measure()
    return measure()
