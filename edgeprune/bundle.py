"""The folder that a user deploys: engine, ONNX, plan, weights, and a manifest that says where every number came from.

    manifest.json           schema 1: hashes of all other files, versions, fingerprint, latencies, attempts, quality
    model.xml + .bin, ...   the engine; model.onnx beside it (OpenVINO), model.tflite alone
    dense/                  the engine of the dense model, for ratios measured where the bundle is
    plan.json               what was pruned
    weights.safetensors     state_dict of the pruned module
    parity.safetensors      a few inputs (`sample0.input0`, ...) and torch's outputs for them (`sample0.output0`, ...)
    preprocessing.json      from a picture to the input, where there is one
    rebuild.sh              the commands that make this bundle again

It is written whole or not at all, and no file is loaded before its hash was compared.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeprune import __version__
from edgeprune.device import Device
from edgeprune.engine import Engine
from edgeprune.errors import InputError, TamperedError
from edgeprune.exporting import check_replaceable, replaceable_folder
from edgeprune.folders import write_atomically
from edgeprune.measurement import TensorSpec
from edgeprune.parity import Array, Sample

if TYPE_CHECKING:
    from edgeprune.verifying import Verification

SCHEMA = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
WEIGHTS = "weights.safetensors"
PARITY = "parity.safetensors"
PREPROCESSING = "preprocessing.json"
REBUILD = "rebuild.sh"
DENSE = "dense"
_PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "onnx", "onnxscript", "onnxslim", "openvino", "onnxruntime"),
    *("ai-edge-litert", "litert-torch"),
)


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


class Manifest(BaseModel):
    """What of manifest.json is read again; the rest is for people and other programs."""

    model_config = ConfigDict(frozen=True, extra="allow")

    schema_: Annotated[Literal[1], Field(alias="schema")]
    device: Device
    engine: _EngineEntry
    dense: _EngineEntry | None
    files: dict[str, _Entry]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What goes into a bundle beside the engine that was verified.

    `model` is the name that the user gave it, `preprocessing` the JSON that belongs to its input, `command` the lines
    that make the bundle again, `samples` inputs with torch's outputs, `notes` any other facts for the manifest.
    """

    engine: Engine
    dense: Engine | None
    verification: Verification | None = None
    model: str = ""
    preprocessing: Mapping[str, Any] | None = None
    command: Sequence[str] = ()
    samples: Sequence[Sample] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


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
        path = self.folder / PARITY
        if PARITY not in self.manifest.files:
            return ()
        from safetensors.numpy import load_file

        tensors = load_file(path)
        found: list[Sample] = []
        while any(name.startswith(f"sample{len(found)}.") for name in tensors):
            parts = {
                kind: tuple(
                    tensors[f"sample{len(found)}.{kind}{index}"]
                    for index in range(len(tensors))
                    if f"sample{len(found)}.{kind}{index}" in tensors
                )
                for kind in ("input", "output")
            }
            found.append(Sample(inputs=parts["input"], outputs=parts["output"]))
        return tuple(found)

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
    pruned = engine.pruned
    if pruned is None or engine.device is None:
        raise ValueError("a bundle takes an engine as `export` gives it, with its device and torch module")
    with replaceable_folder(out, _own_files(out)) as folder:
        _copy(engine, folder)
        if contents.dense is not None:
            (folder / DENSE).mkdir()
            _copy(contents.dense, folder / DENSE)
        pruned.plan.to_json(folder / PLAN)
        _save_weights(pruned.module, folder / WEIGHTS)
        if contents.samples:
            _save_samples(contents.samples, folder / PARITY)
        if contents.preprocessing is not None:
            write_atomically(folder / PREPROCESSING, json.dumps(dict(contents.preprocessing), indent=2) + "\n")
        if contents.command:
            write_atomically(folder / REBUILD, "\n".join(["#!/bin/sh", "set -e", *contents.command]) + "\n")
        document = _document(contents, folder)
        write_atomically(folder / MANIFEST, json.dumps(document, indent=2, allow_nan=False) + "\n")
    return read_bundle(out)


def check_target(out: Path) -> None:
    """`InputError` where a bundle could not be written to `out`: a file, or a folder with anything else in it."""
    check_replaceable(out, _own_files(out))


