"""TensorRT, or TensorRT for RTX, through its Python module: one process, so runs are timed as those of other runtimes.

What is built, fused and exported is the same as through `trtexec`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends import tensorrt
from edgeprune.backends.tensorrt import build as build
from edgeprune.backends.tensorrt import missing_packages as missing_packages
from edgeprune.backends.tensorrt import partition as partition
from edgeprune.errors import install_line

if TYPE_CHECKING:
    from edgeprune.engine import Calibration, Engine
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned

name = "tensorrt_python"
modelled = False
kernels = 1

DEVICE_INSTALL = (
    "on a Jetson sudo apt-get install nvidia-jetpack (its python3-libnvinfer is for the system's python3), elsewhere "
    "pip install tensorrt-rtx-cu12, or TensorRT's own wheel (developer.nvidia.com/tensorrt)"
)
MODULES = ("tensorrt", "tensorrt_rtx")
DISTRIBUTIONS = ("tensorrt", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12")


def available() -> str | None:
    if not any(map(util.find_spec, MODULES)):
        return f"neither tensorrt (comes with TensorRT) nor tensorrt_rtx is importable: {install_line('tensorrt-rtx')}"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 can't be loaded): nvidia-smi must work first"
    return missing_packages()


def version() -> str | None:
    for distribution in DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def runner_path() -> Path:
    return Path(__file__).with_name("runner.py")


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
) -> Engine:
    """The files that `trtexec` takes too."""
    engine = tensorrt.export(pruned, folder, precision, kernels=kernels, weights=weights, calibration=calibration)
    return replace(engine, backend=name)
