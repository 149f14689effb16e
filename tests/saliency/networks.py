"""Networks that are small enough to value by hand."""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.data import Data, as_data
from edgeprune.graph import ModelGraph, trace


def sequence(x: list[list[float]], *weights: list[list[float]]) -> tuple[nn.Sequential, ModelGraph]:
    """Linears without bias behind one another, traced for inputs of the shape of `x` with a batch of 1."""
    model = nn.Sequential(*(nn.Linear(len(w[0]), len(w), bias=False) for w in weights)).eval()
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.tensor(weight))
    return model, trace(model, (torch.ones(1, *torch.tensor(x).shape[1:]),))


def samples(*x: list[float] | list[list[float]], labels: list[int] | None = None) -> Data:
    """One batch; with labels where given."""
    tensor = torch.tensor(x)
    return as_data([tensor] if labels is None else [(tensor, torch.tensor(labels))])


FIRST = [[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]
"""On (1, 2): hidden 3, 4, 2; on (-1, 1): 0, 2, -2."""
SECOND = [[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
EVEN = [[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]
"""On hidden 3, 4, 2: logits 8, 8, so that both classes have the probability 1/2."""
HIDDEN = "0.weight:0"


def tokens() -> tuple[nn.Sequential, ModelGraph, Data]:
    """Two tokens (1, 2) and (-1, 1), which the hidden layer turns into (3, 4, 2) and (0, 2, -2)."""
    model, graph = sequence([[[0.0, 0.0], [0.0, 0.0]]], FIRST, SECOND)  # type: ignore[list-item]
    return model, graph, samples([[1.0, 2.0], [-1.0, 1.0]])


def even() -> tuple[nn.Sequential, ModelGraph, Data]:
    """One sample (1, 2) of class 0, with p = (1/2, 1/2), so that the logits' gradient is d = p - y = (-1/2, 1/2).

    Then W2ᵀ d = (-1, 1/2, 1/2), and the gates' derivatives are hidden · W2ᵀ d = (-3, 2, 1).
    """
    model, graph = sequence([[0.0, 0.0]], FIRST, EVEN)
    return model, graph, samples([1.0, 2.0], labels=[0])


def scalar() -> tuple[nn.Sequential, ModelGraph, Data]:
    """One input 1, hidden u = (1, 2), logits (1, 1), class 0: L = log(1 + e^-s), s = Σ u_c v_c, v = (2, -1).

    At s = 0 L' = -1/2 and L'' = 1/4. With a, b the two rows of the second layer v = a - b, and ∂s/∂(u_c, a_c, b_c) =
    (v_c, u_c, -u_c); the only second derivatives of s are ∂²s/∂u_c∂a_c = 1 and ∂²s/∂u_c∂b_c = -1.
    """
    model, graph = sequence([[0.0]], [[1.0], [2.0]], [[1.0, 0.0], [-1.0, 1.0]])
    return model, graph, samples([1.0], labels=[0])


class Residual(nn.Module):
    """Convolutions beside a shortcut, a stream that two contractions read, a classifier at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.outer = nn.Conv2d(4, 6, 1)
        self.last = nn.Conv2d(6, 7, 3)
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu_(self.depthwise(torch.relu_(self.inner(x)))))
        x = torch.relu(self.last(x)).mean((2, 3))
        logits: torch.Tensor = self.head(x)
        return logits


def residual(shape: tuple[int, ...] = (1, 3, 8, 8)) -> tuple[Residual, ModelGraph]:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
        assert model.norm.running_var is not None
        model.norm.running_var.uniform_(0.5, 1.5)
        model.norm.weight.uniform_(0.5, 1.5)
    return model, trace(model, (torch.randn(shape),))


def pictures(count: int = 8) -> Data:
    """Normal, 3 x 8 x 8, of 5 classes."""
    generator = torch.Generator().manual_seed(3)
    return as_data([(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 5)])


class Attention(nn.Module):
    """A residual attention of 2 heads x 3 and an MLP over 5 tokens of 6: groups that only matmuls read."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.embed = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.project = nn.Linear(6, 6)
        self.wide, self.narrow = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        x = x + self.narrow(torch.relu(self.wide(x)))
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


def attention() -> tuple[Attention, ModelGraph, Data]:
    torch.manual_seed(0)
    model = Attention().eval()
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(3))
    return model, trace(model, (x[:1],)), as_data([(x, torch.arange(6) % 3)])


class Turned(nn.Module):
    """A stream (3, 4) and a branch that turns it by a right angle: x + f(x) = (-1, 7), read as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.turn, self.head = (nn.Linear(2, 2, bias=False) for _ in range(3))
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(2))
            self.turn.weight.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
            self.head.weight.copy_(torch.eye(2) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        logits: torch.Tensor = self.head(x + self.turn(x))
        return logits


def turned() -> tuple[nn.Module, ModelGraph, Data]:
    """Logits (-0.1, 0.7) with the block, (0.3, 0.4) without."""
    model = nn.Sequential(Turned()).eval()
    return model, trace(model, (torch.ones(1, 2),)), samples([3.0, 4.0], labels=[0])
