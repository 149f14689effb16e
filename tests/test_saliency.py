"""Criteria against hand-computed cases and against explicit gates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.data import Data, as_data, synthetic
from edgeprune.errors import InputError
from edgeprune.graph import ModelGraph, trace
from edgeprune.models import weights_hash
from edgeprune.plan_json import Plan
from edgeprune.quality import divergence
from edgeprune.saliency import CRITERIA, gates, score
from edgeprune.surgery import apply

pytestmark = pytest.mark.unit


class Residual(nn.Module):
    """Convolutions beside a shortcut, a stream that two contractions read, a classifier at the end."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.outer = nn.Conv2d(4, 6, 1)
        self.last = nn.Conv2d(6, 7, 3)
        self.head = nn.Linear(7, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu_(self.depthwise(torch.relu_(self.inner(x)))))
        x = torch.relu(self.last(x)).mean((2, 3))
        logits: torch.Tensor = self.head(x)
        return logits


def residual() -> tuple[Residual, ModelGraph]:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model, trace(model, (torch.randn(1, 3, 8, 8),))


def few(count: int = 4, labels: list[int] | None = None) -> Data:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return as_data([(x, torch.tensor(labels))] if labels else [x])


def two_layers(scale: float = 1.0) -> tuple[nn.Sequential, ModelGraph]:
    first, second = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]))
        second.weight.copy_(torch.tensor([[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]]) * scale)
    model = nn.Sequential(first, second).eval()
    return model, trace(model, (torch.ones(1, 2),))


def test_l2_by_hand() -> None:
    model, graph = two_layers()
    values = score("l2", graph, model).channels["0.weight:0"]
    producer, consumer = np.array([2.0, 4.0, 4.0]) / 10, np.array([10.0, 0.0, 2.0]) / 12
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, producer + consumer, rtol=1e-12)  # their mean share, of two layers


def test_random_is_seeded_and_of_one_scale() -> None:
    model, graph = residual()
    first, same, other = (score("random", graph, model, seed=s) for s in (1, 1, 2))
    for group in graph.groups:
        values = first.channels[group.id]
        assert values.shape == (group.num_channels,) and (values >= 0).all()
        assert (values <= 1 / group.num_channels).all()
        assert (values == same.channels[group.id]).all() and (values != other.channels[group.id]).any()
    (block,) = graph.blocks
    assert first.blocks == {block.id: pytest.approx(first.channels[block.inside[0]].sum())}


