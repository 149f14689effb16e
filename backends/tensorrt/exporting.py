"""TensorRT takes ONNX: an engine loads only where it was built, so the device builds it, by the recipe beside it."""

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

RECIPE = "build_engine.sh"
_RECIPE = """\
#!/bin/sh
# Builds model.engine from model.onnx with the trtexec of this device ($TRTEXEC, or the one on the PATH).
# An engine loads only where it was built: same GPU, same TensorRT. Arithmetic: {precision}; it lives in the ONNX.
set -e
cd "$(dirname "$0")"
trtexec="${{TRTEXEC:-trtexec}}"
help="$("$trtexec" --help 2>&1 || true)"
knows() {{ case "$help" in *"$1"*) return 0 ;; *) return 1 ;; esac; }}
set -- --onnx=model.onnx --saveEngine=model.engine --sparsity=enable --noTF32
if knows --skipInference; then set -- "$@" --skipInference; else set -- "$@" --buildOnly; fi
case "$help" in
*"[TensorRT v11"*) ;; # always strongly typed
*) if knows --stronglyTyped; then set -- "$@" --stronglyTyped{weakly_typed}; fi ;;
esac
exec "$trtexec" "$@"
"""


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
) -> Engine:
    """Write model.onnx and build_engine.sh. For fp16 weights and activations are half precision in the ONNX itself.

    Inputs and outputs keep their types: what a model takes does not depend on its precision.
    """
    from edgeprune.onnx_export import onnx_from_module
    from edgeprune.onnx_half import to_half

    check_exportable(precision)
    if weights not in ("fp32", precision):
        raise InputError(f"TensorRT takes weights in the precision of the arithmetic ({precision}), not {weights!r}")
    model = onnx_from_module(pruned.module, pruned.example_inputs)
    if precision == "fp16":
        model = to_half(model)
    path = write_onnx(model, folder)
    recipe = folder / RECIPE
    weakly_typed = '; else set -- "$@" --fp16' if precision == "fp16" else ""
    recipe.write_text(_RECIPE.format(precision=precision, weakly_typed=weakly_typed), encoding="utf-8")
    recipe.chmod(0o755)
    return Engine(
        backend="tensorrt",
        precision=precision,
        path=path,
        files=(path, recipe),
        onnx=path,
        inputs=specs_of_onnx(model.graph.input),
        outputs=specs_of_onnx(model.graph.output),
        notes={"weights": precision, "engine": "built on the device"},
    )
