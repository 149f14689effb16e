"""TensorRT's Python module. Engines are really built, without a GPU, where TensorRT for RTX is installed: its API is
TensorRT's, and it builds for a GPU that is named. What they would do on one is not shown here; how a run is put
together is, against a test double of the driver.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune import onnx_int8
from edgeprune.backends import find_backend
from edgeprune.backends.tensorrt import COMPUTES
from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import model_from_kernel
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import to_half
from edgeprune.onnx_quantise import TENSORRT, quantise
from edgeprune.ranges import drawn_batches
from tests.backends.test_contract import KERNELS, conv
from tests.small_models import Net, pruned, redrawn

SM86 = "SM86"  # Ampere: Orin is SM87, which TensorRT for RTX doesn't build for


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    pytest.importorskip(
        "tensorrt_rtx",
        reason="no engine is built: TensorRT for RTX is missing (pip install 'edgeprune[tensorrt-rtx]', 2 GB)",
        exc_type=ImportError,
    )
    return importlib.import_module("edgeprune.backends.tensorrt_python.runner")


def built(runner: ModuleType, model: Any, precision: str = "fp32") -> tuple[int, list[str]]:
    """Bytes of the engine, names of the nodes."""
    plan, names = runner.serialized(model.SerializeToString(), precision, runner.Log(), SM86)
    return memoryview(plan).nbytes, names


@pytest.mark.contract
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.key)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_kernel_becomes_an_engine(kernel: Kernel, precision: str, runner: ModuleType) -> None:
    model = model_from_kernel(replace(kernel, precision=precision))
    num_bytes, names = built(runner, model, precision)
    assert num_bytes > 1000
    assert {node.name for node in model.graph.node} & set(names)


@pytest.mark.contract
@pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if kernel.operator in COMPUTES["int8"]], ids=lambda kernel: kernel.key
)
def test_kernels_of_integers_become_engines(kernel: Kernel, runner: ModuleType) -> None:
    """TensorRT reads the QDQ form and builds it; what a GPU would compute it in, nothing here tells."""
    assert built(runner, model_from_kernel(replace(kernel, precision="int8")), "int8")[0] > 1000


@pytest.mark.contract
@pytest.mark.parametrize("kernel", [conv(64, 64, "bias", "relu"), Kernel(operator="linear", c_in=256, c_out=64)])
def test_sparse_kernels_become_engines(kernel: Kernel, runner: ModuleType) -> None:
    assert built(runner, model_from_kernel(replace(kernel, precision="fp16", sparsity="2:4")), "fp16")[0] > 1000


@pytest.mark.contract
@pytest.mark.parametrize("model", [Net, lambda: Net(5), lambda: Net(8, dropped=True)], ids=["Net", "odd", "dropped"])
def test_a_pruned_network_becomes_an_engine_half_the_size_in_half_precision(
    model: Callable[[], nn.Module], runner: ModuleType
) -> None:
    given = pruned(redrawn(model()))
    full = onnx_from_module(given.module, given.example_inputs)
    half = to_half(full)
    _, names = built(runner, full)
    _, halved = built(runner, half, "fp16")
    assert {"conv", "head"} <= set(names) & set(halved)
    assert len(half.SerializeToString()) < len(full.SerializeToString())


@pytest.mark.contract
@pytest.mark.parametrize("capability", ["SM86", "SM89", "SM120"])
def test_a_network_of_integers_becomes_an_engine(capability: str, runner: ModuleType) -> None:
    """Quantised on drawn values, half precision around the integers; a GPU is named, none is needed."""
    given = pruned(redrawn(Net()))
    full = onnx_from_module(given.module, given.example_inputs)
    model = to_half(quantise(full, drawn_batches(given.example_inputs), onnx_int8.TENSORRT, TENSORRT))
    plan, names = runner.serialized(model.SerializeToString(), "int8", runner.Log(), capability)
    assert memoryview(plan).nbytes > 1000
    assert {"conv", "head"} <= set(names)


@pytest.mark.contract
def test_large_weights_take_half_the_room(runner: ModuleType) -> None:
    """Shows that the engine computes in what the ONNX says: 2 MB of weights, or 1."""
    net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 8))
    full = onnx_from_module(net, (torch.zeros(1, 512),))
    large, small = built(runner, full)[0], built(runner, to_half(full), "fp16")[0]
    assert large - small == pytest.approx(2 * 512 * 1024, rel=0.2)


@pytest.mark.contract
def test_what_is_no_onnx_is_an_error_with_tensorrts_words(runner: ModuleType) -> None:
    with pytest.raises(ValueError, match="TensorRT can't read the ONNX: .+"):
        runner.serialized(b"this is no model", "fp32", runner.Log(), SM86)
    with pytest.raises(ValueError, match="precision bf16 is not supported"):
        runner.serialized(b"", "bf16", runner.Log(), SM86)


@pytest.mark.contract
def test_the_version_names_the_edition(runner: ModuleType) -> None:
    edition, _, number = runner.version().rpartition(" ")
    assert edition == ("rtx" if runner.trt.__name__ == "tensorrt_rtx" else "")
    assert number.count(".") >= 2


class CudaDouble:
    """Test double of the driver: real memory here stands for that of the GPU; copies are made, calls are kept."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.kept: list[Any] = []

    def __call__(self, function: str, *arguments: Any) -> None:
        self.calls.append(function)
        if function.startswith("cuMemcpy"):
            target, source, size, _ = arguments
            ctypes.memmove(target, source, size.value)

    def made(self, function: str, *arguments: Any) -> Any:
        self.calls.append(function)
        self.kept.append(ctypes.create_string_buffer(arguments[0].value if function.startswith("cuMem") else 8))
        return ctypes.c_void_p(ctypes.addressof(self.kept[-1]))


