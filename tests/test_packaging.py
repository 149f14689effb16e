"""Wheel, sdist and editable install: each puts only `edgeprune` into site-packages, with its data."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
SHIPPED = ["pyproject.toml", "README.md", "LICENSE", "devices.yaml", "edgeprune", "backends", "latency_tables"]


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that no build folder appears in the working tree; links stay links."""
    folder = tmp_path_factory.mktemp("clone")
    subprocess.run(["cp", "-a", *(ROOT / name for name in SHIPPED), folder], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path) -> Path:
    call("-m", "build", "--no-isolation", "--wheel", "--outdir", "direct", cwd=clone)
    return next((clone / "direct").glob("*.whl"))


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" not in name}


def test_wheel_holds_edgeprune_and_its_data(wheel: Path) -> None:
    held = names(wheel)
    assert {name.split("/")[0] for name in held} == {"edgeprune", "edgeprune-0.1.0.dist-info"}
    source = [ROOT / "devices.yaml", *(ROOT / "latency_tables").rglob("*.jsonl"), *(ROOT / "backends").rglob("*.py")]
    expected = {f"edgeprune/{path.relative_to(ROOT)}" for path in source}
    assert expected | {"edgeprune/py.typed", "edgeprune/cli/__init__.py"} <= held
    assert "edgeprune-0.1.0.dist-info/licenses/LICENSE" in held


def test_wheel_from_the_sdist_is_the_same(clone: Path, wheel: Path) -> None:
    call("-m", "build", "--no-isolation", "--outdir", "full", cwd=clone)  # the wheel is built from the sdist
    assert names(next((clone / "full").glob("*.whl"))) == names(wheel)
    with tarfile.open(next((clone / "full").glob("*.tar.gz"))) as sdist:
        assert "edgeprune-0.1.0/edgeprune/devices.yaml" in sdist.getnames()


def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert call("-m", "edgeprune", "devices", cwd=tmp_path).startswith("null")  # -m puts the folder first
    assert call("-c", "import edgeprune; print(edgeprune.__file__)", cwd=tmp_path).startswith(str(tmp_path))


def test_editable_install_puts_only_edgeprune_into_site_packages(clone: Path, tmp_path: Path) -> None:
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", tmp_path)
    call("-m", "pip", "install", "--quiet", *options, "--editable", clone, cwd=clone)
    installed = [path for folder in tmp_path.rglob("site-packages") for path in folder.iterdir()]
    assert installed
    assert all(path.name.startswith(("edgeprune-", "__editable__")) or path.name == "__pycache__" for path in installed)
