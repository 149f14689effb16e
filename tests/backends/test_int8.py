"""Kernels in int8 and bf16 on the real runtimes: each one's own listing must say so, else it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.backends import find_backend
from edgeprune.device import in_precision, load_device
from edgeprune.errors import MeasurementError
from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import model_from_kernel
from edgeprune.measurement import Timing
from edgeprune.onnx_int8 import LIMIT, ONNXRUNTIME, OPENVINO, TENSORRT
from edgeprune.precision import ACTIVATIONS, kind_of, refusal, shares_of
from edgeprune.profiling import profile
from edgeprune.table import read_lines
from edgeprune.transport import Session, open_session
from tests.backends.test_contract import KERNELS, QUICK, Array, conv, plain
from tests.test_onnx_int8 import evaluated

pytestmark = [pytest.mark.contract, pytest.mark.timed]

FUSED = {"openvino": ("relu", "relu6", "silu", "hardswish", "sigmoid", "gelu"), "onnxruntime": ("relu", "relu6")}
ALONE = [plain("activation", name) for name in ACTIVATIONS]
BIG = conv(64, 64, "bias", "relu", spatial=(28, 28), precision="int8")


def as_partitioned(runtime: str, precision: str) -> list[Kernel]:
    """The kernels that a partition for the runtime may hold in a precision."""
    computes: Mapping[str, frozenset[str]] = getattr(find_backend(runtime), "COMPUTES")  # noqa: B009
    fused = FUSED.get(runtime, ("relu", "relu6"))
    found = []
    for kernel in [*KERNELS, *ALONE]:
        activations = [] if kernel.operator == "activation" else set(kernel.epilogue) & set(ACTIVATIONS)
        if kind_of(kernel.operator, kernel.epilogue) in computes[precision] and set(activations) <= set(fused):
            found.append(replace(kernel, precision=precision))
    return found


CASES = [
    pytest.param(runtime, kernel, id=f"{runtime} {kernel.key}")
    for runtime in ("openvino", "onnxruntime")
    for kernel in as_partitioned(runtime, "int8")
]


@pytest.fixture(scope="module")
def sessions(require: Callable[[str], None]) -> Iterator[Callable[[str, str], Session]]:
    """A session of a runtime in a precision, opened once."""
    opened: dict[tuple[str, str], Any] = {}

    def session(runtime: str, precision: str) -> Session:
        require(runtime)
        if (runtime, precision) not in opened:
            device = in_precision(load_device(f"host-{runtime}"), precision)
            opened[runtime, precision] = manager = open_session(device, precision=precision)
            opened[runtime, precision] = (manager, manager.__enter__())
        found: Session = opened[runtime, precision][1]
        return found

    yield session
    for manager, _ in opened.values():
        manager.__exit__(None, None, None)


def draw(name: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """Ordinary values: within three deviations of a normal one, as integers of the type."""
    rng = np.random.default_rng(len(name))
    signed = np.rint(rng.standard_normal(shape).clip(-3, 3) * 127 / LIMIT)
    unsigned = np.abs(signed) * 2 if name == "x" else signed + 128
    array: Array = (signed if dtype == "int8" else unsigned).astype(dtype)
    return array


def reference(path: Path, inputs: Mapping[str, Array]) -> Array:
    """What ONNX's reference evaluator makes of the file."""
    import onnx

    return evaluated(onnx.load(path), dict(inputs))


def expected_of(kernel: Kernel, path: Path, inputs: Mapping[str, Array]) -> Array:
    """ONNX's reference knows no operator of ONNX Runtime's own: its pool is that of integers, channels last."""
    if kernel.operator != "max_pool" or inputs["x"].dtype != np.uint8:
        return reference(path, inputs)
    x = torch.from_numpy(np.moveaxis(inputs["x"], -1, 1).astype(np.float32))
    return torch.nn.functional.max_pool2d(x, kernel.window, kernel.stride, kernel.padding).movedim(1, -1).numpy()


