"""Criteria on derivatives against hand-computed values; `even` and `scalar` say what the derivatives are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.data import as_data
from edgeprune.errors import InputError
from edgeprune.graph import trace
from edgeprune.saliency import curvature, score
from edgeprune.saliency.members import gated, total_slices
from tests.saliency.networks import (
    FIRST,
    HIDDEN,
    SECOND,
    attention,
    even,
    pictures,
    residual,
    samples,
    scalar,
    sequence,
    tokens,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("taylor", [4.5, 2.0, 0.5]),
        ("taylor_activation", [3.0, 2.0, 1.0]),
        ("taylor_weight", [6.0, 4.0, 2.0]),  # the gate's derivative from the producer, and again from the consumer
        ("taylor_squared", [36.0, 16.0, 4.0]),
        # |g w| of the consumer 3, 2, 1 + 2, of the producer 1 + 2, 2, 1
        ("snip", [6 / 14, 4 / 14, 4 / 14]),
        # (g w)² of the consumer 9, 4, 1 + 4, of the producer 1 + 4, 4, 1
        ("fisher", [14 / 2, 8 / 2, 6 / 2]),
    ],
)
def test_first_order_by_hand(name: str, expected: list[float]) -> None:
    model, graph, data = even()
    found = score(name, graph, model, data, normalise="none")
    np.testing.assert_allclose(found.channels[HIDDEN], expected, rtol=1e-5)
    assert found.num_samples == 1


def test_activations_compare_by_their_norm() -> None:
    model, graph, data = even()
    found = score("taylor_activation", graph, model, data)
    assert found.normalise == "euclid"
    np.testing.assert_allclose(found.channels[HIDDEN], np.array([3.0, 2.0, 1.0]) / np.sqrt(14), rtol=1e-5)


def test_gradients_are_averaged_over_the_samples_before_they_are_squared() -> None:
    """The same sample in both classes: d = (∓1/2, ±1/2), whose mean is 0; the Fisher information stays."""
    model, graph, _ = even()
    x = torch.tensor([[1.0, 2.0]] * 4)
    data = as_data([(x, torch.tensor([0, 1, 0, 1]))])
    labels = data.hold_out()[1].labels
    assert labels is not None and len(labels) == 3
    mean = abs(sum(1 if label else -1 for label in labels)) / 3
    found = score("taylor_weight", graph, model, data).channels[HIDDEN]
    np.testing.assert_allclose(found, np.array([6.0, 4.0, 2.0]) * mean, rtol=1e-5)
    np.testing.assert_allclose(score("fisher", graph, model, data).channels[HIDDEN], [7, 4, 3], rtol=1e-5)


def test_grasp_by_hand() -> None:
    """H g = L'' L' |∇s|² ∇s + L'² ∇²s ∇s with |∇s|² = Σ v² + 2 u² = 15; w · ∇s over a channel is 2 u v = ±4.

    Channel 0: -1/8 · 15 · 4 + 1/4 · (2 · 1 + 4) = -6, so that its removal lets the gradient flow: worth 0. Channel 1:
    1/8 · 15 · 4 + 1/4 · (2 · 4 + 1) = 9.75.
    """
    model, graph, data = scalar()
    np.testing.assert_allclose(score("grasp", graph, model, data).channels[HIDDEN], [0.0, 9.75], rtol=1e-5)


def test_grasp_is_the_slope_of_the_gradient_flow() -> None:
    """|g|² / 2, where a channel's slices are multiplied by 1 + ε, grows by ε Σ w · (H g)."""
    model, graph, data = scalar()

    def flow(factor: float) -> float:
        weights = [p.detach().double() for p in model.parameters()]
        column = torch.tensor([[1.0], [factor]], dtype=torch.float64)
        scaled = [(weights[0] * column).requires_grad_(), (weights[1] * column.T).requires_grad_()]
        logits = torch.ones(1, 1, dtype=torch.float64) @ scaled[0].T @ scaled[1].T
        loss = nn.functional.cross_entropy(logits, torch.tensor([0]))
        return float(sum(g.square().sum() for g in torch.autograd.grad(loss, scaled))) / 2

    slope = (flow(1 + 1e-5) - flow(1 - 1e-5)) / 2e-5
    assert score("grasp", graph, model, data).channels[HIDDEN][1] == pytest.approx(slope, rel=1e-4)


