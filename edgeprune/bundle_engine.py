"""An engine that is loaded and kept: arrays in, arrays out, with every input checked by name.

Standard library and numpy, Python 3.8 or later, nothing of edgeprune but what is pasted into run.py beside it. numpy is
imported inside functions: the hashes of a bundle can be checked without it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import struct
import tempfile
import types
from typing import TYPE_CHECKING, Any

from edgeprune.bundle_core import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SAFETENSORS = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}
SAFETENSORS["BOOL"] = "?"
CPU_FACTS = ("name", "machine", "vendor", "family", "model", "stepping", "cores")
ACCELERATOR_FACTS = ("gpu", "compute_capability")
BOARD_FACTS = ("board", "soc", "l4t", "power_mode")
LEAST_OUTPUT = 1e-12  # outputs smaller than this in torch are compared as they are


class InputFault(ValueError):
    """Inputs that are not those of the engine: which one, what was expected, what was found."""


class LoadedEngine:
    """One engine, compiled once. `inputs` and `outputs` are `[{"name", "dtype", "shape"}]` in their order."""

    def __init__(
        self, runner: Any, path: str, options: Mapping[str, Any], entry: Mapping[str, Any], cache: str | None = None
    ) -> None:
        """`cache` is a folder of the caller's own, where the runtime keeps what it compiled."""
        if cache is not None:
            use_cache(runner, cache, path)
        self.inputs: list[dict[str, Any]] = [dict(spec) for spec in entry["inputs"]]
        self.outputs: list[dict[str, Any]] = [dict(spec) for spec in entry["outputs"]]
        self._runner = runner
        self._scratch = tempfile.mkdtemp(prefix="edgeprune-")
        try:
            with standing_in(self._scratch, runner):
                self._handle = runner.load(path, dict(options))
            check_tensors(self.inputs + self.outputs, runner.inputs(self._handle) + runner.outputs(self._handle))
        except BaseException:
            self._forget()
            raise

    def run(self, *inputs: Any, **named: Any) -> Any:
        """One inference: an array for each input in order, or by name, or one mapping of names to arrays.

        Arrays are numpy's, or torch tensors. One output is an array, several are a tuple in the order of `outputs`.
        `InputFault` names the input that is missing, unknown, or of another dtype or shape.
        """
        import numpy as np

        if self._handle is None:
            raise InputFault("the engine was closed; load the bundle again")
        for index, array in enumerate(checked_inputs(self.inputs, inputs, named)):
            self._runner.set_input(self._handle, index, np.ascontiguousarray(array).tobytes())
        (getattr(self._runner, "run", None) or self._runner.timed_run)(self._handle)
        found = tuple(self._output(index, spec) for index, spec in enumerate(self.outputs))
        return found[0] if len(found) == 1 else found

    def _output(self, index: int, spec: Mapping[str, Any]) -> Any:
        import numpy as np

        data = self._runner.get_output(self._handle, index)
        return np.frombuffer(data, dtype=spec["dtype"]).reshape(spec["shape"]).copy()

    def __enter__(self) -> LoadedEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the runtime's memory; `run` can't be called any more."""
        handle, self._handle = self._handle, None
        if handle is not None and hasattr(self._runner, "unload"):
            self._runner.unload(handle)
        self._forget()

    def _forget(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)


def use_cache(runner: Any, folder: str, engine: str) -> None:
    """Let the runtime keep what it compiles of `engine` in a folder outside of the bundle; `Refused` where it can't."""
    folder, bundle = os.path.realpath(folder), os.path.dirname(os.path.realpath(engine))
    if not hasattr(runner, "use_cache"):
        raise Refused("%s keeps no compiled models: leave the cache out" % runner.NAME, "input")
    if (folder + os.sep).startswith(bundle + os.sep):
        raise Refused("cache %s lies in the bundle, which holds what its manifest lists" % folder, "input")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise Refused("cache %s can't be made: %s" % (folder, error.strerror), "input") from None
    runner.use_cache(folder)


