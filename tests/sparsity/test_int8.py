"""2:4 and int8 together: what is zero stays zero when weights become integers, in every file that is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgeprune import onnx_int8
from edgeprune.backends.onnxruntime.quantising import quantised as for_onnxruntime
from edgeprune.bundle import Contents, write_bundle
from edgeprune.cli import main
from edgeprune.device import load_device
from edgeprune.errors import SurgeryError
from edgeprune.exporting import as_pruned, export
from edgeprune.measurement import HOT
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import to_half
from edgeprune.onnx_quantise import TENSORRT, quantise
from edgeprune.parity import check_parity, samples
from edgeprune.precision import shares_of
from edgeprune.ranges import drawn_batches
from edgeprune.sparsity import sparsify
from edgeprune.sparsity.onnx_weights import ASYMMETRIC, check_written, layers_of
from edgeprune.transport import open_session
from tests.sparsity.test_onnx_weights import INPUTS, dense, model_of, network, sparse

pytestmark = pytest.mark.unit

Array = np.ndarray
FORMS = ("onnxruntime", "tensorrt")
LARGEST = {"onnxruntime": 64, "tensorrt": 127}
L = 1000
INTEGERS = torch.tensor(  # `L` is the largest integer, so that scales are 1; the second row has zeros to spare
    [[L, 0, -64, 0, 0, 32, 0, 5], [0, 0, L, 0, -1, 0, 1, 0], [0, -L, 3, 0, 57, 0, 0, -57]], dtype=torch.float32
)
ALIGNED = [None, None, "alignment: 48 input channels are no multiple of 32 (int8)"]


def quantised(model: onnx.ModelProto, inputs: tuple[torch.Tensor, ...], form: str) -> onnx.ModelProto:
    """As the runtime's export writes it; TensorRT's has half precision around the integers."""
    batches = drawn_batches(inputs)
    if form == "onnxruntime":
        return for_onnxruntime(model, batches)
    return to_half(quantise(model, batches, onnx_int8.TENSORRT, TENSORRT))


def integers(model: onnx.ModelProto, weight: str) -> Array:
    """The int8 of a weight: an initialiser, or what a QuantizeLinear makes of one, by ONNX's reference."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    if f"{weight}_quantized" in constants:
        return numpy_helper.to_array(constants[f"{weight}_quantized"])
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == weight)
    out = helper.make_tensor_value_info(node.output[0], TensorProto.INT8, None)
    graph = helper.make_graph([node], "one", [], [out], [constants[name] for name in node.input])
    return given_by(helper.make_model(graph, opset_imports=model.opset_import))


