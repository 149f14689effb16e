"""A TFLite file in int8, as LiteRT's specification of quantised operators has it: int8 everywhere, int32 biases.

Weights are symmetric with a scale for each output channel, activations have one scale a tensor; ranges are those of
`onnx_int8`, for kernels with random weights. An operator with int8 tensors computes in int8 or the file doesn't load.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeprune.onnx_int8 import LIMIT, quantised
from edgeprune.tflite_file import Quantisation, Tensor, TfliteFile

SIGNED = Quantisation(scales=(LIMIT / 127,), zero=0)
POSITIVE = Quantisation(scales=(LIMIT / 255,), zero=-128)
"""Behind a clamp, which vanishes in the range."""
SHARE = Quantisation(scales=(1 / 256,), zero=-128)
"""What the specification fixes for outputs between 0 and 1."""
CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
"""Operators with weights, and the axis of the output channels in them."""
SHARES = frozenset({"LOGISTIC", "SOFTMAX"})
KEEPS = frozenset({"AVERAGE_POOL_2D", "CONCATENATION", "MAX_POOL_2D", "PAD", "PADV2", "RESHAPE", "TRANSPOSE"})
"""Operators whose output has the scale of their input."""
CLAMPS = frozenset({"RELU", "RELU6"})
NONE = 0  # of the schema's activations


def to_int8(file: TfliteFile) -> None:
    """Make every float32 tensor int8, in place."""
    for index in file.inputs:
        _integers(file.tensors[index], SIGNED)
    for code, made in file.operators:
        inputs = [file.tensors[index] for index in made.inputs]
        for place, tensor in enumerate(inputs):
            if tensor.dtype == "float32":
                _constant(file, code, place, tensor, inputs)
        (output,) = made.outputs
        _integers(file.tensors[output], _given(code, made, inputs[0]))


def _given(code: str, made: Any, first: Tensor) -> Quantisation:
    """How the output of an operator is quantised."""
    if code in KEEPS:
        assert first.quantisation is not None
        return first.quantisation
    if code in SHARES:
        return SHARE
    fused: int = getattr(made.builtinOptions, "fusedActivationFunction", NONE)
    return POSITIVE if code in CLAMPS or fused != NONE else SIGNED


def _constant(file: TfliteFile, code: str, place: int, tensor: Tensor, inputs: list[Tensor]) -> None:
    values = file.buffers[tensor.buffer]
    assert values is not None, "every tensor that no operator gives is an input or a constant"
    data = inputs[0].quantisation
    if code == "PADV2":  # the least integer stands for what is below all values
        assert data is not None
        _put(file, tensor, np.full(values.shape, -128, np.int8), data)
    elif code in CHANNELS and place == 1:
        q, scales = quantised(values, CHANNELS[code])
        _put(file, tensor, q, Quantisation(scales=tuple(map(float, scales)), axis=CHANNELS[code]))
    elif code in CHANNELS and place == 2:
        weight = inputs[1].quantisation
        assert data is not None and weight is not None
        s = np.array(weight.scales) * data.scales[0]
        _put(file, tensor, np.rint(values / s).astype(np.int32), Quantisation(scales=tuple(map(float, s))))
    else:
        q, scale = quantised(values, None)
        _put(file, tensor, q, Quantisation(scales=(float(scale),)))


def _put(file: TfliteFile, tensor: Tensor, values: Any, quantisation: Quantisation) -> None:
    file.buffers[tensor.buffer] = values
    tensor.dtype, tensor.quantisation = values.dtype.name, quantisation


def _integers(tensor: Tensor, quantisation: Quantisation) -> None:
    if tensor.dtype == "float32":
        tensor.dtype, tensor.quantisation = "int8", quantisation
