"""A network in the form that a runtime loads: what `export` gives and `verify` measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgeprune.measurement import TensorSpec

if TYPE_CHECKING:
    import onnx
    import torch

    from edgeprune.device import Device
    from edgeprune.pruned import Pruned

ONNX_NAME = "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxslim")
"""What ONNX is written with."""
Calibration: TypeAlias = "Sequence[tuple[torch.Tensor, ...]]"
"""Batches of inputs as the model takes them, preprocessed and of the traced shapes: ranges of activations in int8 are
found on them."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Files of one network for one runtime, and what goes in and comes out.

    `path` is the file that the runner loads, `files` all that were written, in one folder. `precision` is that of the
    arithmetic; `notes` says what else was chosen, such as how weights are stored. `device` and `pruned` are there
    from `export` on: where it is to run, and the torch module that its outputs must equal. `calibration` are the
    batches on which the ranges of an engine in int8 were found.
    """

    backend: str
    precision: str
    path: Path
    files: tuple[Path, ...]
    onnx: Path | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    device: Device | None = field(default=None, repr=False)
    pruned: Pruned | None = field(default=None, repr=False, compare=False)
    calibration: Calibration = field(default=(), repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path.parent

    def at(self, folder: Path) -> Engine:
        """The same engine after its files have moved to `folder`."""
        return replace(
            self,
            path=folder / self.path.name,
            files=tuple(folder / file.name for file in self.files),
            onnx=folder / self.onnx.name if self.onnx else None,
        )

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.stat().st_size for file in self.files)


def specs_of_onnx(values: object) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of `graph.input` or `graph.output` of an ONNX model with static shapes."""
    from onnx import helper

    specs = []
    for value in values:  # type: ignore[attr-defined]
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=tuple(d.dim_value for d in tensor.shape.dim)))
    return tuple(specs)


def write_onnx(model: onnx.ModelProto, folder: Path) -> Path:
    """`model.onnx` in `folder`."""
    path = folder / ONNX_NAME
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path
