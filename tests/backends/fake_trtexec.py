"""A test double of trtexec: it knows the flags of each dialect, refuses others, writes files in the documented forms.

Nothing runs on a GPU, and every time that it tells is a formula: `compute_ms` below. It stands in for the real program
in tests alone.

Environment: FAKE_TRTEXEC_DIALECT (8.5, 8.6, 10.3, 11.1), FAKE_TRTEXEC_FAULT (what goes wrong, see FAULTS) and
FAKE_TRTEXEC_FAULT_IN (only for models whose file name or engine holds this text), FAKE_TRTEXEC_LOG (a file to which
each command line is appended), FAKE_TRTEXEC_RUNNER (the part of the runner that reads ONNX).

Forms and flags: samples/common/sampleOptions.cpp and sampleReporting.cpp of https://github.com/NVIDIA/TensorRT (8.5 to
10.x at commits 768d994b and 147005ff, 11.x at d5883286) and
https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/api/migration/tensorrt-10x-to-11x-trtexec.html
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

DIALECT = os.environ.get("FAKE_TRTEXEC_DIALECT", "10.3")
BANNERS = {"8.5": "v8502", "8.6": "v8601", "10.3": "v100300", "11.1": "v110100] [b106"}
COMMON = "help onnx saveEngine loadEngine profilingVerbosity exportLayerInfo noTF32 sparsity timingCacheFile verbose"
COMMON += " iterations warmUp duration exportTimes exportProfile dumpProfile separateProfileRun exportOutput loadInputs"
COMMON += " useSpinWait useCudaGraph noDataTransfers memPoolSize stronglyTyped avgRuns"
OWN = {
    "8.5": "fp16 int8 best buildOnly workspace explicitBatch streams",
    "8.6": "fp16 int8 best skipInference workspace streams",
    "10.3": "fp16 int8 bf16 best skipInference infStreams",
    "11.1": "skipInference infStreams includeDataTransfers noSpinWait noCudaGraph",
}
MISSING = {"8.5": {"stronglyTyped"}, "8.6": {"stronglyTyped"}, "10.3": set(), "11.1": set()}
FAULTS = "crash oom hang no-engine silent empty truncated nan short profile-nan refuse".split()


def known() -> set[str]:
    return {f"--{flag}" for flag in (COMMON + " " + OWN[DIALECT]).split() if flag not in MISSING[DIALECT]}


def say(text: str) -> None:
    print(f"[11/22/2026-12:00:00] {text}")


def end(status: str) -> None:
    print(f"&&&& {status} TensorRT.trtexec [TensorRT {BANNERS[DIALECT]}] # {' '.join(sys.argv)}")
    sys.exit(status == "FAILED")


def read_model(path: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("runner", os.environ["FAKE_TRTEXEC_RUNNER"])
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    model: dict[str, Any] = runner.read_onnx(path)
    return model


def build(options: dict[str, str], fault: str) -> None:
    path = options["--onnx"]
    if fault == "oom":
        say("[E] [TRT] 2: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory")
        say("[E] Engine set up failed")
        end("FAILED")
    if fault == "refuse":
        say("[E] Failed to parse onnx file")
        end("FAILED")
    model = read_model(path)
    data = Path(path).read_bytes()
    layers = [" + ".join(model["nodes"])]
    if "--sparsity" in options:
        sparse = layers[0] if data.count(b"\0\0") > len(data) / 5 else ""  # half of the weights are zero
        if DIALECT.startswith("8"):
            say(f"[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: {sparse}")
        elif "--verbose" in options:
            say(f"[V] [TRT] (Sparsity) Chose {int(bool(sparse))} layer(s) using sparse tactics: {sparse}")
    described = [{"Name": layer, "LayerType": "CaskConvolution", "Metadata": ""} for layer in layers]
    if "--exportLayerInfo" in options:
        Path(options["--exportLayerInfo"]).write_text(json.dumps({"Layers": described}))
    if fault != "no-engine":
        engine = {"onnx": path, "bytes": len(data), "layers": layers, "dialect": DIALECT}
        Path(options["--saveEngine"]).write_text(json.dumps(engine))


def compute_ms(engine: dict[str, Any], run: int) -> float:
    """Not measured: 0.02 ms and a nanosecond a byte, with a ripple of a thousandth."""
    return (0.02 + int(engine["bytes"]) * 1e-6) * (1 + 1e-3 * (run % 3))


def transfers_ms(options: dict[str, str]) -> tuple[float, float]:
    """11.x leaves them out unless asked for."""
    told = DIALECT != "11.1" or "--includeDataTransfers" in options
    return (0.01, 0.005) if told else (0.0, 0.0)


def times(engine: dict[str, Any], options: dict[str, str], fault: str) -> str:
    h2d, d2h = transfers_ms(options)
    entries = []
    for run in range(1 if fault == "short" else int(options["--iterations"])):
        compute, at = compute_ms(engine, run), 200.0 + run
        told = "nan" if fault == "nan" else f"{compute:.6g}"
        stamps = {"startEnqMs": at, "endEnqMs": at + 0.01, "startH2dMs": at, "endH2dMs": at + h2d}
        stamps |= {"startComputeMs": at + h2d, "endComputeMs": at + h2d + compute}
        stamps |= {"startD2hMs": at + h2d + compute, "endD2hMs": at + h2d + compute + d2h}
        written = [f'"{name}" : {value:.6g}' for name, value in stamps.items()]
        written += [f'"h2dMs" : {h2d:.6g}', f'"computeMs" : {told}', f'"d2hMs" : {d2h:.6g}']
        entries.append("{ " + ", ".join([*written, f'"latencyMs" : {h2d + compute + d2h:.6g}']) + " }\n")
    text = "[\n  " + ", ".join(entries) + "]\n"
    return "" if fault == "empty" else text[: len(text) // 2] if fault == "truncated" else text


def profile(engine: dict[str, Any], fault: str) -> str:
    time_ms = "-nan" if fault == "profile-nan" else f"{compute_ms(engine, 0):.6g}"
    told = f'"timeMs" : 1.5, "averageMs" : {time_ms}, "medianMs" : {time_ms}, "percentage" : 100'
    layers = [f', {{ "name" : "{name}", {told} }}\n' for name in engine["layers"]]
    return '[\n  { "count" : 50 }\n' + "".join(layers) + "]\n"


def answer(engine: dict[str, Any], options: dict[str, str]) -> str:
    """What the model gives, by ONNX's own reference."""
    import numpy as np
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(engine["onnx"])
    files = dict(pair.rsplit(":", 1) for pair in options["--loadInputs"].split(","))
    feeds = {}
    for value in model.graph.input:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = np.fromfile(files[value.name], dtype).reshape(shape)
    told = []
    for value, array in zip(model.graph.output, ReferenceEvaluator(model).run(None, feeds), strict=True):
        dimensions, numbers = "x".join(map(str, array.shape)), ", ".join(f"{x:.6g}" for x in array.ravel().tolist())
        told.append(
            f'{{ "name" : "{value.name}"\n  , "dimensions" : "{dimensions}"\n  , "values" : [ {numbers} ]\n  }}\n'
        )
    return "[\n  " + ", ".join(told) + "]\n"


