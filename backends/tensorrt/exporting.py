"""TensorRT takes ONNX: an engine loads only where it was built, so the device builds it, by the recipe beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.engine import Engine, specs_of_onnx, write_onnx
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from edgeprune.engine import Calibration
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned

RECIPE = "build_engine.sh"
_RECIPE = """\
#!/bin/sh
# Builds model.engine from model.onnx with the trtexec of this device ($TRTEXEC, or the one on the PATH):
#     sh build_engine.sh [FOLDER]   FOLDER is <this folder>.built beside this one unless told: a bundle stays as it is
# With it come layers_model.json and profile_model.json, as trtexec's --exportLayerInfo and --exportProfile write them.
# An engine loads only where it was built: same GPU, same TensorRT. Arithmetic: {precision}; it lives in the ONNX.
set -e
here="$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)"
out="${{1:-$here.built}}"
mkdir -p "$out"
out="$(CDPATH="" cd -- "$out" && pwd)"
trtexec="${{TRTEXEC:-trtexec}}"
help="$("$trtexec" --help 2>&1 || true)"
knows() {{ case "$help" in *"$1"*) return 0 ;; *) return 1 ;; esac; }}
set -- --onnx="$here/model.onnx" --saveEngine="$out/model.engine" --sparsity=enable --noTF32
set -- "$@" --profilingVerbosity=detailed --exportLayerInfo="$out/layers_model.json"
if knows --skipInference; then set -- "$@" --skipInference; else set -- "$@" --buildOnly; fi
case "$help" in
*"[TensorRT v11"*) ;; # always strongly typed
*) if knows --stronglyTyped; then set -- "$@" --stronglyTyped{weakly_typed}; fi ;;
esac
"$trtexec" "$@"
set -- --loadEngine="$out/model.engine" --dumpProfile --exportProfile="$out/profile_model.json"
case "$help" in
*"[TensorRT v11"*) ;; # always a run of its own
*) set -- "$@" --separateProfileRun ;;
esac
exec "$trtexec" "$@" --iterations=50 --duration=0
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

    In int8 it is quantised, with ranges found on `calibration`, symmetric as TensorRT takes them, and all that is not
    is half precision.

    Inputs and outputs keep their types: what a model takes does not depend on its precision.
    """
    from edgeprune import onnx_int8
    from edgeprune.onnx_export import onnx_from_module
    from edgeprune.onnx_half import to_half
    from edgeprune.onnx_quantise import TENSORRT, quantise

    if weights not in ("fp32", precision):
        raise InputError(f"TensorRT takes weights in the precision of the arithmetic ({precision}), not {weights!r}")
    model = onnx_from_module(pruned.module, pruned.example_inputs)
    notes = {"weights": precision, "engine": "built on the device"}
    if precision == "int8":
        model = quantise(model, calibration, onnx_int8.TENSORRT, TENSORRT)
        notes["quantised by"] = f"onnxruntime {metadata.version('onnxruntime')}, {len(calibration)} batches"
    if precision in ("fp16", "int8"):
        model = to_half(model)
    path = write_onnx(model, folder)
    recipe = folder / RECIPE
    flags = {"fp16": "--fp16", "int8": "--int8 --fp16"}.get(precision)
    weakly_typed = f'; else set -- "$@" {flags}' if flags else ""
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
        notes=notes,
    )
