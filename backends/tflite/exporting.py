"""A .tflite file, made by `litert_torch` and quantised by `ai_edge_quantizer`. Inputs and outputs keep torch's dtypes
and shapes, int8 ones too: the file turns images to channels last itself, once, where they come in, and quantises there.
With `layout="channels_last"` the images come in as they are stored everywhere else, and nothing is turned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.backends.tflite.conversion import Sample, convert, quantise
from edgeprune.backends.tflite.flatbuffer import WEIGHTED, constant, dtype, kind, packed, parsed, scales, spec, text
from edgeprune.backends.tflite.halving import halve
from edgeprune.backends.tflite.sparse import store_sparse
from edgeprune.backends.tflite.versions import declare, least_runtime
from edgeprune.engine import Engine
from edgeprune.errors import InputError, did_you_mean
from edgeprune.layer_norms import has_layer_norm_in_module

if TYPE_CHECKING:
    import torch

    from edgeprune.engine import Calibration
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "int8")
WEIGHTS = {"fp32": ("fp32", "fp16", "int8", "sparse"), "int8": ("fp32", "int8")}
"""How weights may be stored, by the precision of the arithmetic: in int8 they are int8 whatever was asked."""
LAYOUTS = ("channels_first", "channels_last")
_TURNS = ((0, 2, 3, 1), (0, 3, 1, 2))
_PASSING = ("RESHAPE", "MUL")  # between a transposed key and the product with it
_NORMALISING = ("ADD", "MEAN", "MUL", "RESHAPE", "RSQRT", "SUB")  # of mean and variance alone


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
    layout: str = "channels_first",
) -> Engine:
    """Write model.tflite.

    `weights="fp16"` halves it; they become fp32 again when it is loaded. `weights="int8"` quarters it: convolutions and
    linears quantise their inputs as these come (dynamic range) and multiply integers, all else and what passes between
    is fp32, which the precision stays. `weights="sparse"` leaves the zeros of linears out where that is faster
    (`store_sparse`), and is an `InputError` where it is nowhere. Precision int8 takes `calibration`, batches as the
    network takes them, for the ranges of all activations. `layout="channels_last"` takes images as [n, h, w, c];
    outputs stay as they are.
    """
    _check(precision, weights, calibration, layout)
    last = layout == "channels_last"
    name = type(pruned.module).__name__
    content, names = convert(pruned.module, pruned.example_inputs, channels_last=last)
    if precision == "int8":
        samples = _samples(content, pruned.example_inputs, calibration, channels_last=last)
        content = quantise(
            content,
            name,
            samples=samples,
            signature=_signature(content),
            floats=floats(content),
            contractions_alone=has_layer_norm_in_module(pruned.module, pruned.example_inputs),
        )
    elif weights == "int8":
        content = quantise(content, name)
    model = parsed(content)
    _name_weights(model, pruned.module, outer=2 if last else 1)
    _name(model, names)
    changes = layout_changes(model)
    expected = 0 if last else sum(tensor.dim() == 4 for tensor in pruned.example_inputs)
    if changes > expected:
        _warn_of_layouts(changes - expected)
    stored = store_sparse(model) if weights == "sparse" else ""
    if weights == "fp16":
        halve(model)
    declare(model)
    path = folder / "model.tflite"
    path.write_bytes(packed(model))
    graph = model.subgraphs[0]
    return Engine(
        backend="tflite",
        precision=precision,
        path=path,
        files=(path,),
        onnx=None,
        inputs=tuple(spec(graph.tensors[index]) for index in graph.inputs),
        outputs=tuple(spec(graph.tensors[index]) for index in graph.outputs),
        notes=_notes(model, precision, weights, layout, changes) | ({"stored sparse": stored} if stored else {}),
    )


def _check(precision: str, weights: str, calibration: Sequence[Any], layout: str) -> None:
    """`InputError` for what can't be written."""
    if precision not in PRECISIONS:
        raise InputError(f"LiteRT has no arithmetic in {precision}; known: {', '.join(PRECISIONS)}")
    if weights not in WEIGHTS[precision]:
        known = ", ".join(WEIGHTS[precision])
        raise InputError(f"LiteRT can't store weights as {weights!r} at {precision}; known: {known}")
    if layout not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise InputError(f"no layout {layout!r}{did_you_mean(str(layout), LAYOUTS)} (known: {known})")
    if precision == "int8" and not calibration:
        raise InputError(
            "int8 takes calibration data, from which the ranges of the activations are read, and there is none: give "
            "--data (calibration=batches); weights='int8' at fp32 needs none"
        )


