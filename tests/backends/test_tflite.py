"""LiteRT: the file of each kernel against ONNX's reference, engines against torch, and what the file holds."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from edgeprune.backends import find_backend
from edgeprune.device import Device, load_device
from edgeprune.engine import Engine
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.exporting import as_pruned, export, export_dense
from edgeprune.graph import analyse, tracing
from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import model_from_kernel
from edgeprune.transport import Session, open_session
from tests.backends.test_contract import KERNELS, agrees, conv, draw, plain
from tests.small_models import Net, redrawn

pytestmark = pytest.mark.contract

EPILOGUES = ["bias", "add", "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu"]
CHANNELS_ALIKE = {"add", "avg_pool", "cat", "conv", "linear", "max_pool", "mul"}
"""A bias or a residual after one of the others is fused by no runtime, and ONNX has their channels elsewhere."""
FIRST = {kernel.operator: kernel for kernel in reversed(KERNELS)}


@pytest.fixture(scope="module", autouse=True)
def runtime(require: Callable[[str], None]) -> None:
    require("tflite")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(load_device("host-tflite")) as session:
        yield session


def operators(content: bytes) -> list[tuple[str, Any]]:
    """Name and options of each operator, in order."""
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items()}
    return [
        (names[model.operatorCodes[operator.opcodeIndex].builtinCode], operator.builtinOptions)
        for operator in model.subgraphs[0].operators
    ]


def built(kernel: Kernel) -> list[str]:
    from edgeprune.kernel_tflite import bytes_from_kernel

    return [name for name, _ in operators(bytes_from_kernel(kernel))]


@pytest.mark.parametrize(
    ("operator", "step"),
    [
        (operator, step)
        for operator in sorted(FIRST.keys() - {"attention", "softmax", "transpose", "activation"})
        for step in (EPILOGUES if operator in CHANNELS_ALIKE else EPILOGUES[2:])
    ],
)
def test_every_operator_with_every_epilogue_is_that_of_onnx(
    operator: str, step: str, session: Session, tmp_path: Path
) -> None:
    first = FIRST[operator]
    kernel = Kernel.from_json(first.to_json() | {"epilogue": [*(["bias"] if operator == "linear" else []), step]})
    path = find_backend("tflite").build(kernel, tmp_path)
    loaded = session.load(kernel.key, path)
    inputs = {spec.name: draw(spec.shape, index) for index, spec in enumerate(loaded.inputs)}
    (output,) = session.run(kernel.key, list(inputs.values()))
    agrees(output, kernel, path, inputs)
    session.unload(kernel.key)


@pytest.mark.parametrize("name", EPILOGUES[2:])
def test_an_activation_alone_is_that_of_onnx(name: str, session: Session, tmp_path: Path) -> None:
    kernel = plain("activation", name)
    path = find_backend("tflite").build(kernel, tmp_path)
    session.load(kernel.key, path)
    x = 4 * draw((1, 14, 14, 24), 0)
    (output,) = session.run(kernel.key, [x])
    agrees(output, kernel, path, {"x": x})


def test_same_padding_where_it_is_what_torch_pads() -> None:
    strided: dict[str, Any] = {"stride": (2, 2)}
    assert built(conv(16, 24, "bias")) == ["CONV_2D"]
    assert built(conv(16, 24, "bias", **strided)) == ["PAD", "CONV_2D"]  # 14 pixels: SAME would pad at the end only
    assert built(conv(16, 24, "bias", spatial=(13, 13), **strided)) == ["CONV_2D"]  # 13: one on each side
    assert built(conv(16, 16, "bias", groups=16, **strided)) == ["PAD", "DEPTHWISE_CONV_2D"]
    assert built(conv(16, 24, "bias", window=(1, 1), padding=(0, 0))) == ["CONV_2D"]


def test_only_clamps_go_into_the_operator_before() -> None:
    assert built(conv(16, 24, "bias", "relu6")) == ["CONV_2D"]
    assert built(conv(16, 24, "bias", "silu")) == ["CONV_2D", "LOGISTIC", "MUL"]
    assert built(conv(16, 24, "bias", "add", "relu")) == ["CONV_2D", "ADD"]
    assert built(plain("activation", "relu")) == ["RELU"]


def test_weights_are_those_of_the_onnx_file_with_channels_last() -> None:
    from edgeprune.kernel_tflite import bytes_from_kernel

    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    kernel = conv(6, 4, "bias", groups=2)
    model = schema.ModelT.InitFromPackedBuf(bytes_from_kernel(kernel, seed=3), 0)
    graph = model.subgraphs[0]
    _, weight, bias = graph.operators[0].inputs
    weights = [np.frombuffer(model.buffers[graph.tensors[t].buffer].data.tobytes(), np.float32) for t in (weight, bias)]
    from onnx import numpy_helper

    expected = [numpy_helper.to_array(tensor) for tensor in model_from_kernel(kernel, seed=3).graph.initializer]
    assert list(graph.tensors[weight].shape) == [4, 3, 3, 3]
    assert np.array_equal(weights[0].reshape(4, 3, 3, 3), expected[0].transpose(0, 2, 3, 1))
    assert np.array_equal(weights[1], expected[1])


def test_a_convolution_over_one_axis_slides_over_the_second_of_two(session: Session, tmp_path: Path) -> None:
    line: dict[str, Any] = {"spatial": (9,), "window": (3,), "stride": (1,), "padding": (1,), "dilation": (1,)}
    kernel = Kernel(operator="conv", c_in=4, c_out=6, epilogue=("bias", "relu"), **line)
    session.load("line", find_backend("tflite").build(kernel, tmp_path))
    x = draw((1, 1, 9, 4), 0)
    (output,) = session.run("line", [x])
    from onnx import numpy_helper

    weight, bias = (
        torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model_from_kernel(kernel).graph.initializer
    )
    expected = torch.relu(nn.functional.conv1d(torch.from_numpy(x[:, 0]).mT, weight, bias, padding=1)).mT
    assert np.abs(output[:, 0] - expected.numpy()).max() <= 1e-5


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (plain("max_pool", window=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(2, 2)), "without dilation"),
        (
            conv(4, 4, spatial=(5, 5, 5), window=(3,) * 3, stride=(1,) * 3, padding=(1,) * 3, dilation=(1,) * 3),
            "one or two axes",
        ),
        (plain("cat", channels=1), "one channel"),
        (plain("activation"), "names itself"),
        (plain("add", "swizzle"), "unknown epilogue 'swizzle'"),
        (Kernel(operator="linear", c_in=4, c_out=4, sparsity="2:4"), "2:4"),
    ],
)
def test_what_cannot_be_built_names_the_kernel(kernel: Kernel, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        find_backend("tflite").build(kernel, tmp_path)
    assert str(caught.value).startswith(kernel.key)
    assert list(tmp_path.iterdir()) == []


def test_without_xnnpack_the_runtimes_own_kernels_run(tmp_path: Path) -> None:
    kernel = conv(16, 24, "bias", "relu")
    path = find_backend("tflite").build(kernel, tmp_path)
    x = draw((1, 14, 14, 16), 0)
    outputs = []
    for xnnpack in (True, False):
        with open_session(Device(name="d", backend="tflite", options={"xnnpack": xnnpack})) as session:
            session.load("k", path)
            outputs += session.run("k", [x])
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-5
    assert not np.array_equal(outputs[0], outputs[1])  # summed in another order


def test_a_result_does_not_change_with_runs(session: Session, tmp_path: Path) -> None:
    """An input's memory is its own: no operator writes there."""
    kernel = conv(16, 24, "bias", "silu")
    session.load("twice", find_backend("tflite").build(kernel, tmp_path))
    x = draw((1, 14, 14, 16), 0)
    before = session.run("twice", [x])[0]
    session.measure(["twice"])
    assert np.array_equal(session.run("twice", [x])[0], before)


