"""2:4 as a choice: it competes with narrower widths by table time, where the device has sparse tensor cores."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.backends import find_backend
from edgeprune.backends.null.staircase import time_us
from edgeprune.choice import Choice, dense_choice, plan_from
from edgeprune.choosing import Rules, choose
from edgeprune.cli import main
from edgeprune.constraints import Constraints
from edgeprune.cost import CostModel, cost_model_from
from edgeprune.device import load_device
from edgeprune.errors import InputError
from edgeprune.exporting import export
from edgeprune.formats import check_device, check_layers, format_values, parse_formats, with_formats
from edgeprune.graph import trace
from edgeprune.kernel import Kernel
from edgeprune.pattern import best_mask, holds, matrix_of, weight_of
from edgeprune.plan_json import Plan
from edgeprune.saliency import Saliency
from edgeprune.surgery import apply
from edgeprune.units import samples, width_options

pytestmark = pytest.mark.unit


class Chain(nn.Module):
    """Three convolutions of which the last two may be 2:4, and a head of ten outputs, which may not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 96, 3, padding=1), nn.Conv2d(96, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        head: torch.Tensor = self.head(y.mean((2, 3)))
        return head


class Residual(nn.Module):
    """A stream of 64 channels, two blocks that may go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def branch() -> nn.Module:
            return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))

        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.one, self.two = branch(), branch()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.one(x))
        x = torch.relu(x + self.two(x))
        head: torch.Tensor = self.head(x.mean((2, 3)))
        return head


def nearly_sparse() -> nn.Module:
    """Half of its weights hardly count."""
    model = Residual()
    with torch.no_grad():
        for branch in (model.one, model.two):
            for weight in (branch.get_parameter("0.weight"), branch.get_parameter("2.weight")):
                W = matrix_of(weight)
                weight.copy_(weight_of(torch.where(best_mask(W.abs()), W, 0.05 * W), weight.shape))
    return model


INPUTS = (torch.zeros(1, 3, 16, 16),)


def cost_of(model: nn.Module, *, sparse: bool = True, precision: str = "fp16") -> CostModel:
    """The null device's times, every kernel of the grid known."""
    graph = trace(model.eval(), INPUTS)
    units = tuple(find_backend("null").partition(graph, precision))
    units = with_formats(units, graph) if sparse else units
    options = width_options(graph, units, dict.fromkeys(("conv", "pointwise", "linear"), 16))
    kernels = {kernel for own in samples(units, options).values() for kernel in own}
    return cost_model_from(
        graph, units, options, {k: time_us(k) for k in kernels}, origin="modelled", precision=precision
    )


def even(cost: CostModel) -> Saliency:
    """Channels worth from 1 down to a half."""
    channels = {g.id: np.linspace(1.0, 0.5, g.num_channels) for g in cost.graph.groups}
    return Saliency(channels=channels, blocks={b.id: 80.0 for b in cost.graph.blocks}, unit="", num_samples=0)


def test_layers_that_may_be_sparse_have_a_variable() -> None:
    cost = cost_of(Chain())
    assert sorted(cost.formats) == ["format b.weight", "format c.weight"]
    assert {unit.name for unit in cost.units if unit.format} == {"b", "c"}
    assert not cost_of(Chain(), sparse=False).formats
    assert not cost_of(Chain(), precision="fp32").formats


def test_a_sparse_kernel_has_its_own_time_in_the_network() -> None:
    cost = cost_of(Chain())
    dense, sparse = cost.predict({}).us, cost.predict({"format b.weight": 2}).us
    (unit,) = [unit for unit in cost.units if unit.name == "b"]
    kernels = [unit.kernel({**cost.graph.dense_widths, **more}) for more in ({}, {"format b.weight": 2})]
    assert [kernel.sparsity for kernel in kernels] == ["dense", "2:4"]
    assert dense - sparse == pytest.approx(time_us(kernels[0]) - time_us(kernels[1]), rel=1e-3)
    assert dense > sparse
    both = cost.unit_us(unit, [{**cost.graph.dense_widths, "format b.weight": kept} for kept in (4, 2)])
    assert both == pytest.approx([time_us(kernel) for kernel in kernels], rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "widths"),
    [("fp16", {48: "2:4", 40: "dense"}), ("int8", {64: "2:4", 48: "dense", 32: "2:4"})],
)
def test_a_width_that_can_not_be_sparse_runs_dense(precision: str, widths: dict[int, str]) -> None:
    cost = cost_of(Chain(), precision=precision)
    (unit,) = [unit for unit in cost.units if unit.name == "b"]
    group = unit.c_in.groups[0]
    for width, sparsity in widths.items():
        assert unit.kernel({**cost.graph.dense_widths, group: width, unit.format: 2}).sparsity == sparsity