def _samples(
    content: bytes,
    example_inputs: tuple[torch.Tensor, ...],
    calibration: Sequence[tuple[torch.Tensor, ...]],
    *,
    channels_last: bool,
) -> list[Sample]:
    """What to run the file on: batches cut to the batch size that it has, by the names of its signature."""
    signature = parsed(content).signatureDefs[0]
    names = [text(entry.name) for entry in sorted(signature.inputs, key=_place)]
    found: list[Sample] = []
    for number, batch in enumerate(calibration):
        shapes = [tuple(x.shape[1:]) for x in batch]
        wanted = [tuple(x.shape[1:]) for x in example_inputs]
        size, whole = example_inputs[0].shape[0], min((len(x) for x in batch if x.dim()), default=0)
        if shapes != wanted or whole < size:
            told = ", ".join(str(tuple(x.shape)) for x in batch) or "no tensors"
            asked = ", ".join(str(tuple(x.shape)) for x in example_inputs)
            raise InputError(f"calibration batch {number} has {told}, the network takes {asked}")
        for start in range(0, whole - size + 1, size):
            cut = [x[start : start + size].to(e.dtype) for x, e in zip(batch, example_inputs, strict=True)]
            if channels_last:
                cut = [x.permute(0, 2, 3, 1) if x.dim() == 4 else x for x in cut]
            found.append(dict(zip(names, (x.contiguous().numpy() for x in cut), strict=True)))
    return found


def _signature(content: bytes) -> str:
    return text(parsed(content).signatureDefs[0].signatureKey)


def floats(content: bytes) -> list[str]:
    """Outputs of the operators that make up a norm over a width: in int8 its squares lose what the kernel keeps.

    (x - mean) r, or x r - mean r, from the mean on: plans count these layers in fp32 too. A scale or an eps is a
    constant on the way.
    """
    model = parsed(content)
    graph = model.subgraphs[0]
    fixed = {i for i, tensor in enumerate(graph.tensors) if model.buffers[tensor.buffer].data is not None}
    operators = [(kind(model, op), set(map(int, op.inputs)) - fixed, int(op.outputs[0]), op) for op in graph.operators]
    values = {int(op.inputs[0]) for name, _, _, op in operators if name == "SQUARED_DIFFERENCE"}
    means, statistics, shifted = _means(model), set[int](), set[int]()
    found: list[int] = []
    for name, inputs, output, _ in operators:
        squares = name == "SQUARED_DIFFERENCE" and inputs & statistics
        if output in means or squares or (name in _NORMALISING and inputs and inputs <= statistics):
            statistics.add(output)
        elif name in ("SUB", "MUL") and inputs & statistics and inputs <= statistics | values:
            shifted.add(output)
        elif not (name in ("MUL", "ADD") and inputs & shifted and inputs <= statistics | shifted):  # else the end
            continue
        found.append(output)
    return [text(graph.tensors[index].name) for index in found]


def _means(model: Any) -> set[int]:
    """What squared differences take, back to the operator that computed the mean; a reshape may stand between."""
    operators = model.subgraphs[0].operators
    found = {int(operator.inputs[1]) for operator in operators if kind(model, operator) == "SQUARED_DIFFERENCE"}
    for operator in reversed(operators):
        if kind(model, operator) == "RESHAPE" and int(operator.outputs[0]) in found:
            found.add(int(operator.inputs[0]))
    made = {int(operator.outputs[0]): kind(model, operator) for operator in operators}
    return {tensor for tensor in found if made.get(tensor) in ("MEAN", "RESHAPE")}


def _notes(model: Any, precision: str, weights: str, layout: str, changes: int) -> dict[str, str]:
    """What else was chosen, and what it asks of a runtime."""
    notes = {
        "weights": "int8" if precision == "int8" else weights,
        "written by": f"litert-torch {metadata.version('litert-torch')}",
        "layout": layout.replace("_", " "),
        "layout changes": str(changes),
    }
    if notes["weights"] == "int8":
        notes["quantised by"] = f"ai-edge-quantizer {metadata.version('ai-edge-quantizer')}"
    if least := least_runtime(model):
        notes["least runtime"] = f"TensorFlow Lite {least[0]} ({least[1]})"
    if precision == "int8":
        notes["scales"] = "; ".join(_edge_scales(model))
    return notes


