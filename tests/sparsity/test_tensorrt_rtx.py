"""Engines of a dense and a 2:4 network, really built for three GPUs without one. Which kernels they run is picked on
the device: nothing here shows that one of them is sparse.
"""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch

from edgeprune import onnx_int8
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import to_half
from edgeprune.onnx_quantise import TENSORRT, quantise
from edgeprune.ranges import drawn_batches
from edgeprune.sparsity.onnx_weights import layers_of
from tests.sparsity.test_onnx_weights import INPUTS, dense, sparse

pytestmark = pytest.mark.contract

CAPABILITIES = ("SM86", "SM89", "SM120")  # Ampere, Ada, Blackwell


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    pytest.importorskip(
        "tensorrt_rtx",
        reason="no engine is built: TensorRT for RTX is missing (pip install 'edgeprune[tensorrt-rtx]', 2 GB)",
        exc_type=ImportError,
    )
    return importlib.import_module("edgeprune.backends.tensorrt_python.runner")


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], onnx.ModelProto]:
    found = {}
    for form, pruned in (("dense", dense()), ("2:4", sparse())):
        model = onnx_from_module(pruned.module, INPUTS)
        found[form, "fp32"], found[form, "fp16"] = model, to_half(model)
        found[form, "int8"] = to_half(quantise(model, drawn_batches(INPUTS), onnx_int8.TENSORRT, TENSORRT))
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("form", ["dense", "2:4"])
def test_dense_and_sparse_networks_become_engines(
    form: str, precision: str, capability: str, runner: ModuleType, models: dict[tuple[str, str], onnx.ModelProto]
) -> None:
    model = models[form, precision]
    assert [layer.pattern == "yes" for layer in layers_of(model)] == [False, *[form == "2:4"] * 3]
    log = runner.Log()
    plan, names = runner.serialized(model.SerializeToString(), precision, log, capability)
    assert memoryview(plan).nbytes > 1000 and not log.errors
    assert {"0", "2", "5", "9"} <= set(names)


@pytest.mark.hardware
def test_a_sparse_engine_runs_and_gives_what_torch_gives(runner: ModuleType, models: dict[Any, Any]) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("no NVIDIA driver: engines are built here, not run")
    import numpy as np

    plan, names = runner.serialized(models["2:4", "fp16"].SerializeToString(), "fp16", runner.Log())
    engine = runner.trt.Runtime(runner.Log()).deserialize_cuda_engine(plan)
    handle = runner.Handle(runner.driver(), engine, runner.Log(), names, {})
    runner.set_input(handle, 0, INPUTS[0].numpy().tobytes())
    runner.run(handle)
    got = np.frombuffer(runner.get_output(handle, 0), np.float32)
    with torch.no_grad():
        expected = sparse().module(*INPUTS).numpy().ravel()
    assert np.abs(got - expected).max() <= 2e-2 * np.abs(expected).max()