def test_hessian_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """tr(H_S) = L'' (v² + 2 u²) = 1.5 and 2.25 of p = 3 weights each, |w_S|² = 3 and 5: 1.5 / 6 · 3, 2.25 / 6 · 5."""
    monkeypatch.setattr(curvature, "PROBES", 4096)
    model, graph, data = scalar()
    np.testing.assert_allclose(score("hessian", graph, model, data).channels[HIDDEN], [0.75, 1.875], rtol=0.1)


def test_the_hessian_without_labels_is_that_of_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the dense model's own answers p = (1/2, 1/2) the loss has the same L'' and no gradient."""
    monkeypatch.setattr(curvature, "PROBES", 4096)
    model, graph, _ = scalar()
    data = as_data([torch.ones(1, 1)])
    np.testing.assert_allclose(score("hessian", graph, model, data).channels[HIDDEN], [0.75, 1.875], rtol=0.1)


def test_the_hessian_of_other_outputs_is_that_of_half_the_mean_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens: Jacobians by the first layer's rows Σ_o W2_oc² |x|², by W2's columns 2 h_c², over 4 output elements."""
    monkeypatch.setattr(curvature, "PROBES", 4096)
    model, graph, data = tokens()
    values = score("hessian", graph, model, data).channels[HIDDEN]
    hidden, columns = np.array([9.0, 20.0, 8.0]), np.array([10.0, 0.0, 2.0])  # Σ over tokens of h_c²; |column|²
    trace_of_h = (2 * hidden + columns * (1 + 4 + 1 + 1)) / 4
    energy = np.array([2.0, 4.0, 4.0]) + columns
    np.testing.assert_allclose(values, trace_of_h / (2 * 4) * energy, rtol=0.15)


@pytest.mark.parametrize("name", ["hessian", "grasp"])
def test_operators_without_a_second_derivative_are_told(name: str) -> None:
    """torch has none for a hard sigmoid."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Hardsigmoid(), nn.Linear(3, 2)).eval()
    graph = trace(model, (torch.ones(1, 2),))
    with pytest.raises(InputError, match="second derivatives: derivative for aten::hardsigmoid_backward is not impl"):
        score(name, graph, model, as_data([(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))]))
    assert not any(p.grad is not None for p in model.parameters())


def test_synflow_by_hand() -> None:
    """Ones through rows of magnitudes (1, 1), (0, 2), (2, 0) give 2, 2, 2; columns of 4, 0, 2 hand on 8, 0, 4 of 12."""
    model, graph = sequence([[0.0, 0.0]], [[-1.0, 1.0], [0.0, 2.0], [2.0, 0.0]], SECOND)
    np.testing.assert_allclose(score("synflow", graph, model).channels[HIDDEN], [8 / 12, 0.0, 4 / 12], rtol=1e-6)


