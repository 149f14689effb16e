"""A whole network in int8 for OpenVINO: post-training quantisation by NNCF, which knows what OpenVINO runs as integers.

It puts a FakeQuantize where OpenVINO takes integers, with ranges found on data, and corrects biases for the mean error.
Weights take half of their range: on CPUs without VNNI two products are added in 16 bits, which saturate otherwise.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from edgeprune.errors import EdgepruneError, RuntimeMissing, install_line

if TYPE_CHECKING:
    from edgeprune.engine import Calibration

CORRECTED = 4
"""Batches from which on biases are corrected: fewer say nothing about a mean, and an engine that is only timed needs
none."""


def quantise(model: Any, calibration: Calibration) -> Any:
    """An `openvino.Model` of float32 in int8; `calibration` are batches of its inputs in order."""
    from edgeprune.onnx_export import first_line, quiet

    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use over the network
    with quiet():
        try:
            import nncf
        except ImportError as error:
            raise RuntimeMissing(
                f"nncf, which quantises for OpenVINO, is missing: {install_line('openvino')}"
            ) from error
        names = [port.get_any_name() for port in model.inputs]
        batches = [{name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)} for batch in calibration]
        advanced = nncf.AdvancedQuantizationParameters(
            disable_bias_correction=len(batches) < CORRECTED, overflow_fix=nncf.OverflowFix.ENABLE
        )
        try:
            return nncf.quantize(
                model,
                nncf.Dataset(batches),
                subset_size=len(batches),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER if _has_attention(model) else None,
                advanced_parameters=advanced,
            )
        except Exception as error:  # of many kinds, from the quantiser and from the runtime that it calls
            raise EdgepruneError(f"nncf can't quantise the model: {first_line(error)}") from error


def _has_attention(model: Any) -> bool:
    """A softmax between matmuls: NNCF leaves more of such a network in float, and smooths its activations."""
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    return "ScaledDotProductAttention" in kinds or ("Softmax" in kinds and "MatMul" in kinds[kinds.index("Softmax") :])
