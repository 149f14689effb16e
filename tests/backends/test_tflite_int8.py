"""LiteRT in int8: what the file holds, values against ONNX's floats, and operators by the runtime's own profile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.backends import find_backend
from edgeprune.backends.tflite import COMPUTES
from edgeprune.device import in_precision, load_device
from edgeprune.kernel import Kernel
from edgeprune.onnx_int8 import LIMIT
from edgeprune.precision import ACTIVATIONS, kind_of, refusal
from edgeprune.transport import Session, open_session
from tests.backends.test_contract import KERNELS, Array, conv, in_layout, plain, same_in_onnx

pytestmark = pytest.mark.contract

INT8 = [
    kernel
    for kernel in [*KERNELS, *(plain("activation", name) for name in ACTIVATIONS)]
    if kind_of(kernel.operator, kernel.epilogue) in COMPUTES["int8"]
]


@pytest.fixture(scope="module", autouse=True)
def runtime(require: Callable[[str], None]) -> None:
    require("tflite")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(in_precision(load_device("host-tflite"), "int8")) as session:
        yield session


def parsed(kernel: Kernel) -> Any:
    from edgeprune.kernel_tflite import bytes_from_kernel

    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    return schema.ModelT.InitFromPackedBuf(bytes_from_kernel(replace(kernel, precision="int8"), seed=3), 0)


def types(model: Any) -> set[int]:
    return {tensor.type for tensor in model.subgraphs[0].tensors}


def values(model: Any, tensor: Any, dtype: str) -> Array:
    array: Array = np.frombuffer(model.buffers[tensor.buffer].data.tobytes(), dtype).reshape(tensor.shape)
    return array


def test_a_convolution_has_weights_a_channel_and_a_bias_of_integers() -> None:
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    kernel = conv(6, 4, "bias", "relu6")
    model = parsed(kernel)
    x, weight, bias = (model.subgraphs[0].tensors[i] for i in model.subgraphs[0].operators[0].inputs)
    (y,) = (model.subgraphs[0].tensors[i] for i in model.subgraphs[0].operators[0].outputs)
    kinds = schema.TensorType
    assert [t.type for t in (x, weight, bias, y)] == [kinds.INT8, kinds.INT8, kinds.INT32, kinds.INT8]
    assert list(weight.quantization.zeroPoint) == list(bias.quantization.zeroPoint) == [0] * 4
    assert weight.quantization.quantizedDimension == 0
    s = np.asarray(weight.quantization.scale)
    assert np.allclose(bias.quantization.scale, s * x.quantization.scale[0], rtol=1e-6)
    from onnx import numpy_helper

    from edgeprune.kernel_onnx import model_from_kernel

    drawn = [numpy_helper.to_array(tensor) for tensor in model_from_kernel(kernel, seed=3).graph.initializer]
    off = values(model, weight, "int8") * s[:, None, None, None] - drawn[0].transpose(0, 2, 3, 1)
    assert np.abs(off).max() <= 0.5 * s.max() * (1 + 1e-5)
    assert np.abs(values(model, bias, "int32") * np.asarray(bias.quantization.scale) - drawn[1]).max() <= 1e-3
    assert (list(y.quantization.zeroPoint), y.quantization.scale[0]) == ([-128], pytest.approx(LIMIT / 255))


def test_a_depthwise_convolution_has_its_channels_last() -> None:
    model = parsed(conv(24, 24, "bias", groups=24))
    weight = model.subgraphs[0].tensors[model.subgraphs[0].operators[0].inputs[1]]
    assert (weight.quantization.quantizedDimension, len(weight.quantization.scale)) == (3, 24)


def test_what_the_specification_fixes() -> None:
    """Outputs between 0 and 1 in steps of 1/256 from -128; a pool's output has the scale of its input."""
    (sigmoid,) = parsed(plain("activation", "sigmoid")).subgraphs[0].operators
    tensors = parsed(plain("activation", "sigmoid")).subgraphs[0].tensors
    given = tensors[sigmoid.outputs[0]].quantization
    assert (list(given.scale), list(given.zeroPoint)) == ([1 / 256], [-128])
    pool = parsed(plain("max_pool", window=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1))).subgraphs[0]
    first, last = (pool.tensors[t].quantization for t in (pool.inputs[0], pool.outputs[0]))
    assert (list(first.scale), list(first.zeroPoint)) == (list(last.scale), list(last.zeroPoint))


@pytest.mark.parametrize("kernel", INT8, ids=lambda kernel: kernel.key)
def test_no_float_is_left_in_the_file(kernel: Kernel) -> None:
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    assert types(parsed(kernel)) <= {schema.TensorType.INT8, schema.TensorType.INT32}


@pytest.mark.parametrize("kernel", INT8, ids=lambda kernel: kernel.key)
def test_a_kernel_computes_what_it_does_in_floats_to_a_few_steps(
    kernel: Kernel, session: Session, tmp_path: Path
) -> None:
    """Against ONNX's reference in floats, at the values that the input integers stand for."""
    import onnx.reference

    quantised = replace(kernel, precision="int8")
    path = find_backend("tflite").build(quantised, tmp_path)
    loaded = session.load(quantised.key, path)
    assert loaded.notes["ran_in"] == {"int8": 1.0} and refusal(quantised, loaded.notes["ran_in"]) is None
    rng = np.random.default_rng(0)
    step = LIMIT / 127
    given = [np.rint(rng.standard_normal(s.shape).clip(-3, 3) / step).astype(np.int8) for s in loaded.inputs]
    (output,) = session.run(quantised.key, given)
    session.unload(quantised.key)
    model = same_in_onnx(kernel)
    wanted = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.input}
    feeds = {
        spec.name: in_layout((array * np.float32(step)).astype(np.float32), wanted[spec.name])
        for spec, array in zip(loaded.inputs, given, strict=True)
    }
    (expected,) = map(np.asarray, onnx.reference.ReferenceEvaluator(model).run(None, feeds))
    out = tensor_out(quantised)
    real = in_layout((output.astype(np.float64) - out[1]) * out[0], expected.shape)
    assert np.abs(real - np.clip(expected, -LIMIT, LIMIT)).max() <= 4 * step + 0.02 * np.abs(expected).max()


def tensor_out(kernel: Kernel) -> tuple[float, int]:
    """Scale and zero point of the output."""
    graph = parsed(kernel).subgraphs[0]
    told = graph.tensors[graph.outputs[0]].quantization
    return float(told.scale[0]), int(told.zeroPoint[0])


def test_xnnpacks_own_profile_says_int8(tmp_path: Path) -> None:
    """QC8W: integers with a scale a channel. The C interface of the versions that were looked at tells it."""
    runner: Any = importlib.import_module("edgeprune.backends.tflite.runner")
    if not runner.version().startswith(runner.PROFILED_VERSIONS):
        pytest.skip(f"the C interface of {runner.version()} is not known")
    for kernel, word in ((conv(16, 24, "bias"), "Convolution"), (KERNELS[19], "Fully Connected")):
        tags = {}
        for precision in ("fp32", "int8"):
            path = find_backend("tflite").build(replace(kernel, precision=precision), tmp_path)
            tags[precision] = [tag for tag, _ in runner._profile(str(path), 1)[0]]
        assert any(tag.startswith(word) and "QC8" in tag for tag in tags["int8"]), tags
        assert not any("QC8" in tag for tag in tags["fp32"]), tags


def test_half_precision_is_no_arithmetic_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fp16 dense kernels are not built yet for LiteRT \(supported: fp32, int8\)"):
        find_backend("tflite").build(conv(4, 4, precision="fp16"), tmp_path)