def infer(options: dict[str, str], fault: str, engine: dict[str, Any]) -> None:
    if "--exportTimes" in options:
        Path(options["--exportTimes"]).write_text(times(engine, options, fault))
    if "--exportProfile" in options:
        Path(options["--exportProfile"]).write_text(profile(engine, fault))
    if "--exportOutput" in options:
        Path(options["--exportOutput"]).write_text(answer(engine, options))


def main() -> None:
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if "FAKE_TRTEXEC_LOG" in os.environ:
        with Path(os.environ["FAKE_TRTEXEC_LOG"]).open("a") as log:
            log.write(json.dumps(sys.argv[1:]) + "\n")
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT {BANNERS[DIALECT]}] # {' '.join(sys.argv)}")
    if "--help" in options:
        print("=== Build and Inference Options ===", *sorted(known()), sep="\n  ")
        return
    unknown = [flag for flag in options if flag not in known()]
    for flag in unknown:
        say(f"[E] Unknown option: {flag} {options[flag]}")
    if unknown:
        end("FAILED")
    engine: dict[str, Any] = {}
    if "--loadEngine" in options:
        engine = json.loads(Path(options["--loadEngine"]).read_text())
    about = options.get("--onnx", "") + str(engine.get("onnx", ""))
    fault = os.environ.get("FAKE_TRTEXEC_FAULT", "") if os.environ.get("FAKE_TRTEXEC_FAULT_IN", "") in about else ""
    if fault == "crash":
        sys.stdout.flush()
        os.kill(os.getpid(), 11)
    if fault == "hang":
        time.sleep(60)
    if engine:
        infer(options, fault, engine)
    else:
        build(options, fault)
    if fault == "silent":
        return
    end("PASSED")


if __name__ == "__main__":
    main()
