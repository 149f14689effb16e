"""What installs a runtime on a device: one advice, whoever gives it."""

from __future__ import annotations

from typing import Any

import pytest

from edgeprune.device import Device
from edgeprune.installing import install_here, install_there

pytestmark = pytest.mark.unit


def far(**changes: Any) -> Device:
    return Device(name="far", transport="ssh", host="pi", backend="tflite", **changes)


def test_into_an_environment_of_its_own_or_that_of_the_entry() -> None:
    """Debian's pip, and that of others, refuses to write into the system's Python."""
    assert install_there("openvino", far()) == (
        "there: python3 -m venv edgeprune-env && edgeprune-env/bin/python -m pip install openvino; "
        "here: edgeprune devices add far --like far --set python=edgeprune-env/bin/python"
    )
    assert install_there("openvino", far(python="env/bin/python")) == "there: env/bin/python -m pip install openvino"


@pytest.mark.parametrize(
    ("python", "machine", "package"),
    [
        ("3.11.2", "aarch64", "ai-edge-litert"),
        ("3.9.2", "aarch64", "'tflite-runtime==2.14.0' 'numpy<2'"),
        ("3.11.2", "armv7l", "'tflite-runtime==2.14.0' 'numpy<2'"),
    ],
)
def test_the_older_litert_where_there_is_no_wheel_of_the_new_one(python: str, machine: str, package: str) -> None:
    told = install_there("tflite", far(python="env/bin/python"), python=python, machine=machine)
    assert told == f"there: env/bin/python -m pip install {package}"


def test_what_is_no_package() -> None:
    assert "on a Jetson sudo apt-get install nvidia-jetpack" in install_there("tensorrt", far())
    assert install_there("null", far()) == "install what backend 'null' needs there"
    assert "Python under Termux" in install_there("onnxruntime", far().model_copy(update={"transport": "adb"}))


def test_for_a_bundle_nothing_is_known_of_the_machine() -> None:
    assert install_here("tflite") == "pip install numpy ai-edge-litert"
    assert install_here("tensorrt_python").startswith("pip install numpy; on a Jetson")