def test_what_two_of_four_takes_is_the_magnitude_of_its_zeros() -> None:
    cost = cost_of(Chain())
    value = cost.formats["format b.weight"]
    W = matrix_of(cost.graph.model.b.weight.detach()).abs()
    assert value.lost == pytest.approx(1 - float(W[best_mask(W)].sum() / W.sum()), rel=1e-5)
    (unit,) = [unit for unit in cost.units if unit.name == "b"]
    assert value.groups == {unit.c_out.groups[0]: 1.0}
    shared = cost_of(Residual())
    stream = [v.groups for name, v in shared.formats.items() if name in ("format one.2.weight", "format two.2.weight")]
    assert [list(groups.values()) for groups in stream] == [[0.5], [0.5]]


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.45, 0.3])
def test_the_choice_is_the_best_of_all_widths_and_formats(ratio: float) -> None:
    """Every combination of widths and formats, predicted and valued one by one."""
    cost = cost_of(Chain())
    saliency, limit = even(cost), ratio * cost.predict({}).us
    choice = choose(cost, saliency, limit)
    names = [*cost.options, *cost.formats]
    best = -np.inf
    for widths in product(*cost.options.values(), *[(2, 4)] * len(cost.formats)):
        chosen = dict(zip(names, widths, strict=True))
        worth = {g: float(np.sort(saliency.channels[g])[::-1][: chosen[g]].sum()) for g in cost.options}
        value = sum(worth.values())
        for name, own in cost.formats.items():
            value -= (chosen[name] == 2) * own.lost * sum(share * worth[g] for g, share in own.groups.items())
        if value > best and cost.predict(chosen).us <= limit:
            best = value
    assert choice.predicted_us <= limit * (1 + 1e-9)
    assert choice.solution.value >= best - 1e-3 * abs(best)
    assert choice.solution.value <= best * (1 + 1e-9) + 1e-9


def formats_at(cost: CostModel, ratio: float, rules: Rules | None = None) -> Choice:
    return choose(cost, even(cost), ratio * cost.predict({}).us, rules=rules or Rules())


def test_two_of_four_is_taken_where_it_beats_narrower_layers_and_raises_the_value() -> None:
    with_, without = cost_of(nearly_sparse()), cost_of(nearly_sparse(), sparse=False)
    sparse, narrow = formats_at(with_, 0.75), formats_at(without, 0.75)
    assert sparse.formats and not narrow.formats
    assert sparse.solution.value > narrow.solution.value
    assert not formats_at(with_, 1.0).formats and not dense_choice(with_, even(with_)).formats
    small = formats_at(with_, 0.2)
    dropped = {name.split(".")[0] for name in small.dropped}
    assert all(parameter.split(".")[0] not in dropped for parameter in small.formats)


def test_constraints_hold_for_formats_too() -> None:
    cost = cost_of(nearly_sparse())
    kept = formats_at(cost, 0.75, Rules(constraints=Constraints(keep=("one.*",))))
    assert kept.formats and all(not name.startswith("one.") for name in kept.formats)
    only = formats_at(cost, 0.75, Rules(constraints=Constraints(only="channels")))
    assert not only.formats
    uniform = formats_at(cost, 0.75, Rules(scope="uniform"))
    assert not uniform.formats


def test_a_plan_with_formats_is_applied_and_exported_to_the_device(tmp_path: Path) -> None:
    cost = cost_of(nearly_sparse())
    choice = formats_at(cost, 0.75)
    plan = plan_from(choice, cost.graph, even(cost), {})
    assert set(plan.formats.values()) == {"2:4"}
    pruned = apply(plan, cost.graph.model, INPUTS, graph=cost.graph)
    tensors = pruned.module.state_dict()
    assert all(holds(tensors[name]) for name in plan.formats)
    engine = export(pruned, load_device("null"), tmp_path / "out", precision="fp16")
    kernels = json.loads(engine.path.read_text())["kernels"]
    assert sum("2:4" in kernel["name"] for kernel in kernels) == len(plan.formats)