def _edge_scales(model: Any) -> list[str]:
    """How inputs and outputs are quantised, just inside of the file."""
    graph = model.subgraphs[0]
    told = []
    for operator in graph.operators:
        name = kind(model, operator)
        if name not in ("QUANTIZE", "DEQUANTIZE"):
            continue
        inside, edge = (
            (operator.outputs[0], operator.inputs[0])
            if name == "QUANTIZE"
            else (
                operator.inputs[0],
                operator.outputs[0],
            )
        )
        if edge in (*graph.inputs, *graph.outputs):
            tensor = graph.tensors[inside]
            zero = int(tensor.quantization.zeroPoint[0])
            told.append(f"{text(graph.tensors[edge].name)} {scales(tensor)[0]:.6g} ({dtype(tensor)}, zero {zero})")
    return told


@cache  # once: a search exports many times
def _warn_of_layouts(count: int) -> None:
    log.warning(
        "the .tflite file changes between channels first and channels last %d times beside its inputs; each takes time",
        count,
    )


def _name(model: Any, parameters: Sequence[str]) -> None:
    """Put inputs and outputs into torch's order and name them, in place; the file's own names carry the places."""
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    graph.inputs = _in_order(signature.inputs)
    graph.outputs = _in_order(signature.outputs)
    base = "output" if "output" not in parameters else "result"
    outputs = [base] if len(graph.outputs) == 1 else [f"{base}_{index}" for index in range(len(graph.outputs))]
    for entry in signature.inputs:
        entry.name = parameters[_place(entry)]
        graph.tensors[entry.tensorIndex].name = entry.name
    for entry in signature.outputs:
        entry.name = outputs[_place(entry)]
        graph.tensors[entry.tensorIndex].name = entry.name


def _name_weights(model: Any, module: torch.nn.Module, *, outer: int) -> None:
    """Call the weight of a convolution or linear like its module, in place: the runner lays times at its door.

    The converter's names are paths such as `pkg.Net/torch.nn.Sequential_blocks/torch.nn.Conv2d_0;2`; `outer` modules
    stand before those inside of `module`.
    """
    tensors = model.subgraphs[0].tensors
    named: dict[str, int] = {}
    for operator in model.subgraphs[0].operators:
        if kind(model, operator) not in WEIGHTED:
            continue
        weight = int(operator.inputs[1])
        path = tensors[weight].name.decode().partition(";")[0].split("/")[outer:]
        found, part = list[str](), module
        for step in path:
            children = [name for name, _ in part.named_children() if step.endswith(f"_{name}")]
            if not children:
                break
            found.append(max(children, key=len))
            part = getattr(part, found[-1])
        name = ".".join(found)
        if found and weight not in named.values() and name not in named:
            named[name] = weight
    for name, weight in named.items():
        tensors[weight].name = name


def _in_order(entries: Sequence[Any]) -> list[int]:
    return [entry.tensorIndex for entry in sorted(entries, key=_place)]


def _place(entry: Any) -> int:
    """`args_1` and `output_1` are the second ones."""
    name = entry.name.decode() if isinstance(entry.name, bytes) else str(entry.name)
    return int(name.rpartition("_")[2])


def layout_changes(model: Any) -> int:
    """How many operators turn [n, c, h, w] into [n, h, w, c] or back; those for the product with a key don't count."""
    graph = model.subgraphs[0]
    readers: dict[int, list[Any]] = {}
    for operator in graph.operators:
        for tensor in operator.inputs:
            readers.setdefault(tensor, []).append(operator)

    def multiplied(tensor: int) -> bool:
        for reader in readers.get(tensor, []):
            reads = kind(model, reader)
            if reads == "BATCH_MATMUL" or (reads in _PASSING and multiplied(reader.outputs[0])):
                return True
        return False

    return sum(
        kind(model, operator) == "TRANSPOSE"
        and tuple(constant(model, operator.inputs[1], np.int32)) in _TURNS
        and not multiplied(operator.outputs[0])
        for operator in graph.operators
    )
