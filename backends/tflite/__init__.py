"""LiteRT (TensorFlow Lite) on the CPU, with XNNPACK unless the device's options say otherwise."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.tflite.exporting import export as export
from edgeprune.errors import not_installed
from edgeprune.fusion import fuse
from edgeprune.layer_norms import has_layer_norm
from edgeprune.precision import KINDS, check_computes
from edgeprune.unit import Unit

if TYPE_CHECKING:
    from edgeprune.graph import ModelGraph
    from edgeprune.kernel import Kernel

name = "tflite"
modelled = False
kernels = 1


DEVICE_PACKAGE = "ai-edge-litert"
NEEDED = ("ai_edge_litert", "ai_edge_quantizer", "litert_torch")  # the quantiser in fp32 too, for weights in int8
FUSED = frozenset({"relu", "relu6"})
"""Activations that go into the operator before them: the format has clamps and nothing else."""
BESIDE_LAYER_NORMS = {"int8": frozenset({"conv", "linear"})}
"""Of networks with layer norms the contractions alone are in int8, on both of their sides."""
COMPUTES = {"fp32": KINDS, "int8": KINDS - {"attention", "layer_norm"}}
"""What runs in which precision. Not fp16: weights stored in half precision are widened before anything is computed."""


def available() -> str | None:
    return not_installed(NEEDED, "litert")


def version() -> str | None:
    try:
        return metadata.version("ai-edge-litert")
    except metadata.PackageNotFoundError:
        return None


def runner_path() -> Path:
    return Path(__file__).with_name("runner.py")


def build(kernel: Kernel, folder: Path) -> Path:
    """The flatbuffer itself, in milliseconds; the converter would take seconds."""
    from edgeprune.kernel_tflite import write_kernel

    check_computes(kernel, COMPUTES, "LiteRT")
    return write_kernel(kernel, folder)


def partition(graph: ModelGraph, precision: str) -> tuple[Unit, ...]:
    """Convolution and linear take in norm and clamp; a residual add and any other activation run on their own."""
    computes = BESIDE_LAYER_NORMS if precision == "int8" and has_layer_norm(graph) else COMPUTES
    return fuse(graph, precision, activations=FUSED, adds=False, computes=computes)
