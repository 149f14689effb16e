"""The lines of a bundle's rebuild.sh: the engine again, from the bundle's own plan and weights."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

OPTIONS = {
    "shape": "--shape",
    "seed": "--seed",
    "device_name": "--device",
    "precision": "--precision",
    "data": "--data",
    "preprocess": "--preprocess",
    "store": "--store",
}


def rebuild_lines(given: Mapping[str, Any]) -> tuple[str, ...]:
    """`given` is what the command line was given by name (`model`, `weights`, `shape`, ...).

    The plan is not searched again: a search follows what was measured, which is never twice the same. Weights of the
    dense model are needed for the dense engine alone; where their file has moved, WEIGHTS names it.
    """
    options = [str(given["model"])]
    for name, option in OPTIONS.items():
        if given.get(name) is not None:
            options += [option, str(given[name])]
    for each in given.get("inputs") or ():
        options += ["--input", str(each)]
    if given.get("allow_modelled"):
        options.append("--allow-modelled")
    weights = given.get("weights")
    dense = f' --weights "${{WEIGHTS:-{_inside_quotes(str(weights))}}}"' if weights else ""
    made = " ".join(shlex.join(sys.argv[1:]).split())
    return (
        "# Makes this bundle again, from its own plan.json and weights.safetensors, for the runtime that is here:",
        "#     sh rebuild.sh FOLDER",
        f"# It was made by: edgeprune {made}",
        'here="$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)"',
        f"exec edgeprune export {shlex.join(options)}{dense} \\",
        '    --pruned "$here" --out "${1:?name the folder to write: sh rebuild.sh FOLDER}"',
    )


def _inside_quotes(text: str) -> str:
    """As text inside of double quotes and braces, where a shell would take these for its own."""
    return "".join(f"\\{letter}" if letter in '\\"$`}' else letter for letter in text)
