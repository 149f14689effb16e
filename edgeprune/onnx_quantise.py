"""A whole network in int8 as ONNX, by ONNX Runtime's own quantiser: QuantizeLinear and DequantizeLinear (QDQ) where a
runtime takes them, with ranges found on data.

Which form a runtime takes is that of its kernels (`onnx_int8.Form`), which operators it computes in integers its
`Operators`. Weights are int8, symmetric, a scale for each output channel; activations have one scale a tensor, from the
least to the largest value that the calibration saw. Attention stays float: no runtime here computes it in integers, and
its softmax is what quantisation costs most.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import EdgepruneError, RuntimeMissing, install_line
from edgeprune.onnx_export import first_line, quiet
from edgeprune.onnx_int8 import quantised

if TYPE_CHECKING:
    import onnx

    from edgeprune.engine import Calibration
    from edgeprune.onnx_int8 import Form

_PASSING = frozenset({"Add", "Cast", "Div", "Expand", "Identity", "Mul", "Reshape", "Squeeze", "Sub", "Where"})
"""Operators between the matmuls of an attention and its softmax: scales, masks and shapes."""
LEAST_TABLE = 2**16
"""Bytes of a table of embeddings from which on its size counts."""
KEPT = 4
"""Batches whose activations are held in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Operators:
    """ONNX operators that are quantised: their inputs and, but of those in `inputs_alone`, their outputs.

    `weighted_alone` leaves matmuls of two activations in float.
    """

    names: frozenset[str]
    inputs_alone: frozenset[str] = frozenset()
    weighted_alone: bool = False


_MOVING = frozenset(
    "Concat Flatten Gather Pad Reshape Resize Slice Split Squeeze Transpose Unsqueeze".split()  # as integers
)
_CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "MaxPool"})
ONNXRUNTIME = Operators(
    names=_CONTRACTIONS | _POOLS | _MOVING | {"Add", "Clip", "LeakyRelu", "Mul", "Relu", "Sigmoid", "Softmax"},
)
ONNXRUNTIME_LAYER_NORMS = Operators(
    names=_CONTRACTIONS, inputs_alone=frozenset({"Gemm", "MatMul"}), weighted_alone=True
)
"""Of networks with layer norms. Their residual streams have a few values that are far larger than all others, so that
255 steps a tensor leave nothing of these (`docs/precisions.md`). A convolution needs integers on both sides."""
TENSORRT = Operators(names=_CONTRACTIONS | _POOLS, inputs_alone=_CONTRACTIONS | _POOLS)
"""Inputs alone leave what it fuses behind them whole."""


def quantise(model: onnx.ModelProto, calibration: Calibration, form: Form, operators: Operators) -> onnx.ModelProto:
    """The float32 model in QDQ form; inputs and outputs stay float32, nodes keep their names.

    `calibration` are batches of its inputs in order. `EdgepruneError` with ONNX Runtime's words where it can't.
    """
    try:
        import onnxruntime
        from onnxruntime import quantization
    except ImportError as error:
        raise RuntimeMissing(f"int8 is quantised by onnxruntime, which is missing: {install_line('onnx')}") from error
    import onnx

    onnxruntime.set_default_logger_severity(3)  # it warns past Python
    symmetric = form.signed.zero == 0
    kinds = sorted(operators.names & {node.op_type for node in model.graph.node})
    constants = {tensor.name for tensor in model.graph.initializer}
    matmuls = {node.name for node in model.graph.node if node.op_type == "MatMul" and not constants & set(node.input)}
    unweighted = matmuls if operators.weighted_alone else set()
    with tempfile.TemporaryDirectory(prefix="edgeprune-int8-") as folder, quiet():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model.SerializeToString())
        try:
            quantization.quantize_static(
                str(source),
                str(target),
                _Reader(model, calibration),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=kinds,
                nodes_to_exclude=sorted(attention_nodes(model) | unweighted),
                per_channel=True,
                reduce_range=form.half_range,
                activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": symmetric,
                    "WeightSymmetric": True,
                    "QuantizeBias": form.whole_bias,
                    "AddQDQPairToWeight": not form.whole_bias,
                    "OpTypesToExcludeOutputQuantization": sorted(operators.inputs_alone.intersection(kinds)),
                    "CalibStridedMinMax": next(n for n in range(KEPT, 0, -1) if len(calibration) % n == 0),
                },
            )
            return onnx.load(str(target))
        except Exception as error:  # of many kinds, from the quantiser and from the runtime that it calls
            raise EdgepruneError(f"onnxruntime can't quantise the model: {first_line(error)}") from error


def quantise_lookups(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which tables that rows are looked up in (embeddings) are int8, with a scale for each column.

    Rows are looked up as integers and made floats behind that: of a run these are few, a table may be most of the file.
    Tables below `LEAST_TABLE` bytes stay, and those that others read as well.
    """
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    readers = Counter(name for node in graph.node for name in node.input)
    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT and tensor.ByteSize() >= LEAST_TABLE
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        along_rows = not any(attribute.name == "axis" and attribute.i for attribute in node.attribute)
        table = tables.get(node.input[0]) if node.op_type == "Gather" and along_rows else None
        if table is None or readers[table.name] > 1:
            nodes.append(node)
            continue
        integers, scales = quantised(numpy_helper.to_array(table), axis=1)
        zeros = np.zeros(len(scales), np.int8)
        table.CopyFrom(numpy_helper.from_array(integers, table.name))
        added: dict[str, Any] = {f"{table.name}/scale": scales, f"{table.name}/zero": zeros}
        graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in added.items())
        (output,) = node.output
        node.output[0] = f"{output}/integers"
        nodes.append(node)
        inputs = [node.output[0], *added]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=f"{node.name}/floats", axis=-1))
    del graph.node[:]
    graph.node.extend(nodes)
    return made


class _Reader:
    """What ONNX Runtime's calibrators take: batches as dicts, one a call, None at the end."""

    def __init__(self, model: onnx.ModelProto, calibration: Calibration) -> None:
        self._names = [value.name for value in model.graph.input]
        self._calibration = calibration
        self._left = iter(calibration)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._left, None)
        return None if batch is None else {n: x.numpy() for n, x in zip(self._names, batch, strict=True)}

    def __len__(self) -> int:
        return len(self._calibration)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._calibration[start_index:end_index])


def attention_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the softmax, of the two matmuls of activations that it stands between, and of what lies between them."""
    givers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in model.graph.initializer}
    found: set[str] = set()

    def is_matmul(node: onnx.NodeProto) -> bool:
        return node.op_type == "MatMul" and not constants.intersection(node.input)

    def follow(node: onnx.NodeProto, forward: bool, path: tuple[str, ...] = ()) -> set[str]:
        """Names on the ways from a node to the nearest matmuls of activations."""
        beside = (
            [reader for name in node.output for reader in readers.get(name, ())]
            if forward
            else [givers[name] for name in node.input if name in givers]
        )
        names: set[str] = set()
        for each in beside:
            if is_matmul(each):
                names |= {*path, each.name}
            elif each.op_type in _PASSING:
                names |= follow(each, forward, (*path, each.name))
        return names

    for node in model.graph.node:
        if node.op_type == "Softmax":
            before, after = follow(node, forward=False), follow(node, forward=True)
            if before and after:
                found |= {node.name, *before, *after}
    return found
