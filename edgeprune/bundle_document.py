"""What stands in a bundle's manifest.json: docs/bundle.md has a table of every field."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import __version__
from edgeprune.backends import find_backend
from edgeprune.bundle_core import DENSE, SCHEMA, sha256_of
from edgeprune.engine import Engine
from edgeprune.parity import Sample, tolerance_of

if TYPE_CHECKING:
    from edgeprune.verifying import Verification

_PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "onnx", "onnxscript", "onnxslim", "openvino", "onnxruntime"),
    *("ai-edge-litert", "litert-torch"),
)

_LAYOUTS = {"channels first": "NCHW", "channels last": "NHWC"}
"""What an export may note of its picture's input, where it is not as the torch module has it."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What goes into a bundle beside the engine that was verified.

    `model` is the name that the user gave it, `preprocessing` the JSON that belongs to its input, `command` the lines
    of rebuild.sh, `samples` inputs with torch's outputs, `notes` any other facts for the manifest.
    """

    engine: Engine
    dense: Engine | None
    verification: Verification | None = None
    model: str = ""
    preprocessing: Mapping[str, Any] | None = None
    command: Sequence[str] = ()
    samples: Sequence[Sample] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


def document_of(contents: Contents, folder: Path) -> dict[str, Any]:
    """The manifest of what stands in `folder` now."""
    engine, verification = contents.engine, contents.verification
    assert engine.pruned is not None and engine.device is not None
    measured = verification.to_json() if verification else {}
    for elsewhere in ("model", "device", "bundle", "attempts", "quality", "seconds", "differences"):
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
        "runtime": _runtime(contents),
        "layout": _layout(contents),
        "engine": _entry(engine, folder, folder),
        "dense": _entry(contents.dense, folder / DENSE, folder) if contents.dense else None,
        "sparsity": _sparsity(engine.at(folder)),
        "parity": {"samples": len(contents.samples), "tolerance": tolerance_of(engine)},
        "latency": measured or None,
        "attempts": list(verification.attempts) if verification else [],
        "quality": dict(verification.quality) if verification else {},
        "seconds": {k: round(v, 3) for k, v in verification.seconds.items()} if verification else {},
        "notes": dict(contents.notes),
        "files": {
            item.relative_to(folder).as_posix(): {"sha256": sha256_of(str(item)), "bytes": item.stat().st_size}
            for item in files
        },
    }


def _sparsity(engine: Engine) -> dict[str, Any]:
    """Of an engine whose plan has 2:4: what its ONNX holds of it, and why sparse tensor cores don't take some of it."""
    from edgeprune.pattern import sparse_names
    from edgeprune.sparsity.onnx_weights import counts, layers_of_file

    assert engine.pruned is not None
    if engine.onnx is None or not sparse_names(engine.pruned.plan.formats):
        return {}
    layers = layers_of_file(engine.onnx)
    refused = {layer.name: layer.refused for layer in layers if layer.pattern == "yes" and layer.refused}
    return {"file": engine.onnx.name, **counts(layers), "refused": refused}


def _runtime(contents: Contents) -> dict[str, str | None]:
    """The version that was measured, else the one that is installed; `least` is what the engine's file asks for."""
    engine, verification = contents.engine, contents.verification
    assert engine.device is not None
    backend = find_backend(engine.backend)
    measured = verification.fingerprint.get("version") if verification and engine.device.roofline is None else None
    least = getattr(backend, "least_version", lambda path: None)(engine.path)
    return {"name": engine.backend, "version": str(measured) if measured else backend.version(), "least": least}


def _layout(contents: Contents) -> dict[str, str]:
    """Of a picture's input; all others have their dimensions in the order in which the torch module takes them."""
    if contents.preprocessing is None or not contents.engine.inputs:
        return {}
    told = _LAYOUTS.get(contents.engine.notes.get("layout", ""))
    return {contents.engine.inputs[0].name: told or str(contents.preprocessing.get("layout", "NCHW"))}


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
