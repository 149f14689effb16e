"""Imports run one way; no name stands in the way of another."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeprune as ep

pytestmark = pytest.mark.unit

PACKAGE = Path(ep.__file__).parent
FILES = [path for part in (PACKAGE, PACKAGE / "backends") for path in part.rglob("*.py")]  # rglob follows no links
# Each may import those before it. Backends: the data they are given, nothing of the stages.
LAYERS = (
    "errors folders machine measurement kernel eligibility precision roofline graph pattern plan_json weights "
    "pruned engine kernel_sizes attention unit fusion layer_norms kernel_weights onnx_int8 kernel_onnx "
    "tflite_file tflite_int8 kernel_tflite unsupported onnx_export onnx_half onnx_equivalents onnx_quantise "
    "runtime_versions backends device device_entries modelled staircase units formats models preprocessing data "
    "quality device_boot device_store device_nvidia device_state device_clocks device_statistics device_rounds "
    "device_core device_program wire local_channel remote_channel adb_link ssh_link installing transport "
    "fingerprint table_lines table_log table table_listing table_merging table_comparing table_curve table_export "
    "foreign_tables references profiler profiling device_probe device_checks self_test robust budget surface "
    "correction learning cost sampling saliency solve zero_branch comparing surgery recovery sparsity rewinding "
    "constraints scopes variables budget_rows climbing choice choosing scheduling planning exporting ranges "
    "calibration bundle_core bundle_engine parity executed latency verifying bundle_front bundle_program "
    "bundle_document bundle loading benching gating at_once preparing forecasting front handing_over pipeline "
    "reporting cli"
).split()


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of edgeprune that a tree imports when it runs, in functions too, but for type checkers not."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    if part(path) in ("__init__", "__main__"):
        return
    for name in imported(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        if top == "edgeprune" and (target := rest.split(".")[0]) in LAYERS:
            assert LAYERS.index(target) <= LAYERS.index(part(path)), f"{part(path)} imports {target}"


def test_every_module_has_its_layer() -> None:
    assert {part(path) for path in FILES} - {"__init__", "__main__"} <= set(LAYERS)


def test_names_of_modules_are_free() -> None:
    stems = {path.stem for path in FILES} - {"__init__", "__main__"}
    assert not stems & ({"utils"} | sys.stdlib_module_names)
    assert not {path.stem for path in PACKAGE.glob("*")} & set(ep.__all__)


def test_public_names_stay_functions_when_all_is_imported() -> None:
    for module in pkgutil.walk_packages(ep.__path__, "edgeprune."):
        if not module.name.endswith((".runner", ".__main__")):  # runners run on the device, with their runtime
            importlib.import_module(module.name)
    for _ in range(2):
        assert [name for name in ep.__all__ if not callable(getattr(ep, name))] == ["__version__"]
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        getattr(ep, "prune")  # noqa: B009
