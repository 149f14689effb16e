"""OpenVINO: Intel CPUs (and any x86-64 or Arm CPU that the package runs on), through the IR or ONNX."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.openvino.exporting import export as export
from edgeprune.engine import ONNX_PACKAGES
from edgeprune.errors import not_installed
from edgeprune.fusion import fuse
from edgeprune.precision import KINDS, check_computes
from edgeprune.unit import Unit

if TYPE_CHECKING:
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel

name = "openvino"
modelled = False
kernels = 2


DEVICE_PACKAGE = "openvino"
NEEDED = ("openvino", *ONNX_PACKAGES)
QUANTISER = "nncf"
FUSED = frozenset({"relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu"})
"""Activations that go into the kernel before them; a hard sigmoid stays behind where those are integers."""
COMPUTES = {
    "fp32": KINDS,
    "bf16": frozenset({"conv", "linear", "matmul", "attention"}),
    "int8": KINDS - {"attention", "layer_norm", "softmax", "activation hardsigmoid"},
}
"""What runs in which precision. bf16 needs a CPU with AVX512-BF16 or AMX; alone, all but contractions stay fp32 in it.
Of attention in int8 only the first matmul is."""


def available() -> str | None:
    return not_installed(NEEDED, "openvino")


def missing_packages(precision: str = "fp32") -> str | None:
    """What writing engines in a precision needs and isn't there, with the line that installs it."""
    return not_installed([*NEEDED, QUANTISER] if precision == "int8" else NEEDED, "openvino")


def version() -> str | None:
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


def least_version(path: Path) -> str | None:
    """Of OpenVINO that reads an IR, by the newest operation set in it; None for one that is not in the table."""
    from edgeprune.runtime_versions import openvino_for

    return openvino_for(path.read_text(encoding="utf-8"))


def runner_path() -> Path:
    return Path(__file__).with_name("runner.py")


def build(kernel: Kernel, folder: Path) -> Path:
    """An ONNX file: OpenVINO reads it by itself, as fast as its own format.

    Inputs come out of a node, channels last where it prefers that: pools of a plain input take three times as long.
    """
    from edgeprune.kernel_onnx import write_kernel
    from edgeprune.onnx_int8 import OPENVINO

    check_computes(kernel, COMPUTES, "OpenVINO")
    return write_kernel(kernel, folder, OPENVINO, makes_input=kernel.precision != "int8")


def partition(graph: ModelGraph, precision: str) -> tuple[Unit, ...]:
    """Convolution and linear take in norm, then residual add, then activation; what is left is a kernel of its own."""
    activations = FUSED - {"hardsigmoid"} if precision == "int8" else FUSED
    return fuse(graph, precision, activations=activations, adds=True, computes=COMPUTES)