def check_tensors(told: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> None:
    """`Refused` where the manifest tells other inputs and outputs than the engine has, by dtype and shape."""
    if len(told) != len(found):
        raise Refused("the manifest tells %d inputs and outputs, the engine has %d" % (len(told), len(found)))
    for a, b in zip(told, found):
        if a["dtype"] != b["dtype"] or list(a["shape"]) != list(b["shape"]):
            both = (a["name"], described(a["dtype"], a["shape"]), described(b["dtype"], b["shape"]))
            raise Refused("%r is %s by the manifest, %s in the engine" % both)


@contextlib.contextmanager
def standing_in(folder: str, runner: Any) -> Iterator[None]:
    """Make `folder` the working one for a runtime that is a program of its own: it builds engines where it stands."""
    before = os.getcwd() if hasattr(runner, "burst") else None
    if before is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        if before is not None:
            os.chdir(before)


def checked_inputs(specs: Sequence[Mapping[str, Any]], given: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The arrays in the order of the engine's inputs."""
    names = [str(spec["name"]) for spec in specs]
    if len(given) == 1 and not named and hasattr(given[0], "keys"):
        named = given[0]
        given = []
    if len(given) > len(specs):
        raise InputFault("the engine has %d inputs (%s), %d were given" % (len(specs), ", ".join(names), len(given)))
    found = dict(zip(names, given))
    for name, array in named.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = "; did you mean %r?" % near[0] if near else ""
            raise InputFault("the engine has no input %r%s (its inputs: %s)" % (name, hint, ", ".join(names)))
        if name in found:
            raise InputFault("input %r is given twice, by its place and by its name" % name)
        found[name] = array
    for spec in specs:
        if spec["name"] not in found:
            raise InputFault(
                "input %r is missing: expected %s" % (spec["name"], described(spec["dtype"], spec["shape"]))
            )
    return [_checked(spec, as_array(found[spec["name"]])) for spec in specs]


def _checked(spec: Mapping[str, Any], array: Any) -> Any:
    if array.dtype.name != spec["dtype"] or list(array.shape) != list(spec["shape"]):
        told = (described(spec["dtype"], spec["shape"]), described(array.dtype.name, array.shape))
        raise InputFault("input %r: expected %s, found %s" % ((spec["name"], *told)))
    return array


def as_array(value: Any) -> Any:
    """A numpy array of an array, a torch tensor (wherever it is) or numbers; what is no numbers fails its check."""
    import numpy as np

    if hasattr(value, "detach"):  # a torch tensor; torch itself is not needed
        value = value.detach().cpu()
        try:
            return value.numpy()
        except TypeError as error:  # bfloat16
            raise InputFault("a tensor of %s is no numpy array: %s" % (value.dtype, error)) from None
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise InputFault("what was given is no array: %s" % error) from None


def described(dtype: str, shape: Sequence[int]) -> str:
    """`float32 [1, 3, 224, 224]`."""
    return "%s %s" % (dtype, list(shape))


def load_options(device: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """What a runner's `load` is told: how the device pins its runtime."""
    options = {key: device.get(key) for key in ("threads", "streams", "hint", "affinity")}
    options["precision"] = precision
    options.update(device.get("options") or {})
    return options


def check_version(runtime: Mapping[str, Any], found: str) -> None:
    """`Refused` where the runtime at hand is older than the least one that reads the engine."""
    least = runtime["least"]
    if least and numbers(found) and numbers(found) < numbers(least):
        written = " and was written for %s" % runtime["version"] if runtime["version"] else ""
        raise Refused(
            "the engine needs %s %s or later%s; here is %s: install a newer one, or make the bundle again for this one "
            "(rebuild.sh)" % (runtime["name"], least, written, found),
            "version",
        )


def differences(recorded: Mapping[str, Any], hello: Mapping[str, Any]) -> list[str]:
    """What is not as it was where the manifest's latency was measured; `recorded` is its fingerprint.

    `hello` is the device program's answer here. Empty where nothing was measured then.
    """
    if not recorded:
        return []
    found = []
    if recorded.get("version") != hello["version"]:
        found.append(
            "runtime: %s %s then, %s here" % (recorded.get("backend"), recorded.get("version"), hello["version"])
        )
    for title, key, wanted in (
        ("CPU", "cpu", CPU_FACTS),
        ("accelerator", "accelerator", ACCELERATOR_FACTS),
        ("board", "board", BOARD_FACTS),
    ):
        then, here = recorded.get(key) or {}, hello.get(key) or {}
        if not hello["modelled"] and any(then.get(fact) != here.get(fact) for fact in wanted):
            found.append("%s: %s then, %s here" % (title, _told(then, wanted), _told(here, wanted)))
    return found


def _told(facts: Mapping[str, Any], wanted: Sequence[str]) -> str:
    return " ".join("%s %s" % (fact, facts[fact]) for fact in wanted if fact in facts) or "none"


def numbers(version: str) -> tuple[int, ...]:
    """`2026.4.1-18-abc` is (2026, 4, 1); what is no version is ()."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def runner_module(name: str, source: str) -> types.ModuleType:
    """A runner from its source; `ImportError` where its runtime is missing."""
    module = types.ModuleType("runner_" + name)
    exec(compile(source, "<runner %s>" % name, "exec"), module.__dict__)
    return module


def read_samples(path: str) -> list[tuple[list[Any], list[Any]]]:
    """(inputs, torch's outputs) of each sample in parity.safetensors, both in order."""
    tensors = read_safetensors(path)
    found: list[tuple[list[Any], list[Any]]] = []
    while any(name.startswith("sample%d." % len(found)) for name in tensors):
        sides = []
        for kind in ("input", "output"):
            start = "sample%d.%s" % (len(found), kind)
            names = sorted((name for name in tensors if name.startswith(start)), key=lambda n: int(n[len(start) :]))
            sides.append([tensors[name] for name in names])
        found.append((sides[0], sides[1]))
    return found


def read_safetensors(path: str) -> dict[str, Any]:
    """Arrays by name. The format: 8 bytes with the length of a JSON header, the header, the bytes of the arrays
    (https://github.com/huggingface/safetensors#format). `Refused` for anything else."""
    import numpy as np

    with open(path, "rb") as file:
        data = file.read()
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
        body, found = data[8 + length :], {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            array = np.frombuffer(body[start:end], dtype="<" + SAFETENSORS[entry["dtype"]])
            found[name] = array.reshape(entry["shape"])
        return found
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused("%s is no safetensors file: %s" % (path, error)) from None


def parity_error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest `output_error` of the outputs; infinite where they are not as many."""
    errors = [output_error(a, b) for a, b in zip(found, expected)]
    return max(errors, default=0.0) if len(found) == len(expected) else float("inf")


def output_error(found: Any, expected: Any) -> float:
    """max|a - b| / max|b| of two arrays, a found and b expected; infinite where it isn't finite or shapes differ."""
    import numpy as np

    if found.shape != expected.shape:
        return float("inf")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    difference, largest = (float(np.max(np.abs(x), initial=0.0)) for x in (a - b, b))
    error = difference / max(largest, LEAST_OUTPUT)
    return error if np.isfinite(error) else float("inf")
