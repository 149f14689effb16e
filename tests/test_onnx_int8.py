"""Kernels in QDQ form: exact numbers on tiny cases, structure for each runtime, values against integer arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import model_from_kernel
from edgeprune.onnx_int8 import LIMIT, ONNXRUNTIME, OPENVINO, TENSORRT, Form, Integers, quantised
from tests.backends.test_contract import KERNELS, conv, plain

pytest.importorskip("onnx")
pytestmark = pytest.mark.unit

Array = np.ndarray[Any, Any]
FORMS = {"openvino": OPENVINO, "onnxruntime": ONNXRUNTIME, "tensorrt": TENSORRT}


def int8(kernel: Kernel, form: Form = TENSORRT, seed: int = 0) -> Any:
    return model_from_kernel(replace(kernel, precision="int8"), seed=seed, form=form)


def constants(model: Any) -> dict[str, Array]:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def values(model: Any) -> dict[str, str]:
    """Names of inputs and outputs with their types."""
    from onnx import TensorProto

    listed = [*model.graph.input, *model.graph.output]
    return {value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower() for value in listed}


def evaluated(model: Any, feeds: dict[str, Array]) -> Array:
    """By ONNX's reference evaluator, which knows the operators of integers from opset 19 on."""
    import onnx.reference

    newer = onnx.ModelProto()
    newer.CopyFrom(model)
    newer.opset_import[0].version = 19
    (output,) = onnx.reference.ReferenceEvaluator(newer).run(None, feeds)
    return np.asarray(output)


def test_weights_have_a_scale_for_each_channel() -> None:
    q, scales = quantised(np.array([[1.27, -0.5], [0.0, -254.0], [0.0, 0.0]], np.float32), 0)
    assert q.tolist() == [[127, -50], [0, -127], [0, 0]]
    assert scales == pytest.approx([0.01, 2.0, 1 / 127])
    q, scale = quantised(np.array([2.54, -1.0], np.float32), None)
    assert q.tolist() == [127, -50]
    assert float(scale) == pytest.approx(0.02)


@given(arrays(np.float32, (3, 4, 2), elements=st.floats(-100, 100, width=32)), st.integers(0, 2))
def test_no_weight_is_further_off_than_half_a_step(weights: Array, axis: int) -> None:
    q, scales = quantised(weights, axis)
    s = np.moveaxis(np.broadcast_to(scales, (*np.delete(weights.shape, axis), len(scales))), -1, axis)
    assert np.abs(weights - s * q.astype(np.float64)).max() <= 0.5 * scales.max() * (1 + 1e-5)
    assert (np.abs(weights - s * q.astype(np.float64)) <= 0.5 * s * (1 + 1e-5)).all()
    assert q.min() >= -127


def test_steps_of_integers() -> None:
    assert Integers(dtype="int8", zero=0).step == LIMIT / 127
    assert Integers(dtype="uint8", zero=0).step == LIMIT / 255
    assert Integers(dtype="uint8", zero=128).step == LIMIT / 127


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.key)
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_is_valid_with_integers_at_its_border(kernel: Kernel, form: str) -> None:
    import onnx.checker

    model = int8(kernel, FORMS[form])
    onnx.checker.check_model(model, full_check=all(not node.domain for node in model.graph.node))
    assert set(values(model).values()) <= {"int8", "uint8"}
    assert values(model).keys() == values(model_from_kernel(kernel)).keys()


def test_openvino_and_tensorrt_find_what_they_fuse_whole() -> None:
    kernel = conv(16, 24, "bias", "add", "relu")
    fused = ["Conv", "Add", "Relu", "QuantizeLinear"]
    for form, dequantised in ((OPENVINO, 4), (TENSORRT, 3)):  # TensorRT takes a bias as float32 alone
        assert [node.op_type for node in int8(kernel, form).graph.node] == ["DequantizeLinear"] * dequantised + fused
    assert values(int8(kernel, OPENVINO)) == {"x": "uint8", "residual": "int8", "y": "uint8"}
    assert values(int8(kernel, TENSORRT)) == {"x": "int8", "residual": "int8", "y": "int8"}


def test_onnx_runtime_finds_integers_around_every_node_but_a_clamp() -> None:
    model = int8(conv(16, 24, "bias", "add", "relu"), ONNXRUNTIME)
    operators = [node.op_type for node in model.graph.node]
    assert operators == [
        *["DequantizeLinear"] * 4,
        *["Conv", "QuantizeLinear", "DequantizeLinear"],
        *["Add", "Relu", "QuantizeLinear"],
    ]
    found = constants(model)
    assert (int(found["z_signed"]), int(found["z_positive"])) == (128, 0)
    assert found["z_signed"].dtype == found["z_positive"].dtype == np.uint8


