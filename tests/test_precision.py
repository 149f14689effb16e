"""Which kernels of a network are in a precision, and what is refused because it ran in another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.backends import find_backend
from edgeprune.device import Device, in_precision, load_device
from edgeprune.errors import InputError
from edgeprune.graph import analyse, tracing
from edgeprune.kernel import Kernel
from edgeprune.measurement import NodeTimes
from edgeprune.planning import describe_choice
from edgeprune.precision import KINDS, check_computes, kind_of, precision_of, refusal, shares_of
from edgeprune.preparing import Task, prepare

pytestmark = pytest.mark.unit

CONV = Kernel(
    operator="conv",
    c_in=8,
    c_out=8,
    spatial=(4, 4),
    window=(1, 1),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    precision="int8",
)


def nodes(*told: tuple[str | None, float], compute: bool = True) -> NodeTimes:
    """Nodes of a runtime: (precision, microseconds)."""
    listed = [{"name": str(i), "time_us": us, "compute": compute, "precision": p} for i, (p, us) in enumerate(told)]
    return NodeTimes(nodes=tuple(listed), total_us=sum(us for _, us in told))


def test_a_network_is_in_int8_where_its_runtime_has_such_kernels() -> None:
    computes = {"int8": frozenset({"conv", "activation silu"})}
    assert precision_of("conv", ("bias", "gelu"), "int8", computes) == "int8"
    assert precision_of("activation", ("silu",), "int8", computes) == "int8"
    assert precision_of("activation", ("gelu",), "int8", computes) == "fp32"
    assert precision_of("softmax", (), "int8", computes) == "fp32"
    assert kind_of("add", ("relu",)) == "add" and "activation" not in KINDS


def test_a_kernel_that_a_runtime_has_not_is_refused_before_it_is_built() -> None:
    computes = {"fp32": KINDS, "int8": frozenset({"linear"})}
    with pytest.raises(ValueError, match="conv 8>8 .* int8 dense: Some Runtime computes no conv in int8"):
        check_computes(CONV, computes, "Some Runtime")
    with pytest.raises(ValueError, match=r"int8 dense kernels are not built yet for It \(supported: fp32\)"):
        check_computes(CONV, {"fp32": KINDS}, "It")
    check_computes(CONV, {"int8": KINDS}, "It")


def test_shares_are_those_of_the_compute_time() -> None:
    assert shares_of(nodes(("int8", 3.0), ("fp32", 1.0))) == {"int8": 0.75, "fp32": 0.25}
    assert list(shares_of(nodes(("fp32", 1.0), ("int8", 3.0))) or ()) == ["int8", "fp32"]
    assert shares_of(nodes(("int8", 3.0), (None, 1.0))) is None, "one node that doesn't tell may be the one that counts"
    assert shares_of(nodes(("int8", 3.0), compute=False)) is None
    assert shares_of(None) is None


def test_a_kernel_that_ran_in_another_precision_is_refused() -> None:
    assert refusal(CONV, {"fp32": 1.0}) == "the runtime did not compute it in int8: 100% fp32"
    assert refusal(CONV, {"fp32": 0.6, "int8": 0.4}) == "the runtime did not compute it in int8: 60% fp32, 40% int8"
    assert refusal(CONV, {"int8": 0.9, "fp32": 0.1}) is None
    assert refusal(CONV, None) is None, "not every runtime tells"


def test_the_first_precision_of_a_device_counts() -> None:
    device = load_device("host-openvino")
    assert in_precision(device, None) is device
    assert in_precision(device, "int8").precisions == ("int8", "fp32", "bf16")
    with pytest.raises(InputError, match=r"device 'null' has no precision 'int8' \(known: fp32, fp16\)"):
        in_precision(load_device("null"), "int8")


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.conv(x))
        y: torch.Tensor = self.head(self.norm(x.flatten(2).mean(2))).softmax(-1)
        return y


@pytest.mark.parametrize(
    ("backend", "precision", "found"),
    [
        ("openvino", "fp32", {"conv": "fp32", "mean": "fp32", "layer_norm": "fp32", "linear": "fp32"}),
        ("openvino", "int8", {"conv": "int8", "mean": "int8", "layer_norm": "fp32", "linear": "int8"}),
        ("openvino", "bf16", {"conv": "bf16", "mean": "fp32", "layer_norm": "fp32", "linear": "bf16"}),
        ("onnxruntime", "int8", {"conv": "int8", "linear": "int8", "activation": "fp32", "softmax": "fp32"}),
        ("tflite", "int8", {"conv": "int8", "linear": "int8", "activation": "fp32", "softmax": "fp32"}),
        ("tensorrt", "int8", {"conv": "int8", "activation": "fp32", "mean": "fp32", "linear": "int8"}),
        ("null", "int8", {"conv": "int8", "layer_norm": "int8", "softmax": "int8"}),
    ],
)
def test_units_are_in_the_precision_that_each_runtime_has(backend: str, precision: str, found: dict[str, str]) -> None:
    graph = analyse(tracing.trace_program(Mixed(), (torch.randn(1, 3, 8, 8),)))
    units = {unit.dense.operator: unit.dense for unit in find_backend(backend).partition(graph, precision)}
    assert {operator: units[operator].precision for operator in found} == found


def test_onnx_runtime_has_more_than_contractions_in_int8_where_no_layer_norm_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 36, 4), nn.Softmax(-1))
    graph = analyse(tracing.trace_program(net, (torch.randn(1, 3, 8, 8),)))
    units = find_backend("onnxruntime").partition(graph, "int8")
    found = {unit.dense.operator: unit.dense.precision for unit in units}
    assert found == {"conv": "int8", "activation": "fp32", "linear": "int8", "softmax": "int8"}


def test_onnx_runtime_adds_in_a_node_of_its_own_in_int8() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(x) + x)

    graph = analyse(tracing.trace_program(Residual(), (torch.randn(1, 4, 5, 5),)))
    runtime = find_backend("onnxruntime")
    kernels = {
        precision: [(unit.dense.operator, unit.dense.epilogue) for unit in runtime.partition(graph, precision)]
        for precision in ("fp32", "int8")
    }
    assert kernels == {"fp32": [("conv", ("bias", "add", "relu"))], "int8": [("conv", ("bias",)), ("add", ("relu",))]}


@pytest.mark.integration
def test_networks_in_int8_are_calibrated_on_whole_ones_and_fitted(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels in int8, and whole networks beside them; a device that is a formula takes no data for it."""
    from edgeprune.budget import parse_budget
    from edgeprune.pipeline import fit
    from tests.small_models import plain

    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path))
    device = in_precision(Device(name="null8", backend="null", precisions=("fp32", "int8")), "int8")
    task = Task(model=plain(), name="plain", example_inputs=(torch.randn(1, 3, 32, 32),), device=device, saliency="l1")
    prepared = prepare(task)
    assert prepared.cost.networks > 4 and prepared.cost.precision == "int8"
    assert {kernel.precision for kernel in prepared.table.entries} == {"int8"}
    assert describe_choice(prepared.cost, prepared.least())["origin"] == f"predicted from {prepared.cost.basis}"
    assert (tmp_path / "latency_tables" / "null8" / "null_int8.jsonl").is_file()
    found = fit(task, parse_budget("0.6x"), tmp_path / "bundle")
    assert found.verification.met and found.bundle.engine.precision == "int8"
