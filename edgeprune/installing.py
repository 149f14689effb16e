"""How a backend's runtime gets onto a device: the one place that says it. Its name at pip is the backend's own."""

from __future__ import annotations

from edgeprune.backends import find_backend
from edgeprune.device import Device
from edgeprune.device_entries import set_line

ENVIRONMENT = "edgeprune-env"
"""Many systems let pip write to no other place."""
OLDER = {"ai-edge-litert": "'tflite-runtime==2.14.0' 'numpy<2'"}
"""What takes the place of a package where there is no wheel of it: Python 3.8 and 3.9, and 32 bit systems."""


def install_here(backend: str) -> str:
    """What installs a runtime, and numpy, for whoever reads it: nothing is known of where."""
    runtime = find_backend(backend)
    if how := getattr(runtime, "DEVICE_INSTALL", None):
        return f"pip install numpy; {how}"
    return f"pip install numpy {getattr(runtime, 'DEVICE_PACKAGE', backend)}"


def install_there(backend: str, device: Device, *, python: str = "", machine: str = "") -> str:
    """What installs a runtime on a device; `python` and `machine` are what it told: `3.9.2`, `armv7l`."""
    runtime = find_backend(backend)
    if how := getattr(runtime, "DEVICE_INSTALL", None):
        return str(how)
    package = getattr(runtime, "DEVICE_PACKAGE", None)
    if package is None:
        return f"install what backend '{backend}' needs there"
    if machine == "armv7l" or python.startswith(("3.8.", "3.9.")):
        package = OLDER.get(package, package)
    if "/" in device.python:
        return f"there: {device.python} -m pip install {package}"
    if device.transport == "adb":
        return "Android has no pip: install Python under Termux and name it (docs/remote.md)"
    own = f"{ENVIRONMENT}/bin/python"
    line = f"{device.python} -m venv {ENVIRONMENT} && {own} -m pip install {package}"
    return f"there: {line}; here: {set_line(device, f'python={own}')}"
