"""ONNX Runtime on the CPU."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.onnxruntime.exporting import export as export
from edgeprune.engine import ONNX_PACKAGES
from edgeprune.errors import not_installed
from edgeprune.fusion import fuse
from edgeprune.layer_norms import has_layer_norm
from edgeprune.precision import ACTIVATIONS, KINDS, check_computes
from edgeprune.unit import Unit

if TYPE_CHECKING:
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel

name = "onnxruntime"
modelled = False
kernels = 2


DEVICE_PACKAGE = "onnxruntime"
FUSED = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid"})
"""Activations that go into the kernel before them."""
FLOAT = frozenset(f"activation {name}" for name in ACTIVATIONS if name not in ("sigmoid", "silu"))
COMPUTES = {"fp32": KINDS, "int8": KINDS - {"attention", "layer_norm"} - FLOAT}
"""What runs in which precision on a CPU. Of attention in int8 the matmuls and the softmax are, with a way to float and
back between them; a clamp vanishes in int8, and is in float only where nothing is before it."""
BESIDE_LAYER_NORMS = {"int8": frozenset({"conv", "linear"})}
"""Of networks with layer norms the contractions alone are in int8 (`quantising`), without what is behind them."""
FUSED_INT8 = frozenset({"relu", "relu6"})
"""Activations that vanish into the range of the integers before them; a residual add is a node of its own in int8."""


def available() -> str | None:
    return not_installed(["onnxruntime", *ONNX_PACKAGES], "onnx")


def missing_packages(precision: str = "fp32") -> str | None:
    """What writing engines in a precision needs and isn't there, with the line that installs it."""
    return available() if precision == "int8" else not_installed(ONNX_PACKAGES, "onnx")  # it is its own quantiser


def version() -> str | None:
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return None


def least_version(path: Path) -> str | None:
    """Of ONNX Runtime that reads an ONNX file, by its IR version and operator set; None for newer ones than known."""
    from edgeprune.runtime_versions import onnxruntime_for

    return onnxruntime_for(path)


def runner_path() -> Path:
    return Path(__file__).with_name("runner.py")


def build(kernel: Kernel, folder: Path) -> Path:
    """An ONNX file. Inputs come out of a node, in blocks, where it matters: no residual that is plain is fused."""
    from edgeprune.kernel_onnx import write_kernel
    from edgeprune.onnx_int8 import ONNXRUNTIME

    check_computes(kernel, COMPUTES, "ONNX Runtime")
    return write_kernel(kernel, folder, ONNXRUNTIME, makes_input=kernel.precision != "int8")


def partition(graph: ModelGraph, precision: str) -> tuple[Unit, ...]:
    """Convolution and linear take in norm, then residual add, then activation; what is left is a kernel of its own."""
    if precision != "int8":
        return fuse(graph, precision, activations=FUSED, adds=True, computes=COMPUTES)
    if has_layer_norm(graph):
        return fuse(graph, precision, activations=frozenset(), adds=False, computes=BESIDE_LAYER_NORMS)
    return fuse(graph, precision, activations=FUSED_INT8, adds=False, computes=COMPUTES)
