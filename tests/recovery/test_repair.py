"""Least squares recovers what can be recovered exactly; a repair never makes things worse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeprune.data import Data, as_data, synthetic
from edgeprune.errors import InputError
from edgeprune.graph import trace
from edgeprune.models import weights_hash
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.quality import evaluate
from edgeprune.recovery import Method, recover, repair
from edgeprune.recovery import reference as reference_module
from edgeprune.recovery.least_squares import _dual_steps, _fit, _input_rows, _primal_steps
from edgeprune.recovery.reference import as_rows
from edgeprune.saliency import score
from edgeprune.surgery import apply, positions_of

pytestmark = pytest.mark.unit


def numbers(count: int = 96, size: int = 6) -> Data:
    return as_data([torch.randn(count, size, generator=torch.Generator().manual_seed(1))])


def cut(model: nn.Module, x: torch.Tensor, group_id: str, kept: tuple[int, ...]) -> Pruned:
    graph = trace(model, (x,))
    return apply(Plan(structure_hash=graph.structure_hash, kept={group_id: kept}), model, (x,), graph=graph)


@pytest.mark.parametrize("bias", [True, False])
def test_a_channel_that_the_others_span_is_replaced_exactly(bias: bool) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(4, 3, bias=bias)
    with torch.no_grad():
        first.weight[3] = first.weight[0] - 2 * first.weight[1]
        first.bias[3] = first.bias[0] - 2 * first.bias[1] + (5.0 if bias else 0.0)  # an offset only a bias can take
    model = nn.Sequential(first, second).eval()
    pruned = cut(model, torch.randn(1, 6), "0.bias:0", (0, 1, 2))
    data = numbers()
    before = evaluate(pruned.module, data, dense=model).relative_error
    repaired, report = repair(pruned, data, dense=model, method="least_squares")
    after = evaluate(repaired.module, data, dense=model).relative_error
    assert before is not None and after is not None and before > 0.1 and after < 1e-3
    assert report.chosen == "least_squares" and report.differences["none"] > report.differences["least_squares"]
    solved = repaired.module.get_submodule("1").weight
    with torch.no_grad():
        expected = second.weight[:, :3] + second.weight[:, 3:] * torch.tensor([1.0, -2.0, 0.0])
    torch.testing.assert_close(solved, nn.Parameter(expected), rtol=1e-2, atol=1e-2)


class Net(nn.Module):
    """Every kind of layer that the repair meets: strided, padded, depthwise, a shortcut, bias and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(12, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(inplace=True),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(inplace=True),
            nn.Conv2d(16, 12, 3, padding="same", bias=False),
            nn.BatchNorm2d(12),
        )
        self.last = nn.Conv2d(12, 20, 3)
        self.head = nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.last(x + self.branch(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        model.train()
        for _ in range(20):
            model(torch.randn(16, 3, 16, 16))
        model.head.weight.mul_(8)
    return model.eval()


def pruned_net(model: Net, share: float = 0.4) -> Pruned:
    graph = trace(model, (X,))
    values = score("l2", graph, model).channels
    kept = {}
    for group in graph.groups:
        best = torch.from_numpy(values[group.id]).argsort(descending=True)[: round(group.num_channels * (1 - share))]
        kept[group.id] = positions_of(graph, group.id, best.sort().values.numpy())
    return apply(Plan(structure_hash=graph.structure_hash, kept=kept), model, (X,), graph=graph)


@pytest.mark.parametrize("method", ["least_squares", "auto"])
def test_a_pruned_network_comes_nearer_to_the_dense_one_on_unseen_samples(method: Method) -> None:
    model = net()
    pruned = pruned_net(model)
    before, origin = weights_hash(pruned.module), weights_hash(model)
    model.branch.train()
    data, unseen = synthetic((1, 3, 16, 16), count=120), synthetic((1, 3, 16, 16), seed=9, count=100)
    repaired, report = repair(pruned, data, dense=model, method=method)
    assert model.branch.training and not model.stem.training
    model.eval()
    assert weights_hash(pruned.module) == before and weights_hash(model) == origin == repaired.origin
    was, now = (evaluate(p.module, unseen, dense=model).kl or 0 for p in (pruned, repaired))
    assert report.chosen != "none" and now < was * 0.7
    assert (report.num_fit, report.num_held_out) == (90, 30)
    assert repaired.plan == pruned.plan
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*repaired.module.modules(), *model.modules()))
    assert {layer.layer for layer in report.layers} == {"stem.0", "branch.0", "branch.6", "last", "head"}
    assert all(layer.after <= layer.before for layer in report.layers)
    again = repair(pruned, data, dense=model, method=method)[0]
    assert weights_hash(again.module) == weights_hash(repaired.module)


