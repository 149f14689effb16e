"""Versions of LiteRT's operators: rules on files written by hand, and an older runtime, where one is named."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.backends import find_backend
from edgeprune.device_program import assemble
from edgeprune.errors import MeasurementError
from edgeprune.local_channel import LocalChannel
from edgeprune.tflite_file import Quantisation, TfliteFile
from edgeprune.transport import Session

pytestmark = pytest.mark.contract

OLDER = "EDGEPRUNE_TFLITE_PYTHON"
"""Names a Python that has tflite_runtime 2.14."""


@pytest.fixture(scope="module", autouse=True)
def runtime(require: Callable[[str], None]) -> None:
    require("tflite")


def linear(scales: int, *, bias: bool = True, keep: bool = False) -> bytes:
    """Floats times int8 weights [2, 4], with one scale or one for each of the two rows."""
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    file = TfliteFile()
    weight = file.constant(np.array([[4, 3, 2, 1], [1, -2, 3, -4]], np.int8))
    file.tensors[weight].quantisation = Quantisation(scales=(0.5, 0.001)[:scales])
    inputs = [file.input("x", (1, 4)), weight, *([file.constant(np.zeros(2, np.float32))] if bias else [])]
    y = file.operator("FULLY_CONNECTED", inputs, (1, 2), keepNumDims=keep, asymmetricQuantizeInputs=False)
    content = file.to_bytes({"y": y})
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    model.operatorCodes[0].version = 1  # as the quantiser leaves it
    return packed(model)


def packed(model: Any) -> bytes:
    content: bytes = importlib.import_module("edgeprune.backends.tflite.flatbuffer").packed(model)
    return content


def declared(content: bytes) -> tuple[list[int], tuple[str, str] | None]:
    versions: Any = importlib.import_module("edgeprune.backends.tflite.versions")
    model = importlib.import_module("edgeprune.backends.tflite.flatbuffer").parsed(content)
    versions.declare(model)
    found = [model.operatorCodes[operator.opcodeIndex].version for operator in model.subgraphs[0].operators]
    return found, versions.least_runtime(model)


@pytest.mark.parametrize(
    ("content", "version", "since"),
    [
        (lambda: linear(2), 12, "2.17"),
        (lambda: linear(1), 3, "1.14"),
        (lambda: linear(1, bias=False), 6, "2.1"),
        (lambda: linear(1, keep=True), 5, "2.0"),
        (lambda: linear(2, bias=False, keep=True), 12, "2.17"),
    ],
)
def test_a_linear_with_int8_weights(content: Callable[[], bytes], version: int, since: str) -> None:
    assert declared(content()) == ([version], (since, f"FULLY_CONNECTED version {version}"))


def test_one_operator_in_two_versions_has_two_codes() -> None:
    """A grouped convolution beside a plain one, with a transpose of five dimensions."""
    file = TfliteFile()
    x = file.input("x", (1, 4, 4, 4))
    strides = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    plain = [x, file.constant(np.ones((4, 1, 1, 4), np.float32)), file.constant(np.zeros(4, np.float32))]
    y = file.operator("CONV_2D", plain, (1, 4, 4, 4), **strides)
    grouped = [y, file.constant(np.ones((4, 1, 1, 2), np.float32)), file.constant(np.zeros(4, np.float32))]
    y = file.operator("CONV_2D", grouped, (1, 4, 4, 4), **strides)
    y = file.operator("RESHAPE", [y, file.integers([1, 2, 2, 4, 4])], (1, 2, 2, 4, 4), newShape=[1, 2, 2, 4, 4])
    y = file.operator("TRANSPOSE", [y, file.integers([0, 2, 1, 3, 4])], (1, 2, 2, 4, 4))
    model = importlib.import_module("edgeprune.backends.tflite.flatbuffer").parsed(file.to_bytes({"y": y}))
    for code in model.operatorCodes:
        code.version = 1
    assert declared(packed(model)) == ([1, 6, 1, 4], ("2.9", "CONV_2D version 6"))


def test_what_stands_higher_is_not_lowered_and_what_is_not_known_is_not_guessed() -> None:
    model = importlib.import_module("edgeprune.backends.tflite.flatbuffer").parsed(linear(1))
    model.operatorCodes[0].version = 9
    assert declared(packed(model)) == ([9], ("2.3", "FULLY_CONNECTED version 9"))
    model.operatorCodes[0].version = 99
    assert declared(packed(model)) == ([99], None)


def test_values_behind_the_tables_are_read_into_them() -> None:
    """As the quantiser writes large ones: at an offset in the file, which another packing would not keep."""
    flatbuffer: Any = importlib.import_module("edgeprune.backends.tflite.flatbuffer")
    inside = linear(2)
    model = flatbuffer.parsed(inside)
    weights = model.buffers[1]
    values, weights.data = bytes(weights.data), None
    weights.offset, weights.size = 1, len(values)
    weights.offset = -(-len(packed(model)) // 16) * 16
    outside = packed(model).ljust(weights.offset, b"\0") + values
    assert bytes(flatbuffer.parsed(outside).buffers[1].data) == values == bytes([4, 3, 2, 1, 1, 254, 3, 252])
    assert packed(flatbuffer.parsed(outside)) == packed(flatbuffer.parsed(inside))


def test_a_runtime_that_is_too_old_says_what_it_is_and_what_it_lacks(tmp_path: Path) -> None:
    interpreter = types.ModuleType("interpreter")

    def refuse(**_: Any) -> None:
        raise ValueError("Didn't find op for builtin opcode 'FULLY_CONNECTED' version '12'. An older version ...\nmore")

    interpreter.Interpreter = refuse  # type: ignore[attr-defined]
    interpreter.OpResolverType = types.SimpleNamespace(AUTO=0)  # type: ignore[attr-defined]
    older = types.ModuleType("tflite_runtime")
    older.__version__, older.interpreter = "2.14.0", interpreter  # type: ignore[attr-defined]
    runner = types.ModuleType("runner")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ai_edge_litert", None)
        patch.setitem(sys.modules, "tflite_runtime", older)
        exec(compile(find_backend("tflite").runner_path().read_text(), "runner", "exec"), runner.__dict__)
    (tmp_path / "model.tflite").write_bytes(b"any")
    said = r"^tflite_runtime 2\.14\.0 is too old for this file: .*'FULLY_CONNECTED' version '12'[^\n]*$"
    with pytest.raises(ValueError, match=said):
        runner.load(str(tmp_path / "model.tflite"), {"precision": "fp32", "threads": 1})


@pytest.mark.parametrize("scales", [1, 2])
def test_an_older_runtime_computes_what_it_takes_and_refuses_what_it_would_get_wrong(
    scales: int, tmp_path: Path
) -> None:
    python = os.environ.get(OLDER)
    if not python:
        pytest.skip(f"{OLDER} names no Python that has tflite_runtime 2.14")
    flatbuffer: Any = importlib.import_module("edgeprune.backends.tflite.flatbuffer")
    versions: Any = importlib.import_module("edgeprune.backends.tflite.versions")
    model = flatbuffer.parsed(linear(scales))
    before, after = tmp_path / "before.tflite", tmp_path / "after.tflite"
    before.write_bytes(flatbuffer.packed(model))
    versions.declare(model)
    after.write_bytes(flatbuffer.packed(model))
    x = np.array([[1.0, -1.0, 0.5, 2.0]], np.float32)
    weights = np.array([[4, 3, 2, 1], [1, -2, 3, -4]]) * np.array([[0.5], [0.001 if scales == 2 else 0.5]])
    right = x @ weights.T
    program = assemble({"tflite": find_backend("tflite").runner_path()})
    options = {"threads": 1, "precision": "fp32", "streams": 1, "hint": "latency", "affinity": None}
    with LocalChannel(program.text, "tflite", python=python) as channel:
        session = Session(channel, options)
        assert session.hello()["version"].startswith("2.14")
        session.load("before", before)
        (found,) = session.run("before", [x])
        assert (np.abs(found - right).max() <= 0.02 * np.abs(right).max()) == (scales == 1)
        if scales == 1:
            session.load("after", after)
            assert np.array_equal(session.run("after", [x])[0], found)
        else:
            with pytest.raises(MeasurementError, match="too old for this file.*'FULLY_CONNECTED' version '12'"):
                session.load("after", after)