class Layer(nn.Module):
    """x + g(x), where g holds a branch of one linear without a group and a branch of two with a group."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.wide, self.narrow = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.end = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(x, 1)
        y = y + self.alone(y)
        y = y + self.narrow(torch.relu(self.wide(y)))
        result: torch.Tensor = x + self.end(torch.softmax(y, 1))
        return result


def layer() -> tuple[nn.Module, ModelGraph]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Layer(), nn.Linear(4, 2)).eval()
    return model, trace(model, (torch.ones(1, 3),))


def test_a_block_is_worth_its_channels_its_blocks_and_the_layers_that_no_group_reaches() -> None:
    model, graph = layer()
    assert [(block.zero_modules, len(block.inside), block.within) for block in graph.blocks] == [
        (("1.alone",), 0, "1:2"),
        (("1.narrow",), 1, "1:2"),
        (("1.end",), 1, None),
    ]
    values = score("l2", graph, model, normalise="none").blocks
    assert values == pytest.approx({"1:0": 1.0, "1:1": 1.0, "1:2": 1.0 + 1.0 + 1.0}), "`1.end` is the third layer"


@pytest.mark.parametrize("name", ["l2", "random"])
def test_no_block_is_worth_less_than_what_is_inside_of_it(name: str) -> None:
    for model, graph in (layer(), residual()):
        found = score(name, graph, model)
        for block in graph.blocks:
            assert found.blocks[block.id] > 0
            assert found.blocks[block.id] >= sum(found.channels[group].sum() for group in block.inside) - 1e-12
            assert found.blocks[block.id] >= sum(found.blocks[b.id] for b in graph.blocks if b.within == block.id)


def test_an_outer_block_costs_what_dropping_all_of_it_changes() -> None:
    model, graph = layer()
    data = as_data([torch.randn(4, 3, generator=torch.Generator().manual_seed(3))])
    values = score("taylor", graph, model, data).blocks
    x, _ = next(data.hold_out()[1].batches(3))
    for block in graph.blocks:
        plan = Plan(structure_hash=graph.structure_hash, dropped=(block.id,))
        with torch.no_grad():
            pruned = apply(plan, model, (torch.ones(1, 3),), graph=graph).module
            assert values[block.id] == pytest.approx(float(divergence(model(x), pruned(x)).mean()), rel=1e-4)


def test_taylor_with_labels_by_hand() -> None:
    model, graph = two_layers(0.2)
    data = as_data([(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))])
    hidden = np.array([3.0, 4.0, 2.0])
    weight = np.array([[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]]) * 0.2
    logits = weight @ hidden
    p = np.exp(logits) / np.exp(logits).sum()
    gate = hidden * (weight.T @ (p - [1, 0]))
    result = score("taylor", graph, model, data)
    np.testing.assert_allclose(result.channels["0.weight:0"], gate**2 / 2, rtol=1e-4, atol=1e-12)
    assert (result.unit, result.num_samples, result.is_synthetic) == ("nats", 1, False)


def test_taylor_without_labels_is_half_the_fisher_information() -> None:
    """Over many draws of r the values come near gᵀ(diag p - p pᵀ)g / 2."""
    model, graph = two_layers(0.2)
    x = torch.tensor([[1.0, 2.0]])
    hidden, weight = np.array([3.0, 4.0, 2.0]), np.array([[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]]) * 0.2
    p = np.exp(weight @ hidden) / np.exp(weight @ hidden).sum()
    jacobian = weight * hidden
    expected = np.diag(jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian) / 2
    values = score("taylor", graph, model, as_data([x.expand(1, 2)] * 256)).channels["0.weight:0"]
    np.testing.assert_allclose(values, expected, rtol=0.3, atol=1e-12)


def gates_by_hand(model: nn.Module, graph: ModelGraph, x: torch.Tensor, u: torch.Tensor) -> dict[str, torch.Tensor]:
    """d(output · u) / d gate of one sample, with a factor on each group's channels at the consumers' inputs."""
    gates = {g.id: torch.ones(g.num_channels, requires_grad=True) for g in graph.groups}

    def hook(gate: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], torch.Tensor]:
        return lambda module, inputs: inputs[0] * (gate if isinstance(module, nn.Linear) else gate[:, None, None])

    handles = [
        model.get_submodule(member.parameter.removesuffix(".weight")).register_forward_pre_hook(hook(gates[group.id]))
        for group in graph.groups
        for member in group.members
        if member.role == "consumer"
    ]
    found = torch.autograd.grad((model(x) * u).sum(), list(gates.values()))
    for handle in handles:
        handle.remove()
    return dict(zip(gates, found, strict=True))


@pytest.mark.parametrize("by_weight", [False, True])
def test_gates_are_those_of_explicit_factors(by_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = residual()
    labels = [0, 1, 4, 2]
    data = few(labels=labels)
    expected = {g.id: np.zeros(g.num_channels) for g in graph.groups}
    for x, y in data.hold_out()[1].batches(1):
        assert y is not None
        u = model(x).softmax(1).detach() - nn.functional.one_hot(y, 5)
        for name, gate in gates_by_hand(model, graph, x, u).items():
            expected[name] += gate.double().numpy() ** 2 / (2 * 3)
    if by_weight:
        monkeypatch.setattr(gates, "input_dim", lambda module: None)
    values = score("taylor", graph, model, data).channels
    assert len(values) == 3
    for name, wanted in expected.items():
        np.testing.assert_allclose(values[name], wanted, rtol=1e-3, atol=1e-9)


def test_batches_that_are_folded_into_another_dimension_are_read_one_by_one() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = x.shape[0]
            rows = x.flatten(2).transpose(1, 2).reshape(n * 4, 16, 3)
            rows = self.second(torch.relu(self.first(rows)))
            logits: torch.Tensor = self.head(rows.reshape(n, 64, 4).mean(1))
            return logits

    torch.manual_seed(0)
    model = Windows().eval()
    graph = trace(model, (torch.randn(1, 3, 8, 8),))
    data = few(labels=[0, 1, 4, 2])
    reader = gates.GateReader(graph, model)
    assert not reader.tells_samples_apart(next(data.batches(2))[0])
    values = score("taylor", graph, model, data).channels
    for group in graph.groups:
        expected = np.zeros(group.num_channels)
        for x, y in data.hold_out()[1].batches(1):
            assert y is not None
            u = model(x).softmax(1).detach() - nn.functional.one_hot(y, 5)
            module = model.get_submodule(group.members[-1].parameter.rpartition(".")[0])
            assert isinstance(module, nn.Linear)
            expected += gates_by_hand(model, graph, x, u)[group.id].double().numpy() ** 2 / (2 * 3)
        np.testing.assert_allclose(values[group.id], expected, rtol=1e-3, atol=1e-9)


def test_a_block_costs_what_its_drop_changes() -> None:
    model, graph = residual()
    data = few()
    assert len(graph.blocks) == 1
    plan = Plan(structure_hash=graph.structure_hash, dropped=(graph.blocks[0].id,))
    pruned = apply(plan, model, (torch.randn(1, 3, 8, 8),), graph=graph)
    x, _ = next(data.hold_out()[1].batches(3))
    with torch.no_grad():
        expected = float(divergence(model(x), pruned.module(x)).mean())
    assert expected > 1e-3
    assert score("taylor", graph, model, data).blocks[graph.blocks[0].id] == pytest.approx(expected, rel=1e-4)


def test_outputs_that_are_no_classes_count_by_their_squares() -> None:
    first, second = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False)
    model = nn.Sequential(first, second).eval()
    graph = trace(model, (torch.randn(1, 3, 8, 8),))
    data = few(256)
    values = score("taylor", graph, model, data).channels["0.weight:0"]
    x, _ = next(data.hold_out()[1].batches(256))
    with torch.no_grad():
        hidden = first(x)
        closed = [(second.weight[:, c] * hidden[:, c : c + 1]).square().mean() / 2 for c in range(4)]
    np.testing.assert_allclose(values, np.array(closed), rtol=0.5)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_criteria_are_seeded_and_leave_the_model_as_it_is(name: str) -> None:
    model, graph = residual()
    model.train()
    model.stem.weight.requires_grad_(False)
    before = weights_hash(model)
    data = few(labels=[0, 1, 4, 2]) if CRITERIA[name].data == "labels" else few()
    first, again = score(name, graph, model, data, seed=4), score(name, graph, model, data, seed=4)
    assert weights_hash(model) == before
    assert model.norm.training and not model.stem.weight.requires_grad and model.head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert first.criterion == name
    for group in graph.groups:
        assert (first.channels[group.id] >= 0).all()
        assert (first.channels[group.id] == again.channels[group.id]).all()


def test_without_data_the_samples_are_random_and_said_so() -> None:
    model, graph = residual()
    assert score("taylor", graph, model).is_synthetic
    assert not score("l2", graph, model).is_synthetic
    assert not score("taylor", graph, model, few()).is_synthetic
    assert score("taylor", graph, model, synthetic((1, 3, 8, 8), count=2)).is_synthetic


def test_faults_are_told() -> None:
    model, graph = residual()
    with pytest.raises(InputError, match="did you mean 'taylor'"):
        score("tailor", graph, model)
    with pytest.raises(InputError, match="label 9, the model only 5 classes"):
        score("taylor", graph, model, few(labels=[9, 9, 9, 9]))
