"""ONNX Runtime takes the ONNX file as it is; what it makes of it in memory depends on the machine and stays there."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.onnxruntime.quantising import quantised
from edgeprune.engine import Engine, specs_of_onnx, write_onnx
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from edgeprune.engine import Calibration
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned

WEIGHTS = ("fp32", "fp16")


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
) -> Engine:
    """Write model.onnx. `weights="fp16"` halves it; they become fp32 again when it is loaded.

    In int8 it is quantised, with ranges found on `calibration`. In fp16 all arithmetic is, where the provider that runs
    it has such kernels: the one for CPUs has few, and widens the rest when it loads the file.
    """
    from edgeprune.onnx_export import onnx_from_module
    from edgeprune.onnx_half import halve_weights, to_half

    if weights not in WEIGHTS:
        raise InputError(f"ONNX Runtime can't store weights as {weights!r}; known: {', '.join(WEIGHTS)}")
    model = onnx_from_module(pruned.module, pruned.example_inputs)
    notes = {"weights": weights}
    if precision == "int8":
        model = quantised(model, calibration)
        by = f"onnxruntime {metadata.version('onnxruntime')}, {len(calibration)} batches"
        notes = {"weights": "int8", "quantised by": by}
    elif precision == "fp16":
        model, notes = to_half(model), {"weights": "fp16"}
    elif weights == "fp16":
        model = halve_weights(model)
    path = write_onnx(model, folder)
    return Engine(
        backend="onnxruntime",
        precision=precision,
        path=path,
        files=(path,),
        onnx=path,
        inputs=specs_of_onnx(model.graph.input),
        outputs=specs_of_onnx(model.graph.output),
        notes=notes,
    )
