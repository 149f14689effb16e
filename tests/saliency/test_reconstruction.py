"""Errors of the next layer's output: by hand, and against least squares solved directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.data import as_data
from edgeprune.graph import trace
from edgeprune.saliency import reconstruction, score
from edgeprune.saliency.reconstruction import _greedy, ascending
from tests.saliency.networks import HIDDEN, sequence, tokens

pytestmark = pytest.mark.unit


def test_thinet_by_hand() -> None:
    """Hidden (3, 4, 2), (0, 2, -2), columns (3, 1), (0, 0), (1, 1): E⟨y_a, y_b⟩ = [[45, 0, 12], [0, 0, 0], [12, 0, 8]].

    Of 77 in all, removing channel 1 adds nothing, then channel 2 adds 8, then channel 0 45 + 2 · 12.
    """
    model, graph, data = tokens()
    values = score("thinet", graph, model, data).channels[HIDDEN]
    np.testing.assert_allclose(values, np.array([69, 0, 8]) / 77, rtol=1e-6, atol=1e-9)


def test_greedy_sees_channels_that_cancel() -> None:
    """Alone each of the first two adds 1; together nothing: the second one's step is -1, worth the step before."""
    gram = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    np.testing.assert_allclose(_greedy(gram), [1.0, 1.0, 4.0], rtol=1e-8)


def test_ascending_keeps_the_order() -> None:
    raised = ascending(np.array([-1.0, 2.0, 1.0, 3.0]))
    np.testing.assert_allclose(raised, [0.0, 2.0, 2.0, 3.0], rtol=1e-8)
    assert raised[1] < raised[2]


def test_reconstruction_of_independent_channels_by_hand() -> None:
    """Hidden (2, 0, 0), (0, 4, 0), (0, 0, 6): nothing stands in for another, so each costs what it adds.

    E|y|² is 4 · 10 / 3, 16 · 0 / 3 and 36 · 2 / 3, of 112 / 3 in all; damping takes off a part per mille, about.
    """
    weights = [[2.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 6.0]], [[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    model, _ = sequence([[0.0, 0.0, 0.0]], *weights)
    x = torch.eye(3)[None]
    graph = trace(model, (x,))
    values = score("reconstruction", graph, model, as_data([x])).channels[HIDDEN]
    np.testing.assert_allclose(values, np.array([40, 0, 72]) / 112, rtol=1e-2)


def test_reconstruction_is_the_error_of_the_best_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's least squares over the 3 x 3 patches, output channel by output channel."""
    monkeypatch.setattr(reconstruction, "DAMPING", 1e-9)
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
    model = nn.Sequential(first, second).eval()
    x = torch.randn(16, 4, 8, 8)
    with torch.no_grad():  # channel 3 is nearly the sum of 2 and itself, so that it can be stood in for
        first.weight[3] = first.weight[2] + 0.1 * first.weight[3]
    graph = trace(model, (x[:1],))
    data = as_data([x])
    (group,) = graph.groups
    with torch.no_grad():
        hidden = first(torch.cat([x for x, _ in data.hold_out()[1].batches(16)]))
    patches = nn.functional.unfold(hidden, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).double().numpy()
    output = patches @ second.weight.detach().flatten(1).double().numpy().T
    expected = []
    for channel in range(4):
        others = np.delete(patches, range(9 * channel, 9 * channel + 9), axis=1)
        left = output - others @ np.linalg.lstsq(others, output, rcond=None)[0]
        expected.append((left**2).sum() / (output**2).sum())
    values = score("reconstruction", graph, model, data).channels[group.id]
    np.testing.assert_allclose(values, expected, rtol=1e-2)


def test_grouped_weights_have_zeros_for_the_other_groups() -> None:
    weight = torch.arange(1.0, 9.0).reshape(4, 2, 1)
    dense = reconstruction.dense_weight(weight, 2)
    assert dense.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]]


@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
def test_rows_of_a_convolution_times_its_weights_are_its_output(padding: int | str) -> None:
    torch.manual_seed(0)
    stride = 1 if padding == "same" else 2
    layers = [
        ("conv1d", nn.Conv1d(2, 3, 3, stride=stride, padding=padding, bias=False), torch.randn(2, 2, 9)),
        ("conv2d", nn.Conv2d(2, 3, (3, 1), stride=stride, padding=padding, bias=False), torch.randn(2, 2, 9, 7)),
    ]
    for operator, layer, x in layers:
        arguments = {n: getattr(layer, n) for n in ("weight", "stride", "padding", "dilation", "groups")}
        rows = reconstruction.input_rows(operator, {"input": x, **arguments}, 10**6, torch.Generator())
        found = rows @ reconstruction.dense_weight(layer.weight, 1).float().T
        expected = layer(x).flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(found, expected)
