"""Run the engine of a bundle in this process: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from edgeprune.backends import find_backend
from edgeprune.bundle import Bundle, read_bundle
from edgeprune.engine import Engine
from edgeprune.errors import InputError, RuntimeMissing, did_you_mean
from edgeprune.parity import Array


class LoadedBundle:
    """An engine compiled by its runtime, with the device's threads and precision."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.engine: Engine = bundle.engine
        self._runner = _runner(self.engine)
        device = bundle.manifest.device
        options = {
            "threads": device.threads,
            "streams": device.streams,
            "hint": device.hint,
            "precision": self.engine.precision,
            **device.options,
        }
        self._handle = self._runner.load(str(self.engine.path), options)

    def run(self, inputs: Array | Mapping[str, Array]) -> Array | dict[str, Array]:
        """One inference. A single input may be given as it is, several as {name: array}; outputs come back likewise.

        Shapes and dtypes must be the engine's; `InputError` names the input and both sides.
        """
        arrays = self._arrays(inputs)
        for index, array in enumerate(arrays):
            self._runner.set_input(self._handle, index, np.ascontiguousarray(array).tobytes())
        (getattr(self._runner, "run", None) or self._runner.timed_run)(self._handle)
        outputs = {
            spec.name: np.frombuffer(self._runner.get_output(self._handle, index), dtype=spec.dtype)
            .reshape(spec.shape)
            .copy()
            for index, spec in enumerate(self.engine.outputs)
        }
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def _arrays(self, inputs: Array | Mapping[str, Array]) -> list[Array]:
        specs = self.engine.inputs
        names = [spec.name for spec in specs]
        if not isinstance(inputs, Mapping):
            if len(specs) != 1:
                raise InputError(f"the engine has {len(specs)} inputs: give a mapping with {', '.join(names)}")
            inputs = {names[0]: inputs}
        for name in inputs:
            if name not in names:
                raise InputError(
                    f"the engine has no input '{name}'{did_you_mean(name, names)} (its inputs: {', '.join(names)})"
                )
        for spec in specs:
            if spec.name not in inputs:
                raise InputError(f"input '{spec.name}' is missing: {spec.dtype} {_x(spec.shape)}")
            array = np.asarray(inputs[spec.name])
            if array.dtype.name != spec.dtype or array.shape != spec.shape:
                raise InputError(
                    f"input '{spec.name}' is {array.dtype.name} {_x(array.shape)}, expected "
                    f"{spec.dtype} {_x(spec.shape)}"
                )
        return [np.asarray(inputs[name]) for name in names]


def load_bundle(path: Path | str) -> LoadedBundle:
    """Check a bundle's files against its manifest, then compile its engine here."""
    return LoadedBundle(read_bundle(path))


def _runner(engine: Engine) -> ModuleType:
    """The device half of the backend, which is all that knows how to run an engine, imported into this process."""
    backend = find_backend(engine.backend)
    if fix := backend.available():
        raise RuntimeMissing(fix)
    spec: Any = util.spec_from_file_location(f"edgeprune_runner_{engine.backend}", backend.runner_path())
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
