"""From a torch module to clean ONNX: static shapes, batch norms folded, nodes named as the parameters they read.

The names matter: runtimes keep node names in their profiles, so the time of a node can be laid at the door of one
module of the model. The folding matters too: it halves the work of torch's exporter, which runs once an attempt.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from edgeprune.engine import ONNX_PACKAGES
from edgeprune.errors import EdgepruneError, RuntimeMissing, not_installed
from edgeprune.graph.program import canonical_names
from edgeprune.unsupported import unsupported

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram
    from torch.fx import Node

CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_KEEPS_ZERO = frozenset({"Identity", "Expand", "Reshape", "Transpose", "Cast"})
_ACTIVATIONS = frozenset({"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish", "Elu", "Gelu"})
_LARGE_BYTES = 1 << 16
_MAX_BYTES = 2**31 - 1  # of one protobuf message


def onnx_from_module(module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """The module in evaluation mode as ONNX, simplified and checked; the module itself stays as it is.

    `example_inputs` give names' order, shapes (all static) and dtypes. Inputs are named as the parameters of
    `forward`, outputs `output`, or `output_0`, `output_1`, ... A Conv, Gemm or MatMul node that reads a parameter
    `a.b.weight` is named `a.b` (`a.b#1` when it is read a second time).
    """
    if missing := not_installed(ONNX_PACKAGES, "onnx"):
        raise RuntimeMissing(missing)
    import onnx
    import onnxslim

    with quiet(), evaluating(module), torch.no_grad():
        try:
            program = torch.export.export(module, example_inputs)
        except Exception as error:
            raise EdgepruneError(f"torch.export cannot trace {type(module).__name__}: {first_line(error)}") from error
        parameters = dict(program.graph_signature.inputs_to_parameters)
        operators = {node.name: name for node, name in canonical_names(program.graph).items()}
        means = names_of_means(program)
        fold_batch_norms(program)
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                output_names=_output_names(program),
                optimize=True,
                verify=False,
                verbose=False,
            )
        except Exception as error:
            words = f"torch.onnx cannot export {type(module).__name__}: {_root_cause(error)}"
            raise unsupported(program, error, "ONNX") or EdgepruneError(words) from error
        assert exported is not None
        model: onnx.ModelProto = exported.model_proto
        drop_zero_adds(model)
        name_operators(model, operators, means)
        names = name_contractions(model, parameters)
        weights = _take_weights(model)
        model = onnxslim.slim(model, skip_optimizations=["weight_tying"], skip_fusion_patterns=["FusionGemm"])
        _put_back(model, weights)
        _restore_names(model, names)
        _name_values(model)
        _strip(model)
    if model.ByteSize() > _MAX_BYTES:
        raise EdgepruneError(f"the model takes {model.ByteSize() / 2**30:.1f} GiB, an ONNX file holds at most 2 GiB")
    onnx.checker.check_model(model)
    return model


def fold_batch_norms(program: ExportedProgram) -> int:
    """Fold every batch norm that follows a convolution into it, in place; gives how many.

    w' = w·s, b' = (b - μ)·s + β with s = γ / √(σ² + ε) per output channel (Jacob et al. 2018, section 3.2). Only where
    nobody else reads the convolution's output, its weight or the norm's β; b' takes the place of β. The tensors of
    the module that was exported are not written to.
    """
    aten = torch.ops.aten
    convolutions = {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    }
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    count = 0
    for norm in program.graph.nodes:
        if norm.target is not aten.batch_norm.default or norm.args[5]:
            continue
        convolution = norm.args[0]
        if convolution.target not in convolutions or len(convolution.users) != 1:
            continue
        _, weight, *rest = convolution.args
        bias = rest[0] if rest else None
        read = [weight, *norm.args[1:5], *([] if bias is None else [bias])]
        known = all(node is not None and node.name in names for node in read)
        if not known or len(weight.users) != 1 or len(norm.args[2].users) != 1:
            continue
        _fold(program, names, norm, convolution)
        norm.replace_all_uses_with(convolution)
        program.graph.erase_node(norm)
        count += 1
    program.graph_module.recompile()
    return count


def _fold(program: ExportedProgram, names: Mapping[str, str], norm: Node, convolution: Node) -> None:
    tensors = {**program.constants, **program.state_dict}

    def value(node: Any) -> torch.Tensor:
        tensor: torch.Tensor = tensors[names[node.name]]
        return tensor.detach()

    _, gamma, beta, mean, variance = norm.args[:5]
    source, weight, *rest = convolution.args
    assert isinstance(weight, torch.fx.Node) and isinstance(beta, torch.fx.Node)
    epsilon = float(norm.args[7])  # type: ignore[arg-type]
    scale = value(gamma).double() / torch.sqrt(value(variance).double() + epsilon)
    shift = -value(mean).double() * scale + value(beta).double()
    if rest and rest[0] is not None:
        shift += value(rest[0]).double() * scale
    kernel = value(weight)
    folded = kernel * scale.to(kernel.dtype).reshape(-1, *[1] * (kernel.dim() - 1))
    program.state_dict[names[weight.name]] = torch.nn.Parameter(folded, requires_grad=False)
    program.state_dict[names[beta.name]] = torch.nn.Parameter(shift.to(kernel.dtype), requires_grad=False)
    convolution.args = (source, weight, beta, *rest[1:])


def drop_zero_adds(model: onnx.ModelProto) -> int:
    """Cut `x + 0` (a dropped block) where x has the shape of the sum already, in place; gives how many went."""
    graph = model.graph
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    zeros = _zero_values(graph)
    outputs = {value.name for value in graph.output}
    instead: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = instead.get(name, name)
        if node.op_type == "Add" and node.output[0] not in outputs:
            shape = shapes.get(node.output[0])
            for zero, other in (tuple(node.input), tuple(reversed(node.input))):
                if zero in zeros and shape is not None and shapes.get(other) == shape:
                    instead[node.output[0]] = other
                    break
    kept = [node for node in graph.node if node.output[0] not in instead]
    del graph.node[:]
    graph.node.extend(kept)
    return len(instead)


def _zero_values(graph: onnx.GraphProto) -> set[str]:
    """Names of values that are known to be all zeros."""
    from onnx import numpy_helper

    added = {name for node in graph.node if node.op_type == "Add" for name in node.input}
    roots = {name for node in graph.node if node.op_type in _KEEPS_ZERO for name in node.input[:1]}
    zeros = set()
    for tensor in graph.initializer:
        if tensor.name in added | roots and len(tensor.dims) > 1 and not numpy_helper.to_array(tensor).any():
            zeros.add(tensor.name)
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            fill = [numpy_helper.to_array(item.t) for item in node.attribute if item.name == "value"]
            if not fill or not fill[0].any():
                zeros.add(node.output[0])
        elif node.op_type in _KEEPS_ZERO and node.input[0] in zeros:
            zeros.add(node.output[0])
    return zeros


def name_operators(model: onnx.ModelProto, operators: Mapping[str, str], means: Sequence[str] = ()) -> None:
    """Name each node `operator/k` as the k-th that the traced operator became, in place.

    `operators`: node of the exported program to its name in every trace of the model; `means`: such names of all that
    torch makes a mean of, in order.
    """
    calls = [_call(node) for node in model.graph.node]
    made = sorted({call for call in calls if re.fullmatch(r"mean(_\d+)?", call)}, key=lambda call: int(call[5:] or 0))
    if len(made) == len(means):
        known = {**operators, **dict(zip(made, means, strict=True))}
    else:  # of something else too: no name, rather than that of another one
        known = {**operators, **{call: f"decomposed_{call}" for call in made}}
    seen: Counter[str] = Counter()
    for node, call in zip(model.graph.node, calls, strict=True):
        if call:
            name = known.get(call, call)
            node.name = f"{name}/{seen[name]}"
            seen[name] += 1


def _call(node: onnx.NodeProto) -> str:
    """The call of the decomposed program that it was made from; empty where that isn't noted."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    found = re.match(r"%(\w+) :", notes.get("pkg.torch.onnx.fx_node", ""))
    return found[1] if found else ""


