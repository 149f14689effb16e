"""An ONNX model in int8: integers in and out, QuantizeLinear and DequantizeLinear (QDQ) around what computes between.

Weights of contractions are int8, symmetric, with a scale for each output channel; a bias is int32 at the product of the
scales that it meets. Activations have one scale a tensor, with `LIMIT` at the end of its range: this is for kernels
with random weights, whose values are of order one, and no calibration. A runtime takes it up as int8 arithmetic or it
doesn't, and `edgeprune.precision` refuses what didn't.

Legend: s scale, z zero point, q integer; the value is s (q - z).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

LIMIT = 6.0
"""Largest magnitude that an activation has; larger ones saturate."""
LEAST = 1e-30
"""Weights that are all smaller count as 0: their scale would not fit into a float32."""
CONTRACTIONS = {"Conv": 0, "Gemm": 0, "MatMul": 1}
"""Operators with weights, and the axis of the output channels in them (of a Gemm transposed, as kernels have it)."""
CLAMPS = ("Relu", "Clip")


@dataclass(frozen=True, kw_only=True)
class Integers:
    """A type of integers and which of them is 0: int8 or uint8."""

    dtype: str
    zero: int

    @property
    def step(self) -> float:
        """The scale under which `LIMIT` is the largest value that they hold."""
        return LIMIT / (int(np.iinfo(self.dtype).max) - self.zero)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a runtime wants to find quantised tensors, so that it computes in int8.

    `positive` are tensors that are never negative: outputs of clamps, and inputs of convolutions, which mostly lie
    behind one; all others are `signed`. `every_step`: each node has integers before and behind it, else only the
    whole has. `whole_bias`: biases are int32, else they stay float32. `pools_last`: a max pool has its channels last.
    `half_range`: the weights of a network stay within ±64.
    """

    signed: Integers
    positive: Integers
    every_step: bool
    whole_bias: bool = True
    pools_last: bool = False
    half_range: bool = False


_CENTRED = Integers(dtype="int8", zero=0)
_UNSIGNED = Integers(dtype="uint8", zero=0)
TENSORRT = Form(signed=_CENTRED, positive=_CENTRED, every_step=False, whole_bias=False)
"""It dequantises no other integers, not even a bias of int32; what it fuses has none inside."""
OPENVINO = Form(signed=_CENTRED, positive=_UNSIGNED, every_step=False)
"""Within a network it makes unsigned ones of what is behind a clamp."""
ONNXRUNTIME = Form(
    signed=Integers(dtype="uint8", zero=128), positive=_UNSIGNED, every_step=True, pools_last=True, half_range=True
)
"""On x86-64, where it turns int8 activations into these itself; a clamp vanishes where 0 is the least integer. Between
convolutions it runs channels last and pools by an operator of its own, which a pool alone never becomes: channels first
it is 80 times as slow. Without VNNI it adds two products in 16 bits, which saturate unless weights are halved."""


def quantised(values: Array, axis: int | None) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8, without -128, and float32 scales: one for each index of `axis`, one in all where it is None."""
    others = tuple(a for a in range(values.ndim) if a != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scales = (np.where(largest > LEAST, largest, 1.0) / 127).astype(np.float32)
    q = np.clip(np.rint(values / scales), -127, 127).astype(np.int8)
    return q, scales.reshape(-1) if axis is not None else scales.reshape(())


def to_int8(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """A float32 kernel in QDQ form: its inputs and its output are integers as the `form` has them; names stay."""
    from onnx import helper

    if form.pools_last and [node.op_type for node in model.graph.node] == ["MaxPool"]:
        return _pool_channels_last(model, form)
    rewriting = _Rewriting(model, form)
    for node in model.graph.node:
        rewriting.take(node)
    graph = helper.make_graph(
        rewriting.nodes, model.graph.name, rewriting.inputs, rewriting.outputs, [*rewriting.constants.values()]
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _pool_channels_last(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """A max pool as ONNX Runtime's own operator: integers of one scale, which needs not be told."""
    from onnx import helper

    (pool,) = model.graph.node
    made = type(pool)()
    made.CopyFrom(pool)
    made.op_type, made.domain = "NhwcMaxPool", "com.microsoft"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(form.signed.dtype))
    described = []
    for value in (*model.graph.input, *model.graph.output):
        batch, channels, *sizes = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
        described.append(helper.make_tensor_value_info(value.name, kind, (batch, *sizes, channels)))
    graph = helper.make_graph([made], model.graph.name, described[:1], described[1:])
    opsets = [*model.opset_import, helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)


