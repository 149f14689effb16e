"""All entries of the zoo by name; a library is imported only when one of its models is built or listed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fnmatch import fnmatch

import torch
from torch import Tensor

Built = tuple[torch.nn.Module, tuple[Tensor, ...]]

MODULES = {"torchvision": "zoo_torchvision", "timm": "zoo_timm", "hf": "zoo_transformers", "trap": "zoo_traps"}


def entries(prefix: str) -> dict[str, Callable[[], Built]]:
    """Name to builder, of the models whose names start with `prefix:`."""
    zoo: dict[str, Callable[[], Built]] = importlib.import_module(f"benchmarks.coverage.{MODULES[prefix]}").ENTRIES
    return zoo


def names(patterns: list[str]) -> list[str]:
    """Names that match any of the patterns (`torchvision:*`, or a part of the name); all where there is none."""
    found = [name for prefix in MODULES for name in entries(prefix)]
    if not patterns:
        return found
    return [name for name in found if any(fnmatch(name, p) or ("*" not in p and p in name) for p in patterns)]


def build(name: str) -> Built:
    """Model in evaluation mode and example inputs, from a fixed seed. `KeyError` where there is no such entry."""
    torch.manual_seed(0)
    model, inputs = entries(name.partition(":")[0])[name]()
    return model.eval(), inputs
