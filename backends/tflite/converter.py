"""Run as a program: one JSON line `{"source": IN.pt2, "target": OUT.tflite, "wide": false}` a conversion on stdin
(`wide` keeps 64-bit types), one `{"error": null or text}` on stdout for each. Imports nothing of edgeprune.

A process of its own, because `litert_torch` brings JAX and the compiler of TensorFlow: their threads, which forbid to
fork, their memory, what they print, and an abort instead of an exception for some networks all stay here.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def convert(request: dict[str, Any]) -> None:
    import litert_torch
    import torch

    program = torch.export.load(request["source"])
    args, kwargs = program.example_inputs
    model = litert_torch.convert(program.module(), args, kwargs or None, enable_x64=request["wide"])
    with open(request["target"], "wb") as file:  # noqa: PTH123
        file.write(model.model_content())


def main() -> None:
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the converter prints can't mix with answers
    for line in sys.stdin:
        error = None
        try:
            convert(json.loads(line))
        except Exception as fault:  # any type, from any of the packages
            error = str(fault).strip().split("\n")[0] or type(fault).__name__
        wire.write(json.dumps({"error": error}) + "\n")
        wire.flush()


if __name__ == "__main__":
    main()