def given_by(model: onnx.ModelProto) -> Array:
    """The one output of a graph without inputs, by ONNX's reference."""
    (found,) = list(ReferenceEvaluator(model).run(None, {}))
    return np.asarray(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_zero_is_the_integer_zero(layer: str, form: str) -> None:
    weight = INTEGERS.clamp(-LARGEST[form], LARGEST[form])
    module: nn.Linear | nn.Conv2d = nn.Linear(8, 3)
    inputs = (torch.ones(4, 8),)
    if layer == "conv":
        module, weight = nn.Conv2d(8, 3, (1, 2)), torch.stack([weight, weight.flip(1)], -1)[:, :, None]
        inputs = (torch.ones(1, 8, 4, 4),)
    with torch.no_grad():
        module.weight.copy_(weight)
    model = quantised(onnx_from_module(nn.Sequential(module), inputs), inputs, form)
    assert integers(model, "0.weight").tolist() == weight.tolist()
    (found,) = layers_of(model)
    assert (found.pattern, found.precision, found.shape) == ("yes", "int8", tuple(weight.shape))
    assert found.zeros == float((weight == 0).double().mean())
    assert found.refused == "alignment: 8 input channels are no multiple of 32 (int8)"


@pytest.mark.parametrize("form", FORMS)
def test_a_network_keeps_its_pattern_and_gains_only_zeros(form: str) -> None:
    """Batch norms are folded in first; small weights round to 0, so some groups of four have more zeros than two."""
    given = onnx_from_module(sparse().module, INPUTS)
    model = quantised(given, INPUTS, form)
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in given.graph.initializer}
    for name in ("2.weight", "5.weight", "9.weight"):
        q = integers(model, name)
        assert (q.dtype.name, abs(q).max()) == ("int8", LARGEST[form])
        assert not q[floats[name] == 0].any()
        groups = np.moveaxis(q, 1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
    found = {layer.name: layer for layer in layers_of(model)}
    assert [found[name].pattern for name in "0259"] == ["no", "yes", "yes", "yes"]
    assert [found[name].refused for name in "259"] == ALIGNED
    assert {layer.precision for layer in found.values()} == {"int8"}
    other = layers_of(quantised(onnx_from_module(dense().module, INPUTS), INPUTS, form))
    assert all(layer.pattern != "yes" for layer in other)


def test_an_engine_in_int8_runs_with_its_zeros_and_the_bundle_counts_them(
    require: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("onnxruntime")
    device = load_device("host-onnxruntime")
    calibration = drawn_batches(INPUTS, count=8)
    engine = export(sparse(), device, tmp_path / "engine", precision="int8", calibration=calibration)
    assert engine.pruned is not None
    expected = samples(engine.pruned, calibration=calibration)
    with open_session(device, precision="int8") as session:
        session.load("engine", engine.path, profile=True)
        assert 0 < check_parity(session, "engine", engine, expected).error < 0.1
        session.measure(["engine"], timing=HOT)
        times = session.node_times("engine")
    assert times is not None and sum(node["type"] == "QLinearConv" for node in times.nodes) == 3
    assert (shares_of(times) or {})["int8"] > 0.5
    bundle = write_bundle(tmp_path / "net", Contents(engine=engine, dense=None, samples=expected))
    assert bundle.document["sparsity"] == {
        **{"file": "model.onnx", "layers": 4, "sparse": 3, "eligible": 2},
        "refused": {"9": "alignment: 48 input channels are no multiple of 32 (int8)"},
    }
    assert main(["inspect", "--sparsity", str(bundle.folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["layers"], document["sparse"], document["eligible"]) == (4, 3, 2)
    assert [(of["name"], of["precision"], of["pattern"]) for of in document["of"][1:]] == [
        (name, "int8", "yes") for name in "259"
    ]


def test_tensorrts_file_in_int8_keeps_the_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are floats that are quantised in the graph, the form that every TensorRT takes: looked through."""
    (tmp_path / "trtexec").write_text("#!/bin/sh\n")
    (tmp_path / "trtexec").chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(tmp_path / "trtexec"))  # nothing is built
    device = load_device("host-tensorrt")
    calibration = drawn_batches(INPUTS)
    engine = export(sparse(), device, tmp_path / "engine", precision="int8", calibration=calibration)
    bundle = write_bundle(tmp_path / "net", Contents(engine=engine, dense=None))
    found = bundle.document["sparsity"]
    assert (found["layers"], found["sparse"], found["eligible"]) == (4, 3, 2)
    plain = export(as_pruned(network(), INPUTS), device, tmp_path / "dense", precision="int8", calibration=calibration)
    assert write_bundle(tmp_path / "plain", Contents(engine=plain, dense=None)).document["sparsity"] == {}


def test_a_quantiser_that_moves_zero_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asymmetric integers hold the pattern too, but what sparse tensor cores leave out are zeros."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    original = quantization.quantize_static

    def asymmetric(*files: object, **options: object) -> None:
        kind = quantization.QuantType.QUInt8
        original(*files, **{**options, "per_channel": False, "weight_type": kind, "extra_options": {}})

    monkeypatch.setattr(quantization, "quantize_static", asymmetric)
    device = load_device("host-onnxruntime")
    with pytest.raises(SurgeryError, match=r"has not the 2:4 weights that the plan wants: '2.weight': zero point: "):
        export(sparse(), device, tmp_path / "out", precision="int8", calibration=drawn_batches(INPUTS))
    assert list(tmp_path.iterdir()) == []


def dequantised(weight: Array, zero: Array, **options: Any) -> onnx.ModelProto:
    """y = x · DequantizeLinear(weight)ᵀ."""
    node = helper.make_node("Gemm", ["x", "real"], ["y"], transB=1, name="layer")
    model = model_of(node, weight)
    scale = np.full(zero.shape, 0.1, np.float32)
    model.graph.initializer.extend([numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w", "s", "z"], ["real"], **options))
    return model


def test_a_zero_point_that_is_not_0_is_told() -> None:
    weight = np.array([[128, 9, 128, 7] * 8] * 8, np.uint8)
    (layer,) = layers_of(dequantised(weight, np.array(128, np.uint8)))
    assert (layer.pattern, layer.zeros, layer.refused) == ("yes", 0.5, ASYMMETRIC)
    (layer,) = layers_of(dequantised(np.where(weight == 128, 0, weight), np.array(0, np.uint8)))
    assert (layer.pattern, layer.zeros, layer.refused) == ("yes", 0.5, None)


def test_zero_points_of_channels_and_of_blocks_are_found() -> None:
    weight = np.array([[5, 5, 1, 1, 7, 1, 7, 1], [6, 1, 6, 1, 8, 8, 1, 1]], np.uint8)
    rows = np.array([5, 6], np.uint8)
    (layer,) = layers_of(dequantised(weight, rows, axis=0))
    assert (layer.pattern, layer.zeros) == ("partial", 4 / 16)
    blocks = np.array([[5, 7], [6, 8]], np.uint8)
    (layer,) = layers_of(dequantised(weight, blocks, axis=1, block_size=4))
    assert (layer.pattern, layer.zeros) == ("yes", 8 / 16)


@pytest.mark.parametrize(("kind", "zero"), [("int8", 0), ("int8", -3), ("uint8", 0), ("uint8", 128)])
def test_what_a_quantizer_gives_is_what_the_standard_says(kind: str, zero: int) -> None:
    """Halves go to even, values past the end saturate: also to the zero point, where that is the end."""
    values = np.array([[0.0, 0.25, 0.26, -0.25, -0.75, -1e3, 1e3, 1.0]] * 2, np.float32)
    node = helper.make_node("Gemm", ["x", "q"], ["y"], transB=1, name="layer")
    model = model_of(node, values)
    z = np.array([zero, zero], kind)
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array([0.5, 1e-3], np.float32), "s"), numpy_helper.from_array(z, "z")]
    )
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0))
    (layer,) = layers_of(model)
    graph = helper.make_graph(
        [model.graph.node[0]],
        "one",
        [],
        [helper.make_tensor_value_info("q", numpy_helper.from_array(z).data_type, None)],
        [*model.graph.initializer],
    )
    assert layer.zeros == float((given_by(helper.make_model(graph)) == zero).mean())


def test_parameters_that_the_file_has_not_as_sparse_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx_from_module(sparsify(dense(), ["5.weight"])[0].module, INPUTS), path)
    check_written(path, ["5.weight"])
    with pytest.raises(SurgeryError) as caught:
        check_written(path, ["2.weight", "5.weight", "7.weight"])
    assert str(caught.value) == (
        "model.onnx has not the 2:4 weights that the plan wants: '2.weight': the pattern is lost; '7.weight': no layer "
        "reads it"
    )
