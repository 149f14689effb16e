"""Run the engine of a bundle in this process: arrays in, numpy out.

with edgeprune.load_bundle("build/net") as net:
    y = net.run(x)                             # numpy or torch; several inputs in order, or by name
    y = net.run_pictures(["cat.jpg"])          # as the manifest's preprocessing has it
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprune.backends import find_backend
from edgeprune.bundle import PREPROCESSING, Bundle, read_bundle, translated
from edgeprune.bundle_engine import InputFault, LoadedEngine, check_version, load_options
from edgeprune.engine import Engine
from edgeprune.errors import EdgepruneError, InputError, MeasurementError, RuntimeMissing
from edgeprune.parity import Array
from edgeprune.preprocessing import Preprocessing, decode_picture

Outputs: TypeAlias = Array | tuple[Array, ...]


class LoadedBundle:
    """An engine that its runtime compiled once, with the device's threads and precision. Close it, or use `with`."""

    def __init__(self, bundle: Bundle, cache: Path | str | None = None) -> None:
        self.bundle = bundle
        self.engine: Engine = bundle.engine
        runner = _runner(self.engine)
        with translated(bundle.folder):
            check_version(bundle.document["runtime"], str(runner.version()))
        options = load_options(bundle.document["device"], self.engine.precision)
        try:
            with translated(bundle.folder):
                kept = None if cache is None else str(cache)
                self._loaded = LoadedEngine(runner, str(self.engine.path), options, bundle.document["engine"], kept)
        except EdgepruneError:
            raise
        except Exception as error:  # the runtime's own, of any type
            raise MeasurementError(_why_not_loaded(bundle, str(runner.version()), error)) from error

    def __enter__(self) -> LoadedBundle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the runtime's memory."""
        self._loaded.close()

    @property
    def input_names(self) -> tuple[str, ...]:
        """In the order in which `run` takes them."""
        return tuple(spec.name for spec in self.engine.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """In the order in which `run` gives them."""
        return tuple(spec.name for spec in self.engine.outputs)

    def run(self, *inputs: Any, **named: Any) -> Outputs:
        """One inference: an array for each input in order, or by name, or one mapping of names to arrays.

        Arrays are numpy's or torch tensors; shapes and dtypes must be the engine's: `InputError` names the input, what
        was expected and what was found. One output is an array, several are a tuple in the order of `output_names`.
        """
        try:
            found: Outputs = self._loaded.run(*inputs, **named)
        except InputFault as fault:
            raise InputError(str(fault)) from None
        return found

    def preprocess(self, paths: Sequence[Path | str]) -> npt.NDArray[np.float32]:
        """Pictures as the engine's input takes them, by preprocessing.json: float32 [n, C, H, W]; needs Pillow.

        [n, H, W, C] where the manifest's layout says so.
        """
        if PREPROCESSING not in self.bundle.manifest.files:
            raise InputError(f"{self.bundle.folder} holds no {PREPROCESSING}: its input is no picture; use run")
        preprocessing = Preprocessing.from_json(self.bundle.folder / PREPROCESSING)
        pictures = [_picture(Path(path), preprocessing) for path in paths]
        if not pictures:
            raise InputError("no pictures were given")
        x = preprocessing.normalise(np.stack(pictures))
        last = self.bundle.document["layout"].get(self.input_names[0]) == "NHWC"
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else x

    def run_pictures(self, paths: Sequence[Path | str]) -> Outputs:
        """Outputs for any number of pictures, in batches of the engine's size; a last one that is short is filled up.

        The first dimension of every output is that of the pictures.
        """
        batch = self.engine.inputs[0].shape[0] if self.engine.inputs and self.engine.inputs[0].shape else 0
        if len(self.engine.inputs) != 1 or any(spec.shape[:1] != (batch,) for spec in self.engine.outputs):
            raise InputError("the engine is not one picture in, one answer each out: use preprocess and run")
        if not paths:
            raise InputError("no pictures were given")
        rounds = []
        for start in range(0, len(paths), batch):
            x = self.preprocess(paths[start : start + batch])
            filled = np.concatenate([x, np.repeat(x[-1:], batch - len(x), axis=0)])
            found = self.run(filled)
            rounds.append([each[: len(x)] for each in (found if isinstance(found, tuple) else (found,))])
        outputs = tuple(np.concatenate(parts) for parts in zip(*rounds, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]


def load_bundle(path: Path | str, *, cache: Path | str | None = None) -> LoadedBundle:
    """Check a bundle's files against its manifest, then compile its engine here.

    `cache` is a folder of your own, outside of the bundle, where OpenVINO keeps what it compiled and finds it again:
    what lies there is run without being checked. `InputError` or `TamperedError` before anything is loaded, also for a
    runtime that keeps nothing; `RuntimeMissing` where the runtime is missing or too old.
    """
    return LoadedBundle(read_bundle(path), cache)


def _runner(engine: Engine) -> ModuleType:
    """The device half of the backend, which is all that knows how to run an engine, imported into this process."""
    backend = find_backend(engine.backend)
    spec: Any = util.spec_from_file_location(f"edgeprune_runner_{engine.backend}", backend.runner_path())
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.version()
    except (ImportError, RuntimeError) as error:
        raise RuntimeMissing(backend.available() or str(error)) from None
    return module


def _why_not_loaded(bundle: Bundle, here: str, error: Exception) -> str:
    runtime = bundle.manifest.runtime
    words = str(error).strip().splitlines()
    return (
        f"{runtime.name} {here} can't load the engine of {bundle.folder}, which was made with {runtime.version}: "
        f"{words[0] if words else type(error).__name__}; rebuild.sh makes it again for what is here"
    )


def _picture(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    try:
        picture = decode_picture(path, preprocessing.num_channels)
    except FileNotFoundError:
        raise InputError("no such picture", file=path) from None
    except Exception as error:  # decoders raise many kinds on a broken file
        raise InputError(f"not a readable picture: {error}", file=path) from None
    return preprocessing.geometry(picture)
