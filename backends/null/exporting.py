"""The null device's model file: the kernels of the network and what each would take; no weights, nothing to compute."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends.null.staircase import NULL, document
from edgeprune.engine import Engine
from edgeprune.measurement import TensorSpec

if TYPE_CHECKING:
    import torch

    from edgeprune.engine import Calibration
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned
    from edgeprune.roofline import Roofline


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
    roofline: Roofline = NULL,
) -> Engine:
    """Write model.json for the `kernels` of the pruned network."""
    if not kernels:
        raise ValueError("a modelled device's time is a sum over kernels: pass those of the pruned network")
    inputs, outputs = _specs(pruned)
    path = folder / "model.json"
    described = document(kernels, [asdict(spec) for spec in inputs], [asdict(spec) for spec in outputs], roofline)
    path.write_text(json.dumps(described) + "\n", encoding="utf-8")
    return Engine(
        backend="null",
        precision=precision,
        path=path,
        files=(path,),
        onnx=None,
        inputs=inputs,
        outputs=outputs,
        notes={"weights": "none", "numbers": "modelled"},
    )


def _specs(pruned: Pruned) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    import torch

    with torch.no_grad():
        result = pruned.module(*pruned.example_inputs)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    names = list(inspect.signature(pruned.module.forward).parameters)
    inputs = tuple(_spec(name, tensor) for name, tensor in zip(names, pruned.example_inputs, strict=False))
    if len(results) == 1:
        return inputs, (_spec("output", results[0]),)
    return inputs, tuple(_spec(f"output_{index}", tensor) for index, tensor in enumerate(results))


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
