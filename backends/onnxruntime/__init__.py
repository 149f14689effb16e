"""ONNX Runtime on the CPU."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.onnxruntime.exporting import export as export
from edgeprune.errors import install_line
from edgeprune.fusion import Unit, fuse

if TYPE_CHECKING:
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel

name = "onnxruntime"
modelled = False


FUSED = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid"})
"""Activations that go into the kernel before them."""


def available() -> str | None:
    return None if util.find_spec("onnxruntime") else f"ONNX Runtime is not installed: {install_line('onnx')}"


def version() -> str | None:
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return None


def runner_path() -> Path:
    return Path(__file__).with_name("runner.py")


def build(kernel: Kernel, folder: Path) -> Path:
    from edgeprune.kernel_onnx import write_kernel

    return write_kernel(kernel, folder)


def partition(graph: ModelGraph, precision: str) -> tuple[Unit, ...]:
    """Convolution and linear take in norm, activation and residual add; what is left runs as a kernel of its own."""
    return fuse(graph, precision, activations=FUSED, adds=True)
