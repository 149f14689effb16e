"""The whole flow: on the null device in seconds, on real runtimes with a small network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import edgeprune as ep
from edgeprune.budget import parse_budget
from edgeprune.bundle import read_bundle
from edgeprune.errors import BudgetError
from edgeprune.pipeline import Fitted, fit
from edgeprune.preparing import Task
from tests.small_models import patiently, plain

pytestmark = [pytest.mark.integration, pytest.mark.timed]
X = (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)


def task(device: str = "null", saliency: str = "l2") -> Task:
    return Task(model=plain().eval(), name="plain", example_inputs=X, device=ep.load_device(device), saliency=saliency)


def fitted(folder: Path, budget: str, device: str = "null") -> Fitted:
    return fit(task(device), parse_budget(budget), folder)


def test_on_the_null_device_the_budget_is_met_and_every_number_says_modelled(tmp_path: Path) -> None:
    result = fitted(tmp_path / "bundle", "0.6x")
    found = result.verification
    assert found.met and found.origin == "modelled"
    assert found.pruned.ratio is not None and 0.5 < found.pruned.ratio.value <= 0.6
    assert found.predicted_ms == pytest.approx(found.pruned.p50_ms, rel=0.03)
    assert [record["stage"] for record in found.attempts][-1] == "confirmation"
    assert result.pruned_macs < result.dense_macs
    manifest = read_bundle(tmp_path / "bundle").document
    assert manifest["latency"]["origin"] == "modelled" and manifest["latency"]["met"]
    assert {"plan.json", "weights.safetensors", "model.json", "dense/model.json"} <= set(manifest["files"])


def test_the_same_task_gives_the_same_plan_byte_by_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fitted(tmp_path / name, "0.5x")
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()


def test_out_of_reach_names_the_least_latency_and_the_floor(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"least latency reached is .* ms, .*floor is set by") as error:
        fitted(tmp_path / "bundle", "0.01x")
    assert error.value.exit_code == 3
    assert not (tmp_path / "bundle").exists()


def test_a_dense_model_inside_the_budget_gives_an_empty_plan(tmp_path: Path) -> None:
    result = fitted(tmp_path / "bundle", "1000ms")
    assert result.verification.met
    assert json.loads((tmp_path / "bundle" / "plan.json").read_text())["kept"] == {}


def test_a_budget_in_milliseconds_and_in_frames(tmp_path: Path) -> None:
    dense = fitted(tmp_path / "dense", "1000ms").verification.pruned.p50_ms
    for budget in (f"{0.6 * dense:.5f}ms", f"{1e3 / (0.6 * dense):.3f}fps"):
        found = fitted(tmp_path / "bundle", budget).verification
        assert found.met and 0.5 * dense < found.pruned.p50_ms <= 0.6 * dense


def test_the_stages_by_hand_as_in_the_readme(tmp_path: Path) -> None:
    model, batches = plain().eval(), [torch.randn(4, 3, 32, 32)]
    device = ep.load_device("null")
    graph = ep.trace(model, X)
    table = ep.profile(ep.kernels(graph, device), device)
    plan = ep.plan(graph, ep.cost_model(graph, table), budget="0.6x", saliency="taylor_output", data=batches)
    pruned = ep.apply(plan, model, X)
    pruned = ep.recover(pruned, batches, dense=model)
    engine = ep.export(pruned, device, out=tmp_path / "build")
    result = ep.verify(engine, dense=model, budget="0.7x")
    assert result.met and result.origin == "modelled"


@pytest.mark.parametrize("device", ["host-openvino", "host-onnxruntime"])
def test_on_a_real_runtime_the_measured_engine_is_inside(
    device: str, tmp_path: Path, require: Callable[[str], None]
) -> None:
    """The verdict is the device's own."""
    require(ep.load_device(device).backend)
    found = patiently(lambda: fitted(tmp_path / "bundle", "0.8x", device)).verification
    assert found.met and found.origin == "measured"
    assert found.pruned.ratio is not None and found.pruned.ratio.upper <= 0.8
    assert found.parity is not None and found.parity.error <= found.parity.tolerance
    x = X[0].numpy()
    bundle = read_bundle(tmp_path / "bundle")
    answer = ep.load_bundle(bundle.folder).run(x)
    assert isinstance(answer, np.ndarray) and answer.shape == (1, 10)
