"""OpenVINO's own format (model.xml, model.bin), made from ONNX; the ONNX file stays beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends.openvino.quantising import quantise
from edgeprune.engine import Engine, specs_of_onnx, write_onnx
from edgeprune.errors import InputError, RuntimeMissing, install_line

if TYPE_CHECKING:
    from edgeprune.engine import Calibration
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned

WEIGHTS = ("fp32", "fp16")


def export(
    pruned: Pruned,
    folder: Path,
    precision: str,
    *,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    calibration: Calibration = (),
) -> Engine:
    """Write model.xml, model.bin and model.onnx. `precision` is that of the arithmetic, which the runner asks for.

    `weights="fp16"` halves model.bin; weights are rounded to half precision, the arithmetic stays as it was. In int8
    model.xml holds integers, with ranges found on `calibration`; what stays float stays float32. model.onnx is what it
    was made from, in float32.
    """
    if weights not in WEIGHTS:
        raise InputError(f"OpenVINO can't store weights as {weights!r}; known: {', '.join(WEIGHTS)}")
    try:
        import openvino
    except ImportError as error:
        raise RuntimeMissing(f"OpenVINO is not installed: {install_line('openvino')}") from error
    from edgeprune.onnx_export import onnx_from_module

    model = onnx_from_module(pruned.module, pruned.example_inputs)
    source = write_onnx(model, folder)
    path = folder / "model.xml"
    read = openvino.Core().read_model(str(source))
    _name_nodes(read, {node.output[0]: node.name for node in model.graph.node})
    notes = {"weights": weights, "written by": f"openvino {openvino.get_version()}"}
    if precision == "int8":
        read = quantise(read, calibration)
        notes |= {"weights": "int8", "quantised by": f"nncf {metadata.version('nncf')}, {len(calibration)} batches"}
    openvino.save_model(read, str(path), compress_to_fp16=weights == "fp16")
    return Engine(
        backend="openvino",
        precision=precision,
        path=path,
        files=(path, path.with_suffix(".bin"), source),
        onnx=source,
        inputs=specs_of_onnx(model.graph.input),
        outputs=specs_of_onnx(model.graph.output),
        notes=notes,
    )


def _name_nodes(model: Any, names: Mapping[str, str]) -> None:
    """Give what computes the name of its module, up to a `/`; `names` maps ONNX values to the nodes that give them.

    OpenVINO calls the last node after the model's output, which of the two names a fused MatMul and bias bear in the
    profile depends on what else is fused, and of an operator that becomes several only the last bears its name.
    """
    for node in model.get_ordered_ops():
        name, slash, rest = node.get_friendly_name().partition("/")
        if name in names and node.get_type_name() != "Result":
            node.set_friendly_name(names[name] + slash + rest)
    given = {name.partition("/")[0] for name in names.values()}
    for node in reversed(model.get_ordered_ops()):
        if node.get_type_name() in ("Result", "Parameter", "Constant") or _base_name(node) in given:
            continue
        readers = [port.get_node() for value in node.outputs() for port in value.get_target_inputs()]
        bases = {_base_name(reader) for reader in readers}
        if len(bases) == 1 and bases <= given:
            node.set_friendly_name(f"{bases.pop()}/{node.get_friendly_name()}")
    for matmul in model.get_ordered_ops():
        if matmul.get_type_name() != "MatMul":
            continue
        name = matmul.get_friendly_name().partition("/")[0]
        readers = [port.get_node() for port in matmul.output(0).get_target_inputs()]
        if len(readers) == 1 and readers[0].get_type_name() == "Add" and _adds_constant(readers[0]):
            matmul.set_friendly_name(f"{name}/WithoutBiases")
            readers[0].set_friendly_name(name)


def _base_name(node: Any) -> str:
    return str(node.get_friendly_name()).partition("/")[0]


def _adds_constant(add: Any) -> bool:
    sources = [value.get_node() for value in add.input_values()]
    while any(node.get_type_name() == "Convert" for node in sources):
        sources = [n.input_value(0).get_node() if n.get_type_name() == "Convert" else n for n in sources]
    return any(node.get_type_name() == "Constant" for node in sources)
