"""Files for `benchmarks.unstructured`: zeros anywhere in the weights, stored densely or sparsely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.backends.tflite.flatbuffer import constant, kind, packed, parsed
from edgeprune.backends.tflite.sparse import MOST_ROWS, sparsity_of, store_sparse
from edgeprune.backends.tflite.versions import declare
from edgeprune.device import load_device
from edgeprune.exporting import as_pruned, export
from edgeprune.tflite_file import TfliteFile

Array = np.ndarray[Any, Any]
UNIT = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
SAME, VALID = 0, 1
SOME = 0.3
"""Zeros from which a file is stored sparsely here, far below what edgeprune asks for: to see where it begins to pay."""


def linear(rows: int, c_in: int, c_out: int) -> bytes:
    """One linear with a bias."""
    file = TfliteFile()
    inputs = [file.input("x", (rows, c_in)), file.constant(_drawn((c_out, c_in))), _zeros(file, c_out)]
    return file.to_bytes({"y": file.operator("FULLY_CONNECTED", inputs, (rows, c_out), keepNumDims=True)})


def chain(size: int = 32, width: int = 16, blocks: int = 2) -> bytes:
    """All that XNNPACK's sparse inference asks for: 3x3 of stride 2 and padding 1 on three channels, inverted
    residuals, a mean over the positions."""
    file, half = TfliteFile(), size // 2
    x = file.input("x", (1, size, size, 3))
    paddings = file.integers([(0, 0), (1, 1), (1, 1), (0, 0)])
    x = file.operator("PAD", [x, paddings], (1, size + 2, size + 2, 3))
    stride = UNIT | {"strideH": 2, "strideW": 2}
    x = _conv(file, x, _drawn((width, 3, 3, 3)), (1, half, half, width), padding=VALID, **stride)
    for _ in range(blocks):
        wide, before = 6 * width, x
        x = _conv(file, x, _drawn((wide, 1, 1, width)), (1, half, half, wide), padding=VALID, **UNIT)
        inputs = [x, file.constant(_drawn((1, 3, 3, wide))), _zeros(file, wide)]
        options = {"padding": SAME, "depthMultiplier": 1, **UNIT}
        x = file.operator("DEPTHWISE_CONV_2D", inputs, (1, half, half, wide), **options)
        file.fuse("RELU6")
        x = _conv(file, x, _drawn((width, 1, 1, wide)), (1, half, half, width), padding=VALID, **UNIT)
        x = file.operator("ADD", [before, x], (1, half, half, width))
    x = file.operator("MEAN", [x, file.integers([1, 2])], (1, 1, 1, width), keepDims=True)
    return file.to_bytes({"y": x})


def _conv(file: TfliteFile, x: int, weight: Array, shape: tuple[int, ...], **options: int) -> int:
    made = file.operator("CONV_2D", [x, file.constant(weight), _zeros(file, len(weight))], shape, **options)
    file.fuse("RELU6")
    return made


def _drawn(shape: tuple[int, ...]) -> Array:
    rng = np.random.default_rng(sum(shape))
    drawn: Array = rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    return drawn


def _zeros(file: TfliteFile, count: int) -> int:
    return file.constant(np.zeros(count, np.float32))


def with_zeros(content: bytes, share: float) -> bytes:
    """The smallest weights of every linear and 1x1 convolution set to zero, that share of each."""
    model = parsed(content)
    for operator, values in _multiplied(model):
        order = np.argsort(np.abs(values), axis=None, kind="stable")
        values.reshape(-1)[order[: round(share * values.size)]] = 0
        buffer = model.subgraphs[0].tensors[int(operator.inputs[1])].buffer
        model.buffers[buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    return packed(model)


def stored_sparse(content: bytes, most_rows: int = MOST_ROWS) -> bytes:
    """As edgeprune exports it."""
    model = parsed(content)
    store_sparse(model, least=SOME, most_rows=most_rows)
    declare(model)
    return packed(model)


def densified(content: bytes) -> bytes:
    """As TensorFlow's converter stores sparse weights: each behind an operator that makes it dense, which the delegate
    takes as the sign to look for sparse kernels."""
    from ai_edge_litert import schema_py_generated as schema

    model = parsed(content)
    graph = model.subgraphs[0]
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = schema.BuiltinOperator.DENSIFY, 124, 1
    model.operatorCodes.append(code)
    before = []
    for operator, values in [*_multiplied(model)]:
        if (values == 0).mean() < SOME:
            continue
        index = int(operator.inputs[1])
        tensor, dense = graph.tensors[index], schema.TensorT()
        tensor.sparsity, kept = sparsity_of(values)
        model.buffers[tensor.buffer].data = np.frombuffer(kept.tobytes(), np.uint8)
        dense.name, dense.shape, dense.type = tensor.name, tensor.shape, tensor.type
        graph.tensors.append(dense)
        made = schema.OperatorT()
        made.opcodeIndex = len(model.operatorCodes) - 1
        made.inputs, made.outputs = [index], [len(graph.tensors) - 1]
        made.builtinOptionsType, made.builtinOptions = schema.BuiltinOptions.DensifyOptions, schema.DensifyOptionsT()
        before.append(made)
        operator.inputs = [operator.inputs[0], made.outputs[0], *operator.inputs[2:]]
    graph.operators = [*before, *graph.operators]
    return packed(model)


def _multiplied(model: Any) -> Iterator[tuple[Any, Array]]:
    """Linears and 1x1 convolutions with their weights, which may be written to."""
    for operator in model.subgraphs[0].operators:
        if kind(model, operator) not in ("CONV_2D", "FULLY_CONNECTED"):
            continue
        index = int(operator.inputs[1])
        shape = [int(size) for size in model.subgraphs[0].tensors[index].shape]
        values = constant(model, index, np.float32)
        if values.size and (len(shape) == 2 or shape[1:3] == [1, 1]):
            yield operator, values.reshape(shape).copy()


LITERT_FORMS: dict[str, Callable[[bytes], bytes]] = {
    "zeros, stored densely": bytes,
    "sparse tensors behind DENSIFY": densified,
    "sparse tensors of linears": stored_sparse,
}


class Feedforward(nn.Module):
    """Four blocks of a transformer's linears, 384 to 1536 and back, on 32 rows: multiples of 64, as OpenVINO asks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(384, 1536), nn.ReLU(), nn.Linear(1536, 384)) for _ in range(4))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [1, 32, 384] to the same."""
        made: torch.Tensor = self.blocks(x)
        return made