def test_formats_are_told_apart() -> None:
    assert parse_formats("dense,2:4") == ("dense", "2:4")
    with pytest.raises(InputError, match=r"no format '2:8'; did you mean '2:4'\? \(known: dense, 2:4\)"):
        parse_formats("dense,2:8")
    with pytest.raises(InputError, match="leave out dense"):
        parse_formats("2:4")


def test_a_device_without_sparse_tensor_cores_says_so() -> None:
    check_device(load_device("host-openvino"), ("dense",))
    check_device(load_device("host-tensorrt"), ("dense", "2:4"))
    check_device(load_device("jetson-orin-nano", allow_modelled=True), ("dense", "2:4"))
    with pytest.raises(InputError, match="'host-openvino' has no sparse tensor cores, so 2:4 would cost value"):
        check_device(load_device("host-openvino"), ("dense", "2:4"))


def test_where_no_layer_can_be_sparse_each_says_why() -> None:
    graph = trace(Chain().eval(), INPUTS)
    with pytest.raises(InputError) as caught:
        check_layers(find_backend("null").partition(graph, "fp32"), graph)
    lines = str(caught.value).splitlines()
    assert lines[0] == "no layer can be 2:4:"
    assert lines[1] == "  a.weight: alignment: 3 input channels are no multiple of 4"
    assert lines[2] == "  b.weight: precision: sparse tensor cores compute in fp16, bf16, int8, not fp32"
    check_layers(find_backend("null").partition(graph, "fp16"), graph)


def test_a_weight_that_two_layers_read_stays_dense() -> None:
    class Tied(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first: torch.Tensor = self.head(self.a(x).mean((2, 3)))
            return first + super().forward(x)

    graph = trace(Tied().eval(), INPUTS)
    units = with_formats(find_backend("null").partition(graph, "fp16"), graph)
    assert "format head.weight" not in format_values(units, graph)


MODEL = f"{__name__}:nearly_sparse"
COMMAND = ["prune", MODEL, "--shape", "1x3x16x16", "--device", "null", "--saliency", "l2", "--budget", "0.7x"]


@pytest.mark.integration
def test_prune_chooses_formats_and_writes_the_same_plan_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    plans = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.json"
        arguments = [*COMMAND, "--precision", "fp16", "--formats", "dense,2:4", "--out", str(path)]
        assert main(arguments) == 0, capsys.readouterr().err
        plans.append(path.read_bytes())
    assert plans[0] == plans[1]
    plan = Plan.from_json(tmp_path / "one.json")
    assert plan.formats
    out = capsys.readouterr().out
    assert "2:4" in out
    bundle = ["export", MODEL, "--shape", "1x3x16x16", "--device", "null", "--precision", "fp16"]
    assert main([*bundle, "--plan", str(tmp_path / "one.json"), "--out", str(tmp_path / "bundle")]) == 0


def test_prune_refuses_formats_that_the_device_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*COMMAND, "--formats", "dense,2:4", "--out", str(tmp_path / "p.json")]
    assert main([*asked, "--device", "host-onnxruntime"]) == 2
    assert "has no sparse tensor cores" in capsys.readouterr().err
    assert main(asked) == 2
    assert "precision: sparse tensor cores compute in fp16, bf16, int8, not fp32" in capsys.readouterr().err
    assert main([*asked, "--precision", "fp16", "--scope", "uniform"]) == 2
    assert "are chosen by the solver" in capsys.readouterr().err
    assert main([*asked, "--precision", "fp16", "--schedule", "iterative"]) == 2
    assert "in one step" in capsys.readouterr().err
    rewound = ["--precision", "fp16", "--rewind", str(tmp_path / "initial.pth")]
    assert main([*asked, *rewound]) == 2
    assert "--rewind cuts other weights" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_the_null_device_models_sparse_kernels() -> None:
    kernel = Kernel(operator="linear", c_in=1024, c_out=1024, spatial=(64,), precision="fp16")
    dense, sparse = time_us(kernel), time_us(Kernel(**{**vars(kernel), "sparsity": "2:4"}))
    assert sparse == pytest.approx(3.0 + (dense - 2.0) / 1.6)
