"""What a trap is, and the decorator that puts one into the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Sizes = tuple[int, ...]
Answer = int | Sizes | list[Sizes]
T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Trap:
    """A small network that is easy to get wrong, with the answer worked out by hand.

    `groups` gives for a dimension of a parameter ("conv.weight:0") the sorted numbers of channels of the groups that
    it belongs to, several answers where several are sound; `()` is a dimension that stays whole. Without any entry
    the whole model is refused. `refused` is part of the name of an operator among the refusals.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    groups: Mapping[str, tuple[Sizes, ...]]
    refused: str | None


TRAPS: dict[str, Trap] = {}


class Net(nn.Module):
    """A forward over the layers, parameters, buffers and plain attributes that it is given."""

    def __init__(self, function: Callable[..., Any], attributes: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def random(*shape: int) -> Tensor:
    """The same float32 values for the same shape, every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


IMAGE = (random(2, 3, 4, 4),)
TOKENS = (random(2, 5, 8),)  # batch, tokens, features
WORDS = (torch.arange(10).reshape(2, 5) % 7,)


def trap(
    attributes: Callable[[], dict[str, Any]] | None = None,
    *,
    inputs: tuple[Tensor, ...] = IMAGE,
    groups: Mapping[str, Answer] | None = None,
    refused: str | None = None,
) -> Callable[[T], T]:
    """Register a forward over `attributes`, or a module class, under its name.

    A group's answer is a number of channels, a tuple of them, or a list of tuples, each of which is sound.
    """

    def register(function: T) -> T:
        def build() -> nn.Module:
            model = function() if attributes is None else Net(function, attributes())
            assert isinstance(model, nn.Module)
            return model

        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", function.__name__).lower()
        assert name not in TRAPS, name
        answers = {key: _answers(value) for key, value in (groups or {}).items()}
        TRAPS[name] = Trap(build=build, inputs=inputs, groups=answers, refused=refused)
        return function

    return register


def _answers(value: Answer) -> tuple[Sizes, ...]:
    if isinstance(value, int):
        return ((value,),)
    return tuple(tuple(sorted(sizes)) for sizes in (value if isinstance(value, list) else [value]))


def conv(c_in: int, c_out: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the picture."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)
