"""A .tflite file, made by `litert_torch`. Inputs and outputs keep torch's shapes: the file turns images to channels
last itself, once, where they come in."""

from __future__ import annotations

import atexit
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.engine import Engine
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.measurement import TensorSpec
from edgeprune.precision import check_exportable

if TYPE_CHECKING:
    import torch

    from edgeprune.engine import Calibration
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned

log = logging.getLogger(__name__)

CONVERTER = Path(__file__).with_name("converter.py")
WEIGHTS = ("fp32", "fp16")
_LAYOUTS = ((0, 2, 3, 1), (0, 3, 1, 2))
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_PASSING = ("RESHAPE", "MUL")  # between a transposed key and the product with it


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
) -> Engine:
    """Write model.tflite. `weights="fp16"` halves it; they become fp32 again when it is loaded."""
    check_exportable(precision)
    if weights not in WEIGHTS:
        raise InputError(f"LiteRT can't store weights as {weights!r}; known: {', '.join(WEIGHTS)}")
    model, names = _convert(pruned.module, pruned.example_inputs)
    graph = model.subgraphs[0]
    _name_weights(model, pruned.module)
    _name(model, names)
    images = sum(tensor.dim() == 4 for tensor in pruned.example_inputs)
    changes = layout_changes(model)
    if changes > images:
        _warn_of_layouts(changes - images)
    if weights == "fp16":
        _halve(model)
    path = folder / "model.tflite"
    path.write_bytes(_packed(model))
    return Engine(
        backend="tflite",
        precision=precision,
        path=path,
        files=(path,),
        onnx=None,
        inputs=tuple(_spec(graph.tensors[index]) for index in graph.inputs),
        outputs=tuple(_spec(graph.tensors[index]) for index in graph.outputs),
        notes={
            "weights": weights,
            "written by": f"litert-torch {metadata.version('litert-torch')}",
            "layout changes": str(changes),
        },
    )


