"""The 2:4 pattern as a runtime finds it: in the initialisers of an ONNX file, layer by layer.

What counts is the weight that the runtime multiplies by, so Transpose, Cast and DequantizeLinear between an initialiser
and its layer are looked through; a quantised weight is zero where its integer is the zero point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprune.eligibility import GROUP, refusal
from edgeprune.errors import InputError, RuntimeMissing, install_line
from edgeprune.kernel import Kernel

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = npt.NDArray[Any]
LAYERS = ("Conv", "Gemm", "MatMul")
SMALL = 256
"""Input or output channels below which the dense kernel is mostly faster (DESIGN; only a measurement tells)."""


@dataclass(frozen=True, kw_only=True)
class SparseLayer:
    """One layer of an ONNX file that multiplies by constants.

    `shape` is [outputs, inputs, ...]; `pattern` says whether every group of four inputs has at most two weights that
    are not zero (`partial`: some groups), `zeros` the share of all weights that are zero, `refused` why sparse tensor
    cores don't take a layer of this shape and precision, None where they may.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    precision: str
    pattern: Literal["yes", "no", "partial"]
    zeros: float
    refused: str | None
    small: bool

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return {**vars(self), "shape": list(self.shape), "zeros": round(self.zeros, 6)}


def layers_of_file(path: Path) -> tuple[SparseLayer, ...]:
    """The layers of an ONNX file, or of a bundle's or export's `model.onnx`; `InputError` where there is none."""
    try:
        import onnx
    except ImportError:
        raise RuntimeMissing(f"reading ONNX needs a package: {install_line('onnx')}") from None
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"no ONNX file: expected {'model.onnx in the folder' if path.is_dir() else 'FILE.onnx'}", file=path
        )
    try:
        model = onnx.load(str(file))
    except Exception as error:  # protobuf's own classes
        raise InputError(f"not ONNX: {str(error).splitlines()[0]}", file=file) from None
    if not model.graph.node:
        raise InputError("not ONNX: it holds no operators", file=file)
    return tuple(layers_of(model))


def layers_of(model: onnx.ModelProto) -> Iterator[SparseLayer]:
    """Every convolution and matrix product with a constant weight, in order."""
    known = _Constants(model.graph)
    for node in model.graph.node:
        if node.op_type not in LAYERS:
            continue
        found = _weight(node, known)
        if found is None:
            continue
        weight, is_zero, precision = found
        kernel = _kernel(node, weight.shape, precision)
        yield SparseLayer(
            name=node.name,
            operator=node.op_type,
            shape=weight.shape,
            precision=precision,
            pattern=_pattern(is_zero),
            zeros=float(is_zero.mean()),
            refused=refusal(kernel),
            small=min(kernel.c_in, kernel.c_out) < SMALL,
        )


def _pattern(is_zero: Array) -> Literal["yes", "no", "partial"]:
    """Of zeros [outputs, inputs, ...]."""
    if is_zero.shape[1] % GROUP:
        return "no"
    groups = np.moveaxis(is_zero, 1, -1).reshape(-1, GROUP)
    holding = (groups.sum(axis=1) >= GROUP // 2).mean()
    return "yes" if holding == 1 else "partial" if holding > 0 else "no"


def _kernel(node: onnx.NodeProto, shape: tuple[int, ...], precision: str) -> Kernel:
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    operator = "conv" if node.op_type == "Conv" else "linear"
    return Kernel(operator=operator, c_in=shape[1] * groups, c_out=shape[0], groups=groups, precision=precision)


def _weight(node: onnx.NodeProto, known: _Constants) -> tuple[Array, Array, str] | None:
    """Weight as [outputs, inputs, ...], where it is zero, and its precision."""
    options = {a.name: a.i for a in node.attribute}
    places = (1, 0) if node.op_type == "MatMul" else (1,)
    for place in places:
        if place >= len(node.input):
            continue
        found = known.find(node.input[place])
        if found is None or found[0].ndim < 2:
            continue
        values, zeros, precision = found
        inputs_first = (node.op_type == "MatMul" and place == 1) or (
            node.op_type == "Gemm" and not options.get("transB")
        )
        if inputs_first:
            values, zeros = (np.moveaxis(a, -1, -2) for a in (values, zeros))
        if node.op_type != "Conv":
            values, zeros = (a.reshape(-1, a.shape[-1]) for a in (values, zeros))
        return values, zeros, precision
    return None


class _Constants:
    """Initialisers and Constant nodes, found through what only re-orders or rescales them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.tensors: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.makers: Mapping[str, onnx.NodeProto] = {name: node for node in graph.node for name in node.output}

    def find(self, name: str) -> tuple[Array, Array, str] | None:
        """(values, where they are zero, precision), or None where it is not constant."""
        from onnx import numpy_helper

        if name in self.tensors:
            values = numpy_helper.to_array(self.tensors[name])
            return values, values == 0, _precision(values.dtype)
        node = self.makers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            values = numpy_helper.to_array(tensor) if tensor is not None else np.zeros(())
            return values, values == 0, _precision(values.dtype)
        source = self.find(node.input[0]) if node.op_type in ("Transpose", "Cast", "DequantizeLinear") else None
        if source is None:
            return None
        values, zeros, precision = source
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            return np.transpose(values, order), np.transpose(zeros, order), precision
        if node.op_type == "DequantizeLinear":
            return values, values == self._zero_point(node, values), "int8"
        return values, zeros, precision

    def _zero_point(self, node: onnx.NodeProto, values: Array) -> Array:
        """Zero points as they broadcast over the values: one, or one an index of the axis."""
        found = self.find(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if found is None or found[0].ndim == 0 or found[0].size == 1:
            return np.asarray(0 if found is None else found[0].ravel()[0])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        return found[0].reshape([-1 if i == axis % values.ndim else 1 for i in range(values.ndim)])


def _precision(dtype: Any) -> str:
    return {"float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}.get(str(dtype), "fp32")