class _Rewriting:
    """The new graph as it grows, node by node of the old one."""

    def __init__(self, model: onnx.ModelProto, form: Form) -> None:
        from onnx import numpy_helper

        self.form = form
        self.old = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.last = model.graph.output[0].name
        self.readers: dict[str, list[str]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node.op_type)
        self.constants: dict[str, onnx.TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}  # value of the old graph to the dequantised one that stands for it
        self.inputs = [self._described(value, self._taken(value.name)) for value in model.graph.input]
        self.outputs = [self._described(value, self._given(model.graph.node[-1])) for value in model.graph.output]
        for value in model.graph.input:
            self._dequantise(value.name, value.name, self._taken(value.name))

    def take(self, node: onnx.NodeProto) -> None:
        """One node, its weights before it and, where integers belong there, its output quantised behind it."""
        made = type(node)()
        made.CopyFrom(node)
        made.input[:] = [self.renamed.get(name, name) for name in node.input]
        if node.op_type in CONTRACTIONS and node.input[1] in self.old:
            self._weights(node, made)
        for index, name in enumerate(node.input):
            if made.input[index] in self.old:
                made.input[index] = self._parameter(node, name)
        self.nodes.append(made)
        (output,) = node.output
        integers = self._given(node)
        if output == self.last:
            made.output[0] = f"{output}_real"
            self._node("QuantizeLinear", made.output[0], *self._scale(integers), output=output)
        elif self.form.every_step and not set(self.readers[output]) & set(CLAMPS):
            self._node("QuantizeLinear", output, *self._scale(integers), output=f"{output}_q")
            self._dequantise(f"{output}_q", output, integers)

    def _weights(self, node: onnx.NodeProto, made: onnx.NodeProto) -> None:
        axis = CONTRACTIONS[node.op_type]
        q, scales = quantised(self.old[node.input[1]], axis)
        made.input[1] = self._integers(node.input[1], q, scales, axis)
        if len(node.input) > 2 and self.form.whole_bias:
            s = scales * np.float32(self._taken(node.input[0]).step)
            bias = np.rint(self.old[node.input[2]] / s).astype(np.int32)
            made.input[2] = self._integers(node.input[2], bias, s, 0)

    def _parameter(self, node: onnx.NodeProto, name: str) -> str:
        """A constant that is no weight: bounds, shapes and numbers as they are; an array in int8 if all else is."""
        if not self.form.every_step or node.op_type in (*CLAMPS, "Reshape") or self.old[name].ndim == 0:
            return self._constant(name, self.old[name])
        q, scale = quantised(self.old[name], None)
        kind = self.form.signed
        return self._dequantised(name, (q.astype(np.int16) + kind.zero).astype(kind.dtype), scale, kind.zero)

    def _integers(self, name: str, q: Array, scales: Array, axis: int) -> str:
        return self._dequantised(name, q, scales, np.zeros(len(scales), q.dtype), axis=axis)

    def _dequantised(self, name: str, q: Array, scale: Array, zero: npt.ArrayLike, **axis: int) -> str:
        values = (("q", q), ("s", scale), ("z", np.asarray(zero, q.dtype)))
        parts = [self._constant(f"{name}_{part}", value) for part, value in values]
        return self._node("DequantizeLinear", *parts, output=f"{name}_real", **axis)

    def _dequantise(self, name: str, old: str, integers: Integers) -> None:
        self.renamed[old] = self._node("DequantizeLinear", name, *self._scale(integers), output=f"{name}_real")

    def _taken(self, name: str) -> Integers:
        """The integers of a value by what reads it."""
        return self.form.positive if name == "x" and "Conv" in self.readers[name] else self.form.signed

    def _given(self, node: onnx.NodeProto) -> Integers:
        """The integers of a node's output."""
        return self.form.positive if node.op_type in CLAMPS else self.form.signed

    def _scale(self, integers: Integers) -> tuple[str, str]:
        """Names of the scale and the zero point of an activation."""
        kind = "signed" if integers == self.form.signed else "positive"
        scale = self._constant(f"s_{kind}", np.array(integers.step, np.float32))
        return scale, self._constant(f"z_{kind}", np.array(integers.zero, integers.dtype))

    def _constant(self, name: str, value: Array) -> str:
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def _described(self, value: onnx.ValueInfoProto, integers: Integers) -> onnx.ValueInfoProto:
        """The description of an input or output as integers."""
        from onnx import helper

        made = type(value)()
        made.CopyFrom(value)
        made.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(integers.dtype))
        return made

    def _node(self, operator: str, *inputs: str, output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"{operator}_{output}", **attributes))
        return output
