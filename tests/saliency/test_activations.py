"""Criteria on activations against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.data import as_data
from edgeprune.graph import trace
from edgeprune.saliency import score
from tests.saliency.networks import HIDDEN, attention, pictures, residual, samples, tokens

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("activation_mean", [(3 + 0) / 2, (4 + 2) / 2, (2 + 2) / 2]),
        ("activation_variance", [1.5**2, 1.0**2, 2.0**2]),
        ("apoz", [1 / 2, 1.0, 1.0]),
        ("wanda", [4 * np.sqrt((9 + 0) / 2), 0.0, 2 * np.sqrt((4 + 4) / 2)]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    """Hidden (3, 4, 2) and (0, 2, -2), read by columns of magnitudes 4, 0 and 2."""
    model, graph, data = tokens()
    found = score(name, graph, model, data, normalise="none")
    np.testing.assert_allclose(found.channels[HIDDEN], expected, rtol=1e-6)
    shares = score(name, graph, model, data)
    assert shares.normalise == "sum"
    np.testing.assert_allclose(shares.channels[HIDDEN], np.array(expected) / sum(expected), rtol=1e-6)


def test_hrank_by_hand() -> None:
    """The first layer hands on a map of rank 2, one of rank 1 and zeros."""
    first = nn.Conv2d(2, 3, 1, bias=False)
    model = nn.Sequential(first, nn.Conv2d(3, 1, 1)).eval()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[:, :, None, None])
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    graph = trace(model, (x,))
    found = score("hrank", graph, model, as_data([x]), normalise="none")
    assert found.channels[HIDDEN].tolist() == [2.0, 1.0, 0.0]


def test_a_flattened_channel_is_read_at_all_its_indices() -> None:
    """conv -> flatten -> linear: each channel has four indices, of which the linear reads the mean."""
    first = nn.Conv2d(1, 2, 1, bias=False)
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([2.0, -3.0]).reshape(2, 1, 1, 1))
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    graph = trace(model, (x,))
    values = score("activation_mean", graph, model, as_data([x]), normalise="none").channels[HIDDEN]
    np.testing.assert_allclose(values, [2 * 3.0, 3 * 3.0], rtol=1e-6)


class Joined(nn.Module):
    """Two layers side by side behind a concatenation, which one linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(1, 2), nn.Linear(1, 3), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1))
        return logits


def test_a_group_behind_a_concatenation_is_read_at_its_own_indices() -> None:
    model = Joined().eval()
    with torch.no_grad():
        for layer, weight in ((model.left, [1.0, 2.0]), (model.right, [3.0, 4.0, 5.0])):
            layer.weight.copy_(torch.tensor(weight)[:, None])
            layer.bias.zero_()
        model.head.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0]]))
    graph = trace(model, (torch.ones(1, 1),))
    data = samples([10.0])
    means = score("activation_mean", graph, model, data, normalise="none").channels
    assert {len(v): v.tolist() for v in means.values()} == {2: [10.0, 20.0], 3: [30.0, 40.0, 50.0]}
    wandas = score("wanda", graph, model, data, normalise="none").channels
    assert {len(v): v.tolist() for v in wandas.values()} == {2: [10.0, 20.0], 3: [30.0, 40.0, 100.0]}


def test_what_is_read_is_what_the_eager_modules_get() -> None:
    model, graph = residual()
    data = pictures()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in ("inner", "last", "outer", "head")}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, i, own=own: own.append(i[0]))
        for name, own in seen.items()
    ]
    with torch.no_grad():
        for x, _ in data.hold_out()[1].batches(1):
            model(x)
    for hook in hooks:
        hook.remove()
    means = {name: torch.cat(x).abs().transpose(0, 1).flatten(1).mean(1).double().numpy() for name, x in seen.items()}
    found = score("activation_mean", graph, model, data, normalise="none").channels
    expected = {"inner.weight:0": means["outer"], "last.weight:0": means["head"]}
    expected["stem.weight:0"] = (means["inner"] + means["last"]) / 2
    by_size = {len(v): v for v in found.values()}
    for wanted in expected.values():
        np.testing.assert_allclose(by_size[len(wanted)], wanted, rtol=1e-5)


def test_batches_of_the_traced_size() -> None:
    """Traced for two: of three samples the last fills no batch; of one alone it is repeated."""
    model, graph = residual((2, 3, 8, 8))
    whole = score("activation_mean", graph, model, pictures(4), normalise="none")
    assert whole.num_samples == 2, "a quarter of the four is held out"
    single = score("activation_mean", graph, model, pictures(1), normalise="none")
    assert single.num_samples == 1
    one_model, one_graph = residual()
    alone = score("activation_mean", one_graph, one_model, pictures(1), normalise="none")
    for name, values in single.channels.items():
        np.testing.assert_allclose(values, alone.channels[name], rtol=1e-5)


def test_groups_that_only_matmuls_read_are_read_there() -> None:
    model, graph, data = attention()
    found = score("activation_mean", graph, model, data, normalise="none")
    rest = data.hold_out()[1]
    with torch.no_grad():
        x = torch.cat([x for x, _ in rest.batches(1)])
        y = model.norm(model.embed(x))
        q, k = (layer(y).unflatten(-1, (2, 3)).abs().mean((0, 1, 2)) for layer in (model.query, model.key))
    widths = [g for g in graph.groups if {m.parameter for m in g.members} >= {"query.weight", "key.weight"}]
    by_size = {g.num_channels: found.channels[g.id] for g in widths}
    assert sorted(by_size) == [2, 3, 6], "heads, the width of queries and keys, the stream"
    np.testing.assert_allclose(by_size[3], ((q + k) / 2).double().numpy(), rtol=1e-4)