def names_of_means(program: ExportedProgram) -> list[str]:
    """All that torch makes a mean of, in order, by the names of the trace: means, RMS norms, pools over all places."""
    aten = torch.ops.aten
    means = {aten.mean.dim, aten.mean.default, aten.rms_norm.default}
    pools = {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default}
    return [
        name
        for node, name in canonical_names(program.graph).items()
        if node.target in means or (node.target in pools and {*cast("list[int]", node.args[1])} == {1})
    ]


def _take_weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Make inputs of the large weights while the simplifier works, in place; gives them by name.

    It copies the whole model a dozen times (14 of the 25 s that ViT-B took). Only matrices that nothing but a MatMul
    or Gemm reads: there is nothing to fold in them.
    """
    from onnx import helper

    graph = model.graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    taken = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.ByteSize() > _LARGE_BYTES and readers.get(tensor.name, {""}) <= {"MatMul", "Gemm"}
    }
    kept = [tensor for tensor in graph.initializer if tensor.name not in taken]
    inputs = [helper.make_tensor_value_info(name, tensor.data_type, tensor.dims) for name, tensor in taken.items()]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(inputs)
    return taken


def _put_back(model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> None:
    graph = model.graph
    inputs = [value for value in graph.input if value.name not in weights]
    read = {name for node in graph.node for name in node.input}
    del graph.input[:]
    graph.input.extend(inputs)
    graph.initializer.extend(tensor for name, tensor in weights.items() if name in read)


def name_contractions(model: onnx.ModelProto, parameters: Mapping[str, str]) -> dict[str, str]:
    """Name each contraction as the parameter it reads, in place; gives {output value: name} of those renamed.

    `parameters` maps the placeholders of the exported program to the names of the module's parameters.
    """
    sizes = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    matrices = {name for name, size in sizes.items() if size >= 2}
    seen: Counter[str] = Counter()
    names: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in CONTRACTIONS or not matrices.intersection(node.input):
            continue
        parameter = _parameter_of(node, set(parameters.values()), parameters)
        if parameter is None:
            continue
        name = parameter.removesuffix(".weight")
        node.name = f"{name}#{seen[name]}" if seen[name] else name
        seen[name] += 1
        names[node.output[0]] = node.name
    return names


def _parameter_of(node: onnx.NodeProto, known: set[str], placeholders: Mapping[str, str]) -> str | None:
    """The parameter it reads; else what torch's exporter noted: the traced call, the module that made it."""
    if len(node.input) > 1 and node.input[1] in known:
        return str(node.input[1])
    notes = {entry.key: entry.value for entry in node.metadata_props}
    for argument in re.findall(r"%(\w+)", notes.get("pkg.torch.onnx.fx_node", "").partition("args =")[2]):
        if not placeholders.get(argument, "bias").endswith("bias"):
            return placeholders[argument]
    scopes = re.findall(r"'([^']*)'", notes.get("pkg.torch.onnx.name_scopes", ""))
    return f"{scopes[-2]}.weight" if len(scopes) > 1 and f"{scopes[-2]}.weight" in known else None


