"""Every backend through the same tests: build, load, run, time each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.backends import Backend, backend_names, find_backend
from edgeprune.device import Device
from edgeprune.errors import MeasurementError
from edgeprune.kernel import OPERATORS, Kernel
from edgeprune.kernel_onnx import MADE, model_from_kernel
from edgeprune.measurement import Timing
from edgeprune.transport import Session, open_session

pytestmark = [pytest.mark.contract, pytest.mark.timed]

Array = np.ndarray[Any, Any]

QUICK = Timing(warmup_ms=1, burst_ms=0.5, min_rounds=3, max_rounds=3)
WINDOW: dict[str, Any] = {"window": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
STRIDED = WINDOW | {"stride": (2, 2)}


def conv(c_in: int, c_out: int, *epilogue: str, groups: int = 1, **changes: Any) -> Kernel:
    shape = WINDOW | {"spatial": (14, 14)} | changes
    return Kernel(operator="conv", c_in=c_in, c_out=c_out, groups=groups, epilogue=epilogue, **shape)


def plain(operator: str, *epilogue: str, channels: int = 24, **changes: Any) -> Kernel:
    changes = {"spatial": (14, 14)} | changes
    return Kernel(operator=operator, c_in=channels, c_out=channels, epilogue=epilogue, **changes)


def attention(*epilogue: str, spatial: tuple[int, int], c_in: int = 24, c_out: int = 24, batch: int = 1) -> Kernel:
    return Kernel(
        operator="attention", c_in=c_in, c_out=c_out, groups=3, batch=batch, spatial=spatial, epilogue=epilogue
    )


KERNELS = [
    conv(16, 24),
    conv(16, 24, "bias"),
    conv(16, 24, "bias", "relu"),
    conv(16, 24, "bias", "relu6"),
    conv(16, 24, "bias", "silu"),
    conv(16, 24, "bias", "hardswish"),
    conv(16, 24, "bias", "sigmoid"),
    conv(16, 24, "bias", "hardsigmoid"),
    conv(16, 24, "bias", "gelu"),
    conv(16, 24, "bias", "add"),
    conv(16, 24, "bias", "add", "relu"),
    conv(16, 24, "bias", "relu", "add"),
    conv(3, 16, "bias", "relu", **STRIDED),
    conv(13, 29, "bias", "relu"),
    conv(16, 24, "bias", window=(1, 1), padding=(0, 0)),
    conv(24, 24, "bias", "relu6", groups=24),
    conv(24, 48, "bias", groups=4),
    conv(16, 24, "bias", dilation=(2, 2), padding=(2, 2)),
    conv(16, 24, "bias", "relu", batch=2),
    Kernel(operator="linear", c_in=48, c_out=20, epilogue=("bias",)),
    Kernel(operator="linear", c_in=48, c_out=20, batch=3),
    Kernel(operator="linear", c_in=48, c_out=20, spatial=(7,), epilogue=("bias", "gelu")),
    Kernel(operator="linear", c_in=48, c_out=20, spatial=(7, 5)),
    plain("max_pool", **STRIDED),
    plain("avg_pool", **STRIDED),
    plain("mean"),
    plain("add"),
    plain("add", "relu"),
    plain("mul"),
    plain("affine", "relu"),
    plain("activation", "hardswish"),
    plain("activation", "silu"),
    plain("cat", channels=25),
    attention(spatial=(9, 9)),
    attention("add", batch=4, spatial=(9, 9)),
    attention(spatial=(5, 9), c_in=36, c_out=24),
    Kernel(operator="matmul", c_in=48, c_out=15, groups=3, batch=2, spatial=(7,)),
    plain("layer_norm", spatial=(9,)),
    plain("softmax"),
    plain("copy", spatial=(301,)),
    plain("copy", spatial=(4, 7, 4, 7)),
    plain("transpose"),
]
FUSED = [
    kernel
    for kernel in KERNELS
    if kernel.operator in ("conv", "linear") and kernel.epilogue[1:] not in (("hardsigmoid",), ("relu", "add"))
]
"""What OpenVINO runs as one node; the two others it doesn't fuse in a network either."""


@pytest.fixture(scope="module", params=backend_names())
def backend(request: pytest.FixtureRequest, require: Callable[[str], None]) -> Backend:
    require(request.param)
    return find_backend(request.param)


@pytest.fixture(scope="module")
def session(backend: Backend) -> Iterator[Session]:
    with open_session(Device(name="contract", backend=backend.name)) as session:
        yield session


def test_kernels_cover_every_operator() -> None:
    assert {kernel.operator for kernel in KERNELS} == set(OPERATORS)


