"""The folder that a user deploys: engine, ONNX, plan, weights, and a manifest that says where every number came from.

    manifest.json           schema 1: hashes of all other files, versions, fingerprint, latencies, attempts, quality
    manifest.sha256         the hash of manifest.json, as `sha256sum -c` takes it
    model.xml + .bin, ...   the engine; model.onnx beside it (OpenVINO), model.tflite alone
    dense/                  the engine of the dense model, for ratios measured where the bundle is
    run.py                  checks, measures and runs the bundle where edgeprune is not
    plan.json               what was pruned
    weights.safetensors     state_dict of the pruned module
    parity.safetensors      a few inputs (`sample0.input0`, ...) and torch's outputs for them (`sample0.output0`, ...)
    preprocessing.json      from a picture to the input, where there is one
    rebuild.sh              makes this bundle again from its plan and weights

It is written whole or not at all, and no file is loaded before its hash was compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeprune import bundle_core
from edgeprune.backends import find_backend
from edgeprune.bundle_core import DENSE, Refused
from edgeprune.bundle_core import MANIFEST as MANIFEST
from edgeprune.bundle_core import SEAL as SEAL
from edgeprune.bundle_document import Contents as Contents
from edgeprune.bundle_document import document_of
from edgeprune.bundle_engine import read_samples
from edgeprune.bundle_program import NAME as RUN
from edgeprune.bundle_program import assemble_run
from edgeprune.device import Device
from edgeprune.engine import Engine
from edgeprune.errors import EdgepruneError, InputError, RuntimeMissing, TamperedError
from edgeprune.exporting import check_replaceable, replaceable_folder
from edgeprune.folders import write_atomically
from edgeprune.measurement import TensorSpec
from edgeprune.parity import Array, Sample

PLAN = "plan.json"
WEIGHTS = "weights.safetensors"
PARITY = "parity.safetensors"
PREPROCESSING = "preprocessing.json"
REBUILD = "rebuild.sh"


class _Entry(BaseModel):
    """One file: what it must be."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class _EngineEntry(BaseModel):
    """One engine: the file that the runner loads, relative to the bundle."""

    backend: str
    precision: str
    path: str
    files: list[str]
    onnx: str | None
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    notes: dict[str, str] = {}


class _Runtime(BaseModel):
    """What the engine was made for, and the least version that reads it, where that is known."""

    name: str
    version: str | None
    least: str | None