def _restore_names(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """The simplifier may put a new node in the place of one it fused, under a name made from the old output's."""
    taken = {node.name for node in model.graph.node}
    for node in model.graph.node:
        name = names.get(node.output[0]) or names.get(node.name)
        if node.op_type in CONTRACTIONS and name is not None and name not in taken:
            node.name = name


def _name_values(model: onnx.ModelProto) -> None:
    """Call the output of a contraction `a.b` and of the activation after it `a.b/out` and `a.b/act`: ONNX Runtime names
    the nodes that it makes by fusing and by changing the layout after the values that they give."""
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    fixed = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    owners: dict[str, str] = {}  # value of a contraction that one node reads: the contraction's name
    for node in graph.node:
        source, value = (node.input[0] if node.input else ""), node.output[0]
        if node.op_type in CONTRACTIONS:
            owner, kind = node.name, "out"
            owners |= {value: owner} if readers[value] == 1 else {}
        elif node.op_type in _ACTIVATIONS and source in owners:
            owner, kind = owners[source], "act"
        else:
            continue
        if value not in fixed:
            renamed[value] = f"{owner}/{kind}"
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for known in graph.value_info:
        known.name = renamed.get(known.name, known.name)


def _strip(model: onnx.ModelProto) -> None:
    """Remove notes of the exporter (stack traces with paths of this machine) and doubled shape entries."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    values = {name for node in graph.node for name in node.output}
    unique = {value.name: value for value in graph.value_info if value.name in values}
    kept = [value for _, value in sorted(unique.items())]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def _output_names(program: ExportedProgram) -> list[str]:
    signature = program.graph_signature
    inputs = set(signature.user_inputs)
    count = len(signature.user_outputs)
    base = "output" if "output" not in inputs else "result"
    return [base] if count == 1 else [f"{base}_{index}" for index in range(count)]


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporter and the simplifier print, warn and log; whoever reads our output wants none of it."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def first_line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
