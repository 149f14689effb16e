"""ONNX Runtime takes the ONNX file as it is; what it makes of it in memory depends on the machine and stays there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.engine import Engine, specs_of_onnx, write_onnx
from edgeprune.errors import InputError
from edgeprune.precision import check_exportable

if TYPE_CHECKING:
    from edgeprune.engine import Calibration
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
) -> Engine:
    """Write model.onnx."""
    from edgeprune.onnx_export import onnx_from_module

    check_exportable(precision)
    if weights != "fp32":
        raise InputError(f"the export for ONNX Runtime can't store weights as {weights!r} yet; known: fp32")
    model = onnx_from_module(pruned.module, pruned.example_inputs)
    path = write_onnx(model, folder)
    return Engine(
        backend="onnxruntime",
        precision=precision,
        path=path,
        files=(path,),
        onnx=path,
        inputs=specs_of_onnx(model.graph.input),
        outputs=specs_of_onnx(model.graph.output),
        notes={"weights": "fp32"},
    )
