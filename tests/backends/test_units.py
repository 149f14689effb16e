"""Units against the graph that a runtime really executes: nothing it spends time on is without a unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.backends import find_backend
from edgeprune.device import Device
from edgeprune.exporting import export_dense
from edgeprune.graph import analyse, tracing
from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import MADE
from edgeprune.measurement import Timing
from edgeprune.transport import open_session
from tests.small_models import redrawn
from tests.test_attention import SpelledOut
from tests.test_fusion import Net, Transformer

pytestmark = pytest.mark.contract

QUICK = Timing(warmup_ms=1, burst_ms=0.5, min_rounds=3, max_rounds=3)


class Excited(nn.Module):
    """Squeeze-and-excite: torch makes a mean of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.squeeze, self.excite = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        scaled: torch.Tensor = x * self.excite(self.squeeze(pooled).relu()).sigmoid()
        return scaled.mean((2, 3))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Excited, (1, 3, 40, 40)), (Net, (2, 3, 16, 16)), (Transformer, (2, 3, 64, 64)), (SpelledOut, (5, 9, 16))],
)
def test_whatever_openvino_executes_belongs_to_a_unit(
    model: Callable[[], nn.Module], shape: tuple[int, ...], require: Callable[[str], None], tmp_path: Path
) -> None:
    require("openvino")
    module, inputs = redrawn(model()), (torch.randn(*shape),)
    device = Device(name="units", backend="openvino")
    units = find_backend("openvino").partition(analyse(tracing.trace_program(module, inputs)), "fp32")
    known = {node for unit in units for node in unit.nodes} | {unit.name for unit in units}
    engine = export_dense(module, inputs, device, tmp_path / "engine")
    with open_session(device) as session:
        session.load("network", engine.path, profile=True)
        session.measure(["network"], timing=QUICK)
        times = session.node_times("network")
    assert times is not None
    executed = [node for node in times.nodes if node["compute"]]
    assert len(executed) >= 4
    for node in executed:
        assert node["covers"], node
        assert not known.isdisjoint(name.partition("/")[0] for name in node["covers"]), node


@pytest.mark.parametrize(("c_in", "c_out"), [(16, 32), (8, 24), (18, 24)])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_convolution_with_an_add_is_one_node_alone_as_in_a_network(
    backend: str, c_in: int, c_out: int, require: Callable[[str], None], tmp_path: Path
) -> None:
    require(backend)
    kernel = Kernel(
        operator="conv",
        c_in=c_in,
        c_out=c_out,
        spatial=(16, 16),
        window=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        dilation=(1, 1),
        epilogue=("bias", "add", "relu"),
    )
    path = find_backend(backend).build(kernel, tmp_path)
    with open_session(Device(name="units", backend=backend)) as session:
        session.load("kernel", path, profile=True)
        session.measure(["kernel"], timing=QUICK)
        times = session.node_times("kernel")
    assert times is not None
    (node,) = [node for node in times.nodes if node["compute"]]
    assert node["type"] in ("Convolution", "Conv", "FusedConv")
    if backend == "openvino":
        assert any(name.startswith("Add") for name in node["covers"]), "and not in what makes the residual"
    else:
        assert next(each["name"].partition("_nchwc")[0] for each in times.nodes if "Conv" in each["type"]) == MADE


@pytest.mark.parametrize("operator", ["max_pool", "mean", "mul"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_what_makes_the_input_of_a_kernel_is_no_part_of_it(
    backend: str, operator: str, require: Callable[[str], None], tmp_path: Path
) -> None:
    require(backend)
    kernel = Kernel(operator=operator, c_in=32, c_out=32, spatial=(16, 16))
    if operator == "max_pool":
        kernel = replace(kernel, window=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    path = find_backend(backend).build(kernel, tmp_path)
    with open_session(Device(name="units", backend=backend)) as session:
        session.load("kernel", path, profile=True)
        session.measure(["kernel"], timing=QUICK)
        times = session.node_times("kernel")
    assert times is not None
    assert [node["compute"] for node in times.nodes if node["name"].partition("_nchwc")[0] == MADE] == [False]
    assert len([node for node in times.nodes if node["compute"]]) == 1


class Summed(nn.Module):
    """Two convolutions, added."""

    def __init__(self, *, narrow_first: bool) -> None:
        super().__init__()
        self.narrow_first = narrow_first
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(16, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        wide, narrow = self.wide(x), self.narrow(x)
        summed = narrow + wide if self.narrow_first else wide + narrow
        return torch.relu(summed)


@pytest.mark.parametrize("narrow_first", [False, True])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_add_goes_into_its_first_operand(
    backend: str, narrow_first: bool, require: Callable[[str], None], tmp_path: Path
) -> None:
    require(backend)
    module, inputs = redrawn(Summed(narrow_first=narrow_first)), (torch.randn(1, 3, 18, 18),)
    taker = "narrow" if narrow_first else "wide"
    device = Device(name="units", backend=backend)
    units = find_backend(backend).partition(analyse(tracing.trace_program(module, inputs)), "fp32")
    epilogues = {"stem": ("relu",), "wide": (), "narrow": (), taker: ("add", "relu")}
    assert {unit.name: unit.dense.epilogue[1:] for unit in units} == epilogues
    engine = export_dense(module, inputs, device, tmp_path / "engine")
    with open_session(device) as session:
        session.load("network", engine.path, profile=True)
        session.measure(["network"], timing=QUICK)
        times = session.node_times("network")
    assert times is not None
    executed = [node for node in times.nodes if node["compute"]]
    assert len(executed) == 3, "the add is in one of the convolutions"
    if backend == "openvino":  # ONNX Runtime runs the one that takes it last, and names no others in a node
        assert any(
            taker in node["covers"] and any(name.startswith("add") for name in node["covers"]) for node in executed
        )
    else:
        assert executed[-1]["name"].startswith(taker)