def _own_files(out: Path) -> frozenset[str]:
    """The files that the bundle in `out`, if there is one, says are its own."""
    try:
        return frozenset({MANIFEST, *json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]})
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def read_bundle(path: Path | str) -> Bundle:
    """Check a bundle before anything in it is loaded.

    `InputError` for what is no bundle; `TamperedError` for a file that leaves the folder, is missing, was changed, or
    that the manifest doesn't know.
    """
    folder = Path(path).resolve()
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise InputError(f"{path} is no bundle: it has no {MANIFEST}")
    try:
        document = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"not a manifest: {error}", file=manifest_path) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else document
        raise InputError(f"expected schema {SCHEMA}, found {found!r}", file=manifest_path, place="schema")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise InputError(fault["msg"], file=manifest_path, place=".".join(str(step) for step in fault["loc"])) from None
    _check_files(folder, manifest)
    return Bundle(folder=folder, manifest=manifest, document=document)


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = _inside(folder, name)
        if not path.is_file():
            raise TamperedError(f"{folder / name} is missing; the manifest lists it")
        if path.stat().st_size != entry.bytes:
            raise TamperedError(f"{folder / name} has {path.stat().st_size} bytes, the manifest says {entry.bytes}")
        if _sha256(path) != entry.sha256:
            raise TamperedError(f"{folder / name} is not the file of the manifest: its SHA-256 differs")
    for engine in (manifest.engine, manifest.dense):
        for name in [] if engine is None else [engine.path, *engine.files, *([engine.onnx] if engine.onnx else [])]:
            if name not in manifest.files:
                raise TamperedError(f"the manifest names {name!r} as part of an engine, but lists no hash of it")
    known = {*manifest.files, MANIFEST}
    for item in sorted(folder.rglob("*")):
        name = item.relative_to(folder).as_posix()
        if not item.is_dir() and name not in known and not item.name.startswith("."):
            raise TamperedError(f"{item} is not in the manifest; a runtime might read it")


def _inside(folder: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise TamperedError(f"the manifest of {folder} names {name!r}, which leaves the folder")
    path = folder / name
    if not path.resolve().is_relative_to(folder):
        raise TamperedError(f"{path} is a link that leaves the folder")
    return path


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


def _document(contents: Contents, folder: Path) -> dict[str, Any]:
    engine, verification = contents.engine, contents.verification
    assert engine.pruned is not None and engine.device is not None
    measured = verification.to_json() if verification else {}
    for elsewhere in ("model", "device", "bundle", "attempts", "quality", "seconds"):
        measured.pop(elsewhere, None)
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    return {
        "schema": SCHEMA,
        "edgeprune": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": contents.model,
            "structure_hash": engine.pruned.plan.structure_hash,
            "dense_weights_sha256": engine.pruned.origin,
        },
        "device": engine.device.model_dump(mode="json"),
        "fingerprint": dict(verification.fingerprint) if verification else {},
        "versions": versions(),
        "engine": _entry(engine, folder, folder),
        "dense": _entry(contents.dense, folder / DENSE, folder) if contents.dense else None,
        "latency": measured or None,
        "attempts": list(verification.attempts) if verification else [],
        "quality": dict(verification.quality) if verification else {},
        "seconds": {k: round(v, 3) for k, v in verification.seconds.items()} if verification else {},
        "notes": dict(contents.notes),
        "files": {
            item.relative_to(folder).as_posix(): {"sha256": _sha256(item), "bytes": item.stat().st_size}
            for item in files
        },
    }


def _entry(engine: Engine, at: Path, folder: Path) -> dict[str, Any]:
    moved = engine.at(at.relative_to(folder))
    return {
        "backend": moved.backend,
        "precision": moved.precision,
        "path": moved.path.as_posix(),
        "files": [file.as_posix() for file in moved.files],
        "onnx": moved.onnx.as_posix() if moved.onnx else None,
        "inputs": [asdict(spec) for spec in moved.inputs],
        "outputs": [asdict(spec) for spec in moved.outputs],
        "notes": dict(moved.notes),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that had a part in the bundle, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
