"""Run as a program: one JSON line a conversion on stdin, one `{"error": null or text}` on stdout for each.

`{"do": "convert", "source": IN.pt2, "target": OUT.tflite, "wide": false}` (`wide` keeps 64-bit types), or
`{"do": "quantise", "source": IN.tflite, "target": OUT.tflite, "kind": "dynamic" or "static"}`, for `static` with
`"samples": IN.npz` (arrays `<sample>.<input>`), `"signature"`, `"float"`, names of tensors whose operators stay in
float, and `"contractions_alone"`, whether all but convolutions and linears does. Imports nothing of edgeprune.

A process of its own, because `litert_torch` brings JAX and the compiler of TensorFlow: their threads, which forbid to
fork, their memory, what they print, and an abort instead of an exception for some networks all stay here.
"""

from __future__ import annotations

import json
import os
import re
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


def quantise(request: dict[str, Any]) -> None:
    """Weights alone, with activations that are quantised as they come (`dynamic`), or all by ranges of `samples`."""
    from ai_edge_quantizer import quantizer

    with open(request["source"], "rb") as file:  # noqa: PTH123
        content = file.read()
    made = quantizer.Quantizer(content)
    ranges = None
    if request["kind"] == "static":
        ranges = _static(made, content, request)
    else:
        _dynamic(made)
    result = made.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    with open(request["target"], "wb") as file:  # noqa: PTH123
        file.write(bytes(result.quantized_model))


def _dynamic(made: Any) -> None:
    """Convolutions and linears; a depthwise one stays: XNNPACK has no such kernel with float activations."""
    from ai_edge_quantizer import qtyping

    for kind in (qtyping.TFLOperationName.CONV_2D, qtyping.TFLOperationName.FULLY_CONNECTED):
        made.add_dynamic_config(".*", kind, 8)


def _static(made: Any, content: bytes, request: dict[str, Any]) -> Any:
    """The recipe of int8 inside and float outside, and the least and largest values of every tensor.

    The quantiser's own way of joining samples, a moving average, would give the first of them 95 % of the weight.
    """
    import numpy as np
    from ai_edge_quantizer import algorithm_manager, calibrator, qtyping, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    kinds, never = qtyping.TFLOperationName, algorithm_manager.AlgorithmName.NO_QUANTIZE
    if request["contractions_alone"]:
        for kind in (kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.FULLY_CONNECTED):
            made.add_static_config(".*", kind, 8, 8)
    else:
        made.load_quantization_recipe(recipe.static_wi8_ai8())
        for kind in (kinds.INPUT, kinds.OUTPUT, kinds.BATCH_MATMUL, kinds.SOFTMAX):
            made.update_quantization_recipe(".*", kind, algorithm_key=never)
    for name in request["float"]:
        made.update_quantization_recipe(f"^{re.escape(name)};?$", kinds.ALL_SUPPORTED, algorithm_key=never)
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(made.get_quantization_recipe())
    seen = calibrator.Calibrator(content, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    with np.load(request["samples"]) as arrays:
        places = sorted({int(name.partition(".")[0]) for name in arrays.files})
        inputs = sorted({name.partition(".")[2] for name in arrays.files})
        given = [{name: arrays[f"{place}.{name}"] for name in inputs} for place in places]
    seen.calibrate({request["signature"]: given}, manager)
    return seen.get_model_qsvs()


DOES = {"convert": convert, "quantise": quantise}


def main() -> None:
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the converter prints can't mix with answers
    for line in sys.stdin:
        error = None
        try:
            request = json.loads(line)
            DOES[request["do"]](request)
        except Exception as fault:  # any type, from any of the packages
            error = str(fault).strip().split("\n")[0] or type(fault).__name__
        wire.write(json.dumps({"error": error}) + "\n")
        wire.flush()


if __name__ == "__main__":
    main()