def test_batch_norms_take_up_the_mean_of_what_was_pruned() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(6)
    with torch.no_grad():
        first.bias.add_(3.0)  # type: ignore[union-attr]
        second.running_mean.add_(1.0)  # type: ignore[union-attr]
    layers = [first, nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 10)).eval()
    graph = trace(model, (X,))
    plan = Plan(structure_hash=graph.structure_hash, kept={"0.bias:0": (0, 1, 2, 3, 4)})
    pruned = apply(plan, model, (X,), graph=graph)
    data, unseen = synthetic((1, 3, 16, 16), count=120), synthetic((1, 3, 16, 16), seed=9, count=100)
    repaired, report = repair(pruned, data, dense=model, method="batch_norm")
    was, now = (evaluate(p.module, unseen, dense=model).kl or 0 for p in (pruned, repaired))
    assert report.chosen == "batch_norm" and now < was * 0.1


def test_a_repair_never_makes_it_worse() -> None:
    model = net()
    graph = trace(model, (X,))
    whole = apply(Plan(structure_hash=graph.structure_hash), model, (X,), graph=graph)
    for data in (synthetic((1, 3, 16, 16), count=1), synthetic((1, 3, 16, 16), count=2), synthetic((1, 3, 16, 16))):
        repaired, report = repair(whole, data, dense=model, graph=graph)
        assert report.differences[report.chosen] == min(report.differences.values())
        assert (evaluate(repaired.module, data, dense=model).kl or 0) < 1e-6


def test_without_the_dense_model_batch_norms_are_recalibrated() -> None:
    pruned = pruned_net(net())
    repaired, report = repair(pruned, synthetic((1, 3, 16, 16), count=64))
    assert report.chosen == "batch_norm" and not report.differences
    assert weights_hash(repaired.module) != weights_hash(pruned.module)
    with pytest.raises(InputError, match="needs the dense model"):
        recover(pruned, synthetic((1, 3, 16, 16)), method="least_squares")
    assert recover(pruned, synthetic((1, 3, 16, 16)), method="none") is pruned
    with pytest.raises(ValueError, match="'magic' is none of"):
        recover(pruned, synthetic((1, 3, 16, 16)), method="magic")  # type: ignore[arg-type]


def test_dropped_blocks_are_repaired_around() -> None:
    model = net()
    graph = trace(model, (X,))
    plan = Plan(structure_hash=graph.structure_hash, dropped=(graph.blocks[0].id,))
    pruned = apply(plan, model, (X,), graph=graph)
    unseen = synthetic((1, 3, 16, 16), seed=9, count=100)
    repaired, report = repair(pruned, synthetic((1, 3, 16, 16), count=120), dense=model, graph=graph)
    was, now = (evaluate(p.module, unseen, dense=model).kl or 0 for p in (pruned, repaired))
    assert now < was * 0.7 and {layer.layer for layer in report.layers} == {"stem.0", "last", "head"}


def test_memory_bounds_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    data = synthetic((1, 3, 16, 16), count=64)
    everything, num_fit = reference_module.take_samples(data, model, seed=0)
    assert (len(everything), num_fit) == (64, 48)
    monkeypatch.setattr(reference_module, "ACTIVATION_BYTES", 3 * 4 * 16 * 64 * 16)
    few, num_fit = reference_module.take_samples(data, model, seed=0)
    assert len(few) <= 16 < len(everything) and num_fit == 12


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(3, 4, (1, 3), padding="same"),
        nn.Conv2d(3, 4, (2, 4), padding="same"),
        nn.Conv2d(3, 4, 3, padding="valid", dilation=2),
        nn.Conv2d(3, 4, 1, 2),
        nn.Linear(9, 4),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_input_rows_times_the_weight_are_the_output(layer: nn.Conv2d | nn.Linear) -> None:
    x = torch.randn(2, 3, 7, 9)
    with torch.no_grad():
        output = as_rows(layer, layer(x), 2)
        positions = torch.stack([torch.randperm(output.shape[1])[:5] for _ in range(2)])
        rows = _input_rows(layer, x, positions, layer.weight[0].numel())
        expected = output[torch.arange(2)[:, None], positions]
        assert layer.bias is not None
        torch.testing.assert_close(rows @ layer.weight.flatten(1).T + layer.bias, expected, rtol=1e-4, atol=1e-5)


def test_the_ridge_pulls_towards_the_weights_there_are() -> None:
    """With fewer rows than unknowns the directions that no row has seen keep their weights."""
    torch.manual_seed(0)
    x, t, weight = torch.randn(2, 1, 8), torch.randn(2, 1, 3), torch.randn(3, 8)
    fit = _fit(x, t, weight, 2, with_offset=False)
    assert fit.ridge is not None and fit.after < fit.before
    seen = torch.linalg.svd(x[:, 0].double(), full_matrices=True).Vh
    unseen = (fit.weight - weight) @ seen[2:].T
    assert float(unseen.abs().max()) < 1e-6


def test_both_ways_of_solving_agree() -> None:
    torch.manual_seed(0)
    x, t, w = torch.randn(30, 12), torch.randn(30, 4), torch.randn(4, 12).double()
    means = x.mean(0).double(), torch.randn(4).double()
    primal, dual = list(_primal_steps(x, t, w, *means)), list(_dual_steps(x, t, w, *means))
    assert [ridge for ridge, _ in primal] == [ridge for ridge, _ in dual]
    for (_, a), (_, b) in zip(primal, dual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
