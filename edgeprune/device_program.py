"""Assembles the device program: the core loop and the needed runners in one self-contained file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CORE = Path(__file__).with_name("device_core.py")


@dataclass(frozen=True, kw_only=True)
class DeviceProgram:
    """Run as `python -I -u <file> <runner name>`; `hash` (12 hex digits) is what it answers to `hello`."""

    text: str
    hash: str


def assemble(runners: Mapping[str, Path]) -> DeviceProgram:
    """`runners` maps names to the `runner.py` of each backend."""
    sources = {name: path.read_text(encoding="utf-8") for name, path in sorted(runners.items())}
    body = CORE.read_text(encoding="utf-8")
    # lists of lines rather than one long string, so that a person can read the file on the device
    listed = "".join(
        f"    {name!r}: [\n" + "".join(f"        {line!r},\n" for line in source.splitlines()) + "    ],\n"
        for name, source in sources.items()
    )
    text = f"{body}\n\nRUNNERS = {{\n{listed}}}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    start = f'sys.exit(main({{name: "\\n".join(lines) for name, lines in RUNNERS.items()}}, {digest!r}))\n'
    return DeviceProgram(text=f"{text}\n\n{start}", hash=digest)
