"""The pattern where it counts: in the initialisers of the exported file, in fp32, half precision and int8."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeprune.cli import main
from edgeprune.device import load_device
from edgeprune.errors import InputError, SurgeryError
from edgeprune.exporting import export, kernels_of
from edgeprune.graph import trace
from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import model_from_kernel
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import to_half
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.recovery import repair
from edgeprune.sparsity import held, sparsify
from edgeprune.sparsity.onnx_weights import layers_of, layers_of_file
from edgeprune.surgery import apply
from tests.small_models import redrawn

pytestmark = pytest.mark.unit

SPARSE = ("2.weight", "5.weight", "9.weight")


def network() -> nn.Module:
    """Batch norms behind convolutions, which are folded into them; a linear of 10 outputs."""
    return redrawn(
        nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(48, 10),
        )
    )


INPUTS = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def dense() -> Pruned:
    plan = Plan(structure_hash="0" * 64)
    return Pruned(module=network(), plan=plan, example_inputs=INPUTS, origin="0" * 64)


def sparse() -> Pruned:
    return sparsify(dense(), SPARSE)[0]


def test_the_pattern_survives_folding_and_export() -> None:
    found = {layer.name: layer for layer in layers_of(onnx_from_module(sparse().module, INPUTS))}
    assert {name: (layer.pattern, layer.shape) for name, layer in found.items()} == {
        "0": ("no", (32, 3, 3, 3)),
        "2": ("yes", (32, 32, 3, 3)),
        "5": ("yes", (48, 32, 1, 1)),
        "9": ("yes", (10, 48)),
    }
    assert [found[name].zeros for name in "259"] == [0.5, 0.5, 0.5]
    assert found["2"].refused == "precision: sparse tensor cores compute in fp16, bf16, int8, not fp32"
    assert found["0"].refused == "alignment: 3 input channels are no multiple of 4"
    assert all(layer.small for layer in found.values())


def test_in_half_precision_each_layer_says_whether_it_may_run_sparse() -> None:
    half = to_half(onnx_from_module(sparse().module, INPUTS))
    found = {layer.name: layer for layer in layers_of(half)}
    assert [found[name].pattern for name in "259"] == ["yes"] * 3
    assert [found[name].refused for name in "25"] == [None, None]
    assert found["9"].refused == "alignment: 10 output channels are no multiple of 8"
    assert {layer.precision for layer in found.values()} == {"fp16"}


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(
            operator="conv",
            c_in=64,
            c_out=32,
            spatial=(8, 8),
            window=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            dilation=(1, 1),
        ),
        Kernel(operator="linear", c_in=64, c_out=32, spatial=(5,)),
    ],
    ids=["conv", "linear"],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_kernels_are_built_in_the_pattern_that_is_looked_for(kernel: Kernel, precision: str) -> None:
    for sparsity, pattern in (("dense", "no"), ("2:4", "yes")):
        model = model_from_kernel(replace(kernel, precision=precision, sparsity=sparsity))
        (layer,) = layers_of(model)
        assert (layer.precision, layer.shape[:2]) == (precision, (32, 64))
        assert layer.pattern == pattern or (pattern == "no" and layer.pattern == "partial" and precision == "int8")
        assert (layer.refused is None) == (precision != "fp32")


def test_a_network_quantised_by_onnx_runtime_keeps_the_pattern(tmp_path: Path) -> None:
    """QDQ, weights in int8 with one scale an output channel: zero stays the zero point."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    onnx.save(onnx_from_module(sparse().module, INPUTS), tmp_path / "model.onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.left = [{"input": INPUTS[0].numpy()}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    quantization.quantize_static(str(tmp_path / "model.onnx"), str(tmp_path / "int8.onnx"), Reader(), per_channel=True)
    found = [layer for layer in layers_of_file(tmp_path / "int8.onnx") if layer.shape[1] > 3]
    assert [(layer.pattern, layer.precision) for layer in found] == [("yes", "int8")] * 3
    assert found[0].refused is None and found[1].refused is None


def model_of(node: onnx.NodeProto, weight: np.ndarray) -> onnx.ModelProto:
    """One node that reads x and the constant w."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", [value], [out], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph)


def test_the_axis_of_the_inputs_is_found_in_every_form() -> None:
    W = np.tile(np.array([[1, 2, 0, 0]], np.float32), (3, 2))  # [outputs 3, inputs 8]
    forms = [
        model_of(helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), W),
        model_of(helper.make_node("Gemm", ["x", "w"], ["y"]), W.T.copy()),
        model_of(helper.make_node("MatMul", ["x", "w"], ["y"]), W.T.copy()),
        model_of(helper.make_node("MatMul", ["w", "x"], ["y"]), W),
    ]
    for model in forms:
        (layer,) = layers_of(model)
        assert (layer.shape, layer.pattern, layer.zeros) == ((3, 8), "yes", 0.5)
    W[1, 2] = 1
    (layer,) = layers_of(model_of(helper.make_node("MatMul", ["x", "w"], ["y"]), W.T.copy()))
    assert layer.pattern == "partial"
    depthwise = np.ones((8, 1, 3, 3), np.float32)
    (layer,) = layers_of(model_of(helper.make_node("Conv", ["x", "w"], ["y"], group=8), depthwise))
    assert layer.refused == "groups: 8 groups of 1 input channels each, not one of all"


def test_export_bakes_what_is_held_and_refuses_what_lost_its_pattern(tmp_path: Path) -> None:
    device = load_device("host-openvino")
    pytest.importorskip("openvino")
    engine = export(held(sparse()), device, tmp_path / "out")
    assert engine.onnx is not None
    assert [layer.pattern for layer in layers_of_file(tmp_path / "out")] == ["no", "yes", "yes", "yes"]
    lost = sparse()
    with torch.no_grad():
        lost.module.get_parameter("2.weight").add_(1.0)
    with pytest.raises(SurgeryError, match=r"wants '2.weight' as 2:4, but it is not any more: train"):
        export(lost, device, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_a_modelled_device_is_given_sparse_kernels() -> None:
    given = sparse()
    kernels = kernels_of(given.module, INPUTS, load_device("null"), "fp32", formats=given.plan.formats)
    assert [k.sparsity for k in kernels if k.weight_bytes] == ["dense", "2:4", "2:4", "2:4"]


def test_a_plan_with_formats_is_applied_and_repaired_with_its_zeros() -> None:
    model = network()
    graph = trace(model, INPUTS)
    plan = Plan(structure_hash=graph.structure_hash, kept={"2.weight:0": tuple(range(16))}, formats={"5.weight": "2:4"})
    pruned = apply(plan, model, INPUTS, graph=graph)
    weight = pruned.module.get_parameter("5.weight")
    assert weight.shape == (48, 16, 1, 1) and int((weight == 0).sum()) == 48 * 8
    data = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    repaired, report = repair(pruned, data, dense=model, graph=graph)
    assert report.chosen != "none"
    after = repaired.module.get_parameter("5.weight")
    assert ((after != 0) <= (weight != 0)).all() and not after.equal(weight)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"0.weight": "2:4"}, "'0.weight' as 2:4, but its 3 input channels are no multiple of 4"),
        ({"5.bias": "2:4"}, "'5.bias' as 2:4, but its shape [48] has no input channels"),
        ({"6.weight": "2:4"}, "'6.weight' as 2:4, which the model lacks"),
        ({"5.weight": "2:4"}, "'5.weight' as 2:4, but its 18 input channels are no multiple of 4"),
    ],
)
def test_formats_that_do_not_fit_are_refused(formats: dict[str, str], message: str) -> None:
    model = network()
    graph = trace(model, INPUTS)
    group = next(g.id for g in graph.groups if any(m.parameter == "5.weight" and m.dim == 1 for m in g.members))
    plan = Plan(structure_hash=graph.structure_hash, kept={group: tuple(range(18))}, formats=formats)
    with pytest.raises(SurgeryError) as caught:
        apply(plan, model, INPUTS, graph=graph)
    assert str(caught.value) == f"the plan wants {message}"


def test_inspect_shows_pattern_and_eligibility(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(to_half(onnx_from_module(sparse().module, INPUTS)), tmp_path / "model.onnx")
    assert main(["inspect", "--sparsity", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "4 layers with constant weights, 3 of them 2:4, of which sparse tensor cores may take 2" in out[0]
    assert out[3].split()[:4] == ["no", "0%", "fp16", "32x3x3x3"] and "(alignment: 3 input channels" in out[3]
    assert out[4].split()[:5] == ["yes", "50%", "fp16", "32x32x3x3", "2"] and "(small: dense" in out[4]
    assert main(["inspect", "--sparsity", str(tmp_path / "model.onnx"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["layers"], document["sparse"], document["eligible"]) == (4, 3, 2)
    assert document["of"][3] == {
        "name": "9",
        "operator": "Gemm",
        "shape": [10, 48],
        "precision": "fp16",
        "pattern": "yes",
        "zeros": 0.5,
        "refused": "alignment: 10 output channels are no multiple of 8",
        "small": True,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no ONNX file: expected FILE.onnx"), (b"\xff\xffgarbage", "not ONNX: "), (b"", "not ONNX: it holds no op")],
)
def test_what_is_no_onnx_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "some.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        layers_of_file(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    with pytest.raises(InputError, match=r"expected model.onnx in the folder"):
        layers_of_file(tmp_path)


def test_inspect_of_a_file_takes_no_options_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--sparsity", "some.onnx", "--shape", "1x3x8x8"]) == 2
    assert "--sparsity reads a file as it is" in capsys.readouterr().err