def runner(**packages: Any) -> Any:
    """The runner's module where only these packages are installed."""
    text = find_backend("tflite").runner_path().read_text()
    made = types.ModuleType("runner")
    hidden = dict.fromkeys(("ai_edge_litert", "tflite_runtime"), None)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (hidden | packages).items():
            patch.setitem(sys.modules, name, module)
        exec(compile(text, "runner", "exec"), made.__dict__)
    return made


def test_the_older_runtime_does_and_none_names_the_line_that_installs_it() -> None:
    older, interpreter = types.ModuleType("tflite_runtime"), types.ModuleType("interpreter")
    older.__version__ = "2.14.0"  # type: ignore[attr-defined]
    older.interpreter = interpreter  # type: ignore[attr-defined]
    assert runner(tflite_runtime=older).version() == "2.14.0"
    with pytest.raises(ImportError, match=r"pip install 'edgeprune\[litert\]'"):
        runner()


def test_a_version_whose_c_interface_is_not_known_tells_no_times() -> None:
    newer = types.ModuleType("ai_edge_litert")
    newer.__version__ = "9.0.0"  # type: ignore[attr-defined]
    newer.interpreter = types.ModuleType("interpreter")  # type: ignore[attr-defined]
    handle = types.SimpleNamespace(options={"profile": True}, interpreter=None, path="never opened")
    assert runner(ai_edge_litert=newer).node_times(handle) is None


def test_a_kernel_alone_takes_as_long_as_the_whole(session: Session, tmp_path: Path) -> None:
    session.load("alone", find_backend("tflite").build(conv(16, 24, "bias"), tmp_path), profile=True)
    assert session.node_times("alone") is None