class EngineDouble:
    """Test double of an engine and its context: y = x, byte by byte."""

    num_io_tensors = 2

    def __init__(self, input_mode: object, cuda: CudaDouble) -> None:
        self.input_mode, self.cuda, self.addresses = input_mode, cuda, dict[str, int]()

    def create_execution_context(self) -> EngineDouble:
        return self

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_dtype(self, name: str) -> object:
        return SimpleNamespace(name="HALF")

    def get_tensor_mode(self, name: str) -> object:
        return self.input_mode if name == "x" else None

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.cuda.calls.append("execute_async_v3")
        ctypes.memmove(self.addresses["y"], self.addresses["x"], 6)
        return True


@pytest.mark.unit
def test_a_run_is_inputs_inference_outputs_and_a_wait(runner: ModuleType) -> None:
    cuda = CudaDouble()
    engine = EngineDouble(runner.trt.TensorIOMode.INPUT, cuda)
    handle = runner.Handle(cuda, engine, runner.Log(), [], {})
    assert runner.inputs(handle) == [{"name": "x", "dtype": "float16", "shape": [1, 3]}]
    assert runner.outputs(handle) == [{"name": "y", "dtype": "float16", "shape": [1, 3]}]
    runner.set_input(handle, 0, b"\x00\x3c\x00\x40\x00\x42")
    cuda.calls.clear()
    runner.run(handle)
    assert cuda.calls == ["cuMemcpyHtoDAsync_v2", "execute_async_v3", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"]
    assert runner.get_output(handle, 0) == b"\x00\x3c\x00\x40\x00\x42"
    with pytest.raises(ValueError, match="input x takes 6 bytes, 2 were given"):
        runner.set_input(handle, 0, b"ab")
    runner.fill(handle, 0)
    runner.unload(handle)
    assert cuda.calls[-5:] == ["cuMemFreeHost", "cuMemFree_v2"] * 2 + ["cuStreamDestroy_v2"]


@pytest.mark.unit
def test_a_failing_driver_call_says_which_and_why(runner: ModuleType) -> None:
    def error_string(code: int, text: Any) -> int:
        text._obj.value = b"out of memory"
        return 0

    library = SimpleNamespace(cuMemAlloc_v2=lambda *arguments: 2, cuGetErrorString=error_string)
    for function in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"):
        setattr(library, function, lambda *arguments: 0)
    with pytest.raises(RuntimeError, match=r"cuMemAlloc_v2 failed: out of memory \(CUDA error 2\)"):
        runner.Driver(library, 0).made("cuMemAlloc_v2", ctypes.c_size_t(8))


@pytest.mark.unit
def test_without_the_module_or_a_driver_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = find_backend("tensorrt_python")
    monkeypatch.setattr(backend, "MODULES", ("no_such_module",))
    assert "pip install 'edgeprune[tensorrt-rtx]'" in str(backend.available())
    monkeypatch.setattr(backend, "MODULES", ("json",))

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert backend.available() == "no NVIDIA driver (libcuda.so.1 can't be loaded): nvidia-smi must work first"