@pytest.mark.parametrize(("runtime", "kernel"), CASES)
def test_a_kernel_runs_in_int8_by_the_runtimes_own_listing(
    runtime: str, kernel: Kernel, sessions: Callable[[str, str], Session], tmp_path: Path
) -> None:
    """And computes what the file says, to one step of its output for each rounding on the way."""
    session = sessions(runtime, "int8")
    path = find_backend(runtime).build(kernel, tmp_path)
    loaded = session.load(kernel.key, path, profile=True)
    inputs = {spec.name: draw(spec.name, spec.dtype, spec.shape) for spec in loaded.inputs}
    (output,) = session.run(kernel.key, list(inputs.values()))
    assert output.dtype.name in ("int8", "uint8")
    off = np.abs(output.astype(int) - expected_of(kernel, path, inputs).astype(int))
    assert off.max() <= 2 and (off > 1).mean() < 0.01
    session.measure([kernel.key], timing=QUICK)
    shares = shares_of(session.node_times(kernel.key))
    if kernel.operator != "cat" or runtime != "openvino":  # joined in place, by no node that takes time
        assert shares is not None and shares.get("int8", 0.0) > 0.99
    session.unload(kernel.key)


def test_what_runs_in_floats_is_refused(sessions: Callable[[str, str], Session], tmp_path: Path) -> None:
    """ONNX Runtime on x86-64 fuses no zero-centred int8: it computes this file in fp32 and says nothing."""
    session = sessions("onnxruntime", "int8")
    path = tmp_path / "wrong.onnx"
    path.write_bytes(model_from_kernel(BIG, form=TENSORRT).SerializeToString())
    session.load("wrong", path, profile=True)
    session.measure(["wrong"], timing=QUICK)
    shares = shares_of(session.node_times("wrong"))
    assert shares == {"fp32": 1.0}
    assert refusal(BIG, shares) == "the runtime did not compute it in int8: 100% fp32"


def test_a_profile_keeps_the_refusal_and_never_the_time(
    require: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("onnxruntime")
    runtime: Any = find_backend("onnxruntime")
    device = in_precision(load_device("host-onnxruntime"), "int8")
    other = replace(BIG, c_out=32)
    right = runtime.build

    def wrong(kernel: Kernel, folder: Path) -> Path:
        from edgeprune.kernel_onnx import write_kernel

        return write_kernel(kernel, folder, TENSORRT) if kernel == other else right(kernel, folder)

    monkeypatch.setattr(runtime, "build", wrong)
    table = profile([BIG, other], device, table_path=tmp_path / "t.jsonl", timing=Timing(max_rounds=6))
    assert set(table.entries) == {BIG}
    assert table.failures == {other: "the runtime did not compute it in int8: 100% fp32"}
    (row,) = read_lines([tmp_path / "t.jsonl"]).rows
    assert row.ran_in == {"int8": 1.0}
    assert table.facts["precision"] == "int8"


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("kernel", as_partitioned("openvino", "bf16"), ids=lambda kernel: kernel.key)
def test_openvino_computes_contractions_in_bf16_where_the_cpu_can(
    kernel: Kernel, sessions: Callable[[str, str], Session], tmp_path: Path
) -> None:
    """By its listing, and by the values: as far from fp32 as eight bits of mantissa are, not nearer."""
    session = sessions("openvino", "bf16")
    path = find_backend("openvino").build(kernel, tmp_path)
    if not has_bf16():
        with pytest.raises(MeasurementError, match="this CPU does not compute in bf16"):
            session.load(kernel.key, path, profile=True)
        return
    loaded = session.load(kernel.key, path, profile=True)
    inputs = {s.name: np.random.default_rng(7).standard_normal(s.shape, dtype=np.float32) for s in loaded.inputs}
    (output,) = session.run(kernel.key, list(inputs.values()))
    expected = reference(path, inputs)
    error = float(np.abs(output - expected).max() / np.abs(expected).max())
    assert 1e-5 < error < 3e-2
    session.measure([kernel.key], timing=QUICK)
    shares = shares_of(session.node_times(kernel.key)) or {}
    assert "bf16" in shares and (kernel.operator == "attention" or refusal(kernel, shares) is None)
    session.unload(kernel.key)


def test_onnxruntime_has_no_bf16(sessions: Callable[[str, str], Session], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bf16 dense .* not built yet for ONNX Runtime \(supported: fp32, int8\)"):
        find_backend("onnxruntime").build(replace(BIG, precision="bf16"), tmp_path)


def test_forms_differ_where_the_runtimes_do() -> None:
    assert (OPENVINO.every_step, ONNXRUNTIME.every_step) == (False, True)
    assert (OPENVINO.signed.zero, ONNXRUNTIME.signed.zero) == (0, 128)
