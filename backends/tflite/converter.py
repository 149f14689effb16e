"""Run as a program: `python converter.py IN.pt2 OUT.tflite 0|1` (1 keeps 64-bit types). Imports nothing of edgeprune.

A process of its own, because `litert_torch` brings JAX and the compiler of TensorFlow: their threads, which forbid to
fork, their memory, what they print, and an abort instead of an exception for some networks all stay here.
"""

from __future__ import annotations

import sys


def main(source: str, target: str, wide: str) -> None:
    import litert_torch
    import torch

    program = torch.export.load(source)
    args, kwargs = program.example_inputs
    model = litert_torch.convert(program.module(), args, kwargs or None, enable_x64=wide == "1")
    with open(target, "wb") as file:  # noqa: PTH123
        file.write(model.model_content())


if __name__ == "__main__":
    main(*sys.argv[1:])
