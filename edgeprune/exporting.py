"""Export: from a pruned module to the files that a device's runtime loads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.device import Device, check_precision
from edgeprune.eligibility import DENSE, TWO_OF_FOUR
from edgeprune.engine import Calibration, Engine
from edgeprune.errors import InputError
from edgeprune.folders import atomic_folder
from edgeprune.modelled import backend_of, installed

if TYPE_CHECKING:
    import torch

    from edgeprune.backends import Backend
    from edgeprune.kernel import Kernel
    from edgeprune.pruned import Pruned

NO_CALIBRATION = (
    "int8 needs calibration data, on which the ranges of activations are found: give it with --data "
    "(`calibration=` in Python)"
)
ENGINE_FILES = frozenset({"model.xml", "model.bin", "model.onnx", "model.json", "model.tflite", "build_engine.sh"})


def export(
    pruned: Pruned,
    device: Device,
    out: Path | str,
    *,
    precision: str | None = None,
    kernels: Sequence[Kernel] = (),
    weights: str = "fp32",
    only_to_time: bool = False,
    calibration: Calibration = (),
) -> Engine:
    """Write the engine of `pruned` for a device's runtime into the folder `out`, whole or not at all.

    `precision` is the device's first unless told. `kernels` are those of the pruned network, which only a modelled
    device needs; they are found by tracing when not given. `weights="fp16"` halves the file where the format can,
    `weights="sparse"` leaves zeros out of it where the runtime multiplies faster then (docs/sparsity.md).
    With `only_to_time` a modelled device gets the list of kernels alone, which takes no time to write. An engine in
    int8 takes `calibration`, batches of inputs on which the ranges of activations are found; `InputError` without.
    What the plan wants as 2:4 is so in the ONNX that is written, in any precision, or `SurgeryError` says where not.
    """
    precision = precision or device.precisions[0]
    check_precision(device, precision)
    from edgeprune.sparsity.holding import baked

    pruned = baked(pruned)
    backend = installed(device, only_to_time=only_to_time, engines_in=[precision])
    check_calibration(pruned, precision, calibration, backend)
    if backend.modelled and not kernels:
        kernels = kernels_of(pruned.module, pruned.example_inputs, device, precision, formats=pruned.plan.formats)
    with replaceable_folder(Path(out), ENGINE_FILES) as folder:
        engine = backend.export(
            pruned,
            folder,
            precision,
            kernels=kernels,
            weights=weights,
            calibration=calibration,
            **layout_of(device, backend),
        )
        _check_pattern(engine, pruned)
    used = calibration if precision == "int8" else ()
    return replace(engine.at(Path(out).resolve()), device=device, pruned=pruned, calibration=used)


def export_dense(
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    device: Device,
    out: Path | str,
    *,
    precision: str | None = None,
    calibration: Calibration = (),
) -> Engine:
    """The engine of the model as it is: what ratios are taken to."""
    return export(as_pruned(model, example_inputs), device, out, precision=precision, calibration=calibration)


def _check_pattern(engine: Engine, pruned: Pruned) -> None:
    """`SurgeryError` where what the plan wants as 2:4 is not so in the initialisers that were written."""
    from edgeprune.pattern import sparse_names
    from edgeprune.sparsity.onnx_weights import check_written

    known = dict(pruned.module.named_parameters(remove_duplicate=False))
    names = [name for name in sparse_names(pruned.plan.formats) if name in known]  # others are of a dropped block
    if names and engine.onnx is not None:
        check_written(engine.onnx, names)


def check_calibration(pruned: Pruned, precision: str, calibration: Calibration, backend: Backend) -> None:
    """`InputError` where an engine in int8 is to be written without batches to find ranges on, or with other ones than
    the model takes. A formula has no activations."""
    if precision != "int8" or getattr(backend, "engines", not backend.modelled) is False:
        return
    if not calibration:
        raise InputError(NO_CALIBRATION)
    wanted = [(tuple(tensor.shape), tensor.dtype) for tensor in pruned.example_inputs]
    for number, batch in enumerate(calibration):
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in batch]
        if found != wanted:
            raise InputError(f"calibration batch {number} holds {_listed(found)}, the model takes {_listed(wanted)}")


def _listed(tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{dtype} {shape}".removeprefix("torch.") for shape, dtype in tensors) or "nothing"


def layout_of(device: Device, backend: Backend) -> dict[str, str]:
    """The option `layout` of a device, if it has one, for a backend that writes more than one."""
    if "layout" not in device.options:
        return {}
    runtime = getattr(backend, "runtime", backend)  # of a remote or modelled device the one behind it
    if "layout" not in inspect.signature(runtime.export).parameters:
        raise InputError(f"device '{device.name}' has an option 'layout', but {backend.name} writes only one")
    return {"layout": str(device.options["layout"])}


def as_pruned(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> Pruned:
    """The dense model in the form that `export` takes: an empty plan."""
    from edgeprune.plan_json import Plan
    from edgeprune.pruned import Pruned
    from edgeprune.weights import weights_hash

    return Pruned(module=model, plan=Plan(structure_hash=""), example_inputs=example_inputs, origin=weights_hash(model))


def kernels_of(
    module: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    device: Device,
    precision: str,
    *,
    formats: Mapping[str, str] | None = None,
) -> tuple[Kernel, ...]:
    """The kernels that a device's runtime makes of a module, one an instance, found by tracing it.

    `formats` are a plan's: the kernel of a 2:4 weight is a 2:4 kernel.
    """
    from edgeprune.formats import parameter_of
    from edgeprune.graph import analyse, tracing

    graph = analyse(tracing.trace_program(module, example_inputs))
    units = backend_of(device).partition(graph, precision)
    sparse = {name for name, form in (formats or {}).items() if form == TWO_OF_FOUR}
    return tuple(
        replace(unit.dense, sparsity=TWO_OF_FOUR if parameter_of(unit, graph) in sparse else DENSE) for unit in units
    )


@contextmanager
def replaceable_folder(out: Path, files: frozenset[str]) -> Iterator[Path]:
    """`atomic_folder`, but one that holds any other file than these (names relative to it) is not replaced."""
    check_replaceable(out, files)
    with atomic_folder(out) as folder:
        yield folder


def check_replaceable(out: Path, files: frozenset[str]) -> None:
    """`InputError` where `out` is a file, or a folder that holds any other file than these."""
    if out.is_file():
        raise InputError(f"{out} is a file, expected a folder to write")
    held = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    strange = sorted(name for name in held if name not in files)
    if strange:
        raise InputError(f"{out} holds other files ({strange[0]}); name a new folder, or empty this one")