@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_is_one_of_integers(form: str) -> None:
    """Weights of int8 with a scale a channel, the bias in int32 at the product of the scales."""
    kernel = conv(5, 7, "bias", groups=1)
    model = int8(kernel, FORMS[form], seed=3)
    found, plain_weights = constants(model), constants(model_from_kernel(kernel, seed=3))
    weight, scales = found["w0_q"], found["w0_s"]
    assert (weight.dtype, weight.shape, scales.shape) == (np.int8, (7, 5, 3, 3), (7,))
    assert np.abs(weight).max(axis=(1, 2, 3)).tolist() == [127] * 7
    assert np.abs(plain_weights["w0"] - weight * scales[:, None, None, None]).max() <= 0.5 * scales.max() * (1 + 1e-5)
    if not FORMS[form].whole_bias:
        assert np.array_equal(found["w1"], plain_weights["w1"])
        return
    bias = found["w1_q"]
    assert bias.dtype == np.int32
    assert np.allclose(found["w1_s"], scales * FORMS[form].positive.step, rtol=1e-6)
    assert np.abs(plain_weights["w1"] - bias * found["w1_s"]).max() <= 0.5 * found["w1_s"].max() * (1 + 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clamp", [(), ("relu",), ("relu6",)], ids=str)
def test_its_values_are_those_of_integer_arithmetic(form: str, clamp: tuple[str, ...]) -> None:
    """y = clip(z_y + round(s_x s_w / s_y (sum of q_x q_w + q_b))), clamped: what an integer kernel computes."""
    import torch

    kernel = conv(6, 8, "bias", *clamp, groups=2, stride=(2, 2), spatial=(9, 9))
    given, model = FORMS[form], int8(kernel, FORMS[form], seed=1)
    taken, out = given.positive, given.positive if clamp else given.signed
    limits = np.iinfo(taken.dtype)
    x = np.random.default_rng(0).integers(limits.min, limits.max + 1, (1, 6, 9, 9)).astype(taken.dtype)
    y = evaluated(model, {"x": x})
    found = constants(model)
    s = taken.step * found["w0_s"].astype(np.float64)
    bias = found["w1_q"] if given.whole_bias else found["w1"] / s
    q_x, q_w, q_b = (torch.from_numpy(part.astype(np.float64)) for part in (x, found["w0_q"], bias))
    q = torch.nn.functional.conv2d(q_x, q_w, q_b, stride=2, padding=1, groups=2).numpy()
    real = q * s[:, None, None]
    real = np.clip(real, 0 if clamp else -np.inf, 6 if clamp == ("relu6",) else np.inf)
    limits = np.iinfo(out.dtype)
    expected = np.clip(np.rint(real / out.step) + out.zero, limits.min, limits.max)
    difference = np.abs(y.astype(np.int64) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # float32 rounds a tie to the other side


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        pytest.param(kernel, form, id=f"{form} {kernel.key}")
        for kernel in KERNELS
        for form, given in FORMS.items()
        if kernel.operator not in ("attention", "layer_norm")
        and not (given.every_step and ("gelu" in kernel.epilogue or kernel.operator == "max_pool"))
    ],
)
def test_every_kernel_computes_what_it_does_in_floats_to_a_few_steps(kernel: Kernel, form: str) -> None:
    """Against float64 at the values that the input integers stand for, saturated where those of the output are."""
    given = FORMS[form]
    quantised_model, exact = int8(kernel, given), model_from_kernel(kernel)
    rng, feeds, floats = np.random.default_rng(0), {}, {}
    for value in quantised_model.graph.input:
        kind = given.positive if value.name == "x" and kernel.operator == "conv" else given.signed
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        real = np.clip(rng.standard_normal(shape), 0 if kind.zero == 0 and kind.dtype == "uint8" else -6, 6)
        feeds[value.name] = (np.rint(real / kind.step) + kind.zero).astype(kind.dtype)
        floats[value.name] = (kind.step * (feeds[value.name].astype(np.float64) - kind.zero)).astype(np.float32)
    q, expected = evaluated(quantised_model, feeds), evaluated(exact, floats)
    out = given.positive if kernel.epilogue[-1:] in (("relu",), ("relu6",)) else given.signed
    error = np.abs(out.step * (q.astype(np.float64) - out.zero) - np.clip(expected, -LIMIT, LIMIT))
    steps = 1.5 if not given.every_step else 4.0  # ONNX Runtime rounds after every node
    assert error.max() <= steps * LIMIT / 127 + 0.02 * np.abs(expected).max()


def test_onnx_runtime_pools_channels_last_by_its_own_operator() -> None:
    """As it does between convolutions of integers; a `MaxPool` of them alone would run channels first."""
    pool = next(kernel for kernel in KERNELS if kernel.operator == "max_pool")
    model = int8(pool, ONNXRUNTIME)
    assert [(node.domain, node.op_type) for node in model.graph.node] == [("com.microsoft", "NhwcMaxPool")]
    shapes = [
        [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [[1, 14, 14, 24], [1, 7, 7, 24]]
    assert "MaxPool" in {node.op_type for node in int8(pool, OPENVINO).graph.node}


def test_a_pattern_of_zeros_stays() -> None:
    kernel = replace(conv(16, 8), precision="int8", sparsity="2:4")
    weight = constants(model_from_kernel(kernel))["w0_q"]
    assert ((np.moveaxis(weight, 1, -1).reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_a_kernel_without_weights_has_scales_alone() -> None:
    model = int8(plain("add"))
    assert sorted(constants(model)) == ["s_signed", "z_signed"]
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear"] * 2 + ["Add", "QuantizeLinear"]
