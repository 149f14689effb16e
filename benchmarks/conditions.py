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
WIDE = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")
"""What a CPU has for wide arithmetic, as the kernel names it."""


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
    wide = [flag for flag in WIDE if flag in cpu["flags"]]
    name = cpu.get("name", cpu["machine"])
    return f"{', '.join(found)}; {name} ({', '.join(filter(None, [numbers, *wide]))}), {cpu['cores']} cores"
