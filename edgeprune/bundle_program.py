"""Writes a bundle's run.py: the parts beside this file and the runner of the bundle's backend, in one file."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from edgeprune.device_program import self_contained
from edgeprune.installing import install_here

NAME = "run.py"
FRONT = Path(__file__).with_name("bundle_front.py")
_START = """

if __name__ == "__main__":
    try:
        sys.exit(command(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
else:
    forget_bytecode()
"""


def assemble_run(runners: Mapping[str, Path]) -> str:
    """The text of run.py; `runners` maps a backend to its runner.py. The same parts give the same bytes."""
    body = self_contained(FRONT)
    # lists of lines rather than one long string, so that a person can read the file
    listed = "".join(
        f"    {name!r}: [\n"
        + "".join(f"        {line!r},\n" for line in self_contained(path).splitlines())
        + "    ],\n"
        for name, path in sorted(runners.items())
    )
    install = "".join(f"    {name!r}: {install_here(name)!r},\n" for name in sorted(runners))
    text = f"{body}\n\nRUNNERS.update({{\n{listed}}})\nINSTALL.update({{\n{install}}})\n{_START}"
    ast.parse(text, feature_version=(3, 8))
    return text
