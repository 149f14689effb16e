"""What a benchmark was made with, as reports state it."""

from __future__ import annotations

import platform
from importlib import metadata

from edgeprune.device_state import cpu_facts

PACKAGES = (
    "torch",
    "torch-pruning",
    "openvino",
    "nncf",
    "onnxruntime",
    "ai-edge-litert",
    "litert-torch",
    "ai-edge-quantizer",
)


def conditions() -> str:
    """Python, those of `PACKAGES` that are installed, and this machine."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    cpu = cpu_facts()
    numbers = " ".join(f"{word} {cpu[word]}" for word in ("family", "model", "stepping") if word in cpu)
    return f"{', '.join(found)}; {cpu.get('name', cpu['machine'])} ({numbers}), {cpu['cores']} cores"