def networks(mobilenet: Path | None) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Networks by name, each with an input; random weights but for MobileNetV2, whose file may be given."""
    import torchvision

    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    mobile = torchvision.models.mobilenet_v2(weights=None)
    if mobilenet is not None:
        mobile.load_state_dict(torch.load(mobilenet, weights_only=True))
    return {
        "MobileNetV2": (mobile.eval(), image),
        "AlexNet": (torchvision.models.alexnet(weights=None).eval(), image),
        "feed-forward": (Feedforward().eval(), torch.randn(1, 32, 384)),
    }


def converted(module: nn.Module, x: torch.Tensor, folder: Path) -> bytes:
    """A dense .tflite file."""
    return export(as_pruned(module, (x,)), load_device("host-tflite"), folder, precision="fp32").path.read_bytes()


def openvino_file(module: nn.Module, x: torch.Tensor, precision: str, folder: Path) -> Path:
    """model.xml, dense."""
    calibration = [(torch.randn(x.shape, generator=torch.Generator().manual_seed(i)),) for i in range(8)]
    given, device = as_pruned(module, (x,)), load_device("host-openvino")
    return export(
        given, device, folder, precision=precision, calibration=calibration if precision == "int8" else ()
    ).path


def openvino_zeros(source: Path, share: float, folder: Path) -> Path:
    """The smallest weights of every linear and 1x1 convolution set to zero, that share of each, integers or floats."""
    import openvino as ov

    model = ov.Core().read_model(str(source))
    for node in model.get_ops():
        shape = [*node.get_output_shape(0)] if node.get_type_name() == "Constant" else []
        if node.get_type_name() != "Constant" or len(shape) < 2 or min(shape[:2]) < 2 or shape[2:] not in ([], [1, 1]):
            continue
        values = np.array(node.data)
        order = np.argsort(np.abs(values.astype(np.float32)), axis=None, kind="stable")
        values.reshape(-1)[order[: round(share * values.size)]] = 0
        made = ov.op.Constant(values)
        for reader in [*node.output(0).get_target_inputs()]:
            reader.replace_source_output(made.output(0))
    folder.mkdir()
    ov.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
    return folder / "model.xml"
