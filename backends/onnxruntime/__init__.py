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


NEEDED = ("onnxruntime", "onnx", "onnxscript", "onnxslim")
FUSED = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid"})
"""Activations that go into the kernel before them."""


def available() -> str | None:
    missing = [package for package in NEEDED if util.find_spec(package) is None]
    return f"{', '.join(missing)} not installed: {install_line('onnx')}" if missing else None


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