class TwoOutputs(nn.Module):
    """Outputs in another order than they are computed, one of them a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.conv(image)) * scale
        return y.mean((2, 3)), y


def parity(engine: Engine) -> float:
    """max|a - b| / max|b| over all outputs, b those of torch."""
    assert engine.pruned is not None and engine.device is not None
    inputs = engine.pruned.example_inputs
    with open_session(engine.device) as session:
        loaded = session.load("engine", engine.path)
        found = session.run("engine", [tensor.numpy() for tensor in inputs])
    assert (loaded.inputs, loaded.outputs) == (engine.inputs, engine.outputs)
    with torch.no_grad():
        result = engine.pruned.module.eval()(*inputs)
    wanted = [result] if isinstance(result, torch.Tensor) else list(result)
    pairs = [(a, b.numpy()) for a, b in zip(found, wanted, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def vit() -> nn.Module:
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    model: nn.Module = torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes)
    return model


@pytest.mark.parametrize(
    ("model", "size", "changes"),
    [(Net, 16, 2), (torchvision.models.mobilenet_v2, 64, 1), (vit, 32, 2)],
)
def test_engines_compute_what_torch_computes(
    model: Callable[[], nn.Module], size: int, changes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`changes`: of the layout. A convolutional network turns its input; tokens, and a mean over axes, turn back."""
    exporting: Any = importlib.import_module("edgeprune.backends.tflite.exporting")
    exporting._warn_of_layouts.cache_clear()
    module = redrawn(model())
    with caplog.at_level(logging.WARNING):
        engine = export_dense(module, (torch.randn(1, 3, size, size),), load_device("host-tflite"), tmp_path / "engine")
    assert parity(engine) <= 1e-5
    assert (engine.notes["layout changes"], len(caplog.messages)) == (str(changes), changes - 1)


def test_dropped_blocks_vanish(tmp_path: Path) -> None:
    net = redrawn(Net(dropped=True))
    engine = export_dense(net, (torch.randn(1, 3, 16, 16),), load_device("host-tflite"), tmp_path / "engine")
    names = [name for name, _ in operators(engine.path.read_bytes())]
    assert names.count("CONV_2D") == 1 and "ADD" not in names
    assert parity(engine) <= 1e-5


def test_inputs_and_outputs_keep_torchs_order_names_and_shapes(tmp_path: Path) -> None:
    inputs = torch.randn(1, 3, 8, 8), torch.rand(1, 4, 1, 1)
    engine = export_dense(redrawn(TwoOutputs()), inputs, load_device("host-tflite"), tmp_path / "engine")
    assert [(spec.name, spec.shape) for spec in engine.inputs] == [("image", (1, 3, 8, 8)), ("scale", (1, 4, 1, 1))]
    assert [(spec.name, spec.shape) for spec in engine.outputs] == [("output_0", (1, 4)), ("output_1", (1, 4, 8, 8))]
    assert parity(engine) <= 1e-5


def test_half_precision_storage_halves_the_file(tmp_path: Path) -> None:
    net, device = redrawn(Net(192)), load_device("host-tflite")
    given = as_pruned(net, (torch.randn(1, 3, 16, 16),))
    half = export(given, device, tmp_path / "fp16", weights="fp16")
    assert half.num_bytes < 0.6 * 4 * sum(parameter.numel() for parameter in net.parameters())
    assert 1e-5 < parity(half) <= 2e-3
    with pytest.raises(InputError, match="fp32, fp16"):
        export(given, device, tmp_path / "int4", weights="int4")


class Unconvertible(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.eigvals(x)
        return values.real


def test_what_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    told = "LiteRT has no counterpart of torch's operator 'aten.linalg_eig', which is called in Unconvertible: "
    with pytest.raises(EdgepruneError, match=told) as caught:
        export_dense(Unconvertible(), (torch.randn(4, 4),), load_device("host-tflite"), tmp_path / "engine")
    assert "\n" not in str(caught.value) and not (tmp_path / "engine").exists()


def test_units_are_the_operators_of_the_file() -> None:
    """A clamp goes into what is before it, an add is its own; a hard swish is neither."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.hardswish(self.a(x))
            return torch.relu(x + nn.functional.relu6(self.b(x)))

    graph = analyse(tracing.trace_program(Block(), (torch.randn(1, 8, 4, 4),)))
    units = [unit.dense for unit in find_backend("tflite").partition(graph, "fp32")]
    assert [(kernel.operator, kernel.epilogue) for kernel in units] == [
        ("conv", ("bias",)),
        ("activation", ("hardswish",)),
        ("conv", ("bias", "relu6")),
        ("add", ("relu",)),
    ]
