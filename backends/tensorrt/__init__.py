"""TensorRT on an NVIDIA GPU, through `trtexec` on the device. `tensorrt_python` is its Python module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.tensorrt.exporting import export as export
from edgeprune.engine import ONNX_PACKAGES
from edgeprune.errors import not_installed
from edgeprune.fusion import fuse
from edgeprune.precision import KINDS, check_computes
from edgeprune.unit import Unit

if TYPE_CHECKING:
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel

name = "tensorrt"
modelled = False
kernels = 1

DEVICE_INSTALL = (
    "on a Jetson sudo apt-get install nvidia-jetpack (its TensorRT brings /usr/src/tensorrt/bin/trtexec), elsewhere "
    "TensorRT 8.5 or later (developer.nvidia.com/tensorrt), with trtexec on the PATH or named by $TRTEXEC"
)
QUANTISER = "onnxruntime"
CLAMPS = frozenset({"relu", "relu6"})
FUSED = {"fp32": CLAMPS, "fp16": CLAMPS | {"gelu"}, "int8": CLAMPS}
"""Activations that go into the contraction before them, as NVIDIA's catalogue of fusions has it: ReLU and Clip always,
GELU in half precision. Any other becomes a pointwise kernel of its own."""
COMPUTES = {
    "fp32": KINDS,
    "fp16": KINDS,
    "int8": frozenset({"conv", "linear", "matmul", "max_pool", "avg_pool", "add"}),
}
"""What runs in which precision; int8 as NVIDIA's guide to explicit quantisation lists it, not yet seen on a GPU."""


def available() -> str | None:
    from edgeprune.backends.tensorrt.runner import find_trtexec

    if find_trtexec() is None:
        named = os.environ.get("TRTEXEC")
        where = f"$TRTEXEC is {named}" if named else "not on the PATH, nor where JetPack has it"
        return f"no trtexec ({where}): install TensorRT 8.5 or later (developer.nvidia.com/tensorrt), or set TRTEXEC"
    return missing_packages()


def missing_packages(precision: str = "fp32") -> str | None:
    """What writing engines in a precision needs and isn't there, with the line that installs it."""
    return not_installed([*ONNX_PACKAGES, QUANTISER] if precision == "int8" else ONNX_PACKAGES, "onnx")


def version() -> str | None:
    from edgeprune.backends.tensorrt import runner

    try:
        return runner.version()
    except RuntimeError:
        return None


def least_version(path: Path) -> str | None:
    """The oldest whose `trtexec` the runner knows."""
    return "8.5"


def runner_path() -> Path:
    return Path(__file__).with_name("runner.py")


def build(kernel: Kernel, folder: Path) -> Path:
    """An ONNX file: its engine is built on the device."""
    from edgeprune.kernel_onnx import write_kernel
    from edgeprune.onnx_int8 import TENSORRT

    check_computes(kernel, COMPUTES, "TensorRT")
    return write_kernel(kernel, folder, TENSORRT)


def partition(graph: ModelGraph, precision: str) -> tuple[Unit, ...]:
    """Convolution and linear take in norm, activation and residual add; what is left runs as a kernel of its own."""
    return fuse(graph, precision, activations=FUSED[precision], adds=True, computes=COMPUTES)