def test_versions_agree(backend: Backend, session: Session) -> None:
    hello = session.hello()
    assert hello["runner"] == backend.name
    assert hello["modelled"] == backend.modelled
    assert str(hello["version"]).startswith(str(backend.version()))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.key)
def test_kernel_loads_runs_and_is_timed(kernel: Kernel, backend: Backend, session: Session, tmp_path: Path) -> None:
    path = backend.build(kernel, tmp_path)
    loaded = session.load(kernel.key, path, profile=True)
    inputs = [draw(spec.shape, index) for index, spec in enumerate(loaded.inputs)]
    outputs = session.run(kernel.key, inputs)
    assert [output.shape for output in outputs] == [spec.shape for spec in loaded.outputs]
    if not backend.modelled:
        agrees(outputs[0], kernel, path, dict(zip((spec.name for spec in loaded.inputs), inputs, strict=True)))

    measured = session.measure([kernel.key], timing=QUICK)
    assert measured.modelled == backend.modelled
    assert len(measured.times_us[kernel.key]) == 3
    assert all(len(burst) >= QUICK.min_runs for burst in measured.times_us[kernel.key])
    nodes = session.node_times(kernel.key)
    if nodes is not None:
        assert nodes.compute_us > 0 or kernel.operator == "cat"  # may be joined in place, by no node
        assert nodes.within(measured.percentile_us(kernel.key)) <= measured.percentile_us(kernel.key)
    session.unload(kernel.key)


def draw(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def agrees(output: Array, kernel: Kernel, path: Path, inputs: dict[str, Array]) -> None:
    """With ONNX's own reference, in fp32: what bf16 would compute is a hundred times as far off."""
    import onnx.reference

    model = onnx.load(path) if path.suffix == ".onnx" else same_in_onnx(kernel)
    wanted = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in model.graph.input}
    feeds = {name: in_layout(array, wanted[name]) for name, array in inputs.items()}
    (result,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    expected = np.asarray(result)
    assert np.abs(in_layout(output, expected.shape) - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))


def same_in_onnx(kernel: Kernel) -> Any:
    """Every builder draws the same weights. A layer norm of LiteRT has none: they move into the linear after it."""
    model = model_from_kernel(kernel)
    if kernel.operator == "layer_norm":
        scale, shift, *_ = model.graph.initializer
        scale.raw_data, shift.raw_data = (np.full(kernel.c_in, value, np.float32).tobytes() for value in (1, 0))
    return model


def in_layout(array: Array, shape: tuple[int, ...]) -> Array:
    """The array as it is, or its channels moved from last to first."""
    found = array if array.shape == shape else np.moveaxis(array, -1, 1)
    assert found.shape == shape
    return found


@pytest.mark.parametrize("kernel", FUSED, ids=lambda kernel: kernel.key)
def test_openvino_runs_a_contraction_as_one_node(
    kernel: Kernel, require: Callable[[str], None], tmp_path: Path
) -> None:
    """With its epilogue inside, as in a network: else the table would hold what no network runs."""
    require("openvino")
    import openvino

    path = find_backend("openvino").build(kernel, tmp_path)
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    request = openvino.Core().compile_model(str(path), "CPU", config).create_infer_request()
    request.infer()
    ran = [node for node in request.get_profiling_info() if not node.exec_type.startswith(("undef", "unknown"))]
    assert [node.node_type for node in ran if node.node_type != "Reorder" and node.node_name != MADE] in (
        ["Convolution"],
        ["GroupConvolution"],
        ["FullyConnected"],
    )


def test_a_kernel_that_cannot_be_built_says_which_and_what_can(backend: Backend, tmp_path: Path) -> None:
    if backend.modelled:
        pytest.skip("a formula has a time for every precision")
    with pytest.raises(ValueError, match="fp8 dense kernels are not built yet"):
        backend.build(Kernel(operator="linear", c_in=4, c_out=4, precision="fp8"), tmp_path)


def test_a_model_that_is_no_model_leaves_the_session_alive(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"this is no model")
    with pytest.raises(MeasurementError, match="broken one: "):
        session.load("broken one", path)
    assert session.hello()


def test_wrong_inputs_are_named(backend: Backend, session: Session, tmp_path: Path) -> None:
    session.load("k", backend.build(plain("add"), tmp_path))
    with pytest.raises(MeasurementError, match="k: "):
        session.run("k", [])


def test_interleaved_candidates_with_references(backend: Backend, session: Session, tmp_path: Path) -> None:
    small, large = conv(16, 16, "bias"), conv(128, 128, "bias")
    for kernel in (small, large):
        session.load(kernel.key, backend.build(kernel, tmp_path))
    measured = session.measure([large.key], [small.key], timing=QUICK)
    assert measured.ratio(large.key).value > 2
    assert measured.rounds[large.key] == measured.rounds[small.key] == [0, 1, 2]
