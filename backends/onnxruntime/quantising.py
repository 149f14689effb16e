"""Networks in int8 as ONNX Runtime computes them: all that it has kernels for, or contractions alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.layer_norms import has_layer_norm_in_onnx

if TYPE_CHECKING:
    import onnx

    from edgeprune.engine import Calibration


def quantised(model: onnx.ModelProto, calibration: Calibration) -> onnx.ModelProto:
    """The float32 model in the form that the runtime computes in int8, with ranges found on batches of its inputs."""
    from edgeprune import onnx_int8
    from edgeprune.onnx_equivalents import gemms_for_linears, pools_for_means
    from edgeprune.onnx_quantise import ONNXRUNTIME, ONNXRUNTIME_LAYER_NORMS, quantise, quantise_lookups

    if has_layer_norm_in_onnx(model):
        made = quantise(gemms_for_linears(model), calibration, onnx_int8.ONNXRUNTIME, ONNXRUNTIME_LAYER_NORMS)
        return quantise_lookups(made)
    return quantise(pools_for_means(model), calibration, onnx_int8.ONNXRUNTIME, ONNXRUNTIME)
