"""The manifest's form: pinned by a golden file, and every field of it explained in docs/bundle.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bundle_core import Refused, check_document
from edgeprune.bundle_engine import check_version, numbers
from edgeprune.runtime_versions import onnxruntime_for, openvino_for
from tests.test_bundle import make

GOLDEN = Path(__file__).with_name("golden") / "manifest.txt"
DOCS = Path(__file__).parents[1] / "docs" / "bundle.md"
FREE = {
    "versions",
    "layout",
    "notes",
    "engine.notes",
    "dense.notes",
    "quality",
    "seconds",
    "latency.references_us",
    "files",
}
ELSEWHERE = {"device", "fingerprint"}  # as `Device` and `fingerprint_of` have them


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(make(tmp_path_factory.mktemp("bundles") / "net").document)


def fields(value: Any, place: str = "") -> Iterator[str]:
    """`engine.inputs[].name str` for every field; keys of a free mapping are one `*`."""
    if isinstance(value, dict) and value and place not in ELSEWHERE:
        for key, below in value.items():
            name = "*" if place in FREE else key
            yield from fields(below, f"{place}.{name}" if place else name)
    elif isinstance(value, list) and value:
        for item in value:
            yield from fields(item, f"{place}[]")
    else:
        yield f"{place} {type(value).__name__}"


@pytest.mark.golden
def test_the_fields_of_a_manifest(document: dict[str, Any]) -> None:
    assert list(dict.fromkeys(fields(document))) == GOLDEN.read_text().splitlines()


@pytest.mark.golden
def test_every_field_is_explained() -> None:
    explained = {name for row in DOCS.read_text().splitlines() for name in re.findall(r"`([\w.]+)`", row)}
    for line in GOLDEN.read_text().splitlines():
        steps = re.sub(r"\[\]", "", line.split()[0]).split(".")
        assert any(".".join(steps[: end + 1]) in explained for end in range(len(steps))), line


@pytest.mark.unit
def test_what_a_manifest_must_have_is_there(document: dict[str, Any]) -> None:
    check_document(document)
    for key in set(document) - {"schema"}:
        with pytest.raises(Refused, match="is missing") as caught:
            check_document({name: value for name, value in document.items() if name != key})
        assert caught.value.place == key
    with pytest.raises(Refused, match=r"expected int, found True"):
        check_document({**document, "parity": {"samples": True, "tolerance": 1.0}})


@pytest.mark.unit
def test_least_versions_by_the_tables_of_the_runtimes(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    ir = '<layer type="Parameter" version="opset1"/><layer type="MVN" version="opset{}"/>'
    assert [openvino_for(ir.format(n)) for n in (6, 8, 10, 14, 99)] == ["2022.1", "2022.1", "2022.3", "2024.0", None]
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    for opset, version, least in ((17, 8, "1.12"), (18, 9, "1.16"), (20, 10, "1.18"), (26, 10, None), (20, 13, None)):
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)
        onnx.save(model, tmp_path / "model.onnx")
        assert onnxruntime_for(tmp_path / "model.onnx") == least


@pytest.mark.unit
def test_versions_are_compared_by_their_numbers() -> None:
    assert numbers("2026.4.1-18-abc") == (2026, 4, 1) and numbers("nightly") == ()
    runtime = {"name": "openvino", "version": "2026.4.1", "least": "2024.5"}
    for fine in ("2024.5.0-17288", "2025.0", "nightly"):
        check_version(runtime, fine)
    with pytest.raises(
        Refused, match=r"needs openvino 2024\.5 or later and was written for 2026\.4\.1; here is 2024\.4\.0"
    ):
        check_version(runtime, "2024.4.0")
    check_version({**runtime, "least": None}, "1.0")