class _Converter:
    """The converter's process, started when first needed and kept: its imports take as long as a small conversion."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def convert(self, source: Path, target: Path, *, wide: bool) -> str | None:
        """None, or what the converter says is wrong; a process that died is told by its last words."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(CONVERTER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                text=True,
            )
            atexit.register(self.close)
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        try:
            self.process.stdin.write(json.dumps({"source": str(source), "target": str(target), "wide": wide}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        except BaseException:
            self.close()  # interrupted: the next answer would belong to this question
            raise
        if answer:
            error: str | None = json.loads(answer)["error"]
            return error
        code = self.process.wait()
        self.close()
        self.said.seek(0)
        words = [line.strip() for line in self.said.read().splitlines() if line.strip()]
        return words[-1] if words else f"exit code {code}"

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_CONVERTER = _Converter()


@cache  # once: a search exports many times
def _warn_of_layouts(count: int) -> None:
    log.warning(
        "the .tflite file changes between channels first and channels last %d times beside its inputs; each takes time",
        count,
    )


def _convert(module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> tuple[Any, list[str]]:
    """The module in evaluation mode as a schema's `ModelT`, and the names of its inputs."""
    import torch
    from ai_edge_litert import schema_py_generated as schema

    from edgeprune.onnx_export import evaluating, first_line, fold_batch_norms, quiet
    from edgeprune.unsupported import unsupported

    name = type(module).__name__
    with tempfile.TemporaryDirectory(prefix="edgeprune-tflite-") as folder:
        source, target = Path(folder, "program.pt2"), Path(folder, "model.tflite")
        with quiet(), evaluating(module), torch.no_grad():
            try:
                program = torch.export.export(module, example_inputs)
            except Exception as error:
                raise EdgepruneError(f"torch.export cannot trace {name}: {first_line(error)}") from error
            fold_batch_norms(program)
            torch.export.save(program, source)
        wide = any(tensor.dtype in (torch.int64, torch.float64) for tensor in example_inputs)
        fault = _CONVERTER.convert(source, target, wide=wide)
        if fault is not None or not target.is_file():
            words = f"litert_torch cannot convert {name}: {fault or 'it wrote nothing'}"
            raise unsupported(program, fault or "", "LiteRT") or EdgepruneError(words)
        content = target.read_bytes()
    return schema.ModelT.InitFromPackedBuf(content, 0), list(program.graph_signature.user_inputs)


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


def _name_weights(model: Any, module: torch.nn.Module) -> None:
    """Call the weight of a convolution or linear like its module, in place: the runner lays times at its door.

    The converter's names are paths such as `pkg.Net/torch.nn.Sequential_blocks/torch.nn.Conv2d_0;2`.
    """
    tensors = model.subgraphs[0].tensors
    named: dict[str, int] = {}
    for operator in model.subgraphs[0].operators:
        if _kind(model, operator) not in _WEIGHTED:
            continue
        weight = int(operator.inputs[1])
        path = tensors[weight].name.decode().partition(";")[0].split("/")[1:]
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
            kind = _kind(model, reader)
            if kind == "BATCH_MATMUL" or (kind in _PASSING and multiplied(reader.outputs[0])):
                return True
        return False

    return sum(
        _kind(model, operator) == "TRANSPOSE"
        and tuple(_constant(model, operator.inputs[1], np.int32)) in _LAYOUTS
        and not multiplied(operator.outputs[0])
        for operator in graph.operators
    )


def _halve(model: Any) -> None:
    """Store the weights of contractions in half precision, in place, each behind an operator that widens it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    widened: dict[int, int] = {}
    before = []
    for operator in graph.operators:
        if _kind(model, operator) not in _WEIGHTED:
            continue
        weight = operator.inputs[1]
        tensor = graph.tensors[weight]
        if model.buffers[tensor.buffer].data is None or tensor.type != schema.TensorType.FLOAT32:
            continue
        if weight not in widened:
            widened[weight] = len(graph.tensors)
            before.append(_widening(model, weight, len(graph.tensors)))
        operator.inputs = [operator.inputs[0], widened[weight], *operator.inputs[2:]]
    graph.operators = [*before, *graph.operators]
    used = {tensor.buffer for tensor in graph.tensors} | {entry.buffer for entry in model.metadata or ()}
    for index, buffer in enumerate(model.buffers):
        if index not in used:
            buffer.data = None


def _widening(model: Any, weight: int, widened: int) -> Any:
    """Halves the constant `weight`; gives the operator that makes the new tensor `widened` of it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    tensor, half, wide = graph.tensors[weight], schema.TensorT(), schema.TensorT()
    values = _constant(model, weight, np.float32).astype(np.float16)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(buffer)
    half.name, half.shape, half.type = tensor.name, tensor.shape, schema.TensorType.FLOAT16
    half.buffer = len(model.buffers) - 1
    wide.name, wide.shape, wide.type = tensor.name, tensor.shape, schema.TensorType.FLOAT32
    graph.tensors[weight] = half
    graph.tensors.append(wide)
    operator = schema.OperatorT()
    operator.opcodeIndex = _code(model, "DEQUANTIZE")
    operator.inputs, operator.outputs = [weight], [widened]
    operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
    operator.builtinOptions = schema.DequantizeOptionsT()
    return operator


def _code(model: Any, kind: str) -> int:
    from ai_edge_litert import schema_py_generated as schema

    wanted = getattr(schema.BuiltinOperator, kind)
    for index, code in enumerate(model.operatorCodes):
        if code.builtinCode == wanted:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = wanted, min(wanted, 127), 3
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _kind(model: Any, operator: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    code = model.operatorCodes[operator.opcodeIndex].builtinCode
    return next(str(name) for name, value in vars(schema.BuiltinOperator).items() if value == code)


def _constant(model: Any, tensor: int, dtype: type[Any]) -> Any:
    data = model.buffers[model.subgraphs[0].tensors[tensor].buffer].data
    return np.frombuffer(bytes(data) if data is not None else b"", dtype)


def _packed(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _spec(tensor: Any) -> TensorSpec:
    from ai_edge_litert import schema_py_generated as schema

    kinds = {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    name = tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name
    return TensorSpec(name=name, dtype=kinds[tensor.type], shape=tuple(int(size) for size in tensor.shape))