class Manifest(BaseModel):
    """What of manifest.json is read again; the rest is for people and other programs."""

    model_config = ConfigDict(frozen=True, extra="allow")

    schema_: Annotated[Literal[1], Field(alias="schema")]
    device: Device
    runtime: _Runtime
    engine: _EngineEntry
    dense: _EngineEntry | None
    files: dict[str, _Entry]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files are those of its manifest."""

    folder: Path
    manifest: Manifest
    document: Mapping[str, Any]  # manifest.json as it is

    @property
    def engine(self) -> Engine:
        """The pruned engine, for the device that it was made for."""
        return self._engine(self.manifest.engine)

    @property
    def dense(self) -> Engine | None:
        """The dense engine, if it was kept."""
        return self._engine(self.manifest.dense) if self.manifest.dense else None

    @property
    def model(self) -> str:
        """The name that the user gave the model."""
        return str(self.document.get("model", {}).get("name", ""))

    def samples(self) -> tuple[Sample, ...]:
        """Inputs and what torch answered to them, in the order in which they were written."""
        if PARITY not in self.manifest.files:
            return ()
        with translated(self.folder):
            found = read_samples(str(self.folder / PARITY))
        return tuple(Sample(inputs=tuple(inputs), outputs=tuple(outputs)) for inputs, outputs in found)

    def _engine(self, entry: _EngineEntry) -> Engine:
        return Engine(
            backend=entry.backend,
            precision=entry.precision,
            path=self.folder / entry.path,
            files=tuple(self.folder / name for name in entry.files),
            onnx=self.folder / entry.onnx if entry.onnx else None,
            inputs=tuple(entry.inputs),
            outputs=tuple(entry.outputs),
            notes=entry.notes,
            device=self.manifest.device,
        )


def write_bundle(out: Path | str, contents: Contents) -> Bundle:
    """Write a bundle into the folder `out`, whole or not at all, and read it back.

    A bundle that is already there is replaced; a folder that holds anything else is not.
    """
    engine, out = contents.engine, Path(out).resolve()
    if engine.pruned is None or engine.device is None:
        raise ValueError("a bundle takes an engine as `export` gives it, with its device and torch module")
    with replaceable_folder(out, _own_files(out)) as folder:
        _write_files(contents, folder)
        manifest = json.dumps(document_of(contents, folder), indent=2, allow_nan=False) + "\n"
        with translated(out):
            bundle_core.check_document(document := bundle_core.parse_manifest(manifest.encode()))
            bundle_core.check_engines(document)
            bundle_core.check_purpose(document)
            for name in document["files"]:
                bundle_core.check_name(str(out), name)
        write_atomically(folder / MANIFEST, manifest)
        write_atomically(folder / SEAL, bundle_core.seal_of(manifest.encode()))
    return read_bundle(out)


def _write_files(contents: Contents, folder: Path) -> None:
    """All but the manifest."""
    engine = contents.engine
    assert engine.pruned is not None
    _copy(engine, folder)
    if contents.dense is not None:
        (folder / DENSE).mkdir()
        _copy(contents.dense, folder / DENSE)
    engine.pruned.plan.to_json(folder / PLAN)
    _save_weights(engine.pruned.module, folder / WEIGHTS)
    if contents.samples:
        _save_samples(contents.samples, folder / PARITY)
    if contents.preprocessing is not None:
        write_atomically(folder / PREPROCESSING, json.dumps(dict(contents.preprocessing), indent=2) + "\n")
    if contents.command:
        write_atomically(folder / REBUILD, "\n".join(["#!/bin/sh", "set -e", *contents.command]) + "\n")
        (folder / REBUILD).chmod(0o755)
    write_atomically(folder / RUN, assemble_run({engine.backend: find_backend(engine.backend).runner_path()}))


def check_target(out: Path) -> None:
    """`InputError` where a bundle could not be written to `out`: a file, or a folder with anything else in it."""
    check_replaceable(out, _own_files(out))


def _own_files(out: Path) -> frozenset[str]:
    """The files that the bundle in `out`, if there is one, says are its own."""
    try:
        listed = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
        return frozenset({MANIFEST, SEAL, *listed})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()


def read_bundle(path: Path | str) -> Bundle:
    """Check a bundle before anything in it is loaded.

    `InputError` for what is no bundle; `TamperedError` for a file that leaves the folder, is missing, was changed, or
    that the manifest doesn't know.
    """
    folder = Path(path).resolve()
    with translated(folder):
        document = bundle_core.check_bundle(str(folder))
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in fault["loc"])
        raise InputError(fault["msg"], file=folder / MANIFEST, place=place) from None
    return Bundle(folder=folder, manifest=manifest, document=document)


class translated:
    """`with translated(folder):` turns the `Refused` of the bundle's own code into a member of edgeprune's tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, refusal: BaseException | None, trace: object) -> None:
        if isinstance(refusal, Refused):
            raise self._error(refusal) from None

    def _error(self, refusal: Refused) -> EdgepruneError:
        file = self.folder / MANIFEST
        if refusal.kind == "version":
            return RuntimeMissing(str(refusal))
        if refusal.kind == "input":
            at_fault = refusal.place or str(refusal).startswith("not a manifest")
            return InputError(str(refusal), file=file if at_fault else None, place=refusal.place or None)
        return TamperedError(f"{file}:{refusal.place}: {refusal}" if refusal.place else str(refusal))


def _copy(engine: Engine, folder: Path) -> None:
    for file in engine.files:
        shutil.copyfile(file, folder / file.name)


def _save_weights(module: Any, path: Path) -> None:
    """Tensors that share memory (tied weights) are written once for each name: safetensors knows no sharing."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    path.write_bytes(save(tensors))


def _save_samples(samples: Sequence[Sample], path: Path) -> None:
    from safetensors.numpy import save

    tensors: dict[str, Array] = {}
    for number, sample in enumerate(samples):
        for kind, arrays in (("input", sample.inputs), ("output", sample.outputs)):
            tensors |= {f"sample{number}.{kind}{i}": np.ascontiguousarray(a) for i, a in enumerate(arrays)}
    path.write_bytes(save(tensors))
