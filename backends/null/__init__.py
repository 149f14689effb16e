"""A runtime that isn't there: a documented staircase in place of a clock. Its numbers are *modelled*."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.null.exporting import export as export
from edgeprune.backends.null.staircase import NULL, VERSION, document
from edgeprune.fusion import fuse
from edgeprune.unit import Unit

if TYPE_CHECKING:
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel
    from edgeprune.roofline import Roofline

name = "null"
modelled = True
kernels = 1


FUSED = frozenset({"relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu"})
"""Activations that go into the kernel before them."""


def available() -> str | None:
    return None


def version() -> str | None:
    return VERSION


def runner_path() -> Path:
    return Path(__file__).with_name("runner.py")


def build(kernel: Kernel, folder: Path, roofline: Roofline = NULL) -> Path:
    path = folder / f"{kernel.operator}_{zlib.crc32(kernel.key.encode()):08x}.json"
    path.write_text(json.dumps(document([kernel], roofline=roofline)) + "\n")
    return path


def partition(graph: ModelGraph, precision: str) -> tuple[Unit, ...]:
    """Convolution and linear take in norm, activation and residual add; what is left runs as a kernel of its own."""
    return fuse(graph, precision, activations=FUSED, adds=True)