def test_all_flow_goes_through_every_layer() -> None:
    """A chain without biases, behind batch norms whose means don't count."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1, bias=False), nn.Flatten(),
        nn.Linear(12, 4, bias=False), nn.Linear(4, 2, bias=False),
    ).eval()  # fmt: skip
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    norm.running_mean.fill_(7.0)
    graph = trace(model, (torch.ones(1, 2, 4, 4),))
    shares = [values.sum() for values in score("synflow", graph, model).channels.values()]
    assert len(shares) == 3
    np.testing.assert_allclose(shares, 1.0, rtol=1e-6)


def test_synflow_is_told_where_no_flow_comes_through() -> None:
    model, graph = sequence([[0.0, 0.0]], FIRST, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    with pytest.raises(InputError, match="the flow through this model is 0"):
        score("synflow", graph, model)


def test_gates_of_layers_that_are_read_at_their_inputs_and_at_their_weights() -> None:
    """Queries and keys: consumers of the stream, and producers of a width that only a matmul reads."""
    model, graph, data = attention()
    parameters = dict(model.named_parameters())
    expected = {group.id: torch.zeros(group.num_channels, dtype=torch.float64) for group in graph.groups}
    rest = data.hold_out()[1]
    for x, y in rest.batches(1):
        assert y is not None
        loss = nn.functional.cross_entropy(model(x), y)
        found = torch.autograd.grad(loss, [*parameters.values()])
        products = {name: p.detach() * g for (name, p), g in zip(parameters.items(), found, strict=True)}
        for group in graph.groups:
            expected[group.id] += total_slices(products, gated(group), group).square() / (2 * len(rest))
    values = score("taylor", graph, model, data).channels
    for name, wanted in expected.items():
        np.testing.assert_allclose(values[name], wanted.numpy(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["taylor_weight", "taylor_activation", "snip", "grasp"])
def test_labels_need_logits(name: str) -> None:
    model, graph, _ = tokens()
    data = as_data([(torch.ones(2, 2, 2), torch.tensor([0, 1]))])
    with pytest.raises(InputError, match=f"'{name}' needs logits, N x classes; this model gives 1 x 2 x 2"):
        score(name, graph, model, data)


def test_a_coupled_stream_sums_over_all_its_members() -> None:
    """w · g over every parameter of the stream, from autograd on the whole model."""
    model, graph = residual()
    data = pictures()
    rest = data.hold_out()[1]
    parameters = dict(model.named_parameters())
    x = torch.cat([x for x, _ in rest.batches(1)])
    y = torch.cat([y for _, y in rest.batches(1) if y is not None])
    loss = nn.functional.cross_entropy(model(x), y)
    products = {
        name: (p * g).detach()
        for (name, p), g in zip(parameters.items(), torch.autograd.grad(loss, [*parameters.values()]), strict=True)
    }
    stream = [
        products["stem.weight"].sum((1, 2, 3)),
        products["norm.weight"],
        products["norm.bias"],
        products["inner.weight"].sum((0, 2, 3)),
        products["outer.weight"].sum((1, 2, 3)),
        products["outer.bias"],
        products["last.weight"].sum((0, 2, 3)),
    ]
    (group,) = (g for g in graph.groups if g.num_channels == 6)
    found = score("taylor_weight", graph, model, data).channels[group.id]
    np.testing.assert_allclose(found, torch.stack(stream).sum(0).abs().numpy(), rtol=1e-3, atol=1e-6)


def test_taylor_output_by_hand() -> None:
    """Without a channel the logits (8, 8) lose (6, 0), (0, 4), (2, 4): less their mean (3, -3), (-2, 2), (-1, 1).

    Half the mean squares are 9/2, 2 and 1/2. With two classes one projection tells the ratios; the size takes many.
    """
    model, graph, data = even()
    values = score("taylor_output", graph, model, data).channels[HIDDEN]
    np.testing.assert_allclose(values / values[2], [9.0, 4.0, 1.0], rtol=1e-4)
    many = as_data([torch.tensor([[1.0, 2.0]]).repeat(340, 1)])
    np.testing.assert_allclose(score("taylor_output", graph, model, many).channels[HIDDEN], [4.5, 2.0, 0.5], rtol=0.3)


def test_taylor_output_of_a_sure_answer() -> None:
    """Logits (16, 0) without doubt: KL sees next to nothing, the logits lose as much as elsewhere."""
    model, graph = sequence([[0.0, 0.0]], FIRST, [[4.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    data = samples([1.0, 2.0])
    sure, moved = (score(name, graph, model, data).channels[HIDDEN] for name in ("taylor", "taylor_output"))
    assert sure.max() < 1e-4 and moved.max() > 0.01
    assert list(moved > 0) == [True, False, True]
