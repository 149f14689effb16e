"""Criteria on weights and batch norms against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import InputError
from edgeprune.graph import trace
from edgeprune.saliency import score
from tests.saliency.networks import FIRST, HIDDEN, SECOND, residual, sequence

pytestmark = pytest.mark.unit


def test_l1_by_hand() -> None:
    """Rows of the first layer: 2, 2, 2 of 6; columns of the second: 4, 0, 2 of 6."""
    model, graph = sequence([[0.0, 0.0]], FIRST, SECOND)
    values = score("l1", graph, model, normalise="none").channels[HIDDEN]
    np.testing.assert_allclose(values, [(1 / 3 + 4 / 6) / 2, (1 / 3 + 0) / 2, (1 / 3 + 2 / 6) / 2], rtol=1e-12)


def test_fpgm_by_hand() -> None:
    """Filters (1, 1), (0, 2), (2, 0): distances √2, √2 and √8; the first lies between the others."""
    model, graph = sequence([[0.0, 0.0]], FIRST, SECOND)
    values = score("fpgm", graph, model, normalise="none").channels[HIDDEN]
    np.testing.assert_allclose(values, [2 / 8, 3 / 8, 3 / 8], rtol=1e-6)


def test_fpgm_takes_a_head_for_one_filter() -> None:
    """Indices 0, 1 are channel 0 and 2, 3 channel 1, index 4 of none: filters (1, 2), (3, 4)."""
    from edgeprune.saliency.members import index_table

    table = index_table(np.array([0, 0, 1, 1, -1]), 3)
    assert table.tolist() == [[0, 1], [2, 3], [-1, -1]]


def test_lamp_by_hand() -> None:
    """Shares as of `l2`: 31/60, 12/60, 17/60; each is divided by the sum of those that aren't smaller."""
    model, graph = sequence([[0.0, 0.0]], FIRST, SECOND)
    values = score("lamp", graph, model).channels[HIDDEN]
    np.testing.assert_allclose(values, [1.0, 12 / 60, 17 / 48], rtol=1e-12)


class Scaled(nn.Module):
    """A stream that two batch norms scale, a hidden layer that one scales twice over, one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        self.branch, self.branch_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.fold = nn.BatchNorm1d(8)
        self.middle, self.head = nn.Linear(8, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.branch_norm(self.branch(x)))
        x = self.fold(x.flatten(1))
        logits: torch.Tensor = self.head(torch.relu(self.middle(x)))
        return logits


def test_bn_scale_by_hand() -> None:
    """The stream's channels: 2, 3 in its norm, 4, 1 in the branch's, the mean of 1, 2, 3, 2 and 5 in the flat one's."""
    model = Scaled().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([-2.0, 3.0]))
        model.branch_norm.weight.copy_(torch.tensor([4.0, -1.0]))
        model.fold.weight.copy_(torch.tensor([1.0, -2.0, 3.0, 2.0, 5.0, 5.0, 5.0, -5.0]))
    graph = trace(model, (torch.ones(1, 1, 2, 2),))
    found = score("bn_scale", graph, model)
    (stream,) = (g.id for g in graph.groups if g.num_channels == 2)
    np.testing.assert_allclose(found.channels[stream], [(2 + 4 + 2) / 3, (3 + 1 + 5) / 3], rtol=1e-6)
    (middle,) = (g.id for g in graph.groups if g.num_channels == 3)
    np.testing.assert_allclose(
        found.channels[middle], 3 * score("l2", graph, model, normalise="none").channels[middle], rtol=1e-12
    )
    assert found.channels[middle].mean() == pytest.approx(1.0)


def test_bn_scale_needs_a_batch_norm() -> None:
    model, graph = sequence([[0.0, 0.0]], FIRST, SECOND)
    with pytest.raises(InputError, match="no batch norm scales a prunable channel of this model; take l2"):
        score("bn_scale", graph, model)


def test_a_layer_that_no_group_reaches_is_worth_an_average_group() -> None:
    from edgeprune.saliency.members import from_channels
    from tests.test_saliency import layer

    _, graph = layer()
    channels = {g.id: np.full(g.num_channels, 2.0 * (i + 1)) for i, g in enumerate(graph.groups)}
    average = np.mean([v.sum() for v in channels.values()])
    blocks = from_channels(graph, channels, unit="").blocks
    assert blocks["1:0"] == pytest.approx(average), "`1.alone`, which no group reaches"


def test_shares_of_coupled_members_count_alike() -> None:
    """The stream of `residual`: two producers and two consumers, each with shares that sum to 1."""
    model, graph = residual()
    for name in ("l1", "l2", "fpgm"):
        for values in score(name, graph, model, normalise="none").channels.values():
            assert values.sum() == pytest.approx(1.0)
        stream = max(score(name, graph, model).channels.values(), key=lambda values: float(values.sum()))
        assert stream.sum() == pytest.approx(4.0), "it is worth the four layers that it couples"
