"""The 2:4 pattern as a runtime finds it: in the initialisers of an ONNX file, layer by layer.

What counts is the weight that the runtime multiplies by, so Transpose, Cast, QuantizeLinear and DequantizeLinear
between an initialiser and its layer are looked through; a quantised weight is zero where its integer is the zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprune.eligibility import GROUP, refusal
from edgeprune.errors import InputError, RuntimeMissing, SurgeryError, install_line
from edgeprune.kernel import Kernel

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = npt.NDArray[Any]
LAYERS = ("Conv", "Gemm", "MatMul")
_LOOKED_THROUGH = ("Transpose", "Cast", "QuantizeLinear", "DequantizeLinear")
_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}
ASYMMETRIC = "zero point: another integer than 0 stands for zero, and only zeros are left out"
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
        weight = _weight(node, known)
        if weight is None:
            continue
        shape = weight.values.shape
        kernel = _kernel(node, shape, weight.precision)
        yield SparseLayer(
            name=node.name,
            operator=node.op_type,
            shape=shape,
            precision=weight.precision,
            pattern=_pattern(weight.is_zero),
            zeros=float(weight.is_zero.mean()),
            refused=refusal(kernel) if weight.symmetric else ASYMMETRIC,
            small=min(kernel.c_in, kernel.c_out) < SMALL,
        )


def counts(layers: Sequence[SparseLayer]) -> dict[str, int]:
    """Of all layers, of those that are 2:4, and of these that sparse tensor cores may take."""
    sparse = [layer for layer in layers if layer.pattern == "yes"]
    eligible = sum(layer.refused is None for layer in sparse)
    return {"layers": len(layers), "sparse": len(sparse), "eligible": eligible}


def check_written(path: Path, parameters: Iterable[str]) -> None:
    """`SurgeryError` for those of these parameters that an ONNX file has not as 2:4, with zeros that are 0, and why."""
    found: dict[str, str] = {}
    for layer in layers_of_file(path):
        fault = "the pattern is lost" if layer.pattern != "yes" else ""
        fault = ASYMMETRIC if layer.refused == ASYMMETRIC else fault
        name = layer.name.partition("#")[0]
        found[name] = found.get(name) or fault
    faults = {name: found.get(name.removesuffix(".weight"), "no layer reads it") for name in parameters}
    told = "; ".join(f"'{name}': {fault}" for name, fault in faults.items() if fault)
    if told:
        raise SurgeryError(f"{path.name} has not the 2:4 weights that the plan wants: {told}")


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


@dataclass(frozen=True, kw_only=True)
class _Constant:
    """Values, where they are zero, in which precision; `symmetric`: the zero of its integers is 0."""

    values: Array
    is_zero: Array
    precision: str
    symmetric: bool = True

    def each(self, move: Callable[[Array], Array]) -> _Constant:
        """With its elements at other places."""
        return replace(self, values=move(self.values), is_zero=move(self.is_zero))


def _weight(node: onnx.NodeProto, known: _Constants) -> _Constant | None:
    """The weight as [outputs, inputs, ...]."""
    options = {a.name: a.i for a in node.attribute}
    places = (1, 0) if node.op_type == "MatMul" else (1,)
    for place in places:
        if place >= len(node.input):
            continue
        found = known.find(node.input[place])
        if found is None or found.values.ndim < 2:
            continue
        inputs_first = (node.op_type == "MatMul" and place == 1) or (
            node.op_type == "Gemm" and not options.get("transB")
        )
        if inputs_first:
            found = found.each(lambda a: np.moveaxis(a, -1, -2))
        return found if node.op_type == "Conv" else found.each(lambda a: a.reshape(-1, a.shape[-1]))
    return None


class _Constants:
    """Initialisers and Constant nodes, found through what only re-orders, rescales or rounds them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.tensors: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.makers: Mapping[str, onnx.NodeProto] = {name: node for node in graph.node for name in node.output}

    def find(self, name: str) -> _Constant | None:
        """None where it is not constant."""
        if name in self.tensors:
            return _constant(self.tensors[name])
        node = self.makers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            return None if tensor is None else _constant(tensor)
        source = self.find(node.input[0]) if node.op_type in _LOOKED_THROUGH else None
        if source is None or node.op_type == "Cast":
            return source
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            return source.each(lambda a: np.transpose(a, order))
        return self._quantised(node, source)

    def _quantised(self, node: onnx.NodeProto, source: _Constant) -> _Constant:
        """The integers that a QuantizeLinear gives or a DequantizeLinear takes."""
        q, zero = source.values, self._parameter(node, 2, source.values)
        if node.op_type == "QuantizeLinear":
            with np.errstate(divide="ignore", invalid="ignore"):  # a file may hold a scale of 0
                q = np.rint(q.astype(np.float32) / self._parameter(node, 1, q).astype(np.float32)) + zero
            if zero.dtype.kind in "iu":
                q = q.clip(np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max)
        return _Constant(values=q, is_zero=q == zero, precision="int8", symmetric=not zero.any())

    def _parameter(self, node: onnx.NodeProto, place: int, values: Array) -> Array:
        """Scales or zero points as they broadcast over the values: one, one an index of the axis, or one a block."""
        found = self.find(node.input[place]) if len(node.input) > place and node.input[place] else None
        if found is None or found.values.size == 1:
            return np.zeros((), np.uint8) if found is None else found.values.reshape(())
        options = {a.name: a.i for a in node.attribute}
        axis = options.get("axis", 1) % values.ndim
        if found.values.ndim == values.ndim > 1:
            return found.values.repeat(options["block_size"], axis).take(range(values.shape[axis]), axis)
        return found.values.reshape([-1 if i == axis else 1 for i in range(values.ndim)])


def _constant(tensor: onnx.TensorProto) -> _Constant:
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    return _Constant(values=values, is_zero=values == 0, precision=_PRECISIONS.get(str(values.dtype), "fp32"))
