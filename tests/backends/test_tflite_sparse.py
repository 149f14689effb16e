"""Linears of LiteRT that are stored without their zeros: the encoding by hand, what is refused, and what runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.device import load_device
from edgeprune.errors import InputError
from edgeprune.exporting import as_pruned, export
from edgeprune.sparsity import sparsify
from edgeprune.tflite_file import TfliteFile
from edgeprune.transport import Session, open_session
from tests.backends.test_contract import QUICK
from tests.small_models import redrawn

pytestmark = pytest.mark.contract

Array = np.ndarray[Any, Any]
UNIT = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}


@pytest.fixture(scope="module", autouse=True)
def runtime(require: Callable[[str], None]) -> None:
    require("tflite")


def module(name: str) -> Any:
    return importlib.import_module(f"edgeprune.backends.tflite.{name}")


def mostly_zeros(rows: int, columns: int, share: float = 0.96) -> Array:
    """Exactly that share of zeros."""
    rng = np.random.default_rng(rows + columns)
    values = rng.standard_normal(rows * columns, dtype=np.float32)
    values[rng.permutation(values.size)[: round(share * values.size)]] = 0
    return values.reshape(rows, columns)


def linears(x: Sequence[int], *weights: Array) -> bytes:
    """Linears with a bias of ones and a clamp, one after another."""
    file = TfliteFile()
    value = file.input("x", x)
    for weight in weights:
        inputs = [value, file.constant(weight), file.constant(np.ones(len(weight), np.float32))]
        value = file.operator("FULLY_CONNECTED", inputs, (*x[:-1], len(weight)), keepNumDims=True)
        file.fuse("RELU")
    return file.to_bytes({"y": value})


def stored_sparse(content: bytes) -> tuple[bytes, str]:
    model = module("flatbuffer").parsed(content)
    told = module("sparse").store_sparse(model)
    module("versions").declare(model)
    return module("flatbuffer").packed(model), told


def outputs(session: Session, folder: Path, contents: dict[str, bytes], x: Array) -> dict[str, Array]:
    found = {}
    for key, content in contents.items():
        path = folder / f"{key}.tflite"
        path.write_bytes(content)
        session.load(key, path, profile=True)
        (found[key],) = session.run(key, [x])
    return found


def test_rows_are_compressed_as_the_schema_has_it() -> None:
    """By hand: [[5, 0, 0], [0, 0, 0], [0, -1, 2]] has one, no and two values in its rows, in columns 0, 1 and 2."""
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    values = np.array([[5, 0, 0], [0, 0, 0], [0, -1, 2]], np.float32)
    made, kept = module("sparse").sparsity_of(values)
    rows, columns = made.dimMetadata
    assert made.traversalOrder == [0, 1]
    assert (rows.format, rows.denseSize) == (schema.DimensionType.DENSE, 3)
    assert columns.format == schema.DimensionType.SPARSE_CSR
    assert columns.arraySegmentsType == columns.arrayIndicesType == schema.SparseIndexVector.Uint8Vector
    assert columns.arraySegments.values.tolist() == [0, 1, 1, 3]
    assert columns.arrayIndices.values.tolist() == [0, 1, 2]
    assert kept.tolist() == [5, -1, 2]
    made, _ = module("sparse").sparsity_of(np.ones((1, 1, 1, 300), np.float32))
    assert [entry.denseSize for entry in made.dimMetadata[:3]] == [1, 1, 1] and made.traversalOrder == [0, 1, 2, 3]
    assert made.dimMetadata[3].arrayIndices.values.dtype == np.uint16  # 299 is more than a byte holds


def test_litert_gives_the_dense_output_by_a_kernel_of_its_own(tmp_path: Path) -> None:
    """The layer in the middle has too few zeros and stays dense."""
    weights = mostly_zeros(400, 300), mostly_zeros(300, 400, 0.5), mostly_zeros(70000, 300, 0.999)
    dense = linears((1, 300), *weights)
    sparse, told = stored_sparse(dense)
    assert told == "w1 (96.0% zeros), w7 (99.9% zeros)"
    assert len(sparse) < 0.05 * len(dense) + weights[1].nbytes
    x = np.random.default_rng(0).standard_normal((1, 300), np.float32)
    with open_session(load_device("host-tflite")) as session:
        found = outputs(session, tmp_path, {"dense": dense, "sparse": sparse}, x)
        y = x[0]
        for weight in weights:
            y = np.maximum(weight @ y + 1, 0)
        assert np.abs(found["dense"][0] - y).max() <= 1e-5 * y.max()
        assert np.abs(found["sparse"][0] - y).max() <= 1e-5 * y.max()
        session.measure(["sparse"], timing=QUICK)
        listed = session.node_times("sparse")
    if listed is not None:  # a version whose listing is known
        assert [node["type"] for node in listed.nodes].count("FULLY_CONNECTED") >= 2
        assert [node["name"] for node in listed.nodes] == ["w1", "w4", "w7"]


def test_a_sparse_weight_asks_for_the_version_that_knows_it() -> None:
    content, _ = stored_sparse(linears((1, 300), mostly_zeros(400, 300)))
    assert module("versions").least_runtime(module("flatbuffer").parsed(content)) == (
        "2.3",
        "FULLY_CONNECTED version 8",
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: linears((4, 300), mostly_zeros(400, 300)), "w1: 4 rows go through it, the sparse kernel is for one"),
        (lambda: linears((1, 300), mostly_zeros(400, 300, 0.9)), "w1: 90.0% zeros, at least 95% are needed"),
        (lambda: linears((1, 300), mostly_zeros(400, 300, 1.0)), "w1: it is all zeros"),
        (lambda: pointwise(0.97), "w1: CONV_2D runs densely whatever its zeros"),
        (lambda: TfliteFile().to_bytes({}), "it has no layers with weights"),
    ],
)
def test_what_is_no_faster_is_refused_with_the_reason(content: Callable[[], bytes], why: str) -> None:
    with pytest.raises(InputError) as caught:
        stored_sparse(content())
    assert str(caught.value) == f"no layer is faster with sparse weights: {why}"


def pointwise(share: float) -> bytes:
    file = TfliteFile()
    weight = mostly_zeros(32, 32, share).reshape(32, 1, 1, 32)
    inputs = [file.input("x", (1, 8, 8, 32)), file.constant(weight), file.constant(np.ones(32, np.float32))]
    return file.to_bytes({"y": file.operator("CONV_2D", inputs, (1, 8, 8, 32), padding=1, **UNIT)})


def test_an_export_of_masked_linears_is_smaller_and_computes_the_same(tmp_path: Path) -> None:
    network = redrawn(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 256), nn.Linear(256, 10))
    )
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    masked, report = sparsify(as_pruned(network, (x,)), ["3.weight"], zeros=0.95)
    assert masked.plan.formats == {"3.weight": "zeros:0.95"} and report[0].criterion == "magnitude"
    device = load_device("host-tflite")
    dense = export(masked, device, tmp_path / "dense")
    sparse = export(masked, device, tmp_path / "sparse", weights="sparse")
    assert sparse.notes["stored sparse"] == "3 (95.0% zeros)" and sparse.notes["weights"] == "sparse"
    assert sparse.num_bytes < dense.num_bytes - 4 * 512 * 256 * 0.9
    with open_session(device) as session, torch.no_grad():
        session.load("sparse", sparse.path)
        (found,) = session.run("sparse", [x.numpy()])
        expected = masked.module(x).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(InputError, match=r"3: 0\.0% zeros, at least 95% are needed"):
        export(as_pruned(network, (x,)), device, tmp_path / "none", weights="sparse")
